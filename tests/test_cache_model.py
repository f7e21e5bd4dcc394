"""Address traces against interpretation, the LRU against a plain one, both against cachegrind."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm.script import tirx as T

from icd_tvm._tvm import Var, dlight, i64, te, tirx, tvm
from icd_tvm.errors import ConfigError, MeasurementError, UnsupportedOpError
from icd_tvm.measure import cache_model, cachegrind
from icd_tvm.measure.cache_model import H200_LEVELS, host_levels, model_caches
from icd_tvm.measure.cache_sim import CacheLevel, CacheSimulator, LevelCount
from icd_tvm.measure.cachegrind import CacheCounts, arena_offsets, missing_tool, run_cachegrind
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.inputs import random_inputs
from icd_tvm.models.registry import build
from icd_tvm.relax_passes.lower_cpu import cpu_pipeline
from icd_tvm.tir_schedules import address_trace as tracing
from icd_tvm.tir_schedules.address_trace import Trace, address_trace, lower_loops
from icd_tvm.tir_schedules.cpu import cpu_rules
from icd_tvm.tir_schedules.cpu.matmul_kinds import build_matmul, pack_matmul
from icd_tvm.tir_schedules.target import parse_target

V3 = parse_target("x86-64-v3", 1)
L1, L2 = CacheLevel("L1", 49152, 12), CacheLevel("L2", 1 << 20, 16)
SIZE = 64
TABLE = np.random.default_rng(5).permutation(SIZE).astype(np.int32)
BASES = (0, 1 << 12, 1 << 13)

# A program is a list of ("loop", extent, ragged, body) and ("copy", from, to, gather, guard).
copies = st.tuples(
    st.just("copy"),
    st.lists(st.integers(0, 5), min_size=4, max_size=4),
    st.lists(st.integers(0, 5), min_size=4, max_size=4),
    st.booleans(),
    st.one_of(st.none(), st.integers(0, 3)),
)
programs = st.recursive(
    st.lists(copies, min_size=1, max_size=2),
    lambda body: st.lists(
        st.one_of(copies, st.tuples(st.just("loop"), st.integers(1, 4), st.booleans(), body)),
        min_size=1,
        max_size=3,
    ),
    max_leaves=5,
)


def index(weights: list[int], loops: list[Any]) -> Any:
    return sum((w * v for w, v in zip(weights, loops, strict=False)), start=weights[-1] * 1) % SIZE


def emit(program: list[Any], buffers: list[Any], loops: list[Any]) -> Any:
    parts = []
    for node in program:
        if node[0] == "loop":
            var = Var(f"i{len(loops)}", "int64")
            ragged = node[2] and loops
            extent = tirx.min(loops[-1], i64(node[1])) if ragged else i64(node[1])
            body = emit(node[3], buffers, [*loops, var])
            parts.append(tirx.For(var, i64(0), extent, tirx.ForKind.SERIAL, body))
            continue
        source, target, table = buffers
        read = tirx.IntImm("int64", 0) + index(node[1], loops)
        if node[3]:
            read = tirx.BufferLoad(table, [read]).astype("int64")
        write = tirx.IntImm("int64", 0) + index(node[2], loops)
        store: Any = tirx.BufferStore(target, tirx.BufferLoad(source, [read]), [write])
        if node[4] is not None and loops:
            store = tirx.IfThenElse(loops[-1] < node[4], store, None)
        parts.append(store)
    return parts[0] if len(parts) == 1 else tirx.SeqStmt(parts)


def interpret(program: list[Any], loops: list[int]) -> Iterator[tuple[int, bool]]:
    for node in program:
        if node[0] == "loop":
            extent = min(loops[-1], node[1]) if node[2] and loops else node[1]
            for value in range(extent):
                yield from interpret(node[3], [*loops, value])
        elif node[4] is None or not loops or loops[-1] < node[4]:
            read = index(node[1], loops)
            if node[3]:
                yield BASES[2] + 4 * read, False
                read = int(TABLE[read])
            # TIR's text names the outer load first.
            yield BASES[0] + 4 * read, False
            yield BASES[1] + 4 * index(node[2], loops), True


def by_statement(records: list[tuple[int, bool]]) -> list[list[tuple[int, bool]]]:
    """Group the loads before each store: their order inside one statement is free."""
    groups: list[list[tuple[int, bool]]] = [[]]
    for record in records:
        groups[-1].append(record)
        if record[1]:
            groups[-1].sort()
            groups.append([])
    return groups


def whole(chunks: Iterator[Trace]) -> Trace:
    parts = list(chunks)
    return Trace(
        *(np.concatenate([getattr(p, f) for p in parts]) for f in ("address", "size", "write"))
    )


@settings(max_examples=150, deadline=None)
@given(programs, st.sampled_from([1, 7, 1 << 20]))
def test_random_programs_run_in_order(program: list[Any], chunk: int) -> None:
    buffers = [tirx.decl_buffer((SIZE,), "float32", name=n) for n in ("source", "target")]
    buffers.append(tirx.decl_buffer((SIZE,), "int32", name="table"))
    func = tirx.PrimFunc(buffers, emit(program, buffers, []))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "_CHUNK", chunk)
        chunks = list(address_trace(func, BASES, 1 << 20, consts={"table": TABLE}))
    found = [r for c in chunks for r in zip(c.address.tolist(), c.write.tolist(), strict=True)]
    assert by_statement(found) == by_statement(list(interpret(program, [])))


def test_units_of_accesses_that_straddle() -> None:
    trace = Trace(np.array([0, 60, 130]), np.array([4, 8, 200]), np.zeros(3, np.bool_))
    assert trace.units(64).tolist() == [0, 0, 1, 2, 3, 4, 5]


def test_vector_access_is_one_record_and_a_gather_is_one_per_lane() -> None:
    x = te.placeholder((i64(4), i64(64)), name="X")
    y = te.compute((i64(4), i64(64)), lambda i, j: x[3 - i, j], name="Y")
    z = te.compute((i64(64), i64(4)), lambda j, i: y[i, j], name="Z")
    sch = tvm.s_tir.Schedule(tvm.IRModule({"main": te.create_prim_func([x, y, z])}))
    sch.vectorize(sch.get_loops(sch.get_sblock("Y"))[1])
    _, i = sch.get_loops(sch.get_sblock("Z"))
    sch.vectorize(i)
    trace = whole(address_trace(lower_loops(sch.mod["main"], V3), (0, 1 << 14, 1 << 15), 1 << 20))
    sizes = sorted(set(zip(trace.size.tolist(), trace.write.tolist(), strict=True)))
    # X in and Y out by 256-byte vectors; Y by columns, 4 lanes apart; Z out by 16 bytes.
    assert sizes == [(4, False), (16, True), (256, False), (256, True)]
    assert trace.address[:2].tolist() == [3 * 256, 1 << 14]
    assert np.count_nonzero(trace.size == 4) == 256


def test_bad_traces_are_refused() -> None:
    buffer = tirx.decl_buffer((4,), "float32", name="b")
    func = tirx.PrimFunc([buffer], tirx.BufferStore(buffer, tirx.FloatImm("float32", 0), [i64(0)]))
    with pytest.raises(ConfigError, match="1 parameters but 2 addresses"):
        list(address_trace(func, (0, 1), 0))
    n = Var("n", "int64")
    symbolic = tirx.decl_buffer((n,), "float32", name="s")
    body = tirx.BufferStore(symbolic, tirx.FloatImm("float32", 0), [i64(0)])
    with pytest.raises(ConfigError, match="symbolic"):
        list(address_trace(tirx.PrimFunc([symbolic], body), (0,), 0))


def plain_lru(level: CacheLevel, sectors: list[int]) -> int:
    """Count misses with lists: the line used last comes first."""
    sets: list[list[tuple[int, set[int]]]] = [[] for _ in range(level.sets)]
    misses = 0
    for sector in sectors:
        line, part = divmod(sector, level.line_bytes // level.sector_bytes)
        lines = sets[line % level.sets]
        entry = next((e for e in lines if e[0] == line), (line, set()))
        if entry in lines:
            lines.remove(entry)
        misses += part not in entry[1]
        entry[1].add(part)
        lines.insert(0, entry)
        del lines[level.ways :]
    return misses


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from([1, 4]),
    st.integers(1, 99),
    st.integers(0, 9),
)
def test_lru_counts_what_a_plain_one_counts(
    sets: int, ways: int, parts: int, span: int, seed: int
) -> None:
    level = CacheLevel("c", sets * ways * 128, ways, 128, 128 // parts)
    sectors = np.random.default_rng(seed).integers(0, span, 400)
    assert CacheSimulator([level]).access(sectors) == [
        LevelCount(400, plain_lru(level, sectors.tolist()))
    ]


def test_second_level_sees_the_misses_of_the_first_and_state_stays() -> None:
    small, large = CacheLevel("L1", 128, 2), CacheLevel("L2", 512, 8)
    simulator = CacheSimulator([small, large])
    sectors = np.array([0, 1, 2, 3, 0, 1, 2, 3])
    assert simulator.access(sectors) == [LevelCount(8, 8), LevelCount(8, 4)]
    assert simulator.access(sectors) == [LevelCount(8, 8), LevelCount(8, 0)]
    simulator.clear()
    assert simulator.access(sectors[:4])[1] == LevelCount(4, 4)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [((100, 3), "whole lines"), ((0, 1), "sizes"), ((192, 3, 64, 48), "sectors")],
)
def test_impossible_caches_are_refused(arguments: tuple[int, ...], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        CacheLevel("c", *arguments)


def test_levels_of_different_sectors_are_refused() -> None:
    with pytest.raises(ConfigError, match="sector"):
        CacheSimulator([L1, *H200_LEVELS])


def vcol_case(m: int, k: int, n: int) -> tuple[Any, list[np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(k, n)).astype(np.float32)
    weight[rng.random((k, n // 16)).repeat(16, axis=1) < 0.5] = 0
    packed = list(pack_matmul("vcol8", weight, (m, k, n), V3).values())
    func = build_matmul("vcol8", (m, k, n), packed[1].shape[-1], V3)
    consts = {str(p.name): a for p, a in zip(func.params[1:], packed, strict=False)}
    arrays = [np.zeros((m, k), np.float32), *packed, np.zeros((m, n), np.float32)]
    with V3:
        rules = dlight.ApplyDefaultSchedule(*cpu_rules())
        func = rules(tvm.IRModule({"main": func}))["main"]
    return func, arrays, {name: a for name, a in consts.items() if a.dtype.kind == "i"}


@pytest.mark.skipif(bool(missing_tool()), reason=missing_tool())
def test_model_counts_what_cachegrind_counts_on_an_indirect_kernel() -> None:
    func, arrays, consts = vcol_case(64, 256, 512)
    levels = (L1, CacheLevel("L2", 1 << 18, 8))
    counted = run_cachegrind(func, arrays, V3, *levels)
    offsets, end = arena_offsets(arrays)
    simulator = CacheSimulator(levels)
    trace = whole(address_trace(lower_loops(func, V3), offsets, end, consts=consts))
    first, last = simulator.access(trace.units(64))
    assert first.misses == pytest.approx(counted.first_misses, rel=0.05)
    assert last.misses == pytest.approx(counted.last_misses, rel=0.05)


PROFILE = """events: Ir I1mr ILmr Dr D1mr DLmr Dw D1mw DLmw
fn=other
1 1 1 1 1000 1 1 1 1 1
fn=kernel_compute_
3 9 0 0 10 4 2 5 1 1
4 9 0 0 20 0 0 5 0 0
summary: 19 1 1 31 1004 5 3 11 2 2
"""


def test_profile_is_summed_by_function() -> None:
    assert cachegrind._parse(PROFILE, "kernel_compute_") == CacheCounts(40, 5, 3)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, len(PROFILE)), st.text(max_size=5))
def test_damaged_profiles_are_refused_or_read_whole(cut: int, noise: str) -> None:
    try:
        references = cachegrind._parse(PROFILE[:cut] + noise, "kernel_compute_").references
    except MeasurementError:
        references = None
    assert references in (None, 40)
    assert references == 40 or cut < len(PROFILE) or noise


def test_missing_valgrind_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cachegrind.shutil, "which", lambda tool: None)
    with pytest.raises(MeasurementError, match="valgrind is not installed"):
        run_cachegrind(None, [], V3, L1, L2)


@pytest.fixture(scope="module")
def mini() -> Any:
    imported = import_onnx(build("bert-mini-random"))
    with V3:
        return imported, cpu_pipeline(V3)(imported.mod)


def test_whole_model_is_modelled_and_says_so(mini: Any) -> None:
    imported, lowered = mini
    model = model_caches(lowered, V3, random_inputs(imported, 0), (L1, L2))
    assert [k.kernel for k in model.kernels if k.reason] == []
    record = model.record()
    assert record["source"] == "model"
    # 0.5 MB in all: the second run finds everything in a megabyte of L2.
    assert model.dram_bytes == 0
    assert 0 < record["levels"][0]["misses"] < record["levels"][0]["requests"]


def test_cold_run_fetches_every_weight_once(mini: Any) -> None:
    imported, lowered = mini
    large = (CacheLevel("L", 64 << 20, 16),)
    cold = model_caches(lowered, V3, random_inputs(imported, 0), large, warm=False)
    # Embedding tables are only touched where ids point.
    embedded = 16 * 64 * 4
    weights = sum(
        c.numpy().nbytes for c in _matrices(lowered) if c.shape[-1] != 64 or len(c.shape) == 3
    )
    assert weights <= cold.dram_bytes <= weights + 40 * embedded


def _matrices(lowered: Any) -> list[Any]:
    calls = [b.value for block in lowered["main"].body.blocks for b in block.bindings]
    args = itertools.chain(*(call.args[1].fields for call in calls))
    return [a.value for a in args if hasattr(a, "value") and len(a.value.shape) == 3]


def test_kept_traces_and_a_short_warm_up_change_little(
    mini: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported, lowered = mini
    feeds, small = (
        random_inputs(imported, 0),
        (CacheLevel("L1", 2048, 4), CacheLevel("L2", 8192, 4)),
    )
    kept = model_caches(lowered, V3, feeds, small)
    monkeypatch.setattr(cache_model, "_REFILLS", 1 << 20)
    warm = model_caches(lowered, V3, feeds, small)
    monkeypatch.setattr(cache_model, "_KEPT_SECTORS", 0)
    assert model_caches(lowered, V3, feeds, small) == warm
    for short, whole in zip(kept.totals(), warm.totals(), strict=True):
        assert short.requests == pytest.approx(whole.requests, rel=1e-3)
        assert short.misses == pytest.approx(whole.misses, rel=1e-3)


def test_sectors_that_straddle_pages_are_refused(mini: Any) -> None:
    imported, lowered = mini
    odd = (CacheLevel("L", 48 * 4, 4, 48, 48),)
    with pytest.raises(ConfigError, match="48 bytes do not divide"):
        model_caches(lowered, V3, random_inputs(imported, 0), odd)


def test_integer_inputs_must_be_given(mini: Any) -> None:
    _, lowered = mini
    model = model_caches(lowered, V3, {}, (L1,), warm=False)
    reasons = {k.kernel: k.reason for k in model.kernels if k.reason}
    assert set(reasons) == {"take", "take1"}
    assert "unknown" in reasons["take"]


def test_host_levels_are_read_or_refused(tmp_path: Any) -> None:
    folder = tmp_path / "sys/devices/system/cpu/cpu0/cache/index0"
    folder.mkdir(parents=True)
    for name, text in (
        ("size", "48K"), ("level", "1"), ("type", "Data"), ("ways_of_associativity", "12"),
        ("coherency_line_size", "64"),
    ):  # fmt: skip
        (folder / name).write_text(text)
    assert host_levels(tmp_path) == (L1,)
    with pytest.raises(UnsupportedOpError, match="no caches"):
        host_levels(tmp_path / "nothing")


@T.prim_func(s_tir=True)
def accumulating(x_: T.handle, y_: T.handle) -> None:
    x = T.match_buffer(x_, (16,), "float32x8")
    y = T.match_buffer(y_, (16,), "float32x8")
    sums = T.alloc_buffer((16,), "float32x8", scope="local")
    for k in range(16):
        sums[k] = x[k]
    for k in range(16):
        y[k] = sums[k]


@pytest.mark.parametrize(("level", "spilled"), [("x86-64-v3", [13, 14, 15]), ("x86-64-v4", [])])
def test_accumulators_beyond_the_registers_are_in_memory(level: str, spilled: list[int]) -> None:
    func = accumulating.with_attr("target", parse_target(level, 1))
    scratch = 1 << 20
    chunks = list(address_trace(func, [0, 4096], scratch))
    address = np.concatenate([chunk.address for chunk in chunks])
    write = np.concatenate([chunk.write for chunk in chunks])
    inside = address >= scratch
    places = [scratch + 32 * k for k in spilled]
    assert address[inside & write].tolist() == places
    assert address[inside & ~write].tolist() == places
    assert (~inside).sum() == 32
