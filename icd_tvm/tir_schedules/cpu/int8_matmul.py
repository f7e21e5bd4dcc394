"""Dense matmul of bytes: unsigned activations, signed packed weights, 32-bit sums.

Scales, zero points and biases are no part of the kernel: they are elementwise operations on the
sums, which FuseOps joins to the kernel and the schedule runs on its registers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.script.ir_builder import tirx as T

from icd_tvm._tvm import i64, tirx
from icd_tvm.errors import ShapeError
from icd_tvm.tir_schedules.cpu.dense import matrix_shape
from icd_tvm.tir_schedules.cpu.dot_product import DotProduct, dot_product
from icd_tvm.tir_schedules.cpu.emit import LINE, prefetch
from icd_tvm.tir_schedules.cpu.tile import Lead, Tile, dot_tile, flat_rows, tile_cycles
from icd_tvm.tir_schedules.cpu.tile_builder import TileBuilder

# 2**31 - 1 over the largest product of an unsigned and a signed byte.
MAX_DEPTH = (2**31 - 1) // (255 * 128)
QUAD = 4
_UNROLL = 4
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
    k, n = matrix_shape(weight)
    if weight.dtype != np.int8:
        raise ShapeError(f"a packed weight must be int8, not {weight.dtype}", "quantise it first")
    quads, panels = -(-k // QUAD), -(-n // columns)
    padded = np.zeros((quads * QUAD, panels * columns), np.int8)
    padded[:k, :n] = weight
    split = padded.reshape(quads, QUAD, panels, columns)
    return np.ascontiguousarray(split.transpose(2, 0, 3, 1)).reshape(panels, quads, -1)


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


class _Int8Builder(TileBuilder):
    name = "int8_matmul"

    def __init__(self, shape: Lead, k: int, tile: Tile, dot: DotProduct) -> None:
        super().__init__(shape, k, tile, "int32")
        self.dot, self.quads = dot, -(-k // QUAD)

    def parameters(self) -> dict[str, tuple[Lead, str]]:
        width = self.tile.columns * QUAD
        return {
            "X": ((*self.shape, self.k), "uint8"),
            "W": ((self.panels, self.quads, width), "int8"),
        }

    def emit_sums(self, inputs: list[Any], sums: Any, batch: list[Any], at: Any) -> None:
        x, w = inputs
        panel, first = at
        whole = self.k // QUAD

        def step(quad: Any, count: int) -> None:
            with T.unroll(i64(self.tile.rows)) as r:
                four = self._four_bytes(x, self.row(batch, first + r), quad * QUAD, count)
                with T.unroll(i64(self.tile.vectors)) as c:
                    here = (r, self.run(c * self.tile.lanes))
                    start = c * (self.tile.lanes * QUAD)
                    weight = w[panel, quad, self.run(start, self.tile.lanes * QUAD)]
                    T.buffer_store(sums, self.dot.add(sums[here], four, weight), [*here])

        if whole >= _UNROLL:
            groups = whole // _UNROLL
            with T.serial(i64(groups)) as outer:
                self._prefetch(w, panel, tirx.floordiv(first, self.tile.rows) * groups + outer)
                with T.unroll(i64(_UNROLL)) as inner:
                    step(outer * _UNROLL + inner, QUAD)
        for quad in range(whole // _UNROLL * _UNROLL, self.quads):
            step(i64(quad), min(QUAD, self.k - quad * QUAD))

    def _prefetch(self, w: Any, panel: Any, group: Any) -> None:
        """Fetch a part of the next panel, which lies behind this one; each row tile its own.

        The weights of a model come from beyond L2: 16 rows of 768 take a seventh less time so. A
        panel that serves one row tile alone streams as fast as memory gives it.
        """
        row_tiles = self.rows // self.tile.rows
        if self.panels == 1 or row_tiles == 1:
            return
        width = self.tile.columns * QUAD
        lines = -(-_UNROLL * width // (LINE * row_tiles))
        for line in range(lines):
            start = (group * lines + line) * LINE
            ahead = self.quads + tirx.floordiv(start, width)
            element = w[panel, ahead, tirx.floormod(start, width)]
            T.evaluate(prefetch(element, locality=2))

    def _four_bytes(self, x: Any, row: Any, first: Any, count: int) -> Any:
        """Return up to four bytes of a row as one int32; none past its end is read."""
        if count == QUAD:
            return T.reinterpret("int32", x[(*row, self.run(first, QUAD))])
        value = x[(*row, first)].astype("int32")
        for byte in range(1, count):
            more = x[(*row, first + byte)].astype("int32")
            value = T.bitwise_or(value, T.shift_left(more, tirx.IntImm("int32", 8 * byte)))
        return value
