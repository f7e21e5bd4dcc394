"""Fused encoder attention on bytes: both products in integers, the softmax between in floats.

Queries and probabilities are unsigned bytes, keys and values signed ones, so that both products
are what the dot product instruction takes; a third of the work of the float kernel on AVX512_VNNI.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from icd_tvm.errors import ShapeError
from icd_tvm.tir_schedules.cpu import vector_math
from icd_tvm.tir_schedules.cpu.attention import AttentionShape, check_attention
from icd_tvm.tir_schedules.cpu.dot_product import DotProduct, dot_product
from icd_tvm.tir_schedules.cpu.emit import enter_if, f32, i32, local
from icd_tvm.tir_schedules.cpu.lane_reduce import emit_reduce
from icd_tvm.tir_schedules.cpu.row_reduce import OPAQUE
from icd_tvm.tir_schedules.cpu.tile import row_pieces
from icd_tvm.tir_schedules.target import target_threads

_ROWS = 8
_QUAD = 4
_ONES = 0x01010101
_MAX_CODE = 255.0
# Products of bytes summed over more keys than this could overflow 32 bits.
MAX_KEYS = (2**31 - 1) // (255 * 128)


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


def byte_attention(shape: AttentionShape, target: Any) -> Any:
    """Return the TIR function of attention on quantised queries, keys, values and probabilities.

    ``softmax(scale * Q K^T + mask)`` is rounded to codes before it is multiplied by V. Both
    products are exact integers. Tasks are those of
    :func:`icd_tvm.tir_schedules.cpu.attention.attention`.

    Parameters
    ----------
    shape : AttentionShape
    target : tvm.target.Target

    Returns
    -------
    PrimFunc
        ``(Q: u8[batch, queries, strides[0]], K: i8[batch, keys, strides[1]],
        V: i8[batch, keys, strides[2]], mask: f32[mask_batch, 1, 1, keys],
        scales: f32[3], zero: i32[1], Y: f32[batch, queries, width])``, scheduled;
        `ByteScales.arrays` gives ``scales`` and ``zero``.

    Raises
    ------
    ConfigError
        If the target has no int8 dot product.
    ShapeError
        If a size is less than one, a head reaches past the end of its row or is no multiple of
        four columns, or there are more than ``MAX_KEYS`` keys.
    """
    check_attention(shape)
    if shape.head_dim % _QUAD:
        raise ShapeError(f"heads of {shape.head_dim} columns", "byte products take fours")
    if shape.keys > MAX_KEYS:
        raise ShapeError(f"sums over {shape.keys} keys may overflow", f"cut to {MAX_KEYS}")
    dot = dot_product(target)
    row_tiles = -(-shape.queries // min(_ROWS, shape.queries))
    pieces = row_pieces(shape.batch * shape.heads, row_tiles, target_threads(target))
    func = _build(shape, dot, pieces)
    return func.with_attr({"op_pattern": OPAQUE, "tirx.is_scheduled": True})


def _build(shape: AttentionShape, dot: DotProduct, pieces: int) -> Any:
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_name("byte_attention")
        T.func_attr({"tirx.noalias": True})
        lengths, types = (shape.queries, shape.keys, shape.keys), ("uint8", "int8", "int8")
        q, k, v = (
            T.arg(name, T.Buffer((shape.batch, length, stride), dtype))
            for name, length, stride, dtype in zip(
                "QKV", lengths, shape.strides, types, strict=True
            )
        )
        mask = T.arg("mask", T.Buffer((shape.mask_batch, 1, 1, shape.keys), "float32"))
        scales = T.arg("scales", T.Buffer((3,), "float32"))
        zero = T.arg("zero", T.Buffer((1,), "int32"))
        y = T.arg("Y", T.Buffer((shape.batch, shape.queries, shape.width), "float32"))
        with T.parallel(shape.batch * shape.heads * pieces) as task, T.sblock("head"):
            batch, number = task // (shape.heads * pieces), task // pieces % shape.heads
            head = _Head(shape, dot, (batch, number), scales, zero)
            head.load(k, v, mask)
            with T.serial(head.tiles // pieces) as tile:
                first = (task % pieces * (head.tiles // pieces) + tile) * head.rows
                head.scores(q, first)
                head.normalise()
                head.values(y, first)
    return builder.get()


class _Head:
    """Emits the statements of one task: one head of one sequence, in scratch memory."""

    def __init__(
        self, shape: AttentionShape, dot: DotProduct, at: tuple[Any, Any], scales: Any, zero: Any
    ) -> None:
        self.shape, self.dot, self.scales, self.zero = shape, dot, scales, zero
        self.batch, head = at
        self.lanes, self.column = dot.lanes, head * shape.head_dim
        self.rows = min(_ROWS, shape.queries)
        self.tiles = -(-shape.queries // self.rows)
        self.key_pad = -(-shape.keys // self.lanes) * self.lanes
        self.value_pad = -(-shape.head_dim // self.lanes) * self.lanes
        self.key_quads = -(-shape.keys // _QUAD)
        # Four bytes that are multiplied at once are one int32 here.
        self.keys = local(shape.head_dim // _QUAD, self.key_pad, dtype="int32")
        self.table = local(self.key_quads, self.value_pad, dtype="int32")
        self.raised = local(self.key_pad, dtype="int32")
        self.bias = local(self.key_pad)
        self.score = local(self.rows, self.key_pad)
        self.codes = local(self.rows, self.key_pad, dtype="uint8")
        self.partial = local(self.lanes)

    def load(self, k: Any, v: Any, mask: Any) -> None:
        """Copy this head's keys and values in fours, the mask, and what the zero point adds."""
        shape = self.shape
        start = shape.offsets[1] + self.column
        with T.serial(shape.keys) as j:
            with T.unroll(shape.head_dim // _QUAD) as d:
                four = k[self.batch, j, T.ramp(start + d * _QUAD, 1, _QUAD)]
                T.buffer_store(self.keys, T.reinterpret("int32", four), [d, j])
            T.buffer_store(self.bias, mask[self.batch % shape.mask_batch, 0, 0, j], [j])
        if self.key_pad > shape.keys:
            with T.serial(self.key_pad - shape.keys) as j:
                T.buffer_store(self.bias, f32(float("-inf")), [shape.keys + j])
                with T.serial(shape.head_dim // _QUAD) as d:
                    T.buffer_store(self.keys, i32(0), [d, shape.keys + j])
        self._sum_keys()
        self._load_values(v)

    def _sum_keys(self) -> None:
        """Keep, for every key, what the queries' zero point adds to its products."""
        with T.serial(self.key_pad // self.lanes) as c:
            at = T.ramp(c * self.lanes, 1, self.lanes)
            total: Any = T.broadcast(i32(0), self.lanes)
            for d in range(self.shape.head_dim // _QUAD):
                total = self.dot.add(total, i32(_ONES), self._bytes(self.keys[d, at]))
            zero = T.broadcast(self.zero[0], self.lanes)
            T.buffer_store(self.raised, total * zero, [at])

    def _load_values(self, v: Any) -> None:
        whole = self.shape.keys // _QUAD
        if whole:
            with T.serial(whole) as quad:
                self._value_row(v, quad, _QUAD)
        if whole < self.key_quads:
            self._value_row(v, whole, self.shape.keys % _QUAD)

    def _value_row(self, v: Any, quad: Any, count: int) -> None:
        """Interleave the bytes of four rows of values."""
        start, dim = self.shape.offsets[2] + self.column, self.shape.head_dim

        def word(d: Any) -> Any:
            total: Any = None
            for byte in range(count):
                code = v[self.batch, quad * _QUAD + byte, start + d].astype("int32")
                code = T.shift_left(T.bitwise_and(code, i32(255)), i32(8 * byte))
                total = code if total is None else T.bitwise_or(total, code)
            return total

        with T.serial(dim // self.lanes) as c, T.vectorized(self.lanes) as x:
            at = c * self.lanes + x
            T.buffer_store(self.table, word(at), [quad, at])
        if dim < self.value_pad:
            whole = dim // self.lanes * self.lanes
            with T.serial(self.value_pad - whole) as x:
                value = T.if_then_else(whole + x < dim, word(whole + x), i32(0))
                T.buffer_store(self.table, value, [quad, whole + x])

    def scores(self, q: Any, first: Any) -> None:
        """Fill the scratch rows with scaled and masked scores of the query rows from first on."""
        shape = self.shape
        start = shape.offsets[0] + self.column
        factor = T.bind(f32(shape.scale) * self.scales[0])

        def query(r: Any, d: Any) -> Any:
            row = first + r
            row = row if shape.queries % self.rows == 0 else T.min(row, shape.queries - 1)
            return T.reinterpret("int32", q[self.batch, row, T.ramp(start + d * _QUAD, 1, _QUAD)])

        def finish(acc: Any, r: Any, c: Any, start: Any) -> None:
            with T.vectorized(self.lanes) as x:
                at = start + c * self.lanes + x
                total = (acc[r, c * self.lanes + x] - self.raised[at]).astype("float32")
                T.buffer_store(self.score, total * factor + self.bias[at], [r, at])

        self._multiply("scores", query, self.keys, shape.head_dim // _QUAD, self.key_pad, finish)

    def normalise(self) -> None:
        """Turn every scratch row into codes of its softmax."""
        lanes, runs = self.lanes, self.key_pad // self.lanes
        with T.serial(self.rows) as r:
            peak = emit_reduce(
                self.partial, lanes, self.key_pad, T.max, lambda at: self.score[r, at]
            )
            with T.serial(runs) as c, T.vectorized(lanes) as x:
                at = c * lanes + x
                T.buffer_store(self.score, vector_math.exp(self.score[r, at] - peak), [r, at])
            total = emit_reduce(
                self.partial, lanes, self.key_pad, operator.add, lambda at: self.score[r, at]
            )
            inverse = T.bind(self.scales[1] / total)
            with T.serial(runs) as c, T.vectorized(lanes) as x:
                at = c * lanes + x
                code = T.min(self.score[r, at] * inverse + f32(0.5), f32(_MAX_CODE))
                T.buffer_store(self.codes, code.astype("int32").astype("uint8"), [r, at])

    def values(self, y: Any, first: Any) -> None:
        """Write the weighted sums of the value rows."""
        shape, lanes = self.shape, self.lanes
        factor = self.scales[2]
        ragged = shape.head_dim % lanes != 0

        def weight(r: Any, quad: Any) -> Any:
            return T.reinterpret("int32", self.codes[r, T.ramp(quad * _QUAD, 1, _QUAD)])

        def finish(acc: Any, r: Any, c: Any, start: Any) -> None:
            with contextlib.ExitStack() as stack:
                if shape.queries % self.rows:
                    enter_if(stack, r < shape.queries - first)
                x = stack.enter_context(T.serial(lanes) if ragged else T.vectorized(lanes))
                at = start + c * lanes + x
                if ragged:
                    enter_if(stack, at < shape.head_dim)
                value = acc[r, c * lanes + x].astype("float32") * factor
                T.buffer_store(y, value, [self.batch, first + r, self.column + at])

        self._multiply("values", weight, self.table, self.key_quads, self.value_pad, finish)

    def _multiply(
        self,
        name: str,
        left: Callable[[Any, Any], Any],
        right: Any,
        quads: int,
        width: int,
        finish: Callable[[Any, Any, Any, Any], None],
    ) -> None:
        """Emit the byte product on register tiles; ``finish`` stores each vector."""
        lanes, rows = self.lanes, self.rows
        vectors = 2 if width // lanes % 2 == 0 else 1
        with T.serial(width // (lanes * vectors)) as panel, T.sblock(name):
            acc = local(rows, vectors * lanes, dtype="int32")
            start = panel * vectors * lanes
            with T.unroll(rows) as r, T.unroll(vectors) as c:
                zero = T.broadcast(i32(0), lanes)
                T.buffer_store(acc, zero, [r, T.ramp(c * lanes, 1, lanes)])
            with T.serial(quads) as quad, T.unroll(rows) as r, T.unroll(vectors) as c:
                at = T.ramp(c * lanes, 1, lanes)
                bytes_ = self._bytes(right[quad, T.ramp(start + c * lanes, 1, lanes)])
                T.buffer_store(acc, self.dot.add(acc[r, at], left(r, quad), bytes_), [r, at])
            with T.unroll(rows) as r, T.unroll(vectors) as c:
                finish(acc, r, c, start)

    def _bytes(self, words: Any) -> Any:
        return T.reinterpret(f"int8x{_QUAD * self.lanes}", words)
