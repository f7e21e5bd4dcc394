"""Byte matmuls and GEMV kernels against numpy integers, exact, on drawn shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cpu_targets import HOST, RUNNABLE, basic_blocks
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from icd_tvm._tvm import tvm
from icd_tvm.errors import ConfigError, ShapeError
from icd_tvm.tir_schedules.cpu.block_int8 import (
    block_int8_matmul,
    block_int8_product,
    pack_block_int8,
)
from icd_tvm.tir_schedules.cpu.dense import dense_matmul
from icd_tvm.tir_schedules.cpu.dot_product import dot_product
from icd_tvm.tir_schedules.cpu.int8_matmul import (
    MAX_DEPTH,
    int8_matmul,
    int8_tile,
    pack_int8,
)
from icd_tvm.tir_schedules.cpu.stack import compile_kernel
from icd_tvm.tir_schedules.cpu.tile import Tile, choose_tile, flat_rows
from icd_tvm.tir_schedules.cpu.tile_builder import ExplicitTileRule
from icd_tvm.tir_schedules.cpu.transposed_int8 import (
    pack_transposed_int8,
    transposed_int8_matmul,
)
from icd_tvm.tir_schedules.cpu.transposed_sparse import TransposedSparseRule
from icd_tvm.tir_schedules.target import host_target, parse_target

Array = np.ndarray
few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
sizes = st.integers(1, 70)


def product(x: Array, w: Array, target: Any, tile: Tile | None = None) -> Array:
    """Run the kernel on an output full of a wrong number."""
    *lead, m, k = x.shape
    n = w.shape[1]
    func = int8_matmul(m, k, n, target, lead=tuple(lead), tile=tile)
    tile = tile or int8_tile(flat_rows(tuple(lead), m)[1], k, n, target)
    sch = ExplicitTileRule().apply(func, target, False)
    arrays = (x, pack_int8(w, tile.columns), np.full((*lead, m, n), -7, np.int32))
    *inputs, out = [tvm.runtime.tensor(array) for array in arrays]
    compile_kernel(sch.mod["main"], target)["main"](*inputs, out)
    return out.numpy()


def bytes_of(rng: np.random.Generator, shape: tuple[int, ...], k: int, n: int) -> Any:
    x = rng.integers(0, 256, (*shape, k)).astype(np.uint8)
    return x, rng.integers(-128, 128, (k, n)).astype(np.int8)


def exact(x: Array, w: Array) -> Array:
    return x.astype(np.int32) @ w.astype(np.int32)


@few
@given(m=sizes, k=sizes, n=sizes, threads=st.sampled_from([1, 2]), seed=st.integers(0, 99))
@example(m=1, k=1, n=1, threads=1, seed=0)
@example(m=64, k=64, n=48, threads=2, seed=0)
@example(m=512, k=37, n=50, threads=2, seed=0)
def test_product_is_exact_on_any_shape(m: int, k: int, n: int, threads: int, seed: int) -> None:
    x, w = bytes_of(np.random.default_rng(seed), (m,), k, n)
    np.testing.assert_array_equal(product(x, w, host_target(threads)), exact(x, w))


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 7), (2, 3, 1), (6, 1)])
def test_product_keeps_batch_axes(shape: tuple[int, ...]) -> None:
    x, w = bytes_of(np.random.default_rng(1), shape, 21, 19)
    np.testing.assert_array_equal(product(x, w, HOST), exact(x, w))


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("shape", [(9, 30, 20), (4, 64, 32)])
def test_portable_targets_are_exact(name: str, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    x, w = bytes_of(np.random.default_rng(2), (m,), k, n)
    np.testing.assert_array_equal(product(x, w, parse_target(name, 1)), exact(x, w))


@pytest.mark.parametrize("name", ["host", "x86-64-v3"])
@pytest.mark.parametrize("sign", [-128, 127])
def test_extreme_bytes_do_not_saturate(name: str, sign: int) -> None:
    x, w = np.full((3, 260), 255, np.uint8), np.full((260, 17), sign, np.int8)
    np.testing.assert_array_equal(product(x, w, parse_target(name, 1)), exact(x, w))


@pytest.mark.parametrize(("rows", "vectors"), [(1, 1), (5, 2), (8, 3)])
def test_any_tile_gives_the_same_product(rows: int, vectors: int) -> None:
    tile = Tile(rows, vectors, dot_product(HOST).lanes)
    x, w = bytes_of(np.random.default_rng(3), (13,), 40, 70)
    np.testing.assert_array_equal(product(x, w, HOST, tile), exact(x, w))


def test_hot_loop_is_the_dot_instruction_without_spills() -> None:
    target = parse_target("icelake-server", 1)
    sch = ExplicitTileRule().apply(int8_matmul(128, 384, 384, target), target, False)
    text = compile_kernel(sch.mod["main"], target).mod.inspect_source("asm")
    loop = max(basic_blocks(text), key=lambda body: body.count("vpdpbusd"))
    tile = int8_tile(128, 384, 384, target)
    assert loop.count("vpdpbusd") >= 4 * tile.rows * tile.vectors
    assert "(%rsp)" not in "\n".join(line for line in loop.splitlines() if "zmm" in line)


@pytest.mark.parametrize("name", ["x86-64-v4", "x86-64-v3", "icelake-server", "alderlake"])
@pytest.mark.parametrize("shape", [(1, 576, 1536), (128, 384, 1152), (13, 5, 3), (512, 768, 3072)])
def test_tiles_fit_the_registers(name: str, shape: tuple[int, int, int]) -> None:
    target = parse_target(name, 1)
    dot, tile = dot_product(target), int8_tile(*shape, target)
    assert dot.needs(tile.rows, tile.vectors) <= dot.registers
    assert tile.lanes == dot.lanes


@pytest.mark.parametrize(
    ("name", "intrinsic"),
    [
        ("icelake-server", "llvm.x86.avx512.vpdpbusd.512"),
        ("alderlake", "llvm.x86.avx512.vpdpbusd.256"),
        ("x86-64-v4", "llvm.x86.avx512.pmaddw.d.512"),
        ("x86-64-v3", "llvm.x86.avx2.pmadd.wd"),
        ("x86-64", "llvm.x86.sse2.pmadd.wd"),
    ],
)
def test_every_target_gets_its_widest_instruction(name: str, intrinsic: str) -> None:
    assert dot_product(parse_target(name, 1)).intrinsic == intrinsic


def test_packing_puts_four_rows_of_a_column_together() -> None:
    weight = np.arange(30, dtype=np.int8).reshape(5, 6)
    packed = pack_int8(weight, 4)
    assert packed.shape == (2, 2, 16)
    np.testing.assert_array_equal(packed[0, 0, :8], [0, 6, 12, 18, 1, 7, 13, 19])
    np.testing.assert_array_equal(packed[1, 1], [28, 0, 0, 0, 29, 0, 0, 0] + [0] * 8)


def test_the_rule_leaves_other_functions_alone() -> None:
    func = dense_matmul(4, 8, 16, choose_tile(4, 8, 16, HOST))
    assert ExplicitTileRule().apply(func, HOST, False) is None
    assert ExplicitTileRule().apply("no function", HOST, False) is None


def test_bad_inputs_are_refused() -> None:
    with pytest.raises(ShapeError, match="float32"):
        pack_int8(np.zeros((4, 4), np.float32), 16)
    with pytest.raises(ShapeError, match="two axes"):
        pack_int8(np.zeros(4, np.int8), 16)
    with pytest.raises(ShapeError, match=str(MAX_DEPTH)):
        int8_matmul(1, MAX_DEPTH + 1, 16, HOST)
    arm = tvm.target.Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu"})
    with pytest.raises(ConfigError, match="x86"):
        dot_product(arm)


# Groups of columns that skip quads of rows


def grouped(k: int, n: int, width: int, density: float, seed: int = 0) -> Array:
    """Return a weight of which every group of columns keeps its own random quads."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(1, 128, (k, n)).astype(np.int8)
    keep = rng.random((k // 4, -(-n // width))) < density
    return weight * np.repeat(np.repeat(keep, 4, 0), width, 1)[:, :n]


def sparse_product(x: Array, w: Array, target: Any, vectors: int) -> Array:
    *lead, m, k = x.shape
    n = w.shape[1]
    tile = int8_tile(flat_rows(tuple(lead), m)[1], k, n, target, vectors)
    constants = pack_block_int8(w, tile.columns)
    space = constants[1].shape[1]
    func = block_int8_matmul(m, k, n, space, tile, target, lead=tuple(lead))
    sch = ExplicitTileRule().apply(func, target, False)
    arrays = (x, *constants, np.full((*lead, m, n), -7, np.int32))
    *inputs, out = [tvm.runtime.tensor(array) for array in arrays]
    compile_kernel(sch.mod["main"], target)["main"](*inputs, out)
    return out.numpy()


@few
@given(
    m=st.integers(1, 40),
    quads=st.integers(1, 40),
    n=st.integers(1, 70),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    vectors=st.sampled_from([1, 2]),
    name=st.sampled_from(["host", *RUNNABLE]),
    threads=st.sampled_from([1, 2]),
)
@example(m=1, quads=1, n=1, density=0.0, vectors=1, name="host", threads=1)
def test_sparse_product_is_exact(
    m: int, quads: int, n: int, density: float, vectors: int, name: str, threads: int
) -> None:
    x, _ = bytes_of(np.random.default_rng(m), (m,), 4 * quads, n)
    w = grouped(4 * quads, n, 16, density)
    target = parse_target(name, threads)
    np.testing.assert_array_equal(sparse_product(x, w, target, vectors), exact(x, w))


@pytest.mark.parametrize("shape", [(2, 3, 32), (3, 1, 32)])
def test_sparse_product_keeps_batch_axes(shape: tuple[int, ...]) -> None:
    x, _ = bytes_of(np.random.default_rng(0), shape[:-1], 32, 40)
    w = grouped(32, 40, 16, 0.5)
    target = parse_target("x86-64-v3", 2)
    np.testing.assert_array_equal(sparse_product(x, w, target, 1), exact(x, w))


def test_quads_of_a_group_are_listed_in_order() -> None:
    w = np.zeros((16, 20), np.int8)
    w[1, 3], w[15, 0], w[8, 19] = 5, 6, 7
    counts, quads, values = pack_block_int8(w, 16)
    np.testing.assert_array_equal(counts, [2, 1])
    np.testing.assert_array_equal(quads, [[0, 3, 0, 0], [2, 0, 0, 0]])
    assert values.shape == (2, 4, 64)
    assert (values[0, 0, 3 * 4 + 1], values[0, 1, 3], values[1, 0, 3 * 4]) == (5, 6, 7)
    assert np.count_nonzero(values) == 3


@pytest.mark.parametrize(("m", "many"), [(128, True), (32, True), (20, False), (1, False)])
@pytest.mark.parametrize("width", [16, 32])
def test_groups_are_chosen_where_they_pay(m: int, many: bool, width: int) -> None:
    target = parse_target("icelake-server", 1)
    w = grouped(384, 384, width, 0.5)
    product, reason = block_int8_product((), m, w, target)
    assert product is not None
    assert reason.startswith("model")
    columns = product.constants[""].shape[-1] // 4
    # Groups of two vectors share what is broadcast, and need no transposes.
    assert columns in ((8,) if many and width == 16 else (16, width))
    rng = np.random.default_rng(0)
    scattered = grouped(384, 384, 1, 0.5) * (rng.random((384, 384)) < 0.5)
    assert block_int8_product((), m, scattered.astype(np.int8), target)[0] is None
    assert block_int8_product((), m, grouped(384, 384, 16, 0.98), target)[0] is None
    product, reason = block_int8_product((), m, np.zeros((6, 16), np.int8), target)
    assert product is None
    assert "multiple of 4" in reason


def transposed_product(x: Array, w: Array, target: Any) -> Array:
    *lead, m, k = x.shape
    n = w.shape[1]
    constants = pack_transposed_int8(w, target)
    func = transposed_int8_matmul(m, k, n, constants[1].shape[1], target, lead=tuple(lead))
    sch = TransposedSparseRule().apply(func, target, False)
    arrays = (x, *constants, np.full((*lead, m, n), -7, np.int32))
    *inputs, out = [tvm.runtime.tensor(array) for array in arrays]
    compile_kernel(sch.mod["main"], target)["main"](*inputs, out)
    return out.numpy()


@few
@given(
    m=st.integers(1, 70),
    quads=st.integers(1, 40),
    n=st.integers(1, 70),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    name=st.sampled_from(["host", "x86-64-v3", "x86-64"]),
    threads=st.sampled_from([1, 2]),
)
@example(m=1, quads=1, n=1, density=0.0, name="host", threads=1)
@example(m=70, quads=17, n=33, density=0.3, name="host", threads=2)
def test_transposed_product_is_exact(
    m: int, quads: int, n: int, density: float, name: str, threads: int
) -> None:
    x, _ = bytes_of(np.random.default_rng(m), (m,), 4 * quads, n)
    w = grouped(4 * quads, n, 16, density)
    target = parse_target(name, threads)
    np.testing.assert_array_equal(transposed_product(x, w, target), exact(x, w))


@pytest.mark.parametrize("shape", [(2, 3, 32), (3, 20, 64), (9, 1, 32)])
def test_transposed_product_keeps_batch_axes(shape: tuple[int, ...]) -> None:
    x, _ = bytes_of(np.random.default_rng(0), shape[:-1], shape[-1], 40)
    w = grouped(shape[-1], 40, 8, 0.5)
    np.testing.assert_array_equal(transposed_product(x, w, HOST), exact(x, w))


@pytest.mark.parametrize("name", ["host", "x86-64-v3"])
@pytest.mark.parametrize("sign", [-128, 127])
def test_extreme_bytes_do_not_saturate_transposed(name: str, sign: int) -> None:
    x, w = np.full((3, 260), 255, np.uint8), np.full((260, 17), sign, np.int8)
    np.testing.assert_array_equal(transposed_product(x, w, parse_target(name, 1)), exact(x, w))


def test_transposed_product_reads_no_further_than_the_counts() -> None:
    x, _ = bytes_of(np.random.default_rng(0), (40,), 64, 48)
    w = grouped(64, 48, 8, 0.5)
    counts, quads, values = pack_transposed_int8(w, HOST)
    for group, count in enumerate(counts):
        quads[group, count:], values[group, count:] = 2**30, 77
    func = transposed_int8_matmul(40, 64, 48, quads.shape[1], HOST)
    sch = TransposedSparseRule().apply(func, HOST, False)
    arrays = (x, counts, quads, values, np.full((40, 48), -7, np.int32))
    *inputs, out = [tvm.runtime.tensor(array) for array in arrays]
    compile_kernel(sch.mod["main"], HOST)["main"](*inputs, out)
    np.testing.assert_array_equal(out.numpy(), exact(x, w))


def test_groups_of_a_transposed_product_fill_whole_vectors() -> None:
    w = np.zeros((16, 20), np.int8)
    w[1, 3], w[15, 0], w[8, 19] = 5, 6, 7
    counts, quads, values = pack_transposed_int8(w, parse_target("icelake-server", 1))
    np.testing.assert_array_equal(counts, [2, 0, 1, 0])
    np.testing.assert_array_equal(quads[[0, 2], :2], [[0, 3], [2, 0]])
    assert values.shape == (4, 4, 32)
    assert (values[0, 0, 3 * 4 + 1], values[0, 1, 3], values[2, 0, 3 * 4]) == (5, 6, 7)
    assert np.count_nonzero(values) == 3


def test_a_step_of_the_transposed_product_is_bound_by_products() -> None:
    target = parse_target("icelake-server", 1)
    func = transposed_int8_matmul(128, 384, 384, 48, target)
    sch = TransposedSparseRule().apply(func, target, False)
    text = compile_kernel(sch.mod["main"], target).mod.inspect_source("asm")
    loop = max(basic_blocks(text), key=lambda body: body.count("vpdpbusd"))
    assert loop.count("vpdpbusd") == 16
    assert loop.count("vpbroadcastd") <= 8
    assert "(%rsp)" not in "\n".join(line for line in loop.splitlines() if "zmm" in line)


@pytest.mark.parametrize(("n", "fetches"), [(96, True), (40, False)])
def test_the_next_output_is_fetched_where_blocks_are_whole(n: int, fetches: bool) -> None:
    target = parse_target("icelake-server", 1)
    func = transposed_int8_matmul(32, 64, n, 16, target)
    sch = TransposedSparseRule().apply(func, target, False)
    asm = compile_kernel(sch.mod["main"], target).mod.inspect_source("asm")
    assert ("prefetchw" in asm) == fetches


def test_ragged_depths_have_no_sparse_kernel() -> None:
    with pytest.raises(ShapeError, match="multiple of 4"):
        block_int8_matmul(1, 6, 16, 1, Tile(1, 1, 16), HOST)
    with pytest.raises(ShapeError, match="multiple of 4"):
        transposed_int8_matmul(1, 6, 16, 1, HOST)
