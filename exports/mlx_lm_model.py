"""The model of SCM Magellano for mlx-lm: copied into what `magellano export RUN --to mlx-lm FOLDER` writes, where
config.json names it as `model_file`. Needs mlx and mlx-lm, nothing else of Magellano.

Residual stream h: embed -> for each layer h = h + mixer(rmsnorm(h)) -> rmsnorm -> tied head. Layer l (from 0) is a
mixture of experts where l % moe_every == moe_every - 1, else a Mamba-1 mixer (Gu & Dao 2023, arXiv 2312.00752).

Shapes: B batch, T time, D d_model, I d_inner, N d_state, K d_conv, E experts, k experts a token, M = B*T rows.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs
from mlx_lm.models.cache import ArraysCache
from mlx_lm.models.switch_layers import SwitchLinear

CHUNK = 32  # tokens whose states [B, T, I, N] exist at once


@dataclass
class ModelArgs(BaseModelArgs):
    """config.json's keys that this file reads."""

    model_type: str
    d_model: int
    n_layers: int
    n_experts: int
    top_k: int
    d_ff: int
    d_state: int
    d_conv: int
    expand: int
    dt_rank: int
    vocab_size: int
    moe_every: int
    norm_eps: float
    dt_norm_eps: float = 0.0  # above 0: dt, B and C are normed, as Falcon-Mamba has it
    tie_word_embeddings: bool = True


def scan(x_BTI, dt_BTI, A_IN, b_BTN, c_BTN, state_BIN):
    """y_t = c_t . s_t with s_t = exp(dt_t A) s_{t-1} + dt_t b_t x_t, float32. A chunk's states are made together, by
    doubling: after round n each place holds what its last 2^n tokens do. Returns y and the last state.
    """
    out = []
    for start in range(0, x_BTI.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        dt, b, c = dt_BTI[:, part], b_BTN[:, part], c_BTN[:, part]
        decay = mx.exp(dt[..., None] * A_IN)
        state = (dt * x_BTI[:, part])[..., None] * b[:, :, None, :]
        far = 1
        while far < dt.shape[1]:
            state = mx.concatenate([state[:, :far], state[:, far:] + decay[:, far:] * state[:, :-far]], axis=1)
            decay = mx.concatenate([decay[:, :far], decay[:, far:] * decay[:, :-far]], axis=1)
            far *= 2
        state = state + decay * state_BIN[:, None]
        out.append((state @ c[..., None]).squeeze(-1))
        state_BIN = state[:, -1]
    return mx.concatenate(out, axis=1), state_BIN


class Conv1d(nn.Module):
    """Holds the depthwise kernel [I, 1, K] and its bias [I]."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.weight = mx.zeros((channels, 1, width))
        self.bias = mx.zeros((channels,))


class Mamba(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        inner = args.expand * args.d_model
        self.in_proj = nn.Linear(args.d_model, 2 * inner, bias=False)
        self.conv1d = Conv1d(inner, args.d_conv)
        self.x_proj = nn.Linear(inner, args.dt_rank + 2 * args.d_state, bias=False)
        self.dt_proj = nn.Linear(args.dt_rank, inner, bias=True)
        self.A_log = mx.zeros((inner, args.d_state))
        self.D = mx.ones((inner,))
        self.out_proj = nn.Linear(inner, args.d_model, bias=False)

    def _normed(self, x):
        """x / rms(x), without a weight, where the model has it."""
        return mx.fast.rms_norm(x, None, self.args.dt_norm_eps) if self.args.dt_norm_eps else x

    def _conv(self, x_BTI, cache, mask_BT):
        width, lengths = self.args.d_conv - 1, None
        if mask_BT is not None:
            x_BTI = mx.where(mask_BT[..., None], x_BTI, 0)
        before = None if cache is None else cache[0]
        if before is None:
            before = mx.zeros((x_BTI.shape[0], width, x_BTI.shape[2]), dtype=x_BTI.dtype)
        x_BSI, T = mx.concatenate([before, x_BTI], axis=1), x_BTI.shape[1]
        if cache is not None:
            lengths = cache.lengths
            if lengths is None:
                cache[0] = mx.contiguous(x_BSI[:, T:])
            else:  # the rows end at different places
                at = mx.clip(lengths, 0, T)[:, None] + mx.arange(width)
                cache[0] = mx.take_along_axis(x_BSI, at[..., None], axis=1)
        weight_IK = self.conv1d.weight.squeeze(1).astype(x_BTI.dtype)
        taps = [x_BSI[:, k : k + T] * weight_IK[:, k] for k in range(width + 1)]
        return nn.silu(sum(taps) + self.conv1d.bias.astype(x_BTI.dtype))

    def __call__(self, u_BTD, cache=None, mask_BT=None):
        args, dtype = self.args, u_BTD.dtype
        x_BTI, z_BTI = mx.split(self.in_proj(u_BTD), 2, axis=-1)
        x_BTI = self._conv(x_BTI, cache, mask_BT)
        dt, b, c = mx.split(self.x_proj(x_BTI), [args.dt_rank, args.dt_rank + args.d_state], axis=-1)
        dt, b, c = (self._normed(part) for part in (dt, b, c))
        dt_BTI = nn.softplus(self.dt_proj(dt).astype(mx.float32))
        if mask_BT is not None:  # a state that does not move
            dt_BTI = mx.where(mask_BT[..., None], dt_BTI, 0)
        x32, z32 = x_BTI.astype(mx.float32), z_BTI.astype(mx.float32)
        state = None if cache is None else cache[1]
        if state is None:
            state = mx.zeros((x_BTI.shape[0], x_BTI.shape[2], args.d_state))
        A_IN = -mx.exp(self.A_log.astype(mx.float32))
        y_BTI, state = scan(x32, dt_BTI, A_IN, b.astype(mx.float32), c.astype(mx.float32), state)
        if cache is not None:
            cache[1] = state
            cache.advance(u_BTD.shape[1])
        y_BTI = (y_BTI + self.D.astype(mx.float32) * x32) * nn.silu(z32)
        return self.out_proj(y_BTI.astype(dtype))


class Router(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.weight = mx.zeros((args.n_experts, args.d_model))

    def __call__(self, u):
        return u.astype(mx.float32) @ self.weight.astype(mx.float32).T


class Experts(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = SwitchLinear(args.d_model, args.d_ff, args.n_experts, bias=False)
        self.w2 = SwitchLinear(args.d_ff, args.d_model, args.n_experts, bias=False)


def rows(layer, x, expert):
    """Each row of x [M, 1, in] through its expert; rows lie by expert. MLX's CPU has this product in float32 alone."""
    if type(layer) is not SwitchLinear or x.dtype == mx.float32 or mx.default_device() != mx.cpu:
        return layer(x, expert, sorted_indices=True)
    weight = layer.weight.astype(mx.float32).swapaxes(-1, -2)
    return mx.gather_mm(x.astype(mx.float32), weight, rhs_indices=expert, sorted_indices=True).astype(x.dtype)


class MoE(nn.Module):
    """Top-k of the softmax, renormalised; an expert is w2(relu(w1(x)))."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.top_k = args.top_k
        self.router = Router(args)
        self.experts = Experts(args)

    def __call__(self, u_BTD):
        k, u_MD = self.top_k, u_BTD.reshape(-1, u_BTD.shape[-1])
        share_ME = mx.softmax(self.router(u_MD), axis=-1)
        expert_Mk = mx.argpartition(-share_ME, kth=k - 1, axis=-1)[:, :k]
        gate_Mk = mx.take_along_axis(share_ME, expert_Mk, axis=-1)
        gate_Mk = gate_Mk / gate_Mk.sum(axis=-1, keepdims=True)
        order = mx.argsort(expert_Mk.reshape(-1))  # each expert's rows beside one another
        expert = expert_Mk.reshape(-1)[order]
        x = mx.take(u_MD, order // k, axis=0)[:, None, :]
        y = rows(self.experts.w2, nn.relu(rows(self.experts.w1, x, expert)), expert)
        y_MkD = mx.take(y.squeeze(1), mx.argsort(order), axis=0).reshape(-1, k, u_MD.shape[-1])
        return (y_MkD * gate_Mk[..., None].astype(y_MkD.dtype)).sum(axis=1).reshape(u_BTD.shape)


class Layer(nn.Module):
    def __init__(self, args: ModelArgs, index: int):
        super().__init__()
        self.is_moe = index % args.moe_every == args.moe_every - 1
        self.norm = nn.RMSNorm(args.d_model, eps=args.norm_eps)
        self.mixer = MoE(args) if self.is_moe else Mamba(args)

    def __call__(self, h_BTD, cache, mask_BT):
        u_BTD = self.norm(h_BTD)
        return h_BTD + (self.mixer(u_BTD) if self.is_moe else self.mixer(u_BTD, cache, mask_BT))


class Backbone(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embeddings = nn.Embedding(args.vocab_size, args.d_model)
        self.layers = [Layer(args, index) for index in range(args.n_layers)]
        self.norm_f = nn.RMSNorm(args.d_model, eps=args.norm_eps)

    def __call__(self, tokens_BT, cache):
        h_BTD = self.embeddings(tokens_BT)
        # One entry a Mamba layer; what is padded is so for all alike.
        caches = iter(cache if cache is not None else [None] * len(self.layers))
        mask_BT = None if cache is None else cache[0].make_mask(tokens_BT.shape[1])
        for layer in self.layers:
            h_BTD = layer(h_BTD, None if layer.is_moe else next(caches), mask_BT)
        return self.norm_f(h_BTD)


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.backbone = Backbone(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.d_model, args.vocab_size, bias=False)

    def __call__(self, tokens_BT, cache=None):
        h_BTD = self.backbone(tokens_BT, cache)
        return self.backbone.embeddings.as_linear(h_BTD) if self.args.tie_word_embeddings else self.lm_head(h_BTD)

    @property
    def layers(self):
        return self.backbone.layers

    def make_cache(self):
        return [ArraysCache(size=2) for layer in self.layers if not layer.is_moe]
