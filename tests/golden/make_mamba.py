"""Makes mamba.safetensors: a small random `transformers.MambaForCausalLM` with its logits, hidden states and gradients.

Run once by hand in an environment with torch and transformers:  python tests/golden/make_mamba.py
The slow (plain torch) path runs in float64, so that the numbers are the formula's and not a kernel's.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import MambaConfig, MambaForCausalLM

HERE = Path(__file__).parent


def main() -> None:
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=300, hidden_size=32, state_size=4, num_hidden_layers=2, expand=2, conv_kernel=4, time_step_rank=3,
        use_mambapy=False, layer_norm_epsilon=1e-5, residual_in_fp32=False, use_cache=False, tie_word_embeddings=True,
    )  # fmt: skip
    model = MambaForCausalLM(config).double().train()
    with torch.no_grad():
        for name, p in model.named_parameters():  # larger than the initial values, so that every path matters
            if not name.endswith("A_log"):
                p.add_(0.2 * torch.randn_like(p))
    tokens = torch.randint(0, config.vocab_size, (2, 19))
    logits = model(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, config.vocab_size), tokens[:, 1:].reshape(-1))
    loss.backward()
    out = {f"weight.{n}": p.detach().float() for n, p in model.named_parameters()}
    out |= {f"grad.{n}": p.grad.float() for n, p in model.named_parameters()}
    out |= {"tokens": tokens.int(), "logits": logits.detach().float(), "loss": loss.detach().float().reshape(1)}
    save_file({k: v.contiguous() for k, v in out.items()}, HERE / "mamba.safetensors")


if __name__ == "__main__":
    main()
