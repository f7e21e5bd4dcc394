"""Matmuls on transposed activations: the sizes and the frame that their kernels share.

Vectors run along the rows of X. A panel of X is transposed once into scratch memory, word by
word: a word is one float, or the four bytes that one byte product takes. A step then loads a
few vectors of one word of X and multiplies them by the weights of a group of columns, each
broadcast once for all vectors. Tiles are transposed back in registers before the epilogue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log2, prod
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from icd_tvm._tvm import i64
from icd_tvm.tir_schedules.cpu.dense import (
    OUT_EWISE_FUSABLE,
    ravel_index,
    shape64,
    unravel_index,
)
from icd_tvm.tir_schedules.cpu.emit import emit_if, prefetch, zeros
from icd_tvm.tir_schedules.cpu.register_transpose import emit_transpose
from icd_tvm.tir_schedules.cpu.tile import Lead, Tile, flat_rows, tile_attrs
from icd_tvm.tir_schedules.cpu.tile_builder import buffer_arg, spatial_axes

KERNEL = "vcol"
# Vectors of rows per panel. A group of one column has no other column to hide the latency of its
# multiply-adds, and shares the load of its index and weight with them.
_VECTORS, _LONE_VECTORS = 2, 8
# Cycles in which L2 gives one line.
_L2_CYCLES = 2.0


@dataclass(frozen=True)
class VColShape:
    """Sizes of one kernel, and how the output is cut.

    Attributes
    ----------
    lead : tuple of int
        Batch axes of X and Y.
    m, k, n : int
        Rows of X, words of a row, columns of Y.
    nk : int
        Most words that a group lists.
    v : int
        Columns of a group.
    lanes : int
        Words of a vector register.
    """

    lead: Lead
    m: int
    k: int
    n: int
    nk: int
    v: int
    lanes: int

    @property
    def batch(self) -> Lead:
        """Batch axes that stay axes; batches of few rows are one run of rows."""
        return flat_rows(self.lead, self.m)[0]

    @property
    def rows(self) -> int:
        """Rows of X per element of ``batch``."""
        return flat_rows(self.lead, self.m)[1]

    @property
    def width(self) -> int:
        """Rows of X in one panel: whole vectors, about as many in each panel."""
        vectors = -(-self.rows // self.lanes)
        panels = -(-vectors // (_VECTORS if self.tile > 1 else _LONE_VECTORS))
        return self.lanes * -(-vectors // panels)

    @property
    def panels(self) -> int:
        """Panels that cover the rows."""
        return -(-self.rows // self.width)

    @property
    def tile(self) -> int:
        """Columns of Y in one register tile, all of one group."""
        return min(self.v, 8 if self.lanes == 16 else 4)

    @property
    def block(self) -> int:
        """Columns of Y that are finished together; whole vectors and whole groups."""
        return block_columns(self.v, self.lanes)

    @property
    def blocks(self) -> int:
        """Blocks that cover the columns of Y."""
        return -(-self.n // self.block)

    @property
    def groups(self) -> int:
        """Groups of columns, those that only pad the last block included."""
        return self.blocks * self.block // self.v

    @property
    def depth(self) -> int:
        """Words of a row rounded up to whole vectors."""
        return -(-self.k // self.lanes) * self.lanes


def block_columns(v: int, lanes: int) -> int:
    """Return how many columns of Y are finished together."""
    return max(v, lanes)


def vcol_cycles(shape: VColShape, rows: float) -> float:
    """Return the modelled cycles of a kernel that reads ``rows`` words of W per column."""
    return step_cycles(shape) * rows + turn_cycles(shape)


def step_cycles(shape: VColShape) -> float:
    """Return the modelled cycles of the steps that read one word of W per column.

    A step costs the busier of two FMA and two load ports, and about half a cycle more when the
    panel comes from L2. Groups of one column use each vector of the panel once and wait for L2:
    measured on Zen 5, 15 to 18 cycles for eight vectors.
    """
    vectors = shape.width // shape.lanes
    tiles = prod(shape.batch) * shape.panels * shape.blocks * shape.block // shape.tile
    step = max(shape.tile * vectors / 2, (shape.tile + vectors + 1) / 2, 4.0) + 0.5
    return tiles * (max(step, _L2_CYCLES * vectors) if shape.tile == 1 else step)


def turn_cycles(shape: VColShape) -> float:
    """Return the modelled cycles of the transposes: one per shuffle, and one per load and store."""
    turn = shape.lanes * (log2(shape.lanes) + 2)
    vectors = prod(shape.batch) * shape.panels * shape.width // shape.lanes
    return vectors * (shape.depth + shape.blocks * shape.block) / shape.lanes * turn


class PanelBuilder:
    """Emits a product of floats: transpose panels of X, multiply tile by tile, copy out.

    Parameters
    ----------
    shape : VColShape

    Attributes
    ----------
    name : str
        Of the function.
    types : tuple of str
        Elements of X and W, and of words and sums.
    length : int
        Elements of a word.
    """

    name = "vcol_matmul"
    types = ("float32", "float32", "float32")
    length = 1

    def __init__(self, shape: VColShape) -> None:
        self.shape = shape

    def words(self, x: Any, row: tuple[Any, ...], first: Any, count: int) -> Any:
        """Return ``count`` words of a row of X."""
        return x[(*row, run(first, count))] if count > 1 else x[(*row, first)]

    def weight(self, data: Any, place: tuple[Any, ...], column: Any) -> Any:
        """Return the word of W of a column of a group."""
        return data[(*place, column)]

    def add(self, total: Any, words: Any, weight: Any) -> Any:
        """Return the sums of a vector of rows after a step."""
        return total + T.broadcast(weight, self.shape.lanes) * words

    def build(self) -> Any:
        """Return the TIR function, to be scheduled by `TransposedSparseRule`."""
        s, (x_type, w_type, word) = self.shape, self.types
        with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
            T.func_name(self.name)
            T.func_attr({"tirx.noalias": True, "op_pattern": OUT_EWISE_FUSABLE})
            x = buffer_arg("X", (*s.lead, s.m, s.k * self.length), x_type)
            counts = buffer_arg("counts", (s.groups,), "int32")
            idx = buffer_arg("idx", (s.groups, s.nk), "int32")
            data = buffer_arg("data", (s.groups, s.nk, s.v * self.length), w_type)
            y = buffer_arg("Y", (*s.lead, s.m, s.n), word)
            turned = self._buffer((*s.batch, s.panels, s.depth, s.width))
            acc = self._buffer((*s.batch, s.panels * s.width, s.blocks * s.block))
            self._emit_panels(x, turned)
            self._emit_product((turned, counts, idx, data), acc)
            self._emit_output(acc, y)
        return builder.get()

    def _buffer(self, shape: Lead, scope: str = "global") -> Any:
        return T.sblock_alloc_buffer(shape64(shape), self.types[2], scope=scope)

    def _emit_panels(self, x: Any, turned: Any) -> None:
        """Fill ``turned[*batch, panel, word, row]`` with the transposed panels of X."""
        s = self.shape
        chunks, lanes = s.depth // s.lanes, s.lanes
        with (
            T.grid(*shape64((*s.batch, s.panels, chunks, s.width // lanes))) as loops,
            T.sblock("panel"),
        ):
            *batch, panel, chunk, vector = spatial_axes(loops)
            first, left = chunk * lanes, vector * lanes
            T.reads(x[tuple(slice(0, extent) for extent in (*s.lead, s.m, s.k * self.length))])
            own = (slice(first, first + lanes), slice(left, left + lanes))
            T.writes(turned[(*batch, panel, *own)])

            def row(at: Any) -> tuple[Any, ...]:
                at = panel * s.width + left + at
                at = at if s.panels * s.width == s.rows else T.min(at, i64(s.rows - 1))
                return (*batch, at) if s.batch == s.lead else unravel_index(at, (*s.lead, s.m))

            def whole() -> None:
                emit_transpose(
                    lanes,
                    lambda r: self.words(x, row(r), first, lanes),
                    lambda c, value: T.buffer_store(
                        turned, value, [*batch, panel, first + c, run(left, lanes)]
                    ),
                )

            def ragged() -> None:
                with T.serial(i64(lanes)) as c, T.serial(i64(lanes)) as r:
                    value = self.words(x, row(r), T.min(first + c, i64(s.k - 1)), 1)
                    T.buffer_store(turned, value, [*batch, panel, first + c, left + r])

            emit_if(s.depth != s.k, chunk == chunks - 1, ragged, whole)

    def _emit_product(self, inputs: tuple[Any, ...], acc: Any) -> None:
        """Fill ``acc[*batch, row, column]``, one panel of rows and block of columns at a time."""
        s, (turned, counts, idx, data) = self.shape, inputs
        with T.grid(*shape64((*s.batch, s.panels, s.blocks))) as loops, T.sblock("acc"):
            *batch, panel, block = spatial_axes(loops)
            first, group = block * s.block, block * (s.block // s.v)
            groups = slice(group, group + s.block // s.v)
            T.reads(
                turned[(*batch, panel, slice(0, s.depth), slice(0, s.width))],
                counts[groups],
                idx[groups, 0 : s.nk],
                data[groups, 0 : s.nk, 0 : s.v * self.length],
            )
            rows = slice(panel * s.width, (panel + 1) * s.width)
            T.writes(acc[(*batch, rows, slice(first, first + s.block))])
            T.sblock_attr(tile_attrs(Tile(s.width, s.block // s.lanes, s.lanes), KERNEL))
            columns = self._buffer((s.block, s.width), "local")
            with T.serial(i64(s.block // s.tile)) as tile:
                self._emit_tile(inputs, (*batch, panel), (group, tile * s.tile), columns)
            with (
                T.serial(i64(s.width // s.lanes)) as vector,
                T.serial(i64(s.block // s.lanes)) as chunk,
            ):
                left, top = vector * s.lanes, chunk * s.lanes
                at = panel * s.width + left
                emit_transpose(
                    s.lanes,
                    lambda c: columns[top + c, run(left, s.lanes)],
                    lambda r, value: T.buffer_store(
                        acc, value, [*batch, at + r, run(first + top, s.lanes)]
                    ),
                )

    def _emit_tile(
        self, inputs: tuple[Any, ...], panel: tuple[Any, ...], place: tuple[Any, Any], columns: Any
    ) -> None:
        """Emit one register tile: some columns of Y for the rows of a panel."""
        s, (turned, counts, idx, data), (group, start) = self.shape, inputs, place
        sums = self._buffer((s.tile, s.width), "local")
        group, inside = group + start // s.v, start % s.v

        def each(store: Callable[[Any, Any], None]) -> None:
            with T.unroll(i64(s.tile)) as c, T.unroll(i64(s.width // s.lanes)) as vector:
                store(c, run(vector * s.lanes, s.lanes))

        zero = zeros(self.types[2], s.lanes)
        each(lambda c, r: T.buffer_store(sums, zero, [c, r]))
        with T.serial(counts[group]) as step:
            word = T.bind(idx[group, step].astype("int64"))
            following = T.min(group + max(1, s.block // s.v), i64(s.groups - 1))
            # The weights of a model stream from memory, and the gathered words of X hide that
            # stream from the hardware: without this a multiply takes a third longer than on warm
            # weights. Single columns read a line in sixteen steps, which it sees.
            if s.v > 1:
                T.evaluate(prefetch(data[following, step, inside * self.length], locality=2))

            def add(c: Any, r: Any) -> None:
                weight = self.weight(data, (group, step), inside + c)
                total = self.add(sums[c, r], turned[(*panel, word, r)], weight)
                T.buffer_store(sums, total, [c, r])

            each(add)
        each(lambda c, r: T.buffer_store(columns, sums[c, r], [start + c, r]))

    def _emit_output(self, acc: Any, y: Any) -> None:
        """Copy what lies inside of Y; schedules compute it, and what follows, on the tile."""
        s = self.shape
        with T.grid(*shape64((*s.lead, s.m, s.n))) as loops, T.sblock("Y"):
            *row, column = spatial_axes(loops)
            at = row if s.batch == s.lead else [ravel_index(row, (*s.lead, s.m))]
            T.reads(acc[(*at, column)])
            T.writes(y[(*row, column)])
            T.buffer_store(y, acc[(*at, column)], [*row, column])


def run(start: Any, count: int) -> Any:
    """Return the index of ``count`` neighbours."""
    return T.ramp(start, i64(1), count)
