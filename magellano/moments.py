"""What a training step holds at its largest moments, from shapes alone: each function gives the bytes that its moment
needs beside weights, optimiser and what has been kept, as magellano/backprop.py and the operations make them.

Two back ends differ. On a CPU arrays are made one by one, float32, experts and the head are made dense one expert and
one slice at a time, and inside a gradient MLX keeps what an array was made of: hence the sums below that count one
value two or three times. On a GPU layers are compiled and 16 bits wide, a value goes when it has been used last, all
experts of a part are made dense at once, and the head as a whole.

Shapes: B batch, T time, M = B T rows, D d_model, I d_inner, N d_state, R dt_rank, K d_conv, E experts, k of them per
token, F what w1 makes, V vocabulary, r LoRA rank, C rows of a chunk of the loss.
"""

import math
from dataclasses import dataclass
from functools import cached_property

from magellano.layout import SMALL_WEIGHT, ParamSpec, adapter_shapes, layer_parameters, parameters
from magellano.names import Compute, LayerKind, LoraKind, LoraTarget, StateDtype
from magellano.nf4 import SLICE_VALUES
from magellano.ops.moe import most_together
from magellano.ops.nf4 import BLOCK
from magellano.ops.selective_scan import Geometry, geometry
from magellano.optimizer import JOINED, SMALL_ON_CPU, SMALL_ON_GPU
from magellano.profile import Profile

FLOAT32, FLOAT16 = 4, 2
FULLEST_EXPERT = 1.25  # its load over the mean, in a base whose router is not broken
ROOM = 1.35  # rows of the experts on a GPU over token copies: what is padded, and the fifth to spare

FULLEST_PART = 1.4  # rows of the largest of their parts over its share of the experts

LAYER, LOSS, DENSE, STEP = "a layer's intermediates", "the loss", "a weight, dense", "new values of the optimiser"
Parts = dict[str, int]


@dataclass(frozen=True)
class Sizes:
    """What the moments depend on."""

    profile: Profile
    gpu: bool

    @property
    def rows(self) -> int:
        return self.profile.train.batch * self.profile.data.seq_len

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        compute = self.profile.train.compute
        narrow = self.gpu if compute is Compute.AUTO else compute is not Compute.FLOAT32
        return FLOAT16 if narrow else FLOAT32

    @property
    def state(self) -> int:
        """Bytes of one of the optimiser's two states."""
        return FLOAT32 if self.profile.train.state is StateDtype.FLOAT32 else FLOAT16

    def quantizes(self, spec: ParamSpec) -> bool:
        return spec.target is not None and (spec.target is not LoraTarget.HEAD or self.profile.quantize.embedding)

    def kept_dense(self, spec: ParamSpec) -> bool:
        """Whether a projection is small enough to be dense beside its codes."""
        projection = spec.target is not None and spec.target is not LoraTarget.HEAD and len(spec.shape) == 2
        return projection and spec.size <= SMALL_WEIGHT

    def dense(self, size: int) -> int:
        """Bytes of a projection of so many values while a product needs it."""
        return 0 if size <= SMALL_WEIGHT else self.width * size

    def rank(self, target: LoraTarget, layer: int | None = None) -> int:
        lora = self.profile.lora
        return lora.rank_of(target, layer) if target in lora.targets else 0

    def adapter(self, spec: ParamSpec) -> list[int]:
        """The sizes of the arrays of the adapter on `spec`; none without one."""
        return [math.prod(shape) for shape in adapter_shapes(spec, self.profile.lora).values()]

    def layer_adapters(self, layer: int) -> list[int]:
        return [n for spec in layer_parameters(self.profile.model, layer) for n in self.adapter(spec)]

    @cached_property
    def dora(self) -> bool:
        return self.profile.lora.kind is LoraKind.DORA

    @cached_property
    def lengths(self) -> int:
        """How many rows DoRA gives a length of their own."""
        shapes = (adapter_shapes(spec, self.profile.lora) for spec in parameters(self.profile.model))
        return sum(math.prod(each.get("lora_m", (0,))) for each in shapes)

    @cached_property
    def adapters(self) -> list[int]:
        return [n for spec in parameters(self.profile.model) for n in self.adapter(spec)]


def forward(s: Sizes, layer: int) -> Parts:
    """While a layer runs forward."""
    return _mamba_forward(s) if s.profile.model.kind(layer) is LayerKind.MAMBA else _moe_forward(s, layer)


def backward(s: Sizes, layer: int) -> Parts:
    """While a layer's backward runs: its forward again, then its gradients, its adapter's among them."""
    if s.profile.model.kind(layer) is LayerKind.MAMBA:
        return _mamba_backward(s)
    return _moe_backward(s, layer)


def _mamba_forward(s: Sizes) -> Parts:
    """The scan: u; x, z, x after the convolution, dt, y and a contiguous z; and the states between its chunks."""
    m, M = s.profile.model, s.rows
    D, I, N, R = m.d_model, m.d_inner, m.d_state, m.dt_rank
    scan = s.width * M * (D + 6 * I + R + 4 * N) + _borders(s)
    projection = s.width * M * (D + 2 * I)
    dense = s.dense(2 * I * D)
    return {LAYER: scan} if scan >= projection + dense else {LAYER: projection, DENSE: dense}


def _mamba_backward(s: Sizes) -> Parts:
    m, M = s.profile.model, s.rows
    D, I, N, R, K = m.d_model, m.d_inner, m.d_state, m.dt_rank, m.d_conv
    dense = s.dense(2 * I * D)
    scaled = 2 * I if s.dora else 0  # in_proj's gradient before DoRA's lengths
    partial = FLOAT32 * M * 2 * N * -(-I // _geometry(s).group_channels)  # of db and dc, one a threadgroup
    if s.gpu:
        # the scan: u; x, z, x after the convolution, dt, y and dy; a contiguous z; dx, ddt, dz
        scan = s.width * M * (2 * D + 10 * I + 2 * (R + 2 * N)) + partial + _borders(s)
        projection = s.width * M * (3 * D + 7 * I + scaled)
        return {LAYER: scan} if scan >= projection + dense else {LAYER: projection, DENSE: dense}
    thin = s.width * M * 4 * (R + 2 * N) + partial + _borders(s)
    # the convolution: the norm's three values; the seven above less dy; ddt, dz, dx twice and its sum; x contiguous, dx
    convolution = s.width * M * (3 * D + 12 * I) + thin + FLOAT32 * M * I * (K + 1) // 64
    projection = s.width * M * (4 * D + 10 * I + scaled) + thin
    return {LAYER: convolution} if convolution >= projection + dense else {LAYER: projection, DENSE: dense}


def _geometry(s: Sizes) -> Geometry:
    m, c = s.profile.model, s.profile
    return geometry(c.train.batch, c.data.seq_len, m.d_inner, m.d_state, s.gpu)[1]


def _borders(s: Sizes) -> int:
    """The states between the scan's chunks, the last state and A."""
    m, c = s.profile.model, s.profile
    chunks = -(-c.data.seq_len // _geometry(s).steps)
    return FLOAT32 * m.d_inner * m.d_state * (c.train.batch * chunks + 2)


def _expert_rows(s: Sizes) -> tuple[int, int]:
    """Rows of all experts together and of the one that has most."""
    m, M = s.profile.model, s.rows
    copies = M * m.top_k
    rows = min(int(ROOM * copies), m.n_experts * M) if s.gpu else copies
    return rows, min(M, int(FULLEST_EXPERT * copies / m.n_experts))


def _part_rows(s: Sizes) -> int:
    """Rows of the largest part of a GPU's room: that of the busiest experts."""
    m = s.profile.model
    rows, _ = _expert_rows(s)
    return min(rows, int(FULLEST_PART * rows * most_together(m.n_experts) / m.n_experts))


def _moe_forward(s: Sizes, layer: int) -> Parts:
    """Each row's x, relu and A x stay until the end on a CPU, and y; then the rows of y side by side, and their sum."""
    m, M = s.profile.model, s.rows
    D, F, r = m.d_model, m.d_up, s.rank(LoraTarget.W1, layer)
    rows, most = _expert_rows(s)
    if s.gpu:
        made = s.width * (2 * M * D + rows * (2 * D + F + r) + _part_rows(s) * F)
        return {LAYER: made, DENSE: s.width * most_together(m.n_experts) * F * D}
    live = M * D + rows * (2 * D + F + r) + most * F
    return _larger(s, live, gather=rows * 2 * D, dense=F * D)


def _moe_backward(s: Sizes, layer: int) -> Parts:
    """Each row's x, relu and A x, and the gradients dy, dh and dx stay until the adapter's gradients are made."""
    m, M, adapters = s.profile.model, s.rows, s.layer_adapters(layer)
    D, F, r = m.d_model, m.d_up, max(s.rank(target, layer) for target in (LoraTarget.W1, LoraTarget.W2))
    rows, most = _expert_rows(s)
    down = rows * D if s.dora else 0  # w2's products, for the gradient of their lengths
    if s.gpu:  # and the adapter in 16 bits; of one part at a time dy, da and dh, and one of its weights
        values = 4 * M * D + rows * (2 * D + F + 4 * r) + _part_rows(s) * (D + 2 * F) + sum(adapters) + down
        return {LAYER: s.width * values, DENSE: s.width * most_together(m.n_experts) * F * D}
    # the norm's three values and an output that stays zero; of the last expert da, in three copies
    live = 4 * M * D + rows * (3 * D + 2 * F + 5 * r) + 3 * most * F + down
    made = _larger(s, live, gather=rows * 3 * D + M * D, dense=F * D + most * D)
    gradients = FLOAT32 * (sum(adapters) + max(adapters, default=0))
    return made if sum(made.values()) >= s.width * live + gradients else {LAYER: s.width * live + gradients}


def _larger(s: Sizes, live: int, *, gather: int, dense: int) -> Parts:
    """`live` values with those of the gathering or with a dense weight, whichever is more."""
    if gather >= dense:
        return {LAYER: s.width * (live + gather)}
    return {LAYER: s.width * live, DENSE: s.width * dense}


def loss(s: Sizes) -> Parts:
    """The hidden states and their gradient, the gradient of the head's B; and of the chunk at hand its logits, as a
    product, with the adapter's part added, and as they are kept.
    """
    m, M = s.profile.model, s.rows
    D, V, r = m.d_model, m.vocab_size, s.rank(LoraTarget.HEAD)
    C = min(s.profile.train.loss_chunk, M)
    head = s.quantizes(parameters(m)[0])
    if s.gpu:
        rows = M * D * (2 * s.width + 2 * FLOAT32) + V * r * (FLOAT32 + 2 * s.width)
        return {LOSS: rows + 3 * s.width * C * V, DENSE: s.width * V * D}
    rows = M * D * (4 * s.width + FLOAT32) + FLOAT32 * V * r * (2 if C < M else 1)
    step = max(BLOCK, SLICE_VALUES // D // BLOCK * BLOCK)
    slices = [min(step, V - first) for first in range(0, V, step)]
    worst: Parts = {}
    for i, W in enumerate(slices):
        logits = C * max(sum(slices[:i]) + 3 * W, sum(slices[i:]) + W)  # making them; turning them into gradients
        made = {LOSS: rows + s.width * logits, DENSE: s.width * W * D if head else 0}
        worst = max(worst, made, key=lambda parts: sum(parts.values()))
    return worst


def optimiser(s: Sizes) -> Parts:
    """New values beside the old, of one group after the other, for a gradient goes with its step: on a CPU of weights
    alone, since states are written over. Small tensors form groups, for which their gradients are joined.
    """
    border = SMALL_ON_GPU if s.gpu else SMALL_ON_CPU
    small = min(JOINED, sum(n for n in s.adapters if n < border))
    large = max((n for n in s.adapters if n >= border), default=0)
    if not s.gpu:
        return {STEP: FLOAT32 * max(small, large)}
    new = FLOAT32 + 2 * s.state
    return {STEP: max((new + gradient_width(s)) * small, new * large)}


def gradient_width(s: Sizes) -> int:
    """Bytes of a gradient's element as it comes, and where several micro-batches are added, of the sum's."""
    return FLOAT32 if s.profile.train.accumulate > 1 else s.width
