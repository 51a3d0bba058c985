"""Makes nf4.safetensors with bitsandbytes on a CPU: what NF4 with double quantisation must give, to the bit.

    pip install torch==2.13.0 bitsandbytes==0.50.2 numpy safetensors     (in an environment of its own)
    python tests/golden/make_nf4.py

bitsandbytes' CPU path misses the nearest 8-bit code of a block's scale in about 0.2 % of the blocks. So its codes,
maxima and their mean are kept as they are; the dequantised values are made by its own code from the scales it chose.
Rows whose length is even but no multiple of 64 are left out: there its CPU kernel takes the factor of the wrong block.
"""

from pathlib import Path

import numpy as np
import torch
from bitsandbytes import functional as bnb
from safetensors.numpy import save_file

SIZES = {"whole": (16, 320), "ragged": (7, 61), "tiny": (3,), "odd": (129,), "zeros": (4, 64), "many": (80, 256)}


def values(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    w = rng.standard_normal(shape) * 0.02
    if name == "zeros":
        w[0] = 0.0  # whole blocks of zeros
    if name == "many":
        w *= 10.0 ** rng.uniform(-4, 4, (shape[0], 1))  # block maxima of very different size
    return w.astype(np.float32)


def main() -> None:
    rng, tensors = np.random.default_rng(4), {}
    for name, shape in SIZES.items():
        w = values(name, shape, rng)
        codes, state = bnb.quantize_4bit(torch.from_numpy(w), blocksize=64, compress_statistics=True, quant_type="nf4")
        plain, single = bnb.quantize_4bit(
            torch.from_numpy(w), blocksize=64, compress_statistics=False, quant_type="nf4"
        )
        assert torch.equal(plain, codes)
        tensors |= {
            f"{name}.w": w,
            f"{name}.codes": codes.numpy().reshape(-1),
            f"{name}.absmax": single.absmax.numpy(),
            f"{name}.scale_codes": state.absmax.numpy(),
            f"{name}.scale_absmax": state.state2.absmax.numpy(),
            f"{name}.scale_offset": state.offset.numpy().reshape(1),
            f"{name}.float32": bnb.dequantize_4bit(codes, state).numpy(),
        }
        state.dtype = torch.float16
        tensors[f"{name}.float16"] = bnb.dequantize_4bit(codes, state).numpy()
        state.dtype = torch.bfloat16
        tensors[f"{name}.bfloat16"] = bnb.dequantize_4bit(codes, state).view(torch.uint16).numpy()
    tensors["scale_table"] = state.state2.code.numpy()
    tensors["value_table"] = state.code.numpy()
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, Path(__file__).parent / "nf4.safetensors")


if __name__ == "__main__":
    main()
