"""Several launches as one, for a step of decoding on an NVIDIA GPU: a layer is eight launches that take the device some
3 us each and the host 20. The layers of a model are one launch.

A `Chain` calls a function once with stand-ins for its arrays and notes which kernels it would launch on which of them.
Of their texts it makes one CUDA kernel: a phase each, run by as many threadgroups as the GPU holds at once, which wait
for one another between two phases. Metal promises no such waiting, so there, as on a CPU, launches stay single.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from magellano.backend import mx
from magellano.ops import cuda, launch
from magellano.ops.host import Template
from magellano.ops.launch import Dialect, Kernel
from magellano.ops.lazy import constant

THREADS = 256  # of every phase's threadgroups
_PER_PROCESSOR, _REGISTERS = 2, 128  # threadgroups that a processor surely holds at once; registers a thread then has
_ALIGN = 256  # bytes to which what passes from phase to phase is aligned, as MLX's own arrays are
_PLACES = f"""
#undef threadgroup_position_in_grid
#define threadgroup_position_in_grid k_group
#undef thread_position_in_grid
#define thread_position_in_grid k_u3(k_group.x * {THREADS}u + threadIdx.x, k_group.y, k_group.z)
#undef threadgroups_per_grid
// All of the grid's BLOCKS threadgroups reach this place, and see what the others wrote before. `turn` counts arrivals,
// so that between two launches it is a multiple of BLOCKS; it never starts again.
__device__ __noinline__ void k_all_here(unsigned long long* turn) {{
  __syncthreads();
  if (threadIdx.x == 0) {{
    __threadfence();
    const unsigned long long until = (atomicAdd(turn, 1ull) / BLOCKS + 1ull) * BLOCKS;
    unsigned long long now;
    do asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(now) : "l"(turn) : "memory"); while (now < until);
    __threadfence();
  }}
  __syncthreads();
}}
"""


@dataclass(frozen=True)
class Slot:
    """Stands in for an array while a chain is recorded: how it lies in which of the chain's buffers, in elements."""

    buffer: int
    shape: tuple[int, ...]
    dtype: mx.Dtype
    strides: tuple[int, ...]
    first: int = 0

    @classmethod
    def whole(cls, buffer: int, shape: Sequence[int], dtype: mx.Dtype) -> "Slot":
        return cls(buffer, tuple(shape), dtype, _strides(shape))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def gapless(self) -> bool:
        wanted = zip(self.shape, self.strides, _strides(self.shape), strict=True)
        return all(size == 1 or stride == dense for size, stride, dense in wanted)

    def astype(self, dtype: mx.Dtype) -> "Slot":
        if dtype != self.dtype:
            raise TypeError(f"a chain converts nothing between its launches: {self.dtype} to {dtype}")
        return self

    def reshape(self, *shape: int) -> "Slot":
        wanted = tuple(-self.size // math.prod(shape) if n == -1 else n for n in shape)
        assert self.gapless, f"{self} as {shape}"
        assert math.prod(wanted) == self.size, f"{self} as {shape}"
        return replace(self, shape=wanted, strides=_strides(wanted))

    def squeeze(self, axis: int) -> "Slot":
        assert self.shape[axis] == 1
        shape, strides = list(self.shape), list(self.strides)
        del shape[axis], strides[axis]
        return replace(self, shape=tuple(shape), strides=tuple(strides))

    def __getitem__(self, key: Any) -> "Slot":
        """New axes and whole ones, as in x[:, None] and x[:, :, :N] with N states."""
        shape: list[int] = []
        strides: list[int] = []
        axis = 0
        for one in key if isinstance(key, tuple) else (key,):
            if one is None:
                shape, strides = [*shape, 1], [*strides, 0]
                continue
            assert one.indices(self.shape[axis]) == (0, self.shape[axis], 1), f"{key} of {self.shape}"
            shape, strides, axis = [*shape, self.shape[axis]], [*strides, self.strides[axis]], axis + 1
        return replace(self, shape=(*shape, *self.shape[axis:]), strides=(*strides, *self.strides[axis:]))

    def columns(self, begin: int, end: int) -> "Slot":
        return replace(self, shape=(*self.shape[:-1], end - begin), first=self.first + begin * self.strides[-1])


def columns(x: mx.array, *edges: int) -> list[mx.array]:
    """The parts of the last axis between these edges: views."""
    if isinstance(x, Slot):
        both = zip((0, *edges), (*edges, x.shape[-1]), strict=True)
        return [cast(mx.array, x.columns(begin, end)) for begin, end in both]
    parts: list[mx.array] = mx.split(x, list(edges), axis=-1)  # type: ignore[assignment]
    return parts


def row_stride(x_MI: mx.array) -> int:
    """Elements from one row to the next: more than the columns where they are some of a chain's."""
    return x_MI.strides[0] if isinstance(x_MI, Slot) else x_MI.shape[1]


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


@dataclass(frozen=True)
class Phase:
    """A launch as it was asked for. `grid` counts threadgroups."""

    kernel: Kernel
    inputs: Sequence[Slot]
    outputs: Sequence[Slot]
    template: Template
    grid: tuple[int, int, int]


@dataclass
class _Recorder:
    """Buffers in the order in which they appear, those of the chain's inputs first; `constants`: what lies in some."""

    buffers: list[tuple[tuple[int, ...], mx.Dtype]] = field(default_factory=list)
    constants: dict[int, mx.array] = field(default_factory=dict)
    phases: list[Phase] = field(default_factory=list)
    _known: dict[int, Slot] = field(default_factory=dict)

    def buffer(self, shape: Sequence[int], dtype: mx.Dtype) -> Slot:
        self.buffers.append((tuple(shape), dtype))
        return Slot.whole(len(self.buffers) - 1, shape, dtype)

    def __call__(self, kernel, inputs, template, grid, threadgroup, shapes, dtypes) -> list[Slot]:  # type: ignore[no-untyped-def]
        assert threadgroup == (THREADS, 1, 1), f"{kernel.name}: {threadgroup} threads, see launch.threads"
        slots = [a if isinstance(a, Slot) else self._constant(a) for a in inputs]
        for name, slot in zip(kernel.inputs, slots, strict=True):
            assert slot.gapless or name in (*kernel.strided, *kernel.wide), f"{kernel.name}: {name} has gaps"
        outputs = [self.buffer(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        self.phases.append(Phase(kernel, slots, outputs, dict(template), (grid[0] // THREADS, grid[1], grid[2])))
        return outputs

    def _constant(self, a: mx.array) -> Slot:
        if id(a) not in self._known:
            slot = self.buffer(a.shape, a.dtype)
            self._known[id(a)], self.constants[slot.buffer] = slot, a
        return self._known[id(a)]


class Chain:
    """`chain(*arrays)` is `step(*arrays)`, with arrays of the shapes and types of `like`, in one launch on CUDA. `step`
    launches kernels and takes views (`columns`, [:, None], reshape, squeeze), nothing else, with whatever other arrays
    it holds on to: these must not change. On a CPU the launches are made one by one, in the GPU's geometry.
    """

    def __init__(self, name: str, step: Callable[..., Sequence[mx.array]], like: Sequence[mx.array]):
        assert launch.gpu_geometry(), "a chain is recorded in the GPU's geometry"
        made = _Recorder()
        given = [made.buffer(a.shape, a.dtype) for a in like]
        with launch.recorded(made, THREADS):
            self.results = cast("list[Slot]", list(step(*given)))
        mx.eval(list(made.constants.values()))
        self.name, self.given, self.buffers = name, len(given), made.buffers
        self.constants, self.phases = made.constants, made.phases
        wanted = [slot.buffer for slot in self.results]
        assert len({*wanted, *range(self.given), *self.constants}) == len(wanted) + self.given + len(self.constants)
        assert all(s.first == 0 and s.size == math.prod(self.buffers[s.buffer][0]) for s in self.results)
        self._built: cuda.Built | None = None

    def __call__(self, *arrays: mx.array) -> list[mx.array]:
        if launch.dialect() is not Dialect.CUDA:
            return self._one_by_one(arrays)
        blocks = _PER_PROCESSOR * cuda.processors()
        if self._built is None:
            self._built = cuda.Built(*self.compiled(blocks), sized=())
        made = self._built(
            [_turn(blocks), *arrays, *self.constants.values()],
            output_shapes=[*(s.shape for s in self.results), (self._scratch()[1],)],
            output_dtypes=[*(s.dtype for s in self.results), mx.uint8],
            grid=(blocks * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
        )
        return made[:-1]

    def compiled(self, blocks: int, arch: str | None = None) -> tuple[str, bytes]:
        """The kernel's name and its machine code, for the device or what is said."""
        text, limit = functools.partial(self.source, blocks=blocks), [f"--maxrregcount={_REGISTERS}"]
        return cuda.compiled(f"chain_{self.name}", text, limit, arch)

    def source(self, name: str, blocks: int) -> str:
        """The whole text: each phase a function, and the kernel that calls one after the other."""
        kernels = {phase.kernel.name: phase.kernel for phase in self.phases}
        headers = dict.fromkeys(kernel.header for kernel in kernels.values())
        lines = [f"constexpr unsigned BLOCKS = {blocks};", cuda.prelude(), *headers, _PLACES]
        functions: dict[str, int] = {}  # what two layers do alike is there once
        numbers = [functions.setdefault(_function(phase), len(functions)) for phase in self.phases]
        lines += [f"__device__ __noinline__ void phase_{n}{text}" for text, n in functions.items()]
        outside = [*range(self.given), *self.constants]
        parameters = ["const uint64_t* turn", *(f"const {self._type(b)}* p{b}" for b in outside)]
        parameters += [*(f"{self._type(s.buffer)}* p{s.buffer}" for s in self.results), "uint8_t* scratch"]
        bounds = f"__launch_bounds__({THREADS}, {_PER_PROCESSOR})"
        lines.append(f'extern "C" __global__ void {bounds} {name}({", ".join(parameters)}) {{')
        lines += [
            f"  {self._type(b)}* p{b} = ({self._type(b)}*)(scratch + {at});" for b, at in self._scratch()[0].items()
        ]
        for number, phase in zip(numbers, self.phases, strict=True):
            lines += ["  k_all_here((unsigned long long*)turn);"] if phase is not self.phases[0] else []
            arguments = [f"p{s.buffer} + {s.first}" for s in (*phase.inputs, *phase.outputs)]
            lines.append(f"  phase_{number}({', '.join(arguments)});")
        return "\n".join([*lines, "}", ""])

    def _scratch(self) -> tuple[dict[int, int], int]:
        """Where in one array the buffers lie that nobody outside sees, and its size in bytes."""
        outside, at, places = {*range(self.given), *self.constants, *(s.buffer for s in self.results)}, 0, {}
        for number, (shape, dtype) in enumerate(self.buffers):
            if number not in outside:
                places[number] = at
                at += -(-math.prod(shape) * dtype.size // _ALIGN) * _ALIGN
        return places, max(at, _ALIGN)

    def _type(self, buffer: int) -> str:
        return cuda.C_TYPES[self.buffers[buffer][1]]

    def _one_by_one(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        held = {**dict(enumerate(arrays)), **self.constants}

        def value(slot: Slot, wide: bool = False) -> mx.array:
            whole = held[slot.buffer]
            if wide:  # whole rows from there, the last one filled up
                whole, row = mx.pad(whole.reshape(-1), (0, slot.first)), slot.strides[0]
                return mx.as_strided(whole, (slot.shape[0], row), (row, 1), slot.first)
            return mx.as_strided(whole, slot.shape, slot.strides, slot.first)

        for phase in self.phases:
            x, y, z = phase.grid
            named = zip(phase.kernel.inputs, phase.inputs, strict=True)
            given = [value(slot, name in phase.kernel.wide) for name, slot in named]
            made = phase.kernel(
                given, template=phase.template, grid=(x * THREADS, y, z),
                threadgroup=(THREADS, 1, 1), output_shapes=[s.shape for s in phase.outputs],
                output_dtypes=[s.dtype for s in phase.outputs],
            )  # fmt: skip
            held |= {slot.buffer: a for slot, a in zip(phase.outputs, made, strict=True)}
        return [value(slot) for slot in self.results]


def _function(phase: Phase) -> str:
    """A phase as a function without its name, with its template, sizes and strides as constants: the work of one of the
    launch's threadgroups after the other.
    """
    kernel, named = phase.kernel, list(zip(phase.kernel.inputs, phase.inputs, strict=True))
    parameters = [f"const {cuda.C_TYPES[slot.dtype]}* {name}" for name, slot in named]
    outputs = zip(kernel.outputs, phase.outputs, strict=True)
    parameters += [f"{cuda.C_TYPES[slot.dtype]}* {name}" for name, slot in outputs]
    measured = [named[i] for i in kernel.measured]
    sizes = [f"  const int {n}_shape[] = {_list(s.shape)};" for n, s in measured]
    sizes += [f"  const int64_t {n}_strides[] = {_list(s.strides)};" for n, s in named if n in kernel.strided]
    constants = [cuda.constant(name, value) for name, value in phase.template.items()]
    x, y, z = phase.grid
    each = f"  for (unsigned g = blockIdx.x; g < {x * y * z}u; g += BLOCKS) {{"
    place = f"  const k_uint3 k_group = k_u3(g % {x}u, g / {x}u % {y}u, g / {x * y}u);"
    start = [f"({', '.join(parameters)}) {{", *sizes, *constants, each, place]
    return "\n".join([*start, kernel.body, "  __syncthreads(); }", "}"])


def _list(numbers: Sequence[int]) -> str:
    return "{" + ", ".join(map(str, numbers or (0,))) + "}"


@functools.cache
def _turn(blocks: int) -> mx.array:
    """Where the threadgroups of all launches with so many count their arrivals: the one array that a kernel writes
    although it is an input, since it must outlast the launch. Launches of one stream follow each other.
    """
    return constant([0], mx.uint64)
