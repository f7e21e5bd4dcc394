"""Costs of orders, their incremental changes, and the hardware model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from icd_tvm.core import hardware
from icd_tvm.core.access_graph import build_w
from icd_tvm.core.combined_cost import Weights, combined_cost, displacement, misalignment
from icd_tvm.core.cost import (
    TileAccess,
    block_labels,
    distance_cost,
    incidence_distance,
    incidence_modularity,
    label_modularity,
    modularity,
    predicted_time,
    shuffled_graph,
    tile_cost,
    tile_lower_bound,
    tile_upper_bound,
)
from icd_tvm.core.graph_state import GraphObjective, GraphState
from icd_tvm.core.hardware import A100, H200, Hardware
from icd_tvm.core.tile_state import TileState, moved_segment
from icd_tvm.errors import ConfigError, IcdError, NonFiniteError, PermutationError, ShapeError


def random_accesses(seed: int, n: int) -> list[TileAccess]:
    rng = np.random.default_rng(seed)
    shares = rng.random(2)
    return [
        TileAccess(sp.csr_matrix(rng.random((7, n)) < shares[0]), 4, 1.5, "a"),
        TileAccess(sp.csr_matrix(rng.random((5, n)) < shares[1]), 6, 0.25, "b", rng.random(5) * 10),
    ]


def brute_units(access: TileAccess, perm: np.ndarray) -> float:
    """Sum over windows and tiles, straight from the definition."""
    dense = access.incidence.toarray()[:, perm]
    total = 0.0
    for row, weight in zip(dense, access.unit_weights, strict=True):
        for start in range(0, access.n, access.tile):
            total += weight * bool(row[start : start + access.tile].any())
    return total


cases = st.tuples(st.integers(0, 10_000), st.integers(2, 23))


@settings(max_examples=40, deadline=None)
@given(case=cases)
def test_tile_cost_is_the_definition(case: tuple[int, int]) -> None:
    seed, n = case
    accesses = random_accesses(seed, n)
    perm = np.random.default_rng(seed + 1).permutation(n)
    cost = tile_cost(accesses, perm)
    assert cost == pytest.approx(sum(brute_units(a, perm) for a in accesses))
    assert tile_lower_bound(accesses) <= cost + 1e-9
    assert cost <= tile_upper_bound(accesses) + 1e-9


def test_tile_cost_in_blocks_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    accesses = random_accesses(1, 20)
    whole = tile_cost(accesses, np.arange(20)[::-1])
    monkeypatch.setattr("icd_tvm.core.cost._BITMAP_CAP", 10)
    assert tile_cost(accesses, np.arange(20)[::-1]) == whole


@settings(max_examples=60, deadline=None)
@given(case=cases, data=st.data())
def test_moves_change_the_cost_by_their_delta(case: tuple[int, int], data: st.DataObject) -> None:
    seed, n = case
    accesses = random_accesses(seed, n)
    state = TileState(accesses, np.random.default_rng(seed).permutation(n))
    for _ in range(4):
        before = state.cost
        if data.draw(st.booleans()):
            a, b = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, n - 1))
            delta = state.swap_delta(a, b)
            done = state.swap(a, b)
        else:
            length = data.draw(st.integers(1, n))
            start, dest = (data.draw(st.integers(0, n - length)) for _ in range(2))
            delta = state.move_delta(start, length, dest)
            done = state.move(start, length, dest)
        assert sorted(state.perm) == list(range(n))
        assert delta == pytest.approx(done)
        assert state.cost == pytest.approx(tile_cost(accesses, state.perm), abs=1e-6)
        assert state.cost - before == pytest.approx(delta, abs=1e-6)


def test_segment_move_shifts_what_lies_between() -> None:
    positions, items = moved_segment(np.arange(8, dtype=np.int32), 1, 2, 4)
    moved = np.arange(8)
    moved[positions] = items
    np.testing.assert_array_equal(moved, [0, 3, 4, 5, 1, 2, 6, 7])
    back_positions, back = moved_segment(moved.astype(np.int32), 4, 2, 1)
    moved[back_positions] = back
    np.testing.assert_array_equal(moved, np.arange(8))
    for bad in ((-1, 2, 0), (7, 2, 0), (0, 2, 7), (0, 0, 0)):
        with pytest.raises(ConfigError):
            moved_segment(np.arange(8, dtype=np.int32), *bad)


def dense_distance(graph: np.ndarray, perm: np.ndarray, window: int) -> float:
    place = np.argsort(perm)
    gap = np.minimum(np.abs(place[:, None] - place), window)
    return float((graph * gap).sum() / (window * graph.sum()))


def dense_modularity(graph: np.ndarray, labels: np.ndarray, gamma: float) -> float:
    degree, total = graph.sum(axis=1), graph.sum()
    same = labels[:, None] == labels
    return float(((graph / total - gamma * np.outer(degree, degree) / total**2) * same).sum())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), gamma=st.floats(0.1, 3.0), window=st.integers(1, 30))
def test_distance_and_modularity_are_their_definitions(
    seed: int, gamma: float, window: int
) -> None:
    accesses = random_accesses(seed, 21)
    graph = build_w("tir", accesses=accesses)
    if graph.nnz == 0:
        return
    perm = np.random.default_rng(seed).permutation(21)
    labels = block_labels(21, 5)[np.argsort(perm)]
    dense = graph.toarray().astype(np.float64)
    assert distance_cost(graph, perm, window) == pytest.approx(dense_distance(dense, perm, window))
    assert incidence_distance(accesses, perm, window) == pytest.approx(
        dense_distance(dense, perm, window), abs=1e-6
    )
    expected = dense_modularity(dense, labels, gamma)
    assert modularity(graph, perm, 5, gamma) == pytest.approx(expected, abs=1e-9)
    assert incidence_modularity(accesses, perm, 5, gamma) == pytest.approx(expected, abs=1e-6)


def test_modularity_agrees_with_networkx() -> None:
    networkx = pytest.importorskip("networkx")
    graph = build_w("mock", n=320, blocks=8, density=0.04, seed=0)
    labels = block_labels(320, 8)
    sets = [set(np.flatnonzero(labels == k).tolist()) for k in range(8)]
    net = networkx.from_scipy_sparse_array(graph)
    for gamma in (1.0, 0.7):
        theirs = networkx.community.modularity(net, sets, resolution=gamma)
        assert label_modularity(graph, labels, gamma) == pytest.approx(theirs, abs=1e-6)


def test_shuffled_graph_is_a_null_for_modularity() -> None:
    graph = build_w("mock", n=640, blocks=16, density=0.04, noise=0.1, seed=0, shuffle=False)
    null = shuffled_graph(graph, seed=1)
    assert abs(null - null.T).max() == 0
    assert not null.diagonal().any()
    assert null.data.sum() == pytest.approx(graph.data.sum(), rel=0.02)
    assert modularity(graph, np.arange(640), 16) > 0.8
    assert abs(modularity(null, np.arange(640), 16)) < 0.02


def test_empty_graphs_cost_nothing() -> None:
    empty = sp.csr_matrix((4, 4), dtype=np.float32)
    assert distance_cost(empty, np.arange(4)) == 0.0
    assert modularity(empty, np.arange(4), 2) == 0.0
    blank = TileAccess(sp.csr_matrix((3, 4), dtype=np.bool_), 2)
    assert tile_cost([blank], np.arange(4)) == 0.0
    assert incidence_distance([blank], np.arange(4)) == 0.0
    assert incidence_modularity([blank], np.arange(4), 2) == 0.0


def test_combined_cost_renormalises_what_is_there() -> None:
    assert combined_cost(0.4, 0.2, 0.5) == pytest.approx(0.25 * 0.4 + 0.25 * 0.8 + 0.5 * 0.5)
    assert combined_cost(0.4, 0.2, None) == pytest.approx((0.4 + 0.8) / 2)
    assert combined_cost(None, None, None) == 0.0
    assert combined_cost(0.4, 0.9, 0.1, Weights(1.0, 0.0, 0.0)) == pytest.approx(0.4)
    even = Weights(1.0, 1.0, 1.0, 1.0, 1.0)
    joint = combined_cost(0.5, 0.5, 0.5, even, misaligned=0.1, displaced=0.4)
    assert joint == pytest.approx((0.5 * 3 + 0.1 + 0.4) / 5)
    # Neither term has a weight unless it is given one.
    plain = combined_cost(0.4, 0.2, 0.5)
    assert combined_cost(0.4, 0.2, 0.5, misaligned=0.9, displaced=0.9) == plain
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(ConfigError, match="weights of J"):
            Weights(a=bad)


def test_runs_off_a_border_count_against_alignment() -> None:
    touched = np.array([[1, 1, 0, 1, 1, 0, 0, 1], [0, 1, 1, 1, 1, 1, 1, 0]]) > 0
    access = TileAccess(sp.csr_matrix(touched), 8, counts=np.array([1.0, 2.0]), lanes=4)
    # Runs begin at 0, 3 and 7, and at 1; only 0 is a border. Touches: 5 + 2 * 6.
    assert misalignment([access], np.arange(8)) == pytest.approx((2 + 2) / 17)
    # By lines of one element every run begins on a border.
    assert misalignment([replace(access, lanes=1)], np.arange(8)) == 0.0
    # By default the tile is the line: nothing begins inside one that is touched as a whole.
    whole = TileAccess(sp.csr_matrix(np.repeat(touched, 4, axis=1)), 4)
    assert misalignment([whole], np.arange(32)) == 0.0
    with pytest.raises(ShapeError):
        misalignment([], [])


def brute_misalignment(accesses: list[TileAccess], perm: np.ndarray) -> float:
    """Straight from the definition."""
    runs = touches = 0.0
    for access in accesses:
        dense = access.incidence.toarray()[:, perm]
        for row, weight in zip(dense, access.unit_weights, strict=True):
            touches += weight * row.sum()
            begins = [p for p in range(access.n) if row[p] and (p == 0 or not row[p - 1])]
            runs += weight * sum(p % access.alignment != 0 for p in begins)
    return runs / touches if touches else 0.0


@settings(max_examples=30, deadline=None)
@given(case=cases, lanes=st.integers(0, 7))
def test_misalignment_and_displacement_are_their_definitions(
    case: tuple[int, int], lanes: int
) -> None:
    seed, n = case
    accesses = [replace(a, lanes=lanes) for a in random_accesses(seed, n)]
    rng = np.random.default_rng(seed)
    perm, reference = rng.permutation(n), rng.permutation(n)
    assert misalignment(accesses, perm) == pytest.approx(brute_misalignment(accesses, perm))
    place, old = np.argsort(perm), np.argsort(reference)
    assert displacement(perm, reference) == pytest.approx(np.abs(place - old).sum() / (n * n // 2))
    assert displacement(perm, perm) == 0.0
    assert displacement(np.arange(n)[::-1]) == 1.0
    assert 0.0 <= displacement(perm) <= 1.0


def test_displacement_needs_two_permutations_of_one_length() -> None:
    with pytest.raises(PermutationError):
        displacement(np.arange(4), np.arange(5))
    assert displacement([0]) == 0.0


OBJECTIVES = {
    "C": ("C", Weights()),
    "Q": ("Q", Weights()),
    "J": ("J", Weights()),
    "A": ("J", Weights(0.0, 0.0, 0.0, a=1.0)),
    "S": ("J", Weights(0.0, 0.0, 0.0, s=1.0)),
    "all": ("J", Weights(0.1, 0.2, 0.3, a=0.4, s=0.5)),
}


@settings(max_examples=60, deadline=None)
@given(case=cases, name=st.sampled_from(list(OBJECTIVES)), lanes=st.integers(0, 5), data=st.data())
def test_moves_change_the_graph_objective_by_their_delta(
    case: tuple[int, int], name: str, lanes: int, data: st.DataObject
) -> None:
    seed, n = case
    accesses = [replace(a, lanes=lanes) for a in random_accesses(seed, n)]
    accesses[0] = replace(accesses[0], padded=True)
    graph = build_w("tir", accesses=accesses)
    objective = GraphObjective.named(
        OBJECTIVES[name][0], graph, accesses, min(4, n), 3, OBJECTIVES[name][1]
    )
    state = GraphState(objective, np.random.default_rng(seed).permutation(n))
    for _ in range(4):
        before = objective.cost(state.perm)
        if data.draw(st.booleans()):
            a, b = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, n - 1))
            delta = state.swap_delta(a, b)
            done = state.swap(a, b)
        else:
            length = data.draw(st.integers(1, n))
            start, dest = (data.draw(st.integers(0, n - length)) for _ in range(2))
            delta = state.move_delta(start, length, dest)
            done = state.move(start, length, dest)
        assert sorted(state.perm) == list(range(n))
        assert delta == pytest.approx(done, abs=1e-9)
        assert objective.cost(state.perm) - before == pytest.approx(delta, abs=1e-9)


BAD_ACCESSES: dict[str, tuple[dict[str, object], type[IcdError]]] = {
    "lanes": ({"lanes": -1}, ConfigError),
    "tile": ({"tile": 0}, ConfigError),
    "weight sign": ({"weight": -1.0}, ConfigError),
    "weight nan": ({"weight": np.nan}, NonFiniteError),
    "counts shape": ({"counts": np.ones(2)}, ShapeError),
    "counts nan": ({"counts": np.array([1.0, np.nan, 1.0])}, NonFiniteError),
    "counts sign": ({"counts": np.array([1.0, -1.0, 1.0])}, ConfigError),
}


@pytest.mark.parametrize("name", BAD_ACCESSES)
def test_bad_accesses_are_refused(name: str) -> None:
    change, error = BAD_ACCESSES[name]
    with pytest.raises(error):
        TileAccess(**{"incidence": sp.csr_matrix(np.eye(3, 4) > 0), "tile": 2, **change})  # type: ignore[arg-type]


def test_bad_cost_arguments_are_refused() -> None:
    access = TileAccess(sp.csr_matrix(np.eye(3, 4) > 0), 2)
    wider = TileAccess(sp.csr_matrix(np.eye(3, 5) > 0), 2)
    with pytest.raises(ShapeError):
        tile_cost([access, wider], np.arange(4))
    with pytest.raises(PermutationError):
        tile_cost([access], np.arange(5))
    with pytest.raises(PermutationError):
        tile_cost([access], [0, 1, 1, 2])
    with pytest.raises(ConfigError):
        distance_cost(sp.csr_matrix((4, 4)), np.arange(4), 0)
    with pytest.raises(ConfigError):
        block_labels(4, 5)
    with pytest.raises(ConfigError, match="objective"):
        GraphObjective.named("U", sp.csr_matrix((4, 4)), [], 2, 3)


def test_predicted_time_follows_the_roofline() -> None:
    machine = Hardware("m", 64, 64, (100, 1000), (50.0, 20.0), 10.0, 8.0, "test")
    assert predicted_time(10, 4.0, 1.0, machine) == 5.0
    assert predicted_time(100, 0.1, 1.0, machine) == 2.0
    assert predicted_time(500, 0.01, 1.0, machine) == 25.0
    assert predicted_time(2000, 0.01, 1.0, machine) == 200.0
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(ConfigError):
            predicted_time(bad, 1.0, 1.0, machine)


def test_known_gpus_are_consistent() -> None:
    for gpu in (H200, A100):
        assert gpu.bandwidth(1 << 20) > gpu.bandwidth(1 << 30) == gpu.dram_bandwidth
        assert gpu.source
    with pytest.raises(ConfigError):
        Hardware("m", 64, 64, (100,), (1.0, 2.0), 1.0, 1.0, "")
    with pytest.raises(ConfigError):
        Hardware("m", 64, 64, (100,), (0.0,), 1.0, 1.0, "")
    with pytest.raises(ConfigError):
        Hardware("m", 64, 64, (100, 50), (1.0, 1.0), 1.0, 1.0, "")


def test_host_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = hardware.host(tmp_path / "cache")
    rates = [*first.cache_bandwidth, first.dram_bandwidth]
    assert rates == sorted(rates, reverse=True)

    def refuse(name: str) -> Hardware:
        raise AssertionError("measured twice")

    monkeypatch.setattr(hardware, "_measure", refuse)
    assert hardware.host(tmp_path / "cache") == first
    monkeypatch.setattr(hardware, "_measure", lambda name: A100)
    path = tmp_path / "cache" / "hardware.json"
    for broken in ("", "[]", "{}", json.dumps({"format": "icd/hardware/v1", "name": "other"})):
        path.write_text(broken)
        assert hardware.host(tmp_path / "cache") == A100
