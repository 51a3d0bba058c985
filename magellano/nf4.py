"""A matrix held in NF4 with double quantisation: 4.127 bits a weight. The arithmetic is in magellano/ops/nf4.py."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from magellano.backend import mx
from magellano.ops import nf4

_SLICE_VALUES = 1 << 24  # values dequantised at a time where a caller works slice by slice


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

    PARTS: ClassVar[tuple[str, ...]] = ("codes", "scale_codes", "scale_absmax", "scale_offset")

    @property
    def size(self) -> int:
        """How many weights."""
        n = 1
        for side in self.shape:
            n *= side
        return n

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

    @property
    def parts(self) -> nf4.Parts:
        """The packed arrays as the operations take them."""
        return nf4.Parts(self.codes, self.scale_codes, self.scale_absmax, self.scale_offset)

    def factors(self) -> mx.array:
        """The float32 factor of each block of 64, [P]."""
        return nf4.expand_scales(self.scale_codes, self.scale_absmax, self.scale_offset)

    def dequantize(self, dtype: mx.Dtype = mx.float32, after: mx.array | None = None) -> mx.array:
        """The dense tensor; computed in float32, then rounded to `dtype`. In a lazy graph it is not made before `after`
        is there: without such an order MLX may make the dense forms of many layers at once.
        """
        codes = self.codes if after is None else mx.depends([self.codes], [after])[0]
        parts = nf4.Parts(codes, self.scale_codes, self.scale_absmax, self.scale_offset)
        return nf4.dequantize(parts, self.size, dtype).reshape(self.shape)

    def slices(self, dtype: mx.Dtype = mx.float32) -> Iterator[tuple[int, int, mx.array]]:
        """(first row, last row + 1, dense rows) over a matrix, some 16 M weights at a time: never dense as a whole."""
        rows, width = self.shape
        step = max(nf4.BLOCK, _SLICE_VALUES // width // nf4.BLOCK * nf4.BLOCK)  # whole blocks, whatever the width
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


def stacked(tensors: Sequence[NF4Tensor]) -> nf4.Parts:
    """The parts of E matrices of one shape, side by side, for the expert-gathered `nf4_matvec`."""
    parts = [t.parts for t in tensors]
    return nf4.Parts(
        mx.stack([p.codes for p in parts]),
        mx.stack([p.scale_codes for p in parts]),
        mx.stack([p.scale_absmax for p in parts]),
        mx.stack([p.offset for p in parts]),
    )
