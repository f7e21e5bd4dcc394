"""Starting orders of the solver's portfolio, each one rule that needs no search."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

from icd_tvm.core.cost import Csr, TileAccess
from icd_tvm.core.permutation import Perm

_TIE = 1e-3


def stacked_items(accesses: Sequence[TileAccess]) -> tuple[Csr, NDArray[np.float64]]:
    """Return the items x windows matrix of all accesses side by side, and window weights."""
    parts = [sp.csr_matrix(a.incidence.T) for a in accesses]
    items = sp.csr_matrix(sp.hstack(parts, format="csr", dtype=np.bool_))
    items.sort_indices()
    return items, np.concatenate([a.unit_weights for a in accesses])


def support_labels(items: Csr) -> NDArray[np.int64]:
    """Label the rows of ``items``: two rows get one label exactly when their supports are equal.

    O(nnz). Python's dictionary compares the supports themselves, so no collision is possible.
    """
    seen: dict[bytes, int] = {}
    bounds = items.indptr
    labels = np.empty(items.shape[0], dtype=np.int64)
    for row in range(items.shape[0]):
        key = items.indices[bounds[row] : bounds[row + 1]].tobytes()
        labels[row] = seen.setdefault(key, len(seen))
    return labels


def support_order(items: Csr, tile: int, offset: int = 0) -> Perm:
    """Put indices of equal support together; indices that nothing touches go last.

    Optimal when the size of every group is a multiple of ``tile`` and ``offset`` is 0
    (``docs/Theoretical_Analysis.md``). Arguments as in :func:`packed_order`.
    """
    return packed_order(items, support_labels(items), tile, offset)


def similar_order(
    items: Csr, tile: int, offset: int = 0, deadline: float = float("inf")
) -> Perm | None:
    """Put indices of similar support together: groups whose closure strays have broken.

    None when the supports form no groups, or the ``deadline`` passed. Arguments as in
    :func:`packed_order`.
    """
    labels = similarity_labels(items, deadline=deadline)
    return None if labels is None else packed_order(items, labels, tile, offset)


def similarity_labels(
    items: Csr, threshold: float = 0.6, deadline: float = float("inf")
) -> NDArray[np.int64] | None:
    """Label rows by leader clustering: a row joins a leader at Jaccard index >= ``threshold``.

    Leaders are taken by size of support, largest first. O(leaders * nnz). Returns None when
    the first groups have fewer than three rows on average, or ``time.perf_counter`` passes
    ``deadline``.
    """
    matrix = items.astype(np.float32)
    size = np.diff(items.indptr)
    labels = np.full(items.shape[0], -1, dtype=np.int64)
    leaders = 0
    for row in np.argsort(-size, kind="stable"):
        if labels[row] >= 0:
            continue
        if leaders % 32 == 31 and np.count_nonzero(labels >= 0) < 3 * leaders:
            return None
        if time.perf_counter() > deadline:
            return None
        shared = np.asarray(matrix @ items[row].toarray().ravel())
        near = shared >= threshold * (size + size[row] - shared)
        labels[near & (labels < 0)] = leaders
        leaders += 1
    return labels


def packed_order(items: Csr, labels: NDArray[np.int64], tile: int, offset: int = 0) -> Perm:
    """Place groups of equal label so that few tiles hold more than one of them.

    Whole tiles of one group come first, the widest support first; what is left of each group
    is packed into tiles by best fit, so that a group is split only to fill a gap. Indices that
    nothing touches go last.

    Parameters
    ----------
    items : csr_matrix of bool, shape [n, windows]
    labels : ndarray of int64, shape [n]
    tile : int
    offset : int
        Position of the first index modulo ``tile``: how much of the first tile is taken.
    """
    sizes = np.diff(items.indptr)
    widest = np.zeros(int(labels.max(initial=0)) + 1, dtype=np.int64)
    np.maximum.at(widest, labels, sizes)
    order = np.lexsort((-sizes, labels, -widest[labels]))
    live, dead = order[sizes[order] > 0], np.flatnonzero(sizes == 0)
    groups = np.split(live, np.flatnonzero(np.diff(labels[live])) + 1)
    head = min((-offset) % tile, live.size)
    wholes = [group[: group.size - group.size % tile] for group in groups]
    rests = [group[group.size - group.size % tile :] for group in groups]
    packed = np.concatenate([*wholes, *pack_chunks([r for r in rests if r.size], tile)])
    # What must share the first, partly taken tile comes from the end, where groups mix.
    return np.concatenate([np.roll(packed, head), dead]).astype(np.int32)


def pack_chunks(chunks: Sequence[NDArray[Any]], tile: int) -> list[NDArray[Any]]:
    """Order chunks, each smaller than ``tile``, so that few of them straddle a tile border.

    Best fit decreasing: every chunk goes to the fullest tile with room for it. The tiles that
    stay open are then filled from the smallest chunks, which may be cut.
    """
    bins: list[list[NDArray[Any]]] = []
    room = np.empty(len(chunks), dtype=np.int64)
    for chunk in sorted(chunks, key=lambda c: -int(c.size)):
        left = room[: len(bins)]
        fitting = np.flatnonzero(left >= chunk.size)
        if fitting.size:
            best = int(fitting[np.argmin(left[fitting])])
        else:
            best = len(bins)
            bins.append([])
            room[best] = tile
        bins[best].append(chunk)
        room[best] -= chunk.size
    filled = sorted(range(len(bins)), key=lambda k: int(room[k]))
    return _fill_gaps([bins[k] for k in filled], [int(room[k]) for k in filled])


def _fill_gaps(bins: list[list[NDArray[Any]]], room: list[int]) -> list[NDArray[Any]]:
    """Move indices of the emptiest bins, which come last, into the gaps of the fuller ones."""
    tails = [np.concatenate(content) for content in bins]
    last = len(tails) - 1
    for k in range(len(tails)):
        while room[k] and last > k:
            moved = min(room[k], tails[last].size)
            tails[k] = np.concatenate([tails[k], tails[last][tails[last].size - moved :]])
            tails[last] = tails[last][: tails[last].size - moved]
            room[k] -= moved
            last -= tails[last].size == 0
    return tails


def norm_order(items: Csr, weights: NDArray[np.float64]) -> Perm:
    """Sort by the weighted number of windows that touch an index, most first; stable."""
    return np.argsort(-(items @ weights), kind="stable").astype(np.int32)


def dealt_order(items: Csr, weights: NDArray[np.float64], tile: int) -> Perm:
    """Deal indices, the largest support first, to the tiles like cards, there and back.

    Every tile gets about the same total support: a start for padded accesses, which pay for the
    fullest tile. Arguments as in :func:`greedy_order`.
    """
    ranked = norm_order(items, weights)
    tiles = -(-ranked.size // tile)
    turn = np.arange(tile * tiles).reshape(tile, tiles)
    turn[1::2] = turn[1::2, ::-1]
    # A partial last tile holds the indices of the shortest columns: they are dealt last.
    places = turn.T.reshape(-1)
    return ranked[places[places < ranked.size]]


def greedy_order(
    items: Csr,
    weights: NDArray[np.float64],
    tile: int,
    *,
    offset: int = 0,
    dense_first: bool = True,
    deadline: float = float("inf"),
) -> Perm:
    """Fill one tile after the other with the index that adds least to the tile's union.

    O(tiles * windows * n) multiply-adds in the worst case. Indices of equal support are one
    row with a count.

    Parameters
    ----------
    items : csr_matrix of bool, shape [n, windows]
    weights : ndarray of float64, shape [windows]
    tile, offset : int
        As in :func:`support_order`.
    dense_first : bool
        A tile starts with the index of the largest support left; False: the smallest.
    deadline : float
        Value of ``time.perf_counter`` at which to leave the rest as it is.
    """
    labels = support_labels(items)
    order = np.argsort(labels, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    first = np.array([group[0] for group in members])
    left = np.array([group.size for group in members])
    support = items[first].toarray()
    by_window = np.ascontiguousarray((support * weights).T, dtype=np.float32)
    size = (support @ weights).astype(np.float32)
    picked: list[NDArray[Any]] = []
    room = tile - offset % tile
    while left.any():
        if time.perf_counter() > deadline:
            picked += [group[group.size - k :] for group, k in zip(members, left, strict=True)]
            break
        fresh = size.copy()
        union = np.zeros(support.shape[1], dtype=np.bool_)
        row = _opening(size, left, dense_first)
        while True:
            taken = min(int(left[row]), room)
            picked.append(members[row][members[row].size - left[row] :][:taken])
            left[row] -= taken
            room -= taken
            if not room or not left.any():
                break
            added = np.flatnonzero(support[row] & ~union)
            union[added] = True
            fresh -= by_window[added].sum(axis=0)
            row = int(np.argmin(np.where(left > 0, fresh - _TIE * size, np.inf)))
        room = tile
    return np.concatenate(picked).astype(np.int32)


def _opening(size: NDArray[np.float32], left: NDArray[np.int64], dense_first: bool) -> int:
    # Empty supports are cheapest anywhere: they must not open tiles before the last.
    key = -size if dense_first else np.where(size > 0, size, np.float32(np.inf))
    live = np.flatnonzero(left > 0)
    return int(live[np.argmin(key[live])])


def label_order(labels: NDArray[np.int64], size: NDArray[np.float64] | None = None) -> Perm:
    """Place groups of equal label contiguously, the largest first, each in its old order."""
    totals = np.bincount(labels, weights=size)
    _, first = np.unique(labels, return_index=True)
    rank = np.empty(totals.size)
    rank[np.lexsort((first, -totals[labels[first]]))] = np.arange(first.size)
    return np.lexsort((np.arange(labels.size), rank[labels])).astype(np.int32)


def fiedler_order(graph: Csr) -> Perm:
    """Order by the Fiedler vector of the normalised Laplacian, one component after the other.

    The start vector and the sign are fixed, so the order is deterministic. Isolated indices go
    last. Source: Fiedler (1973); Shi and Malik, IEEE TPAMI 22(8), 2000.

    Parameters
    ----------
    graph : csr_matrix, shape [n, n]
        Symmetric, non-negative.
    """
    _, labels = connected_components(graph, directed=False)
    return _by_component(labels, lambda members: _graph_fiedler(graph[members][:, members]))


def incidence_fiedler_order(items: Csr, weights: NDArray[np.float64]) -> Perm:
    """Return the Fiedler order of W = B diag(weights) B^T without forming W.

    Parameters
    ----------
    items : csr_matrix of bool, shape [n, windows]
        B.
    weights : ndarray of float64, shape [windows]
    """
    n = items.shape[0]
    edges = items.tocoo()
    total = n + items.shape[1]
    bipartite = sp.csr_matrix((edges.data, (edges.row, edges.col + n)), shape=(total, total))
    _, labels = connected_components(bipartite, directed=False)
    return _by_component(labels[:n], lambda members: _incidence_fiedler(items[members], weights))


def _by_component(
    labels: NDArray[Any], values: Callable[[NDArray[Any]], NDArray[np.float64]]
) -> Perm:
    compact = np.unique(labels, return_inverse=True)[1].astype(np.int64)
    order = label_order(compact)
    bounds = np.flatnonzero(np.diff(compact[order])) + 1
    parts = [
        part[np.argsort(values(part), kind="stable")] if part.size > 2 else part
        for part in np.split(order, bounds)
    ]
    return np.concatenate(parts).astype(np.int32)


def _graph_fiedler(graph: Csr) -> NDArray[np.float64]:
    degree = np.asarray(graph @ np.ones(graph.shape[0]))
    return _second_vector(lambda x: graph @ x, degree)


def _incidence_fiedler(items: Csr, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    matrix = items.astype(np.float64)
    across = sp.csr_matrix(matrix.T)

    def apply(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(matrix @ (weights * (across @ x)))

    return _second_vector(apply, apply(np.ones(items.shape[0])))


def _second_vector(
    apply: Callable[[NDArray[np.float64]], NDArray[np.float64]], degree: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Second eigenvector of D^-1 A; the leading one, sqrt(degree), is deflated by hand."""
    n = degree.size
    scale = 1.0 / np.sqrt(np.maximum(degree, np.finfo(np.float64).tiny))
    top = np.sqrt(degree) / np.linalg.norm(np.sqrt(degree))

    def normalised(x: NDArray[np.float64]) -> NDArray[np.float64]:
        flat = x.ravel()
        return scale * apply(scale * flat) + flat - 2.0 * top * float(top @ flat)

    operator = LinearOperator((n, n), matvec=normalised, dtype=np.float64)
    start = np.cos(np.arange(n) * 0.5) + 0.1
    try:
        _, vectors = eigsh(
            operator, k=1, which="LA", v0=start, ncv=min(n - 1, 48), tol=1e-4, maxiter=200
        )
    except ArpackError as error:
        vectors = getattr(error, "eigenvectors", np.empty((n, 0)))
    if vectors.shape[1] == 0:
        return np.zeros(n)
    vector = np.asarray(vectors[:, 0]) * scale
    return vector if vector[np.argmax(np.abs(vector))] > 0 else -vector
