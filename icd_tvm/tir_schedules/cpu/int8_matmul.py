"""Dense matmul of bytes: unsigned activations, signed packed weights, 32-bit sums.

Scales, zero points and biases are no part of the kernel: they are elementwise operations on the
sums, which FuseOps joins to the kernel and the schedule runs on its registers.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from icd_tvm._tvm import ScheduleRule, i64, s_tir, tirx
from icd_tvm.errors import ShapeError
from icd_tvm.tir_schedules.cpu.dense import (
    OUT_EWISE_FUSABLE,
    matrix_shape,
    ravel_index,
    shape64,
    unravel_index,
)
from icd_tvm.tir_schedules.cpu.dot_product import DotProduct, dot_product
from icd_tvm.tir_schedules.cpu.elementwise import inline_spatial, schedule_spatial
from icd_tvm.tir_schedules.cpu.tile import (
    TILE_ATTR,
    Lead,
    Tile,
    find_tiled_block,
    flat_rows,
    fuse_epilogue,
    is_prim_func,
    row_pieces,
    tile_attrs,
    tile_cycles,
)
from icd_tvm.tir_schedules.target import target_threads

KERNEL = "int8"
# 2**31 - 1 over the largest product of an unsigned and a signed byte.
MAX_DEPTH = (2**31 - 1) // (255 * 128)
_QUAD = 4
_UNROLL = 4
_MAX_VECTORS = 8


def int8_tile(m: int, k: int, n: int, target: Any) -> Tile:
    """Return the register tile with the least modelled cycles for an ``m`` x ``n`` output.

    Parameters
    ----------
    m, k, n : int
        Rows of the output, length of a row of X in bytes, columns of the output.
    target : tvm.target.Target

    Returns
    -------
    Tile

    Raises
    ------
    ConfigError
        If the target has no int8 dot product.
    """
    dot = dot_product(target)
    tiles = [
        Tile(rows, vectors, dot.lanes)
        for vectors in range(1, _MAX_VECTORS + 1)
        for rows in range(1, min(m, dot.registers) + 1)
        if dot.needs(rows, vectors) <= dot.registers or rows == vectors == 1
    ]
    quads = -(-k // _QUAD)
    return min(tiles, key=lambda t: (tile_cycles(t, m, quads, n), abs(t.vectors - 3), -t.rows))


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
        with ``P = tile.columns``, marked so that FuseOps fuses an epilogue into it.

    Raises
    ------
    ConfigError
        If the target has no int8 dot product.
    ShapeError
        If k is so long that a sum could overflow.
    """
    if k > MAX_DEPTH:
        raise ShapeError(f"sums over k = {k} may overflow 32 bits", f"cut k to {MAX_DEPTH}")
    rows = flat_rows(lead, m)[1]
    return _Builder((*lead, m), k, n, tile or int8_tile(rows, k, n, target), target).build()


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
    quads, panels = -(-k // _QUAD), -(-n // columns)
    padded = np.zeros((quads * _QUAD, panels * columns), np.int8)
    padded[:k, :n] = weight
    split = padded.reshape(quads, _QUAD, panels, columns)
    return np.ascontiguousarray(split.transpose(2, 0, 3, 1)).reshape(panels, quads, -1)


class Int8MatmulRule(ScheduleRule):
    """Schedule rule for functions that hold one `int8_matmul` and its epilogue."""

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        """Return the schedule of ``func``, or None if it holds no such matmul."""
        if not is_prim_func(func):
            return None
        sch = s_tir.Schedule(func)
        acc = find_tiled_block(sch, (KERNEL,))
        if acc is None:
            return None
        tile = Tile(*(int(v) for v in sch.get(acc).annotations[TILE_ATTR]))
        producers = sch.get_producers(acc)
        inline_spatial(sch, keep=[acc, *producers])
        *tasks, rows = sch.get_loops(acc)
        count = prod(int(sch.get(loop).extent) for loop in tasks)
        pieces = row_pieces(count, int(sch.get(rows).extent), target_threads(target))
        if pieces > 1:
            piece, rows = sch.split(rows, [pieces, None])
            tasks = [*tasks, piece]
        fuse_epilogue(sch, acc, rows, tile, target)
        for producer in producers:
            schedule_spatial(sch, producer, target)
        sch.parallel(sch.fuse(*tasks) if len(tasks) > 1 else tasks[0])
        return sch


class _Builder:
    """Emits the function: one block of register tiles, and one that drops their padding."""

    def __init__(self, shape: Lead, k: int, n: int, tile: Tile, target: Any) -> None:
        self.shape, self.k, self.n, self.tile = shape, k, n, tile
        self.dot: DotProduct = dot_product(target)
        self.batch, self.m = flat_rows(shape[:-1], shape[-1])
        self.flat = len(self.batch) != len(shape) - 1
        self.quads = -(-k // _QUAD)
        self.rows, self.columns = tile.padded(self.m, n)

    def build(self) -> Any:
        """Return the TIR function, to be scheduled by `Int8MatmulRule`."""
        panels = self.columns // self.tile.columns
        with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
            T.func_name("int8_matmul")
            T.func_attr({"tirx.noalias": True, "op_pattern": OUT_EWISE_FUSABLE})
            x = _arg("X", (*self.shape, self.k), "uint8")
            w = _arg("W", (panels, self.quads, self.tile.columns * _QUAD), "int8")
            y = _arg("Y", (*self.shape, self.n), "int32")
            size = shape64((*self.batch, self.rows, self.columns))
            acc = T.sblock_alloc_buffer(size, "int32")
            self._emit_tiles(x, w, acc, panels)
            self._emit_output(acc, y)
        return builder.get()

    def _emit_tiles(self, x: Any, w: Any, acc: Any, panels: int) -> None:
        height, width, lanes = self.tile.rows, self.tile.columns, self.tile.lanes
        grid = shape64((*self.batch, panels, self.rows // height))
        with T.grid(*grid) as loops, T.sblock("acc"):
            *batch, panel, row = _axes(loops)
            T.reads(
                x[tuple(slice(0, extent) for extent in (*self.shape, self.k))],
                w[panel, 0 : self.quads, 0 : width * _QUAD],
            )
            rows = slice(row * height, (row + 1) * height)
            T.writes(acc[(*batch, rows, slice(panel * width, (panel + 1) * width))])
            T.sblock_attr(tile_attrs(self.tile, KERNEL))
            sums = T.sblock_alloc_buffer(shape64((height, width)), "int32", scope="local")
            zero = T.broadcast(tirx.IntImm("int32", 0), lanes)
            with T.unroll(i64(height)) as r, T.unroll(i64(self.tile.vectors)) as c:
                T.buffer_store(sums, zero, [r, _run(c * lanes, lanes)])
            self._emit_steps(x, w, sums, (*batch, panel), row * height)
            with T.unroll(i64(height)) as r, T.unroll(i64(self.tile.vectors)) as c:
                at = [*batch, row * height + r, _run(panel * width + c * lanes, lanes)]
                T.buffer_store(acc, sums[r, _run(c * lanes, lanes)], at)

    def _emit_steps(self, x: Any, w: Any, sums: Any, task: Any, first: Any) -> None:
        whole = self.k // _QUAD
        *batch, panel = task

        def step(quad: Any, count: int) -> None:
            with T.unroll(i64(self.tile.rows)) as r:
                four = self._four_bytes(x, self._row(batch, first + r), quad * _QUAD, count)
                self._emit_row(w, sums, (panel, quad, r), four)

        if whole >= _UNROLL:
            with T.serial(i64(whole // _UNROLL)) as outer, T.unroll(i64(_UNROLL)) as inner:
                step(outer * _UNROLL + inner, _QUAD)
        for quad in range(whole // _UNROLL * _UNROLL, self.quads):
            step(i64(quad), min(_QUAD, self.k - quad * _QUAD))

    def _emit_row(self, w: Any, sums: Any, at: Any, four: Any) -> None:
        (panel, quad, r), lanes = at, self.tile.lanes
        with T.unroll(i64(self.tile.vectors)) as c:
            weight = w[panel, quad, _run(c * lanes * _QUAD, lanes * _QUAD)]
            total = sums[r, _run(c * lanes, lanes)]
            T.buffer_store(sums, self.dot.add(total, four, weight), [r, _run(c * lanes, lanes)])

    def _four_bytes(self, x: Any, row: Any, first: Any, count: int) -> Any:
        """Return up to four bytes of a row as one int32; none past its end is read."""
        if count == _QUAD:
            return T.reinterpret("int32", x[(*row, _run(first, _QUAD))])
        value = x[(*row, first)].astype("int32")
        for byte in range(1, count):
            more = x[(*row, first + byte)].astype("int32")
            value = T.bitwise_or(value, T.shift_left(more, tirx.IntImm("int32", 8 * byte)))
        return value

    def _row(self, batch: Any, at: Any) -> Any:
        """Return the index of a row of X; rows past the end repeat the last one."""
        at = at if self.rows == self.m else T.min(at, i64(self.m - 1))
        return unravel_index(at, self.shape) if self.flat else (*batch, at)

    def _emit_output(self, acc: Any, y: Any) -> None:
        with T.grid(*shape64((*self.shape, self.n))) as loops, T.sblock("Y"):
            *row, column = _axes(loops)
            at = [ravel_index(row, self.shape)] if self.flat else row
            T.reads(acc[(*at, column)])
            T.writes(y[(*row, column)])
            T.buffer_store(y, acc[(*at, column)], [*row, column])


def _axes(loops: Any) -> list[Any]:
    axes = T.axis.remap("S" * len(loops), list(loops), dtype="int64")
    return list(axes) if len(loops) > 1 else [axes]


def _run(start: Any, lanes: int) -> Any:
    """Return the index of ``lanes`` neighbours."""
    return T.ramp(start, i64(1), lanes)


def _arg(name: str, shape: tuple[int, ...], dtype: str) -> Any:
    return T.arg(name, T.Buffer(shape64(shape), dtype))
