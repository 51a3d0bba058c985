"""The Mamba-MoE of magellano/model.py in plain PyTorch with autograd, as fast as its eager operations make it on a CPU.

What was chosen for speed: the scan walks over `unbind`ed steps (a[:, t] has a gradient of a's whole size) in the faster
of two forms, measured at the start; each expert is a parameter of its own, so that no gradient is a zero-filled stack,
and works on its tokens alone; the head sees only rows that count; no gradient checkpointing; masks of document borders
only where there are any; AdamW is the fused one. The frozen base of a fine-tune is dense float32, so nothing is
dequantised.

Shapes: B batch, T time, D d_model, I d_inner, N d_state, R dt_rank, K d_conv, E experts, V vocabulary, M = B*T rows.
"""

import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from magellano.layout import EMBEDDING
from magellano.names import LayerKind
from magellano.profile import ModelConfig

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor | None]], Tensor]


class Model:
    """The loss as a function of named tensors: parameters by our names; NAME.EXPERT for each expert of a stack."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor], scan: Scan, lora_scale: float = 0.0):
        self.config, self.p, self.scan, self.lora_scale = config, tensors, scan, lora_scale

    def loss(
        self, tokens_BT: Tensor, targets_BT: Tensor, weights_BT: Tensor, reset_BT: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of the counted targets' -log p in nats, and the routers' two losses."""
        self.keep, same = _borders(reset_BT, self.config.d_conv)
        h_BTD = self.p[EMBEDDING][tokens_BT]
        head = EMBEDDING.removesuffix(".weight")
        if self.lora_scale:
            h_BTD = h_BTD + (self.lora_scale * self.p[f"{head}.lora_b"][tokens_BT]) @ self.p[f"{head}.lora_a"]
        balance, z = torch.zeros(()), torch.zeros(())
        for layer in range(self.config.n_layers):
            at = f"backbone.layers.{layer}"
            u_BTD = self._norm(h_BTD, f"{at}.norm.weight")
            if self.config.kind(layer) is LayerKind.MAMBA:
                h_BTD = h_BTD + self._mamba(u_BTD, f"{at}.mixer", same)
            else:
                y_MD, more_balance, more_z = self._moe(u_BTD.flatten(0, 1), f"{at}.mixer")
                h_BTD, balance, z = h_BTD + y_MD.view_as(h_BTD), balance + more_balance, z + more_z
        h_MD = self._norm(h_BTD, "backbone.norm_f.weight").flatten(0, 1)
        counted = weights_BT.flatten().nonzero()[:, 0]
        if len(counted) < len(h_MD):
            h_MD = h_MD[counted]
        nll = F.cross_entropy(self._linear(h_MD, head), targets_BT.flatten()[counted], reduction="sum")
        return nll, balance, z

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.p[name], self.config.norm_eps)

    def _linear(self, x: Tensor, path: str, expert: str = "") -> Tensor:
        y = F.linear(x, self.p[f"{path}.weight{expert}"])
        a = self.p.get(f"{path}.lora_a{expert}")
        if a is None:
            return y
        return y + F.linear(self.lora_scale * F.linear(x, a), self.p[f"{path}.lora_b{expert}"])

    def _mamba(self, u_BTD: Tensor, at: str, same: list[Tensor | None]) -> Tensor:
        c, p = self.config, self.p
        x_BTI, z_BTI = self._linear(u_BTD, f"{at}.in_proj").chunk(2, dim=-1)
        x_BTI = F.silu(_conv(x_BTI, p[f"{at}.conv1d.weight"], p[f"{at}.conv1d.bias"], same))
        dt_BTR, b_BTN, c_BTN = self._linear(x_BTI, f"{at}.x_proj").split([c.dt_rank, c.d_state, c.d_state], dim=-1)
        d_BTI = F.softplus(self._linear(dt_BTR, f"{at}.dt_proj") + p[f"{at}.dt_proj.bias"])
        A_IN = -torch.exp(p[f"{at}.A_log"])
        y_BTI = self.scan(x_BTI, d_BTI, A_IN, b_BTN, c_BTN, self.keep) + p[f"{at}.D"] * x_BTI
        return self._linear(y_BTI * F.silu(z_BTI), f"{at}.out_proj")

    def _moe(self, u_MD: Tensor, at: str) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        logits_ME = u_MD @ self.p[f"{at}.router.weight"].T
        top_Mk, expert_Mk = logits_ME.topk(c.top_k, dim=-1)
        gate_Mk, y_MD = top_Mk.softmax(dim=-1), torch.zeros_like(u_MD)
        sizes = []
        for e in range(c.n_experts):
            token, choice = (expert_Mk == e).nonzero(as_tuple=True)
            sizes.append(len(token))
            hidden = F.relu(self._linear(u_MD[token], f"{at}.experts.w1", f".{e}"))
            y = self._linear(hidden, f"{at}.experts.w2", f".{e}")
            y_MD = y_MD.index_add(0, token, y * gate_Mk[token, choice, None])
        share_E = torch.tensor(sizes) / expert_Mk.numel()
        balance = c.n_experts * (share_E * logits_ME.softmax(dim=-1).mean(dim=0)).sum()
        return y_MD, balance, logits_ME.logsumexp(dim=-1).square().mean()


def _borders(reset_BT: Tensor, taps: int) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Where states and taps are cut. For each step [B, 1, 1], zero where a document starts, None where none does; for
    each tap m = 1 .. K-1 [B, T, 1], zero where t - m lies in another document, None where no document starts inside.
    """
    starts = reset_BT != 0
    keep = [
        (~starts[:, t]).float()[:, None, None] if t and starts[:, t].any() else None for t in range(starts.shape[1])
    ]
    if not starts[:, 1:].any():
        return keep, [None] * (taps - 1)
    document = starts.long().cumsum(dim=1)
    same: list[Tensor | None] = []
    for m in range(1, taps):
        before = F.pad(document, (m, 0))[:, : document.shape[1]]
        same.append((before == document).float()[:, :, None])
    return keep, same


def _conv(x_BTI: Tensor, weight_I1K: Tensor, bias_I: Tensor, same: list[Tensor | None]) -> Tensor:
    """F.conv1d where nothing is cut; else tap by tap, which takes 0.9 to 1.5 times as long."""
    if not any(mask is not None for mask in same):
        padded = F.pad(x_BTI.transpose(1, 2), (len(same), 0))
        return F.conv1d(padded, weight_I1K, bias_I, groups=bias_I.shape[0]).transpose(1, 2)
    T, taps = x_BTI.shape[1], weight_I1K.unbind(dim=-1)
    y = x_BTI * taps[-1][:, 0] + bias_I
    for m, mask in enumerate(same, start=1):
        shifted = F.pad(x_BTI, (0, 0, m, 0))[:, :T] * taps[-1 - m][:, 0]
        y = y + (shifted if mask is None else shifted * mask)
    return y


def scan_whole(x: Tensor, d: Tensor, A_IN: Tensor, b: Tensor, c: Tensor, keep: list[Tensor | None]) -> Tensor:
    """Decays and inputs of all steps first, [T, B, I, N]: the fewest calls; best while they fit the caches."""
    d, x, b, c = (v.transpose(0, 1).contiguous() for v in (d, x, b, c))
    decay_TBIN = torch.exp(d.unsqueeze(-1) * A_IN)
    input_TBIN = (d * x).unsqueeze(-1) * b.unsqueeze(2)
    state, states = torch.zeros(()), []
    for decay, given, kept in zip(decay_TBIN.unbind(0), input_TBIN.unbind(0), keep, strict=True):
        state = decay * (state if kept is None else state * kept) + given
        states.append(state)
    return (torch.stack(states) * c.unsqueeze(2)).sum(dim=-1).transpose(0, 1)


def scan_stepwise(x: Tensor, d: Tensor, A_IN: Tensor, b: Tensor, c: Tensor, keep: list[Tensor | None]) -> Tensor:
    """Each step by itself: more calls, but nothing leaves the caches."""
    d, x, b, c = (v.transpose(0, 1).contiguous() for v in (d, x, b, c))
    steps = (d.unsqueeze(-1), (d * x).unsqueeze(-1), b.unsqueeze(2), c.unsqueeze(2))
    state, ys = torch.zeros(()), []
    for d_t, dx_t, b_t, c_t, kept in zip(*(v.unbind(0) for v in steps), keep, strict=True):
        state = torch.exp(d_t * A_IN) * (state if kept is None else state * kept) + dx_t * b_t
        ys.append((state * c_t).sum(dim=-1))
    return torch.stack(ys, dim=1)


def faster_scan(config: ModelConfig, batch: int, time_steps: int, repeats: int = 5) -> Scan:
    """The form whose forward and backward take less time at these sizes: the best of a few repeats, in turn."""
    make = torch.Generator().manual_seed(0)
    sizes = {"x": config.d_inner, "d": config.d_inner, "b": config.d_state, "c": config.d_state}
    v = {name: torch.rand(batch, time_steps, size, generator=make).requires_grad_() for name, size in sizes.items()}
    A_IN = -torch.rand(config.d_inner, config.d_state, generator=make)
    best: dict[Scan, float] = {scan_whole: float("inf"), scan_stepwise: float("inf")}
    for _ in range(repeats):
        for scan in best:
            started = time.perf_counter()
            scan(v["x"], v["d"], A_IN, v["b"], v["c"], [None] * time_steps).sum().backward()
            best[scan] = min(best[scan], time.perf_counter() - started)
    return min(best, key=lambda scan: best[scan])
