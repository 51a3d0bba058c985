"""What is done to many arrays alike, eight in a launch: on a GPU a launch, with what the host does for it, costs more
than small arrays do. On a CPU the reference serves, for there it is as fast.

Shapes: n elements; E rows; P parts.
"""

from collections.abc import Iterable, Iterator, Sequence

from magellano.backend import mx
from magellano.ops.host import KERNELS
from magellano.ops.launch import Kernel, gpu_geometry
from magellano.ops.lazy import constant, plain

PARTS = 256
_EIGHT, _PACK = 8, 4
_IN, _OUT = (tuple(f"{letter}{i}" for i in range(_EIGHT)) for letter in "ao")
_HEADER = (KERNELS / "many.h").read_text(encoding="utf-8")
_NARROW = Kernel("many_narrow", (*_IN, "order"), _OUT, header=_HEADER)
_SQUARES = Kernel("many_squares", (*_IN, "total"), ("out",), header=_HEADER)
_JOIN = Kernel("many_join", _IN, ("out",), header=_HEADER)
_THREADS = 256  # of a threadgroup on a GPU
_FEW, _MANY = 1 << 14, 1 << 18  # threads in all
_LARGE = 1 << 20  # elements from which they are many


def narrow(arrays: Sequence[mx.array], dtype: mx.Dtype, order: Sequence[int] | None = None) -> list[mx.array]:
    """The arrays, all of one dtype, in `dtype`; with `order` their rows along the first axis in that order."""
    moved = order is not None and list(order) != list(range(len(order)))
    if not moved and all(a.dtype == dtype for a in arrays):
        return list(arrays)
    if not gpu_geometry() or plain(*arrays):
        index = mx.array(list(order)) if moved and order is not None else None
        return [(a if index is None else a[index]).astype(dtype) for a in arrays]
    made: list[mx.array] = []
    numbers = constant(tuple(order) if moved and order is not None else (0,), mx.int32)
    for eight in _eights(arrays):
        rows = len(order) if moved and order is not None else 1
        flat = [a.reshape(rows, -1) for a in eight]
        filled, threads = _filled(flat), _total(flat)
        outputs = _NARROW(
            [*filled, numbers],
            template={"S": eight[0].dtype, "T": dtype, **_template(flat, (a.shape[1] for a in flat)), "TOTAL": threads},
            grid=(threads, 1, 1),
            threadgroup=(_THREADS, 1, 1),
            output_shapes=[a.shape for a in filled],
            output_dtypes=[dtype] * _EIGHT,
        )
        made += [o.reshape(a.shape) for o, a in zip(outputs, eight, strict=False)]
    return made


def no_squares() -> mx.array:
    """What a sum of squares starts from, float32 [256]."""
    return mx.zeros((PARTS,))


def add_squares(total_P: mx.array, arrays: Sequence[mx.array]) -> mx.array:
    """total_P plus the squares of the arrays, of any float dtypes and shapes, spread over the parts; summed in float32
    and always in the same order. No gradient.
    """
    assert total_P.shape == (PARTS,), total_P.shape
    arrays = [a for a in arrays if a.size]
    if not gpu_geometry() or plain(total_P, *arrays):
        for a in arrays:
            padded = mx.pad(a.reshape(-1).astype(mx.float32), (0, -a.size % PARTS)).reshape(PARTS, -1)
            total_P = total_P + padded.square().sum(axis=1)
        return total_P
    for dtype in sorted({a.dtype for a in arrays}, key=str):
        for eight in _eights([a.reshape(-1) for a in arrays if a.dtype == dtype]):
            (total_P,) = _SQUARES(
                [*_filled(eight), total_P],
                template={
                    "T": dtype, **_template(eight, (a.size for a in eight)), "SG": _THREADS // 32, "PARTS": PARTS,
                    "TOTAL": PARTS * _THREADS,
                },
                grid=(PARTS * _THREADS, 1, 1),
                threadgroup=(_THREADS, 1, 1),
                output_shapes=[(PARTS,)],
                output_dtypes=[mx.float32],
            )  # fmt: skip
    return total_P


def join(arrays: Sequence[mx.array]) -> mx.array:
    """One flat array of them all, which have one dtype."""
    flat = [a.reshape(-1) for a in arrays]
    if len(flat) == 1:
        return flat[0]
    if not gpu_geometry() or len(flat) < 3 or plain(*flat):
        return mx.concatenate(flat)
    pieces = []
    for eight in _eights(flat):
        size, dtype = sum(a.size for a in eight), eight[0].dtype
        threads = _total(eight)
        pieces += _JOIN(
            _filled(eight),
            template={"T": dtype, **_template(eight, (a.size for a in eight)), "TOTAL": threads},
            grid=(threads, 1, 1),
            threadgroup=(_THREADS, 1, 1),
            output_shapes=[(size,)],
            output_dtypes=[dtype],
        )
    return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)


def _eights(arrays: Sequence[mx.array]) -> Iterator[Sequence[mx.array]]:
    return (arrays[i : i + _EIGHT] for i in range(0, len(arrays), _EIGHT))


def _filled(arrays: Sequence[mx.array]) -> list[mx.array]:
    """Eight arrays: the first stands in for those that are missing, and is not read there."""
    return [*arrays, *[arrays[0]] * (_EIGHT - len(arrays))]


def _template(arrays: Sequence[mx.array], sizes: Iterable[int]) -> dict[str, int]:
    """How many of the eight are meant, and how many elements are taken at once."""
    return {"COUNT": len(arrays), "V": 1 if any(size % _PACK for size in sizes) else _PACK}


def _total(arrays: Sequence[mx.array]) -> int:
    return _MANY if sum(a.size for a in arrays) >= _LARGE else _FEW
