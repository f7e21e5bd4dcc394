"""CPU kernels against numpy in float64, on drawn shapes, with poisoned outputs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_targets import HOST, RUNNABLE
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scipy import special

from icd_tvm._tvm import i64, s_tir, te, tvm
from icd_tvm.errors import ConfigError, OutputError, ShapeError, TransformError
from icd_tvm.files import CACHE_VARIABLE
from icd_tvm.tir_schedules.cpu import cpu_rules, select, time_kernels, vector_math
from icd_tvm.tir_schedules.cpu.attention import attention
from icd_tvm.tir_schedules.cpu.attention_head import AttentionShape, attention_shape
from icd_tvm.tir_schedules.cpu.block_sparse import (
    group_rows,
    kept_rows,
    pack_rowlist,
    pack_vrow,
    rowlist_matmul,
    vrow_matmul,
)
from icd_tvm.tir_schedules.cpu.byte_attention import ByteScales, byte_attention
from icd_tvm.tir_schedules.cpu.dense import dense_matmul, pack_dense
from icd_tvm.tir_schedules.cpu.int8_matmul import MAX_DEPTH, int8_matmul
from icd_tvm.tir_schedules.cpu.layer_norm import layer_norm
from icd_tvm.tir_schedules.cpu.matmul_kinds import KINDS, build_matmul, pack_matmul, padded_rows
from icd_tvm.tir_schedules.cpu.row_max import row_max
from icd_tvm.tir_schedules.cpu.select import KernelChoice, choose_matmul_kernel
from icd_tvm.tir_schedules.cpu.softmax import softmax
from icd_tvm.tir_schedules.cpu.stack import compile_kernel
from icd_tvm.tir_schedules.cpu.tile import (
    Tile,
    choose_tile,
    find_tiled_block,
    panel_chunk,
    row_pieces,
    share_panels,
    tile_cycles,
)
from icd_tvm.tir_schedules.cpu.transposed_sparse import pack_vcol, vcol_matmul
from icd_tvm.tir_schedules.target import (
    host_target,
    parse_target,
    target_threads,
    vector_bits,
)

Array = np.ndarray
few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
sizes = st.integers(1, 40)
threads = st.sampled_from([1, 2])
leads = st.sampled_from([(), (1,), (4,), (2, 3)])


def random(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def schedule(func: Any, target: Any) -> Any:
    for rule in cpu_rules():
        sch = rule.apply(func, target, False)
        if sch is not None:
            return sch.mod["main"]
    raise AssertionError("no rule applies")


def run(func: Any, inputs: list[Array], shape: tuple[int, ...], target: Any) -> Array:
    """Run a scheduled function on an output full of NaN, so that an unwritten element shows."""
    out = tvm.runtime.tensor(np.full(shape, np.nan, np.float32))
    compile_kernel(func, target)["main"](*[tvm.runtime.tensor(a) for a in inputs], out)
    return out.numpy()


def assert_close(actual: Array, expected: Array, length: int = 1) -> None:
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=4e-6 * scale * max(1, length) ** 0.5)


# Targets


def test_host_target_has_the_cpu_and_the_threads() -> None:
    target = host_target(3)
    assert target.kind.name == "llvm"
    assert target_threads(target) == 3
    assert target.attrs["mcpu"] == tvm.target.codegen.llvm_get_system_cpu()


@pytest.mark.parametrize(
    ("name", "bits"), [("x86-64", 128), ("x86-64-v3", 256), ("x86-64-v4", 512)]
)
def test_vector_bits_of_portable_targets(name: str, bits: int) -> None:
    assert vector_bits(parse_target(name)) == bits


def test_bad_targets_are_refused() -> None:
    with pytest.raises(ConfigError, match="cpu9000"):
        parse_target("cpu9000")
    with pytest.raises(ConfigError, match="at least 1"):
        host_target(0)
    with pytest.raises(ConfigError, match="cuda"):
        vector_bits(tvm.target.Target({"kind": "cuda", "arch": "sm_90"}))
    assert vector_bits(parse_target("native", 1)) >= 128


# Tiles


@given(m=st.integers(1, 512), k=st.integers(1, 4096), n=st.integers(1, 4096))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("name", ["x86-64-v3", "x86-64-v4"])
def test_chosen_tile_fits_the_registers_and_covers_the_output(
    name: str, m: int, k: int, n: int
) -> None:
    target = parse_target(name)
    tile = choose_tile(m, k, n, target)
    registers = 32 if name == "x86-64-v4" else 16
    assert tile.rows * tile.vectors + tile.vectors < registers or tile.rows == 1
    rows, columns = tile.padded(m, n)
    assert m <= rows < m + tile.rows
    assert n <= columns < n + tile.columns


def test_tile_of_encoder_shapes_has_no_padding() -> None:
    target = parse_target("x86-64-v4")
    for k, n in ((384, 384), (384, 1152), (384, 1536), (1536, 384), (768, 3072), (3072, 768)):
        assert choose_tile(128, k, n, target).padded(128, n) == (128, n)


def test_many_clamped_rows_cost_more() -> None:
    tile = Tile(8, 3, 16)
    assert tile_cycles(tile, 27, 64, 48) > tile_cycles(tile, 28, 64, 48)
    assert tile_cycles(tile, 28, 64, 48) == tile_cycles(tile, 32, 64, 48)


def test_rows_that_share_cache_sets_cost_more() -> None:
    tall = Tile(26, 1, 16)
    assert tile_cycles(tall, 130, 4096, 16) > 3 * tile_cycles(tall, 130, 400, 16)


@given(tasks=st.integers(1, 60), rows=st.integers(1, 64), count=st.integers(1, 16))
def test_row_pieces_divide_the_rows_and_never_unbalance(tasks: int, rows: int, count: int) -> None:
    def share(pieces: int) -> float:
        return -(-tasks * pieces // count) / pieces

    pieces = row_pieces(tasks, rows, count)
    assert rows % pieces == 0
    assert share(pieces) <= share(1)


@given(panels=st.integers(1, 200), length=st.integers(1, 4000), count=st.integers(1, 16))
def test_panel_chunks_leave_work_for_every_thread(panels: int, length: int, count: int) -> None:
    chunk = panel_chunk(Tile(16, 1, 16), panels, length, count)
    assert panels % chunk == 0
    assert panels // chunk >= min(count, panels)
    assert chunk == 1 or chunk * length * 64 <= 512 * 1024
    assert panel_chunk(Tile(8, 3, 16), panels, length, count) == 1


@pytest.mark.parametrize(
    ("m", "count", "extents"),
    [
        (32, 1, [1, 2, 6]),
        (32, 2, [2, 2, 3]),
        (32, 4, [6, 2]),
        (32, 6, [6, 2]),
        (128, 1, [6, 2]),
    ],
)
def test_short_batches_of_a_thread_share_a_panel(m: int, count: int, extents: list[int]) -> None:
    func = int8_matmul(m, 40, 96, host_target(count), lead=(6,), tile=Tile(8, 3, 16))
    sch = s_tir.Schedule(func)
    batch, panel, rows = sch.get_loops(find_tiled_block(sch, ("explicit",)))
    tasks = share_panels(sch, [batch], panel, rows, count)
    assert [int(sch.get(loop).extent) for loop in tasks] == extents
    assert sch.get(tasks[1]).loop_var.same_as(sch.get(panel).loop_var)
    loops = sch.get_loops(find_tiled_block(sch, ("explicit",)))
    assert [sch.get(loop).loop_var for loop in loops] == [
        sch.get(loop).loop_var for loop in (*tasks, rows)
    ]


# Dense


@few
@given(
    m=sizes,
    k=sizes,
    n=st.integers(1, 120),
    lead=leads,
    count=threads,
    name=st.sampled_from(["host", "x86-64-v3"]),
)
@example(m=7, k=1, n=65, lead=(2, 3), count=1, name="host")
def test_dense_matmul(m: int, k: int, n: int, lead: Any, count: int, name: str) -> None:
    target = parse_target(name, count)
    rng = np.random.default_rng(m * 1000 + n)
    x, w = random(rng, *lead, m, k), random(rng, k, n)
    tile = choose_tile(m, k, n, target)
    func = schedule(dense_matmul(m, k, n, tile, lead), target)
    actual = run(func, [x, pack_dense(w, tile.columns)], (*lead, m, n), target)
    assert_close(actual, x.astype(np.float64) @ w, k)


@pytest.mark.parametrize("tile", [Tile(14, 2, 16), Tile(8, 3, 16), Tile(1, 8, 16), Tile(5, 1, 8)])
@pytest.mark.parametrize(("m", "n"), [(31, 47), (16, 96), (1, 1)])
def test_dense_matmul_with_a_ragged_last_tile(tile: Tile, m: int, n: int) -> None:
    target, rng = host_target(2), np.random.default_rng(0)
    x, w = random(rng, m, 37), random(rng, 37, n)
    func = schedule(dense_matmul(m, 37, n, tile), target)
    assert_close(run(func, [x, pack_dense(w, tile.columns)], (m, n), target), x @ w, 37)


def test_pack_dense_pads_the_last_panel_with_zeros() -> None:
    w = np.arange(10, dtype=np.float32).reshape(2, 5)
    packed = pack_dense(w, 4)
    assert packed.shape == (2, 2, 4)
    np.testing.assert_array_equal(packed[1], [[4, 0, 0, 0], [9, 0, 0, 0]])
    with pytest.raises(ShapeError, match="two axes"):
        pack_dense(np.zeros(3, np.float32), 4)


# Block sparse


def grouped_weight(rng: np.random.Generator, k: int, n: int, v: int, density: float) -> Array:
    """Return a weight whose groups of v columns share their rows; some groups are empty."""
    w = random(rng, k, n)
    for start in range(0, n, v):
        level = 0.0 if rng.random() < 0.2 else density
        w[rng.random(k) >= level, start : start + v] = 0
    return w


@few
@given(
    m=sizes,
    k=sizes,
    n=st.integers(1, 100),
    v=st.sampled_from([16, 32]),
    lead=leads,
    count=threads,
    density=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_vrow_matmul(m: int, k: int, n: int, v: int, lead: Any, count: int, density: float) -> None:
    target = host_target(count)
    rng = np.random.default_rng(m * 1000 + n)
    x, w = random(rng, *lead, m, k), grouped_weight(rng, k, n, v, density)
    idx, data = pack_vrow(w, v)
    func = vrow_matmul(m, k, n, idx.shape[1], v, lead=lead, target=target)
    actual = run(schedule(func, target), [x, idx, data], (*lead, m, n), target)
    assert_close(actual, x.astype(np.float64) @ w, k)


@few
@given(m=sizes, k=sizes, n=st.integers(1, 100), kept=st.floats(0, 1), count=threads)
def test_rowlist_matmul(m: int, k: int, n: int, kept: float, count: int) -> None:
    target = host_target(count)
    rng = np.random.default_rng(m * 1000 + n)
    x, w = random(rng, m, k), random(rng, k, n)
    w[rng.random(k) >= kept] = 0
    tile = choose_tile(m, k, n, target)
    idx, data = pack_rowlist(w, tile.columns)
    func = rowlist_matmul(m, k, n, idx.size, tile)
    actual = run(schedule(func, target), [x, idx, data], (m, n), target)
    assert_close(actual, x.astype(np.float64) @ w, k)


@few
@given(
    m=sizes,
    k=sizes,
    n=st.integers(1, 100),
    v=st.sampled_from([1, 8, 16, 32]),
    lead=leads,
    count=threads,
    density=st.sampled_from([0.0, 0.3, 1.0]),
    name=st.sampled_from(["host", "x86-64-v3", "x86-64"]),
)
@example(m=150, k=20, n=33, v=1, lead=(), count=2, density=0.3, name="host")
def test_vcol_matmul(
    m: int, k: int, n: int, v: int, lead: Any, count: int, density: float, name: str
) -> None:
    target = parse_target(name, count)
    rng = np.random.default_rng(m * 1000 + n)
    x, w = random(rng, *lead, m, k), grouped_weight(rng, k, n, v, density)
    packed = pack_vcol(w, v, vector_bits(target) // 32)
    func = vcol_matmul(m, k, n, packed[1].shape[1], v, lead=lead, target=target)
    actual = run(schedule(func, target), [x, *packed], (*lead, m, n), target)
    assert_close(actual, x.astype(np.float64) @ w, k)


def test_vcol_matmul_reads_no_further_than_the_counts() -> None:
    target, rng = host_target(1), np.random.default_rng(0)
    x, w = random(rng, 40, 64), grouped_weight(rng, 64, 48, 8, 0.5)
    counts, idx, data = pack_vcol(w, 8, vector_bits(target) // 32, space=64)
    assert idx.shape[1] == 64
    for group, count in enumerate(counts):
        idx[group, count:] = 2**30
        data[group, count:] = np.nan
    func = vcol_matmul(40, 64, 48, 64, 8, target=target)
    assert_close(run(schedule(func, target), [x, counts, idx, data], (40, 48), target), x @ w, 64)


def test_vcol_columns_are_shared_out_where_rows_are_too_few_for_the_threads() -> None:
    target, rng = host_target(4), np.random.default_rng(0)
    x, w = random(rng, 20, 32), grouped_weight(rng, 32, 128, 8, 0.5)
    packed = pack_vcol(w, 8, vector_bits(target) // 32)
    func = schedule(vcol_matmul(20, 32, 128, packed[1].shape[1], 8, target=target), target)
    assert func.script().count("T.parallel") == 2
    assert_close(run(func, [x, *packed], (20, 128), target), x @ w, 32)


@given(k=sizes, n=st.integers(1, 70), v=st.sampled_from([1, 4, 8, 16, 32]), seed=st.integers(0, 99))
def test_pack_vcol_keeps_every_value(k: int, n: int, v: int, seed: int) -> None:
    w = grouped_weight(np.random.default_rng(seed), k, n, v, 0.5)
    counts, idx, data = pack_vcol(w, v, 16)
    groups = counts.size
    assert groups * v % 16 == 0
    assert n <= groups * v < n + max(v, 16)
    np.testing.assert_array_equal(counts[: -(-n // v)], group_rows(w, v).sum(axis=1))
    restored = np.zeros((k, groups * v), np.float32)
    for group, count in enumerate(counts):
        assert (np.diff(idx[group, :count]) > 0).all()
        restored[idx[group, :count], group * v : group * v + v] = data[group, :count]
        assert not data[group, count:].any()
    np.testing.assert_array_equal(restored[:, :n], w)
    assert not restored[:, n:].any()


@given(k=sizes, n=st.integers(1, 70), v=st.integers(1, 33), seed=st.integers(0, 99))
def test_pack_vrow_keeps_every_value_and_pads_with_zero(k: int, n: int, v: int, seed: int) -> None:
    w = grouped_weight(np.random.default_rng(seed), k, n, v, 0.5)
    idx, data = pack_vrow(w, v)
    groups, nk = idx.shape
    assert nk == kept_rows(w, v) == max(1, int(group_rows(w, v).sum(axis=1).max()))
    restored = np.zeros((k, groups * v), np.float32)
    for group in range(groups):
        for row, values in zip(idx[group], data[group], strict=True):
            restored[row, group * v : group * v + v] += values
    np.testing.assert_array_equal(restored[:, :n], w)
    assert not restored[:, n:].any()


def test_pack_vrow_of_nothing_reads_one_row_of_zeros() -> None:
    idx, data = pack_vrow(np.zeros((5, 32), np.float32), 16)
    assert idx.shape == (2, 1)
    assert not idx.any()
    assert not data.any()


def test_bad_block_sparse_sizes_are_refused() -> None:
    target = parse_target("x86-64-v4", 1)
    with pytest.raises(TransformError, match="V = 8"):
        vrow_matmul(4, 4, 16, 2, 8, target=target)
    with pytest.raises(TransformError, match="nk = 5"):
        vrow_matmul(4, 4, 16, 5, 16, target=target)
    with pytest.raises(TransformError, match="nk = 0"):
        rowlist_matmul(4, 4, 16, 0, Tile(4, 1, 16))
    with pytest.raises(TransformError, match="groups of 12"):
        vcol_matmul(4, 4, 16, 2, 12, target=target)
    with pytest.raises(TransformError, match="nk = 0"):
        vcol_matmul(4, 4, 16, 0, 8, target=target)


# Selection


def test_selection_prefers_what_reads_least() -> None:
    target, rng = host_target(1), np.random.default_rng(0)
    w = random(rng, 256, 96)
    dense = choose_matmul_kernel(64, 256, 96, w, target, tune=False)
    assert (dense.kind, dense.nk) == ("dense", 256)
    assert "every row" in dense.reason
    rows = w.copy()
    rows[::2] = 0
    assert choose_matmul_kernel(64, 256, 96, rows, target, tune=False).nk == 128
    groups = np.where(np.repeat(rng.random((256, 1)) < 0.5, 96, axis=1), w, 0)
    groups[:, 32:] = np.roll(groups[:, 32:], 1, axis=0)
    chosen = choose_matmul_kernel(64, 256, 96, groups, target, tune=False)
    assert chosen.kind == "vrow32"
    assert chosen.nk == kept_rows(groups, 32)


def test_selection_counts_what_uneven_groups_read_on_average() -> None:
    w = random(np.random.default_rng(0), 256, 96)
    w[64:, 8:] = 0
    choice = choose_matmul_kernel(64, 256, 96, w, host_target(1), tune=False)
    assert (choice.kind, choice.nk) == ("vcol8", 80)


def test_selection_takes_lists_per_column_where_no_columns_share_rows() -> None:
    rng = np.random.default_rng(0)
    w = np.where(rng.random((256, 96)) < 0.1, random(rng, 256, 96), 0)
    choice = choose_matmul_kernel(128, 256, 96, w, host_target(1), tune=False)
    assert choice.kind == "vcol1"
    assert choice.nk == np.ceil((w != 0).sum(axis=0).mean())


def test_selection_refuses_a_gain_smaller_than_its_overhead() -> None:
    w = np.ones((256, 96), np.float32)
    w[0] = 0
    choice = choose_matmul_kernel(64, 256, 96, w, host_target(1), tune=False)
    assert choice.kind == "dense"
    assert "of dense" in choice.reason


def test_measured_selection_is_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    timed: list[set[str]] = []

    def fake(arms: dict[str, Any]) -> dict[str, float]:
        timed.append(set(arms))
        return {kind: 0.5 if kind == "rowlist" else 1.0 for kind in arms}

    monkeypatch.setattr(time_kernels, "_TIMES", {})
    monkeypatch.setattr(time_kernels, "least_seconds", fake)
    w = np.ones((32, 32), np.float32)
    w[:16] = 0
    first = choose_matmul_kernel(8, 32, 32, w, host_target(1))
    assert len(timed) == 1
    assert {"dense", "rowlist"} <= timed[0]
    assert choose_matmul_kernel(8, 32, 32, w, host_target(1)) == first
    assert len(timed) == 1
    # The next process finds the times in the database, whatever it would time now.
    monkeypatch.setattr(time_kernels, "_TIMES", {})
    before = time_kernels.comparisons()
    assert choose_matmul_kernel(8, 32, 32, w, host_target(1)) == first
    assert len(timed) == 1
    assert time_kernels.comparisons() - before == {"kernel comparisons read": 1}
    assert (first.kind, first.nk) == ("rowlist", 16)
    assert first.reason.startswith("measured")


def test_times_without_a_folder_to_keep_them_in_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise OutputError("the user has no home folder")

    monkeypatch.setattr(time_kernels, "_TIMES", {})
    monkeypatch.setattr(time_kernels, "default_cache", homeless)
    monkeypatch.setattr(time_kernels, "least_seconds", lambda arms: dict.fromkeys(arms, 1.0))
    assert time_kernels.timed_kernels({"dense": 32}, (8, 32, 32), host_target(1)) == {"dense": 1.0}


@pytest.mark.parametrize("shape", [(8, 24, 40), (1, 24, 512)])
def test_every_kind_can_be_timed(shape: tuple[int, ...]) -> None:
    rows = dict.fromkeys(KINDS, 12)
    times = time_kernels.timed_kernels(rows, shape, host_target(1))
    assert set(times) == set(KINDS)
    assert all(0 < seconds < 0.1 for seconds in times.values())


def test_layers_of_nearly_one_size_are_timed_once() -> None:
    reference = time_kernels.reference_shape((1, 128, 384, 1536))
    assert reference == (1, 128, 384, 1536)
    assert time_kernels.reference_shape((1, 128, 384, 1408)) == reference
    assert time_kernels.reference_shape((7, 40, 1537)) == (7, 40, 1537)


def test_timing_takes_the_least_of_interleaved_runs() -> None:
    order: list[str] = []

    def arm(name: str) -> Callable[[], None]:
        return lambda: order.append(name)

    best = time_kernels.least_seconds({"a": arm("a"), "b": arm("b")})
    assert set(best) == {"a", "b"}
    assert len(order) >= 10
    assert order == ["a", "b"] * (len(order) // 2)


def test_near_ties_go_to_the_simpler_kernel() -> None:
    assert select.preferred({"vcol8": 0.98, "vrow32": 1.0, "dense": 1.0}) == "dense"
    assert select.preferred({"vcol8": 0.90, "vrow32": 0.92, "dense": 1.0}) == "vrow32"
    assert select.preferred({"vcol8": 0.90, "vrow32": 0.94, "dense": 1.0}) == "vcol8"


@given(nk=st.integers(1, 2000), k=st.integers(1, 2000))
def test_row_lists_are_padded_by_less_than_three_percent(nk: int, k: int) -> None:
    nk = min(nk, k)
    padded = padded_rows(nk, k)
    assert nk <= padded <= min(k, 1.03 * nk)
    assert padded % 8 == 0 or padded == nk


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dense"])
def test_packed_constants_fit_the_function(kind: str) -> None:
    target, rng = host_target(1), np.random.default_rng(0)
    w, x = grouped_weight(rng, 300, 70, 8, 0.7), random(rng, 9, 300)
    shape = (9, 300, 70)
    packed = pack_matmul(kind, w, shape, target)
    func = build_matmul(kind, shape, packed["rows"].shape[-1], target)
    actual = run(schedule(func, target), [x, *packed.values()], (9, 70), target)
    assert_close(actual, x.astype(np.float64) @ w, 300)


def test_unknown_kernel_is_refused() -> None:
    with pytest.raises(ConfigError, match="csr"):
        KernelChoice("csr", 3, "")


# Rows


@few
@given(
    lead=st.sampled_from([(1,), (3,), (2, 5)]),
    d=st.integers(1, 200),
    residual=st.booleans(),
    offset=st.sampled_from([0.0, 100.0]),
    count=threads,
)
def test_layer_norm(lead: Any, d: int, residual: bool, offset: float, count: int) -> None:
    target = host_target(count)
    rng = np.random.default_rng(d)
    shape = (*lead, d)
    inputs = [random(rng, *shape) + np.float32(offset) for _ in range(1 + residual)]
    gamma, beta = random(rng, d), random(rng, d)
    total = sum(inputs)
    centre = total.astype(np.float64) - total.mean(-1, keepdims=True, dtype=np.float64)
    std = np.sqrt((centre**2).mean(-1, keepdims=True) + 1e-5)
    func = layer_norm(shape, 1e-5, target, residual=residual)
    actual = run(func, [*inputs, gamma, beta], shape, target)
    np.testing.assert_allclose(actual, centre / std * gamma + beta, atol=1e-5 + offset * 4e-5)


@few
@given(lead=st.sampled_from([(1,), (2, 5)]), d=st.integers(1, 200), count=threads)
def test_softmax(lead: Any, d: int, count: int) -> None:
    target = host_target(count)
    x = random(np.random.default_rng(d), *lead, d) * 30
    expected = special.softmax(x.astype(np.float64), axis=-1)
    assert_close(run(softmax(x.shape, target), [x], x.shape, target), expected)


@few
@given(
    lead=st.sampled_from([(1,), (2, 5)]), d=st.integers(1, 200), negate=st.booleans(), count=threads
)
def test_row_max(lead: Any, d: int, negate: bool, count: int) -> None:
    target = host_target(count)
    x = random(np.random.default_rng(d), *lead, d)
    actual = run(row_max(x.shape, target, negate=negate), [x], (*lead, 1), target)
    np.testing.assert_array_equal(actual, (-x if negate else x).max(axis=-1, keepdims=True))


# Attention


def reference(shape: AttentionShape, q: Array, k: Array, v: Array, mask: Array) -> Array:
    def heads(rows: Array, offset: int) -> Array:
        part = rows[:, :, offset : offset + shape.width].astype(np.float64)
        return part.reshape(*part.shape[:2], shape.heads, -1).transpose(0, 2, 1, 3)

    parts = [heads(rows, at) for rows, at in zip((q, k, v), shape.offsets, strict=True)]
    scores = parts[0] @ parts[1].transpose(0, 1, 3, 2) * shape.scale + mask
    out = special.softmax(scores, axis=-1) @ parts[2]
    return out.transpose(0, 2, 1, 3).reshape(shape.batch, shape.queries, shape.width)


@few
@given(
    batch=st.integers(1, 2),
    queries=st.integers(1, 20),
    keys=st.integers(1, 40),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 5, 16, 20, 32]),
    merged=st.booleans(),
    own_mask=st.booleans(),
    count=threads,
)
def test_attention(
    batch: int,
    queries: int,
    keys: int,
    heads: int,
    head_dim: int,
    merged: bool,
    own_mask: bool,
    count: int,
) -> None:
    target = host_target(count)
    width = heads * head_dim
    mask_batch = batch if own_mask else 1
    shape = AttentionShape(batch, queries, keys, heads, head_dim, 0.3, mask_batch, (width,) * 3)
    shape = shape.merged() if merged else shape
    rng = np.random.default_rng(queries * 100 + keys)
    lengths = (queries, keys, keys)
    rows = [random(rng, batch, n, s) for n, s in zip(lengths, shape.strides, strict=True)]
    mask = np.where(rng.random((mask_batch, 1, 1, keys)) < 0.4, -3.4028235e38, 0)
    mask[..., 0] = 0
    mask = mask.astype(np.float32)
    actual = run(attention(shape, target), [*rows, mask], (batch, queries, width), target)
    assert_close(actual, reference(shape, *rows, mask))


def test_attention_of_a_fully_masked_row_is_the_mean() -> None:
    target = host_target(1)
    shape = AttentionShape(1, 3, 5, 1, 16, 1.0, 1, (16,) * 3)
    rng = np.random.default_rng(0)
    q, k, v = (random(rng, 1, n, 16) for n in (3, 5, 5))
    mask = np.full((1, 1, 1, 5), -3.4028235e38, np.float32)
    actual = run(attention(shape, target), [q, k, v, mask], (1, 3, 16), target)
    assert_close(actual, np.broadcast_to(v.mean(axis=1, keepdims=True), (1, 3, 16)))


def test_attention_gives_keys_of_an_infinite_mask_no_weight() -> None:
    target = host_target(1)
    shape = AttentionShape(2, 3, 5, 1, 16, 1.0, 2, (16,) * 3)
    rng = np.random.default_rng(0)
    q, k, v = (random(rng, 2, n, 16) for n in (3, 5, 5))
    mask = np.zeros((2, 1, 1, 5), np.float32)
    mask[0, ..., 1:4], mask[1] = -np.inf, -np.inf
    actual = run(attention(shape, target), [q, k, v, mask], (2, 3, 16), target)
    with np.errstate(invalid="ignore"):
        assert_close(actual[:1], reference(shape, q, k, v, mask)[:1])
    assert np.isnan(actual[1]).all()


@pytest.mark.parametrize("keys", [600, 1100])
def test_attention_over_more_keys_than_the_stack_holds(keys: int) -> None:
    """From 128 KiB on the copies of a head's keys and values come from TVM's pool."""
    target = host_target(2)
    shape = AttentionShape(1, 9, keys, 1, 64, 0.125, 1, (64,) * 3)
    rng = np.random.default_rng(keys)
    rows = [random(rng, 1, length, 64) for length in (9, keys, keys)]
    mask = np.where(rng.random((1, 1, 1, keys)) < 0.4, -3.4028235e38, 0).astype(np.float32)
    actual = run(attention(shape, target), [*rows, mask], (1, 9, 64), target)
    assert_close(actual, reference(shape, *rows, mask))


SCALES = ByteScales(query=0.03, query_zero=117, key=0.025, value=0.02, weight=1 / 255)


def byte_reference(shape: AttentionShape, q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Return attention in float64 with its probabilities rounded to codes."""

    def heads(rows: Array, offset: int, scale: float, zero: int = 0) -> Array:
        part = rows[:, :, offset : offset + shape.width].astype(np.float64)
        split = part.reshape(*part.shape[:2], shape.heads, -1).transpose(0, 2, 1, 3)
        return (split - zero) * scale

    query = heads(q, shape.offsets[0], SCALES.query, SCALES.query_zero)
    key = heads(k, shape.offsets[1], SCALES.key)
    weights = special.softmax(query @ key.transpose(0, 1, 3, 2) * shape.scale + mask, axis=-1)
    codes = np.minimum(np.rint(weights / SCALES.weight), 255) * SCALES.weight
    out = codes @ heads(v, shape.offsets[2], SCALES.value)
    return out.transpose(0, 2, 1, 3).reshape(shape.batch, shape.queries, shape.width)


@few
@given(
    batch=st.integers(1, 2),
    queries=st.integers(1, 20),
    keys=st.integers(1, 40),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([4, 16, 20, 32]),
    merged=st.booleans(),
    own_mask=st.booleans(),
    count=threads,
    cpu=st.sampled_from([None, "x86-64-v3"]),
)
def test_byte_attention(
    batch: int,
    queries: int,
    keys: int,
    heads: int,
    head_dim: int,
    merged: bool,
    own_mask: bool,
    count: int,
    cpu: str | None,
) -> None:
    target = host_target(count) if cpu is None else parse_target(cpu, count)
    width = heads * head_dim
    mask_batch = batch if own_mask else 1
    shape = AttentionShape(batch, queries, keys, heads, head_dim, 0.3, mask_batch, (width,) * 3)
    shape = shape.merged() if merged else shape
    rng = np.random.default_rng(queries * 100 + keys)
    q, k, v = (
        rng.integers(low, low + 256, (batch, length, stride)).astype(dtype)
        for low, length, stride, dtype in zip(
            (0, -128, -128), (queries, keys, keys), shape.strides, ("u1", "i1", "i1"), strict=True
        )
    )
    mask = np.where(rng.random((mask_batch, 1, 1, keys)) < 0.4, -3.4028235e38, 0)
    mask[..., 0] = 0
    mask = mask.astype(np.float32)
    args = [q, k, v, mask, *SCALES.arrays()]
    actual = run(byte_attention(shape, target), args, (batch, queries, width), target)
    expected = byte_reference(shape, q, k, v, mask)
    # A probability on the edge between two codes may fall to either side.
    step = SCALES.weight * SCALES.value * 128
    assert np.abs(actual - expected).max() <= step + 1e-5
    assert np.mean(np.abs(actual - expected) > 1e-5) < 0.02


def test_bad_byte_attentions_are_refused() -> None:
    good = {"batch": 1, "queries": 3, "keys": 3, "heads": 2, "head_dim": 4, "scale": 1.0}
    for change, word in (
        ({"queries": 0}, "at least 1"),
        ({"head_dim": 6, "strides": (12,) * 3}, "heads of 6 columns"),
        ({"keys": MAX_DEPTH + 1}, "may overflow"),
    ):
        sizes = {**good, "mask_batch": 1, "strides": (8, 8, 8), **change}
        with pytest.raises(ShapeError, match=word):
            byte_attention(AttentionShape(**sizes), host_target(1))


def test_attention_remembers_its_shape() -> None:
    shape = AttentionShape(1, 3, 5, 1, 16, 0.25, 1, (16,) * 3)
    assert attention_shape(attention(shape, host_target(1))) == shape
    assert attention_shape(dense_matmul(4, 4, 4, Tile(4, 1, 16))) is None


def test_bad_attention_shapes_are_refused() -> None:
    good = {"batch": 2, "queries": 3, "keys": 3, "heads": 2, "head_dim": 4, "scale": 1.0}
    for change, word in (
        ({"queries": 0}, "at least 1"),
        ({"mask_batch": 3}, "mask batch 3"),
        ({"strides": (8, 7, 8)}, "row of 7"),
    ):
        sizes = {**good, "mask_batch": 1, "strides": (8, 8, 8), **change}
        with pytest.raises(ShapeError, match=word):
            attention(AttentionShape(**sizes), host_target(1))


# Vector maths

SCALAR_CALL = re.compile(r"call\w*\s+\w*(exp|log|erf|tanh|floor)f?@PLT")
EVERY_TARGET = [HOST, *(parse_target(name, 1) for name in RUNNABLE)]


def apply(function: Callable[[Any], Any], x: Array, target: Any = None) -> tuple[Array, str]:
    target = target or host_target(1)
    placeholder = te.placeholder((i64(x.size),), "float32")
    y = te.compute((i64(x.size),), lambda i: function(placeholder[i]))
    func = schedule(te.create_prim_func([placeholder, y]), target)
    asm = compile_kernel(func, target).mod.inspect_source("asm")
    return run(func, [x], x.shape, target), asm


@pytest.mark.parametrize(
    ("function", "exact", "bound"),
    [
        (vector_math.exp, np.exp, 1.5e-7),
        (vector_math.erf, special.erf, 3e-7),
        (vector_math.gelu, lambda x: x * special.ndtr(x), 5e-7),
        (
            vector_math.gelu_tanh,
            lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
            1e-6,
        ),
        *(
            (lambda x, n=n: vector_math.whole_power(x, n), lambda x, n=n: x**n, n * 6e-8)
            for n in (1, 2, 3, 7)
        ),
        (vector_math.sigmoid, special.expit, 2e-7),
        (vector_math.tanh, np.tanh, 3e-7),
        (vector_math.softplus, lambda x: np.logaddexp(0, x), 2e-7),
    ],
)
def test_vector_functions_are_accurate_and_make_no_call(
    function: Any, exact: Any, bound: float
) -> None:
    x = np.linspace(-9, 9, 4096, dtype=np.float32)
    actual, asm = apply(function, x)
    expected = exact(x.astype(np.float64))
    np.testing.assert_array_less(np.abs(actual - expected) / np.maximum(1, np.abs(expected)), bound)
    assert not SCALAR_CALL.search(asm)


@pytest.mark.parametrize("target", EVERY_TARGET, ids=["host", *RUNNABLE])
@pytest.mark.parametrize("function", [vector_math.gelu, vector_math.gelu_short])
def test_gelu_at_its_limits(function: Any, target: Any) -> None:
    x = np.array([-np.inf, -3e38, -1000, -8, 0, 8, 1000, np.inf, np.nan], np.float32)
    actual, _ = apply(function, np.resize(x, 64), target)
    np.testing.assert_allclose(actual[:4], 0, atol=1e-6)
    assert actual[4] == 0
    np.testing.assert_allclose(actual[5:8], x[5:8], rtol=1.2e-7)
    assert np.isnan(actual[8])


def test_the_search_for_scalar_calls_finds_one() -> None:
    assert SCALAR_CALL.search(apply(te.erf, np.zeros(64, np.float32))[1])


@pytest.mark.parametrize("target", EVERY_TARGET, ids=["host", *RUNNABLE])
@pytest.mark.parametrize(
    ("function", "exact", "least", "most"),
    [
        (vector_math.exp, np.exp, -86.9, 88.7),
        (vector_math.exp2, np.exp2, -125.4, 127.9),
        (vector_math.softplus, lambda x: np.logaddexp(0, x), -86.9, 1e30),
    ],
)
def test_powers_are_accurate_from_end_to_end(
    function: Any, exact: Any, least: float, most: float, target: Any
) -> None:
    x = np.concatenate([np.linspace(least, min(most, 128), 65536), np.geomspace(1e-30, most, 64)])
    x = np.minimum(x, most).astype(np.float32)
    actual, asm = apply(function, x, target)
    np.testing.assert_allclose(actual, exact(x.astype(np.float64)), rtol=3e-7, atol=0)
    assert not SCALAR_CALL.search(asm)


@pytest.mark.parametrize("target", EVERY_TARGET, ids=["host", *RUNNABLE])
@pytest.mark.parametrize(("function", "top"), [(vector_math.exp, 88.7), (vector_math.exp2, 127.9)])
def test_powers_at_their_limits(function: Any, top: float, target: Any) -> None:
    x = np.array([-np.inf, -1e30, -127, 0, -0.0, top, 1e30, np.inf, np.nan, -np.nan], np.float32)
    actual, _ = apply(function, np.resize(x, 80), target)
    np.testing.assert_array_equal(actual[:5], [0, 0, 0, 1, 1])
    assert actual[5] > 2e38
    np.testing.assert_array_equal(actual[6:8], np.inf)
    assert np.isnan(actual[8:10]).all()


def test_a_nan_passes_with_any_bits() -> None:
    bits = np.array([0x7F800001, 0x7FC00001, 0xFF812345, 0x7FFFFFFF] * 16, np.uint32)
    for function in (vector_math.exp, vector_math.exp2, vector_math.softplus, vector_math.sigmoid):
        assert np.isnan(apply(function, bits.view(np.float32))[0]).all()


def test_exp_at_its_limits() -> None:
    x = np.array([-np.inf, -1e9, -88, 0, 88.7, np.inf, np.nan, 1], np.float32)
    actual, _ = apply(vector_math.exp, np.resize(x, 64))
    np.testing.assert_array_equal(actual[:4], [0, 0, 0, 1])
    assert actual[4] == pytest.approx(np.exp(np.float64(x[4])), rel=1e-6)
    assert actual[5] == np.inf
    assert np.isnan(actual[6])


@pytest.mark.parametrize("target", EVERY_TARGET, ids=["host", *RUNNABLE])
def test_exponentials_overflow_where_floats_do(target: Any) -> None:
    for function, exact, edge in (
        (vector_math.exp, np.exp, 88.7229),
        (vector_math.exp2, np.exp2, 128),
    ):
        x = np.linspace(edge, 1.02 * edge, 4096).astype(np.float32)
        with np.errstate(over="ignore"):
            expected = exact(x)
        np.testing.assert_array_equal(apply(function, x, target)[0], expected)


def test_log_is_accurate_over_all_floats_and_makes_no_call() -> None:
    # Every 2^15th positive float, the least and those around 1 among them, is seen.
    bits = np.arange(1, 0x7F800000, 1 << 15, dtype=np.int32)
    near = np.arange(0x3F800000 - 64, 0x3F800000 + 64, dtype=np.int32)
    x = np.concatenate([bits, near])[:65536].view(np.float32)
    x = np.resize(x, -(-x.size // 64) * 64)
    actual, asm = apply(vector_math.log, x)
    expected = np.log(x.astype(np.float64))
    np.testing.assert_allclose(actual, expected, rtol=2.5e-7, atol=0)
    assert not SCALAR_CALL.search(asm)


def test_log_at_its_limits() -> None:
    x = np.array([0, -0.0, -1, -np.inf, np.inf, np.nan, 1, np.e], np.float32)
    actual, _ = apply(vector_math.log, np.resize(x, 64))
    np.testing.assert_array_equal(actual[:7], [-np.inf] * 2 + [np.nan] * 2 + [np.inf, np.nan, 0])
    assert actual[7] == pytest.approx(1, rel=2e-7)


def test_compiled_tile_keeps_its_accumulators_in_registers() -> None:
    target = parse_target("x86-64-v4", 1)
    func = schedule(dense_matmul(64, 64, 96, Tile(8, 3, 16)), target)
    ours = compile_kernel(func, target).mod.inspect_source("asm")
    stock = tvm.compile(func.with_attr("global_symbol", "main"), target).mod.inspect_source("asm")
    assert "AllocWorkspace" in stock
    assert "AllocWorkspace" not in ours
    assert len(re.findall(r"vfmadd231ps\s.*%zmm", ours)) >= 2 * 24
