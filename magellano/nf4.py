"""A matrix held in NF4 with double quantisation: 4.127 bits a weight. The arithmetic is in magellano/ops/nf4.py."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from magellano.backend import mx
from magellano.ops import nf4

SLICE_VALUES = 1 << 24  # values dequantised at a time where a caller works slice by slice


@dataclass(frozen=True, eq=False)
class NF4Tensor:
    """`shape` and the packed arrays: codes uint8 [ceil(n/2)], scale_codes uint8 [P], scale_absmax float32 [Q],
    scale_offset float32 [1], with n the number of weights, P = ceil(n/64), Q = ceil(P/256).
    """

    shape: tuple[int, ...]
    codes: mx.array
    scale_codes: mx.array
    scale_absmax: mx.array
    scale_offset: mx.array
    parts: nf4.Parts = field(init=False, repr=False)  # the packed arrays as the operations take them

    PARTS: ClassVar[tuple[str, ...]] = ("codes", "scale_codes", "scale_absmax", "scale_offset")

    def __post_init__(self) -> None:
        parts = nf4.Parts.of(self.codes, self.scale_codes, self.scale_absmax, self.scale_offset)
        object.__setattr__(self, "parts", parts)

    @property
    def size(self) -> int:
        """How many weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(a.nbytes for a in self.arrays().values())

    def arrays(self) -> dict[str, mx.array]:
        """The packed arrays by name, as files store them."""
        return {part: getattr(self, part) for part in self.PARTS}

    @classmethod
    def from_arrays(cls, shape: tuple[int, ...], arrays: Mapping[str, mx.array]) -> "NF4Tensor":
        """The tensor of `shape` from its packed arrays. ValueError where their sizes or types do not fit the shape."""
        tensor = cls(tuple(shape), **{part: arrays[part] for part in cls.PARTS})
        codes, blocks = -(-tensor.size // 2), -(-tensor.size // nf4.BLOCK)
        sizes = (codes, blocks, -(-blocks // nf4.SCALE_BLOCK), 1)
        for part, size, dtype in zip(cls.PARTS, sizes, (mx.uint8, mx.uint8, mx.float32, mx.float32), strict=True):
            array = arrays[part]
            if array.size != size or array.dtype != dtype:
                raise ValueError(
                    f"NF4 {part}: {array.size} values of {array.dtype}, shape {shape} needs {size} of {dtype}"
                )
        return tensor

    def factors(self) -> mx.array:
        """The float32 factor of each block of 64, [P]."""
        return nf4.expand_scales(self.scale_codes, self.scale_absmax, self.scale_offset)

    def dequantize(self, dtype: mx.Dtype = mx.float32, after: mx.array | None = None) -> mx.array:
        """The dense tensor; computed in float32, then rounded to `dtype`. In a lazy graph it is not made before `after`
        is there: without such an order MLX may make the dense forms of many layers at once.
        """
        return nf4.dequantize(self.parts.after(after), self.size, dtype).reshape(self.shape)

    def slices(self, dtype: mx.Dtype = mx.float32) -> Iterator[tuple[int, int, mx.array]]:
        """(first row, last row + 1, dense rows) over a matrix, some 16 M weights at a time: never dense as a whole."""
        rows, width = self.shape
        step = max(nf4.BLOCK, SLICE_VALUES // width // nf4.BLOCK * nf4.BLOCK)  # whole blocks, whatever the width
        factors = self.factors()
        for first in range(0, rows, step):
            last = min(first + step, rows)
            codes = self.codes[first * width // 2 : -(-last * width // 2)]
            factor = factors[first * width // nf4.BLOCK : -(-last * width // nf4.BLOCK)]
            yield first, last, nf4.dequantize_blocks(codes, factor, (last - first) * width, dtype).reshape(-1, width)

    def rows(self, index: mx.array, dtype: mx.Dtype = mx.float32) -> mx.array:
        """Rows of a matrix [V, D] by number, [.., D], without dequantising the others: an embedding lookup."""
        rows, width = self.shape
        if width % nf4.BLOCK:  # rows do not start at a block: small models only
            return self.dequantize(dtype)[index]
        codes, factors = self.codes.reshape(rows, -1)[index], self.factors().reshape(rows, -1)[index]
        dense = nf4.dequantize_blocks(codes.reshape(-1), factors.reshape(-1), index.size * width, dtype)
        return dense.reshape(*index.shape, width)


def quantize(w: mx.array) -> NF4Tensor:
    """NF4 of a float array of any shape. Needs about twice the float32 size of 4 M weights beside its result.

    Raises ValueError for an empty array or one that holds no numbers.
    """
    if w.size == 0 or not mx.issubdtype(w.dtype, mx.floating):
        raise ValueError(f"cannot quantise an array of shape {w.shape} and dtype {w.dtype}: it must hold float values")
    codes, absmax = nf4.quantize_blocks(w.reshape(-1))
    return NF4Tensor(tuple(w.shape), codes, *nf4.quantize_scales(absmax))


@dataclass(frozen=True, eq=False)
class NF4Stack:
    """E matrices of one shape [O, I] in NF4, side by side: `arrays` as in NF4Tensor, each with a leading E. A sequence
    of NF4Tensor, which share its memory.
    """

    shape: tuple[int, int, int]
    arrays: Mapping[str, mx.array]
    parts: nf4.Parts = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", nf4.Parts.of(*(self.arrays[part] for part in NF4Tensor.PARTS)))

    @classmethod
    def of(cls, tensors: Sequence[NF4Tensor]) -> "NF4Stack":
        """A copy of `tensors` as one stack. ValueError where their shapes differ."""
        shapes = {t.shape for t in tensors}
        if len(shapes) != 1 or len(next(iter(shapes))) != 2:
            raise ValueError(f"an NF4 stack needs matrices of one shape, got {sorted(shapes)}")
        shape = next(iter(shapes))
        arrays = {part: mx.stack([t.arrays()[part] for t in tensors]) for part in NF4Tensor.PARTS}
        return cls((len(tensors), shape[0], shape[1]), arrays)

    @classmethod
    def from_arrays(cls, shape: tuple[int, int, int], arrays: Mapping[str, mx.array]) -> "NF4Stack":
        """The stack of `shape` from its packed arrays. ValueError where their sizes or types do not fit the shape."""
        sizes = {a.shape[0] if a.ndim else 0 for a in arrays.values()}
        if sizes != {shape[0]}:
            raise ValueError(f"an NF4 stack of {shape[0]} matrices has arrays of {sorted(sizes)}")
        NF4Tensor.from_arrays(shape[1:], {part: arrays[part][0] for part in NF4Tensor.PARTS})
        return cls(shape, {part: arrays[part] for part in NF4Tensor.PARTS})

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, e: int) -> NF4Tensor:
        return self.tensors[e]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(a.nbytes for a in self.arrays.values())

    @functools.cached_property
    def tensors(self) -> tuple[NF4Tensor, ...]:
        """The matrices one by one."""
        split = {part: mx.split(a, len(self)) for part, a in self.arrays.items()}
        made = tuple(
            NF4Tensor.from_arrays(self.shape[1:], {part: each[e].reshape(-1) for part, each in split.items()})
            for e in range(len(self))
        )
        mx.eval([list(t.arrays().values()) for t in made])
        return made

    def dequantize(
        self, dtype: mx.Dtype = mx.float32, after: mx.array | None = None, which: Sequence[int] | None = None
    ) -> mx.array:
        """The matrices with the numbers `which`, by default all, [n, O, I] in `dtype`, in one launch on a GPU. O I must
        be a multiple of 64.
        """
        _, O, I = self.shape
        numbers = tuple(range(len(self)) if which is None else which)
        return nf4.dequantize(self.parts.after(after), O * I, dtype, numbers).reshape(len(numbers), O, I)
