"""Balanced assignment of columns to groups that share one set of kept rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from icd_tvm.adapters.arrays import Bool, Float64, Index

# Rounds of assignment and support selection, and swap sweeps inside a round.
ROUNDS = 12
SWEEPS = 600
# A round that adds less than this share of the retained saliency ends the search.
LEAST_GAIN = 1e-4


def assign_groups(saliency: Float64, size: int, kept_rows: int, seed: int = 0) -> Index:
    """Group columns so that shared row sets retain much saliency.

    Alternates between choosing each group's best rows and moving columns between groups by
    pair swaps, like balanced k-means on the supports; starts from the natural order and from the
    order of the first principal component, and returns the better end.

    Parameters
    ----------
    saliency : float64 array, shape [K, N], non-negative
    size : int
        Columns in a group; divides N.
    kept_rows : int
        Rows each group keeps.
    seed : int
        Seed of the swaps.

    Returns
    -------
    int32 array, shape [N / size, size]
        Columns of each group, ascending; groups ordered by their first column.
    """
    return _assign([saliency], kept_rows, size, seed)


def assign_units(
    saliency: Float64, places: Index, size: int, kept_rows: int, unread: Bool, seed: int = 0
) -> Index:
    """Group columns by the units that they belong to, several columns to a unit.

    One order of the units can then make all groups contiguous. The first columns of the units
    of a group share one set of rows, the second ones another. Units that nothing reads fill
    groups of their own, all but a few.

    Parameters
    ----------
    saliency : float64 array, shape [K, N], non-negative
    places : int array, shape [units, copies]
        Columns of each unit; all N, each once.
    size : int
        Columns in a group; divides the number of units.
    kept_rows : int
        Rows each group keeps.
    unread : bool array, shape [units]
    seed : int
        Seed of the swaps.

    Returns
    -------
    int array, shape [N / size, size]
    """
    unread = unread & ~unread.all()
    order = np.argsort(unread, kind="stable")
    live = -(-np.count_nonzero(~unread) // size) * size
    read = ~unread[order[:live]]
    parts = [saliency[:, columns] * read for columns in places[order[:live]].T]
    found = order[_assign(parts, kept_rows, size, seed, int(read.sum()))]
    groups = np.concatenate([found, order[live:].reshape(-1, size)])
    return np.concatenate([columns[groups] for columns in places.T])


def _assign(
    parts: Sequence[Float64], kept_rows: int, size: int, seed: int, free: int | None = None
) -> Index:
    """Group the columns that several matrices have in common; those from ``free`` on stay."""
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
    every = np.arange(whole.shape[1])
    free = every.size if free is None else free
    starts = (every, np.concatenate([_principal_order(whole[:, :free]), every[free:]]))

    def support(columns: Index) -> Bool:
        return np.concatenate([best_rows(part, columns, kept_rows) for part in parts], axis=1)

    ends = [_improve(whole, support, start.reshape(-1, size), free, seed) for start in starts]
    columns, _ = max(ends, key=lambda end: end[1])
    inside = np.sort(columns, axis=1)
    return inside[np.argsort(inside[:, 0])].astype(np.int32)


def best_rows(saliency: Float64, columns: Index, kept_rows: int) -> Bool:
    """Return the rows with the largest summed saliency of every group.

    Parameters
    ----------
    saliency : float64 array, shape [K, N]
    columns : int array, shape [groups, size]
    kept_rows : int

    Returns
    -------
    bool array, shape [groups, K]
        Exactly ``kept_rows`` true values in a row; ties go to the lower index.
    """
    sums = group_sums(saliency, columns)
    order = np.argsort(-sums, axis=1, kind="stable")[:, :kept_rows]
    kept = np.zeros(sums.shape, dtype=np.bool_)
    np.put_along_axis(kept, order, True, axis=1)
    return kept


def group_sums(saliency: Float64, columns: Index) -> Float64:
    """Sum the columns of each group: float64 array, shape [groups, K]."""
    by_column = np.ascontiguousarray(saliency.T)
    return np.asarray(by_column[columns].sum(axis=1))


def _improve(
    saliency: Float64, support: Callable[[Index], Bool], columns: Index, free: int, seed: int
) -> tuple[Index, float]:
    rng = np.random.default_rng(seed)
    total = float(saliency.sum()) or 1.0
    kept = support(columns)
    best, best_value = columns, _retained(saliency, columns, kept) / total
    for _ in range(ROUNDS):
        scores = saliency.T @ kept.T.astype(np.float64)
        columns = _swap(scores, columns, free, rng)
        kept = support(columns)
        value = _retained(saliency, columns, kept) / total
        gain = value - best_value
        if gain > 0:
            best, best_value = columns, value
        if gain < LEAST_GAIN:
            break
    return best, best_value


def _swap(scores: Float64, columns: Index, free: int, rng: np.random.Generator) -> Index:
    """Swap random disjoint pairs of columns whenever both groups together gain."""
    groups, size = columns.shape
    owner = np.empty(columns.size, dtype=np.intp)
    owner[columns] = np.arange(groups)[:, None]
    half = free // 2
    for _ in range(SWEEPS):
        order = rng.permutation(free)
        left, right = order[:half], order[half : 2 * half]
        a, b = owner[left], owner[right]
        now = scores[left, a] + scores[right, b]
        better = scores[left, b] + scores[right, a] > now
        owner[left[better]], owner[right[better]] = b[better], a[better]
    return np.argsort(owner, kind="stable").reshape(groups, size)


def _retained(saliency: Float64, columns: Index, kept: Bool) -> float:
    return float(np.sum(group_sums(saliency, columns), where=kept))


def _principal_order(saliency: Float64) -> Index:
    roots = np.sqrt(saliency)
    norms = np.linalg.norm(roots, axis=0)
    unit = roots / np.where(norms > 0, norms, 1.0)
    unit -= unit.mean(axis=1, keepdims=True)
    short = unit if unit.shape[0] <= unit.shape[1] else unit.T
    _, vectors = np.linalg.eigh(short @ short.T)
    leading = vectors[:, -1] @ unit if short is unit else vectors[:, -1]
    # The sign of an eigenvector is arbitrary: fix it by the largest entry.
    sign = np.sign(leading[int(np.argmax(np.abs(leading)))]) or 1.0
    return np.argsort(sign * leading, kind="stable")
