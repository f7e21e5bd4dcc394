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

import numpy as np
from numpy.typing import NDArray

from icd_tvm.core.cost import TileAccess
from icd_tvm.relax_passes.axis_model import AxisGroup, AxisGroups, WeightUse
from icd_tvm.tir_schedules.access_patterns import merge_equal
from icd_tvm.tir_schedules.cuda.gemm import LIVE_COLUMNS, SLAB

Mask = NDArray[np.bool_]
# Elements of a block along an axis of W, and the axis across.
_TILES = {"K": SLAB, "N": LIVE_COLUMNS}
_ACROSS = {"K": "N", "N": "K"}


def cuda_accesses(
    groups: AxisGroups, rows: Mapping[str, int], read: Callable[[str], Mask]
) -> dict[str, list[TileAccess]]:
    """Return axis -> what the kernels of the products on it touch together.

    A window of an axis is a tile of the axis across: a slab, or a group of columns. Where that is
    ordered too, its tiles are not what they will be: then each row, or column, is a window, and its
    order will put equal ones together. Lists have one length for all groups of columns, but the
    accesses are not ``padded``: of rows that cannot be said, and where all groups have equally many
    live blocks both agree.

    No product has an output order of its own: undoing it would be a launch, and would keep bias and
    residual out of the kernel.

    Parameters
    ----------
    groups : AxisGroups
    rows : Mapping[str, int]
        Matmul -> rows M of its left operand.
    read : callable
        Matmul -> bool [K, N], True where its weight counts.

    Returns
    -------
    dict of str to list of TileAccess
        Of free groups that lie in whole tiles on an axis of a weight. The weight of a unit is FLOP;
        windows that touch one block add up to those of the block.
    """
    places = {group.id: _places(group) for group in groups.free if group.constraint == "free"}
    places = {group: found for group, found in places.items() if found}
    ordered: dict[tuple[str, str], bool] = {
        (use.node, use.side): not places.keys().isdisjoint(use.structure.groups())
        for group in groups.atomic
        for use in group.weights
    }

    def described(use: WeightUse, spans: list[slice]) -> list[TileAccess]:
        across = ordered.get((use.node, _ACROSS[use.side]), False)
        windows, counts = _windows(_listed(read(use.node)), use.side, across)
        tile, label = _TILES[use.side], use.name or use.node
        parts = (merge_equal(windows[:, span], counts) for span in spans)
        return [TileAccess(m, tile, 2.0 * rows[use.node] * tile, label, c) for m, c in parts]

    return {
        group: [access for use, spans in found for access in described(use, spans)]
        for group, found in places.items()
    }


def _places(group: AxisGroup) -> list[tuple[WeightUse, list[slice]]]:
    """Return where a group lies on the axes of weights in whole tiles."""
    found = ((use, _whole_tiles(use, group.id)) for use in group.weights)
    return [(use, spans) for use, spans in found if spans]


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


def _windows(mask: Mask, side: str, across: bool) -> tuple[Mask, NDArray[np.float64]]:
    """Return bool [windows, axis] and the rows, or columns, that each window stands for."""
    windows, run = mask if side == "N" else mask.T, 1
    if not across:
        run = _TILES[_ACROSS[side]]
        windows = np.logical_or.reduceat(windows, np.arange(0, len(windows), run), axis=0)
    return windows, np.full(len(windows), float(run))
