"""Products of a few rows with weights of 8 and 4 bits, against float64 and ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cpu_targets import HOST, RUNNABLE
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from icd_tvm._tvm import tvm
from icd_tvm.errors import ShapeError
from icd_tvm.relax_passes.narrow_weight import narrow_form
from icd_tvm.relax_passes.quantized_operands import Weight
from icd_tvm.tir_schedules.cpu.gemv import (
    MAX_ROWS,
    SKIP_ROWS,
    NarrowWeight,
    narrow_matmul,
    narrow_tile,
    pack_narrow,
    pack_skipping,
)
from icd_tvm.tir_schedules.cpu.stack import compile_kernel
from icd_tvm.tir_schedules.cpu.tile_builder import ExplicitTileRule
from icd_tvm.tir_schedules.target import host_target, parse_target, vector_bits

Array = np.ndarray
few = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TARGETS = [HOST, host_target(2), *(parse_target(name, 2) for name in RUNNABLE)]


def product(
    x: Array, form: NarrowWeight, values: Array, tables: list[Array], target: Any = HOST
) -> Array:
    *lead, m, _ = x.shape
    rows = m if m > 1 or len(lead) == 0 else int(np.prod(lead))
    packed = pack_narrow(values, tables, form, narrow_tile(rows, target).columns)
    return run_packed(x, form, packed, values.shape[1], target)


def run_packed(
    x: Array, form: NarrowWeight, packed: list[Array], n: int, target: Any = HOST
) -> Array:
    """Run the kernel on an output full of NaN."""
    *lead, m, k = x.shape
    func = narrow_matmul(m, k, n, form, target, lead=tuple(lead))
    arrays = [x, *packed, np.full((*lead, m, n), np.nan, np.float32)]
    *inputs, out = [tvm.runtime.tensor(array) for array in arrays]
    sch = ExplicitTileRule().apply(func, target, False)
    compile_kernel(sch.mod["main"], target)["main"](*inputs, out)
    return out.numpy()


def case(
    form: NarrowWeight, shape: tuple[int, ...], n: int, seed: int = 0
) -> tuple[Array, Array, list[Array], Array]:
    """Return x, values, tables and the product in float64."""
    rng = np.random.default_rng(seed)
    k = shape[-1]
    least, most = (0, 15) if form.bits == 4 else (-128, 127)
    values = rng.integers(least, most + 1, (k, n)) + form.low
    x = rng.standard_normal(shape).astype(np.float32)
    scale = (rng.random((k // form.block, n)) + 0.1).astype(np.float32)
    tables = [scale]
    weight = values.astype(np.float64)
    if form.zeros:
        tables.append(rng.integers(-3, 4, scale.shape))
        weight = weight - np.repeat(tables[1], form.block, 0)
    weight = weight * np.repeat(scale.astype(np.float64), form.block, 0)
    return x, values, tables, x.astype(np.float64) @ weight


def check(form: NarrowWeight, shape: tuple[int, ...], n: int, target: Any = HOST) -> None:
    x, values, tables, expected = case(form, shape, n)
    actual = product(x, form, values, tables, target)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@few
@given(
    m=st.integers(1, MAX_ROWS),
    blocks=st.integers(1, 4),
    eighths=st.integers(1, 4),
    n=st.integers(1, 90),
    bits=st.sampled_from([4, 8]),
    zeros=st.booleans(),
    target=st.sampled_from(TARGETS),
)
@example(m=1, blocks=1, eighths=1, n=1, bits=4, zeros=False, target=HOST)
@example(m=8, blocks=3, eighths=2, n=65, bits=4, zeros=True, target=HOST)
def test_product_equals_float64(
    m: int, blocks: int, eighths: int, n: int, bits: int, zeros: bool, target: Any
) -> None:
    form = NarrowWeight(bits, 8 * eighths, -8 if bits == 4 else 0, zeros)
    check(form, (m, 8 * eighths * blocks), n, target)


@pytest.mark.parametrize("k", [1, 7, 9, 21])
def test_bytes_of_any_depth(k: int) -> None:
    check(NarrowWeight(8, k, 5), (2, k), 19)


@pytest.mark.parametrize("shape", [(1, 1, 32), (4, 1, 32), (1, 3, 32), (2, 2, 32)])
def test_batch_axes(shape: tuple[int, ...]) -> None:
    check(NarrowWeight(4, 16), shape, 40)


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("form", [NarrowWeight(8, 16), NarrowWeight(4, 16, -8, zeros=True)])
def test_portable_targets(name: str, form: NarrowWeight) -> None:
    check(form, (3, 48), 50, parse_target(name, 1))


@few
@given(
    m=st.integers(1, MAX_ROWS),
    k=st.integers(1, 40),
    n=st.integers(1, 90),
    target=st.sampled_from(TARGETS),
)
def test_floats_equal_float64(m: int, k: int, n: int, target: Any) -> None:
    rng = np.random.default_rng(m * k * n)
    x, weight = (rng.standard_normal(size).astype(np.float32) for size in ((m, k), (k, n)))
    expected = x.astype(np.float64) @ weight.astype(np.float64)
    actual = product(x, NarrowWeight(32, k), weight, [], target)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6 * np.abs(expected).max() + 1e-7)


@few
@given(
    m=st.integers(1, MAX_ROWS),
    runs=st.integers(1, 8),
    n=st.integers(1, 90),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    target=st.sampled_from(TARGETS),
)
@example(m=1, runs=3, n=5, share=0.0, target=HOST)
def test_rows_of_zeros_are_neither_stored_nor_multiplied(
    m: int, runs: int, n: int, share: float, target: Any
) -> None:
    k = SKIP_ROWS * runs
    x, values, tables, _ = case(NarrowWeight(8, k), (m, k), n, seed=n)
    columns = narrow_tile(m, target).columns
    for start in range(0, n, columns):
        dropped = np.random.default_rng(start).random(runs) >= share
        values[np.repeat(dropped, SKIP_ROWS), start : start + columns] = 0
    form, packed = pack_skipping(values, tables[0], columns)
    assert packed[0].shape[1] == form.steps * SKIP_ROWS <= k
    expected = x.astype(np.float64) @ (values * tables[0].astype(np.float64))
    actual = run_packed(x, form, packed, n, target)
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6 * scale)


def test_threads_share_the_columns() -> None:
    check(NarrowWeight(4, 32, -8), (1, 64), 500, host_target(2))


def test_four_bits_hold_eight_rows_of_a_column() -> None:
    form = NarrowWeight(4, 8, -8)
    values = np.arange(-8, 0)[:, None].repeat(3, 1)
    packed, scale = pack_narrow(values, [np.ones((1, 3))], form, 16)
    assert packed.dtype == np.int32
    assert [hex(v) for v in packed.view(np.uint32)[0, 0, :4]] == ["0x76543210"] * 3 + ["0x0"]
    np.testing.assert_array_equal(scale[0, 0], [1] * 3 + [0] * 13)


@pytest.mark.parametrize("rows", range(1, MAX_ROWS + 1))
@pytest.mark.parametrize("name", ["x86-64-v3", "x86-64-v4"])
def test_tiles_fit_the_registers(rows: int, name: str) -> None:
    target = parse_target(name, 1)
    tile = narrow_tile(rows, target)
    assert tile.rows == rows
    # With blocks there are two sets of sums.
    assert 2 * rows * tile.vectors <= (32 if vector_bits(target) == 512 else 16)


def test_bad_weights_are_refused() -> None:
    with pytest.raises(ShapeError, match="5 bits"):
        NarrowWeight(5, 8)
    with pytest.raises(ShapeError, match="multiple of 8"):
        NarrowWeight(4, 12)
    with pytest.raises(ShapeError, match="divide"):
        narrow_matmul(1, 20, 16, NarrowWeight(8, 16), HOST)
    with pytest.raises(ShapeError, match=f"at most {MAX_ROWS}"):
        narrow_matmul(MAX_ROWS + 1, 16, 16, NarrowWeight(8, 16), HOST)
    with pytest.raises(ShapeError, match="no zero points"):
        NarrowWeight(32, 8, low=3)
    with pytest.raises(ShapeError, match="skip rows"):
        NarrowWeight(4, 8, steps=1)
    with pytest.raises(ShapeError, match="steps of 8 rows"):
        narrow_matmul(1, 16, 16, NarrowWeight(8, 8, steps=1), HOST)
    with pytest.raises(ShapeError, match="no multiple of 8"):
        pack_skipping(np.zeros((12, 2), np.int8), np.ones((1, 2)), 16)
    with pytest.raises(ShapeError, match="do not fit 4 bits"):
        pack_narrow(np.full((8, 2), 16), [], NarrowWeight(4, 8), 16)
    with pytest.raises(ShapeError, match="two axes"):
        pack_narrow(np.zeros(8), [], NarrowWeight(8, 8), 16)


# How a weight is stored


def weight(values: Array, zero: Any, block: int) -> Weight:
    rows = np.repeat(np.arange(len(values) // block), block)
    scale = np.arange(1.0, rows[-1] + 2, dtype=np.float32)[rows, None] * np.float32(0.1)
    table = np.asarray(zero)
    table = table[rows] if table.ndim == 2 and len(table) > 1 else np.atleast_2d(table)
    return Weight(values, table, scale, "w")


@pytest.mark.parametrize(
    ("values", "zero", "block", "expected"),
    [
        ((0, 15, np.uint8), 8, 16, NarrowWeight(4, 16, -8)),
        ((-8, 7, np.int8), 0, 16, NarrowWeight(4, 16, -8)),
        ((0, 15, np.uint8), [[1, 2], [9, 14]], 16, NarrowWeight(4, 16, 0, zeros=True)),
        ((0, 15, np.uint8), 8, 4, NarrowWeight(8, 4)),
        ((0, 255, np.uint8), 128, 16, NarrowWeight(8, 16)),
        ((0, 255, np.uint8), 0, 16, NarrowWeight(8, 16, 128)),
        ((-128, 127, np.int8), 5, 16, NarrowWeight(8, 16, -5)),
        ((-128, 127, np.int8), [[0, 9], [3, 1]], 16, NarrowWeight(8, 16, 0, zeros=True)),
    ],
)
def test_the_narrowest_storage_loses_nothing(
    values: Any, zero: Any, block: int, expected: NarrowWeight
) -> None:
    least, most, dtype = values
    drawn = np.random.default_rng(0).integers(least, most + 1, (32, 2))
    drawn[:2], drawn[-2:] = [[least], [most]], [[most], [least]]
    quantised = weight(drawn.astype(dtype), zero, block)
    form, stored, tables = narrow_form(quantised)
    assert form == expected
    restored = stored.astype(np.float64)
    if form.zeros:
        restored = restored - np.repeat(tables[1], block, 0)
    np.testing.assert_array_equal(
        restored * np.repeat(tables[0].astype(np.float64), block, 0),
        (drawn - quantised.zero.astype(np.int64)) * np.asarray(quantised.scale, np.float64),
    )


def test_blocks_are_found_in_the_tables() -> None:
    values = np.zeros((48, 2), np.int8)
    assert weight(values, 0, 12).block() == 12
    assert Weight(values, np.zeros((1, 1)), np.ones((1, 2), np.float32), "w").block() == 48
    index = np.random.default_rng(0).permutation(np.arange(48) // 12)
    scrambled = np.arange(4, dtype=np.float32)[index, None]
    assert Weight(values, np.zeros((1, 1)), scrambled, "w").block() == 1
