"""Block-sparse matmul of bytes: groups of columns that skip the K-quads they do not need.

A quad is four consecutive rows of W, what one byte product takes; the frame is that of
:mod:`icd_tvm.tir_schedules.cpu.block_runs`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm.errors import ShapeError
from icd_tvm.tir_schedules.cpu.block_runs import (
    BlockBuilder,
    RunProduct,
    choose_groups,
    pack_blocks,
)
from icd_tvm.tir_schedules.cpu.dot_product import dot_product
from icd_tvm.tir_schedules.cpu.int8_matmul import (
    MAX_DEPTH,
    QUAD,
    int8_cycles,
    int8_tile,
    pack_int8,
)
from icd_tvm.tir_schedules.cpu.tile import Lead, Tile


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
    return _Builder((*lead, m, n), k, space, tile, dot_product(target)).build()


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
    dense = RunProduct("byte", QUAD, int8_tile, int8_cycles, pack_int8)
    return choose_groups(m, weight, target, dense)


class _Builder(BlockBuilder):
    name = "block_int8_matmul"
    length = QUAD
    types = ("uint8", "int8", "int32")
