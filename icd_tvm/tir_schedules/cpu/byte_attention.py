"""Fused encoder attention on bytes: both products in integers, the softmax between in floats.

Queries and probabilities are unsigned bytes, keys and values signed ones, so that both products
are what the dot product instruction takes; a third of the work of the float kernel on AVX512_VNNI.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.script.ir_builder import tirx as T

from icd_tvm.errors import ShapeError
from icd_tvm.tir_schedules.cpu import vector_math
from icd_tvm.tir_schedules.cpu.attention_head import (
    AttentionShape,
    HeadTask,
    build_attention,
)
from icd_tvm.tir_schedules.cpu.dot_product import DotProduct, dot_product
from icd_tvm.tir_schedules.cpu.emit import f32, i32, local, splat, zeros
from icd_tvm.tir_schedules.cpu.int8_matmul import MAX_DEPTH, QUAD

_FORM_ATTR = "icd.byte_attention"
_ONES = 0x01010101
# Turns four bytes that are 128 higher into signed ones, and back.
_FLIP = 0x80808080 - (1 << 32)
_MAX_CODE = 255.0


@dataclass(frozen=True)
class ByteScales:
    """What the codes of one attention stand for.

    Attributes
    ----------
    query, key, value, weight : float
        Scale of the queries, keys, values and probabilities.
    query_zero : int
        Code of 0.0 of the queries; the others have theirs at 0.
    """

    query: float
    query_zero: int
    key: float
    value: float
    weight: float

    def arrays(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        """Return ``scales`` and ``zero`` as the kernel takes them."""
        factors = (self.query * self.key, 1.0 / self.weight, self.weight * self.value)
        return np.asarray(factors, np.float32), np.asarray([self.query_zero], np.int32)


@dataclass(frozen=True)
class ByteForm:
    """Which bytes a kernel takes and gives.

    Attributes
    ----------
    raised : bool
        Keys and values are uint8, 128 higher than their codes: so that one product can make
        queries, keys and values.
    codes : bool
        The result is written as uint8, by a factor for every column and a zero point.
    """

    raised: bool = False
    codes: bool = False


def byte_attention(shape: AttentionShape, target: Any, form: ByteForm = ByteForm()) -> Any:
    """Return the TIR function of attention on quantised queries, keys, values and probabilities.

    ``softmax(scale * Q K^T + mask)`` is rounded to codes before it is multiplied by V. Both
    products are exact integers; the exponentials are right to 3e-6, which moves a code by less
    than a thousandth of a step. Tasks are those of
    :func:`icd_tvm.tir_schedules.cpu.attention.attention`.

    Parameters
    ----------
    shape : AttentionShape
    target : tvm.target.Target
    form : ByteForm, optional

    Returns
    -------
    PrimFunc
        ``(Q: u8[batch, queries, strides[0]], K: i8[batch, keys, strides[1]],
        V: i8[batch, keys, strides[2]], mask: f32[mask_batch, 1, 1, keys],
        scales: f32[3], zero: i32[1], Y: f32[batch, queries, width])``, scheduled;
        `ByteScales.arrays` gives ``scales`` and ``zero``. K and V are u8 where they are raised.
        For codes, ``factor: f32[width]`` (steps per unit) and ``point: f32[1]`` come before Y,
        which is u8: ``round(value * factor) + point``, saturated.

    Raises
    ------
    ConfigError
        If the target has no int8 dot product.
    ShapeError
        If a size is less than one, a head reaches past the end of its row or is no multiple of
        four columns, or there are more than ``MAX_DEPTH`` keys.
    """
    if shape.head_dim % QUAD:
        raise ShapeError(f"heads of {shape.head_dim} columns", "byte products take fours")
    if shape.keys > MAX_DEPTH:
        raise ShapeError(f"sums over {shape.keys} keys may overflow", f"cut to {MAX_DEPTH}")
    dot = dot_product(target)
    side = "uint8" if form.raised else "int8"
    types = ("uint8", side, side, "uint8" if form.codes else "float32")
    extras: list[tuple[str, tuple[int, ...], str]] = [("scales", (3,), "float32")]
    extras.append(("zero", (1,), "int32"))
    if form.codes:
        extras += [("factor", (shape.width,), "float32"), ("point", (1,), "float32")]
    func = build_attention(
        "byte_attention",
        shape,
        target,
        types,
        extras,
        lambda at, given: _Head(shape, dot, form, at, given),
    )
    return func.with_attr(_FORM_ATTR, asdict(form))


def byte_form(func: Any) -> ByteForm | None:
    """Return the form `byte_attention` was built in, or None for any other function."""
    if func.attrs is None or _FORM_ATTR not in func.attrs:
        return None
    return ByteForm(**{name: bool(value) for name, value in func.attrs[_FORM_ATTR].items()})


class _Head(HeadTask):
    def __init__(
        self,
        shape: AttentionShape,
        dot: DotProduct,
        form: ByteForm,
        at: tuple[Any, Any],
        given: list[Any],
    ) -> None:
        super().__init__(shape, dot.lanes, at)
        self.dot, self.form = dot, form
        self.scales, self.zero, *self.output = given
        self.key_quads = -(-shape.keys // QUAD)
        # Four bytes that are multiplied at once are one int32 here.
        self.keys = local(shape.head_dim // QUAD, self.key_pad, dtype="int32")
        self.table = local(self.key_quads, self.value_pad, dtype="int32")
        self.surplus = local(self.key_pad, dtype="int32")
        self.codes = local(self.rows, self.key_pad, dtype="uint8")

    def load(self, k: Any, v: Any, mask: Any) -> None:
        """Copy this head's keys and values in fours, the mask, and what the zero point adds."""
        self._load_keys(k)
        self.load_mask(mask)
        self._sum_keys()
        self._load_values(v)

    def _load_keys(self, k: Any) -> None:
        start = self.shape.offsets[1] + self.column

        def word(j: Any, first: Any, count: int) -> Any:
            run = k[self.batch, j, T.ramp(start + first * QUAD, 1, count * QUAD)]
            return self._signed(T.reinterpret("int32" + f"x{count}" * (count > 1), run), count)

        self.transpose_keys(word, self.lanes)

    def _signed(self, words: Any, count: int) -> Any:
        """Return the bytes of words as signed ones, where they came raised."""
        if not self.form.raised:
            return words
        return T.bitwise_xor(words, splat(_FLIP, count) if count > 1 else i32(_FLIP))

    def _sum_keys(self) -> None:
        """Keep, for every key, what the queries' zero point adds to its products, negated."""
        nothing = zeros("int32", self.lanes)
        with T.serial(self.key_pad // self.lanes) as c:
            at = T.ramp(c * self.lanes, 1, self.lanes)
            total: Any = nothing
            for d in range(self.shape.head_dim // QUAD):
                total = self.dot.add(total, i32(_ONES), self._bytes(self.keys[d, at]))
            zero = T.broadcast(self.zero[0], self.lanes)
            T.buffer_store(self.surplus, nothing - total * zero, [at])

    def _load_values(self, v: Any) -> None:
        whole = self.shape.keys // QUAD
        if whole:
            with T.serial(whole) as quad:
                self._value_row(v, quad, QUAD)
        if whole < self.key_quads:
            self._value_row(v, whole, self.shape.keys % QUAD)

    def _value_row(self, v: Any, quad: Any, count: int) -> None:
        """Interleave the bytes of four rows of values."""
        start, dim = self.shape.offsets[2] + self.column, self.shape.head_dim

        def word(d: Any) -> Any:
            total: Any = None
            for byte in range(count):
                code = v[self.batch, quad * QUAD + byte, start + d].astype("int32")
                code = T.shift_left(T.bitwise_and(code, i32(255)), i32(8 * byte))
                total = code if total is None else T.bitwise_or(total, code)
            return self._signed(total, 1)

        with T.serial(dim // self.lanes) as c, T.vectorized(self.lanes) as x:
            at = c * self.lanes + x
            T.buffer_store(self.table, word(at), [quad, at])
        if dim < self.value_pad:
            whole = dim // self.lanes * self.lanes
            with T.serial(self.value_pad - whole) as x:
                value = T.if_then_else(whole + x < dim, word(whole + x), i32(0))
                T.buffer_store(self.table, value, [quad, whole + x])

    def scores(self, q: Any, first: Any) -> None:
        """Fill the scratch rows with scaled and masked scores, in units of log 2."""
        shape = self.shape
        start = shape.offsets[0] + self.column
        factor = T.bind(f32(shape.scale * vector_math.LOG2_E) * self.scales[0])

        def step(total: Any, r: Any, d: Any, columns: Any) -> Any:
            run = T.ramp(start + d * QUAD, 1, QUAD)
            four = T.reinterpret("int32", q[self.batch, self.query_row(first, r), run])
            return self.dot.add(total, four, self._bytes(self.keys[d, columns]))

        def finish(r: Any, at: Any, value: Any) -> None:
            scaled = value.astype("float32") * factor + self.bias[at]
            T.buffer_store(self.score, scaled, [r, at])

        size = (shape.head_dim // QUAD, self.key_pad)
        self.multiply("scores", size, lambda at: self.surplus[at], step, finish, dtype="int32")

    def normalise(self) -> None:
        """Turn every scratch row into codes of its softmax."""
        lanes = self.lanes
        self.exponentiate(vector_math.exp2_short, self.scales[1])
        with (
            T.serial(self.rows) as r,
            T.serial(self.key_pad // lanes) as c,
            T.vectorized(lanes) as x,
        ):
            at = c * lanes + x
            code = T.min(self.score[r, at] * self.each[r] + f32(0.5), f32(_MAX_CODE))
            T.buffer_store(self.codes, code.astype("int32").astype("uint8"), [r, at])

    def values(self, y: Any, first: Any) -> None:
        """Write the weighted sums of the value rows, or their codes."""
        shape = self.shape

        def step(total: Any, r: Any, quad: Any, columns: Any) -> Any:
            four = T.reinterpret("int32", self.codes[r, T.ramp(quad * QUAD, 1, QUAD)])
            return self.dot.add(total, four, self._bytes(self.table[quad, columns]))

        def finish(r: Any, at: Any, value: Any) -> None:
            result = value.astype("float32") * self.scales[2]
            if self.form.codes:
                factor, point = self.output
                result = vector_math.to_code(result * factor[self.column + at], point[0], "uint8")
            T.buffer_store(y, result, [self.batch, first + r, self.column + at])

        nothing = zeros("int32", self.lanes)
        self.multiply(
            "values",
            (self.key_quads, self.value_pad),
            lambda _: nothing,
            step,
            finish,
            dtype="int32",
            limits=(shape.queries - first, shape.head_dim),
        )

    def _bytes(self, words: Any) -> Any:
        return T.reinterpret(f"int8x{QUAD * self.lanes}", words)
