"""Eight rows of floats times a weight of bytes: a digit of every row in one vector.

:mod:`icd_tvm.tir_schedules.cpu.digit_matmul` broadcasts every digit of every row. With eight rows
that is a load beside each product, and the core waits for loads. Here a vector holds one digit of
eight rows for two quads of W, one after the other; the two quads of a column are broadcast once for
the three digits. Eleven loads then stand beside 24 products.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.script.ir_builder import tirx as T

from icd_tvm._tvm import i64, tirx
from icd_tvm.errors import ShapeError
from icd_tvm.tir_schedules.cpu.digit_matmul import (
    DIGITS,
    ZERO_DIGITS,
    DigitBuilder,
    takes_digits,
)
from icd_tvm.tir_schedules.cpu.dot_product import dot_product
from icd_tvm.tir_schedules.cpu.emit import AHEAD, LINE, local, prefetch, splat, zeros
from icd_tvm.tir_schedules.cpu.gemv import SKIP_ROWS, NarrowWeight
from icd_tvm.tir_schedules.cpu.int8_matmul import QUAD
from icd_tvm.tir_schedules.cpu.register_transpose import shuffle
from icd_tvm.tir_schedules.cpu.tile import Lead, Tile, flat_rows

# Columns of a group: their sums of three digits take 24 registers.
GROUP = 8
_ROWS, _LANES = 8, 16
_GROUPS = _LANES // GROUP
# With fewer rows too many lanes hold none.
_LEAST_ROWS = 7
_PAIR_BYTES = 2 * QUAD


def takes_lanes(form: NarrowWeight, rows: int, k: int, target: Any) -> bool:
    """Tell whether `lane_digit_matmul` is made for a weight, and faster than `digit_matmul`.

    Parameters
    ----------
    form : NarrowWeight
    rows : int
        Rows of X, as `flat_rows` returns them.
    k : int
        Numbers of a row.
    target : tvm.target.Target
    """
    return rows >= _LEAST_ROWS and takes_digits(form, rows, k, target)


def lane_digit_matmul(
    m: int, k: int, n: int, form: NarrowWeight, target: Any, *, lead: Lead = ()
) -> Any:
    """Return the TIR function of ``Y = X @ W`` for seven or eight rows and a weight of bytes.

    Parameters
    ----------
    m, k, n : int
        Rows of X, the reduced axis, columns of W.
    form : NarrowWeight
        Its steps are those of a group of eight columns.
    target : tvm.target.Target
    lead : tuple of int, optional
        Leading batch axes of X and Y.

    Returns
    -------
    PrimFunc
        ``(X: f32[*lead, m, k], W: i8[p, 2, K / 8, 64], S: f32[p, 1, 16][, R: i32[p, 2, steps]],
        C: i32[p, 1, 16], Y: f32[*lead, m, n])`` with the constants from `pack_lane_digits`. For
        `ExplicitTileRule`.

    Raises
    ------
    ShapeError
        If `takes_lanes` is false.
    """
    rows = flat_rows(lead, m)[1]
    if not takes_lanes(form, rows, k, target):
        raise ShapeError(
            f"{rows} rows of {k} numbers and {form} have no kernel of lanes", "use narrow_matmul"
        )
    tile = Tile(rows, 1, _LANES)
    return _LaneBuilder((*lead, m, n), k, form, dot_product(target), tile).build()


def whole_groups(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a weight, or a table of its columns, with columns of zeros up to whole vectors."""
    return np.pad(values, ((0, 0), (0, -values.shape[1] % _LANES)))


def pack_lane_digits(packed: list[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """Return the constants of a `lane_digit_matmul`.

    Parameters
    ----------
    packed : list of arrays
        W: int8[2 p, K, 8] and what belongs to it, from `pack_narrow` or `pack_skipping` for
        panels of `GROUP` columns of `whole_groups`.

    Returns
    -------
    list of arrays
        W: int8[p, 2, K / 8, 64], in which eight rows of a column are neighbours; the scales
        float32[p, 1, 16]; R: int32[p, 2, steps] if there was one; C: int32[p, 1, 16], the sum of
        every column.
    """
    weight, scale, *rows = packed
    groups, depth, columns = weight.shape
    panels = groups // _GROUPS
    split = weight.reshape(panels, _GROUPS, depth // SKIP_ROWS, SKIP_ROWS, columns).swapaxes(3, 4)
    pairs = np.ascontiguousarray(split).reshape(panels, _GROUPS, depth // SKIP_ROWS, -1)
    sums = weight.sum(axis=1, dtype=np.int32).reshape(panels, 1, _LANES)
    lists = [table.reshape(panels, _GROUPS, -1) for table in rows]
    return [pairs, scale.reshape(panels, 1, _LANES), *lists, sums]


class _LaneBuilder(DigitBuilder):
    name = "digit_matmul"

    @property
    def words(self) -> int:
        """Words of the digits of a chunk."""
        return DIGITS * _LANES

    def parameters(self) -> dict[str, tuple[Lead, str]]:
        """Return the shape and type of each parameter but Y, X first."""
        steps = self.form.steps
        return {
            "X": ((*self.shape, self.k), "float32"),
            "W": ((self.panels, _GROUPS, self.depth // SKIP_ROWS, GROUP * _PAIR_BYTES), "int8"),
            "S": ((self.panels, 1, _LANES), "float32"),
            **({"R": ((self.panels, _GROUPS, steps), "int32")} if steps else {}),
            "C": ((self.panels, 1, _LANES), "int32"),
        }

    def own_words(self, row: Any) -> slice:
        """Return the words of a chunk that a row writes, and some of other rows between them."""
        return slice(0, self.words)

    def store_words(self, digits: Any, cut: Any, place: list[Any], row: Any) -> None:
        """Store ``cut``, the words of a chunk of a row: both quads of a digit side by side."""
        cut = T.bind(cut)
        for digit in range(DIGITS):
            pair = tirx.Shuffle([cut], [_index(digit), _index(QUAD + digit)])
            T.buffer_store(digits, pair, [*place, self.run(digit * _LANES + 2 * row, 2)])

    def emit_sums(self, inputs: list[Any], sums: Any, batch: list[Any], at: Any) -> None:
        """Fill ``sums[rows, columns]`` for ``at``, a panel of W and the first row of the tile."""
        digits, unit, w, scale, *rows, totals = inputs
        panel, every = at[0], self.run(i64(0))
        parts = local(DIGITS * GROUP, _LANES, dtype="int32")
        columns = local(_ROWS, _LANES)
        with T.serial(i64(_GROUPS)) as group:
            for vector in range(DIGITS * GROUP):
                T.buffer_store(parts, zeros("int32", _LANES), [vector, every])
            with T.serial(i64(self.depth // SKIP_ROWS)) as step:
                chunk = step
                if rows:
                    start = rows[0][panel, group, step].astype("int64")
                    chunk = T.bind(tirx.floordiv(start, i64(SKIP_ROWS)))
                T.evaluate(prefetch(w[panel, group, step + AHEAD // LINE, 0]))
                self._emit_step(digits, w, parts, ([*batch, chunk], [panel, group, step]))
            self._finish(parts, columns, totals, (panel, group))
        found = _rows_of([T.bind(columns[vector, every]) for vector in range(_ROWS)])
        for r in range(self.tile.rows):
            factor = T.broadcast(unit[(*batch, r)], _LANES) * scale[panel, 0, every]
            T.buffer_store(sums, found[r] * factor, [r, every])

    def _emit_step(self, digits: Any, w: Any, parts: Any, at: Any) -> None:
        """Add the products of eight rows of W: a column at a time, a vector of each digit."""
        (chunk, place), every = at, self.run(i64(0))
        for c in range(GROUP):
            column = w[(*place, self.run(c * _PAIR_BYTES, _PAIR_BYTES))]
            pairs = T.broadcast(T.reinterpret("int64", column), _LANES // 2)
            weight = T.reinterpret(f"int8x{_LANES * QUAD}", pairs)
            for digit in range(DIGITS):
                words = digits[(*chunk, self.run(digit * _LANES))]
                here = (DIGITS * c + digit, every)
                T.buffer_store(parts, self.dot.multiply(parts[here], words, weight), [*here])

    def _finish(self, parts: Any, columns: Any, totals: Any, at: Any) -> None:
        """Join quads and digits of a group; a vector has the rows of a column, then of another."""
        (panel, group), every = at, self.run(i64(0))
        evens, odds = list(range(0, 2 * _LANES, 2)), list(range(1, 2 * _LANES, 2))
        for pair in range(GROUP // 2):
            first = group * GROUP + 2 * pair
            both = [T.broadcast(totals[panel, 0, first + c], _ROWS) for c in range(2)]
            total = tirx.Shuffle(both, [_index(lane) for lane in range(_LANES)])
            value = T.broadcast(tirx.FloatImm("float32", 0.0), _LANES)
            for digit in reversed(range(DIGITS)):
                left, right = (parts[DIGITS * (2 * pair + c) + digit, every] for c in range(2))
                joined = shuffle(left, right, evens) + shuffle(left, right, odds)
                joined = joined - total * splat(ZERO_DIGITS[digit], _LANES)
                value = value * splat(256.0, _LANES) + joined.astype(f"float32x{_LANES}")
            T.buffer_store(columns, value, [group * (GROUP // 2) + pair, every])


def _rows_of(vectors: list[Any]) -> list[Any]:
    """Turn eight vectors of two columns of eight rows into eight rows of 16 columns.

    A bit of the row takes the place of a bit of the column in three rounds of shuffles.
    """
    labels = [
        [(2 * v + lane // _ROWS, lane % _ROWS) for lane in range(_LANES)] for v in range(_ROWS)
    ]
    for bit in (1, 2, 4):
        for low in (v for v in range(_ROWS) if not v & bit):
            both, pair = labels[low] + labels[low | bit], (vectors[low], vectors[low | bit])
            for target, wanted in ((low, 0), (low | bit, bit)):
                order = [i for i, (_, row) in enumerate(both) if row & bit == wanted]
                order.sort(key=both.__getitem__)
                vectors[target] = shuffle(*pair, order)
                labels[target] = [both[i] for i in order]
    return vectors


def _index(value: int) -> Any:
    return tirx.IntImm("int32", value)
