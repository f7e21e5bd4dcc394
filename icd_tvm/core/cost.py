"""Cost of an order of one axis: distinct tiles U, distance C, modularity Q, roofline time.

Definitions, proofs and measured rank correlations: ``docs/Theoretical_Analysis.md``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from icd_tvm.core.hardware import Hardware
from icd_tvm.core.permutation import Perm, as_permutation, invert
from icd_tvm.errors import ConfigError, NonFiniteError, ShapeError

Csr = sp.csr_matrix
_BITMAP_CAP = 1 << 26
_BITS = np.array([value.bit_count() for value in range(256)], dtype=np.uint8)


@dataclass(frozen=True, eq=False)
class TileAccess:
    """What one kernel touches on the axis that is to be permuted.

    Attributes
    ----------
    incidence : csr_matrix of bool, shape [windows, n]
        Entry (w, i) is set when window w touches the logical index i.
    tile : int
        Contiguous new positions the kernel handles as one unit.
    weight : float
        Cost of one (window, tile) unit, in any unit common to all accesses.
    label : str
        Name for reports.
    counts : ndarray of float64, shape [windows], optional
        How often each window is executed; 1 where absent.
    padded : bool
        The kernel does as many steps for every tile as for the fullest one (one list length for
        all column groups), so it pays tiles * max over tiles and not the sum over tiles.
    lanes : int
        Elements of the aligned vector or cache line that the kernel reads the axis by: its bytes
        over the element size. 0 stands for one tile.

    Raises
    ------
    ShapeError, ConfigError, NonFiniteError
        If a field has the wrong shape or value.
    """

    incidence: Csr
    tile: int
    weight: float = 1.0
    label: str = ""
    counts: NDArray[np.float64] | None = None
    padded: bool = False
    lanes: int = 0

    def __post_init__(self) -> None:
        matrix = sp.csr_matrix(self.incidence)
        if matrix.dtype != np.bool_:
            matrix = matrix.astype(np.bool_)
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        object.__setattr__(self, "incidence", matrix)
        if self.tile < 1:
            raise ConfigError(f"access {self.label!r}: tile {self.tile} must be at least 1")
        if self.lanes < 0:
            raise ConfigError(f"access {self.label!r}: lanes {self.lanes} is negative")
        if not np.isfinite(self.weight):
            raise NonFiniteError(f"access {self.label!r}: weight {self.weight} is not finite")
        if self.weight < 0:
            raise ConfigError(f"access {self.label!r}: weight {self.weight} is negative")
        if self.counts is not None:
            self._check_counts(np.asarray(self.counts, dtype=np.float64))

    def _check_counts(self, counts: NDArray[np.float64]) -> None:
        if counts.shape != (self.windows,):
            raise ShapeError(f"access {self.label!r}: counts {counts.shape} != ({self.windows},)")
        if not np.all(np.isfinite(counts)):
            raise NonFiniteError(f"access {self.label!r}: counts hold NaN or infinity")
        if np.any(counts < 0):
            raise ConfigError(f"access {self.label!r}: counts are negative")
        object.__setattr__(self, "counts", counts)

    @property
    def windows(self) -> int:
        """Number of windows (rows)."""
        return int(self.incidence.shape[0])

    @property
    def n(self) -> int:
        """Length of the axis (columns)."""
        return int(self.incidence.shape[1])

    @property
    def tiles(self) -> int:
        """Number of tiles, the last one perhaps partial."""
        return -(-self.n // self.tile)

    @property
    def alignment(self) -> int:
        """Positions from one vector or line border to the next."""
        return self.lanes or self.tile

    @property
    def unit_weights(self) -> NDArray[np.float64]:
        """Cost of one touched tile of each window, float64[windows]."""
        counts = np.ones(self.windows) if self.counts is None else self.counts
        return counts * self.weight

    def degrees(self) -> NDArray[np.int64]:
        """Number of indices each window touches, int64[windows]."""
        return np.diff(self.incidence.indptr).astype(np.int64)


def check_accesses(accesses: Sequence[TileAccess]) -> int:
    """Return the common axis length of ``accesses``; ShapeError if they differ or are none."""
    lengths = {access.n for access in accesses}
    if len(lengths) != 1:
        raise ShapeError(f"accesses have axis lengths {sorted(lengths)}, expected exactly one")
    return lengths.pop()


def touched_tiles(access: TileAccess, perm: ArrayLike) -> NDArray[np.int64]:
    """Return how many distinct tiles each window touches under ``perm``, int64[windows]."""
    parts = [bitmap.sum(axis=1) for _, bitmap in _bitmaps(access, perm)]
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def tile_loads(access: TileAccess, perm: ArrayLike) -> NDArray[np.float64]:
    """Return the weighted number of windows that touch each tile, float64[tiles]."""
    weights, loads = access.unit_weights, np.zeros(access.tiles)
    for first, bitmap in _bitmaps(access, perm):
        loads += weights[first : first + bitmap.shape[0]] @ bitmap
    return loads


def _bitmaps(access: TileAccess, perm: ArrayLike) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """Yield (first window, bool[windows, tiles] of what they touch) for runs of windows."""
    tile_of = invert(as_permutation(perm, access.n)) // access.tile
    matrix, tiles = access.incidence, access.tiles
    step = max(1, _BITMAP_CAP // max(1, tiles))
    for first in range(0, access.windows, step):
        last = min(first + step, access.windows)
        start, stop = matrix.indptr[first], matrix.indptr[last]
        rows = np.repeat(np.arange(last - first), np.diff(matrix.indptr[first : last + 1]))
        bitmap = np.zeros((last - first, tiles), dtype=np.bool_)
        bitmap[rows, tile_of[matrix.indices[start:stop]]] = True
        yield first, bitmap


def tile_cost(accesses: Sequence[TileAccess], perm: ArrayLike) -> float:
    """Return U(perm), the weighted number of (window, tile) units the kernels handle.

    Those touched, or tiles * (those of the fullest tile) for a padded access. Exact,
    O(nnz + windows * tiles).

    Parameters
    ----------
    accesses : sequence of TileAccess
        All on the same axis of length n.
    perm : array_like of int, shape [n]
        ``new[i] = old[perm[i]]``.

    Raises
    ------
    ShapeError, PermutationError
        If the accesses disagree on n, or ``perm`` is no permutation of n indices.
    """
    order = as_permutation(perm, check_accesses(accesses)) if accesses else None
    if order is None:
        return 0.0
    return float(sum(_units(access, order) for access in accesses))


def _units(access: TileAccess, order: Perm) -> float:
    if access.padded:
        return access.tiles * float(tile_loads(access, order).max(initial=0.0))
    return float(touched_tiles(access, order) @ access.unit_weights)


def tile_lower_bound(accesses: Sequence[TileAccess]) -> float:
    """Return a bound that U of no permutation is below.

    A window that touches d indices touches at least ceil(d / tile) tiles. The fullest tile of a
    padded access holds at least the average, and at least the windows of any one index.
    """
    return float(sum(_least_units(access) for access in accesses))


def _least_units(access: TileAccess) -> float:
    least = float(-(-access.degrees() // access.tile) @ access.unit_weights)
    if not access.padded:
        return least
    fullest = np.asarray(access.unit_weights @ access.incidence.astype(np.float64))
    return max(least, access.tiles * float(fullest.max(initial=0.0)))


def tile_upper_bound(accesses: Sequence[TileAccess]) -> float:
    """Return a bound that U of no permutation exceeds.

    min(d, tiles) for each window, all tiles for each window of a padded access.
    """
    return float(sum(_most_units(access) for access in accesses))


def _most_units(access: TileAccess) -> float:
    degrees = access.degrees()
    most = access.tiles * (degrees > 0) if access.padded else np.minimum(degrees, access.tiles)
    return float(most @ access.unit_weights)


def distance_cost(graph: Csr, perm: ArrayLike, window: int = 16) -> float:
    """Return C(perm), the windowed saturating distance, in [0, 1].

    C = sum_ij W_ij min(abs(p_i - p_j), window) / (window * sum_ij W_ij), with p the new position
    of an index. Zero for an empty graph. O(nnz).

    Raises
    ------
    ConfigError
        If ``window`` is below 1.
    """
    if window < 1:
        raise ConfigError(f"distance window {window} must be at least 1")
    total = float(graph.data.sum(dtype=np.float64))
    if total == 0.0:
        return 0.0
    position = invert(as_permutation(perm, graph.shape[0])).astype(np.int64)
    rows = np.repeat(position, np.diff(graph.indptr))
    distance = np.minimum(np.abs(rows - position[graph.indices]), window)
    return float(graph.data.astype(np.float64) @ distance) / (window * total)


def block_labels(n: int, blocks: int) -> NDArray[np.int64]:
    """Return the block of each position when n positions are cut into ``blocks`` equal runs."""
    if not 1 <= blocks <= max(n, 1):
        raise ConfigError(f"k_blocks {blocks} must be between 1 and {n}")
    return np.arange(n, dtype=np.int64) * blocks // max(n, 1)


def label_modularity(graph: Csr, labels: NDArray[np.int64], gamma: float = 1.0) -> float:
    """Return Newman's modularity of a partition, with resolution ``gamma``.

    Q = sum_b [ W_bb / 2m - gamma (d_b / 2m)^2 ], W_bb the weight inside block b counted in
    both directions, d_b its degree, 2m the sum of W. Zero for an empty graph. O(nnz).
    Source: Newman, Phys. Rev. E 70, 056131 (2004); resolution: Reichardt and Bornholdt (2006).
    """
    data = graph.data.astype(np.float64)
    total = float(data.sum())
    if total == 0.0:
        return 0.0
    rows = np.repeat(labels, np.diff(graph.indptr))
    inside = float(data[rows == labels[graph.indices]].sum())
    degree = np.bincount(rows, weights=data)
    return inside / total - gamma * float(degree @ degree) / total**2


def modularity(graph: Csr, perm: ArrayLike, blocks: int, gamma: float = 1.0) -> float:
    """Return Q(perm): the modularity of ``blocks`` equal contiguous runs of new positions."""
    position = invert(as_permutation(perm, graph.shape[0]))
    return label_modularity(graph, block_labels(position.size, blocks)[position], gamma)


def shuffled_graph(graph: Csr, seed: int) -> Csr:
    """Return a graph with the same degrees in expectation and no structure.

    The stubs of all edges are re-paired at random (configuration model), the weights shuffled
    with them; self loops are dropped and parallel edges added. Symmetric, zero diagonal.
    """
    upper = sp.triu(graph, k=1).tocoo()
    rng = np.random.default_rng(seed)
    ends = rng.permutation(np.concatenate([upper.row, upper.col]))
    first, second = np.split(ends, 2)
    keep = first != second
    weights = rng.permutation(upper.data)[keep]
    half = sp.coo_matrix((weights, (first[keep], second[keep])), shape=graph.shape)
    return sp.csr_matrix(half + half.T)


def incidence_distance(accesses: Sequence[TileAccess], perm: ArrayLike, window: int = 16) -> float:
    """Return C(perm) of W = sum_l weight_l B_l^T diag(counts_l) B_l without forming W.

    O(window * windows * n / 8) byte operations for each distinct window weight.
    """
    order = as_permutation(perm, check_accesses(accesses))
    total, near = 0.0, 0.0
    for access in accesses:
        weights, degrees = access.unit_weights, access.degrees()
        total += float(weights @ (degrees * (degrees - 1) / 2))
        for weight in np.unique(weights[degrees > 1]):
            chosen = access.incidence[np.flatnonzero((weights == weight) & (degrees > 1))]
            near += float(weight) * _near_pairs(chosen[:, order], window)
    return 1.0 - near / total if total else 0.0


def _near_pairs(incidence: Csr, window: int) -> float:
    """Sum 1 - gap / window over pairs of one row that are gap < window columns apart."""
    near = 0.0
    for first in range(0, incidence.shape[0], 2048):
        columns = np.packbits(incidence[first : first + 2048].toarray(), axis=0).T.copy()
        for gap in range(1, min(window, incidence.shape[1])):
            both = int(_BITS[columns[gap:] & columns[:-gap]].sum(dtype=np.int64))
            near += both * (1 - gap / window)
    return near


def incidence_modularity(
    accesses: Sequence[TileAccess], perm: ArrayLike, blocks: int, gamma: float = 1.0
) -> float:
    """Return Q(perm) of W = sum_l weight_l B_l^T diag(counts_l) B_l without forming W. O(nnz)."""
    n = check_accesses(accesses)
    labels = block_labels(n, blocks)[invert(as_permutation(perm, n))]
    degree, inside = np.zeros(blocks), 0.0
    for access in accesses:
        weights = access.unit_weights
        one_hot = sp.csr_matrix((np.ones(n), (np.arange(n), labels)), shape=(n, blocks))
        shares = sp.csr_matrix(access.incidence.astype(np.float64) @ one_hot)
        row_weight = np.repeat(weights, np.diff(shares.indptr))
        inside += float(row_weight @ (shares.data * (shares.data - 1)))
        row_degree = np.repeat(weights * (access.degrees() - 1), np.diff(shares.indptr))
        degree += np.bincount(shares.indices, row_degree * shares.data, minlength=blocks)
    total = float(degree.sum())
    return inside / total - gamma * float(degree @ degree) / total**2 if total else 0.0


def predicted_time(
    units: float, flop_per_unit: float, bytes_per_unit: float, hardware: Hardware
) -> float:
    """Return the roofline time of ``units`` tile units, in seconds. A model, not a measurement.

    max(units * flop_per_unit / peak, units * bytes_per_unit / bandwidth), with the bandwidth of
    the smallest memory level that holds all the bytes.
    Source: Williams, Waterman and Patterson, Commun. ACM 52(4), 2009.

    Raises
    ------
    ConfigError
        If an argument is negative or not finite.
    """
    values = {"units": units, "flop_per_unit": flop_per_unit, "bytes_per_unit": bytes_per_unit}
    for name, value in values.items():
        if not np.isfinite(value) or value < 0:
            raise ConfigError(f"predicted_time: {name}={value} must be finite and not negative")
    moved = units * bytes_per_unit
    return max(units * flop_per_unit / hardware.peak_flops, moved / hardware.bandwidth(moved))
