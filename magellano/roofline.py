"""How long a training step should take, from shapes and a machine's ceilings (roofline: Williams et al. 2009).

Work is counted as the code does it: products, in floating-point operations; the scan, in state updates; what is written
and read beside the products, in bytes; launches. A GPU starts launches while it computes, so the longer of the two
counts; a CPU does one after the other.

Shapes as in moments.py.
"""

from dataclasses import dataclass

from magellano import moments, plan
from magellano.backend import device_memory, mx, on_gpu
from magellano.benchmark import machine
from magellano.errors import InputError
from magellano.layout import parameters
from magellano.moments import FLOAT32, Sizes
from magellano.names import LayerKind, LoraTarget, Objective
from magellano.ops import causal_conv, selective_scan
from magellano.profile import Profile

# The share of a square product's rate that a step's products reach together. GPU: what production3b's step of 16 x 512
# on an H100 (274 ms) leaves for them. CPU: demo and phase1 at several sizes need 0.5 to 1.0 on two busy cores.
GPU_EFFICIENCY, CPU_EFFICIENCY = 0.7, 0.7
# Of a layer forward, forward again and backward; of a chunk of the loss; of a trainable tensor in the norm and the
# optimiser. On a CPU in calls of a kernel, which cost several operations (demo with 32 tokens: 0.13 s and no more).
LAYER_LAUNCHES = {True: {LayerKind.MAMBA: 90, LayerKind.MOE: 130}, False: {LayerKind.MAMBA: 45, LayerKind.MOE: 70}}
LOSS_LAUNCHES, TENSOR_LAUNCHES = {True: 30, False: 15}, {True: 4, False: 1}
CPU_DENSE = 0.33  # of the copy bandwidth, at which a CPU makes NF4 weights dense: 7.4 of 24.9 GB/s written on two cores
GPU_STEP_LAUNCH = 3.2  # of a step's launch, a product or a kernel, over an elementwise one's, on an H100: 3.0 to 3.7
SCAN_BACKWARD = 2  # forwards that the scan's backward costs


@dataclass(frozen=True)
class Machine:
    """Ceilings: operations a second of a large product in the dtype that models compute in, bytes a second read or
    written, state updates a second of the scan's forward, seconds a launch; bytes of memory that a run may take.
    """

    name: str
    gpu: bool
    matmul: float
    bandwidth: float
    scan: float
    launch: float
    memory: int | None
    source: str


_M4_SHARE = 0.75  # of unified memory: the rest is the system's
KNOWN = {
    "m4": Machine(
        "Apple M4", True, 4e12, 120e9, 2.5e10, 8e-6, int(_M4_SHARE * (16 << 30)),
        "assumed, none at hand: 120 GB/s and 16 GB as sold, a quarter of that left to the system; about 4 TFLOP/s of "
        "float16 products; the scan in proportion to an H200's float32 arithmetic; 8 microseconds a launch",
    ),
    "h100": Machine(
        "NVIDIA H100 SXM", True, 650e12, 2.5e12, 1.2e12, 20e-6, 80 * 10**9,
        "products of 615 to 714 TFLOP/s, copies of 2.3 to 2.65 TB/s, the scan, and 16 to 24 microseconds of the host's "
        "time a launch as measured on several; 80 GB as sold",
    ),
    "h200": Machine(
        "NVIDIA H200", True, 690e12, 4.1e12, 1.2e12, 20e-6, 141 * 10**9,
        "products of 683 to 697 TFLOP/s as measured on one; 4.8 TB/s and 141 GB as sold, of the former 4.1 as copies "
        "usually reach; the scan and launches as on an H100",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """Seconds of a step by what takes them, and together as they overlap."""

    parts: dict[str, float]
    seconds: float


def measured() -> Machine:
    """The ceilings of the machine at hand, in well under a second."""
    matmul, bandwidth = machine.matmul_rate(), machine.copy_bandwidth()
    scan, launch = _scan_rate(), _launch_cost()
    mx.clear_cache()
    return Machine("this machine", on_gpu(), matmul, bandwidth, scan, launch, device_memory(), "measured now")


def _scan_rate() -> float:
    B, T, I, N = (4, 512, 4096, 16) if on_gpu() else (1, 256, 512, 16)
    x, b = mx.ones((B, T, I)), mx.ones((B, T, N))
    A = -mx.ones((I, N))
    mx.eval(x, b, A)
    at_once = 8 if on_gpu() else 1  # so that the host's part of one lies behind the others
    seconds = machine.seconds(lambda: [selective_scan(x, x, A, b, b) for _ in range(at_once)], 3) / at_once
    return B * T * I * N / seconds


def _launch_cost() -> float:
    """Of a step's average launch on a GPU, by one small operation in a chain; of one call of a kernel on a CPU, where
    it is far more than that.
    """
    x, length = mx.ones((1, 8, 64)), 50
    weight, bias = mx.ones((64, 4)), mx.ones((64,))
    mx.eval(x, weight, bias)

    def chain() -> mx.array:
        made = x
        for _ in range(length):
            made = mx.abs(made) if on_gpu() else causal_conv(made, weight, bias)  # type: ignore[assignment]
        return made

    return machine.seconds(chain, 3) / length * (GPU_STEP_LAUNCH if on_gpu() else 1.0)


def step(profile: Profile, on: Machine) -> Step:
    """An optimiser step of `profile` on a machine."""
    s = Sizes(profile, on.gpu)
    m, micro = profile.model, profile.train.accumulate
    mamba = sum(m.kind(layer) is LayerKind.MAMBA for layer in range(m.n_layers))
    efficiency = GPU_EFFICIENCY if on.gpu else CPU_EFFICIENCY
    dense = on.bandwidth * (1.0 if on.gpu else CPU_DENSE)
    again = plan.recomputes(profile, on.gpu)  # forward a second time
    reference = profile.train.objective is Objective.DPO  # has a forward pass of its own
    more = again + reference  # forwards beside the first
    products = plan.flops_per_token(profile, more) * s.rows + (1 + again) * plan.norms_flops(profile)
    updates = (1 + more + SCAN_BACKWARD) * s.rows * m.d_inner * m.d_state * mamba
    parts = {
        "products": micro * products / (efficiency * on.matmul),
        "scan": micro * updates / on.scan,
        "weights made dense": micro * _dense_bytes(s, again, reference) / dense,
        "activations": micro * _activation_bytes(s, more) / on.bandwidth,
        "optimiser": _optimiser_bytes(s) / on.bandwidth,
        "launches": (micro * _launches(s, reference) + TENSOR_LAUNCHES[on.gpu] * len(s.adapters)) * on.launch,
    }
    work = sum(seconds for part, seconds in parts.items() if part != "launches")
    return Step(parts, max(work, parts["launches"]) if on.gpu else work + parts["launches"])


def machine_named(name: str) -> Machine:
    """One of KNOWN. InputError for any other name."""
    if name not in KNOWN:
        raise InputError(
            f"--on {name}: no such machine is known; one of {', '.join(KNOWN)}, or leave it out for this one"
        )
    return KNOWN[name]


def matmul_rate_for(profile: Profile, tokens_per_s: float) -> float:
    """The rate of products, operations a second, that `tokens_per_s` needs if nothing else took time."""
    return plan.flops_per_token(profile) * tokens_per_s


def _dense_bytes(s: Sizes, again: bool, reference: bool) -> int:
    """Codes are read and dense values written, forward, again, and backward; what only makes an output is left out when
    a layer is made again, but not with DoRA. The head is made dense once on a GPU, and on a CPU twice a chunk of the
    loss.
    """
    unread = (LoraTarget.OUT_PROJ, LoraTarget.W2)
    chunks = -(-s.rows // s.profile.train.loss_chunk)
    total = 0.0
    for spec in parameters(s.profile.model):
        if s.quantizes(spec):
            normed = s.dora and bool(s.adapter(spec))  # made dense for DoRA's norms too
            passes = 2 + reference + (again and (normed or spec.target not in unread)) + (1 + again) * normed
            if spec.target is LoraTarget.HEAD:
                passes = 1 + reference if s.gpu else (2 + reference) * chunks
            total += passes * spec.size * (s.width + 0.52)
    return int(total)


def _activation_bytes(s: Sizes, more: int) -> int:
    """Each of a layer's intermediates written and read once, forward, again and backward; of the loss the logits are
    written, read for the sum, read and written as gradients, and read twice by products.
    """
    m, total = s.profile.model, 6 * s.width * s.rows * s.profile.model.vocab_size
    for layer in range(m.n_layers):
        forward, backward = moments.forward(s, layer)[moments.LAYER], moments.backward(s, layer)[moments.LAYER]
        total += 2 * ((1 + more) * forward + backward)
    return total


def _optimiser_bytes(s: Sizes) -> int:
    """Gradients written, read for the norm and for the step; weights and two states read and written."""
    return sum(s.adapters) * (3 * moments.gradient_width(s) + 2 * FLOAT32 + 4 * s.state)


def _launches(s: Sizes, reference: bool) -> int:
    """A third of a layer's are its forward pass, and most of the loss's."""
    m = s.profile.model
    chunks = -(-s.rows // s.profile.train.loss_chunk)
    layers = sum(LAYER_LAUNCHES[s.gpu][m.kind(layer)] for layer in range(m.n_layers))
    return layers * (3 + reference) // 3 + LOSS_LAUNCHES[s.gpu] * chunks * (1 + reference)
