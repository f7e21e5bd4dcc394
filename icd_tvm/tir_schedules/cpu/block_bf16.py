"""Block-sparse matmul of bfloat16: groups of columns that skip the pairs of rows they do not need.

The frame is that of :mod:`icd_tvm.tir_schedules.cpu.block_runs`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm.errors import ShapeError
from icd_tvm.tir_schedules.cpu.bf16_dot import bf16_dot
from icd_tvm.tir_schedules.cpu.bf16_matmul import PAIR, bf16_cycles, bf16_tile, pack_bf16
from icd_tvm.tir_schedules.cpu.block_runs import (
    BlockBuilder,
    RunProduct,
    choose_groups,
    pack_blocks,
)
from icd_tvm.tir_schedules.cpu.tile import Lead, Tile


def block_bf16_matmul(
    m: int, k: int, n: int, space: int, tile: Tile, target: Any, *, lead: Lead = ()
) -> Any:
    """Return the TIR function of ``Y = X @ W`` that skips the pairs a group does not list.

    Parameters
    ----------
    m, k, n : int
        Rows of X, the reduced axis (even), columns of W.
    space : int
        Pairs for which each list has space.
    tile : Tile
        Register tile, whose columns are one group.
    target : tvm.target.Target
    lead : tuple of int, optional
        Leading batch axes of X and Y.

    Returns
    -------
    PrimFunc
        ``(X: u16[*lead, m, k], counts: i32[p], quads: i32[p, space], W: u16[p, space, P * 2],
        Y: f32[*lead, m, n])`` with the constants from `pack_block_bf16`, for
        `ExplicitTileRule`.

    Raises
    ------
    ShapeError
        If k is odd.
    """
    if k % PAIR:
        raise ShapeError(f"k = {k} must be even", "use the dense kernel")
    return _Builder((*lead, m, n), k, space, tile, bf16_dot(target)).build()


def pack_block_bf16(
    weight: npt.NDArray[Any], columns: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.uint16]]:
    """Return the counts, lists of pairs and values of a `block_bf16_matmul`.

    Parameters
    ----------
    weight : array [K, N] of float32
    columns : int
        Columns P of a group.

    Returns
    -------
    counts : array [p] of int32
    pairs : array [p, space] of int32
        Ascending pairs, then zeros.
    values : array [p, space, P * 2] of uint16
        Bits of bfloat16, then zeros.
    """
    return pack_blocks(pack_bf16(weight, columns))


def choose_bf16_blocks(
    m: int, weight: npt.NDArray[np.float32], target: Any
) -> tuple[Tile | None, str]:
    """Return the tile of the block-sparse kernel where it is faster than the dense one.

    Parameters
    ----------
    m : int
        Rows of X, as `flat_rows` returns them.
    weight : array [K, N] of float32
    target : tvm.target.Target

    Returns
    -------
    tile : Tile or None
        None if the dense kernel is faster.
    reason : str
        Modelled share of the dense kernel's time.
    """
    dense = RunProduct("bfloat16", PAIR, bf16_tile, bf16_cycles, pack_bf16)
    groups, reason = choose_groups(m, weight, target, dense)
    return (groups.tile if groups else None), reason


class _Builder(BlockBuilder):
    name = "block_bf16_matmul"
    length = PAIR
    types = ("uint16", "uint16", "float32")
