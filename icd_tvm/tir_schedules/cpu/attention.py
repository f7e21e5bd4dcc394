"""Fused encoder attention on rows as the projections leave them: no transpose at run time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import tirx as T

from icd_tvm.tir_schedules.cpu import vector_math
from icd_tvm.tir_schedules.cpu.attention_head import (
    LEAST_MASK,
    AttentionShape,
    HeadTask,
    build_attention,
)
from icd_tvm.tir_schedules.cpu.emit import f32, local, zeros
from icd_tvm.tir_schedules.target import vector_bits


def attention(shape: AttentionShape, target: Any) -> Any:
    """Return the TIR function of ``softmax(scale * Q K^T + mask) V``, head by head.

    A task is one head of one sequence, or some of its rows if there are more threads than
    heads. It copies K transposed and V into scratch memory, then for eight query rows at a
    time forms the scores in registers, normalises them in L1 and multiplies them with V.
    Scores are never written to main memory.

    Parameters
    ----------
    shape : AttentionShape
    target : tvm.target.Target
        Gives the vector width and the number of threads.

    Returns
    -------
    PrimFunc
        ``(Q: f32[batch, queries, strides[0]], K: f32[batch, keys, strides[1]],
        V: f32[batch, keys, strides[2]], mask: f32[mask_batch, 1, 1, keys],
        Y: f32[batch, queries, width])``, scheduled.

    Raises
    ------
    ShapeError
        If a size is less than one or a head reaches past the end of its row.
    """
    lanes = vector_bits(target) // 32
    types = ("float32",) * 4
    return build_attention(
        "attention", shape, target, types, (), lambda at, _: FloatHead(shape, lanes, at)
    )


class FloatHead(HeadTask):
    """Keeps keys, values and scores of a head as float32."""

    def __init__(self, shape: AttentionShape, lanes: int, at: tuple[Any, Any]) -> None:
        super().__init__(shape, lanes, at)
        self.keys, self.table = self.allocate()

    def allocate(self) -> tuple[Any, Any]:
        """Return the buffers of the keys, transposed, and of the values."""
        shape = self.shape
        return local(shape.head_dim, self.key_pad), local(shape.keys, self.value_pad)

    def load(self, k: Any, v: Any, mask: Any) -> None:
        """Copy this head's keys transposed, its values padded to vectors, and the mask."""
        start = self.shape.offsets[1] + self.column

        def word(j: Any, first: Any, count: int) -> Any:
            at = start + first
            return k[self.batch, j, T.ramp(at, 1, count) if count > 1 else at]

        self.transpose_keys(word, self.lanes)
        with T.serial(self.shape.keys) as j:
            self._load_value_row(v, j)
        self.load_mask(mask)

    def scaled_mask(self, bias: Any) -> Any:
        """Return one number of the mask in units of log 2; infinities stay, as in the model."""
        return T.Select(bias < f32(LEAST_MASK), bias, super().scaled_mask(bias))

    def _load_value_row(self, v: Any, j: Any) -> None:
        whole = self.shape.head_dim // self.lanes * self.lanes
        start = self.shape.offsets[2] + self.column
        if whole:
            with T.serial(whole // self.lanes) as c, T.vectorized(self.lanes) as x:
                at = c * self.lanes + x
                T.buffer_store(self.table, v[self.batch, j, start + at], [j, at])
        if whole < self.value_pad:
            with T.serial(self.value_pad - whole) as x:
                inside = whole + x < self.shape.head_dim
                value = T.if_then_else(inside, v[self.batch, j, start + whole + x], f32(0.0))
                T.buffer_store(self.table, value, [j, whole + x])

    def scores(self, q: Any, first: Any) -> None:
        """Fill the scratch rows with scaled and masked scores, in units of log 2."""
        shape = self.shape
        start = shape.offsets[0] + self.column

        def query(r: Any, d: Any) -> Any:
            return q[self.batch, self.query_row(first, r), start + d]

        size = (shape.head_dim, self.key_pad)
        self.product("scores", size, query, self.keys, self.finish_score)

    def finish_score(self, r: Any, at: Any, value: Any) -> None:
        """Store one score, scaled and masked."""
        scaled = value * f32(self.shape.scale * vector_math.LOG2_E) + self.bias[at]
        T.buffer_store(self.score, scaled, [r, at])

    def normalise(self) -> None:
        """Replace every scratch row by its exponentials; keep the inverse of their sum."""
        self.exponentiate(self.power, f32(1.0))

    def power(self, x: Any) -> Any:
        """Return ``2 ** x`` of numbers that are not positive."""
        return vector_math.exp2(x, positive=False)

    def values(self, y: Any, first: Any) -> None:
        """Write the weighted sums of the value rows."""
        shape = self.shape

        def finish(r: Any, at: Any, value: Any) -> None:
            T.buffer_store(y, value * self.each[r], [self.batch, first + r, self.column + at])

        limits = (shape.queries - first, shape.head_dim)
        size = (self.value_steps(), self.value_pad)
        self.product("values", size, self.weight, self.table, finish, limits)

    def weight(self, r: Any, j: Any) -> Any:
        """Return what a value row is multiplied by."""
        return self.score[r, j]

    def value_steps(self) -> int:
        """Return the steps of the product with the values."""
        return self.shape.keys

    def add(self, total: Any, left: Any, right: Any) -> Any:
        """Return the sums after one step: ``left`` with every column of ``right``."""
        return total + T.broadcast(left, self.lanes) * right

    def product(
        self,
        name: str,
        size: tuple[int, int],
        left: Callable[[Any, Any], Any],
        right: Any,
        finish: Callable[[Any, Any, Any], None],
        limits: tuple[Any, int] | None = None,
    ) -> None:
        """Emit ``left @ right`` with the sums of `add`; see `multiply`."""

        def step(total: Any, r: Any, k: Any, columns: Any) -> Any:
            return self.add(total, left(r, k), right[k, columns])

        start = zeros("float32", self.lanes)
        self.multiply(name, size, lambda _: start, step, finish, limits=limits)
