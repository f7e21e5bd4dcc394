"""What the CUDA kernels of products touch together, for `BuildAccessGraph`.

These kernels are CUDA source, without a loop nest to evaluate: what is described is the geometry of
blocks that their rules declare, and by which `cuda_products` lists the live ones. A block is `SLAB`
rows of W by `LIVE_COLUMNS` columns, for matrices and for one row alike. A step of the reduction
reads a slab in those groups of columns where one of its weights is not zero. So an order of the
columns makes groups pure, one of the rows makes slabs pure, and an axis may be both: the columns of
one weight and the rows of another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from icd_tvm.core.cost import TileAccess
from icd_tvm.relax_passes.axis_model import AxisGroups, WeightUse
from icd_tvm.relax_passes.axis_structure import AxisStructure, axis_index
from icd_tvm.tir_schedules.access_patterns import merge_equal
from icd_tvm.tir_schedules.cuda.gemm import LIVE_COLUMNS, SLAB

Mask = NDArray[np.bool_]
Orders = Mapping[str, NDArray[np.int32]]
# Elements of a block along an axis of W, and the axis across.
_TILES = {"K": SLAB, "N": LIVE_COLUMNS}
_ACROSS = {"K": "N", "N": "K"}


@dataclass(frozen=True)
class Blocks:
    """The products of a function whose kernels list live blocks.

    No product has an output order of its own: undoing it would be a launch, and would keep bias and
    residual out of the kernel.

    Attributes
    ----------
    groups : AxisGroups
    rows : Mapping[str, int]
        Matmul -> rows M of its left operand.
    read : callable
        Matmul -> bool [K, N], True where its weight counts.
    """

    groups: AxisGroups
    rows: Mapping[str, int]
    read: Callable[[str], Mask]

    @cached_property
    def places(self) -> dict[str, list[tuple[WeightUse, list[slice]]]]:
        """Free groups that lie in whole tiles on axes of weights, and where."""
        found = {}
        for group in self.groups.free:
            uses = ((use, _whole_tiles(use, group.id)) for use in group.weights)
            whole = [(use, runs) for use, runs in uses if runs]
            if whole and group.constraint == "free":
                found[group.id] = whole
        return found

    @cached_property
    def _axes(self) -> dict[tuple[str, str], AxisStructure]:
        uses = (use for group in self.groups.atomic for use in group.weights)
        return {(use.node, use.side): use.structure for use in uses}

    def accesses(self, group: str, orders: Orders | None = None) -> list[TileAccess]:
        """Return what the kernels touch together on a group of `places`.

        A window is a tile of the axis across: a slab, or a group of columns. Where that axis is
        ordered too, its tiles are not known before its order is: then each row, or column, is a
        window, and equal ones are expected to come together. Lists have one length for all groups
        of columns, but the accesses are not ``padded``: of rows that cannot be said, and where all
        groups of columns have equally many live blocks both agree.

        Parameters
        ----------
        group : str
        orders : mapping of str to int32[n], optional
            Of all groups, the incoming one where there is none: then tiles across are known.

        Returns
        -------
        list of TileAccess
            The weight of a unit is FLOP; windows that touch one block add up to those of the block.
        """
        found = []
        for use, runs in self.places[group]:
            windows, counts = self._windows(use, orders)
            tile, label = _TILES[use.side], use.name or use.node
            parts = (merge_equal(windows[:, run], counts) for run in runs)
            weight = 2.0 * self.rows[use.node] * tile
            found += [TileAccess(matrix, tile, weight, label, own) for matrix, own in parts]
        return found

    def flop(self, orders: Orders, group: str | None = None) -> float:
        """Return what kernels do in given orders: of products that a group, or any, moves."""
        moved = self.places if group is None else (group,)
        nodes = {use.node for one in moved for use in self.groups.get(one).weights}
        return float(sum(2 * self.rows[node] * self._live(node, orders) for node in sorted(nodes)))

    def _live(self, node: str, orders: Orders) -> int:
        """Return the weights in live blocks."""
        mask = _listed(self.read(node))
        for axis, side in enumerate("KN"):
            structure, tile = self._axes.get((node, side)), _TILES[side]
            if structure is not None and not orders.keys().isdisjoint(structure.groups()):
                mask = np.take(mask, axis_index(structure, orders), axis=axis)
            mask = np.logical_or.reduceat(mask, np.arange(0, mask.shape[axis], tile), axis=axis)
        return SLAB * LIVE_COLUMNS * int(mask.sum())

    def _windows(self, use: WeightUse, orders: Orders | None) -> tuple[Mask, NDArray[np.float64]]:
        """Return bool [windows, axis] and the rows, or columns, that each window stands for."""
        mask, side = _listed(self.read(use.node)), _ACROSS[use.side]
        windows, run = mask if use.side == "N" else mask.T, 1
        structure = self._axes.get((use.node, side))
        moves = structure is not None and not self.places.keys().isdisjoint(structure.groups())
        if structure is not None and moves and orders is not None:
            windows = windows[axis_index(structure, orders)]
        if orders is not None or not moves:
            run = _TILES[side]
            windows = np.logical_or.reduceat(windows, np.arange(0, len(windows), run), axis=0)
        return windows, np.full(len(windows), float(run))


def _whole_tiles(use: WeightUse, group: str) -> list[slice]:
    """Return the segments of an axis that are a group and share no tile with another."""
    tile, end = _TILES[use.side], use.structure.size
    return [
        run
        for run in use.segments(group)
        if run.start % tile == 0 and (run.stop % tile == 0 or run.stop == end)
    ]


def _listed(mask: Mask) -> Mask:
    """Return what a kernel reads: of such a width there are no lists of live blocks."""
    if mask.shape[1] % LIVE_COLUMNS:
        return np.outer(mask.any(axis=1), mask.any(axis=0))
    return mask
