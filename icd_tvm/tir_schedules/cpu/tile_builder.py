"""Matmuls written with explicit vectors: the frame that their kernels share, and its schedule."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from icd_tvm._tvm import ScheduleRule, i64, s_tir
from icd_tvm.tir_schedules.cpu.dense import (
    OUT_EWISE_FUSABLE,
    ravel_index,
    shape64,
    unravel_index,
)
from icd_tvm.tir_schedules.cpu.elementwise import inline_spatial, schedule_spatial
from icd_tvm.tir_schedules.cpu.emit import zeros
from icd_tvm.tir_schedules.cpu.tile import (
    Lead,
    Tile,
    annotated_tile,
    find_tiled_block,
    flat_rows,
    fuse_epilogue,
    is_prim_func,
    share_panels,
    spread,
    tile_attrs,
)
from icd_tvm.tir_schedules.target import target_threads

KERNEL = "explicit"


class TileBuilder:
    """Emits ``Y = X @ W``: one block of register tiles, and one that drops their padding.

    Subclasses say what the parameters are and how the sums of a tile are formed. Rows past the
    end repeat the last one, columns past the end multiply the padding of the weight.

    Parameters
    ----------
    shape : tuple of int
        Shape of Y, ``(*lead, m, n)``.
    k : int
        Length of a row of X.
    tile : Tile
        Register tile for the rows `flat_rows` returns.
    dtype : str
        Element type of the sums and of Y.
    """

    name = "matmul"

    def __init__(self, shape: Lead, k: int, tile: Tile, dtype: str) -> None:
        *rows, self.n = shape
        self.shape, self.k, self.tile, self.dtype = tuple(rows), k, tile, dtype
        self.batch, self.m = flat_rows(self.shape[:-1], self.shape[-1])
        self.flat = len(self.batch) != len(self.shape) - 1
        self.rows, self.columns = tile.padded(self.m, self.n)
        self.panels = self.columns // tile.columns

    def parameters(self) -> dict[str, tuple[Lead, str]]:
        """Return the shape and type of each parameter but Y, X first."""
        raise NotImplementedError

    def shared(self, x: Any) -> list[tuple[Any, Lead]]:
        """Emit what is made of X first; return what every tile reads, with its shape."""
        return [(x, (*self.shape, self.k))]

    def emit_sums(self, inputs: list[Any], sums: Any, batch: list[Any], at: Any) -> None:
        """Fill ``sums[rows, columns]`` for ``at``, a panel of W and the first row of the tile.

        ``inputs`` are what `shared` returned and the parameters after X.
        """
        raise NotImplementedError

    def build(self) -> Any:
        """Return the TIR function, to be scheduled by `ExplicitTileRule`."""
        with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
            T.func_name(self.name)
            T.func_attr({"tirx.noalias": True, "op_pattern": OUT_EWISE_FUSABLE})
            inputs = [buffer_arg(name, *kind) for name, kind in self.parameters().items()]
            y = buffer_arg("Y", (*self.shape, self.n), self.dtype)
            size = shape64((*self.batch, self.rows, self.columns))
            acc = T.sblock_alloc_buffer(size, self.dtype)
            self._emit_tiles(self.shared(inputs[0]), inputs[1:], acc)
            self._emit_output(acc, y)
        return builder.get()

    def each_vector(self, rows: int, store: Any) -> None:
        """Emit ``store(row, first column)`` for every vector of the first ``rows`` rows."""
        with T.unroll(i64(rows)) as r, T.unroll(i64(self.tile.vectors)) as c:
            store(r, c * self.tile.lanes)

    def run(self, start: Any, lanes: int = 0) -> Any:
        """Return the index of ``lanes`` neighbours, a vector if omitted."""
        return T.ramp(start, i64(1), lanes or self.tile.lanes)

    def clear(self, sums: Any) -> None:
        """Set the sums of a tile to zero."""
        vector = zeros(self.dtype, self.tile.lanes)
        self.each_vector(
            self.tile.rows, lambda r, c: T.buffer_store(sums, vector, [r, self.run(c)])
        )

    def local_sums(self) -> Any:
        """Return a buffer for the sums of one tile, which LLVM keeps in registers."""
        size = shape64((self.tile.rows, self.tile.columns))
        return T.sblock_alloc_buffer(size, self.dtype, scope="local")

    def row(self, batch: list[Any], at: Any) -> Any:
        """Return the index of a row of X; rows past the end repeat the last one."""
        at = at if self.rows == self.m else T.min(at, i64(self.m - 1))
        return unravel_index(at, self.shape) if self.flat else (*batch, at)

    def _emit_tiles(self, shared: list[Any], inputs: list[Any], acc: Any) -> None:
        height, width = self.tile.rows, self.tile.columns
        grid = shape64((*self.batch, self.panels, self.rows // height))
        with T.grid(*grid) as loops, T.sblock("acc"):
            *batch, panel, row = spatial_axes(loops)
            read = [(whole, slice(0, shape[0]), shape) for whole, shape in shared]
            sizes = [shape for shape, _ in self.parameters().values()][1:]
            read += [(w, panel, shape) for w, shape in zip(inputs, sizes, strict=True)]
            T.reads(*(a[(first, *(slice(0, e) for e in shape[1:]))] for a, first, shape in read))
            rows = slice(row * height, (row + 1) * height)
            T.writes(acc[(*batch, rows, slice(panel * width, (panel + 1) * width))])
            T.sblock_attr(tile_attrs(self.tile, KERNEL))
            sums = self.local_sums()
            self.clear(sums)
            self.emit_sums([a for a, *_ in read], sums, batch, (panel, row * height))

            def keep(r: Any, c: Any) -> None:
                at = [*batch, row * height + r, self.run(panel * width + c)]
                T.buffer_store(acc, sums[r, self.run(c)], at)

            self.each_vector(height, keep)

    def _emit_output(self, acc: Any, y: Any) -> None:
        with T.grid(*shape64((*self.shape, self.n))) as loops, T.sblock("Y"):
            *row, column = spatial_axes(loops)
            at = [ravel_index(row, self.shape)] if self.flat else row
            T.reads(acc[(*at, column)])
            T.writes(y[(*row, column)])
            T.buffer_store(y, acc[(*at, column)], [*row, column])


class ExplicitTileRule(ScheduleRule):
    """Schedule rule for functions that hold one matmul of a `TileBuilder` and its epilogue."""

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        """Return the schedule of ``func``, or None if it holds no such matmul."""
        if not is_prim_func(func):
            return None
        sch = s_tir.Schedule(func)
        acc = find_tiled_block(sch, (KERNEL,))
        if acc is None:
            return None
        producers = sch.get_producers(acc)
        inline_spatial(sch, keep=[acc, *producers])
        *batch, panel, rows = sch.get_loops(acc)
        threads = target_threads(target)
        tasks = share_panels(sch, batch, panel, rows, threads)
        fuse_epilogue(sch, acc, rows, annotated_tile(sch.get(acc)), target)
        for producer in producers:
            schedule_spatial(sch, producer, target)
        sch.parallel(spread(sch, tasks, rows, threads))
        return sch


def spatial_axes(loops: Any) -> list[Any]:
    """Return the iterators of a block, one for each of the loops, none of which reduces."""
    axes = T.axis.remap("S" * len(loops), list(loops), dtype="int64")
    return list(axes) if len(loops) > 1 else [axes]


def buffer_arg(name: str, shape: Lead, dtype: str) -> Any:
    """Declare an argument of the function that is being built."""
    return T.arg(name, T.Buffer(shape64(shape), dtype))
