"""Block-sparse matmul of bytes: groups of columns that skip the K-quads they do not need.

A quad is four consecutive rows of W, what one byte product takes; the frame is that of
:mod:`icd_tvm.tir_schedules.cpu.block_runs`. It is for few rows of X; more are multiplied by
:mod:`icd_tvm.tir_schedules.cpu.transposed_int8`.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from icd_tvm.tir_schedules.cpu.block_runs import (
    BlockBuilder,
    Groups,
    RunProduct,
    choose_groups,
    pack_blocks,
)
from icd_tvm.tir_schedules.cpu.dot_product import dot_product
from icd_tvm.tir_schedules.cpu.gemv import MAX_ROWS
from icd_tvm.tir_schedules.cpu.int8_matmul import (
    QUAD,
    check_quads,
    int8_cycles,
    int8_tile,
    pack_int8,
)
from icd_tvm.tir_schedules.cpu.panel_builder import step_cycles, turn_cycles
from icd_tvm.tir_schedules.cpu.tile import Lead, Tile, flat_rows
from icd_tvm.tir_schedules.cpu.transposed_int8 import (
    GROUP,
    pack_transposed_int8,
    transposed_int8_matmul,
    transposed_int8_shape,
)

# Transposes of bytes take four of their loads, stores and shuffles a cycle: measured on Zen 5.
_TURN_SHARE = 0.25
_DENSE = RunProduct("byte", QUAD, int8_tile, int8_cycles, pack_int8)


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
    check_quads(k)
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


class BlockProduct(NamedTuple):
    """A block-sparse product of bytes.

    Attributes
    ----------
    func : PrimFunc
        Of X, the constants and Y.
    constants : dict of str to array
        What follows the name of the weight in that of a constant -> its value.
    rows : int
        Rows of the weight for which a list has space.
    """

    func: Any
    constants: dict[str, npt.NDArray[Any]]
    rows: int


def block_int8_product(
    lead: Lead, m: int, weight: npt.NDArray[np.int8], target: Any
) -> tuple[BlockProduct | None, str]:
    """Return the fastest kernel of ``X[*lead, m, K] @ weight`` that skips quads.

    Few rows take `block_int8_matmul`, more of them `transposed_int8_matmul`.

    Parameters
    ----------
    lead : tuple of int
    m : int
    weight : array [K, N] of int8
    target : tvm.target.Target

    Returns
    -------
    product : BlockProduct or None
        None if the dense kernel is faster.
    reason : str
        Modelled share of the dense kernel's time.
    """
    rows = flat_rows(lead, m)[1]

    def transposed() -> dict[Groups, float]:
        if rows <= MAX_ROWS:
            return {}
        return {Groups(GROUP): _transposed_cost(lead, m, weight, target)}

    groups, reason = choose_groups(rows, weight, target, _DENSE, transposed)
    if groups is None:
        return None, reason
    k, n = weight.shape
    if groups.tile is None:
        packed = pack_transposed_int8(weight, target)
        func = transposed_int8_matmul(m, k, n, packed[1].shape[1], target, lead=lead)
    else:
        packed = pack_block_int8(weight, groups.columns)
        func = block_int8_matmul(m, k, n, packed[1].shape[1], groups.tile, target, lead=lead)
    counts, quads, values = packed
    constants: dict[str, npt.NDArray[Any]] = {".counts": counts, ".quads": quads, "": values}
    return BlockProduct(func, constants, QUAD * quads.shape[1]), reason


def _transposed_cost(lead: Lead, m: int, weight: npt.NDArray[np.int8], target: Any) -> float:
    """Return the modelled share of the dense kernel's time that the transposed one takes."""
    (k, n), (batch, rows) = weight.shape, flat_rows(lead, m)
    shape = transposed_int8_shape(m, k, n, 1, target, lead)
    listed = pack_int8(weight, GROUP).any(axis=2).sum(axis=1).mean()
    dense = int8_cycles(int8_tile(rows, k, n, target), rows, k, n) * (k // QUAD)
    cycles = step_cycles(shape) * float(listed) + _TURN_SHARE * turn_cycles(shape)
    return cycles / (dense * prod(batch))


class _Builder(BlockBuilder):
    name = "block_int8_matmul"
    length = QUAD
    types = ("uint8", "int8", "int32")
