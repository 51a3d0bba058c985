"""Import a Mamba of transformers: same logits here as there.

    python examples/import_mamba.py [FOLDER]

FOLDER holds a MambaForCausalLM or FalconMambaForCausalLM in safetensors, as state-spaces/mamba-130m-hf; without one a
small random one is made. Needs the other side: pip install -r requirements-peers.lock
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from magellano import cli, loader
from magellano.backend import mx

try:
    import tokenizers
    import torch
    import transformers
except ModuleNotFoundError as e:
    sys.exit(f"{e.name} is not installed: pip install -r requirements-peers.lock")


def small(folder: Path) -> Path:
    """A random Mamba with a byte-level tokenizer, as `save_pretrained` leaves it."""
    torch.manual_seed(0)
    shape = {"vocab_size": 300, "hidden_size": 48, "state_size": 8, "num_hidden_layers": 3, "time_step_rank": 4}
    transformers.MambaForCausalLM(transformers.MambaConfig(**shape, eos_token_id=0)).save_pretrained(folder)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bpe = tokenizers.trainers.BpeTrainer(vocab_size=290, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["hello world, hello again"] * 9, bpe)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


with tempfile.TemporaryDirectory() as made:
    theirs = Path(sys.argv[1]) if len(sys.argv) > 1 else small(Path(made) / "theirs")
    ours = Path(made) / "ours"

    # 1. As on the command line: magellano import FOLDER OUT
    if code := cli.main(["import", str(theirs), str(ours)]):
        sys.exit(code)

    # 2. The same logits, in float32.
    model = loader.load_model(ours, "float32")
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 16))
    with torch.no_grad():
        reference = transformers.MambaForCausalLM.from_pretrained(theirs).float().eval()
        wanted = reference(torch.from_numpy(tokens)).logits.numpy()
    apart = np.abs(np.array(model(mx.array(tokens))) - wanted).max()
    print(f"logits differ by {apart:.1e} at most, of up to {np.abs(wanted).max():.2f}")
    assert apart < 1e-3

    # 3. Experts on it, to fine-tune what was a Mamba as a Mamba-MoE.
    if code := cli.main(["import", str(ours), f"{made}/moe", "--experts", "4", "--top-k", "2", "--d-ff", "96"]):
        sys.exit(code)
