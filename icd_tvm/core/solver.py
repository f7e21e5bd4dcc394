"""Finds an order of one axis: constraints are reduced to free axes, then a portfolio runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from icd_tvm.core.access_graph import validate_w
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
    check_accesses,
    distance_cost,
    incidence_distance,
    incidence_modularity,
    modularity,
    tile_cost,
    tile_lower_bound,
    tile_upper_bound,
)
from icd_tvm.core.permutation import Constraint, Perm, as_permutation, compose, identity
from icd_tvm.core.portfolio import solve
from icd_tvm.core.problem import FitStats, Problem, block_count, columns_of, live_indices
from icd_tvm.errors import ConfigError, ShapeError

__all__ = ["FitStats", "fit_permutation"]

Objective = Literal["tiles", "C", "Q", "J"]
OBJECTIVES = ("tiles", "C", "Q", "J")


def fit_permutation(
    W: Csr | None = None,
    *,
    accesses: Sequence[TileAccess] = (),
    time_budget_s: float = 300.0,
    refine_steps: int = 2_000,
    k_blocks: int | None = None,
    rng_seed: int = 0,
    objective: Objective = "tiles",
    tile: int = 16,
    start: ArrayLike | None = None,
    constraint: Constraint | None = None,
    weights: Weights = DEFAULT_WEIGHTS,
) -> tuple[Perm, FitStats]:
    """Find an order of an axis that lowers what its kernels pay.

    Never worse than ``start`` in the objective; ``start`` itself where nothing better was found
    (``stats.improved`` is False). Deterministic for a seed unless the clock
    stopped it, which ``stats.deterministic`` says.

    Parameters
    ----------
    W : csr_matrix of float32, shape [n, n], optional
        Access graph of :func:`icd_tvm.core.access_graph.build_w`.
    accesses : sequence of TileAccess
        What each kernel touches on the axis; they define the objective "tiles".
    time_budget_s : float
        Wall clock limit, seconds. Checked between steps: a budget of less than a few
        evaluations of the objective is overrun by those.
    refine_steps : int
        Limit of local search steps.
    k_blocks : int, optional
        Equal blocks of Q. By default one per tile where accesses are given, else as many as
        there are communities in W.
    rng_seed : int
    objective : {"tiles", "C", "Q", "J"}
        U, distance, modularity or their combination. Without accesses "tiles" means "J".
    tile : int
        Distance at which C saturates, and tile of k_blocks' default.
    start : array_like of int, shape [n], optional
        Order to improve; identity by default. It must obey the constraint.
    constraint : Constraint, optional
        Free by default.
    weights : Weights, optional
        Of J; those of this machine are in :func:`icd_tvm.measure.calibrate_cost.load_calibration`.

    Returns
    -------
    pi : int32[n]
        ``new[i] = old[pi[i]]``.
    stats : FitStats

    Raises
    ------
    ConfigError, ShapeError, NonFiniteError, PermutationError
        If an argument is invalid.

    Examples
    --------
    >>> from icd_tvm.core.access_graph import build_w
    >>> graph = build_w("mock", n=64, blocks=4, density=0.05, seed=0)
    >>> pi, stats = fit_permutation(graph, time_budget_s=5.0, refine_steps=20, k_blocks=4)
    >>> sorted(pi.tolist()) == list(range(64)), stats.improved
    (True, True)
    """
    began = time.perf_counter()
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective={objective!r} is unknown", ", ".join(OBJECTIVES))
    if not np.isfinite(time_budget_s) or time_budget_s <= 0:
        raise ConfigError(f"time_budget_s={time_budget_s} must be positive")
    if refine_steps < 0 or tile < 1:
        raise ConfigError(f"refine_steps={refine_steps}, tile={tile} out of range")
    if not 0 <= rng_seed < 1 << 32:
        raise ConfigError(f"rng_seed={rng_seed} is outside 0..2^32 - 1")
    n = _axis_length(W, accesses)
    rule = constraint or Constraint.free()
    first = identity(n) if start is None else rule.check(as_permutation(start, n))
    rule.check_length(n)
    problem = Problem(
        W, tuple(accesses), objective, tile, k_blocks, rng_seed, refine_steps, weights
    )
    problem = problem.reordered(first)
    stats = FitStats(problem.objective)
    asked = time.perf_counter()
    _scores(problem, identity(n), block_count(problem, stats))
    # The report scores both ends; what that costs is taken from the budget.
    report_s = 2.5 * (time.perf_counter() - asked)
    order = (
        _improve(problem, rule, began + time_budget_s - report_s, stats) if n > 1 else identity(n)
    )
    _report(problem, order, stats)
    if not stats.improved:
        order = _start_kept(problem, stats)
    stats.elapsed_s = time.perf_counter() - began
    return compose(first, order), stats


def _start_kept(problem: Problem, stats: FitStats) -> Perm:
    """Return the start, which an order of equal cost does not replace; the stats follow."""
    for name in ("U", "C", "Q", "A", "S", "J"):
        setattr(stats, name, getattr(stats, f"{name}_before"))
    stats.winner = "start"
    return identity(problem.n)


def _axis_length(graph: Csr | None, accesses: Sequence[TileAccess]) -> int:
    if graph is None and not accesses:
        raise ConfigError("fit_permutation needs W or accesses")
    if graph is not None:
        validate_w(graph)
        if accesses and check_accesses(accesses) != graph.shape[0]:
            raise ShapeError(f"W is {graph.shape}, the accesses have n = {accesses[0].n}")
        return int(graph.shape[0])
    return check_accesses(accesses)


def _improve(problem: Problem, rule: Constraint, deadline: float, stats: FitStats) -> Perm:
    """Solve under a constraint by reducing it to free axes or segments."""
    n = problem.n
    if rule.kind in ("free", "segments"):
        lengths = rule.lengths or (n,)
        return solve(problem, np.repeat(np.arange(len(lengths)), lengths), deadline, stats)
    if rule.kind == "pairs":
        half = np.arange(n // 2)
        found = _solve_shared(problem, np.stack([half, half + n // 2]), deadline, stats)
        order = np.concatenate([found, found + n // 2]).astype(np.int32)
        return _guarded(problem, order, stats)
    outer, inner = rule.lengths
    grid = np.arange(n).reshape(outer, inner)
    order = identity(n)
    if rule.inside == "separate":
        order = solve(problem, np.repeat(np.arange(outer), inner), deadline, stats)
    elif rule.inside == "equal":
        order = grid[:, _solve_shared(problem, grid, deadline, stats)].reshape(-1).astype(np.int32)
    if rule.blocks and outer > 1:
        blocks = _solve_blocks(problem.reordered(order), grid, deadline, stats)
        order = compose(order, grid[blocks].reshape(-1))
    return _guarded(problem, order, stats)


def _guarded(problem: Problem, order: Perm, stats: FitStats) -> Perm:
    """Return ``order``, or the start where the reduction it came from was not exact and lost."""
    before = identity(problem.n)
    if _value(problem, order, stats) < _value(problem, before, stats):
        return order
    stats.winner = "start"
    return before


def _solve_shared(
    problem: Problem, grid: NDArray[np.int64], deadline: float, stats: FitStats
) -> Perm:
    """One permutation for all rows of ``grid`` (copies x length).

    Exact where the tiles divide the length; else the tile borders of later rows are ignored,
    and the caller compares the result with the start on the true objective.
    """
    accesses = tuple(columns_of(a, row) for a in problem.accesses for row in grid)
    graph = None
    if problem.graph is not None:
        parts = [problem.graph[row][:, row] for row in grid]
        graph = sp.csr_matrix(sum(parts[1:], parts[0]))
    return _solve_reduced(problem.with_data(graph, accesses), deadline, stats)


def _solve_blocks(
    problem: Problem, grid: NDArray[np.int64], deadline: float, stats: FitStats
) -> Perm:
    """Order of the rows of ``grid``: a row is touched when one of its indices is."""
    outer, inner = grid.shape
    member = sp.csr_matrix(
        (
            np.ones(grid.size, dtype=np.float32),
            (np.arange(grid.size), np.repeat(range(outer), inner)),
        )
    )
    accesses = tuple(
        replace(
            a,
            incidence=sp.csr_matrix(a.incidence @ member),
            tile=max(1, a.tile // inner),
            lanes=max(1, a.alignment // inner),
        )
        for a in problem.accesses
    )
    graph = None
    if problem.graph is not None:
        graph = sp.csr_matrix(member.T @ problem.graph @ member, dtype=np.float32)
        graph.setdiag(0.0)
        graph.eliminate_zeros()
    return _solve_reduced(problem.with_data(graph, accesses), deadline, stats)


def _solve_reduced(problem: Problem, deadline: float, stats: FitStats) -> Perm:
    part = FitStats(problem.objective)
    order = solve(problem, np.zeros(problem.n, dtype=np.int64), deadline, part)
    for name in (
        "winner",
        "starts",
        "skipped",
        "stopped_by",
        "communities",
        "Q_communities",
        "Q_null",
    ):
        setattr(stats, name, getattr(part, name))
    stats.iterations += part.iterations
    stats.deterministic &= part.deterministic
    stats.no_opportunity, stats.reason = part.no_opportunity, part.reason
    return order


def _value(problem: Problem, order: Perm, stats: FitStats) -> float:
    if problem.objective == "tiles":
        return tile_cost(problem.accesses, order)
    scores = _scores(problem, order, block_count(problem, stats))
    table = {"C": scores["C"], "Q": -(scores["Q"] or 0.0), "J": scores["J"]}
    return float(table[problem.objective] or 0.0)


def _scores(problem: Problem, order: Perm, blocks: int) -> dict[str, float | None]:
    units = tile_cost(problem.accesses, order) if problem.accesses else None
    if problem.graph is not None:
        distance = distance_cost(problem.graph, order, problem.tile)
        quality = modularity(problem.graph, order, blocks)
    else:
        distance = incidence_distance(problem.accesses, order, problem.tile)
        quality = incidence_modularity(problem.accesses, order, blocks)
    top, weights = tile_upper_bound(problem.accesses), problem.weights
    misaligned = misalignment(problem.accesses, order) if weights.a and top else None
    displaced = displacement(order)
    joint = combined_cost(
        distance,
        quality,
        units / top if units is not None and top else None,
        weights,
        misaligned=misaligned,
        displaced=displaced,
    )
    return {"U": units, "C": distance, "Q": quality, "A": misaligned, "S": displaced, "J": joint}


def _report(problem: Problem, order: Perm, stats: FitStats) -> None:
    stats.k_blocks = block_count(problem, stats)
    after = _scores(problem, order, stats.k_blocks)
    before = _scores(problem, identity(problem.n), stats.k_blocks)
    for name, value in after.items():
        setattr(stats, name, value)
        setattr(stats, f"{name}_before", before[name])
    if problem.accesses:
        stats.U_bound = tile_lower_bound(problem.accesses)
        stats.dead = int(np.count_nonzero(~live_indices(problem.accesses)))
    stats.improved = _value(problem, order, stats) < _value(problem, identity(problem.n), stats)
