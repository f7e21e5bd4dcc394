"""Dense matmul of bytes: unsigned activations, signed packed weights, 32-bit sums.

Scales, zero points and biases are no part of the kernel: they are elementwise operations on the
sums, which FuseOps joins to the kernel and the schedule runs on its registers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm.errors import ShapeError
from icd_tvm.tir_schedules.cpu.dense import pack_panels
from icd_tvm.tir_schedules.cpu.dot_product import dot_product
from icd_tvm.tir_schedules.cpu.run_builder import RunBuilder
from icd_tvm.tir_schedules.cpu.tile import Lead, Tile, dot_tile, flat_rows, tile_cycles

# 2**31 - 1 over the largest product of an unsigned and a signed byte.
MAX_DEPTH = (2**31 - 1) // (255 * 128)
QUAD = 4
_MARK = "icd.int8_matmul"


def int8_tile(m: int, k: int, n: int, target: Any, vectors: int | None = None) -> Tile:
    """Return the register tile with the least modelled cycles for an ``m`` x ``n`` output.

    Parameters
    ----------
    m, k, n : int
        Rows of the output, length of a row of X in bytes, columns of the output.
    target : tvm.target.Target
    vectors : int, optional
        Fixes the width of the tile.

    Returns
    -------
    Tile

    Raises
    ------
    ConfigError
        If the target has no int8 dot product.
    """
    return dot_tile(dot_product(target), m, -(-k // QUAD), n, vectors)


def int8_cycles(tile: Tile, m: int, k: int, n: int) -> float:
    """Return the modelled cycles per four steps along K; rows of X are k bytes apart."""
    return tile_cycles(tile, m, -(-k // QUAD), n)


def int8_matmul(
    m: int, k: int, n: int, target: Any, *, lead: Lead = (), tile: Tile | None = None
) -> Any:
    """Return the TIR function of ``Y = X @ W`` in 32-bit integers, exact.

    Parameters
    ----------
    m, k, n : int
        Rows of X, the reduced axis, columns of W; none needs to divide by the tile. Sums are
        exact for k up to `MAX_DEPTH`, 65,792.
    target : tvm.target.Target
        Its widest byte product is used.
    lead : tuple of int, optional
        Leading batch axes of X and Y.
    tile : Tile, optional
        Register tile for the rows `flat_rows` returns; `int8_tile` if omitted.

    Returns
    -------
    PrimFunc
        ``(X: u8[*lead, m, k], W: i8[ceil(n / P), ceil(k / 4), P * 4], Y: i32[*lead, m, n])``
        with ``P = tile.columns``, for `ExplicitTileRule`; FuseOps fuses an epilogue into it.

    Raises
    ------
    ConfigError
        If the target has no int8 dot product.
    ShapeError
        If k is so long that a sum could overflow.
    """
    if k > MAX_DEPTH:
        raise ShapeError(f"sums over k = {k} may overflow 32 bits", f"cut k to {MAX_DEPTH}")
    tile = tile or int8_tile(flat_rows(lead, m)[1], k, n, target)
    func = _Int8Builder((*lead, m, n), k, tile, dot_product(target)).build()
    return func.with_attr(_MARK, True)


def check_quads(k: int) -> None:
    """Raise ShapeError unless ``k`` rows are whole quads, and few enough for sums of 32 bits."""
    if k % QUAD or k > MAX_DEPTH:
        raise ShapeError(
            f"k = {k} must be a multiple of {QUAD} up to {MAX_DEPTH}", "use the dense kernel"
        )


def is_int8_matmul(func: Any) -> bool:
    """Tell whether a function was made by `int8_matmul` and nothing was fused to it."""
    return func.attrs is not None and _MARK in func.attrs


def pack_int8(weight: npt.NDArray[Any], columns: int) -> npt.NDArray[np.int8]:
    """Return ``weight`` cut into panels of ``columns`` columns and runs of four rows.

    Parameters
    ----------
    weight : array [K, N] of int8
    columns : int
        Panel width P.

    Returns
    -------
    array [ceil(N / P), ceil(K / 4), P * 4] of int8
        Four rows of a column are neighbours; zero where it reaches past the weight.

    Raises
    ------
    ShapeError
        If ``weight`` is not a matrix of int8.
    """
    if weight.dtype != np.int8:
        raise ShapeError(f"a packed weight must be int8, not {weight.dtype}", "quantise it first")
    return pack_panels(weight, columns, QUAD)


def unpack_int8(packed: npt.NDArray[np.int8], k: int, n: int) -> npt.NDArray[np.int8]:
    """Return the weight [k, n] that `pack_int8` packed.

    Parameters
    ----------
    packed : array [panels, quads, P * 4] of int8
    k, n : int
        Size of the weight.
    """
    panels, quads, width = packed.shape
    split = packed.reshape(panels, quads, width // QUAD, QUAD).transpose(1, 3, 0, 2)
    return np.ascontiguousarray(split.reshape(quads * QUAD, -1)[:k, :n])


class _Int8Builder(RunBuilder):
    name = "int8_matmul"
    length = QUAD
    types = ("uint8", "int8", "int32")
