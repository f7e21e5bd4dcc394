"""Local search for kernels that pay for the fullest tile, not for the sum over tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from icd_tvm.core.cost import TileAccess, tile_loads
from icd_tvm.core.search import Floats, SearchResult, TileSearch
from icd_tvm.core.tile_state import TileState

# Sum of the loads' 16th powers: steep enough that the fullest tiles decide, smooth enough that
# a swap which lowers one of several equally full tiles counts as progress.
_SQUARINGS = 4


class LoadState(TileState):
    """U of a changing order, padded accesses included; arguments as :class:`TileState`.

    Attributes
    ----------
    loads : list of float64 array
        Weighted number of windows that touch each tile, one array an access.
    """

    def __init__(self, accesses: Sequence[TileAccess], perm: ArrayLike) -> None:
        self.loads: list[NDArray[np.float64]] = []
        super().__init__(accesses, perm)

    def _total(self) -> float:
        self.loads = [tile_loads(a, self.perm) for a in self.accesses]
        return self.units()

    def units(self) -> float:
        """Return U."""
        pairs = zip(self.accesses, self.loads, strict=True)
        return float(sum(_units(access, loads) for access, loads in pairs))

    def apply(self, positions: NDArray[np.intp], items: NDArray[np.int32]) -> float:
        """Do a move; return its change of ``cost``."""
        change = super().apply(positions, items)
        for k, access in enumerate(self.accesses):
            tiles = np.unique(positions // access.tile)
            self.loads[k][tiles] = (self.counts[k][tiles] > 0) @ self.weights[k]
        return change

    def _access_changes(
        self, k: int, tiles: NDArray[np.intp], old: NDArray[np.int32], new: NDArray[np.int32]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32], float]:
        keys, steps, flips = self._flips(k, tiles, old, new)
        windows = self.accesses[k].windows
        touched, where = np.unique(keys // windows, return_inverse=True)
        change = np.bincount(where, flips * self.weights[k][keys % windows], minlength=touched.size)
        return keys, steps, self._gain(k, touched, self.loads[k][touched] + change)

    def _gain(self, k: int, tiles: NDArray[np.int64], loads: NDArray[np.float64]) -> float:
        """Return the change of ``cost`` if ``tiles`` of access ``k`` had the given loads."""
        changed = self.loads[k].copy()
        changed[tiles] = loads
        return _units(self.accesses[k], changed) - _units(self.accesses[k], self.loads[k])


def _units(access: TileAccess, loads: NDArray[np.float64]) -> float:
    return float(loads.max(initial=0.0) * loads.size if access.padded else loads.sum())


class SmoothState(LoadState):
    """A smooth stand-in for U of padded accesses.

    ``cost`` is sum over tiles of scale * (load / scale)^16 for padded accesses, scale being the
    mean load of the starting order, and the load itself for others.
    """

    def _total(self) -> float:
        super()._total()
        self.scales = [max(float(loads.mean()), 1e-300) for loads in self.loads]
        return float(sum(self.potential(k, loads).sum() for k, loads in enumerate(self.loads)))

    def potential(self, k: int, loads: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the stand-in of tiles of access ``k`` that have the given loads."""
        if not self.accesses[k].padded:
            return loads
        ratio = loads / self.scales[k]
        for _ in range(_SQUARINGS):
            ratio = ratio * ratio
        return np.asarray(self.scales[k] * ratio)

    def _gain(self, k: int, tiles: NDArray[np.int64], loads: NDArray[np.float64]) -> float:
        return float((self.potential(k, loads) - self.potential(k, self.loads[k][tiles])).sum())


class BalancedSearch(TileSearch):
    """The search of :class:`TileSearch` on the stand-in of :class:`SmoothState`.

    Monotone in the stand-in; the caller compares the result with the start on U itself.
    Arguments as there.
    """

    state: SmoothState

    def __init__(
        self,
        accesses: Sequence[TileAccess],
        perm: ArrayLike,
        classes: NDArray[np.int64],
        seed: int,
        bound: float,
    ) -> None:
        super().__init__(accesses, perm, classes, seed, bound)
        self.state = SmoothState(accesses, perm)

    def run(self, steps: int, deadline: float) -> SearchResult:
        """Search as :meth:`TileSearch.run` does; ``cost`` of the result is U."""
        return replace(super().run(steps, deadline), cost=self.state.units())

    def _value(self) -> float:
        return self.state.units()

    def _pair_deltas(self, positions: NDArray[np.int64]) -> Floats:
        """Change of the stand-in of every swap among ``positions``, float32[m, m].

        With the sets of :meth:`TileSearch._pair_deltas`, the load of i's tile g changes by
        |N_jg| - |E_i| + |E_i & R_j| when j replaces i.
        """
        total = np.zeros((positions.size, positions.size))
        chosen = self.state.perm[positions]
        for k, access in enumerate(self.state.accesses):
            tiles, local = np.unique(positions // access.tile, return_inverse=True)
            enter, alone, kept = self._shares(k, chosen, tiles, local)
            moved = enter[:, local].T - alone[:, None] + kept
            loads = self.state.loads[k][tiles][local][:, None]
            change = self.state.potential(k, loads + moved) - self.state.potential(k, loads)
            change += change.T
            change[local[:, None] == local] = 0.0
            total += change
        return total.astype(np.float32)
