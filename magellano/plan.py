"""What a fine-tune will need, from shapes alone: nothing is allocated.

A step's peak is not the sum of all it ever holds. Early in the backward pass all layers' inputs are still kept and few
gradients are there, late it is the other way round, the loss has neither gradients nor a layer's intermediates, and the
optimiser has all gradients and new values but no activations. So each of these moments is counted (see moments.py), and
the plan is the largest. Held against MLX's own counter by tests/test_plan.py. Bytes unless said otherwise.
"""

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass

from magellano import activations, moments
from magellano.layout import ParamSpec, count, lora_count, lora_shapes, parameters
from magellano.moments import FLOAT32, Parts, Sizes
from magellano.names import LayerKind, LoraKind, Recompute
from magellano.ops.nf4 import BLOCK, SCALE_BLOCK
from magellano.profile import Profile

GIB = 1 << 30
LENGTHS, MOST = 64, 1 << 20  # tokens: the steps of lengths that are tried, and where trying ends
SMALLEST_CHUNK = 64  # rows of the loss: below, its products are no longer efficient

GRADIENTS, KEPT, KEPT_ALL = "gradients", "layer inputs kept", "activations kept"
UNDER_WAY = "held by launches under way"  # what a GPU has used last, but not yet done with when more is allocated
UNDER_WAY_SHARE = 0.06  # of everything else: production3b on an H100 from 1 x 512 to 1 x 16,384 took 0.06 to 0.13
_TEMPORARY = (GRADIENTS, KEPT, KEPT_ALL, moments.LAYER, moments.LOSS, moments.DENSE, moments.STEP, UNDER_WAY)


@dataclass(frozen=True)
class Plan:
    """Memory by part in bytes at the worst `moment` of a step, the total at the other moments, and the arithmetic of
    one optimiser step.
    """

    parameters: int
    trainable: int
    memory: Parts
    moment: str
    moments: dict[str, int]
    tokens_per_step: int
    flops_per_step: int

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    @property
    def share(self) -> float:
        """Trainable parameters over those of the base."""
        return self.trainable / self.parameters


def fine_tune(profile: Profile, gpu: bool) -> Plan:
    """The plan of the train stage on a CPU or a GPU; on a CPU with activations kept where this machine's memory and the
    profile allow it.
    """
    s = Sizes(profile, gpu)
    held = _held(s)
    found = {name: {**held, **dict.fromkeys(_TEMPORARY, 0), **more} for name, more in _whole_or_layers(s, held)}
    for parts in found.values():
        parts[UNDER_WAY] = int(UNDER_WAY_SHARE * sum(parts.values())) if gpu else 0
    totals = {name: sum(parts.values()) for name, parts in found.items()}
    worst = max(totals, key=lambda name: totals[name])
    tokens, again = s.rows * profile.train.accumulate, recomputes(profile, gpu)
    flops = flops_per_token(profile, again) * tokens + profile.train.accumulate * (1 + again) * norms_flops(profile)
    return Plan(
        count(profile.model), lora_count(profile.model, profile.lora), found[worst], worst, totals, tokens, flops
    )


def fit(profile: Profile, gpu: bool, limit: int) -> Profile:
    """`profile` with the largest train.loss_chunk, its own or half and half again, with which it is planned within
    `limit` bytes; as it is where that is not to be had.
    """
    chunk = profile.train.loss_chunk
    while chunk >= min(SMALLEST_CHUNK, profile.train.loss_chunk):
        smaller = profile.model_copy(update={"train": profile.train.model_copy(update={"loss_chunk": chunk})})
        if fine_tune(smaller, gpu).total <= limit:
            return smaller
        chunk //= 2
    return profile


def resized(profile: Profile, batch: int, seq_len: int) -> Profile:
    """`profile` at another batch and length."""
    train = profile.train.model_copy(update={"batch": batch})
    data = profile.data.model_copy(update={"seq_len": seq_len})
    return profile.model_copy(update={"train": train, "data": data})


def largest(profile: Profile, gpu: bool, limit: int) -> dict[str, int]:
    """The largest batch of the profile's length, and the longest row of batch 1 in steps of LENGTHS tokens, planned
    within `limit` bytes, of those up to MOST; 0: none. Layers are made again, as the largest runs must.
    """
    train = profile.train.model_copy(update={"recompute": Recompute.ALWAYS})
    profile = profile.model_copy(update={"train": train})

    def fits(batch: int, seq_len: int) -> bool:
        return fine_tune(resized(profile, batch, seq_len), gpu).total <= limit

    length = profile.data.seq_len
    return {
        "batch": bisect.bisect(range(1, MOST // length + 1), 0, key=lambda batch: not fits(batch, length)),
        "seq_len": LENGTHS * bisect.bisect(range(1, MOST // LENGTHS + 1), 0, key=lambda n: not fits(1, n * LENGTHS)),
    }


def _held(s: Sizes) -> Parts:
    """What stays in memory from step to step."""
    specs = parameters(s.profile.model)
    quantized = [spec for spec in specs if s.quantizes(spec)]
    trainable = sum(s.adapters)
    return {
        "weights in 4 bits": sum(-(-spec.size // 2) for spec in quantized),
        "their scales": sum(_scale_bytes(spec) for spec in quantized),
        "other weights": FLOAT32 * sum(spec.size for spec in specs if not s.quantizes(spec)),
        "small weights, dense too": s.width * sum(spec.size for spec in quantized if s.kept_dense(spec)),
        "adapters": FLOAT32 * trainable,
        "squares of the base's rows": FLOAT32 * s.lengths,
        "optimiser": 2 * s.state * trainable,
    }


def recomputes(profile: Profile, gpu: bool) -> bool:
    """Whether layers are made again in the backward pass, or their activations kept."""
    s = Sizes(profile, gpu)
    return _recomputes(s, _held(s))


def _recomputes(s: Sizes, held: Parts) -> bool:
    kept, trainable = activations.kept(s.profile.model, s.rows, s.width), FLOAT32 * sum(s.adapters)
    needed = sum(held.values()) - 2 * s.state * sum(s.adapters) + 2 * trainable + kept
    return s.gpu or activations.decided(s.profile.train.recompute, needed, s.profile.memory.limit_gib)


def _whole_or_layers(s: Sizes, held: Parts) -> Iterator[tuple[str, Parts]]:
    if _recomputes(s, held):
        yield from _moments(s)
        return
    kept, trainable = activations.kept(s.profile.model, s.rows, s.width), FLOAT32 * sum(s.adapters)
    sums = trainable if s.profile.train.accumulate > 1 else 0
    yield "gradient of the whole model", {GRADIENTS: sums + trainable, KEPT_ALL: kept}
    yield "loss", {GRADIENTS: sums, KEPT_ALL: kept // 2, **moments.loss(s)}
    if sums:
        yield "sum of the gradients", {GRADIENTS: trainable + 2 * sums}
    yield "optimiser", {GRADIENTS: moments.gradient_width(s) * sum(s.adapters), **moments.optimiser(s)}


def _moments(s: Sizes) -> Iterator[tuple[str, Parts]]:
    """Each moment of a step with what it holds beside the above. The gradient of the head's adapter is there first,
    layers give theirs from the last to the first.
    """
    m, accumulates = s.profile.model, s.profile.train.accumulate > 1
    one = s.width * s.rows * m.d_model  # a layer's input
    sums = FLOAT32 * sum(s.adapters) if accumulates else 0
    done = s.width * sum(s.adapter(parameters(m)[0]))
    for layer in range(m.n_layers):
        more = {GRADIENTS: sums, KEPT: (layer + 1) * one}
        yield f"forward of layer {layer} ({m.kind(layer)})", {**more, **moments.forward(s, layer)}
    yield "loss", {GRADIENTS: sums, KEPT: (m.n_layers + 1) * one, **moments.loss(s)}
    for layer in reversed(range(m.n_layers)):
        more = {GRADIENTS: sums + done, KEPT: (layer + 2) * one}  # with the gradient that comes down
        yield f"backward of layer {layer} ({m.kind(layer)})", {**more, **moments.backward(s, layer)}
        done += s.width * sum(s.layer_adapters(layer))
    if accumulates:
        yield "sum of the gradients", {GRADIENTS: done + 2 * sums}
    yield "optimiser", {GRADIENTS: moments.gradient_width(s) * sum(s.adapters), **moments.optimiser(s)}


def _scale_bytes(spec: ParamSpec) -> int:
    """8 bits a block, float32 a block of blocks, one offset per matrix (per expert in a stack)."""
    matrix = spec.shape[-1] * spec.shape[-2]
    blocks = -(-matrix // BLOCK)
    return spec.size // matrix * (blocks + FLOAT32 * (-(-blocks // SCALE_BLOCK)) + FLOAT32)


def flops_per_token(profile: Profile, again: int = 1) -> int:
    """Forward and the gradient to activations, 2 operations a weight each, and as many for each time that layers are
    made `again`; adapters add their own.
    """
    m = profile.model
    active = adapters = 0
    for spec in parameters(m):
        routed = len(spec.shape) == 3 and spec.target is not None
        active += spec.size * m.top_k // m.n_experts if routed else spec.size
        if pair := lora_shapes(spec, profile.lora):
            size = sum(math.prod(shape) for shape in pair)
            adapters += size * m.top_k // m.n_experts if routed else size
    scan = 9 * m.d_inner * m.d_state * sum(m.kind(layer) is LayerKind.MAMBA for layer in range(m.n_layers))
    return (4 + 2 * again) * active + (2 + again) * scan + (6 + 2 * again) * adapters


def norms_flops(profile: Profile) -> int:
    """What DoRA's norms take in a pass, whatever its tokens: A W^T of every matrix that has an adapter."""
    if profile.lora.kind is not LoraKind.DORA:
        return 0
    pairs = ((spec, lora_shapes(spec, profile.lora)) for spec in parameters(profile.model))
    return sum(2 * spec.size * pair[0][-2] for spec, pair in pairs if pair)
