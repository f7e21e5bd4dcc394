"""One fitting task: its data, and the record of what was done about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from icd_tvm.core.combined_cost import DEFAULT_WEIGHTS, Weights
from icd_tvm.core.cost import Csr, TileAccess, check_accesses
from icd_tvm.core.permutation import Perm
from icd_tvm.errors import ConfigError


@dataclass
class FitStats:
    """What :func:`fit_permutation` did. ``stats["C"]`` and ``stats.C`` are the same.

    Attributes
    ----------
    objective : str
        The objective minimised; "tiles" becomes "J" when there are no accesses.
    U, C, Q, A, S, J : float or None
        Tile units, distance, modularity of ``k_blocks`` equal blocks, misalignment, displacement
        from the start and combined cost of the order returned; ``*_before`` of the start. None
        where the input does not define them; A only where ``weights`` give it a weight.
    U_bound : float or None
        No order is below it; ``U == U_bound`` proves the order optimal.
    winner : str
        Rule that gave the order, "+search" appended where the search improved it.
    starts : dict of str to float
        Objective of each starting order tried.
    skipped : dict of str to str
        Starting orders left out, and why.
    iterations : int
        Steps of the local search.
    elapsed_s : float
    improved : bool
        Is the objective strictly below that of the start? If not, the start is returned.
    stopped_by : {"no_opportunity", "bound", "converged", "steps", "time"}
    deterministic : bool
        False when the clock decided: another run may return another order.
    no_opportunity : bool
        True when it is known without a search that no order is better than the start.
    reason : str
        Why there is no opportunity, or an empty string.
    dead : int
        Indices that no window touches; they are the last of an improved order where that is
        free.
    k_blocks : int
    communities : int or None
        Number found, where communities were computed; ``Q_communities`` is their modularity and
        ``Q_null`` that of the communities of a shuffled graph (``null_modularity``): only what
        is above it is structure. None for the objective "tiles", which Q does not decide.
    """

    objective: str
    U: float | None = None
    C: float | None = None
    Q: float | None = None
    A: float | None = None
    S: float | None = None
    J: float | None = None
    U_before: float | None = None
    C_before: float | None = None
    Q_before: float | None = None
    A_before: float | None = None
    S_before: float | None = None
    J_before: float | None = None
    U_bound: float | None = None
    winner: str = "start"
    starts: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    iterations: int = 0
    elapsed_s: float = 0.0
    improved: bool = False
    stopped_by: str = ""
    deterministic: bool = True
    no_opportunity: bool = False
    reason: str = ""
    dead: int = 0
    k_blocks: int = 1
    communities: int | None = None
    Q_communities: float | None = None
    Q_null: float | None = None

    def __getitem__(self, key: str) -> Any:
        """Return the attribute ``key``."""
        if key not in self.__dataclass_fields__:
            raise KeyError(key)
        return getattr(self, key)

    def to_dict(self) -> dict[str, Any]:
        """Return all attributes as a dictionary that JSON can hold."""
        return asdict(self)


class Problem:
    """The input of one fit, its columns already in the order of the start.

    Arguments as those of :func:`icd_tvm.core.solver.fit_permutation`.
    """

    def __init__(
        self,
        graph: Csr | None,
        accesses: tuple[TileAccess, ...],
        objective: str,
        tile: int,
        k_blocks: int | None,
        seed: int,
        steps: int,
        weights: Weights = DEFAULT_WEIGHTS,
    ) -> None:
        self.graph, self.accesses = graph, accesses
        self.objective = objective if accesses or objective != "tiles" else "J"
        self.tile, self.k_blocks, self.seed, self.steps = tile, k_blocks, seed, steps
        self.weights = weights
        self.n = graph.shape[0] if graph is not None else accesses[0].n

    def with_data(self, graph: Csr | None, accesses: tuple[TileAccess, ...]) -> Problem:
        """Return the same task on other data."""
        return Problem(
            graph,
            accesses,
            self.objective,
            self.tile,
            self.k_blocks,
            self.seed,
            self.steps,
            self.weights,
        )

    def reordered(self, perm: Perm) -> Problem:
        """Return the problem whose index i is this one's ``perm[i]``."""
        if np.array_equal(perm, np.arange(self.n)):
            return self
        graph = None if self.graph is None else sp.csr_matrix(self.graph[perm][:, perm])
        return self.with_data(graph, tuple(columns_of(a, perm) for a in self.accesses))

    def searchable(self) -> tuple[TileAccess, ...]:
        """Return the accesses whose U an order can change, without windows it cannot change."""
        return tuple(
            _rows(a, varying)
            for a in self.accesses
            if a.tile > 1 and (varying := _varying(a)).any()
        )


def columns_of(access: TileAccess, perm: NDArray[Any]) -> TileAccess:
    """Return the access restricted to the given indices, in their order."""
    return replace(access, incidence=sp.csr_matrix(access.incidence[:, perm]))


def _rows(access: TileAccess, keep: NDArray[np.bool_]) -> TileAccess:
    counts = None if access.counts is None else access.counts[keep]
    return replace(access, incidence=access.incidence[np.flatnonzero(keep)], counts=counts)


def _varying(access: TileAccess) -> NDArray[np.bool_]:
    degrees = access.degrees()
    # A window of one index touches one tile wherever it is, but may touch the fullest one.
    least = 0 if access.padded else 1
    return (degrees > least) & (degrees < access.n) & (access.unit_weights > 0)


def block_count(problem: Problem, stats: FitStats) -> int:
    """Return k_blocks, or its default; ConfigError if it is below 1."""
    if problem.k_blocks is not None:
        if problem.k_blocks < 1:
            raise ConfigError(f"k_blocks={problem.k_blocks} must be at least 1")
        return min(problem.k_blocks, problem.n)
    if problem.accesses or stats.communities is None:
        tile = max((a.tile for a in problem.accesses), default=problem.tile)
        return max(1, -(-problem.n // tile))
    return stats.communities


def live_indices(accesses: Sequence[TileAccess]) -> NDArray[np.bool_]:
    """Mark the indices that some window touches."""
    live = np.zeros(check_accesses(accesses), dtype=np.bool_)
    for access in accesses:
        live[access.incidence.indices] = True
    return live
