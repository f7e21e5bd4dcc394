"""Matmuls whose lanes multiply a run of rows of W at a time: four bytes, or two bfloat16."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from icd_tvm._tvm import i64, tirx
from icd_tvm.tir_schedules.cpu.emit import LINE, prefetch
from icd_tvm.tir_schedules.cpu.lane_dot import LaneDot
from icd_tvm.tir_schedules.cpu.tile import Lead, Tile
from icd_tvm.tir_schedules.cpu.tile_builder import TileBuilder

# Runs in a step of the loop.
UNROLL = 4
# Bytes of a run.
_WORD = 4


class RunBuilder(TileBuilder):
    """Emits a dense product run by run.

    Parameters
    ----------
    shape, k, tile
        As of `TileBuilder`.
    dot : LaneDot

    Attributes
    ----------
    length : int
        Rows of a run.
    types : tuple of str
        Elements of X, of W and of the sums.
    """

    length = 1
    types = ("", "", "")

    def __init__(self, shape: Lead, k: int, tile: Tile, dot: LaneDot) -> None:
        super().__init__(shape, k, tile, self.types[2])
        self.dot, self.runs = dot, -(-k // self.length)

    def parameters(self) -> dict[str, tuple[Lead, str]]:
        """Return the shape and type of each parameter but Y, X first."""
        return {
            "X": ((*self.shape, self.k), self.types[0]),
            "W": ((self.panels, self.runs, self.tile.columns * self.length), self.types[1]),
        }

    def emit_sums(self, inputs: list[Any], sums: Any, batch: list[Any], at: Any) -> None:
        """Fill ``sums[rows, columns]`` for ``at``, a panel of W and the first row of the tile."""
        whole, place = self.k // self.length, (batch, *at)
        with self.dot.imported():
            if whole >= UNROLL:
                with T.serial(i64(whole // UNROLL)) as outer:
                    self.prefetch(inputs[1], at, outer)
                    with T.unroll(i64(UNROLL)) as inner:
                        run = outer * UNROLL + inner
                        self.step(inputs, sums, place, run, run * self.length, self.length)
            for tail in range(whole // UNROLL * UNROLL, self.runs):
                count = min(self.length, self.k - tail * self.length)
                self.step(inputs, sums, place, i64(tail), i64(tail) * self.length, count)

    def step(
        self, inputs: list[Any], sums: Any, place: Any, run: Any, start: Any, count: int
    ) -> None:
        """Add the products of a run of W with ``count`` numbers of X from ``start`` on."""
        (x, w), (batch, panel, first) = inputs, place
        width = self.tile.lanes * self.length
        with T.unroll(i64(self.tile.rows)) as r:
            word = self.word(x, self.row(batch, first + r), start, count)
            with T.unroll(i64(self.tile.vectors)) as c:
                here = (r, self.run(c * self.tile.lanes))
                weight = w[panel, run, self.run(c * width, width)]
                T.buffer_store(sums, self.dot.add(sums[here], word, weight), [*here])

    def word(self, x: Any, row: Any, first: Any, count: int) -> Any:
        """Return up to a run of numbers of a row as one int32; none past its end is read."""
        if count == self.length:
            return T.reinterpret("int32", x[(*row, self.run(first, count))])
        value = x[(*row, first)].astype("int32")
        for number in range(1, count):
            more = x[(*row, first + number)].astype("int32")
            shift = tirx.IntImm("int32", 8 * _WORD // self.length * number)
            value = T.bitwise_or(value, T.shift_left(more, shift))
        return value

    def prefetch(self, w: Any, at: Any, outer: Any) -> None:
        """Fetch a part of the next panel, which lies behind this one; each row tile its own.

        The weights of a model come from beyond L2: 16 rows of 768 bytes take a seventh less time
        so, 128 rows of 768 bfloat16 a twentieth. A panel that serves one row tile alone streams as
        fast as memory gives it.
        """
        row_tiles = self.rows // self.tile.rows
        if self.panels == 1 or row_tiles == 1:
            return
        panel, first = at
        groups = self.k // self.length // UNROLL
        group = tirx.floordiv(first, self.tile.rows) * groups + outer
        width, size = self.tile.columns * _WORD, _WORD // self.length
        lines = -(-UNROLL * width // (LINE * row_tiles))
        for line in range(lines):
            start = (group * lines + line) * LINE
            ahead = self.runs + tirx.floordiv(start, width)
            element = w[panel, ahead, tirx.floordiv(tirx.floormod(start, width), size)]
            T.evaluate(prefetch(element, locality=2))
