"""Products of a few rows of floats with bytes, through digits, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_targets import HOST, basic_blocks
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from icd_tvm._tvm import tvm
from icd_tvm.errors import ShapeError
from icd_tvm.relax_passes.narrow_weight import narrow_product
from icd_tvm.relax_passes.quantized_operands import Weight
from icd_tvm.tir_schedules.cpu.digit_lanes import lane_digit_matmul, pack_lane_digits
from icd_tvm.tir_schedules.cpu.digit_matmul import (
    DIGITS,
    digit_matmul,
    digit_tile,
    pack_digits,
    takes_digits,
)
from icd_tvm.tir_schedules.cpu.gemv import MAX_ROWS, SKIP_ROWS, NarrowWeight
from icd_tvm.tir_schedules.cpu.stack import compile_kernel
from icd_tvm.tir_schedules.cpu.tile_builder import ExplicitTileRule
from icd_tvm.tir_schedules.target import host_target, parse_target

Array = np.ndarray
CHUNK, DEEPEST = 16, 43792
few = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
needs_vnni = pytest.mark.skipif(
    not takes_digits(NarrowWeight(8, CHUNK), 3, CHUNK, HOST), reason="no vpdpbusd on 512 bits here"
)


def product(x: Array, values: Array, scale: Array, target: object = HOST) -> Array:
    """Run the kernel that is chosen, on an output full of NaN."""
    weight = Weight(values.astype(np.int8), np.zeros((1, 1), np.int8), scale, "w")
    kernel = narrow_product(weight, x.shape[:-1], target)
    assert kernel.name == "digit_matmul"
    arrays = [x, *kernel.constants.values(), np.full((*x.shape[:-1], values.shape[1]), np.nan)]
    *inputs, out = [
        tvm.runtime.tensor(a.astype(np.float32) if a.dtype == np.float64 else a) for a in arrays
    ]
    sch = ExplicitTileRule().apply(kernel.func, target, False)
    compile_kernel(sch.mod["main"], target)["main"](*inputs, out)
    return out.numpy()


def case(shape: tuple[int, ...], n: int, seed: int = 0) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32)
    values = rng.integers(-128, 128, (shape[-1], n))
    # Numbers that span less are stored in four bits.
    values[:2, 0] = -128, 127
    return x, values, (rng.random((1, n)) + 0.1).astype(np.float32)


def check(x: Array, values: Array, scale: Array, target: object = HOST) -> None:
    """Compare with float64 within the bound that the module states."""
    actual = product(x, values, scale, target)
    weight = values.astype(np.float64) * scale.astype(np.float64)
    expected = x.astype(np.float64) @ weight
    peak = np.abs(x).max(axis=-1, keepdims=True).astype(np.float64)
    bound = 2**-22.5 * peak * np.abs(weight).sum(axis=0) + 2**-21 * np.abs(expected)
    assert (np.abs(actual - expected) <= bound).all()


@needs_vnni
@few
@given(
    m=st.integers(3, MAX_ROWS),
    chunks=st.integers(1, 5),
    n=st.integers(1, 90),
    spread=st.sampled_from([0.0, 3.0]),
)
@example(m=8, chunks=1, n=1, spread=0.0)
@example(m=3, chunks=3, n=65, spread=3.0)
def test_product_equals_float64(m: int, chunks: int, n: int, spread: float) -> None:
    x, values, scale = case((m, CHUNK * chunks), n)
    outliers = np.exp(spread * np.random.default_rng(1).standard_normal(x.shape))
    check((x * outliers).astype(np.float32), values, scale)


@needs_vnni
@few
@given(
    m=st.integers(3, MAX_ROWS),
    chunks=st.integers(1, 5),
    n=st.integers(1, 90),
    share=st.sampled_from([0.0, 0.3]),
)
def test_runs_of_zeros_are_skipped(m: int, chunks: int, n: int, share: float) -> None:
    x, values, scale = case((m, CHUNK * chunks), n, seed=n)
    columns = digit_tile(m).columns
    for start in range(0, n, columns):
        kept = np.random.default_rng(start).random(2 * chunks) < share
        kept[0] = True
        values[np.repeat(~kept, SKIP_ROWS), start : start + columns] = 0
    weight = Weight(values.astype(np.int8), np.zeros((1, 1), np.int8), scale, "w")
    constants = narrow_product(weight, (m,), HOST).constants
    assert set(constants) <= {"", ".scale", ".rows", ".sums"}
    assert ".rows" in constants or share
    check(x, values, scale)


@needs_vnni
@pytest.mark.parametrize("shape", [(4, 1, 32), (1, 3, 32), (2, 4, 32)])
def test_batch_axes(shape: tuple[int, ...]) -> None:
    check(*case(shape, 40))


@needs_vnni
def test_threads_share_the_columns() -> None:
    check(*case((5, 64), 500), host_target(2))


@needs_vnni
@pytest.mark.parametrize("weight", [-128, 127])
@pytest.mark.parametrize("number", [-3.0, 3.0])
def test_the_longest_sums_do_not_overflow(weight: int, number: float) -> None:
    x = np.full((3, DEEPEST), number, np.float32)
    columns = np.array([weight, -1 - weight])
    values = np.broadcast_to(columns, (DEEPEST, 2))
    actual = product(x, values, np.ones((1, 2), np.float32))
    expected = np.broadcast_to(number * columns * DEEPEST, (3, 2))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@needs_vnni
def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    x, values, scale = case((6, 48), 20)
    x[0], x[1, 3], x[2, 40], x[3, 7] = 0.0, np.nan, np.inf, -np.inf
    x[4] *= np.float32(1e-30)
    actual = product(x, values, scale)
    assert np.isnan(actual[1]).all()
    assert not np.isfinite(actual[2:4]).any()
    np.testing.assert_array_equal(actual[0], 0.0)
    # Below 1e-20 rows are scaled as if that were their largest number.
    assert np.abs(actual[4]).max() <= 48 * 128 * 1e-20
    check(x[[0, 5, 5]], values, scale)


@needs_vnni
@pytest.mark.parametrize("rows", range(1, MAX_ROWS + 1))
def test_from_three_rows_on_bytes_are_multiplied(rows: int) -> None:
    x, values, scale = case((rows, 32), 8)
    weight = Weight(values.astype(np.int8), np.zeros((1, 1), np.int8), scale, "w")
    wanted = "digit" if rows >= 3 else "narrow"
    kernel = narrow_product(weight, x.shape[:-1], HOST)
    assert kernel.name == f"{wanted}_matmul"
    assert kernel.description == f"{wanted}, 32 rows of 8 bits"
    tile = digit_tile(rows)
    assert DIGITS * rows * tile.vectors + tile.vectors + 2 <= 32


def test_eight_rows_of_a_column_are_neighbours() -> None:
    weight = np.arange(-128, 128, dtype=np.int16).astype(np.int8).reshape(2, 16, 8)
    scale = np.ones((2, 1, 8), np.float32)
    rows = np.array([[0, 8], [16, 0]], np.int32)
    pairs, factors, lists, sums = pack_lane_digits([weight, scale, rows])
    assert pairs.shape == (1, 2, 2, 64)
    assert pairs[0, 0, 0, :9].tolist() == [*range(-128, -64, 8), -127]
    assert pairs[0, 1, 1, :8].tolist() == [*range(64, 128, 8)]
    assert factors.shape == (1, 1, 16)
    assert lists.tolist() == [[[0, 8], [16, 0]]]
    np.testing.assert_array_equal(sums[0, 0], weight.sum(axis=1, dtype=np.int32).reshape(-1))


@needs_vnni
@pytest.mark.parametrize(("rows", "lanes"), [(3, False), (6, False), (7, True), (8, True)])
def test_eight_rows_fill_the_lanes(rows: int, lanes: bool) -> None:
    x, values, scale = case((rows, 64), 40, seed=rows)
    weight = Weight(values.astype(np.int8), np.zeros((1, 1), np.int8), scale, "w")
    constants = narrow_product(weight, (rows,), HOST).constants
    assert (constants[""].ndim == 4) == lanes
    check(x, values, scale)
    if not lanes:
        with pytest.raises(ShapeError, match="no kernel of lanes"):
            lane_digit_matmul(rows, 64, 40, NarrowWeight(8, 64), HOST)


@needs_vnni
def test_a_step_of_eight_rows_is_bound_by_products() -> None:
    func = lane_digit_matmul(8, 512, 64, NarrowWeight(8, 512), HOST)
    sch = ExplicitTileRule().apply(func, HOST, False)
    text = compile_kernel(sch.mod["main"], HOST).mod.inspect_source("asm")
    # What follows the jump back keeps its sums in memory.
    block = max(basic_blocks(text), key=lambda block: block.count("vpdpbusd"))
    loop = block.partition("\tjne")[0]
    assert loop.count("vpdpbusd") % 24 == 0
    assert loop.count("vpbroadcastq") == loop.count("vpdpbusd") // 3
    assert "(%rsp)" not in "\n".join(line for line in loop.splitlines() if "zmm" in line)


def test_four_rows_of_a_column_are_neighbours() -> None:
    weight = np.arange(-16, 16, dtype=np.int8).reshape(1, 8, 4)
    scale = np.ones((1, 1, 4), np.float32)
    quads, same, sums = pack_digits([weight, scale])
    assert quads[0, 0, :8].tolist() == [-16, -12, -8, -4, -15, -11, -7, -3]
    assert same is scale
    np.testing.assert_array_equal(sums, weight.sum(axis=1, keepdims=True))
    assert sums.dtype == np.int32


@pytest.mark.parametrize("name", ["x86-64-v3", "x86-64-v4", "aarch64"])
def test_other_targets_multiply_floats(name: str) -> None:
    target, form = parse_target(name, 1), NarrowWeight(8, 32)
    assert not takes_digits(form, 4, 32, target)
    with pytest.raises(ShapeError, match="no kernel of digits"):
        digit_matmul(4, 32, 16, form, target)


@pytest.mark.parametrize(
    ("form", "rows", "k"),
    [
        (NarrowWeight(8, 24), 4, 24),
        (NarrowWeight(8, 16), 4, 32),
        (NarrowWeight(8, 32, 3), 4, 32),
        (NarrowWeight(8, 32, 0, zeros=True), 4, 32),
        (NarrowWeight(4, 32), 4, 32),
        (NarrowWeight(8, 32), 2, 32),
        (NarrowWeight(8, 32), MAX_ROWS + 1, 32),
        (NarrowWeight(8, DEEPEST + CHUNK), 4, DEEPEST + CHUNK),
    ],
)
def test_other_weights_have_no_digits(form: NarrowWeight, rows: int, k: int) -> None:
    assert not takes_digits(form, rows, k, HOST)
    with pytest.raises(ShapeError, match="use narrow_matmul"):
        digit_matmul(rows, k, 16, form, HOST)
