"""Block-sparse matmul of bytes: groups of columns that skip the K-quads they do not need.

A quad is four consecutive rows of W, what one byte product takes. A group is one or two vectors
of columns; it lists the quads in which any of its columns is not zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.script.ir_builder import tirx as T

from icd_tvm._tvm import i64
from icd_tvm.errors import ShapeError
from icd_tvm.tir_schedules.cpu.dot_product import dot_product
from icd_tvm.tir_schedules.cpu.gemv import MAX_ROWS
from icd_tvm.tir_schedules.cpu.int8_matmul import (
    MAX_DEPTH,
    QUAD,
    int8_cycles,
    int8_tile,
    pack_int8,
)
from icd_tvm.tir_schedules.cpu.tile import Lead, Tile
from icd_tvm.tir_schedules.cpu.tile_builder import TileBuilder

# Reading the index of a quad, and X out of order: as for the fp32 row lists on Zen 5.
_INDEX_COST = 1.08
_MARGIN = 0.97
_WIDTHS = (1, 2)
# Row lists have space for a multiple of this, so that similar weights share a function.
_SPACE = 16


def block_int8_matmul(
    m: int, k: int, n: int, space: int, tile: Tile, target: Any, *, lead: Lead = ()
) -> Any:
    """Return the TIR function of ``Y = X @ W`` that skips the quads a group does not list.

    Parameters
    ----------
    m, k, n : int
        Rows of X, the reduced axis (a multiple of four), columns of W.
    space : int
        Quads for which each list has space.
    tile : Tile
        Register tile, whose columns are one group.
    target : tvm.target.Target
    lead : tuple of int, optional
        Leading batch axes of X and Y.

    Returns
    -------
    PrimFunc
        ``(X: u8[*lead, m, k], counts: i32[p], quads: i32[p, space], W: i8[p, space, P * 4],
        Y: i32[*lead, m, n])`` with the constants from `pack_block_int8`, for
        `ExplicitTileRule`; exact.

    Raises
    ------
    ShapeError
        If k is no multiple of four, or so long that a sum could overflow.
    """
    if k % QUAD or k > MAX_DEPTH:
        raise ShapeError(
            f"k = {k} must be a multiple of {QUAD} up to {MAX_DEPTH}", "use the dense kernel"
        )
    return BlockBuilder((*lead, m, n), k, space, tile, dot_product(target)).build()


def pack_block_int8(
    weight: npt.NDArray[Any], columns: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int8]]:
    """Return the counts, quad lists and values of a `block_int8_matmul`.

    Parameters
    ----------
    weight : array [K, N] of int8
    columns : int
        Columns P of a group.

    Returns
    -------
    counts : array [p] of int32
        Quads that each group lists.
    quads : array [p, space] of int32
        Ascending quads, then zeros.
    values : array [p, space, P * 4] of int8
        Their values, then zeros.
    """
    return pack_blocks(pack_int8(weight, columns))


def pack_blocks(packed: npt.NDArray[Any]) -> tuple[Any, Any, Any]:
    """Return counts, lists and values of the runs of rows [p, runs, values] that are not zero."""
    used = packed.any(axis=2)
    counts = used.sum(axis=1).astype(np.int32)
    space = min(used.shape[1], -(-max(1, int(counts.max())) // _SPACE) * _SPACE)
    # A stable sort brings the used quads to the front and keeps their order.
    order = np.argsort(~used, axis=1, kind="stable")[:, :space]
    listed = np.take_along_axis(used, order, axis=1)
    values = np.take_along_axis(packed, order[:, :, None], axis=1) * listed[:, :, None]
    return counts, np.where(listed, order, 0).astype(np.int32), values.astype(packed.dtype)


def choose_block_tile(m: int, weight: npt.NDArray[np.int8], target: Any) -> tuple[Tile | None, str]:
    """Return the tile of the block-sparse kernel where it is faster than the dense one.

    Parameters
    ----------
    m : int
        Rows of X, as `flat_rows` returns them.
    weight : array [K, N] of int8
    target : tvm.target.Target

    Returns
    -------
    tile : Tile or None
        None if the dense kernel is faster.
    reason : str
        Modelled share of the dense kernel's time.
    """
    k, n = weight.shape
    if k % QUAD:
        return None, f"{k} rows are no multiple of {QUAD}"
    dense = int8_cycles(int8_tile(m, k, n, target), m, k, n)
    tiles = [int8_tile(m, k, n, target, vectors) for vectors in _WIDTHS]
    shares = {tile: listed_share(pack_int8(weight, tile.columns)) for tile in tiles}
    work = {tile: int8_cycles(tile, m, k, n) / dense for tile in tiles}
    return choose_groups(m, shares, work, "byte")


def choose_groups(
    m: int, shares: dict[Tile, float], work: dict[Tile, float], what: str
) -> tuple[Tile | None, str]:
    """Return the tile of least modelled time, or None where the dense kernel has it, and why.

    Parameters
    ----------
    m : int
        Rows of X.
    shares : dict of Tile to float
        Share of the runs of rows that groups as wide as the tile list.
    work : dict of Tile to float
        Cycles of the dense product on that tile, over those on its best one.
    what : str
        Names the product in the reason.
    """
    # Few rows take the time of the bytes, whatever the tile.
    costs = {
        tile: shares[tile] * (1.0 if m <= MAX_ROWS else work[tile]) * _INDEX_COST for tile in shares
    }
    best = min(costs, key=costs.__getitem__)
    reason = f"model: groups of {best.columns} take {costs[best]:.2f} of the dense {what} product"
    return (best if costs[best] < _MARGIN else None), reason


def listed_share(packed: npt.NDArray[Any]) -> float:
    """Return the share of the runs of rows [p, runs, values] that are not zero."""
    return float(packed.any(axis=2).mean())


class BlockBuilder(TileBuilder):
    """Emits a product that skips runs of rows; a run is what one dot product takes.

    Attributes
    ----------
    group : int
        Rows of a run.
    types : tuple of str
        Elements of X, of W and of the sums.
    """

    name = "block_int8_matmul"
    group = QUAD
    types = ("uint8", "int8", "int32")

    def __init__(self, shape: Lead, k: int, space: int, tile: Tile, dot: Any) -> None:
        super().__init__(shape, k, tile, self.types[2])
        self.space, self.dot = space, dot

    def parameters(self) -> dict[str, tuple[Lead, str]]:
        """Return the shape and type of each parameter but Y, X first."""
        return {
            "X": ((*self.shape, self.k), self.types[0]),
            "counts": ((self.panels,), "int32"),
            "quads": ((self.panels, self.space), "int32"),
            "W": ((self.panels, self.space, self.tile.columns * self.group), self.types[1]),
        }

    def emit_sums(self, inputs: list[Any], sums: Any, batch: list[Any], at: Any) -> None:
        """Fill ``sums[rows, columns]`` for ``at``, a panel of W and the first row of the tile."""
        (x, counts, quads, w), (panel, first) = inputs, at
        width = self.tile.lanes * self.group
        with T.serial(counts[panel]) as step:
            start = T.bind(quads[panel, step].astype("int64") * self.group)
            with T.unroll(i64(self.tile.rows)) as r:
                row = self.row(batch, first + r)
                four = T.reinterpret("int32", x[(*row, self.run(start, self.group))])
                with T.unroll(i64(self.tile.vectors)) as c:
                    here = (r, self.run(c * self.tile.lanes))
                    weight = w[panel, step, self.run(c * width, width)]
                    T.buffer_store(sums, self.dot.add(sums[here], four, weight), [*here])
