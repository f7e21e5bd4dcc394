"""Accesses and windows of PrimFuncs against brute-force interpretation."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import tvm_ffi
from hypothesis import given, settings
from hypothesis import strategies as st

from icd_tvm._tvm import Var, dlight, i64, s_tir, sym, te, tirx, tvm
from icd_tvm.core.cost import TileAccess, tile_cost
from icd_tvm.errors import ConfigError, ShapeError, UnsupportedOpError
from icd_tvm.tir_schedules.access_patterns import (
    Access,
    Affine,
    accesses,
    affine,
    reduction_windows,
    split_fused,
    window_incidence,
)

KINDS = {
    "serial": tirx.ForKind.SERIAL,
    "parallel": tirx.ForKind.PARALLEL,
    "vectorized": tirx.ForKind.VECTORIZED,
    "unrolled": tirx.ForKind.UNROLLED,
}
TABLE = np.random.default_rng(3).permutation(24).astype(np.int32)


def build(tree: Any, env: list[Any], load: Any) -> Any:
    """Evaluate an expression tree on Python integers or on TIR variables alike."""
    kind = tree[0]
    if kind == "loop":
        return env[tree[1] % len(env)]
    left = build(tree[1], env, load)
    if kind == "gather":
        return load(left % len(TABLE))
    if kind == "add":
        return left + build(tree[2], env, load)
    table = {"mul": lambda a, c: a * c, "div": lambda a, c: a // c, "mod": lambda a, c: a % c}
    return table[kind](left, tree[2])


trees = st.recursive(
    st.tuples(st.just("loop"), st.integers(0, 3)),
    lambda inner: st.one_of(
        st.tuples(st.just("add"), inner, inner),
        st.tuples(st.sampled_from(["mul", "div", "mod"]), inner, st.integers(1, 4)),
        st.tuples(st.just("gather"), inner),
    ),
    max_leaves=4,
)


def nest(extents: list[int], tags: list[str], tree: Any, guard: Any, size: int) -> Any:
    """Build ``for ...: if guard < 5: out[0] = buffer[tree % size]``."""
    loops = [Var(f"i{k}", "int64") for k in range(len(extents))]
    buffer = tirx.decl_buffer((size,), "float32", name="buffer")
    table = tirx.decl_buffer((len(TABLE),), "int32", name="table")
    out = tirx.decl_buffer((1,), "float32", name="out")

    def load(index: Any) -> Any:
        return tirx.BufferLoad(table, [index]).astype("int64")

    value = tirx.BufferLoad(buffer, [build(tree, loops, load) % size])
    body: Any = tirx.BufferStore(out, value, [i64(0)])
    if guard is not None:
        body = tirx.IfThenElse(build(guard, loops, load) < 5, body, None)
    for var, extent, tag in reversed(list(zip(loops, extents, tags, strict=True))):
        body = tirx.For(var, i64(0), i64(extent), KINDS[tag], body)
    return tirx.PrimFunc([buffer, table, out], body)


def window_keys(tags: list[str], window: str) -> list[int]:
    dropped = {
        "vector": {"vectorized"},
        "tile": {"vectorized", "unrolled"},
        "cta": {"vectorized", "unrolled", "serial"},
        "all": set(KINDS),
    }[window]
    return [k for k, tag in enumerate(tags) if tag not in dropped]


def rows_of(incidence: Any) -> Counter[frozenset[int]]:
    """Count windows by the set they touch."""
    result: Counter[frozenset[int]] = Counter()
    matrix = incidence.matrix
    for row in range(matrix.shape[0]):
        cells = matrix.indices[matrix.indptr[row] : matrix.indptr[row + 1]]
        result[frozenset(cells.tolist())] += incidence.counts[row]
    return result


def named(func: Any, name: str, write: bool = False) -> Access:
    return [a for a in accesses(func) if a.name == name and a.write == write][-1]


@settings(max_examples=60, deadline=None)
@given(
    extents=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    data=st.data(),
    tree=trees,
    guard=st.none() | trees,
    window=st.sampled_from(["vector", "tile", "cta", "all"]),
)
def test_random_nests_match_brute_force(
    extents: list[int], data: Any, tree: Any, guard: Any, window: str
) -> None:
    tags = data.draw(
        st.lists(st.sampled_from(list(KINDS)), min_size=len(extents), max_size=len(extents))
    )
    size = 7
    func = nest(extents, tags, tree, guard, size)
    keys = window_keys(tags, window)
    expected: dict[tuple[int, ...], set[int]] = {}
    for point in itertools.product(*(range(extent) for extent in extents)):
        values = list(point)
        if guard is not None and build(guard, values, lambda i: int(TABLE[i])) >= 5:
            continue
        touched = build(tree, values, lambda i: int(TABLE[i])) % size
        expected.setdefault(tuple(values[k] for k in keys), set()).add(touched)
    got = window_incidence(named(func, "buffer"), 0, window, consts={"table": TABLE})
    assert rows_of(got) == Counter(frozenset(cells) for cells in expected.values())


def slow_points(access: Access) -> list[tuple[dict[Any, int], tuple[int, ...]]]:
    """Interpret an access point by point with TVM's own simplifier."""
    analyzer = sym.Analyzer()

    def at(expr: Any, env: dict[Any, int]) -> int:
        if isinstance(expr, int):
            return expr
        put = tvm_ffi.structural_map(
            expr, (Var, lambda v: tirx.IntImm(str(v.ty.dtype), env[v]) if v in env else v)
        )
        return int(analyzer.simplify(put))

    found = []

    def visit(depth: int, env: dict[Any, int]) -> None:
        if depth == len(access.loops):
            if all(at(p, env) for p in access.predicates):
                found.append((dict(env), tuple(at(i, env) for i in access.indices)))
            return
        loop = access.loops[depth]
        low = at(loop.minimum, env)
        for value in range(low, low + at(loop.extent, env)):
            visit(depth + 1, {**env, loop.var: value})

    visit(0, {})
    return found


def matmul(m: int, k: int, n: int) -> Any:
    a = te.placeholder((m, k), name="A")
    b = te.placeholder((k, n), name="B")
    t = te.reduce_axis((0, k), name="t")
    c = te.compute((m, n), lambda i, j: te.sum(a[i, t] * b[t, j], axis=t), name="C")
    return te.create_prim_func([a, b, c])


def cpu_scheduled(m: int, k: int, n: int) -> Any:
    sch = s_tir.Schedule(matmul(m, k, n))
    block = sch.get_sblock("C")
    i, j, t = sch.get_loops(block)
    i0, i1 = sch.split(i, [None, 2])
    j0, j1, j2 = sch.split(j, [None, 2, 2])
    t0, t1 = sch.split(t, [None, 2])
    sch.reorder(i0, j0, t0, t1, i1, j1, j2)
    sch.parallel(sch.fuse(i0, j0))
    sch.unroll(j1)
    sch.vectorize(j2)
    sch.decompose_reduction(block, t0)
    return sch.mod["main"]


@pytest.mark.parametrize("window", ["vector", "tile", "cta", "reduction", "all"])
@pytest.mark.parametrize("shape", [(3, 4, 8), (4, 5, 6)])
def test_cpu_schedule_matches_interpretation(window: str, shape: tuple[int, int, int]) -> None:
    access = named(cpu_scheduled(*shape), "B")
    assert [loop.reduction for loop in access.loops] == [False, True, True, False, False, False]
    kept = {
        "vector": [0, 1, 2, 3, 4],
        "tile": [0, 1, 2],
        "cta": [0],
        "reduction": [1, 2],
        "all": [],
    }[window]
    expected: dict[tuple[int, ...], set[int]] = {}
    for env, (_, column) in slow_points(access):
        key = tuple(env[access.loops[k].var] for k in kept)
        expected.setdefault(key, set()).add(column)
    got = window_incidence(access, 1, window)
    assert rows_of(got) == Counter(frozenset(cells) for cells in expected.values())


THREADS = ("blockIdx.x", "threadIdx.y", "threadIdx.x")


def thread_nest(
    extents: list[int], inner: list[int], tree: Any, guard: Any, size: int
) -> tuple[Any, list[Any]]:
    """Build a nest of one block loop, two thread loops and serial loops around a guarded load."""
    names = [*THREADS, *(f"i{k}" for k in range(len(inner)))]
    loops = [Var(name.replace(".", "_"), "int64") for name in names]
    buffer = tirx.decl_buffer((size,), "float32", name="buffer")
    table = tirx.decl_buffer((len(TABLE),), "int32", name="table")
    out = tirx.decl_buffer((1,), "float32", name="out")

    def load(index: Any) -> Any:
        return tirx.BufferLoad(table, [index]).astype("int64")

    value = tirx.BufferLoad(buffer, [build(tree, loops, load) % size])
    body: Any = tirx.BufferStore(out, value, [i64(0)])
    if guard is not None:
        body = tirx.IfThenElse(build(guard, loops, load) < 5, body, None)
    for var, name, extent in reversed(list(zip(loops, names, extents + inner, strict=True))):
        if name in THREADS:
            bound = tirx.IterVar(
                tvm.ir.Range(i64(0), i64(extent)), var, tirx.IterVar.ThreadIndex, name
            )
            kind = tirx.ForKind.THREAD_BINDING
            body = tirx.For(var, i64(0), i64(extent), kind, body, bound)
        else:
            body = tirx.For(var, i64(0), i64(extent), tirx.ForKind.SERIAL, body)
    return tirx.PrimFunc([buffer, table, out], body), loops


@settings(max_examples=40, deadline=None)
@given(
    extents=st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([4, 24, 40])),
    inner=st.lists(st.integers(1, 3), max_size=2),
    tree=trees,
    guard=st.none() | trees,
    window=st.sampled_from(["warp", "sector", "line", "cta", "vector"]),
)
def test_random_thread_nests_match_brute_force(
    extents: tuple[int, int, int], inner: list[int], tree: Any, guard: Any, window: str
) -> None:
    size = 45
    func, _ = thread_nest(list(extents), inner, tree, guard, size)
    expected: dict[Any, set[int]] = {}
    for point in itertools.product(*(range(extent) for extent in (*extents, *inner))):
        if guard is not None and build(guard, list(point), lambda i: int(TABLE[i])) >= 5:
            continue
        touched = build(tree, list(point), lambda i: int(TABLE[i])) % size
        block, y, x, *rest = point
        key = {
            "warp": (block, (y * extents[2] + x) // 32, *rest),
            "sector": touched * 4 // 32,
            "line": touched * 4 // 128,
            "cta": block,
            "vector": point,
        }[window]
        expected.setdefault(key, set()).add(touched)
    access = named(func, "buffer")
    assert [loop.tag for loop in access.loops][:3] == list(THREADS)
    got = window_incidence(access, 0, window, consts={"table": TABLE}, line_bytes=128)
    assert rows_of(got) == Counter(frozenset(cells) for cells in expected.values())


def test_cuda_schedule_matches_interpretation_by_warp_sector_and_block() -> None:
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_90"})
    mod = tvm.IRModule({"main": matmul(16, 8, 32)})
    with target:
        mod = dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())(mod.clone())
    found = [a for a in accesses(mod["main"]) if a.name == "B" and not a.write]
    tags = {loop.tag for loop in found[0].loops}
    assert {"blockIdx.x", "threadIdx.x"} <= tags
    for access in found:
        lane = next(loop for loop in access.loops if loop.tag == "threadIdx.x")
        others = [p for p in access.loops if p.tag not in ("threadIdx.x", "vectorized")]
        warps: dict[tuple[int, ...], set[int]] = {}
        sectors: dict[int, set[int]] = {}
        blocks: dict[int, set[int]] = {}
        block = next(loop for loop in access.loops if loop.tag == "blockIdx.x")
        for env, (row, column) in slow_points(access):
            key = (*(env[p.var] for p in others), env[lane.var] // 32)
            warps.setdefault(key, set()).add(column)
            sectors.setdefault((row * 32 + column) * 4 // 32, set()).add(column)
            blocks.setdefault(env[block.var], set()).add(column)
        by_warp = window_incidence(access, 1, "warp")
        assert rows_of(by_warp) == Counter(frozenset(cells) for cells in warps.values())
        by_sector = window_incidence(access, 1, "sector")
        assert rows_of(by_sector) == Counter(frozenset(cells) for cells in sectors.values())
        by_block = window_incidence(access, 1, "cta")
        assert rows_of(by_block) == Counter(frozenset(cells) for cells in blocks.values())


def test_reduction_windows_of_a_masked_weight_are_the_mask() -> None:
    mask = np.random.default_rng(0).random((24, 32)) < 0.3
    for func in (matmul(6, 24, 32), cpu_scheduled(6, 24, 32)):
        got = reduction_windows(named(func, "B"), 1, nonzero=mask)
        np.testing.assert_array_equal(got.matrix.toarray(), mask)
        np.testing.assert_array_equal(got.counts, np.ones(24))


def test_tile_access_prices_what_the_mask_prices() -> None:
    mask = np.random.default_rng(1).random((24, 32)) < 0.3
    access = reduction_windows(named(matmul(6, 24, 32), "B"), 1, nonzero=mask).tile_access(8)
    expected = mask.reshape(24, 4, 8).any(axis=2).sum()
    assert tile_cost([access], np.arange(32)) == expected
    assert isinstance(access, TileAccess)


def test_lowered_function_finds_its_reduction() -> None:
    passes = s_tir.transform
    lower = tvm.transform.Sequential(
        [
            passes.LowerInitBlock(),
            passes.PlanAndUpdateBufferAllocationLocation(),
            passes.ConvertBlocksToOpaque(),
            passes.LowerOpaqueBlock(),
        ]
    )
    func = cpu_scheduled(4, 8, 8).with_attr("global_symbol", "main")
    lowered = lower(tvm.IRModule({"main": func}))["main"]
    assert "sblock" not in lowered.script()
    mask = np.random.default_rng(2).random((8, 8)) < 0.4
    got = reduction_windows(named(lowered, "B"), 1, nonzero=mask)
    np.testing.assert_array_equal(got.matrix.toarray(), mask)


def test_vector_indices_of_a_lowered_function_become_lanes() -> None:
    i, j = Var("i", "int64"), Var("j", "int64")
    source = tirx.decl_buffer((6, 8), "float32", name="source")
    out = tirx.decl_buffer((6, 4), "float32", name="out")
    body = tirx.BufferStore(out, tirx.BufferLoad(source, [i, j * 2]), [i, j])
    body = tirx.For(j, i64(0), i64(4), tirx.ForKind.VECTORIZED, body)
    func = tirx.PrimFunc([source, out], tirx.For(i, i64(0), i64(6), tirx.ForKind.SERIAL, body))
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    vectorized = tirx.transform.VectorizeLoop()(module)["main"]
    for each in (func, vectorized):
        got = window_incidence(named(each, "source"), 1, "vector")
        assert rows_of(got) == Counter({frozenset({0, 2, 4, 6}): 6})


def test_packed_weight_maps_back_to_logical_indices() -> None:
    k, n, lanes = 12, 20, 8
    a = te.placeholder((3, k), name="A")
    b = te.placeholder((-(-n // lanes), k, lanes), name="P")
    t = te.reduce_axis((0, k), name="t")
    c = te.compute((3, n), lambda i, j: te.sum(a[i, t] * b[j // lanes, t, j % lanes], axis=t))
    access = named(te.create_prim_func([a, b, c]), "P")
    mask = np.random.default_rng(4).random((k, n)) < 0.5

    def logical(outer: Any, row: Any, lane: Any) -> tuple[Any, Any]:
        return row, outer * lanes + lane

    got = reduction_windows(access, 1, nonzero=mask, logical=logical)
    np.testing.assert_array_equal(got.matrix.toarray(), mask)


def test_ragged_indirect_loop_of_a_sparse_kernel() -> None:
    starts, columns = np.array([0, 2, 2, 5], np.int32), np.array([1, 4, 0, 3, 5], np.int32)
    i, j = Var("i", "int64"), Var("j", "int64")
    x = tirx.decl_buffer((6,), "float32", name="x")
    ptr = tirx.decl_buffer((4,), "int32", name="ptr")
    col = tirx.decl_buffer((5,), "int32", name="col")
    y = tirx.decl_buffer((3,), "float32", name="y")
    low, high = (tirx.BufferLoad(ptr, [i + k]).astype("int64") for k in (0, 1))
    value = tirx.BufferLoad(y, [i]) + tirx.BufferLoad(x, [tirx.BufferLoad(col, [low + j])])
    body = tirx.For(j, i64(0), high - low, tirx.ForKind.SERIAL, tirx.BufferStore(y, value, [i]))
    func = tirx.PrimFunc([x, ptr, col, y], tirx.For(i, i64(0), i64(3), tirx.ForKind.PARALLEL, body))
    access = named(func, "x")
    consts = {"ptr": starts, "col": columns}
    assert rows_of(window_incidence(access, 0, "cta", consts=consts)) == Counter(
        [frozenset({1, 4}), frozenset({0, 3, 5})]
    )
    with pytest.raises(ConfigError, match="values are unknown"):
        window_incidence(access, 0, "cta", consts={"ptr": starts})
    with pytest.raises(ShapeError, match="out of range"):
        window_incidence(access, 0, "cta", consts={"ptr": starts, "col": columns[:4]})


def test_padding_guard_of_if_then_else_limits_the_load() -> None:
    x = te.placeholder((6,), name="x")
    y = te.compute((8,), lambda i: tirx.if_then_else(i < 6, x[i], 0.0), name="y")
    access = named(te.create_prim_func([x, y]), "x")
    assert len(access.predicates) == 1
    assert rows_of(window_incidence(access, 0, "all")) == Counter([frozenset(range(6))])


def test_affine_coefficients_and_their_absence() -> None:
    plain = affine(named(matmul(4, 6, 8), "B"))
    assert plain == [Affine({"t": 1}, 0), Affine({"j": 1}, 0)]
    assert affine(named(cpu_scheduled(4, 6, 8), "B"))[1] is None


def test_fused_loops_fall_apart_into_digits() -> None:
    sch = s_tir.Schedule(matmul(6, 8, 12))
    i, j, _ = sch.get_loops(sch.get_sblock("C"))
    sch.fuse(i, j)
    whole = named(sch.mod["main"], "B")
    assert affine(whole)[1] is None
    assert affine(split_fused(whole))[1] == Affine({"i_j_fused_0": 1}, 0)


def test_loops_outside_the_indices_only_multiply_counts() -> None:
    access = named(matmul(10**7, 4, 6), "B")
    got = window_incidence(access, 1, "vector")
    assert got.matrix.shape == (24, 6)
    np.testing.assert_array_equal(got.counts, np.full(24, 1e7))


def test_an_access_that_never_happens_has_no_windows() -> None:
    func = nest([3, 2], ["serial"] * 2, ("loop", 0), ("add", ("loop", 1), ("loop", 1)), 7)
    assert window_incidence(named(func, "buffer"), 0, "all").matrix.shape == (1, 7)
    never = Var("never", "int64")
    buffer = tirx.decl_buffer((4,), "float32", name="buffer")
    body = tirx.IfThenElse(never > 9, tirx.BufferStore(buffer, tirx.const(0.0), [i64(1)]), None)
    func = tirx.PrimFunc([buffer], tirx.For(never, i64(0), i64(4), tirx.ForKind.SERIAL, body))
    assert window_incidence(accesses(func)[0], 0, "all").matrix.shape == (0, 4)


def test_sampling_states_a_bound_that_holds() -> None:
    mask = np.random.default_rng(5).random((512, 16)) < 0.3
    access = named(matmul(2, 512, 16), "B")
    exact = reduction_windows(access, 1, nonzero=mask)
    assert exact.error == 0.0
    got = window_incidence(access, 1, "reduction", nonzero=mask, point_cap=16 * 128)
    assert got.matrix.shape[0] == 128
    assert 0.0 < got.error < 0.25
    assert got.counts.sum() == pytest.approx(512)
    share = np.asarray(got.matrix.mean(axis=0)) - np.asarray(exact.matrix.mean(axis=0))
    assert np.abs(share).max() <= got.error


def test_bad_requests_are_refused() -> None:
    access = named(matmul(2, 4, 6), "B")
    with pytest.raises(ConfigError, match="window="):
        window_incidence(access, 1, "page")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no axis"):
        window_incidence(access, 2, "all")
    with pytest.raises(ShapeError, match="nonzero"):
        window_incidence(access, 1, "all", nonzero=np.ones((4, 5), dtype=np.bool_))
    with pytest.raises(ConfigError, match="length of the axis"):
        window_incidence(access, lambda row, column: column, "all")
    with pytest.raises(ConfigError, match="exceed point_cap"):
        window_incidence(access, 1, "line", point_cap=4)
    with pytest.raises(ConfigError, match="one window exceeds"):
        window_incidence(access, 1, "all", point_cap=4)


def test_unknown_variables_and_while_loops_are_refused() -> None:
    size = Var("size", "int64")
    buffer = tirx.decl_buffer((8,), "float32", name="buffer")
    store = tirx.BufferStore(buffer, tirx.const(0.0), [size])
    with pytest.raises(UnsupportedOpError, match="no loop binds"):
        window_incidence(accesses(tirx.PrimFunc([size, buffer], store))[0], 0, "all")
    loop = tirx.While(size < 3, store)
    with pytest.raises(UnsupportedOpError, match="while"):
        accesses(tirx.PrimFunc([size, buffer], loop))


def test_every_integer_operator_is_evaluated_like_python() -> None:
    i = Var("i", "int64")
    buffer = tirx.decl_buffer((512,), "float32", name="buffer")
    cases: dict[str, tuple[Any, Any]] = {
        "shift": ((i << 2) >> 1, lambda v: (v << 2) >> 1),
        "bits": ((i & 5) | (i ^ 3), lambda v: (v & 5) | (v ^ 3)),
        "truncate": (tirx.truncdiv(i - 8, i64(3)) + 9, lambda v: int((v - 8) / 3) + 9),
        "remainder": (tirx.truncmod(i - 8, i64(3)) + 9, lambda v: int(np.fmod(v - 8, 3)) + 9),
        "extrema": (tirx.max(tirx.min(i, i64(9)), i64(4)), lambda v: max(min(v, 9), 4)),
        "select": (tirx.Select(tirx.Not(i < 4), i, i * 2), lambda v: v if v >= 4 else v * 2),
        "branch": (
            tirx.if_then_else(tirx.And(i != 2, i >= 1), i, i64(3)),
            lambda v: v if v != 2 and v >= 1 else 3,
        ),
        "likely": (tirx.if_then_else(tirx.likely(i <= 6), i, i64(1)), lambda v: v if v <= 6 else 1),
    }
    for name, (expr, truth) in cases.items():
        body = tirx.BufferStore(buffer, tirx.const(0.0), [expr])
        func = tirx.PrimFunc([buffer], tirx.For(i, i64(0), i64(16), tirx.ForKind.SERIAL, body))
        got = window_incidence(accesses(func)[0], 0, "all")
        assert rows_of(got) == Counter([frozenset(truth(v) for v in range(16))]), name
