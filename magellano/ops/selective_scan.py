"""The selective scan of Mamba (Gu & Dao 2023, arXiv 2312.00752): contract, plain-MLX reference, fast path, choice.

Shapes: B batch, T time, I d_inner, N d_state; K chunks of TC steps, G threadgroups.
"""

from dataclasses import dataclass

from magellano.backend import mx
from magellano.ops import launch
from magellano.ops.launch import Dialect, Kernel

_INPUTS = ("x", "dt", "A", "b", "c", "skip", "z", "dt_bias", "reset", "state")
_SEGMENTS = ("ends", "totals", "keeps")  # what a first launch finds of each segment of time
_FORWARD = Kernel(
    "selective_scan_forward", (*_INPUTS, *_SEGMENTS), ("y", "state_out", "borders", "total", "kept"), made=_SEGMENTS
)
_BACKWARD = Kernel(
    "selective_scan_backward",
    (*_INPUTS, "borders", "dy", "dstate_out", *_SEGMENTS),
    ("dx", "ddt", "dA", "db", "dc", "dskip", "dz", "dbias", "dstate", "total", "kept"),
    made=("borders", *_SEGMENTS),
)


def selective_scan(
    x: mx.array,
    dt: mx.array,
    A: mx.array,
    b: mx.array,
    c: mx.array,
    skip: mx.array | None = None,
    z: mx.array | None = None,
    dt_bias: mx.array | None = None,
    reset: mx.array | None = None,
    state: mx.array | None = None,
    return_state: bool = False,
    frozen_parameters: bool = False,
    log_A: bool = False,
    no_gradient: bool = False,
) -> mx.array | tuple[mx.array, mx.array]:
    """y_t = c_t . s_t + skip x_t with s_t = exp(d_t A) s_{t-1} + d_t x_t b_t, where d is softplus(dt + dt_bias) if
    dt_bias is given and dt if not; with z, y_t is multiplied by silu(z_t).

    reset: non-zero where a document starts; the state before that step is zero. state: the state before the first
    step, zero by default. Returns y_BTI in x's dtype, and with return_state also the last state in float32. All is
    float32 inside; float32, float16 and bfloat16 inputs may mix. Inputs over time may be views, such as
    parts of a projection: they are read where they lie. log_A: A holds log(-A), as Mamba's weights do.

    Differentiable once, in every input but reset. frozen_parameters: A, skip and dt_bias are constants; their gradients
    are then zero and cost nothing. no_gradient: nothing has one, and A, skip, dt_bias and state lie without gaps, which
    spares a step of decoding most of its graph. Equal inputs give equal bits. On a CPU it computes at once: inside
    mx.compile or mx.vmap it raises TracedError. Raises ValueError for an argument of a wrong shape.
    """
    arrays = (x, dt, A, b, c, skip, z, dt_bias, reset, state)
    given = {name: array for name, array in zip(_INPUTS, arrays, strict=True) if array is not None}
    _check(given)
    if launch.dialect() is Dialect.REFERENCE:
        A_IN = -mx.exp(A.astype(mx.float32)) if log_A else A
        y_BTI, last_BIN = reference(x, dt, A_IN, *arrays[3:])
    else:
        y_BTI, last_BIN = _fast(given, return_state, frozen_parameters, log_A, no_gradient)
    return (y_BTI, last_BIN) if return_state else y_BTI


def reference(
    x_BTI: mx.array,
    dt_BTI: mx.array,
    A_IN: mx.array,
    b_BTN: mx.array,
    c_BTN: mx.array,
    skip_I: mx.array | None = None,
    z_BTI: mx.array | None = None,
    dt_bias_I: mx.array | None = None,
    reset_BT: mx.array | None = None,
    state_BIN: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """The definition, step by step in MLX operations: slow, differentiable by MLX. Returns y_BTI, the last state."""
    dtype = x_BTI.dtype
    (B, T, I), N = x_BTI.shape, A_IN.shape[1]
    x_BTI, d_BTI, A_IN, b_BTN, c_BTN = (v.astype(mx.float32) for v in (x_BTI, dt_BTI, A_IN, b_BTN, c_BTN))
    if dt_bias_I is not None:
        d_BTI = mx.logaddexp(d_BTI + dt_bias_I.astype(mx.float32), mx.array(0.0))
    s_BIN = mx.zeros((B, I, N)) if state_BIN is None else state_BIN.astype(mx.float32)
    ys = []
    for t in range(T):
        if reset_BT is not None:
            s_BIN = mx.where(reset_BT[:, t, None, None] != 0, 0.0, s_BIN)
        decay_BIN = mx.exp(d_BTI[:, t, :, None] * A_IN)
        s_BIN = decay_BIN * s_BIN + (d_BTI[:, t] * x_BTI[:, t])[:, :, None] * b_BTN[:, t, None, :]
        ys.append((s_BIN * c_BTN[:, t, None, :]).sum(axis=-1))
    y_BTI = mx.stack(ys, axis=1)
    if skip_I is not None:
        y_BTI = y_BTI + skip_I.astype(mx.float32) * x_BTI
    if z_BTI is not None:
        z_BTI = z_BTI.astype(mx.float32)
        y_BTI = y_BTI * z_BTI * mx.sigmoid(z_BTI)
    return y_BTI.astype(dtype), s_BIN


def _check(given: dict[str, mx.array]) -> None:
    x, A = given["x"], given["A"]
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"selective_scan: x has shape {x.shape}, expected [B, T, I], none of them zero")
    B, T, I = x.shape
    if A.ndim != 2 or A.shape[0] != I or A.shape[1] == 0:
        raise ValueError(f"selective_scan: A has shape {A.shape}, expected [I, N] with I = {I}, as in x {x.shape}")
    N = A.shape[1]
    expected = {
        "x": (B, T, I), "dt": (B, T, I), "A": (I, N), "b": (B, T, N), "c": (B, T, N), "skip": (I,), "z": (B, T, I),
        "dt_bias": (I,), "reset": (B, T), "state": (B, I, N),
    }  # fmt: skip
    for name, array in given.items():
        if array.shape != expected[name]:
            sizes = f"with x {x.shape} and A {A.shape}"
            raise ValueError(f"selective_scan: {name} has shape {array.shape}, expected {expected[name]} {sizes}")
        if name != "reset" and not mx.issubdtype(array.dtype, mx.floating):
            raise ValueError(f"selective_scan: {name} is {array.dtype}, expected a floating dtype")


@dataclass(frozen=True)
class Geometry:
    """How a kernel's threads share the work; the names in brackets are the texts' template integers."""

    lanes: int  # lanes that share a channel's states [NL]
    channels: int  # channels per thread [CPT]
    simdgroups: int  # simdgroups per threadgroup [SG]
    steps: int  # steps per chunk, between two kept borders [TC]
    simd: int  # threads per simdgroup
    segments: int = 1  # parts of time that are scanned side by side [SEGS]

    @property
    def group_channels(self) -> int:
        return self.simdgroups * self.simd // self.lanes * self.channels

    def template(self) -> dict[str, mx.Dtype | int]:
        ahead = self.simd > 1  # on a CPU loads need no head start
        assert not ahead or self.steps <= self.simdgroups * self.simd
        sizes = {"NL": self.lanes, "CPT": self.channels, "SG": self.simdgroups, "TC": self.steps}
        return {**sizes, "SEGS": self.segments, "AHEAD": ahead}

    @property
    def threadgroup(self) -> tuple[int, int, int]:
        return (self.simdgroups * self.simd, 1, 1)

    def grid(self, B: int, I: int, segments: int) -> tuple[int, int, int]:
        """The threads of a launch over `segments` of the segments."""
        return (-(-I // self.group_channels) * self.threadgroup[0], B, segments)


def geometry(B: int, T: int, I: int, N: int, gpu: bool | None = None) -> tuple[Geometry, Geometry]:
    """The default geometries of forward and backward for these sizes, on a GPU or the host, by default as the dialect
    in force says; their chunks are equal. On a GPU N must be a power of two.
    """
    if launch.gpu_geometry() if gpu is None else gpu:
        # Measured on an H200 by benchmarks/gpu_scan.py. Few channels fill the chip by more lanes, then by segments.
        many, steps = B * I >= 8192, 4 if T == 1 else 8

        def segments(channels: int) -> int:
            """So many that there are at least `channels` to scan, if each is long enough."""
            return next(n for n in (1, 2, 4, 8) if n == 8 or B * I * n >= channels or 32 * steps * n > T)

        # A first launch over the segments costs half as much again, so rows must be long for more than it takes.
        simdgroups = launch.threads(128) // 32
        ahead = Geometry(min(2 if many else 4, N), 1, simdgroups, steps, 32, segments(16384 if T >= 4096 else 4096))
        return ahead, Geometry(min(4, N), 1, 2 if many else 4, steps, 32, segments(4096))
    widths = (
        (128, 64, 32, 16, 8, 4, 2, 1) if B * I >= 2048 else (64, 32, 16, 8, 4, 2, 1)
    )  # enough groups for every core
    width = max(c for c in widths if I % c == 0)
    chosen = Geometry(1, channels=width, simdgroups=1, steps=1 if T == 1 else 16, simd=1)
    return chosen, chosen


def _fast(
    given: dict[str, mx.array], return_state: bool, frozen: bool, log_A: bool, no_gradient: bool
) -> tuple[mx.array, mx.array]:
    """Through the kernels, with their own gradient."""
    N = given["A"].shape[1]
    given = _prepare(given)
    constants = {"reset"} | ({"A", "skip", "dt_bias"} if frozen else set())
    moving = [name for name in given if name not in constants]
    B, T, I = given["x"].shape
    ahead, back = geometry(B, T, I, given["A"].shape[1])
    if no_gradient:
        y_BTI, last_BIN, _ = forward(given, ahead, log_A, gapless=True)
        return y_BTI, last_BIN[:, :, :N]

    @mx.custom_function
    def scan(*values: mx.array) -> tuple[mx.array, ...]:
        return tuple(forward({**given, **dict(zip(moving, values, strict=True))}, ahead, log_A))

    @scan.vjp
    def scan_vjp(primals, cotangents, outputs):  # type: ignore[no-untyped-def]
        values = {**given, **dict(zip(moving, primals, strict=True))}
        dstate_out = cotangents[1] if return_state else None
        grads = backward(values, outputs[2], cotangents[0], dstate_out, back, frozen, log_A)
        return tuple(grads[name] for name in moving)

    y_BTI, last_BIN, _ = scan(*[given[name] for name in moving])  # type: ignore[misc]
    return y_BTI, last_BIN[:, :, :N]


def _prepare(given: dict[str, mx.array]) -> dict[str, mx.array]:
    """The arrays as the kernels take them: the state in float32, reset as bytes or bools, and on a GPU N filled up to
    a power of two by states with b = c = 0, which stay zero and add nothing.
    """
    ready = dict(given)
    N = given["A"].shape[1]
    extra = (1 << (N - 1).bit_length()) - N if launch.gpu_geometry() else 0
    for name, array in given.items():
        if name == "state":
            ready[name] = array.astype(mx.float32)
        if name == "reset":
            ready[name] = launch.flags(array)
        if extra and name in ("A", "b", "c", "state"):
            ready[name] = mx.pad(ready[name], [(0, 0)] * (array.ndim - 1) + [(0, extra)])
    return ready


def forward(given: dict[str, mx.array], chosen: Geometry, log_A: bool = False, gapless: bool = False) -> list[mx.array]:
    """One launch, or two where time is cut into segments: y_BTI, the last state_BIN, and the states between chunks
    [B, K-1, N, I] for `backward`.
    """
    (B, T, I), N = given["x"].shape, given["A"].shape[1]
    K, S, none = -(-T // chosen.steps), chosen.segments, launch.nothing().shape
    arrays = [given.get(name, launch.nothing()) for name in _INPUTS]
    template = {**_flags(given), **chosen.template(), **_types(given), "N": N, "LOG_A": log_A}
    segments = [launch.nothing()] * len(_SEGMENTS)
    if S > 1:
        _, *found = _FORWARD(
            [*arrays, *segments],
            template={**template, "SUMMARY": True},
            grid=chosen.grid(B, I, S - 1),
            threadgroup=chosen.threadgroup,
            output_shapes=[none, (S - 1, B, I, N), none, (S - 1, B, I), (S - 1, B, I)],
            output_dtypes=[given["x"].dtype, *[mx.float32] * 4],
            gapless=gapless,
        )
        segments = [found[0], *found[2:]]
    return _FORWARD(
        [*arrays, *segments],
        template={**template, "SUMMARY": False},
        grid=chosen.grid(B, I, S),
        threadgroup=chosen.threadgroup,
        output_shapes=[(B, T, I), (B, I, N), (B, K - 1, N, I) if K > 1 else none, none, none],
        output_dtypes=[given["x"].dtype, *[mx.float32] * 4],
        gapless=gapless,
    )[:3]


def backward(
    given: dict[str, mx.array],
    borders: mx.array,
    dy_BTI: mx.array,
    dstate_out_BIN: mx.array | None,
    chosen: Geometry,
    frozen: bool,
    log_A: bool = False,
) -> dict[str, mx.array]:
    """One or two launches and the sums over their partial results: the gradient of every input under its name."""
    (B, T, I), N = given["x"].shape, given["A"].shape[1]
    G, S, none = -(-I // chosen.group_channels), chosen.segments, launch.nothing().shape
    arrays = [given.get(name, launch.nothing()) for name in _INPUTS]
    arrays += [borders, dy_BTI, launch.nothing() if dstate_out_BIN is None else dstate_out_BIN]
    flags = {**_flags(given), "HAS_DSTATE": dstate_out_BIN is not None, "FROZEN": frozen}
    types = _types(given)
    template = {**flags, **chosen.template(), **types, "N": N, "LOG_A": log_A}
    dtypes = [types["TX"], types["TDT"], *[mx.float32] * 4, types["TZ"], *[mx.float32] * 4]
    segments = [launch.nothing()] * len(_SEGMENTS)
    if S > 1:
        segments = _BACKWARD(
            [*arrays, *segments],
            template={**template, "SUMMARY": True},
            grid=chosen.grid(B, I, S - 1),
            threadgroup=chosen.threadgroup,
            output_shapes=[*[none] * 8, (S, B, I, N), (S, B, I), (S, B, I)],
            output_dtypes=dtypes,
        )[8:]
    per_row = none if frozen else (S * B, I)
    dx, ddt, dA, db, dc, dskip, dz, dbias, dstate, _, _ = _BACKWARD(
        [*arrays, *segments],
        template={**template, "SUMMARY": False},
        grid=chosen.grid(B, I, S),
        threadgroup=chosen.threadgroup,
        output_shapes=[
            (B, T, I), (B, T, I), none if frozen else (S * B, I, N), (G, B, T, N), (G, B, T, N), per_row,
            (B, T, I) if "z" in given else none, per_row, (B, I, N) if "state" in given else none,
            none, none,
        ],
        output_dtypes=dtypes,
    )  # fmt: skip
    grads = {"x": dx, "dt": ddt, "z": dz, "state": dstate}
    grads |= {"b": db.sum(axis=0).astype(given["b"].dtype), "c": dc.sum(axis=0).astype(given["c"].dtype)}
    if not frozen:
        dA_IN = dA.sum(axis=0)
        if log_A:  # dA/dlog(-A) = A
            dA_IN = -dA_IN * mx.exp(given["A"].astype(mx.float32))
        sums = {"A": dA_IN, "skip": dskip.sum(axis=0), "dt_bias": dbias.sum(axis=0)}
        grads |= {name: sums[name].astype(given[name].dtype) for name in sums if name in given}
    return grads


def _types(given: dict[str, mx.array]) -> dict[str, mx.Dtype]:
    names = {"TX": "x", "TDT": "dt", "TZ": "z", "TB": "b", "TCC": "c"}
    return {word: given.get(name, launch.nothing()).dtype for word, name in names.items()}


def _flags(given: dict[str, mx.array]) -> dict[str, bool]:
    names = {"HAS_SKIP": "skip", "HAS_Z": "z", "HAS_BIAS": "dt_bias", "HAS_RESET": "reset", "HAS_STATE": "state"}
    return {flag: name in given for flag, name in names.items()}
