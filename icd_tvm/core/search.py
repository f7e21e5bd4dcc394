"""Local search on U: monotone, anytime, exact in every step it takes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from icd_tvm.core.cost import TileAccess
from icd_tvm.core.permutation import Perm
from icd_tvm.core.starts import stacked_items
from icd_tvm.core.tile_state import TileState, moved_segment

Floats = NDArray[np.float32]

# Work of one round, items^2 * windows multiply-adds: some hundredths of a second.
_ROUND_WORK = 2.5e8
_ROUND_ITEMS = 512
_KICK_PATIENCE = 200


@dataclass(frozen=True)
class SearchResult:
    """Outcome of a search.

    Attributes
    ----------
    perm : int32[n]
    cost : float
    steps : int
        Rounds taken; one round prices every swap between two sets of tiles, or one kick.
    stopped_by : {"converged", "steps", "time", "bound"}
    """

    perm: Perm
    cost: float
    steps: int
    stopped_by: str


def common_block(tiles: Sequence[int], n: int) -> int:
    """Return the least run of positions that no tile of any access straddles, at most n."""
    return min(math.lcm(*tiles), n)


class TileSearch:
    """Pair swaps, then kicks (re-packing of a few tiles, segment moves), on the exact U.

    A round prices all swaps among some blocks with three matrix products an access, and takes
    the best swaps of disjoint pairs of blocks; their changes of U add up exactly.

    Parameters
    ----------
    accesses : sequence of TileAccess
    perm : array_like of int, shape [n]
        Where to start.
    classes : ndarray of int64, shape [n]
        Class of each position; indices move between positions of one class only.
    seed : int
    bound : float
        A lower bound of U; reaching it ends the search.
    """

    def __init__(
        self,
        accesses: Sequence[TileAccess],
        perm: ArrayLike,
        classes: NDArray[np.int64],
        seed: int,
        bound: float,
    ) -> None:
        self.state = TileState(accesses, perm)
        self.classes = classes
        self.rng = np.random.default_rng(seed)
        self.bound = bound
        self.n = classes.size
        self.block = common_block([a.tile for a in accesses], self.n)
        self.blocks = -(-self.n // self.block)
        self.tile = max(a.tile for a in accesses)
        self.items, self.weights = stacked_items(accesses)
        self.steps = 0

    def run(self, steps: int, deadline: float) -> SearchResult:
        """Search until nothing improves, ``steps`` rounds are done or the deadline passes."""
        reason = self._descend(steps, deadline)
        idle = 0
        while reason == "converged" and idle < _KICK_PATIENCE:
            if (stop := self._limit(steps, deadline)) is not None:
                reason = stop
                break
            self.steps += 1
            idle = 0 if self._kick() < -self._tolerance() else idle + 1
        return SearchResult(self.state.perm.copy(), self.state.cost, self.steps, reason)

    def _limit(self, steps: int, deadline: float) -> str | None:
        if self._value() <= self.bound + self._tolerance():
            return "bound"
        if self.steps >= steps:
            return "steps"
        return "time" if time.perf_counter() >= deadline else None

    def _value(self) -> float:
        return self.state.cost

    def _tolerance(self) -> float:
        return 1e-9 * max(1.0, abs(self.bound))

    def _descend(self, steps: int, deadline: float) -> str:
        """Sweep over all pairs of chunks of blocks until one whole sweep finds no swap."""
        while True:
            found = False
            for chosen in self._sweep():
                while True:
                    if (stop := self._limit(steps, deadline)) is not None:
                        return stop
                    self.steps += 1
                    if not self._round(chosen):
                        break
                    found = True
            if not found:
                return "converged"

    def _sweep(self) -> Iterator[NDArray[np.int64]]:
        """Sets of blocks such that every two blocks meet in one of them."""
        items = min(_ROUND_ITEMS, math.isqrt(int(_ROUND_WORK / max(1, self.weights.size))))
        half = max(1, items // 2 // self.block)
        order = self.rng.permutation(self.blocks)
        chunks = [order[k : k + half] for k in range(0, self.blocks, half)]
        if len(chunks) == 1:
            yield chunks[0]
        pairs = [(a, b) for a in range(len(chunks)) for b in range(a)]
        for k in self.rng.permutation(len(pairs)):
            a, b = pairs[k]
            yield np.concatenate([chunks[a], chunks[b]])

    def _round(self, chosen: NDArray[np.int64]) -> bool:
        """Take the best swaps of disjoint pairs of the chosen blocks; False if none improves."""
        grid = chosen[:, None] * self.block + np.arange(self.block)
        real = grid.reshape(-1) < self.n
        positions = np.where(real, grid.reshape(-1), 0)
        deltas = self._pair_deltas(positions)
        deltas[~real] = np.inf
        deltas[:, ~real] = np.inf
        classes = self.classes[positions]
        if classes.min() != classes.max():
            deltas[classes[:, None] != classes] = np.inf
        return self._take(positions, deltas, chosen.size)

    def _pair_deltas(self, positions: NDArray[np.int64]) -> Floats:
        """Change of U of every swap among ``positions``, float32[m, m].

        With R_i the windows of i, E_i those of them that only i touches in its tile g, and
        N_ih those of them that tile h lacks, swapping i in g with j in h changes U by
        |N_ih| + |N_jg| - |E_i| - |E_j| + |E_i & R_j| + |E_j & R_i|.
        """
        total = np.zeros((positions.size, positions.size), dtype=np.float32)
        chosen = self.state.perm[positions]
        for k, access in enumerate(self.state.accesses):
            tiles, local = np.unique(positions // access.tile, return_inverse=True)
            enter, alone, kept = self._shares(k, chosen, tiles, local)
            change = enter[:, local] - alone[:, None] + kept
            change += change.T
            change[local[:, None] == local] = 0.0
            total += change
        return total

    def _shares(
        self, k: int, chosen: Perm, tiles: NDArray[np.int64], local: NDArray[np.int64]
    ) -> tuple[Floats, Floats, Floats]:
        """Return |N_ih| [m, tiles], |E_i| [m] and |E_i & R_j| [m, m] of access ``k``, weighted."""
        counts = self.state.counts[k][tiles]
        touched = self.state.items[k][chosen].toarray()
        weighted = touched * self.state.weights[k].astype(np.float32)
        alone = weighted * (counts[local] == 1)
        enter = weighted @ (counts == 0).T.astype(np.float32)
        return enter, alone.sum(axis=1), alone @ touched.T.astype(np.float32)

    def _take(self, positions: NDArray[np.int64], deltas: Floats, blocks: int) -> bool:
        size = self.block
        cells = deltas.reshape(blocks, size, blocks, size).transpose(0, 2, 1, 3)
        flat = cells.reshape(blocks * blocks, size * size)
        best = flat.argmin(axis=1)
        values = flat[np.arange(flat.shape[0]), best]
        used = np.zeros(blocks, dtype=np.bool_)
        found = False
        for cell in np.argsort(values, kind="stable"):
            # float32 sums of weights may be off by rounding: the exact change decides.
            if values[cell] >= 0:
                break
            a, b = divmod(int(cell), blocks)
            if used[a] or used[b]:
                continue
            i, j = divmod(int(best[cell]), size)
            first, second = int(positions[a * size + i]), int(positions[b * size + j])
            if self.state.swap_delta(first, second) >= -self._tolerance():
                continue
            self.state.swap(first, second)
            used[a] = used[b] = True
            found = True
        return found

    def _kick(self) -> float:
        """Re-pack a few blocks or move a segment; keep it unless U grows."""
        positions, items = self._repacked() if self.rng.random() < 0.8 else self._segment()
        change = self.state.delta(positions, items)
        if change > self._tolerance():
            return 0.0
        return self.state.apply(positions, items)

    def _segment(self) -> tuple[NDArray[np.intp], NDArray[np.int32]]:
        own = np.flatnonzero(self.classes == self.classes[self.rng.integers(self.n)])
        reach = min(own.size, 8 * self.block)
        low = int(own[0]) + int(self.rng.integers(own.size - reach + 1))
        length = int(self.rng.integers(1, max(2, min(reach, self.block))))
        last = max(1, reach - length + 1)
        start, dest = (low + int(self.rng.integers(last)) for _ in range(2))
        return moved_segment(self.state.perm, start, length, dest)

    def _repacked(self) -> tuple[NDArray[np.intp], NDArray[np.int32]]:
        """Pool a block with those most like it and fill them anew, least new windows first."""
        first = int(self.rng.integers(self.blocks))
        others = self._alike(first, int(self.rng.integers(1, 4)))
        low = np.array([first, *others]) * self.block
        positions = (low[:, None] + np.arange(self.block)).reshape(-1)
        positions = positions[positions < self.n].astype(np.intp)
        positions = positions[self.classes[positions] == self.classes[positions[0]]]
        pool = self.state.perm[positions]
        return positions, pool[self._refill(pool, positions)]

    def _alike(self, block: int, count: int) -> NDArray[np.int64]:
        """Blocks that share many windows with ``block``, out of a random half of them."""
        own = self._block_windows(block)
        drawn = self.rng.permutation(self.blocks)[: max(2, min(self.blocks // 2, 32))]
        drawn = drawn[drawn != block]
        shared = [(self._block_windows(int(b)) & own) @ self.weights for b in drawn]
        return drawn[np.argsort(-np.array(shared), kind="stable")[:count]]

    def _block_windows(self, block: int) -> NDArray[np.bool_]:
        items = self.items[self._block_items(block)]
        windows = np.zeros(self.weights.size, dtype=np.bool_)
        windows[items.indices] = True
        return windows

    def _block_items(self, block: int) -> Perm:
        return self.state.perm[block * self.block : (block + 1) * self.block]

    def _refill(self, pool: Perm, positions: NDArray[np.intp]) -> NDArray[np.int64]:
        """Order the pool greedily, with noise on the size of each support."""
        support = self.items[pool].toarray()
        weighted = support * self.weights
        size = weighted.sum(axis=1) * self.rng.uniform(0.8, 1.2, pool.size)
        left = np.ones(pool.size, dtype=np.bool_)
        order = np.empty(pool.size, dtype=np.int64)
        union = np.zeros(support.shape[1], dtype=np.bool_)
        tiles = positions // self.tile
        for slot in range(pool.size):
            if slot and tiles[slot] != tiles[slot - 1]:
                union[:] = False
            key = weighted[:, ~union].sum(axis=1) - 1e-3 * size if union.any() else -size
            row = int(np.argmin(np.where(left, key, np.inf)))
            order[slot], left[row] = row, False
            union |= support[row]
        return order
