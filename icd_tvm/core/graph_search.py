"""Local search on the graph objectives C, Q and J, with changes priced edge by edge."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from icd_tvm.core.balance import LoadState
from icd_tvm.core.cost import (
    DEFAULT_WEIGHTS,
    Csr,
    TileAccess,
    Weights,
    block_labels,
    combined_cost,
    distance_cost,
    modularity,
    tile_cost,
    tile_upper_bound,
)
from icd_tvm.core.permutation import Perm, as_permutation, invert
from icd_tvm.core.search import SearchResult
from icd_tvm.errors import ConfigError

Scores = tuple[float | None, float | None, float | None]


@dataclass(frozen=True)
class GraphObjective:
    """J, or one of its terms: C, 1 - Q and U / U_max weighed as ``weights`` says.

    Attributes
    ----------
    graph : csr_matrix of float, shape [n, n]
        W: symmetric, non-negative, zero diagonal.
    accesses : sequence of TileAccess
        For the U term; empty drops it.
    blocks : int
        Number of equal contiguous blocks of Q.
    window : int
        Distance at which C saturates.
    weights : Weights
    """

    graph: Csr
    accesses: Sequence[TileAccess]
    blocks: int
    window: int
    weights: Weights

    @classmethod
    def named(
        cls,
        name: str,
        graph: Csr,
        accesses: Sequence[TileAccess],
        blocks: int,
        window: int,
        weights: Weights = DEFAULT_WEIGHTS,
    ) -> GraphObjective:
        """Return the objective "C", "Q" or "J" of ``weights``; ConfigError for another name."""
        table = {"C": Weights(1.0, 0.0, 0.0), "Q": Weights(0.0, 1.0, 0.0), "J": weights}
        if name not in table:
            raise ConfigError(f"objective={name!r} is unknown", "tiles, C, Q or J")
        return cls(graph, accesses if name == "J" else (), blocks, window, table[name])

    def scores(self, perm: ArrayLike) -> Scores:
        """Return C, Q and U / U_max of an order; a term that is not there is None."""
        top = tile_upper_bound(self.accesses)
        return (
            distance_cost(self.graph, perm, self.window),
            modularity(self.graph, perm, self.blocks),
            tile_cost(self.accesses, perm) / top if top else None,
        )

    def cost(self, perm: ArrayLike) -> float:
        """Return the value to minimise."""
        return combined_cost(*self.scores(perm), self.weights)


class GraphState:
    """An order and the change of its objective under swaps, O(degree) each.

    Parameters
    ----------
    objective : GraphObjective
    perm : array_like of int, shape [n]
        Copied.
    """

    def __init__(self, objective: GraphObjective, perm: ArrayLike) -> None:
        graph = objective.graph
        self.objective = objective
        self.perm: Perm = as_permutation(perm, graph.shape[0]).copy()
        self.position = invert(self.perm).astype(np.int64)
        self.labels = block_labels(self.perm.size, objective.blocks)
        self.degree = np.asarray(graph @ np.ones(graph.shape[0]))
        self.total = float(self.degree.sum())
        self.block_degree = np.bincount(
            self.labels[self.position], self.degree, minlength=objective.blocks
        )
        self.top = tile_upper_bound(objective.accesses)
        self.tiles = LoadState(objective.accesses, perm) if self.top else None

    def swap_delta(self, a: int, b: int) -> float:
        """Return the change of the objective if positions ``a`` and ``b`` exchanged items."""
        weights = self.objective.weights
        present = weights.c + weights.q + (weights.u if self.tiles else 0.0)
        change = 0.0
        if self.total:
            distance, inside = self._edges(a, b)
            null = self._null(a, b)
            change = weights.c * distance - weights.q * (inside - null)
        if self.tiles:
            change += weights.u * self.tiles.swap_delta(a, b) / self.top
        return change / present if present else 0.0

    def _edges(self, a: int, b: int) -> tuple[float, float]:
        window = self.objective.window
        distance, inside = 0.0, 0.0
        for here, there in ((a, b), (b, a)):
            neighbours, weight = self._neighbours(here, there)
            place = self.position[neighbours]
            far = np.minimum(np.abs(there - place), window)
            near = np.minimum(np.abs(here - place), window)
            distance += float(weight @ (far - near))
            label = self.labels[place]
            gained = (label == self.labels[there]).astype(np.float64)
            inside += float(weight @ (gained - (label == self.labels[here])))
        return 2 * distance / (window * self.total), 2 * inside / self.total

    def _neighbours(
        self, position: int, skip: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        graph, item = self.objective.graph, self.perm[position]
        cells = slice(graph.indptr[item], graph.indptr[item + 1])
        neighbours = graph.indices[cells].astype(np.int64)
        keep = neighbours != self.perm[skip]
        return neighbours[keep], graph.data[cells][keep].astype(np.float64)

    def _null(self, a: int, b: int) -> float:
        first, second = self.labels[a], self.labels[b]
        if first == second:
            return 0.0
        shift = self.degree[self.perm[b]] - self.degree[self.perm[a]]
        gap = self.block_degree[first] - self.block_degree[second]
        return float(2 * shift * (gap + shift)) / self.total**2

    def swap(self, a: int, b: int) -> None:
        """Exchange the items at positions ``a`` and ``b``."""
        if self.tiles:
            self.tiles.swap(a, b)
        shift = self.degree[self.perm[b]] - self.degree[self.perm[a]]
        self.block_degree[self.labels[a]] += shift
        self.block_degree[self.labels[b]] -= shift
        self.perm[[a, b]] = self.perm[[b, a]]
        self.position[self.perm[[a, b]]] = [a, b]


def graph_search(
    objective: GraphObjective,
    perm: Perm,
    classes: NDArray[np.int64],
    *,
    seed: int,
    steps: int,
    deadline: float,
) -> SearchResult:
    """Try ``steps`` swaps and keep those that lower the objective.

    One proposal in two moves an index next to a random neighbour of it in the graph; the others
    are uniform. Stops early at ``deadline`` (``time.perf_counter``). Monotone.

    Parameters
    ----------
    objective : GraphObjective
    perm : int32[n]
        Where to start.
    classes : int64[n]
        Class of each position; indices move between positions of one class only.
    seed, steps : int
    deadline : float
    """
    state, rng = GraphState(objective, perm), np.random.default_rng(seed)
    n, reason, step = perm.size, "steps", 0
    for step in range(steps):
        if time.perf_counter() >= deadline:
            reason = "time"
            break
        a = int(rng.integers(n))
        b = _partner(state, a, rng) if step % 2 else int(rng.integers(n))
        if a != b and classes[a] == classes[b] and state.swap_delta(a, b) < -1e-12:
            state.swap(a, b)
    return SearchResult(state.perm, objective.cost(state.perm), step, reason)


def _partner(state: GraphState, a: int, rng: np.random.Generator) -> int:
    graph, item = state.objective.graph, state.perm[a]
    low, high = int(graph.indptr[item]), int(graph.indptr[item + 1])
    if low == high:
        return a
    near = int(state.position[graph.indices[rng.integers(low, high)]])
    reach = state.objective.window
    return int(np.clip(near + rng.integers(-reach, reach + 1), 0, state.perm.size - 1))
