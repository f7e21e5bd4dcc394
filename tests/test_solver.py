"""Permutations, constraints and the solver: planted structure must come back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from icd_tvm.core import starts
from icd_tvm.core.access_graph import build_w
from icd_tvm.core.balance import BalancedSearch, LoadState, SmoothState
from icd_tvm.core.combined_cost import Weights
from icd_tvm.core.cost import (
    TileAccess,
    modularity,
    tile_cost,
    tile_lower_bound,
    tile_upper_bound,
)
from icd_tvm.core.joint import block_count, fit_rows_columns
from icd_tvm.core.mock_graph import planted_order
from icd_tvm.core.permutation import (
    Constraint,
    as_permutation,
    compose,
    identity,
    invert,
    load_permutation,
    save_permutation,
)
from icd_tvm.core.search import TileSearch
from icd_tvm.core.solver import fit_permutation
from icd_tvm.errors import ConfigError, NonFiniteError, OutputError, PermutationError, ShapeError


def access(mask: np.ndarray, tile: int = 16, weight: float = 1.0) -> TileAccess:
    """One kernel on the columns of a mask [windows, n]."""
    return TileAccess(sp.csr_matrix(mask), tile, weight)


def grouped_mask(
    sizes: list[int], windows: int, density: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Columns in groups of one support each, scattered; and the order that undoes it."""
    rng = np.random.default_rng(seed)
    label = np.repeat(np.arange(len(sizes)), sizes)
    supports = rng.random((windows, len(sizes))) < density
    hidden = rng.permutation(label.size)
    return supports[:, label[hidden]], np.argsort(hidden)


# --- permutations -------------------------------------------------------------------------

CONSTRAINTS = {
    "free": Constraint.free(),
    "segments": Constraint.segments([3, 1, 8]),
    "blocks": Constraint.factored(4, 3, inside="fixed"),
    "equal": Constraint.factored(4, 3, inside="equal"),
    "inside": Constraint.factored(3, 4, blocks=False, inside="separate"),
    "both": Constraint.factored(2, 6),
    "pairs": Constraint.pairs(),
}


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(0, 40))
def test_inverse_and_composition(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    first, second, data = rng.permutation(n), rng.permutation(n), rng.random(n)
    np.testing.assert_array_equal(compose(first, invert(first)), np.arange(n))
    np.testing.assert_array_equal(data[first][second], data[compose(first, second)])
    assert invert(first).dtype == np.int32


@settings(deadline=None)
@given(name=st.sampled_from(list(CONSTRAINTS)), seed=st.integers(0, 10_000))
def test_random_permutations_obey_their_constraint_and_form_a_group(name: str, seed: int) -> None:
    rule = CONSTRAINTS[name]
    first, second = rule.random(12, seed), rule.random(12, seed + 1)
    rule.check(first)
    rule.check(compose(first, second))
    rule.check(invert(first))
    np.testing.assert_array_equal(first, rule.random(12, seed))


@pytest.mark.parametrize("name", [name for name in CONSTRAINTS if name != "free"])
def test_constraints_refuse_what_breaks_them(name: str) -> None:
    rule = CONSTRAINTS[name]
    broken = np.arange(12)
    broken[[0, 11]] = [11, 0]
    with pytest.raises(PermutationError, match="constraint"):
        rule.check(broken)
    with pytest.raises(PermutationError):
        rule.check(np.arange(13))


@pytest.mark.parametrize("bad", [[0, 2], [0, 0], [[0, 1]], [0.0, 1.0], [-1, 0]])
def test_invalid_permutations_are_refused(bad: Any) -> None:
    with pytest.raises(PermutationError):
        as_permutation(bad)
    with pytest.raises(PermutationError, match="length"):
        as_permutation([1, 0], 3)


def test_bad_constraints_are_refused() -> None:
    for lengths in ([], [2, 0], [-1, 3]):
        with pytest.raises(ConfigError):
            Constraint.segments(lengths)
    with pytest.raises(ConfigError):
        Constraint.factored(0, 3)
    with pytest.raises(ConfigError):
        Constraint.factored(2, 3, inside="other")  # type: ignore[arg-type]


def test_permutation_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "perm.json"
    save_permutation(path, [2, 0, 1], {"tag": "x"})
    perm, meta = load_permutation(path)
    np.testing.assert_array_equal(perm, [2, 0, 1])
    assert meta == {"tag": "x"}
    with pytest.raises(OutputError):
        save_permutation(tmp_path / "absent" / "perm.json", [0], {})
    for text in ("", "[]", "{}", '{"format": "icd/perm/v1"}'):
        path.write_text(text)
        with pytest.raises(PermutationError):
            load_permutation(path)
    record = {"format": "icd/perm/v1", "n": 2, "perm": [0, 0], "meta": {}}
    path.write_text(json.dumps(record))
    with pytest.raises(PermutationError):
        load_permutation(path)
    with pytest.raises(PermutationError):
        load_permutation(tmp_path / "absent.json")


# --- planted structure --------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_closed_groups_come_back_exactly(seed: int) -> None:
    mask, truth = grouped_mask([16] * 24, 96, 0.5, seed)
    perm, stats = fit_permutation(accesses=[access(mask)])
    assert stats["U"] == tile_cost([access(mask)], truth) == stats["U_bound"]
    assert stats.winner == "support/16"
    assert stats.stopped_by == "bound"
    assert stats.improved
    # Every tile holds one group: all of its columns have one support.
    tiles = mask[:, perm].reshape(96, 24, 16)
    np.testing.assert_array_equal(tiles.any(axis=2), tiles.all(axis=2))


def test_dead_units_go_last_and_the_rest_is_compact() -> None:
    dead = np.random.default_rng(0).random(300) < 0.5
    mask = np.repeat(~dead[None], 40, axis=0)
    perm, stats = fit_permutation(accesses=[access(mask)])
    kept = int((~dead).sum())
    assert stats.dead == 300 - kept
    np.testing.assert_array_equal(np.sort(perm[:kept]), np.flatnonzero(~dead))
    assert stats["U"] == 40 * -(-kept // 16) == stats["U_bound"]


def test_groups_survive_strays() -> None:
    mask, truth = grouped_mask([16] * 24, 96, 0.5, 3)
    mask |= np.random.default_rng(4).random(mask.shape) < 0.002
    _, stats = fit_permutation(accesses=[access(mask)])
    assert stats["U"] <= tile_cost([access(mask)], truth)


def test_groups_that_do_not_fill_tiles_beat_their_plain_order() -> None:
    sizes = np.random.default_rng(1).integers(10, 31, 30).tolist()
    mask, truth = grouped_mask(sizes, 96, 0.5, 1)
    _, stats = fit_permutation(accesses=[access(mask)])
    assert stats["U"] < 0.95 * tile_cost([access(mask)], truth)


def test_two_kernels_with_different_tiles_are_served_together() -> None:
    mask, truth = grouped_mask([32] * 8, 64, 0.4, 5)
    both = [access(mask[:40], 16), access(mask[40:], 32, weight=3.0)]
    perm, stats = fit_permutation(accesses=both)
    assert stats["U"] == tile_cost(both, truth) == tile_lower_bound(both)
    assert tile_cost(both, perm) == stats["U"]


def test_planted_blocks_of_a_graph_come_back() -> None:
    pytest.importorskip("sknetwork")
    graph = build_w("mock", n=640, blocks=16, density=0.04, noise=0.2, seed=7)
    perm, stats = fit_permutation(graph, k_blocks=16)
    best = modularity(graph, planted_order(640, 7), 16)
    assert stats.objective == "J"
    assert stats.communities == 16
    assert stats["Q"] == pytest.approx(best, abs=1e-9)
    assert stats["Q_null"] < 0.3 < stats["Q_communities"]
    assert modularity(graph, perm, 16) == pytest.approx(best, abs=1e-9)


def test_spectral_order_recovers_a_hidden_band() -> None:
    hidden = np.random.default_rng(2).permutation(200)
    gap = np.abs(np.arange(200)[:, None] - np.arange(200))
    band = ((gap <= 8) & (gap > 0)).astype(np.float32)
    graph = sp.csr_matrix(band[np.ix_(hidden, hidden)])
    place = hidden[starts.fiedler_order(graph)]
    assert np.abs(np.corrcoef(place, np.arange(200))[0, 1]) > 0.999
    incidence = np.array([band[k] + (np.arange(200) == k) for k in range(200)]) > 0
    items = sp.csr_matrix(incidence[:, hidden].T)
    place = hidden[starts.incidence_fiedler_order(items, np.ones(200))]
    assert np.abs(np.corrcoef(place, np.arange(200))[0, 1]) > 0.999


def test_spectral_order_keeps_components_apart() -> None:
    labels = np.random.default_rng(3).integers(0, 4, 60)
    graph = (labels[:, None] == labels).astype(np.float32) - np.eye(60, dtype=np.float32)
    placed = labels[starts.fiedler_order(sp.csr_matrix(graph))]
    assert np.count_nonzero(np.diff(placed)) == 3


def test_remainders_share_tiles_without_splitting_groups() -> None:
    chunks = [np.full(size, k) for k, size in enumerate([10, 9, 6, 7, 8, 8])]
    tiles = np.concatenate(starts.pack_chunks(chunks, 16)).reshape(3, 16)
    assert sorted(len(np.unique(tile)) for tile in tiles) == [2, 2, 2]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    tile=st.integers(1, 8),
    offset=st.integers(0, 7),
    seed=st.integers(0, 100),
)
def test_every_start_is_a_permutation(sizes: list[int], tile: int, offset: int, seed: int) -> None:
    mask, _ = grouped_mask(sizes, 6, 0.4, seed)
    items, weights = starts.stacked_items([access(mask, tile)])
    n = mask.shape[1]
    as_permutation(starts.support_order(items, tile, offset), n)
    as_permutation(starts.norm_order(items, weights), n)
    as_permutation(starts.incidence_fiedler_order(items, weights), n)
    for dense in (True, False):
        order = starts.greedy_order(items, weights, tile, offset=offset, dense_first=dense)
        as_permutation(order, n)
    late = starts.greedy_order(items, weights, tile, deadline=0.0)
    as_permutation(late, n)


# --- properties of the whole --------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 40),
    density=st.floats(0.0, 1.0),
    tile=st.integers(1, 9),
)
def test_never_worse_than_the_start(seed: int, n: int, density: float, tile: int) -> None:
    rng = np.random.default_rng(seed)
    kernels = [access(rng.random((12, n)) < density, tile), access(rng.random((5, n)) < 0.5, 6)]
    start = rng.permutation(n)
    perm, stats = fit_permutation(accesses=kernels, start=start, refine_steps=30)
    before, after = tile_cost(kernels, start), tile_cost(kernels, perm)
    assert after <= before
    assert (stats["U_before"], stats["U"]) == (before, after)
    assert stats.improved == (after < before)
    if not stats.improved:
        np.testing.assert_array_equal(perm, start)
    assert after >= tile_lower_bound(kernels)


@pytest.mark.parametrize("objective", ["C", "Q", "J"])
def test_graph_objectives_improve_and_never_worsen(objective: Any) -> None:
    graph = build_w("mock", n=320, blocks=8, density=0.04, seed=1)
    _, stats = fit_permutation(graph, objective=objective, k_blocks=8, refine_steps=300)
    before, after = stats[f"{objective}_before"], stats[objective]
    assert after > before if objective == "Q" else after < before
    again, second = fit_permutation(
        graph, objective=objective, k_blocks=8, refine_steps=50, start=planted_order(320, 1)
    )
    end, first = second[objective], second[f"{objective}_before"]
    assert end >= first - 1e-12 if objective == "Q" else end <= first + 1e-12
    as_permutation(again, 320)


def test_objectives_from_accesses_form_w() -> None:
    mask, _ = grouped_mask([16] * 6, 24, 0.5, 0)
    _, stats = fit_permutation(accesses=[access(mask)], objective="J")
    assert stats["J"] < stats["J_before"]
    assert stats["U"] < stats["U_before"]


@pytest.mark.parametrize("objective", ["tiles", "J"])
def test_same_seed_same_order(objective: Any) -> None:
    rng = np.random.default_rng(8)
    kernels = [access(rng.random((48, 192)) < 0.1)]
    runs = [
        fit_permutation(accesses=kernels, objective=objective, refine_steps=40, rng_seed=seed)
        for seed in (3, 3, 4)
    ]
    assert all(stats.deterministic for _, stats in runs)
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    assert not np.array_equal(runs[0][0], runs[2][0])


def test_search_improves_on_the_best_start_and_stops_by_steps() -> None:
    kernels = [access(np.random.default_rng(9).random((64, 320)) < 0.15)]
    perm, stats = fit_permutation(accesses=kernels, refine_steps=20)
    assert stats.stopped_by == "steps"
    assert stats.iterations == 20
    assert stats["U"] < min(stats.starts.values())
    assert tile_cost(kernels, perm) == stats["U"]


def test_descent_ends_where_no_swap_helps() -> None:
    rng = np.random.default_rng(10)
    kernels = [access(rng.random((20, 40)) < 0.2, 4), access(rng.random((9, 40)) < 0.3, 8)]
    search = TileSearch(kernels, identity(40), np.zeros(40, dtype=np.int64), 0, 0.0)
    assert search._descend(10_000, float("inf")) == "converged"
    deltas = [search.state.swap_delta(a, b) for a in range(40) for b in range(a)]
    assert min(deltas) >= 0


def test_round_prices_every_swap_exactly() -> None:
    rng = np.random.default_rng(11)
    kernels = [access(rng.random((20, 30)) < 0.3, 4, 1.5), access(rng.random((9, 30)) < 0.3, 6)]
    search = TileSearch(kernels, rng.permutation(30), np.zeros(30, dtype=np.int64), 0, 0.0)
    positions = np.arange(30)
    priced = search._pair_deltas(positions)
    exact = [[search.state.swap_delta(a, b) for b in positions] for a in positions]
    np.testing.assert_allclose(priced, exact, atol=1e-4)


def ticking(monkeypatch: pytest.MonkeyPatch, step: float) -> list[float]:
    """Make every look at the clock cost ``step`` seconds; return the time as a list of one."""
    clock = [100.0]

    def tick() -> float:
        clock[0] += step
        return clock[0]

    monkeypatch.setattr(time, "perf_counter", tick)
    return clock


def test_the_null_is_left_out_when_there_is_no_time() -> None:
    graph = build_w("mock", n=640, blocks=16, density=0.04, seed=7)
    _, stats = fit_permutation(graph, time_budget_s=1e-3, refine_steps=5)
    assert stats["Q_null"] is None
    assert stats.skipped["null"] == "time"


@pytest.mark.parametrize("objective", ["tiles", "C", "Q", "J"])
@pytest.mark.parametrize("fullest", [False, True])
def test_budget_is_kept(monkeypatch: pytest.MonkeyPatch, objective: Any, fullest: bool) -> None:
    mask = sp.csr_matrix(np.random.default_rng(12).random((64, 320)) < 0.1)
    kernels = [TileAccess(mask, 16, padded=fullest)]
    clock = ticking(monkeypatch, 0.01)
    perm, stats = fit_permutation(
        accesses=kernels, objective=objective, time_budget_s=0.5, refine_steps=10**6
    )
    monkeypatch.undo()
    assert clock[0] - 100.0 < 0.55
    assert stats.elapsed_s < 0.55
    assert stats.stopped_by == "time"
    assert not stats.deterministic
    assert stats.improved
    key = "U" if objective == "tiles" else objective
    assert (stats[key] > stats[f"{key}_before"]) == (objective == "Q")
    assert tile_cost(kernels, perm) == stats["U"]


def test_budget_is_kept_on_both_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.random.default_rng(13).random((64, 96)) < 0.1
    clock = ticking(monkeypatch, 0.01)
    rows, cols, stats = fit_rows_columns(mask, 8, 8, time_budget_s=2.0, refine_steps=10**6)
    monkeypatch.undo()
    assert clock[0] - 100.0 < 2.2
    assert not stats.deterministic
    assert block_count(mask, 8, 8, rows, cols) == stats.blocks <= stats.blocks_before


# --- padded accesses: the fullest tile decides ----------------------------------------------


def padded(mask: np.ndarray, tile: int = 16, weight: float = 1.0) -> TileAccess:
    """One kernel that does as many steps for every tile as for the fullest one."""
    return TileAccess(sp.csr_matrix(mask), tile, weight, padded=True)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(1, 40), tile=st.integers(2, 9))
def test_padded_units_are_tiles_times_the_fullest(seed: int, n: int, tile: int) -> None:
    rng = np.random.default_rng(seed)
    kernel = padded(rng.random((12, n)) < 0.3, tile, 2.0)
    start = rng.permutation(n)
    ordered = kernel.incidence.toarray()[:, start]
    loads = [int(ordered[:, at : at + tile].any(axis=1).sum()) for at in range(0, n, tile)]
    assert tile_cost([kernel], start) == 2.0 * len(loads) * max(loads)
    perm, stats = fit_permutation(accesses=[kernel], start=start, refine_steps=20)
    after = tile_cost([kernel], perm)
    assert stats["U"] == after <= stats["U_before"] == tile_cost([kernel], start)
    assert tile_lower_bound([kernel]) <= after <= tile_upper_bound([kernel])


@pytest.mark.parametrize("kind", [LoadState, SmoothState])
def test_padded_states_price_moves_exactly(kind: type[LoadState]) -> None:
    rng = np.random.default_rng(13)
    kernels = [padded(rng.random((20, 30)) < 0.3, 4, 1.5), access(rng.random((9, 30)) < 0.3, 6)]
    state = kind(kernels, rng.permutation(30))
    for _ in range(40):
        a, b = (int(place) for place in rng.integers(30, size=2))
        before, priced = state.cost, state.swap_delta(a, b)
        assert state.swap(a, b) == priced
        assert state.cost == pytest.approx(before + priced)
        fresh = kind(kernels, state.perm)
        assert state.units() == pytest.approx(fresh.units())
        for found, expected in zip(state.loads, fresh.loads, strict=True):
            np.testing.assert_allclose(found, expected)
    if kind is LoadState:
        assert state.cost == pytest.approx(tile_cost(kernels, state.perm))


def test_balanced_round_prices_every_swap_exactly() -> None:
    rng = np.random.default_rng(14)
    kernels = [padded(rng.random((20, 30)) < 0.3, 4, 1.5), access(rng.random((9, 30)) < 0.3, 6)]
    search = BalancedSearch(kernels, rng.permutation(30), np.zeros(30, dtype=np.int64), 0, 0.0)
    positions = np.arange(30)
    exact = [[search.state.swap_delta(a, b) for b in positions] for a in positions]
    np.testing.assert_allclose(search._pair_deltas(positions), exact, rtol=1e-3, atol=1e-2)


def test_balance_beats_the_sum_where_one_list_length_serves_all() -> None:
    mask = np.random.default_rng(15).random((96, 320)) < np.linspace(0.02, 0.2, 320)
    by_sum, _ = fit_permutation(accesses=[access(mask)], refine_steps=200)
    _, stats = fit_permutation(accesses=[padded(mask)], refine_steps=200)
    assert stats["U"] < 0.8 * stats["U_before"]
    assert tile_cost([padded(mask)], by_sum) > 1.2 * stats["U"]


def test_padded_groups_come_back_exactly() -> None:
    rng = np.random.default_rng(16)
    supports = np.argsort(rng.random((96, 24)), axis=0) < 40
    mask = supports[:, rng.permutation(np.repeat(np.arange(24), 16))]
    _, stats = fit_permutation(accesses=[padded(mask)])
    assert stats["U"] == 24 * 40 == stats["U_bound"]
    assert stats.stopped_by == "bound"


def test_joint_objective_prices_padded_accesses() -> None:
    mask = np.random.default_rng(17).random((48, 160)) < np.linspace(0.02, 0.3, 160)
    _, stats = fit_permutation(accesses=[padded(mask)], objective="J", refine_steps=200)
    assert stats["J"] <= stats["J_before"]


def test_weights_of_j_decide_what_it_is() -> None:
    graph = build_w("mock", n=320, blocks=8, density=0.04, seed=1)
    only_c = Weights(1.0, 0.0, 0.0)
    perm, stats = fit_permutation(graph, objective="J", weights=only_c, refine_steps=50)
    assert stats["J"] == stats["C"]
    by_c, _ = fit_permutation(graph, objective="C", refine_steps=50)
    np.testing.assert_array_equal(perm, by_c)


# --- determinism across processes -----------------------------------------------------------

_FIT = """
import hashlib
import numpy as np
import scipy.sparse as sp
from icd_tvm.core.access_graph import build_w
from icd_tvm.core.cost import TileAccess
from icd_tvm.core.solver import fit_permutation
mask = sp.csr_matrix(np.random.default_rng(0).random((384, 768)) < 0.1)
digest = hashlib.sha256()
for padded in (False, True):
    kernel = TileAccess(mask, 16, padded=padded)
    order, stats = fit_permutation(accesses=[kernel], refine_steps=40, rng_seed=5)
    assert stats.deterministic
    digest.update(order.tobytes())
graph = build_w("mock", n=640, blocks=16, density=0.04, seed=7)
digest.update(fit_permutation(graph, refine_steps=200, rng_seed=5)[0].tobytes())
print(digest.hexdigest())
"""


def test_one_order_on_one_and_two_threads_and_after_a_restart() -> None:
    found = []
    for threads in ("1", "2", "1"):
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        environment = {**os.environ, **dict.fromkeys(names, threads)}
        run = subprocess.run(
            [sys.executable, "-c", _FIT],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(run.stdout.strip())
    assert len(found[0]) == 64
    assert len(set(found)) == 1


# --- no opportunity -----------------------------------------------------------------------

HOPELESS = {
    "dense": (np.ones((8, 64), dtype=np.bool_), 16, "every window touches all"),
    "equal supports": (np.repeat(np.arange(8) < 4, 64).reshape(8, 64), 16, "all, one or none"),
    "tile of one": (np.random.default_rng(0).random((8, 64)) < 0.5, 1, "one index"),
    "in order": (np.kron(np.eye(4, dtype=bool), np.ones((2, 16), bool)), 16, "lower bound"),
    "empty": (np.zeros((8, 64), dtype=np.bool_), 16, "every window touches all"),
}


@pytest.mark.parametrize("name", HOPELESS)
def test_hopeless_axes_are_left_alone_with_a_reason(name: str) -> None:
    mask, tile, reason = HOPELESS[name]
    perm, stats = fit_permutation(accesses=[access(mask, tile)])
    np.testing.assert_array_equal(perm, np.arange(64))
    assert stats.no_opportunity
    assert not stats.improved
    assert reason in stats.reason
    assert stats.iterations == 0


@pytest.mark.parametrize("name", HOPELESS)
@pytest.mark.parametrize("objective", ["tiles", "C", "Q", "J"])
def test_without_improvement_the_given_start_comes_back(name: str, objective: Any) -> None:
    mask, tile, _ = HOPELESS[name]
    start = np.arange(64)[::-1] if name != "in order" else np.roll(np.arange(64), 16)
    perm, stats = fit_permutation(
        accesses=[access(mask, tile)], objective=objective, start=start, refine_steps=5
    )
    if objective == "tiles":
        assert not stats.improved
    assert stats.improved == (not np.array_equal(perm, start))
    if not stats.improved:
        assert (stats.U_before, stats.J_before) == (stats.U, stats.J)


def test_an_order_of_equal_cost_does_not_replace_the_start() -> None:
    # Unused indices could go last at the same cost: the start stays all the same.
    mask = np.zeros((4, 64), dtype=np.bool_)
    mask[:, 16:32] = np.eye(4, 16, dtype=np.bool_)
    mask[0, 16:32] = True
    perm, stats = fit_permutation(accesses=[access(mask)])
    np.testing.assert_array_equal(perm, np.arange(64))
    assert not stats.improved
    assert stats.winner == "start"


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), objective=st.sampled_from(["tiles", "C", "Q", "J"]))
def test_more_steps_are_never_worse(seed: int, objective: Any) -> None:
    kernels = [access(np.random.default_rng(seed).random((16, 48)) < 0.2, 8)]
    key = "U" if objective == "tiles" else objective
    found = [
        fit_permutation(accesses=kernels, objective=objective, refine_steps=steps)[1][key]
        for steps in (0, 5, 40)
    ]
    assert found == sorted(found, reverse=objective != "Q")


def test_stability_keeps_the_start_and_alignment_joins_runs() -> None:
    rng = np.random.default_rng(18)
    kernels = [access(rng.random((12, 48)) < 0.3, 8)]
    fits = {
        name: fit_permutation(accesses=kernels, objective="J", refine_steps=300, weights=weights)
        for name, weights in {
            "free": Weights(),
            "held": Weights(s=1.0),
            "fixed": Weights(s=100.0),
            "aligned": Weights(0.0, 0.0, 0.0, a=1.0),
        }.items()
    }
    shifts = [fits[name][1]["S"] for name in ("free", "held", "fixed")]
    assert shifts[0] > shifts[1] > shifts[2] == 0.0
    np.testing.assert_array_equal(fits["fixed"][0], np.arange(48))
    aligned = fits["aligned"][1]
    assert aligned["A"] == aligned["J"] < aligned["A_before"]
    assert fits["free"][1]["A"] is None


def test_uniform_graph_is_hopeless() -> None:
    graph = sp.csr_matrix(np.ones((20, 20), np.float32) - np.eye(20, dtype=np.float32))
    perm, stats = fit_permutation(graph)
    np.testing.assert_array_equal(perm, np.arange(20))
    assert stats.no_opportunity
    assert "uniform" in stats.reason


# --- constraints --------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(name=st.sampled_from(list(CONSTRAINTS)), seed=st.integers(0, 500), tile=st.integers(2, 6))
def test_constraints_hold_and_nothing_gets_worse(name: str, seed: int, tile: int) -> None:
    rule = CONSTRAINTS[name]
    rng = np.random.default_rng(seed)
    kernels = [access(rng.random((10, 12)) < 0.3, tile)]
    start = rule.random(12, seed)
    perm, stats = fit_permutation(accesses=kernels, start=start, constraint=rule, refine_steps=20)
    rule.check(perm)
    assert tile_cost(kernels, perm) == stats["U"] <= stats["U_before"] == tile_cost(kernels, start)


def test_segments_recover_groups_in_each_segment() -> None:
    left, right = grouped_mask([16] * 4, 48, 0.5, 1)[0], grouped_mask([16] * 6, 48, 0.5, 2)[0]
    mask = np.concatenate([left, right], axis=1)
    _, stats = fit_permutation(accesses=[access(mask)], constraint=Constraint.segments([64, 96]))
    assert stats["U"] == stats["U_bound"]


def test_pairs_recover_groups_of_pairs() -> None:
    half, _ = grouped_mask([16] * 4, 48, 0.5, 3)
    mask = np.concatenate([half, half[::-1]], axis=1)
    perm, stats = fit_permutation(accesses=[access(mask)], constraint=Constraint.pairs())
    assert stats["U"] == stats["U_bound"]
    np.testing.assert_array_equal(perm[64:], perm[:64] + 64)


def test_equal_order_inside_all_heads_recovers_groups() -> None:
    head, _ = grouped_mask([16] * 4, 32, 0.5, 4)
    rng = np.random.default_rng(5)
    mask = np.concatenate([head[rng.permutation(32)] for _ in range(3)], axis=1)
    rule = Constraint.factored(3, 64, blocks=False, inside="equal")
    _, stats = fit_permutation(accesses=[access(mask)], constraint=rule)
    assert stats["U"] == stats["U_bound"]


def test_blocks_move_to_share_larger_tiles() -> None:
    supports = np.random.default_rng(6).random((32, 6)) < 0.4
    order = np.random.default_rng(7).permutation(np.repeat(np.arange(6), 4))
    mask = np.repeat(supports[:, order], 8, axis=1)
    rule = Constraint.factored(24, 8, inside="fixed")
    perm, stats = fit_permutation(accesses=[access(mask, 32)], constraint=rule)
    rule.check(perm)
    assert stats["U"] == stats["U_bound"]


# --- rows and columns ---------------------------------------------------------------------


def test_hidden_blocks_come_back_on_both_axes() -> None:
    rng = np.random.default_rng(0)
    keep = rng.random((12, 20)) < 0.5
    mask = np.kron(keep, np.ones((8, 16), dtype=np.bool_)).astype(np.bool_)
    mask = mask[rng.permutation(96)][:, rng.permutation(320)]
    rows, cols, stats = fit_rows_columns(mask, 8, 16)
    assert stats.blocks == keep.sum() == block_count(mask, 8, 16, rows, cols)
    assert stats.blocks_before > stats.blocks
    assert stats.improved


def test_joint_solve_obeys_constraints_and_never_worsens() -> None:
    mask = np.random.default_rng(1).random((24, 36)) < 0.2
    rule = Constraint.segments([12, 24])
    rows, cols, stats = fit_rows_columns(
        mask, 4, 6, col_constraint=rule, row_constraint=Constraint.pairs(), refine_steps=20
    )
    rule.check(cols)
    Constraint.pairs().check(rows)
    assert block_count(mask, 4, 6, rows, cols) == stats.blocks <= stats.blocks_before
    again = fit_rows_columns(
        mask, 4, 6, col_constraint=rule, row_constraint=Constraint.pairs(), refine_steps=20
    )
    np.testing.assert_array_equal(cols, again[1])


def test_bad_masks_are_refused() -> None:
    with pytest.raises(ShapeError):
        fit_rows_columns(np.ones(4, dtype=np.bool_), 2, 2)
    with pytest.raises(ShapeError):
        fit_rows_columns(np.ones((4, 4)), 2, 2)  # type: ignore[arg-type]
    with pytest.raises(ShapeError):
        fit_rows_columns(np.ones((0, 4), dtype=np.bool_), 2, 2)
    with pytest.raises(ConfigError):
        fit_rows_columns(np.ones((4, 4), dtype=np.bool_), 0, 2)
    with pytest.raises(PermutationError):
        fit_rows_columns(
            np.ones((4, 4), dtype=np.bool_), 2, 2, row_constraint=Constraint.segments([3])
        )


# --- bad input ----------------------------------------------------------------------------

MASK = np.eye(6, 8) > 0
BAD_FITS: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "nothing": ({}, ConfigError),
    "objective": ({"accesses": [access(MASK)], "objective": "U"}, ConfigError),
    "budget": ({"accesses": [access(MASK)], "time_budget_s": 0.0}, ConfigError),
    "budget nan": ({"accesses": [access(MASK)], "time_budget_s": float("nan")}, ConfigError),
    "steps": ({"accesses": [access(MASK)], "refine_steps": -1}, ConfigError),
    "tile": ({"accesses": [access(MASK)], "tile": 0}, ConfigError),
    "k_blocks": ({"accesses": [access(MASK)], "k_blocks": 0}, ConfigError),
    "start": ({"accesses": [access(MASK)], "start": [0, 1]}, PermutationError),
    "start rule": (
        {
            "accesses": [access(MASK)],
            "start": np.arange(8)[::-1],
            "constraint": Constraint.segments([4, 4]),
        },
        PermutationError,
    ),
    "rule": (
        {"accesses": [access(MASK)], "constraint": Constraint.segments([4])},
        PermutationError,
    ),
    "lengths": ({"accesses": [access(MASK), access(MASK[:, :7])]}, ShapeError),
    "W length": ({"W": sp.csr_matrix((7, 7)), "accesses": [access(MASK)]}, ShapeError),
    "W square": ({"W": sp.csr_matrix((7, 6))}, ShapeError),
    "W nan": ({"W": sp.csr_matrix(np.full((2, 2), np.nan))}, NonFiniteError),
    "W sign": ({"W": sp.csr_matrix(np.array([[0, -1.0], [-1.0, 0]]))}, ConfigError),
}


@pytest.mark.parametrize("name", BAD_FITS)
def test_bad_input_is_refused(name: str) -> None:
    arguments, error = BAD_FITS[name]
    with pytest.raises(error):
        fit_permutation(**arguments)


def test_stats_are_a_mapping_that_json_can_hold() -> None:
    _, stats = fit_permutation(accesses=[access(MASK, 4)])
    assert stats["U"] == stats["U"]
    assert json.loads(json.dumps(stats.to_dict()))["U"] == stats["U"]
    with pytest.raises(KeyError):
        stats["nothing"]
