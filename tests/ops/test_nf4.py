"""NF4 against bitsandbytes' own results (tests/golden/make_nf4.py), in every dialect; the product against float64."""

from pathlib import Path

import numpy as np
import pytest

from magellano import nf4
from magellano.backend import mx
from magellano.nf4 import NF4Tensor
from magellano.ops import nf4 as ops
from magellano.ops import nf4_matmul

GOLDEN = mx.load(str(Path(__file__).parents[1] / "golden" / "nf4.safetensors"))
CASES = sorted({name.split(".")[0] for name in GOLDEN if "." in name})


def as_numpy(a: mx.array) -> np.ndarray:
    return np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a)


def golden(case: str, part: str) -> np.ndarray:
    return np.array(GOLDEN[f"{case}.{part}"])


def test_the_tables_are_bitsandbytes_own() -> None:
    np.testing.assert_array_equal(ops.scale_values(), GOLDEN["scale_table"])
    np.testing.assert_array_equal(ops.values(), GOLDEN["value_table"])


@pytest.mark.parametrize("case", CASES)
def test_codes_and_maxima_equal_bitsandbytes(case: str, dialect: str) -> None:
    w = GOLDEN[f"{case}.w"]
    codes, absmax = ops.quantize_blocks(w.reshape(-1))
    np.testing.assert_array_equal(codes, golden(case, "codes"))
    np.testing.assert_array_equal(absmax, golden(case, "absmax"))
    q = nf4.quantize(w)
    np.testing.assert_array_equal(q.scale_absmax, golden(case, "scale_absmax"))
    np.testing.assert_allclose(q.scale_offset, golden(case, "scale_offset"), rtol=2e-7)  # it sums in float32


@pytest.mark.parametrize("case", CASES)
def test_scale_codes_are_nearest(case: str) -> None:
    q = nf4.quantize(GOLDEN[f"{case}.w"])
    table = np.array(GOLDEN["scale_table"], np.float64)
    centred = golden(case, "absmax").astype(np.float64) - np.float64(q.scale_offset.item())
    largest = np.repeat(np.array(q.scale_absmax, np.float64), 256)[: centred.size]
    largest[largest == 0] = 1  # a single block: its maximum is the mean
    distance = np.abs(centred[:, None] / largest[:, None] - table)
    chosen = np.take_along_axis(distance, np.array(q.scale_codes)[:, None].astype(int), 1)[:, 0]
    assert (chosen <= distance.min(1) + 1e-7).all()
    if q.scale_absmax[0].item() == 0:
        return  # bitsandbytes divides zero by zero here
    theirs = golden(case, "scale_codes").astype(int)
    assert (np.abs(np.array(q.scale_codes).astype(int) - theirs) <= 1).all()
    assert (np.array(q.scale_codes) != theirs).sum() <= 1


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_dequantised_values_equal_bitsandbytes(case: str, dtype: str, dialect: str) -> None:
    parts = {part: GOLDEN[f"{case}.{part}"] for part in NF4Tensor.PARTS}
    q = NF4Tensor.from_arrays(GOLDEN[f"{case}.w"].shape, parts)
    np.testing.assert_array_equal(as_numpy(q.dequantize(getattr(mx, dtype))), golden(case, dtype))


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 511, 16384, 16385, 40001])
def test_any_size(count: int, dialect: str) -> None:
    w = mx.random.normal((count,), key=mx.random.key(count))
    q = nf4.quantize(w)
    d = q.dequantize()
    assert q.codes.size == -(-count // 2)
    block = np.abs(np.pad(np.array(w), (0, -count % 64)).reshape(-1, 64)).max(1).repeat(64)[:count]
    # Half the widest gap between codes is 0.152 of the maximum; the 8-bit scale adds at most 0.02 of the largest.
    assert (np.abs(np.array(d - w)) <= 0.153 * block + 0.02 * block.max()).all()


@pytest.mark.parametrize("shape", [(5,), (64, 64), (3, 7, 11)])
def test_zeros_stay_zeros(shape: tuple[int, ...], dialect: str) -> None:
    assert (np.array(nf4.quantize(mx.zeros(shape)).dequantize()) == 0).all()


def test_sixteen_bit_weights_quantise_as_their_float32_values(dialect: str) -> None:
    w = mx.random.normal((96, 64), key=mx.random.key(1)).astype(mx.bfloat16)
    np.testing.assert_array_equal(nf4.quantize(w).codes, nf4.quantize(w.astype(mx.float32)).codes)


@pytest.mark.parametrize("shape", [(300, 64), (300, 48), (70, 128)])
def test_rows_and_slices_are_parts_of_the_whole(
    shape: tuple[int, int], dialect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nf4, "SLICE_VALUES", 64 * shape[1])  # several slices even of a small matrix
    q = nf4.quantize(mx.random.normal(shape, key=mx.random.key(2)))
    whole = np.array(q.dequantize())
    index = mx.array([[0, 5, 5], [shape[0] - 1, 63, 64]])
    np.testing.assert_array_equal(q.rows(index), whole[np.array(index)])
    slices = list(q.slices(mx.float32))
    assert len(slices) == -(-shape[0] // 64)
    np.testing.assert_array_equal(np.concatenate([np.array(s) for _, _, s in slices]), whole)


def test_a_large_tensor_needs_little_memory_beside_it() -> None:
    w = mx.random.normal((4096, 4096), key=mx.random.key(3))
    mx.eval(w)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    q = nf4.quantize(w)
    assert mx.get_peak_memory() - before < 2 * w.nbytes
    assert q.nbytes * 8 / w.size == pytest.approx(4.127, abs=1e-3)


def test_arrays_round_trip_and_wrong_ones_are_refused() -> None:
    q = nf4.quantize(mx.random.normal((10, 30)))
    again = NF4Tensor.from_arrays(q.shape, q.arrays())
    np.testing.assert_array_equal(again.dequantize(), q.dequantize())
    with pytest.raises(ValueError, match="NF4 codes: 150 values"):
        NF4Tensor.from_arrays((10, 31), q.arrays())
    with pytest.raises(ValueError, match="must hold float values"):
        nf4.quantize(mx.zeros((4,), dtype=mx.int32))
    with pytest.raises(ValueError, match="must hold float values"):
        nf4.quantize(mx.zeros((0,)))


@pytest.mark.parametrize("shape", [(1, 64), (2, 5, 64), (3, 48)])
def test_product_and_its_gradient(shape: tuple[int, ...], dialect: str) -> None:
    rng = np.random.default_rng(5)
    q = nf4.quantize(mx.array(rng.standard_normal((33, shape[-1])), dtype=mx.float32))
    w = np.array(q.dequantize(), np.float64)
    x, dy = rng.standard_normal(shape).astype(np.float32), rng.standard_normal((*shape[:-1], 33)).astype(np.float32)
    (y,), (dx,) = mx.vjp(lambda x: nf4_matmul(x, q), [mx.array(x)], [mx.array(dy)])
    np.testing.assert_allclose(y, x @ w.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, dy @ w, rtol=1e-5, atol=1e-5)


def test_product_inside_compile(dialect: str) -> None:
    q, x = nf4.quantize(mx.random.normal((40, 64))), mx.random.normal((3, 64))
    gradient = mx.grad(lambda x: nf4_matmul(x, q).square().sum())
    np.testing.assert_allclose(mx.compile(gradient)(x), gradient(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float32, 2e-6), (mx.float16, 1e-3), (mx.bfloat16, 6e-3)])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 64, 5), (1, 512, 33), (3, 320, 130)])
def test_matrix_vector_product_from_the_codes(
    rows: int, inputs: int, outputs: int, dtype: mx.Dtype, tolerance: float, dialect: str
) -> None:
    rng = np.random.default_rng(rows + outputs)
    q = nf4.quantize(mx.array(rng.standard_normal((outputs, inputs)), dtype=mx.float32))
    x = mx.array(rng.standard_normal((rows, inputs))).astype(dtype)
    want = np.array(x.astype(mx.float32), np.float64) @ np.array(q.dequantize(), np.float64).T
    y = ops.nf4_matvec(x, q.parts, outputs)
    assert y.dtype == dtype
    error = np.abs(np.array(y.astype(mx.float32)) - want).max() / np.abs(want).max()
    assert error <= tolerance


def test_matrix_vector_product_with_an_expert_for_each_row(dialect: str) -> None:
    rng = np.random.default_rng(8)
    experts = [nf4.quantize(mx.array((e + 1) * rng.standard_normal((300, 64)), dtype=mx.float32)) for e in range(3)]
    x, expert = rng.standard_normal((4, 64)).astype(np.float32), [2, 0, 2, 1]
    y = np.array(ops.nf4_matvec(mx.array(x), nf4.NF4Stack.of(experts).parts, 300, mx.array(expert)))
    want = np.stack([np.array(experts[e].dequantize(), np.float64) @ row for e, row in zip(expert, x, strict=True)])
    assert (np.abs(y - want) <= 2e-6 * np.abs(want).max(1, keepdims=True)).all()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (300, 64)])
def test_a_stack_is_its_matrices(shape: tuple[int, int], dtype: mx.Dtype, dialect: str) -> None:
    tensors = [nf4.quantize((e + 1) * mx.random.normal(shape, key=mx.random.key(e))) for e in range(3)]
    stack = nf4.NF4Stack.of(tensors)
    assert stack.shape == (3, *shape)
    whole = as_numpy(stack.dequantize(dtype))
    for e, tensor in enumerate(tensors):
        np.testing.assert_array_equal(whole[e], as_numpy(tensor.dequantize(dtype)))
        np.testing.assert_array_equal(as_numpy(stack[e].dequantize(dtype)), whole[e])
    np.testing.assert_array_equal(as_numpy(stack.dequantize(dtype, which=(2, 0))), whole[[2, 0]])
    with pytest.raises(ValueError, match="one shape"):
        nf4.NF4Stack.of([tensors[0], nf4.quantize(mx.ones((64, 128)))])


def test_matrix_vector_product_refuses_sizes_that_do_not_fit() -> None:
    q = nf4.quantize(mx.ones((10, 48)))
    for x, outputs in ((mx.ones((1, 48)), 10), (mx.ones((1, 64)), 10)):
        with pytest.raises(ValueError, match="nf4_matvec"):
            ops.nf4_matvec(x, q.parts, outputs)
