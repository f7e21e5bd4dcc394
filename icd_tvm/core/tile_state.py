"""U of a changing order: exact prices of swaps and segment moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from icd_tvm.core.cost import Csr, TileAccess, check_accesses, touched_tiles
from icd_tvm.core.permutation import Perm, as_permutation, invert
from icd_tvm.errors import ConfigError


class Moves:
    """Swaps and segment moves of an order, priced and done by ``delta`` and ``apply``.

    Attributes
    ----------
    perm : int32[n]
        The order as it is now.
    """

    perm: Perm

    def delta(self, positions: NDArray[np.intp], items: NDArray[np.int32]) -> float:
        """Return the change of cost if ``items[k]`` were placed at ``positions[k]`` for every k.

        ``items`` must be the items now at ``positions``, in another order.
        """
        raise NotImplementedError

    def apply(self, positions: NDArray[np.intp], items: NDArray[np.int32]) -> float:
        """Do what :meth:`delta` prices, and return that change of cost."""
        raise NotImplementedError

    def swap_delta(self, a: int, b: int) -> float:
        """Return the change of cost if the items at positions ``a`` and ``b`` changed places."""
        return self.delta(*self._swap(a, b))

    def swap(self, a: int, b: int) -> float:
        """Exchange the items at positions ``a`` and ``b``; return the change of cost."""
        return self.apply(*self._swap(a, b))

    def _swap(self, a: int, b: int) -> tuple[NDArray[np.intp], NDArray[np.int32]]:
        positions = np.array([a, b] if a != b else [a], dtype=np.intp)
        return positions, self.perm[positions[::-1]]

    def move_delta(self, start: int, length: int, dest: int) -> float:
        """Return the change of cost if a segment moved; arguments as in :func:`moved_segment`."""
        return self.delta(*moved_segment(self.perm, start, length, dest))

    def move(self, start: int, length: int, dest: int) -> float:
        """Move a segment; arguments as in :func:`moved_segment`; return the change of cost."""
        return self.apply(*moved_segment(self.perm, start, length, dest))


class TileState(Moves):
    """U of a changing order, kept up to date in time proportional to what a move touches.

    Padded accesses count as the sum over their tiles; see ``icd_tvm/core/balance.py``.

    Parameters
    ----------
    accesses : sequence of TileAccess
    perm : array_like of int, shape [n]
        The starting order; copied.
    """

    def __init__(self, accesses: Sequence[TileAccess], perm: ArrayLike) -> None:
        self.accesses = tuple(accesses)
        self.perm: Perm = as_permutation(perm, check_accesses(self.accesses)).copy()
        self.items = [sp.csr_matrix(a.incidence.T) for a in self.accesses]
        self.weights = [a.unit_weights for a in self.accesses]
        self.counts = [self._count(a) for a in self.accesses]
        self.cost = self._total()

    def _total(self) -> float:
        return float(sum(touched_tiles(a, self.perm) @ a.unit_weights for a in self.accesses))

    def _count(self, access: TileAccess) -> NDArray[np.int32]:
        tile_of = invert(self.perm) // access.tile
        one_hot = sp.csr_matrix(
            (np.ones(access.n, dtype=np.int32), (tile_of, np.arange(access.n))),
            shape=(access.tiles, access.n),
        )
        product: Any = one_hot @ access.incidence.T.astype(np.int32)
        return np.asarray(product.todense(), dtype=np.int32)

    def delta(self, positions: NDArray[np.intp], items: NDArray[np.int32]) -> float:
        """Return the change of U; see :meth:`Moves.delta`."""
        return float(sum(gain for _, _, gain in self._changes(positions, items)))

    def apply(self, positions: NDArray[np.intp], items: NDArray[np.int32]) -> float:
        """Do what :meth:`delta` prices, and return that change of U."""
        total = 0.0
        for counts, (keys, steps, gain) in zip(
            self.counts, self._changes(positions, items), strict=True
        ):
            counts.reshape(-1)[keys] += steps
            total += gain
        self.perm[positions] = items
        self.cost += total
        return total

    def _changes(
        self, positions: NDArray[np.intp], items: NDArray[np.int32]
    ) -> list[tuple[NDArray[np.int64], NDArray[np.int32], float]]:
        old = self.perm[positions]
        return [
            self._access_changes(k, positions // a.tile, old, items)
            for k, a in enumerate(self.accesses)
        ]

    def _access_changes(
        self, k: int, tiles: NDArray[np.intp], old: NDArray[np.int32], new: NDArray[np.int32]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32], float]:
        keys, steps, flips = self._flips(k, tiles, old, new)
        return keys, steps, float(flips @ self.weights[k][keys % self.accesses[k].windows])

    def _flips(
        self, k: int, tiles: NDArray[np.intp], old: NDArray[np.int32], new: NDArray[np.int32]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
        """Return (tile, window) cells, how their counts change, and which become (un)touched."""
        windows = self.accesses[k].windows
        leave = _cells(self.items[k], old, tiles, windows)
        enter = _cells(self.items[k], new, tiles, windows)
        keys, where = np.unique(np.concatenate([leave, enter]), return_inverse=True)
        signs = np.concatenate([np.full(leave.size, -1), np.full(enter.size, 1)])
        steps = np.bincount(where, weights=signs, minlength=keys.size).astype(np.int32)
        before = self.counts[k].reshape(-1)[keys]
        return keys, steps, (before + steps > 0).astype(np.int64) - (before > 0)


def _cells(
    items: Csr, chosen: NDArray[np.int32], tiles: NDArray[np.intp], windows: int
) -> NDArray[np.int64]:
    rows = items[chosen]
    return np.repeat(tiles, np.diff(rows.indptr)).astype(np.int64) * windows + rows.indices


def moved_segment(
    perm: Perm, start: int, length: int, dest: int
) -> tuple[NDArray[np.intp], NDArray[np.int32]]:
    """Return the positions a segment move touches and the items it puts there.

    The segment ``perm[start : start + length]`` is taken out and put back so that it starts at
    position ``dest``; what lies between shifts.

    Raises
    ------
    ConfigError
        If the segment or its destination leaves the axis.
    """
    last = perm.size - length
    if length < 1 or not 0 <= start <= last or not 0 <= dest <= last:
        raise ConfigError(f"segment [{start}, {start + length}) to {dest} leaves {perm.size}")
    low, high = min(start, dest), max(start, dest) + length
    window = perm[low:high]
    segment = perm[start : start + length]
    rest = np.delete(window, np.s_[start - low : start - low + length])
    items = np.insert(rest, dest - low, segment)
    return np.arange(low, high, dtype=np.intp), items.astype(np.int32)
