"""Block-sparse matmul of bytes on transposed activations: vectors along the rows of X.

A kernel whose vectors run along columns broadcasts a word of X for every byte product, because the
groups of a block-sparse weight are no wider than a vector: it waits for loads. Here a step loads
two vectors of X and multiplies them by eight broadcast quads of W: five cycles of loads beside
eight of products. The frame is that of :mod:`icd_tvm.tir_schedules.cpu.panel_builder`, whose words
are quads.

Measured on Zen 5, 128 rows of X and blocks of 16 x 16: 0.54 of the dense product with half of the
blocks and 0.29 with a quarter, where vectors along columns take 0.68 and 0.37. With a tenth of the
blocks it is the output that takes the time, where its rows lie a multiple of 4 KiB apart and so
share a set of level 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.script.ir_builder import tirx as T

from icd_tvm._tvm import i64
from icd_tvm.tir_schedules.cpu.block_runs import pack_blocks
from icd_tvm.tir_schedules.cpu.dense import matrix_shape
from icd_tvm.tir_schedules.cpu.dot_product import DotProduct, dot_product
from icd_tvm.tir_schedules.cpu.int8_matmul import QUAD, check_quads, pack_int8
from icd_tvm.tir_schedules.cpu.panel_builder import PanelBuilder, VColShape, block_columns
from icd_tvm.tir_schedules.cpu.tile import Lead

# Columns of a group: those of a register tile, so that no narrower group would read less.
GROUP = 8


def transposed_int8_shape(
    m: int, k: int, n: int, space: int, target: Any, lead: Lead = ()
) -> VColShape:
    """Return the sizes of a `transposed_int8_matmul`.

    Raises
    ------
    ConfigError
        If the target has no int8 dot product.
    ShapeError
        If k is no multiple of four, or so long that a sum could overflow.
    """
    check_quads(k)
    return VColShape(lead, m, k // QUAD, n, space, GROUP, dot_product(target).lanes)


def transposed_int8_matmul(
    m: int, k: int, n: int, space: int, target: Any, *, lead: Lead = ()
) -> Any:
    """Return the TIR function of ``Y = X @ W`` that skips the quads a group does not list.

    Parameters
    ----------
    m, k, n : int
        Rows of X, the reduced axis (a multiple of four), columns of W.
    space : int
        Quads for which each list has space.
    target : tvm.target.Target
    lead : tuple of int, optional
        Leading batch axes of X and Y.

    Returns
    -------
    PrimFunc
        ``(X: u8[*lead, m, k], counts: i32[G], quads: i32[G, space], W: i8[G, space, 4 * 8],
        Y: i32[*lead, m, n])`` with the constants from `pack_transposed_int8`, for
        `TransposedSparseRule`; exact.

    Raises
    ------
    ConfigError
        If the target has no int8 dot product.
    ShapeError
        If k is no multiple of four, or so long that a sum could overflow.
    """
    shape = transposed_int8_shape(m, k, n, space, target, lead)
    return _Builder(shape, dot_product(target)).build()


def pack_transposed_int8(
    weight: npt.NDArray[np.int8], target: Any
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int8]]:
    """Return the counts, quad lists and values of a `transposed_int8_matmul`.

    Parameters
    ----------
    weight : array [K, N] of int8
    target : tvm.target.Target

    Returns
    -------
    counts : array [G] of int32
        Quads that each group lists; G groups fill whole vectors, so the last may list none.
    quads : array [G, space] of int32
        Ascending quads, then zeros.
    values : array [G, space, 4 * 8] of int8
        Their values, then zeros.
    """
    _, n = matrix_shape(weight)
    block = block_columns(GROUP, dot_product(target).lanes)
    padded = np.pad(weight, ((0, 0), (0, -n % block)))
    return pack_blocks(pack_int8(padded, GROUP))


class _Builder(PanelBuilder):
    name = "block_int8_matmul"
    types = ("uint8", "int8", "int32")
    length = QUAD

    def __init__(self, shape: VColShape, dot: DotProduct) -> None:
        super().__init__(shape)
        self.dot = dot

    def words(self, x: Any, row: tuple[Any, ...], first: Any, count: int) -> Any:
        """Return ``count`` quads of a row of X."""
        kind = "int32" if count == 1 else f"int32x{count}"
        return T.reinterpret(kind, x[(*row, T.ramp(first * QUAD, i64(1), QUAD * count))])

    def weight(self, data: Any, place: tuple[Any, ...], column: Any) -> Any:
        """Return the quad of W of a column of a group."""
        return T.reinterpret("int32", data[(*place, T.ramp(column * QUAD, i64(1), QUAD))])

    def add(self, total: Any, words: Any, weight: Any) -> Any:
        """Return the sums of a vector of rows after a step."""
        lanes = self.dot.lanes
        spread = T.reinterpret(f"int8x{QUAD * lanes}", T.broadcast(weight, lanes))
        return self.dot.multiply(total, words, spread)
