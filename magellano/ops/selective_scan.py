"""The selective scan of Mamba (Gu & Dao 2023, arXiv 2312.00752): contract, plain-MLX reference, fast path, choice.

Shapes: B batch, T time, I d_inner, N d_state; K chunks of TC steps, G threadgroups.
"""

from dataclasses import dataclass

from magellano.backend import mx
from magellano.ops import launch
from magellano.ops.launch import Dialect, Kernel

_INPUTS = ("x", "dt", "A", "b", "c", "skip", "z", "dt_bias", "reset", "state")
_FORWARD = Kernel("selective_scan_forward", _INPUTS, ("y", "state_out", "borders"))
_BACKWARD = Kernel(
    "selective_scan_backward",
    (*_INPUTS, "borders", "dy", "dstate_out"),
    ("dx", "ddt", "dA", "db", "dc", "dskip", "dz", "dbias", "dstate"),
)
_NOTHING = (8,)  # the shape that stands in for an array that is not there


def selective_scan(
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
    return_state: bool = False,
    frozen_parameters: bool = False,
) -> mx.array | tuple[mx.array, mx.array]:
    """y_t = c_t . s_t + skip x_t with s_t = exp(d_t A) s_{t-1} + d_t x_t b_t, where d is softplus(dt + dt_bias) if dt_bias is
    given and dt if not; with z, y_t is multiplied by silu(z_t).

    reset: non-zero where a document starts; the state before that step is zero. state: the state before the first step,
    zero by default. Returns y_BTI in x's dtype, and with return_state also the last state_BIN in float32; all is float32
    inside. float32, float16 and bfloat16 inputs may mix.

    Differentiable once, in every input but reset. frozen_parameters: A, skip and dt_bias are constants; their gradients
    are then zero and cost nothing. Equal inputs give equal bits. On a CPU it computes at once: inside mx.compile or
    mx.vmap it raises TracedError. Raises ValueError for an argument of a wrong shape.
    """
    if return_state and reset_BT is not None and reset_BT.ndim != 2:
        raise ValueError(f"selective_scan: reset has shape {reset_BT.shape}, expected [B, T]")
    arrays = (x_BTI, dt_BTI, A_IN, b_BTN, c_BTN, skip_I, z_BTI, dt_bias_I, reset_BT, state_BIN)
    _check(dict(zip(_INPUTS, arrays, strict=True)))
    if launch.dialect() is Dialect.REFERENCE:
        y_BTI, last_BIN = reference(*arrays)
    else:
        y_BTI, last_BIN = _fast(arrays, return_state, frozen_parameters)
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
    """The definition, step by step in MLX operations: slow, differentiable by MLX itself. Returns y_BTI and the last state."""
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


def _check(arrays: dict[str, mx.array | None]) -> None:
    x, A = arrays["x"], arrays["A"]
    assert x is not None
    assert A is not None
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"selective_scan: x has shape {x.shape}, expected [B, T, I], none of them zero")
    (B, T, I) = x.shape
    if A.ndim != 2 or A.shape[0] != I or A.shape[1] == 0:
        raise ValueError(f"selective_scan: A has shape {A.shape}, expected [I, N] with I = {I}, as in x {x.shape}")
    N = A.shape[1]
    expected = {
        "dt": (B, T, I), "b": (B, T, N), "c": (B, T, N), "skip": (I,), "z": (B, T, I), "dt_bias": (I,), "reset": (B, T),
        "state": (B, I, N),
    }  # fmt: skip
    for name, shape in expected.items():
        array = arrays[name]
        if array is not None and array.shape != shape:
            raise ValueError(f"selective_scan: {name} has shape {array.shape}, expected {shape} with x {x.shape}")
    for name, array in arrays.items():
        if array is not None and name != "reset" and not mx.issubdtype(array.dtype, mx.floating):
            raise ValueError(f"selective_scan: {name} is {array.dtype}, expected a floating dtype")


@dataclass(frozen=True)
class Geometry:
    """How a kernel's threads share the work; the names in brackets are the texts' template integers."""

    lanes: int  # lanes that share a channel's states [NL]
    channels: int  # channels per thread [CPT]
    simdgroups: int  # simdgroups per threadgroup [SG]
    steps: int  # steps per chunk, between two kept borders [TC]
    simd: int  # threads per simdgroup

    @property
    def group_channels(self) -> int:
        return self.simdgroups * self.simd // self.lanes * self.channels

    def template(self) -> dict[str, int]:
        return {"NL": self.lanes, "CPT": self.channels, "SG": self.simdgroups, "TC": self.steps}


def geometry(T: int, I: int, N: int) -> Geometry:
    """The default geometry for these sizes in the dialect in force. On a GPU N must be a power of two."""
    if launch.gpu_geometry():
        lanes = min(4, N)
        return Geometry(lanes, channels=1, simdgroups=4, steps=lanes if T == 1 else 8, simd=32)
    channels = max(c for c in (64, 32, 16, 8, 4, 2, 1) if I % c == 0)
    return Geometry(lanes=1, channels=channels, simdgroups=1, steps=1 if T == 1 else 16, simd=1)


def _fast(arrays: tuple, return_state: bool, frozen: bool) -> tuple[mx.array, mx.array]:
    """Through the kernels, with their own gradient."""
    given = dict(zip(_INPUTS, arrays, strict=True))
    for name in ("A", "skip", "dt_bias", "state"):
        if given[name] is not None:
            given[name] = given[name].astype(mx.float32)
    N = given["A"].shape[1]
    padded = 1 << (N - 1).bit_length()
    if launch.gpu_geometry() and padded != N:  # states with A = b = c = 0 stay zero and add nothing
        for name in ("A", "b", "c", "state"):
            if given[name] is not None:
                given[name] = mx.pad(given[name], [(0, 0)] * (given[name].ndim - 1) + [(0, padded - N)])
    if given["reset"] is not None:
        given["reset"] = (given["reset"] != 0).astype(mx.uint8)
    constants = {"reset"} | ({"A", "skip", "dt_bias"} if frozen else set())
    moving = [name for name, array in given.items() if array is not None and name not in constants]
    chosen = geometry(given["x"].shape[1], given["x"].shape[2], padded if launch.gpu_geometry() else N)

    @mx.custom_function
    def scan(*values: mx.array) -> tuple[mx.array, ...]:
        return tuple(forward({**given, **dict(zip(moving, values, strict=True))}, chosen))

    @scan.vjp
    def scan_vjp(primals, cotangents, outputs):  # type: ignore[no-untyped-def]
        values = {**given, **dict(zip(moving, primals, strict=True))}
        dstate_out = cotangents[1] if return_state else None
        grads = backward(values, outputs[2], cotangents[0], dstate_out, chosen, frozen)
        return tuple(grads[name] for name in moving)

    y_BTI, last_BIN, _ = scan(*[given[name] for name in moving])
    return y_BTI, last_BIN[:, :, :N]


def forward(given: dict[str, mx.array | None], chosen: Geometry) -> list[mx.array]:
    """One launch: y_BTI, the last state_BIN, and the states between chunks [B, K-1, N, I] for `backward`."""
    (B, T, I), N = given["x"].shape, given["A"].shape[1]
    K = -(-T // chosen.steps)
    return _FORWARD(
        [_or_nothing(given[name]) for name in _INPUTS],
        template={**_flags(given), **chosen.template(), "N": N, "TX": given["x"].dtype},
        **_grid(chosen, B, I),
        output_shapes=[(B, T, I), (B, I, N), (B, K - 1, N, I) if K > 1 else _NOTHING],
        output_dtypes=[given["x"].dtype, mx.float32, mx.float32],
    )


def backward(
    given: dict[str, mx.array | None],
    borders: mx.array,
    dy_BTI: mx.array,
    dstate_out_BIN: mx.array | None,
    chosen: Geometry,
    frozen: bool,
) -> dict[str, mx.array]:
    """One launch and the sums over its partial results: the gradient of every input under its name."""
    (B, T, I), N = given["x"].shape, given["A"].shape[1]
    G = -(-I // chosen.group_channels)
    z, state = given["z"], given["state"]
    types = {"TX": given["x"].dtype, "TDT": given["dt"].dtype, "TZ": mx.float32 if z is None else z.dtype}
    flags = {**_flags(given), "HAS_DSTATE": dstate_out_BIN is not None, "FROZEN": frozen}
    parameter = _NOTHING if frozen else (B, I)
    dx, ddt, dA, db, dc, dskip, dz, dbias, dstate = _BACKWARD(
        [*(_or_nothing(given[name]) for name in _INPUTS), borders, dy_BTI, _or_nothing(dstate_out_BIN)],
        template={**flags, **chosen.template(), "N": N, **types},
        **_grid(chosen, B, I),
        output_shapes=[
            (B, T, I), (B, T, I), _NOTHING if frozen else (B, I, N), (G, B, T, N), (G, B, T, N), parameter,
            _NOTHING if z is None else (B, T, I), parameter, _NOTHING if state is None else (B, I, N),
        ],
        output_dtypes=[types["TX"], types["TDT"], *[mx.float32] * 4, types["TZ"], mx.float32, mx.float32],
    )  # fmt: skip
    grads = {"x": dx, "dt": ddt, "z": dz, "state": dstate}
    grads |= {"b": db.sum(axis=0).astype(given["b"].dtype), "c": dc.sum(axis=0).astype(given["c"].dtype)}
    if not frozen:
        grads |= {"A": dA.sum(axis=0), "skip": dskip.sum(axis=0), "dt_bias": dbias.sum(axis=0)}
    return grads


def _grid(chosen: Geometry, B: int, I: int) -> dict[str, tuple[int, int, int]]:
    threads = chosen.simdgroups * chosen.simd
    return {"grid": (-(-I // chosen.group_channels) * threads, B, 1), "threadgroup": (threads, 1, 1)}


def _flags(given: dict[str, mx.array | None]) -> dict[str, bool]:
    return {f"HAS_{flag}": given[name] is not None for flag, name in (
        ("SKIP", "skip"), ("Z", "z"), ("BIAS", "dt_bias"), ("RESET", "reset"), ("STATE", "state")
    )}  # fmt: skip


def _or_nothing(array: mx.array | None) -> mx.array:
    return mx.zeros(_NOTHING) if array is None else array
