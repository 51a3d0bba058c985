"""Causal depthwise convolution + bias + silu, the short filter in front of Mamba's scan (arXiv 2312.00752).

Shapes: B batch, T time, I d_inner, K d_conv.
"""

from dataclasses import dataclass

from magellano.backend import mx
from magellano.ops import launch
from magellano.ops.launch import Dialect, Kernel

Size3 = tuple[int, int, int]

_INPUTS = ("x", "weight", "bias", "reset", "state")
_FORWARD = Kernel("causal_conv_forward", _INPUTS, ("y",))
_BACKWARD = Kernel("causal_conv_backward", (*_INPUTS, "dy"), ("dx", "dweight", "dbias", "dstate"))
_GPU_STEPS, _HOST_STEPS = 8, 64


def causal_conv(
    x: mx.array,
    weight: mx.array,
    bias: mx.array,
    reset: mx.array | None = None,
    state: mx.array | None = None,
    return_state: bool = False,
    frozen_parameters: bool = False,
) -> mx.array | tuple[mx.array, mx.array]:
    """y_t = silu(bias + sum over m < K of weight[K-1-m] x_{t-m}), in x's dtype, float32 inside.

    reset: non-zero where a document starts; no tap reaches back past it. state [B, K-1, I]: the inputs before the first
    step, zero by default. With return_state also returns those after the last step, in x's dtype, with what lies before
    a reset set to zero. x may be a view, such as half of a projection: it is read where it lies.

    Differentiable once, in every input but reset. frozen_parameters: weight and bias are constants; their gradients are
    then zero and cost nothing. Inside mx.compile or mx.vmap on a CPU, where kernels cannot run, it is the reference.
    Raises ValueError for an argument of a wrong shape.
    """
    arrays = (x, weight, bias, reset, state)
    given = {name: array for name, array in zip(_INPUTS, arrays, strict=True) if array is not None}
    _check(given)
    chosen = launch.dialect()
    if chosen is Dialect.REFERENCE or (chosen is Dialect.HOST and launch.traced(*given.values())):
        y_BTI = reference(*arrays)
    else:
        y_BTI = _fast(given, frozen_parameters)
    if return_state:
        return y_BTI, _rolled(x, weight.shape[1], reset, state)
    return y_BTI


def reference(
    x_BTI: mx.array,
    weight_IK: mx.array,
    bias_I: mx.array,
    reset_BT: mx.array | None = None,
    state_BKI: mx.array | None = None,
) -> mx.array:
    """The definition in MLX operations, one shifted product per tap; works in mx.compile, differentiable by MLX."""
    (B, T, I), K = x_BTI.shape, weight_IK.shape[1]
    before = mx.zeros((B, K - 1, I)) if state_BKI is None else state_BKI.astype(mx.float32)
    padded = mx.concatenate([before, x_BTI.astype(mx.float32)], axis=1)
    if reset_BT is not None:  # a tap counts where it lies in the same document as t
        document = mx.cumsum((reset_BT != 0).astype(mx.int32), axis=1)
        documents = mx.concatenate([mx.zeros((B, K - 1), dtype=mx.int32), document], axis=1)
    y_BTI = mx.broadcast_to(bias_I.astype(mx.float32), (B, T, I))
    for k in range(K):
        tap = padded[:, k : k + T]
        if reset_BT is not None:
            tap = mx.where((documents[:, k : k + T] == document)[:, :, None], tap, 0.0)
        y_BTI = y_BTI + weight_IK[:, k].astype(mx.float32) * tap
    return (y_BTI * mx.sigmoid(y_BTI)).astype(x_BTI.dtype)


def _rolled(x_BTI: mx.array, K: int, reset_BT: mx.array | None, state_BKI: mx.array | None) -> mx.array:
    """The last K-1 inputs [B, K-1, I], zero where a reset follows. MLX differentiates it."""
    B, T, I = x_BTI.shape
    missing = max(0, K - 1 - T)
    tail = x_BTI[:, max(0, T - (K - 1)) :]
    if missing:
        old = mx.zeros((B, K - 1, I)) if state_BKI is None else state_BKI
        tail = mx.concatenate([old[:, K - 1 - missing :].astype(x_BTI.dtype), tail], axis=1)
    if reset_BT is None or K == 1:
        return tail
    resets = (reset_BT[:, max(0, T - (K - 1)) :] != 0).astype(mx.int32)
    resets = mx.pad(resets, [(0, 0), (missing, 0)])
    later = mx.cumsum(resets, axis=1, reverse=True, inclusive=False)
    return mx.where((later == 0)[:, :, None], tail, mx.array(0, x_BTI.dtype))


def _check(given: dict[str, mx.array]) -> None:
    x, weight = given["x"], given["weight"]
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"causal_conv: x has shape {x.shape}, expected [B, T, I], none of them zero")
    B, T, I = x.shape
    if weight.ndim != 2 or weight.shape[0] != I or weight.shape[1] == 0:
        raise ValueError(f"causal_conv: weight has shape {weight.shape}, expected [I, K] with x {x.shape}")
    K = weight.shape[1]
    expected = {"x": x.shape, "weight": (I, K), "bias": (I,), "reset": (B, T), "state": (B, K - 1, I)}
    for name, array in given.items():
        if array.shape != expected[name]:
            raise ValueError(f"causal_conv: {name} has shape {array.shape}, expected {expected[name]} with x {x.shape}")
        if name != "reset" and not mx.issubdtype(array.dtype, mx.floating):
            raise ValueError(f"causal_conv: {name} is {array.dtype}, expected a floating dtype")


def _fast(given: dict[str, mx.array], frozen: bool) -> mx.array:
    """Through the kernels, with their own gradient."""
    if "reset" in given:
        given = {**given, "reset": launch.flags(given["reset"])}
    if given["weight"].shape[1] == 1:  # then the state has no elements
        given = {name: array for name, array in given.items() if name != "state"}
    constants = {"reset"} | ({"weight", "bias"} if frozen else set())
    moving = [name for name in given if name not in constants]

    @mx.custom_function
    def convolve(*values: mx.array) -> mx.array:
        return forward({**given, **dict(zip(moving, values, strict=True))})

    @convolve.vjp
    def convolve_vjp(primals, dy_BTI, _output):  # type: ignore[no-untyped-def]
        primals = primals if isinstance(primals, tuple | list) else (primals,)  # MLX hands a single one over bare
        grads = backward({**given, **dict(zip(moving, primals, strict=True))}, dy_BTI, frozen)
        return tuple(grads[name] for name in moving) if len(moving) > 1 else grads[moving[0]]

    return convolve(*[given[name] for name in moving])  # type: ignore[return-value]


@dataclass(frozen=True)
class Geometry:
    """How threads share the work; the names in brackets are the texts' template integers."""

    channels: int  # neighbouring channels per thread [CPT]
    steps: int  # time steps that a thread makes at once [STEPS]
    threads: int  # of a threadgroup, along the channels
    parts: int = 1  # in the backward: how many times over, one after another [PARTS]

    def grid(self, B: int, T: int, I: int) -> tuple[Size3, Size3]:
        """The grid (threads along the channels, chunks of time, batch rows) and the threadgroup."""
        groups = -(-I // (self.channels * self.threads))
        return (groups * self.threads, -(-T // (self.steps * self.parts)), B), (self.threads, 1, 1)


def geometry(I: int, frozen: bool = True) -> Geometry:
    """The default for I channels in the dialect in force. On a GPU 4 channels, 8 bytes of 16-bit elements: 8 of them
    would take twice the registers, 250 in the backward, and halve the threads that wait for memory at the same time.
    """
    if launch.gpu_geometry():
        channels = 4 if I % 4 == 0 else 1
        threads = min(128, -(-I // (32 * channels)) * 32)
        return Geometry(channels, _GPU_STEPS, threads, parts=1 if frozen else 8)  # few partial gradients
    return Geometry(max(c for c in (64, 32, 16, 8, 4, 2, 1) if I % c == 0), _HOST_STEPS, 1)


def _template(given: dict[str, mx.array], chosen: Geometry) -> dict[str, mx.Dtype | int]:
    sizes = {"K": given["weight"].shape[1], "STEPS": chosen.steps, "CPT": chosen.channels}
    types = {"TX": given["x"].dtype, "TW": given["weight"].dtype, "TBIAS": given["bias"].dtype}
    return {**sizes, **types, "HAS_RESET": "reset" in given, "HAS_STATE": "state" in given}


def forward(given: dict[str, mx.array], chosen: Geometry | None = None) -> mx.array:
    """One launch."""
    x = given["x"]
    chosen = chosen or geometry(x.shape[2])
    grid, threadgroup = chosen.grid(*x.shape)
    return _FORWARD(
        [given.get(name, launch.nothing()) for name in _INPUTS],
        template=_template(given, chosen),
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )[0]


def backward(
    given: dict[str, mx.array], dy_BTI: mx.array, frozen: bool, chosen: Geometry | None = None
) -> dict[str, mx.array]:
    """One launch, and the sums over its partial results: the gradient of every input under its name."""
    x, weight, bias, state = given["x"], given["weight"], given["bias"], given.get("state")
    chosen = chosen or geometry(x.shape[2], frozen)
    grid, threadgroup = chosen.grid(*x.shape)
    parts, nothing = grid[1] * grid[2], launch.nothing()
    state_dtype = mx.float32 if state is None else state.dtype
    dx, dweight, dbias, dstate = _BACKWARD(
        [*[given.get(name, nothing) for name in _INPUTS], dy_BTI],
        template={**_template(given, chosen), "PARTS": chosen.parts, "FROZEN": frozen, "TS": state_dtype},
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=[
            x.shape,
            nothing.shape if frozen else (parts, *weight.shape),
            nothing.shape if frozen else (parts, *bias.shape),
            nothing.shape if state is None else state.shape,
        ],
        output_dtypes=[x.dtype, mx.float32, mx.float32, state_dtype],
    )
    grads = {"x": dx, "state": dstate}
    if not frozen:
        grads |= {"weight": dweight.sum(axis=0).astype(weight.dtype), "bias": dbias.sum(axis=0).astype(bias.dtype)}
    return grads
