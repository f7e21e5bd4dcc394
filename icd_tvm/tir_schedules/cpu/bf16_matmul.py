"""Dense matmul of bfloat16: packed weights, float32 sums."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from tvm.script.ir_builder import tirx as T

from icd_tvm.errors import ShapeError
from icd_tvm.tir_schedules.cpu.bf16_dot import bf16_dot
from icd_tvm.tir_schedules.cpu.dense import pack_panels
from icd_tvm.tir_schedules.cpu.emit import AHEAD, LINE, prefetch
from icd_tvm.tir_schedules.cpu.gemv import MAX_ROWS
from icd_tvm.tir_schedules.cpu.run_builder import UNROLL, RunBuilder
from icd_tvm.tir_schedules.cpu.tile import Lead, Tile, dot_tile, flat_rows, tile_cycles

PAIR = 2
_NEGATIVE_ZERO = 0x8000


def bf16_tile(m: int, k: int, n: int, target: Any, vectors: int | None = None) -> Tile:
    """Return the register tile with the least modelled cycles for an ``m`` x ``n`` output.

    Parameters
    ----------
    m, k, n : int
        Rows of the output, length of a row of X, columns of the output.
    target : tvm.target.Target
    vectors : int, optional
        Fixes the width of the tile.

    Returns
    -------
    Tile
    """
    return dot_tile(bf16_dot(target), m, -(-k // PAIR), n, vectors)


def bf16_cycles(tile: Tile, m: int, k: int, n: int) -> float:
    """Return the modelled cycles per two steps along K; rows of X are 2 k bytes apart."""
    return tile_cycles(tile, m, -(-k // PAIR), n)


def bf16_matmul(
    m: int, k: int, n: int, target: Any, *, lead: Lead = (), tile: Tile | None = None
) -> Any:
    """Return the TIR function of ``Y = X @ W`` for bfloat16 operands.

    Parameters
    ----------
    m, k, n : int
        Rows of X, the reduced axis, columns of W; none needs to divide by the tile.
    target : tvm.target.Target
    lead : tuple of int, optional
        Leading batch axes of X and Y.
    tile : Tile, optional
        Register tile for the rows `flat_rows` returns; `bf16_tile` if omitted.

    Returns
    -------
    PrimFunc
        ``(X: u16[*lead, m, k], W: u16[ceil(n / P), ceil(k / 2), P * 2], Y: f32[*lead, m, n])``
        with ``P = tile.columns``, for `ExplicitTileRule`; FuseOps fuses an epilogue into it.
        X and W hold the bits of bfloat16.
    """
    tile = tile or bf16_tile(flat_rows(lead, m)[1], k, n, target)
    return _Bf16Builder((*lead, m, n), k, tile, bf16_dot(target)).build()


def pack_bf16(weight: npt.NDArray[Any], columns: int) -> npt.NDArray[np.uint16]:
    """Return ``weight``, rounded to bfloat16, in panels of ``columns`` columns and pairs of rows.

    Parameters
    ----------
    weight : array [K, N] of float32
    columns : int
        Panel width P.

    Returns
    -------
    array [ceil(N / P), ceil(K / 2), P * 2] of uint16
        Bits of bfloat16; two rows of a column are neighbours. Zero past the weight.

    Raises
    ------
    ShapeError
        If ``weight`` is not a matrix of float32.
    """
    if weight.dtype != np.float32:
        raise ShapeError(f"a weight of {weight.dtype} is not rounded", "pass float32")
    bits = weight.astype(ml_dtypes.bfloat16).view(np.uint16)
    # Masking leaves negative zeros: their bits would count as a value.
    return pack_panels(np.where(bits == _NEGATIVE_ZERO, np.uint16(0), bits), columns, PAIR)


class _Bf16Builder(RunBuilder):
    name = "bf16_matmul"
    length = PAIR
    types = ("uint16", "uint16", "float32")

    def prefetch(self, w: Any, at: Any, outer: Any) -> None:
        """Fetch what few rows need `AHEAD` bytes later, and more rows of the next panel."""
        if self.rows > MAX_ROWS:
            super().prefetch(w, at, outer)
            return
        row = self.tile.columns * PAIR * 2
        for line in range(0, row * UNROLL, LINE):
            ahead = outer * UNROLL + (AHEAD + line) // row
            T.evaluate(prefetch(w[at[0], ahead, line % row // 2]))
