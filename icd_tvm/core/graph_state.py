"""The objectives C, Q and J of a changing order, with moves priced edge by edge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from icd_tvm.core.balance import LoadState
from icd_tvm.core.combined_cost import (
    DEFAULT_WEIGHTS,
    Weights,
    combined_cost,
    displacement,
    misalignment,
)
from icd_tvm.core.cost import (
    Csr,
    TileAccess,
    block_labels,
    distance_cost,
    modularity,
    tile_cost,
    tile_upper_bound,
)
from icd_tvm.core.permutation import Perm, as_permutation, invert
from icd_tvm.core.tile_state import Moves
from icd_tvm.errors import ConfigError


@dataclass(frozen=True)
class GraphObjective:
    """J, or one of its terms: C, 1 - Q, U / U_max, A and S weighed as ``weights`` says.

    Attributes
    ----------
    graph : csr_matrix of float, shape [n, n]
        W: symmetric, non-negative, zero diagonal.
    accesses : sequence of TileAccess
        For the terms U and A; empty drops them.
    blocks : int
        Number of equal contiguous blocks of Q.
    window : int
        Distance at which C saturates.
    weights : Weights
        S is measured from the identity: the start, in the solver.
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

    def cost(self, perm: ArrayLike) -> float:
        """Return the value to minimise."""
        top = tile_upper_bound(self.accesses)
        weights = self.weights
        return combined_cost(
            distance_cost(self.graph, perm, self.window),
            modularity(self.graph, perm, self.blocks),
            tile_cost(self.accesses, perm) / top if top else None,
            weights,
            misaligned=misalignment(self.accesses, perm) if weights.a and top else None,
            displaced=displacement(perm) if weights.s else None,
        )


class GraphState(Moves):
    """An order and the change of its objective under moves.

    A move is priced in time proportional to the edges and windows of the indices it moves, plus
    O(n) to copy the positions.

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
        self.block_degree = self._block_sums(self.labels[self.position], self.degree)
        self.top = tile_upper_bound(objective.accesses)
        self.tiles = LoadState(objective.accesses, perm) if self.top else None
        self.touches = sum(float(a.degrees() @ a.unit_weights) for a in objective.accesses)

    def delta(self, positions: NDArray[np.intp], items: NDArray[np.int32]) -> float:
        """Return the change of the objective; see :meth:`Moves.delta`."""
        weights, change = self.objective.weights, 0.0
        present = weights.c + weights.q + weights.s
        if self.total and (weights.c or weights.q):
            distance, quality = self._edges(positions, items)
            change += weights.c * distance - weights.q * quality
        if weights.s:
            change += weights.s * self._shift(positions, items)
        if self.tiles:
            present += weights.u + weights.a
            change += weights.u * self.tiles.delta(positions, items) / self.top
        if self.tiles and weights.a:
            change += weights.a * self._runs(positions, items) / self.touches
        return change / present if present else 0.0

    def apply(self, positions: NDArray[np.intp], items: NDArray[np.int32]) -> float:
        """Do a move; return the change of the objective."""
        change = self.delta(positions, items)
        if self.tiles:
            self.tiles.apply(positions, items)
        self.block_degree = self.block_degree + self._block_shift(positions, items)
        self.perm[positions] = items
        self.position[items] = positions
        return change

    def _edges(self, positions: NDArray[np.intp], items: NDArray[np.int32]) -> tuple[float, float]:
        """Return the changes of C and Q."""
        place = self.position.copy()
        place[items] = positions
        moved = np.zeros(place.size, dtype=np.bool_)
        moved[items] = True
        ends, others, weight = _edges_of(self.objective.graph, items)
        # W counts both directions of an edge; one between two moved indices is listed twice.
        weight = weight * np.where(moved[others], 1.0, 2.0)
        pairs = [(at[ends], at[others]) for at in (self.position, place)]
        near = [np.minimum(np.abs(a - b), self.objective.window) for a, b in pairs]
        same = [(self.labels[a] == self.labels[b]).astype(np.float64) for a, b in pairs]
        distance = float(weight @ (near[1] - near[0])) / (self.objective.window * self.total)
        inside = float(weight @ (same[1] - same[0])) / self.total
        degree = self.block_degree
        after = degree + self._block_shift(positions, items)
        return distance, inside - float(after @ after - degree @ degree) / self.total**2

    def _block_shift(
        self, positions: NDArray[np.intp], items: NDArray[np.int32]
    ) -> NDArray[np.float64]:
        change = self.degree[items] - self.degree[self.perm[positions]]
        return self._block_sums(self.labels[positions], change)

    def _block_sums(
        self, blocks: NDArray[np.int64], values: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        sums = np.bincount(blocks, values, minlength=self.objective.blocks)
        return np.asarray(sums, dtype=np.float64)

    def _shift(self, positions: NDArray[np.intp], items: NDArray[np.int32]) -> float:
        """Return the change of S, the reference being the identity."""
        moved = np.abs(positions - items).sum() - np.abs(positions - self.perm[positions]).sum()
        return float(moved) / (self.perm.size**2 // 2)

    def _runs(self, positions: NDArray[np.intp], items: NDArray[np.int32]) -> float:
        """Return the change of the weighted number of runs that begin off a border."""
        after = self.perm.copy()
        after[positions] = items
        borders = np.unique(np.concatenate([positions, positions + 1]))
        borders = borders[borders < self.perm.size]
        return sum(
            self._begin(k, after, borders) - self._begin(k, self.perm, borders)
            for k in range(len(self.objective.accesses))
        )

    def _begin(self, k: int, perm: Perm, borders: NDArray[np.intp]) -> float:
        """Return the weighted number of runs of access ``k`` that begin at ``borders``."""
        assert self.tiles is not None
        off = borders[borders % self.objective.accesses[k].alignment != 0]
        rows, weights = self.tiles.items[k], self.tiles.weights[k]
        here = rows[perm[off]].astype(np.float64)
        going = here.multiply(rows[perm[off - 1]])
        return float((here @ weights).sum() - (going @ weights).sum())


def _edges_of(
    graph: Csr, items: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return both ends and the weight of every edge of ``items``, row by row."""
    first = graph.indptr[items]
    sizes = graph.indptr[items + 1] - first
    cells = np.arange(sizes.sum()) + np.repeat(first - np.cumsum(sizes) + sizes, sizes)
    ends = np.repeat(items, sizes).astype(np.int64)
    return ends, graph.indices[cells].astype(np.int64), graph.data[cells].astype(np.float64)
