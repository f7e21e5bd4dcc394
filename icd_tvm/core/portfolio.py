"""The solver's portfolio: starting orders by rule, the best of them improved by local search."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.csgraph import reverse_cuthill_mckee

from icd_tvm.core import starts
from icd_tvm.core.access_graph import is_uniform, w_from_accesses
from icd_tvm.core.balance import BalancedSearch
from icd_tvm.core.communities import cluster_graph, null_modularity
from icd_tvm.core.cost import Csr, TileAccess, label_modularity, tile_cost, tile_lower_bound
from icd_tvm.core.graph_search import graph_search
from icd_tvm.core.graph_state import GraphObjective
from icd_tvm.core.permutation import Perm, identity
from icd_tvm.core.problem import FitStats, Problem, block_count, live_indices
from icd_tvm.core.search import SearchResult, TileSearch
from icd_tvm.errors import ConfigError, MissingDependencyError

# Forming W from accesses costs the sum of squared window sizes; beyond this it is left out.
_W_WORK_CAP = 30_000_000
# Longest axis whose W, perhaps dense, is formed from accesses because an objective needs it.
_GRAPH_CAP = 16_384
# Nanoseconds per non-zero of steps that cannot be interrupted, to skip what does not fit.
_SPECTRAL_NS = 800
_SEARCH_NS = 40
# The same, to find communities in a graph without any.
_NULL_NS = 500
# Share of the search time for the greedy start, where the fullest tile decides.
_FIRST_SHARE = 0.9
# Nanoseconds per pair of indices of one window, to form W.
_W_NS = 15


def solve(problem: Problem, classes: NDArray[np.int64], deadline: float, stats: FitStats) -> Perm:
    """Portfolio and local search; indices stay inside the class (a run) of their position."""
    if reason := _hopeless(problem):
        stats.no_opportunity, stats.reason, stats.stopped_by = True, reason, "no_opportunity"
        return identity(problem.n)
    if problem.objective == "tiles":
        order = _solve_tiles(problem, classes, deadline, stats)
        return _dead_last(problem.accesses, classes, order)
    return _solve_graph(problem, classes, deadline, stats)


def _hopeless(problem: Problem) -> str:
    """Return why no order can be better than the identity, or an empty string."""
    if problem.objective != "tiles":
        if problem.graph is not None and is_uniform(problem.graph):
            return "W is uniform: every order costs the same"
        return ""
    accesses = problem.searchable()
    if not accesses:
        return "every window touches all, one or none of the indices, or every tile is one index"
    if tile_cost(accesses, identity(problem.n)) <= tile_lower_bound(accesses):
        return "the start already reaches the lower bound of U"
    return ""


def _solve_tiles(
    problem: Problem, classes: NDArray[np.int64], deadline: float, stats: FitStats
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
    if any(a.padded for a in accesses):
        return _balance(problem, accesses, classes, portfolio, bound)
    search = TileSearch(accesses, portfolio.best, classes, problem.seed, bound)
    return portfolio.accept(search.run(problem.steps, deadline), stats)


def _balance(
    problem: Problem,
    accesses: Sequence[TileAccess],
    classes: NDArray[np.int64],
    portfolio: _Portfolio,
    bound: float,
) -> Perm:
    """Search from a dense-first greedy order, then from the best order there is.

    The greedy order (without one: that of the least sum) is a poor start that ends lower than the
    best start does, after some hundred steps.
    """

    def search(order: Perm, until: float) -> SearchResult:
        return BalancedSearch(accesses, order, classes, problem.seed, bound).run(
            problem.steps, until
        )

    sums = [replace(a, padded=False) for a in accesses]
    greedy = [name for name in portfolio.orders if name.startswith("greedy-dense")]
    least = min(
        greedy or portfolio.orders, key=lambda name: tile_cost(sums, portfolio.orders[name])
    )
    now, stats = time.perf_counter(), portfolio.stats
    first = search(portfolio.orders[least], now + _FIRST_SHARE * (portfolio.deadline - now))
    stats.iterations += first.steps
    stats.deterministic &= first.stopped_by != "time"
    ahead = first.cost < portfolio.best_cost
    if ahead:
        portfolio.best, portfolio.best_cost, stats.winner = first.perm, first.cost, least
    if ahead and first.stopped_by in ("converged", "bound"):
        stats.winner, stats.stopped_by = f"{least}+search", first.stopped_by
        return first.perm
    order = portfolio.accept(search(portfolio.best, portfolio.deadline), stats)
    if ahead and order is first.perm:
        stats.winner = f"{least}+search"
    return order


def _dead_last(accesses: Sequence[TileAccess], classes: NDArray[np.int64], order: Perm) -> Perm:
    """Move indices that nothing touches to the end of their class where that costs nothing."""
    live = live_indices(accesses)
    if live.all():
        return order
    moved = order[np.lexsort((np.arange(order.size), ~live[order], classes))]
    return moved if tile_cost(accesses, moved) <= tile_cost(accesses, order) else order


Rule = Callable[[NDArray[np.intp], int], Perm | None]


def _tile_rules(
    problem: Problem, accesses: Sequence[TileAccess], deadline: float, stats: FitStats
) -> Iterator[tuple[str, Rule]]:
    """Yield named rules, the cheap ones first.

    A rule orders the columns it is given, the first of which stands at the given position.
    """
    items, weights = starts.stacked_items(accesses)
    tiles = sorted({a.tile for a in accesses})
    for tile in tiles:
        yield f"support/{tile}", _support_rule(items, tile)
    yield "norm", lambda columns, _: starts.norm_order(items[columns], weights)
    for tile in sorted({a.tile for a in accesses if a.padded}):
        yield f"dealt/{tile}", _dealt_rule(items, weights, tile)
    for tile in tiles:
        yield f"similar/{tile}", _similar_rule(items, tile, deadline)
        yield f"greedy-sparse/{tile}", _greedy_rule(items, weights, tile, False, deadline)
        yield f"greedy-dense/{tile}", _greedy_rule(items, weights, tile, True, deadline)
    if _fits("spectral", items.nnz * _SPECTRAL_NS, deadline, stats):
        yield "spectral", lambda columns, _: starts.incidence_fiedler_order(items[columns], weights)
    graph = problem.graph
    if graph is None and all(a.padded for a in accesses):
        stats.skipped["communities"] = "the fullest tile decides, which communities make fuller"
        return
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


def _dealt_rule(items: Csr, weights: NDArray[np.float64], tile: int) -> Rule:
    return lambda columns, _: starts.dealt_order(items[columns], weights, tile)


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


def _null(graph: Csr, seed: int, deadline: float, stats: FitStats) -> float | None:
    """Return what modularity is worth nothing; None where there is no time to find out."""
    if time.perf_counter() + graph.nnz * _NULL_NS * 1e-9 > deadline:
        stats.skipped["null"] = "time"
        return None
    return null_modularity(graph, {"seed": seed})


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
        self.orders: dict[str, Perm] = {}
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
        self.orders[name] = order
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
    problem: Problem, classes: NDArray[np.int64], deadline: float, stats: FitStats
) -> Perm:
    graph = problem.graph if problem.graph is not None else _graph_of(problem)
    community = _community_rule(graph, problem.seed, stats)
    columns = np.arange(problem.n)
    by_community = community(columns, 0) if problem.n > 1 else None
    if by_community is not None:
        stats.Q_null = _null(graph, problem.seed, deadline, stats)
    blocks = block_count(problem, stats)
    objective = GraphObjective.named(
        problem.objective, graph, problem.accesses, blocks, problem.tile, problem.weights
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


def _graph_of(problem: Problem) -> Csr:
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
