"""A few rows of floats times a weight of bytes, by products of bytes.

From three rows on, the multiply-adds of widened bytes take longer than the bytes take to arrive.
``vpdpbusd`` multiplies four at a time and wants nothing widened, but takes bytes on both sides:
rows of X become fixed-point numbers of 23 bits, cut into three digits of a byte. Three
instructions then do what four multiply-adds did, and the sums are exact integers. Seven and eight
rows are multiplied by :mod:`icd_tvm.tir_schedules.cpu.digit_lanes`.

X is off by at most 2**-22.5 of the largest of its row, about what float32 sums lose, and what is
smaller than that is taken as zero. Infinities and NaN spoil their row and no other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.script.ir_builder import tirx as T

from icd_tvm._tvm import i64, tirx, tvm
from icd_tvm.errors import ShapeError
from icd_tvm.tir_schedules.cpu.dense import shape64
from icd_tvm.tir_schedules.cpu.dot_product import DotProduct, dot_product
from icd_tvm.tir_schedules.cpu.emit import AHEAD, LINE, f32, i32, local, prefetch, splat, zeros
from icd_tvm.tir_schedules.cpu.gemv import MAX_ROWS, SKIP_ROWS, NarrowWeight
from icd_tvm.tir_schedules.cpu.int8_matmul import QUAD
from icd_tvm.tir_schedules.cpu.lane_reduce import emit_reduce
from icd_tvm.tir_schedules.cpu.tile import Lead, Tile, flat_rows
from icd_tvm.tir_schedules.cpu.tile_builder import TileBuilder, spatial_axes
from icd_tvm.tir_schedules.target import vector_bits

DIGITS = 3
_LANES = 16
# With fewer rows the multiply-adds are done before the bytes have arrived.
_LEAST_ROWS = 3
# Numbers of X whose digits are neighbours: those of a run of rows that a weight keeps or skips.
# Four of them, a quad, give a word of each digit and one of what was above, which is not read.
_CHUNK = SKIP_ROWS
# A float from 2**23 on has its integer in the bits of its mantissa. The middle of the range has
# 128 in the lower digits and 64 in the upper one: those are subtracted from what is summed.
_MIDDLE = float((3 << 22) + 0x8080)
ZERO_DIGITS = (128, 128, 64)
_LARGEST = 4161000.0
_ABSOLUTE = 0x7FFFFFFF
# Rows of smaller numbers are scaled as if this were their largest.
_LEAST_PEAK = int(np.float32(1e-20).view(np.int32))
# Products of a byte without and one with a sign, and the 128 times a weight that is subtracted.
_MAX_DEPTH = (2**31 - 1) // ((255 + 128) * 128)


def takes_digits(form: NarrowWeight, rows: int, k: int, target: Any) -> bool:
    """Tell whether `digit_matmul` is made for a weight, and faster than `narrow_matmul`.

    Parameters
    ----------
    form : NarrowWeight
    rows : int
        Rows of X, as `flat_rows` returns them.
    k : int
        Numbers of a row.
    target : tvm.target.Target
        Must have AVX512_VNNI: three digits of eight rows take the registers of AVX-512.
    """
    plain = form.bits == 8 and form.block == k and not (form.low or form.zeros)
    if not plain or not _LEAST_ROWS <= rows <= MAX_ROWS or k % _LANES or k > _MAX_DEPTH:
        return False
    has = tvm.target.codegen.target_has_features
    return vector_bits(target) == 512 and bool(has("avx512vnni", target))


def digit_tile(rows: int) -> Tile:
    """Return the register tile of `digit_matmul`: three sums for every row, and two vectors or one.

    Parameters
    ----------
    rows : int
    """
    return Tile(rows, 2 if DIGITS * rows * 2 <= 24 else 1, _LANES)


def digit_matmul(
    m: int, k: int, n: int, form: NarrowWeight, target: Any, *, lead: Lead = ()
) -> Any:
    """Return the TIR function of ``Y = X @ W`` for few rows of X and a weight of bytes.

    Parameters
    ----------
    m, k, n : int
        Rows of X, the reduced axis, columns of W.
    form : NarrowWeight
    target : tvm.target.Target
    lead : tuple of int, optional
        Leading batch axes of X and Y.

    Returns
    -------
    PrimFunc
        ``(X: f32[*lead, m, k], W: i8[p, K / 4, 4 * P], S: f32[p, 1, P][, R: i32[p, steps]],
        C: i32[p, 1, P], Y: f32[*lead, m, n])`` with p panels of P columns, and the constants from
        `pack_digits`. For `ExplicitTileRule`.

    Raises
    ------
    ShapeError
        If `takes_digits` is false.
    """
    rows = flat_rows(lead, m)[1]
    if not takes_digits(form, rows, k, target):
        raise ShapeError(
            f"{rows} rows of {k} numbers and {form} have no kernel of digits", "use narrow_matmul"
        )
    return DigitBuilder((*lead, m, n), k, form, dot_product(target), digit_tile(rows)).build()


def pack_digits(packed: list[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """Return the constants of a `digit_matmul`.

    Parameters
    ----------
    packed : list of arrays
        W: int8[p, K, P] and what belongs to it, from `pack_narrow` or `pack_skipping` for panels
        of `digit_tile`.

    Returns
    -------
    list of arrays
        W: int8[p, K / 4, 4 * P], in which four rows of a column are neighbours; the other
        constants; C: int32[p, 1, P], the sum of every column.
    """
    weight, *tables = packed
    panels, depth, columns = weight.shape
    split = weight.reshape(panels, depth // QUAD, QUAD, columns).swapaxes(2, 3)
    quads = np.ascontiguousarray(split).reshape(panels, depth // QUAD, columns * QUAD)
    return [quads, *tables, weight.sum(axis=1, keepdims=True, dtype=np.int32)]


class DigitBuilder(TileBuilder):
    """Emits the digits of X, and their products with a weight.

    Parameters
    ----------
    shape, k
        As of `TileBuilder`.
    form : NarrowWeight
    dot : DotProduct
    tile : Tile
    """

    name = "digit_matmul"

    def __init__(
        self, shape: Lead, k: int, form: NarrowWeight, dot: DotProduct, tile: Tile
    ) -> None:
        super().__init__(shape, k, tile, "float32")
        self.form, self.dot = form, dot
        self.depth = form.steps * SKIP_ROWS or k

    @property
    def words(self) -> int:
        """Words of the digits of a chunk."""
        return self.m * _CHUNK

    def own_words(self, row: Any) -> slice:
        """Return the words of a chunk that a row writes."""
        return slice(row * _CHUNK, (row + 1) * _CHUNK)

    def store_words(self, digits: Any, cut: Any, place: list[Any], row: Any) -> None:
        """Store ``cut``, the words of a chunk of a row: four of each of its quads."""
        T.buffer_store(digits, cut, [*place, self.run(row * _CHUNK, _CHUNK)])

    def parameters(self) -> dict[str, tuple[Lead, str]]:
        """Return the shape and type of each parameter but Y, X first."""
        width, steps = self.tile.columns, self.form.steps
        return {
            "X": ((*self.shape, self.k), "float32"),
            "W": ((self.panels, self.depth // QUAD, width * QUAD), "int8"),
            "S": ((self.panels, 1, width), "float32"),
            **({"R": ((self.panels, steps), "int32")} if steps else {}),
            "C": ((self.panels, 1, width), "int32"),
        }

    def shared(self, x: Any) -> list[tuple[Any, Lead]]:
        """Emit the digits ``[*batch, chunk, word]`` and the unit ``[*batch, row]`` of X."""
        chunks, words = self.k // _CHUNK, self.words
        shapes: tuple[Lead, Lead] = ((*self.batch, chunks, words), (*self.batch, self.m))
        digits = T.sblock_alloc_buffer(shape64(shapes[0]), "int32")
        unit = T.sblock_alloc_buffer(shape64(shapes[1]), "float32")
        # The last axis keeps `schedule_spatial` from taking rows for the lanes of a vector.
        with T.grid(*shape64((*self.batch, self.m, 1))) as loops, T.sblock("digits"):
            *batch, row, _ = spatial_axes(loops)
            T.reads(x[tuple(slice(0, extent) for extent in (*self.shape, self.k))])
            own = self.own_words(row)
            T.writes(digits[(*batch, slice(0, chunks), own)], unit[(*batch, row)])
            peak = self._peak(x, self.row(batch, row))
            T.buffer_store(unit, peak / f32(_LARGEST), [*batch, row])
            self._cut(x, digits, (batch, row), T.bind(f32(_LARGEST) / peak))
        return list(zip((digits, unit), shapes, strict=True))

    def _peak(self, x: Any, row: Any) -> Any:
        """Emit the largest magnitude of a row of X; NaN if it holds one."""
        lanes = self.tile.lanes
        most, partial = (local(lanes, dtype="int32") for _ in range(2))
        every = self.run(i64(0))
        T.buffer_store(most, zeros("int32", lanes), [every])
        with T.serial(i64(self.k // lanes)) as vector:
            # As integers, bits of floats without a sign are in order, and those of NaN come last.
            bits = T.reinterpret(f"int32x{lanes}", x[(*row, self.run(vector * lanes))])
            value = T.bitwise_and(bits, splat(_ABSOLUTE, lanes))
            T.buffer_store(most, T.max(most[every], value), [every])
        bits = emit_reduce(partial, lanes, lanes, T.max, lambda at: most[at])
        return T.bind(T.reinterpret("float32", T.max(bits, i32(_LEAST_PEAK))))

    def _cut(self, x: Any, digits: Any, at: Any, per_unit: Any) -> None:
        """Emit the digits of a row of X, of which ``per_unit`` is one over the unit."""
        lanes, (batch, row) = _CHUNK, at
        # Word j of four gets the byte j of the four numbers of a quad, from the lowest on.
        word = T.bitwise_and(T.ramp(i32(0), i32(1), lanes), splat(3, lanes))
        order = word * splat(0x01010101, lanes) + splat(0x0C080400, lanes)
        shuffle = T.llvm_lookup_intrinsic_id("llvm.x86.avx2.pshuf.b")
        with T.serial(i64(self.k // _CHUNK)) as chunk:
            place = (*self.row(batch, row), self.run(chunk * lanes, lanes))
            value = x[place] * T.broadcast(per_unit, lanes)
            bits = T.reinterpret("int8x32", value + splat(_MIDDLE, lanes))
            cut = T.call_llvm_pure_intrin("int8x32", shuffle, bits, T.reinterpret("int8x32", order))
            words = T.reinterpret(f"int32x{lanes}", cut)
            self.store_words(digits, words, [*batch, chunk], row)

    def emit_sums(self, inputs: list[Any], sums: Any, batch: list[Any], at: Any) -> None:
        """Fill ``sums[rows, columns]`` for ``at``, a panel of W and the first row of the tile."""
        digits, unit, w, scale, *rows, totals = inputs
        panel, lanes = at[0], self.tile.lanes
        size = shape64((DIGITS * self.tile.rows, self.tile.columns))
        parts = T.sblock_alloc_buffer(size, "int32", scope="local")

        def begin(r: Any, c: Any) -> None:
            for digit, zero in enumerate(ZERO_DIGITS):
                less = totals[panel, 0, self.run(c)] * splat(-zero, lanes)
                T.buffer_store(parts, less, [DIGITS * r + digit, self.run(c)])

        def finish(r: Any, c: Any) -> None:
            low, middle, high = (
                parts[DIGITS * r + digit, self.run(c)].astype(f"float32x{lanes}")
                for digit in range(DIGITS)
            )
            byte = splat(256.0, lanes)
            value = (high * byte + middle) * byte + low
            factor = T.broadcast(unit[(*batch, r)], lanes) * scale[panel, 0, self.run(c)]
            T.buffer_store(sums, value * factor, [r, self.run(c)])

        self.each_vector(self.tile.rows, begin)
        self._emit_steps((digits, w, rows), parts, batch, panel)
        self.each_vector(self.tile.rows, finish)

    def _emit_steps(self, inputs: Any, parts: Any, batch: list[Any], panel: Any) -> None:
        """Add the products of a panel of W: a run of rows at a time."""
        digits, w, rows = inputs
        quads = _CHUNK // QUAD
        with T.serial(i64(self.depth // _CHUNK)) as step:
            chunk = step
            if rows:
                chunk = T.bind(tirx.floordiv(rows[0][panel, step].astype("int64"), i64(_CHUNK)))
            self._prefetch(w, panel, step, quads)
            for quad in range(quads):
                place = (*batch, chunk, QUAD * quad)
                self._emit_quad((digits, w), parts, place, (panel, step * quads + quad))

    def _emit_quad(self, inputs: Any, parts: Any, place: Any, at: Any) -> None:
        """Add the products of four rows of W with their digits of every row of X."""
        (digits, w), (*chunk, first), width = inputs, place, self.tile.lanes * QUAD
        for r in range(self.tile.rows):
            for digit in range(DIGITS):
                word = digits[(*chunk, r * _CHUNK + first + digit)]
                with T.unroll(i64(self.tile.vectors)) as c:
                    here = (DIGITS * r + digit, self.run(c * self.tile.lanes))
                    weight = w[(*at, self.run(c * width, width))]
                    T.buffer_store(parts, self.dot.add(parts[here], word, weight), [*here])

    def _prefetch(self, w: Any, panel: Any, step: Any, quads: int) -> None:
        """Fetch the weights of a step `AHEAD` bytes later; past a panel's end comes the next."""
        row = self.tile.columns * QUAD
        for line in range(0, row * quads, LINE):
            ahead = step * quads + (AHEAD + line) // row
            T.evaluate(prefetch(w[panel, ahead, line % row]))
