"""The launcher: picks, once per process, the dialect that kernel texts run in, says why, and calls them.

A kernel is one text in kernels/, the body of a Metal function. METAL hands it to `mx.fast.metal_kernel`. CUDA compiles
it with kernels/cuda.h in front (see cuda.py), save a text that reads strides: that goes to `mx.fast.cuda_kernel`. HOST
compiles it as C++ with kernels/host.h in front (see host.py). REFERENCE runs no kernel: every operation has a plain-MLX
form beside it.
"""

import functools
import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from magellano.backend import mx, on_gpu
from magellano.errors import InputError
from magellano.ops import cuda, host
from magellano.ops.host import KERNELS, Template, TracedError

__all__ = [
    "Dialect", "Kernel", "TracedError", "available", "dialect", "flags", "gpu_geometry", "nothing", "on_fibers",
    "poisoned", "recorded", "threads", "traced", "use", "why",
]  # fmt: skip

_SMALLEST = 8  # Metal passes arrays of fewer elements in another address space; they are padded instead
_LARGE = 1 << 16  # bytes, from which on the way of filling matters
_NO_COMPILER = (
    "no C++ compiler: the CPU kernels are replaced by plain MLX (the scan 60 to 190 times slower); install g++"
)


class Dialect(StrEnum):
    """What a kernel text is compiled as."""

    REFERENCE = "reference"
    HOST = "host"
    CUDA = "cuda"
    METAL = "metal"


@dataclass
class _Mode:
    """What `use`, `on_fibers` and `poisoned` set; None: choose."""

    dialect: Dialect | None = None
    fibers: bool = False
    poison: bool = False
    recorder: Callable[..., Any] | None = None  # of launches that are noted and not made
    threads: int = 0  # of every threadgroup; 0: as each launch likes


_mode = _Mode()


@functools.cache
def _chosen() -> tuple[Dialect, str]:
    if name := os.environ.get("MAGELLANO_DIALECT"):
        if name not in list(Dialect):
            raise InputError(f"MAGELLANO_DIALECT={name}: unknown dialect; one of {', '.join(Dialect)}")
        return _checked(Dialect(name)), "MAGELLANO_DIALECT says so"
    if on_gpu() and mx.metal.is_available():
        return Dialect.METAL, "MLX's default device is a Metal GPU"
    if on_gpu() and mx.cuda.is_available():
        return Dialect.CUDA, "MLX's default device is a CUDA GPU"
    if path := host.compiler_path():
        return Dialect.HOST, f"MLX's default device is the CPU and {path} can build kernels for it"
    warnings.warn(_NO_COMPILER, stacklevel=4)
    return Dialect.REFERENCE, _NO_COMPILER


def available() -> list[Dialect]:
    """The dialects that can run in this process."""
    ready = {
        Dialect.REFERENCE: True,
        Dialect.HOST: not on_gpu() and host.compiler_path() is not None,
        Dialect.CUDA: on_gpu() and mx.cuda.is_available(),
        Dialect.METAL: on_gpu() and mx.metal.is_available(),
    }
    return [d for d, yes in ready.items() if yes]


def _checked(d: Dialect) -> Dialect:
    if d not in available():
        raise InputError(f"dialect {d} cannot run here; choose among {', '.join(available())}")
    return d


def dialect() -> Dialect:
    """The dialect in force: the innermost `use`, else $MAGELLANO_DIALECT, else what device and compiler allow."""
    return _mode.dialect or _chosen()[0]


def why() -> str:
    """Why `dialect()` is what it is, for people."""
    return "chosen by launch.use" if _mode.dialect else _chosen()[1]


@contextmanager
def use(d: Dialect | str) -> Iterator[None]:
    """Overrides the dialect inside the `with`. Raises InputError where that dialect cannot run."""
    if d not in list(Dialect):
        raise InputError(f"unknown dialect {d!r}; one of {', '.join(Dialect)}")
    before, _mode.dialect = _mode.dialect, _checked(Dialect(d))
    try:
        yield
    finally:
        _mode.dialect = before


@contextmanager
def on_fibers() -> Iterator[None]:
    """For tests: HOST with the GPU's own threads, shuffles and barriers, one fiber each (kernels/fibers.h). Slow."""
    with use(Dialect.HOST):
        before, _mode.fibers = _mode.fibers, True
        try:
            yield
        finally:
            _mode.fibers = before


@contextmanager
def poisoned() -> Iterator[None]:
    """For tests: outputs start as NaN (integers: as 0xA5 bytes), so that an element no thread writes shows."""
    before, _mode.poison = _mode.poison, True
    try:
        yield
    finally:
        _mode.poison = before


@contextmanager
def recorded(by: Callable[..., Any], threads: int) -> Iterator[None]:
    """Inside the `with` kernels are not launched but handed to `by`, which gives what stands in for their outputs; all
    have threadgroups of `threads`. See chain.py.
    """
    before = _mode.recorder, _mode.threads
    _mode.recorder, _mode.threads = by, threads
    try:
        yield
    finally:
        _mode.recorder, _mode.threads = before


def threads(usual: int) -> int:
    """How many threads a threadgroup has on a GPU, for launches that work with any number."""
    return _mode.threads or usual


def gpu_geometry() -> bool:
    """True where kernels are launched as on a GPU: 32-wide simdgroups, several threads per group. Else the host's
    geometry: one thread per group, which handles a block of neighbouring channels or elements in its LANES loops.
    """
    return dialect() in (Dialect.CUDA, Dialect.METAL) or _mode.fibers


def traced(*arrays: mx.array) -> bool:
    """True inside mx.compile or mx.vmap, where an array has no value yet, so that no host kernel can run."""
    if _mode.recorder:  # nor then, but kernels are to be noted
        return False
    try:
        host.evaluate(arrays, "")
    except TracedError:
        return True
    return False


@functools.cache
def nothing() -> mx.array:
    """Stands in for an input that is not there; made once, since on a GPU making it is a launch."""
    return mx.array([0.0] * _SMALLEST)


def flags(a: mx.array) -> mx.array:
    """`a` as bytes that are non-zero where it is set; bytes and bools are passed as they are, without a launch."""
    return a if a.dtype in (mx.uint8, mx.bool_) else (a != 0).astype(mx.uint8)


@dataclass(frozen=True)
class Kernel:
    """The text kernels/<name>.metal with its arguments in order.

    Inputs arrive without gaps between their elements, save those whose `<input>_strides` the text reads: they may be
    views. `header`: extra text in front of it (helper functions). `exact`: no fused multiply-add on the host, for
    results that are compared bit by bit. `made`: inputs that only other kernels make, never with gaps. `wide`: those
    whose rows may be parts of longer ones in a chain, which the template then tells.
    """

    name: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    exact: bool = False
    header: str = ""
    made: Sequence[str] = ()
    wide: Sequence[str] = ()
    _built: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @functools.cached_property
    def body(self) -> str:
        return (KERNELS / f"{self.name}.metal").read_text(encoding="utf-8")

    @functools.cached_property
    def strided(self) -> tuple[str, ...]:
        """The inputs that may be views."""
        return tuple(name for name in self.inputs if f"{name}_strides" in self.body)

    @functools.cached_property
    def measured(self) -> tuple[int, ...]:
        """The numbers of the inputs whose sizes the text reads."""
        return tuple(i for i, n in enumerate(self.inputs) if f"{n}_shape" in self.body)

    @functools.cached_property
    def _as_it_is(self) -> frozenset[str]:
        """The inputs that must keep their sizes."""
        return frozenset((*(self.inputs[i] for i in self.measured), *self.strided))

    def __call__(
        self,
        inputs: Sequence[mx.array],
        *,
        template: Template,
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
        host_template: Template | None = None,
        host_grid: tuple[int, int, int] | None = None,
        reuse: Mapping[str, mx.array] | None = None,
        gapless: bool = False,
    ) -> list[mx.array]:
        """Runs the kernel over `grid` threads (multiples of `threadgroup`) and returns its outputs.

        On the host's own geometry (see `gpu_geometry`) the grid counts threadgroups of one thread; `host_template` then
        updates `template` and `host_grid` replaces `grid`. Raises TracedError inside mx.compile or mx.vmap on the host.
        `reuse`: outputs that the host may write over these evaluated arrays, which nobody else holds: no fresh memory
        to fill. GPUs allocate cheaply and ignore it. `gapless`: the caller knows that no input has gaps but those that
        may, so that a GPU need not look.
        """
        assert len(inputs) == len(self.inputs), self.name
        assert len(output_shapes) == len(output_dtypes) == len(self.outputs), self.name
        assert dialect() is not Dialect.REFERENCE, f"{self.name}: the reference dialect runs no kernel"
        if _mode.recorder:
            noted: list[mx.array] = _mode.recorder(
                self, inputs, template, grid, threadgroup, output_shapes, output_dtypes
            )
            return noted
        if not gpu_geometry():
            template, grid, threadgroup = {**template, **(host_template or {})}, host_grid or grid, (1, 1, 1)
        assert all(g % t == 0 for g, t in zip(grid, threadgroup, strict=True)), f"{self.name}: {grid} {threadgroup}"
        prepared = [self._prepare(n, a) for n, a in zip(self.inputs, inputs, strict=True)]
        if dialect() is Dialect.HOST:
            if gapless and _mode.fibers:  # in tests: it costs a CPU's token some hundredths
                self._check_gapless(prepared)
            return self._run_on_host(prepared, template, grid, threadgroup, output_shapes, output_dtypes, reuse or {})
        if self.strided and not gapless:  # else MLX does it
            prepared = self._packed(prepared)
        return self._run_on_gpu(prepared, template, grid, threadgroup, output_shapes, output_dtypes)

    def _prepare(self, name: str, a: mx.array) -> mx.array:
        if a.ndim == 0:
            a = a.reshape(1)
        if a.size < _SMALLEST and name not in self._as_it_is and dialect() is not Dialect.CUDA:
            a = mx.pad(a.reshape(-1), (0, _SMALLEST - a.size))
        return a

    def _run_on_host(self, inputs, template, grid, threadgroup, shapes, dtypes, reuse) -> list[mx.array]:  # type: ignore[no-untyped-def]
        assert threadgroup[1:] == (1, 1), f"{self.name}: threadgroups are one-dimensional on fibers"
        inputs = self._packed(inputs)
        host.evaluate(inputs, self.name)
        for i, name in enumerate(self.inputs):  # LANES loops want neighbours
            if name in self.strided and not _mode.fibers and host.strides(inputs[i])[-1] != 1:
                inputs[i] = mx.contiguous(inputs[i])
                mx.eval(inputs[i])
        key = (
            tuple(a.dtype for a in inputs),
            tuple(dtypes),
            tuple(sorted(template.items())),
            _mode.fibers,
            bool(reuse),
        )
        if key not in self._built:
            types_in = {n: a.dtype for n, a in zip(self.inputs, inputs, strict=True)}
            types_out = dict(zip(self.outputs, dtypes, strict=True))
            text = host.source(self.body, self.header, types_in, types_out, template, _mode.fibers, bool(reuse))
            self._built[key] = host.build(self.name, text, self.exact)
        fresh = _poison if _mode.poison else _fresh
        wanted = zip(self.outputs, shapes, dtypes, strict=True)
        outputs = [reuse[name] if name in reuse else fresh(shape, dtype) for name, shape, dtype in wanted]
        assert all(o.shape == tuple(s) and o.dtype == d for o, s, d in zip(outputs, shapes, dtypes, strict=True))
        mx.eval(outputs)
        sizes = [inputs[i].shape for i in self.measured]
        strides = [host.strides(a) for n, a in zip(self.inputs, inputs, strict=True) if n in self.strided]
        groups = (grid[0] // threadgroup[0], grid[1], grid[2])
        host.call(self._built[key], self.name, inputs, sizes, strides, outputs, groups, threadgroup[0])
        return outputs

    def _packed(self, inputs: Sequence[mx.array]) -> list[mx.array]:
        """The inputs without gaps, save those whose strides the text reads: these stay as they lie, views included.
        mx.contiguous copies an array on a GPU, gaps or not, whose buffer is 16 KiB larger than itself: not large ones.
        """
        named, kept = zip(self.inputs, inputs, strict=True), {*self.strided, *self.made}
        return [a if name in kept or a is nothing() else mx.contiguous(a) for name, a in named]

    def _check_gapless(self, inputs: Sequence[mx.array]) -> None:
        """What a GPU would not notice: it reads such arrays as they lie."""
        host.evaluate(inputs, self.name)
        for name, a in zip(self.inputs, inputs, strict=True):
            assert name in self.strided or host.view(a).flags.c_contiguous, f"{self.name}: {name} has gaps"

    def _run_on_gpu(self, inputs, template, grid, threadgroup, shapes, dtypes) -> list[mx.array]:  # type: ignore[no-untyped-def]
        extra = {"init_value": float("nan")} if _mode.poison else {}
        if dialect() is Dialect.CUDA and not self.strided:  # strides are known to MLX alone, when it evaluates
            run = self._precompiled(inputs, template, dtypes)
            return run(inputs, output_shapes=shapes, output_dtypes=dtypes, grid=grid, threadgroup=threadgroup, **extra)
        return list(
            self._made_by_mlx(inputs)(
                inputs=list(inputs),
                template=list(template.items()),
                grid=grid,
                threadgroup=threadgroup,
                output_shapes=list(shapes),
                output_dtypes=list(dtypes),
                **extra,
            )
        )

    def _precompiled(self, inputs: Sequence[mx.array], template: Template, dtypes: Sequence[mx.Dtype]) -> cuda.Built:
        axes = tuple(inputs[i].ndim for i in self.measured)
        key = (Dialect.CUDA, tuple(a.dtype for a in inputs), tuple(dtypes), tuple(template.items()), axes)
        if key not in self._built:
            types_in = {n: a.dtype for n, a in zip(self.inputs, inputs, strict=True)}
            types_out = dict(zip(self.outputs, dtypes, strict=True))
            dimensions = {self.inputs[i]: count for i, count in zip(self.measured, axes, strict=True)}
            text = functools.partial(
                cuda.source, body=self.body, header=self.header, inputs=types_in, outputs=types_out, template=template,
                dimensions=dimensions,
            )  # fmt: skip
            self._built[key] = cuda.Built(*cuda.compiled(self.name, text), self.measured)
        return self._built[key]

    def _made_by_mlx(self, inputs: Sequence[mx.array]) -> Any:
        d = dialect()
        key = (d, tuple(a.dtype for a in inputs))
        if key not in self._built:
            make = mx.fast.metal_kernel if d is Dialect.METAL else mx.fast.cuda_kernel
            header = self.gpu_header(d)
            # MLX finds a built kernel, also on disk, by name and template alone: not by its text or its inputs' types.
            digest = hashlib.sha256("\0".join([header, self.body, *map(str, key[1])]).encode()).hexdigest()[:12]
            self._built[key] = make(
                name=f"magellano_{self.name}_{digest}",
                input_names=list(self.inputs),
                output_names=list(self.outputs),
                source=self.body,
                header=header,
                ensure_row_contiguous=not self.strided,  # else _packed does it
            )
        return self._built[key]

    def gpu_header(self, d: Dialect) -> str:
        """What MLX puts in front of the body: the dialect's header, common.h and the kernel's own."""
        name = {Dialect.METAL: "metal.h", Dialect.CUDA: "cuda.h"}[d]
        return (KERNELS / name).read_text() + (KERNELS / "common.h").read_text() + self.header + "\n"


def _fresh(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Zeros, for MLX makes no array without filling it; as bytes, for wider elements fill a third as fast."""
    size = math.prod(shape) * dtype.size
    return mx.zeros((size,), mx.uint8).view(dtype).reshape(shape) if size >= _LARGE else mx.zeros(shape, dtype)


def _poison(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    if mx.issubdtype(dtype, mx.floating):
        return mx.full(shape, float("nan"), dtype)
    return mx.full(shape, 1, dtype) if dtype == mx.bool_ else mx.full(shape, 0xA5, mx.uint8).astype(dtype)
