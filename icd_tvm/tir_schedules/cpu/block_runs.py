"""Block-sparse matmul by runs of rows: what the kernels of bytes and of bfloat16 share.

A group is one or two vectors of columns; it lists the runs in which any of its columns is not
zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tvm.script.ir_builder import tirx as T

from icd_tvm.tir_schedules.cpu.gemv import MAX_ROWS
from icd_tvm.tir_schedules.cpu.lane_dot import LaneDot
from icd_tvm.tir_schedules.cpu.run_builder import RunBuilder
from icd_tvm.tir_schedules.cpu.tile import INDEX_COST, Lead, Tile

# A kernel must beat the dense one by more than the noise of the model.
_MARGIN = 0.97
_WIDTHS = (1, 2)
# Row lists have space for a multiple of this, so that similar weights share a function.
_SPACE = 16


class RunProduct(NamedTuple):
    """The dense product that a block-sparse one competes with.

    Attributes
    ----------
    name : str
        In reasons.
    length : int
        Rows of a run.
    tile, cycles, pack : callable
        Its register tile, modelled cycles and packed weight.
    """

    name: str
    length: int
    tile: Callable[..., Tile]
    cycles: Callable[[Tile, int, int, int], float]
    pack: Callable[[npt.NDArray[Any], int], npt.NDArray[Any]]


def pack_blocks(packed: npt.NDArray[Any]) -> tuple[Any, Any, Any]:
    """Return counts, lists and values of the runs of rows [p, runs, values] that are not zero."""
    used = packed.any(axis=2)
    counts = used.sum(axis=1).astype(np.int32)
    space = min(used.shape[1], -(-max(1, int(counts.max())) // _SPACE) * _SPACE)
    # A stable sort brings the used runs to the front and keeps their order.
    order = np.argsort(~used, axis=1, kind="stable")[:, :space]
    listed = np.take_along_axis(used, order, axis=1)
    values = np.take_along_axis(packed, order[:, :, None], axis=1) * listed[:, :, None]
    return counts, np.where(listed, order, 0).astype(np.int32), values.astype(packed.dtype)


class Groups(NamedTuple):
    """Columns of a group of a block-sparse kernel, and its tile; None outside of `BlockBuilder`."""

    columns: int
    tile: Tile | None = None


def choose_groups(
    m: int,
    weight: npt.NDArray[Any],
    target: Any,
    dense: RunProduct,
    others: Callable[[], dict[Groups, float]] = dict,
) -> tuple[Groups | None, str]:
    """Return the fastest groups where their kernel is faster than the dense one.

    Parameters
    ----------
    m : int
        Rows of X, as `flat_rows` returns them.
    weight : array [K, N]
        As ``dense.pack`` takes it.
    target : tvm.target.Target
    dense : RunProduct
    others : callable, optional
        Returns the modelled shares of the dense kernel's time of kernels in another frame.

    Returns
    -------
    groups : Groups or None
        None if the dense kernel is faster.
    reason : str
        Modelled share of the dense kernel's time.
    """
    k = weight.shape[0]
    if k % dense.length:
        return None, f"{k} rows are no multiple of {dense.length}: pad the weight with zeros"
    costs = _group_costs(m, weight, target, dense) | others()
    best = min(costs, key=costs.__getitem__)
    reason = (
        f"model: groups of {best.columns} take {costs[best]:.2f} of the dense {dense.name} product"
    )
    return (best if costs[best] < _MARGIN else None), reason


def _group_costs(
    m: int, weight: npt.NDArray[Any], target: Any, dense: RunProduct
) -> dict[Groups, float]:
    """Return the modelled share of the dense kernel's time by the tile that fits a group."""
    k, n = weight.shape
    least = dense.cycles(dense.tile(m, k, n, target), m, k, n)

    def cost(tile: Tile) -> float:
        share = float(dense.pack(weight, tile.columns).any(axis=2).mean())
        # Few rows take the time of the bytes, whatever the tile.
        return share * (1.0 if m <= MAX_ROWS else dense.cycles(tile, m, k, n) / least) * INDEX_COST

    tiles = (dense.tile(m, k, n, target, vectors) for vectors in _WIDTHS)
    return {Groups(tile.columns, tile): cost(tile) for tile in tiles}


class BlockBuilder(RunBuilder):
    """Emits a product that skips the runs which a group of columns does not list."""

    def __init__(self, shape: Lead, k: int, space: int, tile: Tile, dot: LaneDot) -> None:
        super().__init__(shape, k, tile, dot)
        self.space = space

    def parameters(self) -> dict[str, tuple[Lead, str]]:
        """Return the shape and type of each parameter but Y, X first."""
        return {
            "X": ((*self.shape, self.k), self.types[0]),
            "counts": ((self.panels,), "int32"),
            "quads": ((self.panels, self.space), "int32"),
            "W": ((self.panels, self.space, self.tile.columns * self.length), self.types[1]),
        }

    def emit_sums(self, inputs: list[Any], sums: Any, batch: list[Any], at: Any) -> None:
        """Fill ``sums[rows, columns]`` for ``at``, a panel of W and the first row of the tile."""
        (x, counts, quads, w), panel = inputs, at[0]
        with self.dot.imported(), T.serial(counts[panel]) as step:
            start = T.bind(quads[panel, step].astype("int64") * self.length)
            self.step([x, w], sums, (batch, *at), step, start, self.length)
