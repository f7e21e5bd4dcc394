"""Fused encoder attention with both products in bfloat16, the softmax between in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from tvm.script.ir_builder import tirx as T

from icd_tvm.errors import ShapeError
from icd_tvm.tir_schedules.cpu import vector_math
from icd_tvm.tir_schedules.cpu.attention import FloatHead, attention
from icd_tvm.tir_schedules.cpu.attention_head import AttentionShape, build_attention
from icd_tvm.tir_schedules.cpu.bf16_dot import Bf16Dot, bf16_dot, require_bf16
from icd_tvm.tir_schedules.cpu.bf16_matmul import PAIR
from icd_tvm.tir_schedules.cpu.emit import local, splat

# Columns of a head come in whole vectors of AVX-512.
HEAD_STEP = 16


def attention_kernel(shape: AttentionShape, target: Any) -> Any:
    """Return `attention` or `bf16_attention`, as ``shape.products`` says."""
    kernel = bf16_attention if shape.products == "bfloat16" else attention
    return kernel(shape, target)


def bf16_attention(shape: AttentionShape, target: Any) -> Any:
    """Return the TIR function of attention whose products round their operands to bfloat16.

    Inputs and result are float32, as those of `attention`, and so is the softmax; the
    exponentials are rounded before they are divided by their sum.

    Parameters
    ----------
    shape : AttentionShape
    target : tvm.target.Target

    Returns
    -------
    PrimFunc
        As of :func:`icd_tvm.tir_schedules.cpu.attention.attention`.

    Raises
    ------
    ConfigError
        If the target has no AVX512_BF16.
    ShapeError
        If heads are no multiple of 16 columns, or as `attention`.
    """
    require_bf16(target)
    if shape.head_dim % HEAD_STEP:
        raise ShapeError(f"heads of {shape.head_dim} columns", f"use multiples of {HEAD_STEP}")
    dot, types = bf16_dot(target), ("float32",) * 4
    return build_attention(
        "attention", shape, target, types, (), lambda at, _: _Bf16Head(shape, dot, at)
    )


class _Bf16Head(FloatHead):
    """Keeps keys, values, queries and exponentials as pairs of bfloat16."""

    def __init__(self, shape: AttentionShape, dot: Bf16Dot, at: tuple[Any, Any]) -> None:
        super().__init__(shape, dot.lanes, at)
        self.dot = dot
        self.query = local(self.rows, shape.head_dim, dtype="uint16")
        self.weights = local(self.rows, self.key_pad, dtype="uint16")

    def allocate(self) -> tuple[Any, Any]:
        """Return the buffers of the keys, transposed, and of the values: a pair a number."""
        shape = self.shape
        pairs = -(-shape.keys // PAIR)
        return (
            local(shape.head_dim // PAIR, self.key_pad, dtype="int32"),
            local(pairs, self.value_pad, dtype="int32"),
        )

    def scope(self) -> AbstractContextManager[Any]:
        """Return the scope in which the kernel is emitted."""
        return self.dot.imported()

    def load(self, k: Any, v: Any, mask: Any) -> None:
        """Copy this head's keys and values in pairs, and the mask."""
        shape = self.shape
        start = shape.offsets[1] + self.column

        def words(j: Any, first: Any, count: int) -> Any:
            values = k[self.batch, j, T.ramp(start + first * PAIR, 1, count * PAIR)]
            return T.reinterpret(f"int32x{count}", self.dot.rounded(values))

        self.transpose_keys(words, self.lanes // PAIR)
        self.load_mask(mask)
        if shape.keys // PAIR:
            with T.serial(shape.keys // PAIR) as pair:
                self._value_pair(v, pair, PAIR)
        if shape.keys % PAIR:
            self._value_pair(v, shape.keys // PAIR, 1)

    def _value_pair(self, v: Any, pair: Any, count: int) -> None:
        """Interleave up to two rows of values."""
        lanes, start = self.lanes, self.shape.offsets[2] + self.column
        wide = f"int32x{lanes}"
        with T.unroll(self.shape.head_dim // lanes) as c:
            parts = [
                self.dot.rounded(
                    v[self.batch, pair * PAIR + i, T.ramp(start + c * lanes, 1, lanes)]
                ).astype(wide)
                for i in range(count)
            ]
            word = parts[0]
            if count == PAIR:
                word = T.bitwise_or(word, T.shift_left(parts[1], splat(16, lanes)))
            T.buffer_store(self.table, word, [pair, T.ramp(c * lanes, 1, lanes)])

    def _round_row(self, source: Any, row: Any, start: Any, bits: Any, at: Any) -> None:
        lanes = self.lanes
        with T.unroll(self.shape.head_dim // lanes) as c:
            values = source[(*row, T.ramp(start + c * lanes, 1, lanes))]
            T.buffer_store(bits, self.dot.rounded(values), [*at, T.ramp(c * lanes, 1, lanes)])

    def scores(self, q: Any, first: Any) -> None:
        """Fill the scratch rows with scaled and masked scores, in units of log 2."""
        shape = self.shape
        start = shape.offsets[0] + self.column
        with T.serial(self.rows) as r:
            row = (self.batch, self.query_row(first, r))
            self._round_row(q, row, start, self.query, (r,))

        def query(r: Any, d: Any) -> Any:
            return _pair(self.query, (r,), d)

        size = (shape.head_dim // PAIR, self.key_pad)
        self.product("scores", size, query, self.keys, self.finish_score)

    def normalise(self) -> None:
        """Make the exponentials of every scratch row, rounded, and the inverse of their sum."""
        super().normalise()
        with T.serial(self.rows) as r, T.serial(self.key_pad // self.lanes) as c:
            at = T.ramp(c * self.lanes, 1, self.lanes)
            T.buffer_store(self.weights, self.dot.rounded(self.score[r, at]), [r, at])

    def power(self, x: Any) -> Any:
        """Return ``2 ** x`` of numbers that are not positive, to be rounded to bfloat16."""
        return vector_math.exp2_short(x)

    def weight(self, r: Any, pair: Any) -> Any:
        """Return what a pair of value rows is multiplied by."""
        return _pair(self.weights, (r,), pair)

    def value_steps(self) -> int:
        """Return the steps of the product with the values."""
        return -(-self.shape.keys // PAIR)

    def add(self, total: Any, left: Any, right: Any) -> Any:
        """Return the sums after one step: a pair with every column of ``right``."""
        return self.dot.add(total, left, right)


def _pair(bits: Any, at: Any, index: Any) -> Any:
    return T.reinterpret("int32", bits[(*at, T.ramp(index * PAIR, 1, PAIR))])
