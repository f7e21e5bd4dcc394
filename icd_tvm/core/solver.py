"""Finds an order of one axis: a portfolio of starting orders, then local search."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray
from scipy.sparse.csgraph import reverse_cuthill_mckee

from icd_tvm.core import starts
from icd_tvm.core.access_graph import is_uniform, validate_w, w_from_accesses
from icd_tvm.core.communities import cluster_graph
from icd_tvm.core.cost import (
    Csr,
    TileAccess,
    check_accesses,
    combined_cost,
    distance_cost,
    incidence_distance,
    incidence_modularity,
    label_modularity,
    modularity,
    tile_cost,
    tile_lower_bound,
    tile_upper_bound,
)
from icd_tvm.core.graph_search import GraphObjective, graph_search
from icd_tvm.core.permutation import Constraint, Perm, as_permutation, compose, identity
from icd_tvm.core.search import SearchResult, TileSearch
from icd_tvm.errors import ConfigError, MissingDependencyError, ShapeError

Objective = Literal["tiles", "C", "Q", "J"]
OBJECTIVES = ("tiles", "C", "Q", "J")

# Forming W from accesses costs the sum of squared window sizes; beyond this it is left out.
_W_WORK_CAP = 30_000_000
# Longest axis whose W, perhaps dense, is formed from accesses because an objective needs it.
_GRAPH_CAP = 16_384
# Nanoseconds per non-zero of steps that cannot be interrupted, to skip what does not fit.
_SPECTRAL_NS = 800
_SEARCH_NS = 40
# Nanoseconds per pair of indices of one window, to form W.
_W_NS = 15


@dataclass
class FitStats:
    """What :func:`fit_permutation` did. ``stats["C"]`` and ``stats.C`` are the same.

    Attributes
    ----------
    objective : str
        The objective minimised; "tiles" becomes "J" when there are no accesses.
    U, C, Q, J : float or None
        Tile units, distance, modularity of ``k_blocks`` equal blocks and combined cost of the
        order returned; ``*_before`` of the start. None where the input does not define them.
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
        Is the objective strictly below that of the start?
    stopped_by : {"no_opportunity", "bound", "converged", "steps", "time"}
    deterministic : bool
        False when the clock decided: another run may return another order.
    no_opportunity : bool
        True when it is known without a search that no order is better than the start. The
        order is then the start, but for indices that nothing touches, which still go last.
    reason : str
        Why there is no opportunity, or an empty string.
    dead : int
        Indices that no window touches; they are the last of the order where that is free.
    k_blocks : int
    communities : int or None
        Number found, where communities were computed; ``Q_communities`` is their modularity.
    """

    objective: str
    U: float | None = None
    C: float | None = None
    Q: float | None = None
    J: float | None = None
    U_before: float | None = None
    C_before: float | None = None
    Q_before: float | None = None
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

    def __getitem__(self, key: str) -> Any:
        """Return the attribute ``key``."""
        if key not in self.__dataclass_fields__:
            raise KeyError(key)
        return getattr(self, key)

    def to_dict(self) -> dict[str, Any]:
        """Return all attributes as a dictionary that JSON can hold."""
        return asdict(self)


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
) -> tuple[Perm, FitStats]:
    """Find an order of an axis that lowers what its kernels pay.

    Never worse than ``start`` in the objective. Deterministic for a seed unless the clock
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

    Returns
    -------
    pi : int32[n]
        ``new[i] = old[pi[i]]``.
    stats : FitStats

    Raises
    ------
    ConfigError, ShapeError, NonFiniteError, PermutationError
        If an argument is invalid.
    """
    began = time.perf_counter()
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective={objective!r} is unknown", ", ".join(OBJECTIVES))
    if not np.isfinite(time_budget_s) or time_budget_s <= 0:
        raise ConfigError(f"time_budget_s={time_budget_s} must be positive")
    if refine_steps < 0 or tile < 1:
        raise ConfigError(f"refine_steps={refine_steps}, tile={tile} out of range")
    n = _axis_length(W, accesses)
    rule = constraint or Constraint.free()
    first = identity(n) if start is None else rule.check(as_permutation(start, n))
    rule.check_length(n)
    problem = _Problem(W, tuple(accesses), objective, tile, k_blocks, rng_seed, refine_steps)
    problem = problem.reordered(first)
    stats = FitStats(problem.objective)
    asked = time.perf_counter()
    _scores(problem, identity(n), _block_count(problem, stats))
    # The report scores both ends; what that costs is taken from the budget.
    report_s = 2.5 * (time.perf_counter() - asked)
    order = (
        _improve(problem, rule, began + time_budget_s - report_s, stats) if n > 1 else identity(n)
    )
    _report(problem, order, stats)
    stats.elapsed_s = time.perf_counter() - began
    return compose(first, order), stats


def _axis_length(graph: Csr | None, accesses: Sequence[TileAccess]) -> int:
    if graph is None and not accesses:
        raise ConfigError("fit_permutation needs W or accesses")
    if graph is not None:
        validate_w(graph)
        if accesses and check_accesses(accesses) != graph.shape[0]:
            raise ShapeError(f"W is {graph.shape}, the accesses have n = {accesses[0].n}")
        return int(graph.shape[0])
    return check_accesses(accesses)


class _Problem:
    """The input of one fit, with its columns already in the order of the start."""

    def __init__(
        self,
        graph: Csr | None,
        accesses: tuple[TileAccess, ...],
        objective: str,
        tile: int,
        k_blocks: int | None,
        seed: int,
        steps: int,
    ) -> None:
        self.graph, self.accesses = graph, accesses
        self.objective = objective if accesses or objective != "tiles" else "J"
        self.tile, self.k_blocks, self.seed, self.steps = tile, k_blocks, seed, steps
        self.n = graph.shape[0] if graph is not None else accesses[0].n

    def with_data(self, graph: Csr | None, accesses: tuple[TileAccess, ...]) -> _Problem:
        """Return the same task on other data."""
        return _Problem(
            graph, accesses, self.objective, self.tile, self.k_blocks, self.seed, self.steps
        )

    def reordered(self, perm: Perm) -> _Problem:
        """Return the problem whose index i is this one's ``perm[i]``."""
        if np.array_equal(perm, np.arange(self.n)):
            return self
        graph = None if self.graph is None else sp.csr_matrix(self.graph[perm][:, perm])
        return self.with_data(graph, tuple(_columns(a, perm) for a in self.accesses))

    def searchable(self) -> tuple[TileAccess, ...]:
        """Return the accesses whose U an order can change, without windows it cannot change."""
        return tuple(
            _rows(a, varying)
            for a in self.accesses
            if a.tile > 1 and (varying := _varying(a)).any()
        )


def _columns(access: TileAccess, perm: NDArray[Any], tile: int | None = None) -> TileAccess:
    matrix = sp.csr_matrix(access.incidence[:, perm])
    return TileAccess(matrix, tile or access.tile, access.weight, access.label, access.counts)


def _rows(access: TileAccess, keep: NDArray[np.bool_]) -> TileAccess:
    counts = None if access.counts is None else access.counts[keep]
    return TileAccess(
        access.incidence[np.flatnonzero(keep)], access.tile, access.weight, access.label, counts
    )


def _varying(access: TileAccess) -> NDArray[np.bool_]:
    degrees = access.degrees()
    return (degrees > 1) & (degrees < access.n) & (access.unit_weights > 0)


def _improve(problem: _Problem, rule: Constraint, deadline: float, stats: FitStats) -> Perm:
    """Solve under a constraint by reducing it to free axes or segments."""
    n = problem.n
    if rule.kind in ("free", "segments"):
        lengths = rule.lengths or (n,)
        return _solve(problem, np.repeat(np.arange(len(lengths)), lengths), deadline, stats)
    if rule.kind == "pairs":
        half = np.arange(n // 2)
        found = _solve_shared(problem, np.stack([half, half + n // 2]), deadline, stats)
        order = np.concatenate([found, found + n // 2]).astype(np.int32)
        return _guarded(problem, order, stats)
    outer, inner = rule.lengths
    grid = np.arange(n).reshape(outer, inner)
    order = identity(n)
    if rule.inside == "separate":
        order = _solve(problem, np.repeat(np.arange(outer), inner), deadline, stats)
    elif rule.inside == "equal":
        order = grid[:, _solve_shared(problem, grid, deadline, stats)].reshape(-1).astype(np.int32)
    if rule.blocks and outer > 1:
        blocks = _solve_blocks(problem.reordered(order), grid, deadline, stats)
        order = compose(order, grid[blocks].reshape(-1))
    return _guarded(problem, order, stats)


def _guarded(problem: _Problem, order: Perm, stats: FitStats) -> Perm:
    """Return ``order``, or the start where the reduction it came from was not exact and lost."""
    before = identity(problem.n)
    if _value(problem, order, stats) < _value(problem, before, stats):
        return order
    stats.winner = "start"
    return before


def _solve_shared(
    problem: _Problem, grid: NDArray[np.int64], deadline: float, stats: FitStats
) -> Perm:
    """One permutation for all rows of ``grid`` (copies x length).

    Exact where the tiles divide the length; else the tile borders of later rows are ignored,
    and the caller compares the result with the start on the true objective.
    """
    accesses = tuple(_columns(a, row) for a in problem.accesses for row in grid)
    graph = None
    if problem.graph is not None:
        parts = [problem.graph[row][:, row] for row in grid]
        graph = sp.csr_matrix(sum(parts[1:], parts[0]))
    return _solve_reduced(problem.with_data(graph, accesses), deadline, stats)


def _solve_blocks(
    problem: _Problem, grid: NDArray[np.int64], deadline: float, stats: FitStats
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
        TileAccess(a.incidence @ member, max(1, a.tile // inner), a.weight, a.label, a.counts)
        for a in problem.accesses
    )
    graph = None
    if problem.graph is not None:
        graph = sp.csr_matrix(member.T @ problem.graph @ member, dtype=np.float32)
        graph.setdiag(0.0)
        graph.eliminate_zeros()
    return _solve_reduced(problem.with_data(graph, accesses), deadline, stats)


def _solve_reduced(problem: _Problem, deadline: float, stats: FitStats) -> Perm:
    part = FitStats(problem.objective)
    order = _solve(problem, np.zeros(problem.n, dtype=np.int64), deadline, part)
    for name in ("winner", "starts", "skipped", "stopped_by", "communities", "Q_communities"):
        setattr(stats, name, getattr(part, name))
    stats.iterations += part.iterations
    stats.deterministic &= part.deterministic
    stats.no_opportunity, stats.reason = part.no_opportunity, part.reason
    return order


def _solve(problem: _Problem, classes: NDArray[np.int64], deadline: float, stats: FitStats) -> Perm:
    """Portfolio and local search; indices stay inside the class (a run) of their position."""
    if reason := _hopeless(problem):
        stats.no_opportunity, stats.reason, stats.stopped_by = True, reason, "no_opportunity"
        unchanged = identity(problem.n)
        return _dead_last(problem.accesses, classes, unchanged) if problem.accesses else unchanged
    if problem.objective == "tiles":
        order = _solve_tiles(problem, classes, deadline, stats)
        return _dead_last(problem.accesses, classes, order)
    return _solve_graph(problem, classes, deadline, stats)


def _hopeless(problem: _Problem) -> str:
    """Return why no order can be better than the identity, or an empty string."""
    if problem.objective != "tiles":
        if problem.graph is not None and is_uniform(problem.graph):
            return "W is uniform: every order costs the same"
        return ""
    accesses = problem.searchable()
    if not accesses:
        return "every window touches all, one or none of the indices, or every tile is one index"
    items, _ = starts.stacked_items(accesses)
    if starts.support_labels(items).max() == 0:
        return "all indices have the same support: every order costs the same"
    if tile_cost(accesses, identity(problem.n)) <= tile_lower_bound(accesses):
        return "the start already reaches the lower bound of U"
    return ""


def _solve_tiles(
    problem: _Problem, classes: NDArray[np.int64], deadline: float, stats: FitStats
) -> Perm:
    accesses = problem.searchable()
    bound = tile_lower_bound(accesses)
    portfolio = _Portfolio(classes, deadline, stats, lambda p: tile_cost(accesses, p))
    portfolio.offer("start", identity(problem.n))
    for name, rule in _tile_rules(problem, accesses, deadline, stats):
        if portfolio.best_cost <= bound or not portfolio.time_left():
            break
        portfolio.try_rule(name, rule)
    if portfolio.best_cost <= bound:
        stats.stopped_by = "bound"
        return portfolio.best
    if not _fits("search", sum(a.incidence.nnz for a in accesses) * _SEARCH_NS, deadline, stats):
        stats.stopped_by = "time"
        return portfolio.best
    search = TileSearch(accesses, portfolio.best, classes, problem.seed, bound)
    return portfolio.accept(search.run(problem.steps, deadline), stats)


def _dead_last(accesses: Sequence[TileAccess], classes: NDArray[np.int64], order: Perm) -> Perm:
    """Move indices that nothing touches to the end of their class where that costs nothing."""
    live = _live(accesses)
    if live.all():
        return order
    moved = order[np.lexsort((np.arange(order.size), ~live[order], classes))]
    return moved if tile_cost(accesses, moved) <= tile_cost(accesses, order) else order


def _live(accesses: Sequence[TileAccess]) -> NDArray[np.bool_]:
    """Mark the indices that some window touches."""
    live = np.zeros(check_accesses(accesses), dtype=np.bool_)
    for access in accesses:
        live[access.incidence.indices] = True
    return live


Rule = Callable[[NDArray[np.intp], int], Perm | None]


def _tile_rules(
    problem: _Problem, accesses: Sequence[TileAccess], deadline: float, stats: FitStats
) -> Iterator[tuple[str, Rule]]:
    """Yield named rules, the cheap ones first.

    A rule orders the columns it is given, the first of which stands at the given position.
    """
    items, weights = starts.stacked_items(accesses)
    tiles = sorted({a.tile for a in accesses})
    for tile in tiles:
        yield f"support/{tile}", _support_rule(items, tile)
    yield "norm", lambda columns, _: starts.norm_order(items[columns], weights)
    for tile in tiles:
        yield f"similar/{tile}", _similar_rule(items, tile, deadline)
        yield f"greedy-sparse/{tile}", _greedy_rule(items, weights, tile, False, deadline)
        yield f"greedy-dense/{tile}", _greedy_rule(items, weights, tile, True, deadline)
    if _fits("spectral", items.nnz * _SPECTRAL_NS, deadline, stats):
        yield "spectral", lambda columns, _: starts.incidence_fiedler_order(items[columns], weights)
    graph = problem.graph
    work = sum(int(a.degrees() @ a.degrees()) for a in accesses)
    if graph is None and work > _W_WORK_CAP:
        stats.skipped["communities"] = "W is too dense to form"
    elif graph is None and _fits("communities", work * _W_NS, deadline, stats):
        graph = w_from_accesses(accesses)
    if graph is not None:
        yield "communities", _community_rule(graph, problem.seed, stats)


def _support_rule(items: Csr, tile: int) -> Rule:
    return lambda columns, offset: starts.support_order(items[columns], tile, offset)


def _similar_rule(items: Csr, tile: int, deadline: float) -> Rule:
    return lambda columns, offset: starts.similar_order(items[columns], tile, offset, deadline)


def _greedy_rule(
    items: Csr, weights: NDArray[np.float64], tile: int, dense_first: bool, deadline: float
) -> Rule:
    return lambda columns, offset: starts.greedy_order(
        items[columns],
        weights,
        tile,
        offset=offset,
        dense_first=dense_first,
        deadline=deadline,
    )


def _fits(name: str, nanoseconds: float, deadline: float, stats: FitStats) -> bool:
    """Say whether an uninterruptible step ends before the deadline; note it if not."""
    if time.perf_counter() + nanoseconds * 1e-9 < deadline:
        return True
    stats.skipped[name], stats.deterministic = "time", False
    return False


def _community_rule(graph: Csr, seed: int, stats: FitStats) -> Rule:
    def rule(columns: NDArray[np.intp], offset: int) -> Perm | None:
        part = graph[columns][:, columns]
        try:
            labels = cluster_graph(part, {"seed": seed})
        except MissingDependencyError as error:
            stats.skipped["communities"] = error.message
            return None
        stats.communities = int(labels.max()) + 1
        stats.Q_communities = label_modularity(part, labels)
        return starts.label_order(labels)

    return rule


class _Portfolio:
    """The best order seen, and the record of all."""

    def __init__(
        self,
        classes: NDArray[np.int64],
        deadline: float,
        stats: FitStats,
        cost: Callable[[Perm], float],
    ) -> None:
        self.deadline, self.stats, self.cost = deadline, stats, cost
        self.best_cost = float("inf")
        self.best: Perm = identity(classes.size)
        bounds = np.flatnonzero(np.diff(classes)) + 1
        self.runs = np.split(np.arange(classes.size), bounds)

    def time_left(self) -> bool:
        """Say whether the budget lasts, and note in the stats if it does not."""
        if time.perf_counter() < self.deadline:
            return True
        self.stats.deterministic = False
        return False

    def offer(self, name: str, order: Perm) -> None:
        """Record an order; keep it if it is the best so far."""
        cost = self.cost(order)
        self.stats.starts[name] = cost
        if cost < self.best_cost:
            self.best, self.best_cost, self.stats.winner = order, cost, name

    def try_rule(self, name: str, rule: Rule) -> None:
        """Apply a rule to each class on its own and offer the result."""
        parts = []
        for columns in self.runs:
            part = rule(columns, int(columns[0]))
            if part is None:
                reason = "the supports form no groups" if self.time_left() else "time"
                self.stats.skipped.setdefault(name, reason)
                return
            parts.append(columns[part])
        self.time_left()
        self.offer(name, np.concatenate(parts).astype(np.int32))

    def accept(self, found: SearchResult, stats: FitStats) -> Perm:
        """Take the order of the search, which started from the best, into the stats."""
        stats.iterations += found.steps
        stats.stopped_by = found.stopped_by
        stats.deterministic &= found.stopped_by != "time"
        if self.cost(found.perm) < self.best_cost:
            stats.winner += "+search"
            return found.perm
        return self.best


def _solve_graph(
    problem: _Problem, classes: NDArray[np.int64], deadline: float, stats: FitStats
) -> Perm:
    graph = problem.graph if problem.graph is not None else _graph_of(problem)
    community = _community_rule(graph, problem.seed, stats)
    columns = np.arange(problem.n)
    by_community = community(columns, 0) if problem.n > 1 else None
    blocks = _block_count(problem, stats)
    objective = GraphObjective.named(
        problem.objective, graph, problem.accesses, blocks, problem.tile
    )
    portfolio = _Portfolio(classes, deadline, stats, objective.cost)
    portfolio.offer("start", identity(problem.n))
    if by_community is not None and len(portfolio.runs) == 1:
        portfolio.offer("communities", by_community)
    for name, rule in _graph_rules(graph, deadline, stats):
        if portfolio.time_left():
            portfolio.try_rule(name, rule)
    found = graph_search(
        objective,
        portfolio.best,
        classes,
        seed=problem.seed,
        steps=problem.steps,
        deadline=deadline,
    )
    return portfolio.accept(found, stats)


def _graph_of(problem: _Problem) -> Csr:
    if problem.n > _GRAPH_CAP:
        raise ConfigError(
            f"objective={problem.objective!r} on {problem.n} indices needs W",
            "pass a W with nnz_cap, or use objective='tiles'",
        )
    return w_from_accesses(problem.accesses)


def _graph_rules(graph: Csr, deadline: float, stats: FitStats) -> Iterator[tuple[str, Rule]]:
    yield "degree", lambda c, o: np.argsort(-graph[c].sum(axis=1).A1, kind="stable").astype("i4")
    yield "rcm", lambda c, o: reverse_cuthill_mckee(graph[c][:, c], symmetric_mode=True)
    if _fits("spectral", graph.nnz * _SPECTRAL_NS, deadline, stats):
        yield "spectral", lambda c, o: starts.fiedler_order(graph[c][:, c])


def _block_count(problem: _Problem, stats: FitStats) -> int:
    if problem.k_blocks is not None:
        if problem.k_blocks < 1:
            raise ConfigError(f"k_blocks={problem.k_blocks} must be at least 1")
        return min(problem.k_blocks, problem.n)
    if problem.accesses or stats.communities is None:
        tile = max((a.tile for a in problem.accesses), default=problem.tile)
        return max(1, -(-problem.n // tile))
    return stats.communities


def _value(problem: _Problem, order: Perm, stats: FitStats) -> float:
    if problem.objective == "tiles":
        return tile_cost(problem.accesses, order)
    scores = _scores(problem, order, _block_count(problem, stats))
    table = {"C": scores["C"], "Q": -(scores["Q"] or 0.0), "J": scores["J"]}
    return float(table[problem.objective] or 0.0)


def _scores(problem: _Problem, order: Perm, blocks: int) -> dict[str, float | None]:
    units = tile_cost(problem.accesses, order) if problem.accesses else None
    if problem.graph is not None:
        distance = distance_cost(problem.graph, order, problem.tile)
        quality = modularity(problem.graph, order, blocks)
    else:
        distance = incidence_distance(problem.accesses, order, problem.tile)
        quality = incidence_modularity(problem.accesses, order, blocks)
    top = tile_upper_bound(problem.accesses)
    joint = combined_cost(distance, quality, units / top if units is not None and top else None)
    return {"U": units, "C": distance, "Q": quality, "J": joint}


def _report(problem: _Problem, order: Perm, stats: FitStats) -> None:
    stats.k_blocks = _block_count(problem, stats)
    after = _scores(problem, order, stats.k_blocks)
    before = _scores(problem, identity(problem.n), stats.k_blocks)
    for name, value in after.items():
        setattr(stats, name, value)
        setattr(stats, f"{name}_before", before[name])
    if problem.accesses:
        stats.U_bound = tile_lower_bound(problem.accesses)
        stats.dead = int(np.count_nonzero(~_live(problem.accesses)))
    stats.improved = _value(problem, order, stats) < _value(problem, identity(problem.n), stats)
