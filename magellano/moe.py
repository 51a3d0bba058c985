"""The mixture-of-experts mixer: dropless top-k routing over two-layer experts w2(relu(w1(x))), or gated ones.

Shapes: B batch, T time, D d_model, E experts, F d_ff, k experts per token, M = B*T tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from magellano.backend import mx, nn
from magellano.linear import ExpertProjection, Weight, array
from magellano.names import Gate
from magellano.ops.experts import feed_forward
from magellano.ops.moe import Room, Routing, places, route
from magellano.profile import ModelConfig


class RouterState(NamedTuple):
    """What a router did with a batch: its two losses, load balance and z, float32 [2], and token copies per expert."""

    losses: mx.array
    size_E: mx.array


class Router(nn.Module):
    """Holds the router's weight [E, D] and, where there is one, its bias [E], never quantised."""

    def __init__(self, weight: mx.array, bias: mx.array | None = None):
        super().__init__()
        self.weight = weight
        if bias is not None:
            self.bias = bias

    def __call__(self, u_MD: mx.array) -> mx.array:
        """Logits [M, E] in float32."""
        logits_ME = u_MD.astype(mx.float32) @ self.weight.astype(mx.float32).T
        return logits_ME + self.bias.astype(mx.float32) if "bias" in self else logits_ME


class Experts(nn.Module):
    """w1 [E, F, D] and w2 [E, D, F]."""

    def __init__(self, w1: Weight, w2: Weight):
        super().__init__()
        self.w1, self.w2 = ExpertProjection(w1), ExpertProjection(w2)


class MoE(nn.Module):
    """u_BTD -> y_BTD. `get(name)` supplies the weight called `name` within this mixer."""

    def __init__(self, config: ModelConfig, get: Callable[[str], Weight]):
        super().__init__()
        self.config = config
        bias = array(get("router.bias")) if config.gate is Gate.SIGMOID else None
        self.router = Router(array(get("router.weight")), bias)
        self.experts = Experts(get("experts.w1.weight"), get("experts.w2.weight"))

    def __call__(
        self, u_BTD: mx.array, *, room: Room | None = None, unread: bool = False
    ) -> tuple[mx.array, "RouterState"]:
        """Returns y_BTD and what the router did. `room`: see `places`; what trains of the experts then lies in its
        order, and where it does not hold the loads, results are void. `unread`: y is only differentiated and may be
        left out.
        """
        k, shape = self.config.top_k, u_BTD.shape
        u_MD = u_BTD.reshape(-1, shape[-1])
        # 1. route in float32
        logits_ME = self.router(u_MD)
        routing = route(logits_ME, k)
        gate_Mk = self._gates(logits_ME, routing)
        # 2. a row for each token copy among its expert's
        at = places(routing, room)
        # 3. each expert on its own rows; back to the tokens, weighted by the gates
        w1, w2 = (w.layer(u_MD.dtype, room is not None) for w in (self.experts.w1, self.experts.w2))
        y_MD = feed_forward(u_MD, gate_Mk, at, w1, w2, unread=unread, hidden=self.config.hidden)
        return y_MD.reshape(shape), RouterState(self._losses(logits_ME, routing.size_E), routing.size_E)

    def counts(self, u_BTD: mx.array) -> list[int]:
        """Token copies per expert, for the reports."""
        routing = route(self.router(u_BTD.reshape(-1, u_BTD.shape[-1])), self.config.top_k)
        return np.array(routing.size_E).tolist()

    def _gates(self, logits_ME: mx.array, routing: Routing) -> mx.array:
        if self.config.gate is Gate.SOFTMAX:
            return routing.gate_Mk
        return mx.sigmoid(mx.take_along_axis(logits_ME, routing.expert_Mk, axis=1))

    def _losses(self, logits_ME: mx.array, size_E: mx.array) -> mx.array:
        """Load balance (Fedus et al. 2021, arXiv 2101.03961; 1 when even) and router z (Zoph et al. 2022, arXiv
        2202.08906).
        """
        share_E = mx.stop_gradient(size_E.astype(mx.float32)) / max(1, logits_ME.shape[0] * self.config.top_k)
        balance = self.config.n_experts * (share_E * mx.softmax(logits_ME, axis=-1).mean(axis=0)).sum()
        return mx.stack([balance, mx.logsumexp(logits_ME, axis=-1).square().mean()])
