"""Kernels that write bytes, and the short functions behind them, against numpy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cpu_targets import assert_stays_inside
from hypothesis import given
from hypothesis import strategies as st
from scipy import special
from test_cpu_kernels import SCALAR_CALL, SCALES, apply, byte_reference, few

from icd_tvm._tvm import tvm
from icd_tvm.tir_schedules.cpu import vector_math
from icd_tvm.tir_schedules.cpu.attention_head import AttentionShape
from icd_tvm.tir_schedules.cpu.byte_attention import ByteForm, byte_attention, byte_form
from icd_tvm.tir_schedules.cpu.int8_matmul import (
    int8_matmul,
    is_int8_matmul,
    pack_int8,
    unpack_int8,
)
from icd_tvm.tir_schedules.cpu.layer_norm import NormForm, layer_norm, norm_form
from icd_tvm.tir_schedules.cpu.stack import compile_kernel
from icd_tvm.tir_schedules.cpu.tile_builder import ExplicitTileRule
from icd_tvm.tir_schedules.target import host_target, parse_target

Array = np.ndarray
POINT = 117


def run(func: Any, inputs: list[Array], outputs: list[Array], target: Any) -> list[Array]:
    """Run a scheduled function on outputs that hold wrong values."""
    out = [tvm.runtime.tensor(array) for array in outputs]
    compile_kernel(func, target)["main"](*[tvm.runtime.tensor(a) for a in inputs], *out)
    return [array.numpy() for array in out]


def codes(values: Array, factor: Array) -> Array:
    return np.clip(np.rint(values * factor) + POINT, 0, 255)


def off_by(actual: Array, expected: Array) -> tuple[float, float]:
    """Return the largest difference of codes, and the share that differ."""
    difference = np.abs(actual.astype(np.float64) - expected)
    return float(difference.max()), float(np.mean(difference > 0))


@few
@given(
    batch=st.integers(1, 2),
    queries=st.integers(1, 20),
    keys=st.integers(1, 40),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([4, 16, 20, 32, 64]),
    raised=st.booleans(),
    coded=st.booleans(),
    count=st.sampled_from([1, 2]),
    cpu=st.sampled_from([None, "x86-64-v3"]),
)
def test_byte_attention_in_every_form(
    batch: int,
    queries: int,
    keys: int,
    heads: int,
    head_dim: int,
    raised: bool,
    coded: bool,
    count: int,
    cpu: str | None,
) -> None:
    target = host_target(count) if cpu is None else parse_target(cpu, count)
    width, form = heads * head_dim, ByteForm(raised, coded)
    shape = AttentionShape(batch, queries, keys, heads, head_dim, 0.3, 1, (width,) * 3)
    rng = np.random.default_rng(queries * 100 + keys)
    q = rng.integers(0, 256, (batch, queries, width)).astype(np.uint8)
    k, v = (rng.integers(-128, 128, (batch, keys, width)).astype(np.int8) for _ in "kv")
    mask = np.where(rng.random((1, 1, 1, keys)) < 0.4, -np.inf, 0).astype(np.float32)
    mask[..., 0] = 0
    expected = byte_reference(shape, q, k, v, mask)
    given_rows = [(x.astype(np.int16) + 128).astype(np.uint8) if raised else x for x in (k, v)]
    inputs = [q, *given_rows, mask, *SCALES.arrays()]
    factor = rng.uniform(5, 60, width).astype(np.float32)
    out = np.full((batch, queries, width), np.nan, np.float32)
    if coded:
        inputs += [factor, np.asarray([POINT], np.float32)]
        out = np.full(out.shape, 77, np.uint8)
    actual = run(byte_attention(shape, target, form), inputs, [out], target)[0]
    # A probability on the edge between two codes may fall to either side.
    step = SCALES.weight * SCALES.value * 128
    if coded:
        largest, share = off_by(actual, codes(expected, factor))
        assert largest <= np.ceil(step * 60) + 1
        assert share < 0.05
    else:
        assert np.abs(actual - expected).max() <= step + 1e-5
        assert np.mean(np.abs(actual - expected) > 1e-5) < 0.02


def test_byte_attention_of_a_fully_masked_row_is_the_mean() -> None:
    target = host_target(1)
    shape = AttentionShape(1, 3, 5, 1, 16, 1.0, 1, (16,) * 3)
    rng = np.random.default_rng(0)
    q = rng.integers(0, 256, (1, 3, 16)).astype(np.uint8)
    k, v = np.zeros((1, 5, 16), np.int8), rng.integers(-128, 128, (1, 5, 16)).astype(np.int8)
    mask = np.full((1, 1, 1, 5), -3.4028235e38, np.float32)
    out = np.full((1, 3, 16), np.nan, np.float32)
    actual = run(byte_attention(shape, target), [q, k, v, mask, *SCALES.arrays()], [out], target)[0]
    mean = np.broadcast_to(v.mean(axis=1, keepdims=True) * SCALES.value, (1, 3, 16))
    np.testing.assert_allclose(actual, mean, atol=1e-4)


def test_a_norm_reads_its_own_factors_and_point() -> None:
    """By their names a trace tells the arguments apart."""
    target, rows, columns = host_target(1), 3, 20
    func = layer_norm((rows, columns), 1e-5, target, residual=True, codes=True)
    size = 4 * rows * columns
    sizes = [size, size, *[4 * columns] * 3, 4, size, rows * columns]
    assert_stays_inside(func, sizes, target)


def test_kernels_remember_their_form() -> None:
    target = host_target(1)
    shape = AttentionShape(1, 3, 5, 1, 16, 0.25, 1, (16,) * 3)
    form = ByteForm(raised=True, codes=True)
    attention = byte_attention(shape, target, form)
    norm = layer_norm((2, 8), 0.25, target, residual=True, codes=True)
    assert byte_form(attention) == form
    assert byte_form(norm) is None
    assert norm_form(norm) == NormForm(0.25, residual=True, codes=True)
    assert norm_form(attention) is None
    product = int8_matmul(3, 8, 16, target)
    assert is_int8_matmul(product)
    assert not is_int8_matmul(norm)


@few
@given(
    lead=st.sampled_from([(1,), (3,), (2, 5)]),
    d=st.integers(1, 200),
    residual=st.booleans(),
    count=st.sampled_from([1, 2]),
)
def test_layer_norm_writes_codes_beside_its_result(
    lead: Any, d: int, residual: bool, count: int
) -> None:
    target, rng = host_target(count), np.random.default_rng(d)
    shape = (*lead, d)
    rows = [rng.standard_normal(shape).astype(np.float32) for _ in range(1 + residual)]
    gamma, beta = (rng.standard_normal(d).astype(np.float32) for _ in "gb")
    factor = rng.uniform(5, 60, d).astype(np.float32)
    outputs = [np.full(shape, np.nan, np.float32), np.full(shape, 77, np.uint8)]
    func = layer_norm(shape, 1e-5, target, residual=residual, codes=True)
    inputs = [*rows, gamma, beta, factor, np.asarray([POINT], np.float32)]
    values, made = run(func, inputs, outputs, target)
    total = sum(rows).astype(np.float64)
    centre = total - total.mean(-1, keepdims=True)
    exact = centre / np.sqrt((centre**2).mean(-1, keepdims=True) + 1e-5) * gamma + beta
    np.testing.assert_allclose(values, exact, atol=1e-5)
    np.testing.assert_array_equal(made, codes(values, factor))


@pytest.mark.parametrize(
    ("function", "exact", "relative", "limits"),
    [
        (vector_math.erf_short, special.erf, 2.3e-5, (-9.0, 9.0)),
        (vector_math.exp2_short, np.exp2, 3e-6, (-126.0, 0.0)),
    ],
)
def test_short_functions_keep_their_bounds_and_make_no_call(
    function: Any, exact: Any, relative: float, limits: tuple[float, float]
) -> None:
    x = np.linspace(*limits, 8192, dtype=np.float32)
    actual, asm = apply(function, x)
    expected = exact(x.astype(np.float64))
    scale = 1.0 if function is vector_math.erf_short else expected
    assert np.max(np.abs(actual - expected) / scale) < relative
    assert not SCALAR_CALL.search(asm)


def test_short_functions_at_their_limits() -> None:
    x = np.array([-np.inf, -1e9, -200, 0, np.nan, -3, -50, 1], np.float32)
    powers, _ = apply(vector_math.exp2_short, np.resize(x, 64))
    assert (powers[:3] < 2e-38).all()
    assert powers[3] == pytest.approx(1, abs=3e-6)
    assert np.isnan(powers[4])
    errors, _ = apply(vector_math.erf_short, np.resize(x, 64))
    np.testing.assert_array_equal(errors[:3], [-1, -1, -1])
    assert errors[3] == 0
    assert np.isnan(errors[4])


def test_codes_of_gelu_are_within_their_bound() -> None:
    """The bound that `ShortenErf` states: under 0.006 of a step for a positive input."""
    x = np.linspace(0, 30, 65536)
    short = apply(vector_math.gelu_short, x.astype(np.float32))[0].astype(np.float64)
    exact = x * special.ndtr(x)
    for top in (0.5, 2.0, 8.0, 30.0):
        step = top / 255
        inside = exact <= top
        assert (np.abs(short - exact) / step)[inside].max() < 0.006


@pytest.mark.parametrize(("k", "n", "columns"), [(8, 32, 16), (7, 33, 16), (1, 1, 48), (12, 50, 4)])
def test_a_packed_weight_is_unpacked(k: int, n: int, columns: int) -> None:
    weight = np.random.default_rng(k).integers(-128, 128, (k, n)).astype(np.int8)
    np.testing.assert_array_equal(unpack_int8(pack_int8(weight, columns), k, n), weight)


@pytest.mark.parametrize(("m", "n", "fetches"), [(64, 512, True), (4, 512, False), (64, 8, False)])
def test_the_next_panel_is_fetched_where_row_tiles_share_one(m: int, n: int, fetches: bool) -> None:
    target = parse_target("cooperlake", 1)
    sch = ExplicitTileRule().apply(int8_matmul(m, 64, n, target), target, False)
    asm = compile_kernel(sch.mod["main"], target).mod.inspect_source("asm")
    assert ("prefetch" in asm) == fetches
