"""Generate from a model folder or a release: text as it comes, several prompts at once, a state kept in a file.

    python examples/generate.py MODEL PROMPT [PROMPT ...]

MODEL is what `magellano generate` takes: a folder, the start of a release's key, or a profile's name.
"""

import sys
import tempfile
from pathlib import Path

from magellano import context
from magellano.commands.chosen import Chosen
from magellano.completion import Writer
from magellano.generate import begin, continued, together
from magellano.sampling import Sampling

run, prompts = sys.argv[1], sys.argv[2:] or ["Once"]
chosen = Chosen.find(run)
model, tokenizer = chosen.model("float32"), chosen.tokenizer()
end = tokenizer.end_of_text

# 1. One text, token by token. A Writer holds back what is not a whole character yet, and what may be a stop string.
sampling = Sampling(temperature=0.8, top_p=0.95, seed=1)
start = begin(model, end, tokenizer.encode(prompts[0]))
writer = Writer(tokenizer.decode_bytes, stops=["\n\n"])
print(f"[{prompts[0]}]", end="", flush=True)
for token in continued(model, start, end, 24, sampling):
    print(writer.push(token), end="", flush=True)
    if writer.stopped:
        break
print(writer.finish())

# 2. All prompts in lock-step, greedily.
contexts = [begin(model, end, tokenizer.encode(prompt)) for prompt in prompts]
made: list[list[int]] = [[] for _ in prompts]
for tokens in together(model, contexts, end, 12):
    for text, token in zip(made, tokens, strict=True):
        if token is not None:
            text.append(token)
for prompt, text in zip(prompts, made, strict=True):
    print(f"[{prompt}]{tokenizer.decode(text)}")

# 3. A prompt read once, kept in a file, and continued from there: the state has one size, however long the prompt.
identity = context.identity(chosen.folders)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "prompt.safetensors"
    context.save(path, start, identity)
    again = context.load(path, model, identity)
    size = path.stat().st_size
same = list(continued(model, again, end, 12)) == list(continued(model, start, end, 12))
print(f"the prompt's state: {size / 1e3:.0f} kB; goes on as before: {same}")
