"""Local search on the graph objectives C, Q and J."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from icd_tvm.core.graph_state import GraphObjective, GraphState
from icd_tvm.core.permutation import Perm
from icd_tvm.core.search import SearchResult


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
