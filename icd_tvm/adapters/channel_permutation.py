"""Order of the input rows in which an N:M mask retains the most magnitude."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm.adapters.arrays import Array, Float64, as_matrix, require_finite, require_length
from icd_tvm.errors import ConfigError

Float32 = npt.NDArray[np.float32]
Perm = npt.NDArray[np.int32]

# Comparisons allowed by default, some 5 s of one core, and the full tables of every row against
# every slot that they are kept within; the regressions tried in them.
WORK = 14e9
LEAST_TABLES, MOST_TABLES = 3, 1000
KICKS = 1000
# Swaps in one regression, and how many of the least bad candidates a row offers to it.
KICK_SWAPS = 4
KICK_POOL = 8
# Rows compared at a time: they and the buffer stay in a core's cache.
CHUNK = 32
# Swaps looked at in one round, a row.
CANDIDATES = 50
# Cost of looking at all swaps, in comparisons a table entry.
GAINS_COST = 20
# A swap must win this share of an average run's magnitude: below that sums in float32 err.
LEAST_GAIN = 1e-6


def permute_channels(
    weight: Array,
    n_m: tuple[int, int] = (2, 4),
    *,
    energy: Array | None = None,
    seed: int = 0,
    tables: int | None = None,
) -> tuple[Perm, dict[str, Any]]:
    """Find a row order whose N:M mask drops less magnitude.

    Row swaps between runs are taken greedily, many disjoint ones a round, from a table of what
    every swap wins. At the local optimum a few slightly losing swaps are made and the search goes
    on from there; the best order found is returned. Deterministic: the work is bounded by counted
    table entries, not by the clock.

    Parameters
    ----------
    weight : array, shape [K, N], real
        Weight of ``y = x @ W``; not modified.
    n_m : (int, int)
        Kept elements and run length: n of m consecutive rows of a column.
    energy : array, shape [K], optional
        Energy of each input; magnitudes are then ``|W| * sqrt(energy)``.
    seed : int
        Seed of the losing swaps.
    tables : int, optional
        Work allowed, in full tables of K x K x N comparisons; some 5 s of one core if omitted.

    Returns
    -------
    order : int32 array, shape [K]
        ``weight[order]`` is the permuted weight.
    meta : dict
        JSON-serialisable. ``retained_before, retained_after`` are shares of the whole magnitude;
        ``recovered`` is the share of the magnitude dropped in the given order that is retained
        now; ``efficacy`` the share of the way from the given order to the best n / m of every
        column, which no order can pass. ``swaps, regressions, skipped, why`` say what was done.
        A length that is not a multiple of m leaves the order as it is, with the reason in
        ``why``.

    Raises
    ------
    ConfigError
        Not 1 <= n < m, or ``tables`` below 1.
    ShapeError
        Not a matrix, or energy of another length.
    NonFiniteError
        NaN or infinity inside.

    Notes
    -----
    The aim and the efficacy are those of Pool and Yu, "Channel permutations for N:M sparsity",
    NeurIPS 2021.
    """
    matrix = as_matrix(weight)
    n, m = n_m
    if not 1 <= n < m:
        raise ConfigError(f"{n}:{m} sparsity keeps {n} of {m}", "needs 1 <= N < M, e.g. (2, 4)")
    if tables is None:
        tables = default_tables(*matrix.shape)
    if tables < 1:
        raise ConfigError(f"tables = {tables} is below 1", "pass 1 or more")
    values = _magnitudes(matrix, energy)
    rows = len(values)
    if rows % m or rows == m:
        why = f"{rows} rows are not a multiple of {m}" if rows % m else "there is a single run"
        return np.arange(rows, dtype=np.int32), _skipped(n_m, why)
    search = _Search(values, n, m)
    swaps = search.climb(tables)
    kicks = _regress(search, tables, np.random.default_rng(seed))
    return search.order.astype(np.int32), {
        **_gain(values, search.order, n, m),
        "n_m": [n, m],
        "swaps": swaps,
        "regressions": kicks,
        "skipped": False,
        "why": "",
    }


def default_tables(rows: int, columns: int) -> int:
    """Return how many full tables ``WORK`` comparisons are worth."""
    return int(np.clip(WORK / (rows * rows * columns), LEAST_TABLES, MOST_TABLES))


def retained(values: Float64, n: int, m: int) -> float:
    """Return the sum of the n largest of every m consecutive rows of a column."""
    runs = values.reshape(-1, m, values.shape[1])
    return float(np.partition(runs, m - n, axis=1)[:, m - n :].sum())


class _Search:
    """Rows in their present order, and the table ``reach`` of what each would do elsewhere.

    A run without one of its rows retains its n largest of the others; a row v put in that slot
    adds ``max(v - t, 0)`` a column, where t is the n-th largest of the others. With
    ``reach[slot, row] = sum(max(v, t))``, swapping the rows i and j of two runs wins
    ``reach[i, j] + reach[j, i] - reach[i, i] - reach[j, j]``.
    """

    def __init__(self, values: Float64, n: int, m: int) -> None:
        self.n, self.m = n, m
        # The largest value is 1: float32 neither overflows nor loses small weights.
        self.values = (values / (float(values.max()) or 1.0)).astype(np.float32)
        length = len(values)
        self.order = np.arange(length)
        self.run = self.order // m
        self.least = LEAST_GAIN * float(self.values.sum(dtype=np.float64)) * m / length
        self.reach = np.empty((length, length), np.float32)
        self.work = 0.0
        self._refresh(np.arange(length // m))

    def total(self) -> float:
        """Magnitude retained now."""
        return retained(self.values.astype(np.float64), self.n, self.m)

    def tables(self) -> float:
        """Work done, in full tables."""
        return self.work / len(self.order)

    def state(self) -> tuple[Any, ...]:
        """Copy of what :meth:`restore` needs."""
        return self.values.copy(), self.order.copy(), self.reach.copy()

    def restore(self, state: tuple[Any, ...]) -> None:
        """Go back to a state."""
        self.values, self.order, self.reach = state

    def gains(self) -> Float32:
        """What swapping rows i and j wins; -inf where both are in one run or i > j."""
        length, width = self.values.shape
        self.work += GAINS_COST * length / width
        own = np.diagonal(self.reach)
        table = self.reach + self.reach.T - own[:, None] - own[None, :]
        table[self.run[:, None] >= self.run[None, :]] = -np.inf
        return np.asarray(table)

    def climb(self, tables: int) -> int:
        """Swap until nothing is won or the work is used up; return the number of swaps."""
        swaps = 0
        while self.tables() < tables:
            gains = self.gains().ravel()
            better = np.flatnonzero(gains > self.least)
            first = better[np.argsort(-gains[better], kind="stable")]
            chosen = self.disjoint(first[: CANDIDATES * len(self.order)], len(self.order))
            if not len(chosen):
                break
            self.swap(chosen)
            swaps += len(chosen)
        return swaps

    def disjoint(self, candidates: Array, limit: int) -> Array:
        """Take pairs in their order whose runs no earlier pair touches: int array [P, 2]."""
        used = np.zeros(len(self.order) // self.m, dtype=np.bool_)
        pairs: list[tuple[int, int]] = []
        for flat in candidates.tolist():
            pair = divmod(flat, len(self.order))
            runs = self.run[list(pair)]
            if not used[runs].any():
                used[runs] = True
                pairs.append(pair)
                if len(pairs) == limit:
                    break
        return np.array(pairs, dtype=np.int64).reshape(-1, 2)

    def swap(self, pairs: Array) -> None:
        """Swap the two rows of every pair."""
        here, there = pairs.ravel(), pairs[:, ::-1].ravel()
        self.values[here] = self.values[there]
        self.order[here] = self.order[there]
        self.reach[:, here] = self.reach[:, there]
        self._refresh(np.unique(self.run[here]))

    def _refresh(self, runs: Array) -> None:
        slots = (runs[:, None] * self.m + np.arange(self.m)).ravel()
        block = self.values[slots].reshape(len(runs), self.m, -1)
        ranked = -np.sort(-block, axis=1)
        last, next_ = ranked[:, self.n - 1 : self.n], ranked[:, self.n : self.n + 1]
        # Without a row that is retained, the next one moves up.
        thresholds = np.where(block >= last, next_, last).reshape(len(slots), -1)
        self.reach[slots] = _sum_of_maxima(thresholds, self.values)
        self.work += len(slots)


def _sum_of_maxima(thresholds: Float32, values: Float32) -> Float32:
    """Return ``out[i, j] = sum over columns of max(thresholds[i], values[j])``."""
    out = np.empty((len(thresholds), len(values)), np.float32)
    ones = np.ones(values.shape[1], np.float32)
    buffer = np.empty((CHUNK, values.shape[1]), np.float32)
    for first in range(0, len(values), CHUNK):
        chunk = values[first : first + CHUNK]
        part = buffer[: len(chunk)]
        for i, threshold in enumerate(thresholds):
            np.maximum(chunk, threshold, out=part)
            out[i, first : first + CHUNK] = part @ ones
    return out


def _regress(search: _Search, tables: int, rng: np.random.Generator) -> int:
    """Leave the local optimum by a few losing swaps, climb again, keep what is better."""
    best, kicks = search.total(), 0
    while search.tables() < tables and kicks < KICKS:
        state = search.state()
        gains = search.gains().ravel()
        pool = min(KICK_POOL * len(search.order), int(np.isfinite(gains).sum()))
        mild = np.argpartition(-gains, pool - 1)[:pool]
        search.swap(search.disjoint(rng.permutation(mild), KICK_SWAPS))
        search.climb(tables)
        kicks += 1
        found = search.total()
        if found > best:
            best = found
        else:
            search.restore(state)
    return kicks


def _magnitudes(matrix: Array, energy: Array | None) -> Float64:
    values = np.abs(matrix.astype(np.float64))
    if energy is None:
        return np.asarray(values)
    weights = np.asarray(energy, dtype=np.float64)
    require_length(weights, len(values), "energy")
    require_finite(weights, "energy")
    if weights.ndim != 1 or float(weights.min()) < 0:
        raise ConfigError("energy is no vector of sums of squares", "pass one value >= 0 a row")
    return np.asarray(values * np.sqrt(weights)[:, None])


def _gain(values: Float64, order: Array, n: int, m: int) -> dict[str, float]:
    total = float(values.sum()) or 1.0
    before, after = retained(values, n, m), retained(values[order], n, m)
    kept = len(values) * n // m
    ideal = float(np.partition(values, len(values) - kept, axis=0)[-kept:].sum())
    return {
        "retained_before": before / total,
        "retained_after": after / total,
        "recovered": _share(after - before, total - before),
        "efficacy": _share(after - before, ideal - before),
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _skipped(n_m: tuple[int, int], why: str) -> dict[str, Any]:
    return {
        "retained_before": None,
        "retained_after": None,
        "recovered": 0.0,
        "efficacy": 0.0,
        "n_m": list(n_m),
        "swaps": 0,
        "regressions": 0,
        "skipped": True,
        "why": why,
    }
