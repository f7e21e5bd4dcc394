"""A few rows of floats times a weight of 32, 8 or 4 bits: the product of a decoding step.

Such a product reads every weight once, so it takes the time its bytes take to arrive. Narrow
weights are a quarter or an eighth of the bytes and are widened in registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.script.ir_builder import tirx as T

from icd_tvm._tvm import i64, tirx
from icd_tvm.errors import ShapeError
from icd_tvm.tir_schedules.cpu.dense import matrix_shape, pack_panels
from icd_tvm.tir_schedules.cpu.emit import AHEAD, LINE, prefetch, splat
from icd_tvm.tir_schedules.cpu.tile import Lead, Tile, flat_rows
from icd_tvm.tir_schedules.cpu.tile_builder import TileBuilder
from icd_tvm.tir_schedules.target import vector_bits

# With more rows the multiplications take longer than the bytes of an fp32 weight.
MAX_ROWS = 8
_NIBBLES = 8
# Bits -> type, and bytes, of the stored numbers; nibbles come by eights.
_STORED = {4: "int32", 8: "int8", 32: "float32"}
_BYTES = {4: 4, 8: 1, 32: 4}
# Rows that a weight with zeros keeps or leaves out together: those of one step of the loop.
SKIP_ROWS = 8
# Rows of W in a step of the loop, and so between two groups of prefetches, for one row of X and
# for more: measured on Zen 5, in steps of eight four rows take a fifth longer.
_UNROLL, _UNROLL_MORE = 8, 2


@dataclass(frozen=True)
class NarrowWeight:
    """How a narrow weight is stored: ``(stored + low - zero) * scale``.

    Attributes
    ----------
    bits : int
        8, stored as int8; 4, stored as unsigned nibbles; or 32, floats without scales.
    block : int
        Rows that share scales and zero points; divides K, and is a multiple of 8 for 4 bits.
    low : int
        What the stored number 0 stands for.
    zeros : bool
        Whether there is a table of zero points.
    steps : int
        Runs of `SKIP_ROWS` rows that each panel keeps, of bytes with one block; 0 keeps all
        rows. The others are zeros, and neither stored nor read.
    """

    bits: int
    block: int
    low: int = 0
    zeros: bool = False
    steps: int = 0

    def __post_init__(self) -> None:
        if self.bits not in _STORED:
            raise ShapeError(f"weights of {self.bits} bits have no kernel", "use 4, 8 or 32")
        if self.floats and (self.low or self.zeros):
            raise ShapeError("weights of floats have no zero points", "use bytes")
        if self.steps and (self.bits != 8 or self.low or self.zeros):
            raise ShapeError("only int8 weights without zero points skip rows", "use steps=0")
        if self.block < 1 or (self.bits == 4 and self.block % _NIBBLES):
            raise ShapeError(
                f"blocks of {self.block} rows of {self.bits} bits have no kernel",
                f"use a multiple of {_NIBBLES}",
            )

    @property
    def floats(self) -> bool:
        """Whether the weight is stored as it is."""
        return self.bits == 32


def narrow_tile(rows: int, target: Any) -> Tile:
    """Return the register tile of `narrow_matmul`: all rows, and four vectors, two or one.

    The sums take at most half of the registers: measured on Zen 5, with more of them eight rows
    take twice the time.
    """
    lanes = vector_bits(target) // 32
    sums = 16 if lanes == 16 else 8
    return Tile(rows, next(v for v in (4, 2, 1) if rows * v <= sums), lanes)


def narrow_matmul(
    m: int, k: int, n: int, form: NarrowWeight, target: Any, *, lead: Lead = ()
) -> Any:
    """Return the TIR function of ``Y = X @ W`` for few rows of X.

    Parameters
    ----------
    m, k, n : int
        Rows of X, the reduced axis, columns of W.
    form : NarrowWeight
    target : tvm.target.Target
        Its vector width gives the panel width P, from `narrow_tile`.
    lead : tuple of int, optional
        Leading batch axes of X and Y.

    Returns
    -------
    PrimFunc
        ``(X: f32[*lead, m, k], W[, S: f32[p, G, P]][, Z: f32[p, G, P]][, R: i32[p, steps]],
        Y: f32[*lead, m, n])`` with p panels, G blocks, and W, S, Z from `pack_narrow` or W, S, R
        from `pack_skipping`; floats have no S. For `ExplicitTileRule`.

    Raises
    ------
    ShapeError
        If there are more than `MAX_ROWS` rows or the blocks do not divide k.
    """
    rows = flat_rows(lead, m)[1]
    if rows > MAX_ROWS:
        raise ShapeError(f"{rows} rows have no narrow kernel", f"use at most {MAX_ROWS}")
    if k % form.block:
        raise ShapeError(f"blocks of {form.block} do not divide k = {k}", "pad the weight")
    if form.steps and (k % SKIP_ROWS or form.block != k):
        raise ShapeError(f"steps of {SKIP_ROWS} rows of k = {k}", "one block, a multiple of steps")
    return _NarrowBuilder((*lead, m, n), k, narrow_tile(rows, target), form).build()


def pack_narrow(
    values: npt.NDArray[Any], tables: list[npt.NDArray[Any]], form: NarrowWeight, columns: int
) -> list[npt.NDArray[Any]]:
    """Return the constants of a `narrow_matmul`.

    Parameters
    ----------
    values : array [K, N]
        Integers that less ``form.low`` fit int8, or 0 to 15 for 4 bits; numbers for 32 bits.
    tables : list of arrays [G, N]
        Scales, and zero points if ``form.zeros``.
    form : NarrowWeight
    columns : int
        Panel width P.

    Returns
    -------
    list of arrays
        W: int8 or float32 [p, K, P], or int32[p, K / 8, P] with eight rows of a column in one
        number, the first in the lowest bits. Then each table as float32[p, G, P].

    Raises
    ------
    ShapeError
        If ``values`` is not a matrix or does not fit the bits.
    """
    matrix_shape(values)
    if form.floats:
        return [pack_panels(values.astype(np.float32), columns)]
    stored = values.astype(np.int32) - form.low
    least, most = (0, 15) if form.bits == 4 else (-128, 127)
    if stored.min() < least or stored.max() > most:
        raise ShapeError(
            f"weights from {stored.min()} to {stored.max()} do not fit {form.bits} bits",
            "choose another low",
        )
    if form.bits == 4:
        parts = stored.reshape(-1, _NIBBLES, values.shape[1]).astype(np.uint32)
        shifts = np.arange(0, 4 * _NIBBLES, 4, dtype=np.uint32)[:, None]
        packed = (parts << shifts).sum(axis=1, dtype=np.uint32).view(np.int32)
    else:
        packed = stored.astype(np.int8)
    return [
        pack_panels(packed, columns),
        *(pack_panels(t.astype(np.float32), columns) for t in tables),
    ]


def pack_skipping(
    values: npt.NDArray[Any], scale: npt.NDArray[Any], columns: int
) -> tuple[NarrowWeight, list[npt.NDArray[Any]]]:
    """Return the storage of bytes that leaves out runs of rows of zeros, and its constants.

    Parameters
    ----------
    values : array [K, N] of int8
        K is a multiple of `SKIP_ROWS`.
    scale : array [1, N]
    columns : int
        Panel width P.

    Returns
    -------
    form : NarrowWeight
        Its `steps` are those of the fullest panel.
    constants : list of arrays
        W: int8[p, steps * SKIP_ROWS, P], S: float32[p, 1, P], R: int32[p, steps], the first row
        of each run. Panels with fewer runs end in zeros that multiply the first rows of X.

    Raises
    ------
    ShapeError
        If ``values`` is no matrix or K is no multiple of `SKIP_ROWS`.
    """
    k, _ = matrix_shape(values)
    if k % SKIP_ROWS:
        raise ShapeError(f"{k} rows are no multiple of {SKIP_ROWS}", "pad the weight")
    runs = pack_panels(values.astype(np.int8), columns).reshape(
        -1, k // SKIP_ROWS, SKIP_ROWS, columns
    )
    kept = runs.any(axis=(2, 3))
    steps = max(1, int(kept.sum(axis=1).max()))
    # A stable sort of "left out" puts the kept runs first, in their order.
    order = np.argsort(~kept, axis=1, kind="stable")[:, :steps]
    data = np.take_along_axis(runs, order[:, :, None, None], axis=1)
    rows = np.where(np.take_along_axis(kept, order, axis=1), order * SKIP_ROWS, 0)
    form = NarrowWeight(8, k, steps=steps)
    table = pack_panels(scale.astype(np.float32), columns)
    packed = data.reshape(len(data), steps * SKIP_ROWS, columns)
    return form, [np.ascontiguousarray(packed), table, rows.astype(np.int32)]


class _NarrowBuilder(TileBuilder):
    name = "narrow_matmul"

    def __init__(self, shape: Lead, k: int, tile: Tile, form: NarrowWeight) -> None:
        super().__init__(shape, k, tile, "float32")
        self.form, self.blocks = form, k // form.block

    def parameters(self) -> dict[str, tuple[Lead, str]]:
        form, width = self.form, self.tile.columns
        depth = form.steps * SKIP_ROWS or (self.k // _NIBBLES if form.bits == 4 else self.k)
        table = ((self.panels, self.blocks, width), "float32")
        return {
            "X": ((*self.shape, self.k), "float32"),
            "W": ((self.panels, depth, width), _STORED[form.bits]),
            **({} if form.floats else {"S": table}),
            **({"Z": table} if form.zeros else {}),
            **({"R": ((self.panels, form.steps), "int32")} if form.steps else {}),
        }

    def emit_sums(self, inputs: list[Any], sums: Any, batch: list[Any], at: Any) -> None:
        if self.form.floats:
            self._emit_block(inputs, sums, batch, at, i64(0))
            return
        scale = inputs[2]
        if self.blocks == 1:
            self._emit_block(inputs, sums, batch, at, i64(0))
            self.each_vector(
                self.tile.rows, lambda r, c: self._scaled(sums, sums, scale, at[0], i64(0), r, c)
            )
            return
        part = self.local_sums()
        with T.serial(i64(self.blocks)) as block:
            self.clear(part)
            self._emit_block(inputs, part, batch, at, block)
            self.each_vector(
                self.tile.rows, lambda r, c: self._scaled(sums, part, scale, at[0], block, r, c)
            )

    def _scaled(
        self, sums: Any, part: Any, scale: Any, panel: Any, block: Any, r: Any, c: Any
    ) -> None:
        here = (r, self.run(c))
        value = part[here] * scale[panel, block, self.run(c)]
        T.buffer_store(sums, value if sums is part else sums[here] + value, [*here])

    def _emit_block(
        self, inputs: list[Any], sums: Any, batch: list[Any], at: Any, block: Any
    ) -> None:
        """Add the products of one block of rows of W."""
        size, start = self.form.steps * SKIP_ROWS or self.form.block, block * self.form.block
        step = min(_UNROLL if self.m == 1 else _UNROLL_MORE, size)
        if self.form.bits == 4 or self.form.steps:
            step = _NIBBLES if self.form.bits == 4 else SKIP_ROWS
        with T.serial(i64(size // step)) as outer:
            self._emit_rows(inputs, sums, batch, at, (block, start + outer * step, step))
        if size % step:
            first = start + size // step * step
            self._emit_rows(inputs, sums, batch, at, (block, first, size % step))

    def _emit_rows(
        self, inputs: list[Any], sums: Any, batch: list[Any], at: Any, rows: Any
    ) -> None:
        x, (panel, first_row) = inputs[0], at
        block, first, count = rows
        source = first
        if self.form.steps:
            source = inputs[-1][panel, tirx.floordiv(first, i64(SKIP_ROWS))].astype("int64")
        self._prefetch(inputs[1], panel, first, count)
        for t in range(count):
            with T.unroll(i64(self.tile.vectors)) as vector:
                c = vector * self.tile.lanes
                weight = self._widened(inputs, (panel, first, c), t)
                if self.form.zeros:
                    weight = weight - inputs[3][panel, block, self.run(c)]
                with T.unroll(i64(self.tile.rows)) as r:
                    factor = x[(*self.row(batch, first_row + r), source + t)]
                    here = (r, self.run(c))
                    product = T.broadcast(factor, self.tile.lanes) * weight
                    T.buffer_store(sums, sums[here] + product, [*here])

    def _prefetch(self, w: Any, panel: Any, first: Any, count: int) -> None:
        """Fetch the weights that are needed `AHEAD` bytes later.

        Panels lie one behind the other, so that what is past the end of one is the next.
        """
        size, per_row = _BYTES[self.form.bits], _NIBBLES if self.form.bits == 4 else 1
        row = self.tile.columns * size
        first = tirx.floordiv(first, i64(per_row))
        for line in range(0, row * (count // per_row), LINE):
            ahead = first + (AHEAD + line) // row
            T.evaluate(prefetch(w[panel, ahead, line % row // size]))

    def _widened(self, inputs: list[Any], place: Any, t: int) -> Any:
        """Return row ``first + t`` of a vector of columns as floats."""
        lanes, (panel, first, c) = self.tile.lanes, place
        if self.form.floats:
            return inputs[1][panel, first + t, self.run(c)]
        if self.form.bits == 8:
            value = inputs[1][panel, first + t, self.run(c)].astype(f"float32x{lanes}")
            return value if self.form.low == 0 else value + splat(float(self.form.low), lanes)
        eight = inputs[1][panel, tirx.floordiv(first, i64(_NIBBLES)), self.run(c)]
        nibble = T.shift_right(eight, splat(4 * t, lanes)) if t else eight
        if lanes != 16:
            value = T.bitwise_and(nibble, splat(15, lanes)).astype(f"float32x{lanes}")
            return value + splat(float(self.form.low), lanes)
        # The sixteen numbers a nibble can stand for fit a register; the permutation ignores
        # all but four bits of each index.
        numbers = T.ramp(tirx.IntImm("int32", self.form.low), tirx.IntImm("int32", 1), lanes)
        permute = T.llvm_lookup_intrinsic_id("llvm.x86.avx512.permvar.sf.512")
        table = numbers.astype(f"float32x{lanes}")
        return T.call_llvm_pure_intrin(f"float32x{lanes}", permute, table, nibble)
