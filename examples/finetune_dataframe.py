"""Fine-tune on a pandas DataFrame, without Prefect: every stage is a plain function that fills an empty folder.

    python examples/finetune_dataframe.py OUT [STEPS]

OUT/model is then a model folder: python examples/generate.py OUT/model "12 + 30 ="
The base here is seeded, so that nothing needs to be there first. For a model of yours replace the line of base.source:
"base.source": "folder", "base.folder": "MODEL", with the [model] of MODEL/config.json as overrides.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

import magellano
from magellano import loader, merge
from magellano.backend import mx
from magellano.data.shards import Shards
from magellano.evaluate import score
from magellano.progress import shown, silent
from magellano.stages import attach_lora, quantize, tokenize, train
from magellano.tokenizer import Tokenizer

out, steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 200

# 1. The data: any frame with the columns of a format; `completions` has prompt and completion.
rng = np.random.default_rng(0)
frame = pd.DataFrame(rng.integers(0, 50, (2000, 2)), columns=["a", "b"]).drop_duplicates()
frame["prompt"] = frame.a.astype(str) + " + " + frame.b.astype(str) + " ="
frame["completion"] = " " + (frame.a + frame.b).astype(str)
out.mkdir(parents=True)
frame[["prompt", "completion"]].to_parquet(out / "sums.parquet")

# 2. The run: a profile that comes with the project, smaller, on that file.
profile = magellano.load_profile(
    "demo",
    {
        "base.source": "seeded",
        "model.d_model": 64, "model.n_layers": 4, "model.d_ff": 128, "model.vocab_size": 300,
        "data.format": "completions", "data.files": [str(out / "sums.parquet")], "data.seq_len": 64,
        "train.steps": steps, "train.warmup": min(10, steps), "train.lr": 1e-2,
    },
)  # fmt: skip


# 3. The stages. Each takes the folders of those before it and returns a few facts.
def new(name: str) -> Path:
    (out / name).mkdir()
    return out / name


with shown("train") as progress:
    tokens, base, adapter, trained = new("tokens"), new("base"), new("adapter"), new("trained")
    books = tokenize.run(tokens, profile.data, profile.model.vocab_size, silent)["accounting"]
    quantize.run(base, profile, None, silent)
    attached = attach_lora.run(adapter, profile, base)
    train.run(trained, profile, tokens, base, adapter, new("work"), progress)
print(f"rows read {books['rows_read']} = used {books['used']} + rejected + duplicates {books['duplicates']}")
print(f"trained {attached['trainable']:,} of {attached['parameters']:,} parameters")

# 4. What it gained, on rows that it has not seen.
tokenizer, held_out = Tokenizer.load(base), Shards(tokens, "held_out")
model = loader.load_release(trained, base, "float32")
before, after = (
    score(m, held_out, tokenizer.bytes_per_token(), batch=8, max_tokens=0, progress=silent).loss
    for m in (loader.load_model(base, "float32"), model)
)
print(f"held-out loss {before:.3f} -> {after:.3f} nats a token")

# 5. A model folder with the adapter merged into it, for whatever comes next.
loader.write_model(new("model"), profile.model, merge.tensors(model, mx.float32), quantized=False)
tokenizer.save(out / "model")
