"""Fused encoder attention on rows as the projections leave them: no transpose at run time."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from icd_tvm.errors import ShapeError
from icd_tvm.tir_schedules.cpu import vector_math
from icd_tvm.tir_schedules.cpu.emit import enter_if, f32, local
from icd_tvm.tir_schedules.cpu.lane_reduce import Combine, emit_reduce
from icd_tvm.tir_schedules.cpu.row_reduce import OPAQUE
from icd_tvm.tir_schedules.cpu.tile import row_pieces
from icd_tvm.tir_schedules.target import target_threads, vector_bits

_ROWS = 8
_SHAPE_ATTR = "icd.attention"


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one attention and where its heads lie in the rows of Q, K and V.

    Attributes
    ----------
    batch, queries, keys : int
        Batch and the two sequence lengths.
    heads, head_dim : int
        The rows of Y hold ``heads`` runs of ``head_dim`` values.
    scale : float
        Factor on the scores, before the mask is added.
    mask_batch : int
        Batch of the mask: 1 or ``batch``.
    strides, offsets : tuple of three ints
        For Q, K and V: length of a row, and the column where head 0 starts.
    products : {"float32", "bfloat16"}
        What both products multiply.
    """

    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    scale: float
    mask_batch: int
    strides: tuple[int, int, int]
    offsets: tuple[int, int, int] = (0, 0, 0)
    products: str = "float32"

    @property
    def width(self) -> int:
        """Length of a row of Y."""
        return self.heads * self.head_dim

    def merged(self) -> AttentionShape:
        """Return the same attention on rows that hold Q, K and V side by side."""
        width = self.width
        return replace(self, strides=(3 * width,) * 3, offsets=(0, width, 2 * width))


def attention(shape: AttentionShape, target: Any, *, head: type[Head] | None = None) -> Any:
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
    head : subclass of Head, optional
        Emits the statements of a task instead.

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
    check_attention(shape)
    row_tiles = -(-shape.queries // min(_ROWS, shape.queries))
    pieces = row_pieces(shape.batch * shape.heads, row_tiles, target_threads(target))
    func = _build(shape, target, pieces, head or Head)
    marks = {"op_pattern": OPAQUE, "tirx.is_scheduled": True, _SHAPE_ATTR: asdict(shape)}
    return func.with_attr(marks)


def attention_shape(func: Any) -> AttentionShape | None:
    """Return the shape a function was built from by `attention`, or None for any other one."""
    if func.attrs is None or _SHAPE_ATTR not in func.attrs:
        return None
    sizes = dict(func.attrs[_SHAPE_ATTR])
    for name in ("strides", "offsets"):
        sizes[name] = tuple(int(value) for value in sizes[name])
    sizes["products"] = str(sizes["products"])
    return AttentionShape(**sizes)


def _build(shape: AttentionShape, target: Any, pieces: int, kind: type[Head]) -> Any:
    """Return the unmarked TIR function; the loop over tasks is parallel."""
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_name("attention")
        T.func_attr({"tirx.noalias": True})
        lengths = (shape.queries, shape.keys, shape.keys)
        q, k, v = (
            T.arg(name, T.Buffer((shape.batch, length, stride), "float32"))
            for name, length, stride in zip("QKV", lengths, shape.strides, strict=True)
        )
        mask = T.arg("mask", T.Buffer((shape.mask_batch, 1, 1, shape.keys), "float32"))
        y = T.arg("Y", T.Buffer((shape.batch, shape.queries, shape.width), "float32"))
        with T.parallel(shape.batch * shape.heads * pieces) as task, T.sblock("head"):
            sequence, number = task // (shape.heads * pieces), task // pieces % shape.heads
            head = kind(shape, target, sequence, number)
            with head.scope():
                head.load(k, v, mask)
                with T.serial(head.tiles // pieces) as tile:
                    first = (task % pieces * (head.tiles // pieces) + tile) * head.rows
                    head.scores(q, first)
                    head.normalise()
                    head.values(y, first)
    return builder.get()


class Head:
    """Emits the statements of one task: one head of one sequence, in scratch memory."""

    def __init__(self, shape: AttentionShape, target: Any, batch: Any, head: Any) -> None:
        self.shape, self.lanes, self.batch = shape, vector_bits(target) // 32, batch
        self.column = head * shape.head_dim
        self.rows = min(_ROWS, shape.queries)
        self.tiles = -(-shape.queries // self.rows)
        self.key_pad = _round_up(shape.keys, self.lanes)
        self.value_pad = _round_up(shape.head_dim, self.lanes)
        self.keys, self.table = self.allocate()
        self.bias = local(self.key_pad)
        self.score = local(self.rows, self.key_pad)
        self.partial = local(self.lanes)
        self.inverse = local(self.rows)

    def allocate(self) -> tuple[Any, Any]:
        """Return the buffers of the keys, transposed, and of the values."""
        shape = self.shape
        return local(shape.head_dim, self.key_pad), local(shape.keys, self.value_pad)

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Return the scope in which the kernel is emitted."""
        return contextlib.nullcontext()

    def load(self, k: Any, v: Any, mask: Any) -> None:
        """Copy this head's keys transposed, its values padded to vectors, and the mask."""
        shape, dim = self.shape, self.shape.head_dim
        with T.serial(shape.keys) as j:
            with T.serial(dim) as d:
                T.buffer_store(
                    self.keys, k[self.batch, j, shape.offsets[1] + self.column + d], [d, j]
                )
            self._load_value_row(v, j)
            T.buffer_store(self.bias, mask[self.batch % shape.mask_batch, 0, 0, j], [j])
        if self.key_pad > shape.keys:
            with T.serial(self.key_pad - shape.keys) as j:
                T.buffer_store(self.bias, f32(float("-inf")), [shape.keys + j])
                with T.serial(dim) as d:
                    T.buffer_store(self.keys, f32(0.0), [d, shape.keys + j])

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
        """Fill the scratch rows with scaled and masked scores of the query rows from first on."""
        shape = self.shape
        start = shape.offsets[0] + self.column

        def query(r: Any, d: Any) -> Any:
            row = first + r
            row = row if shape.queries % self.rows == 0 else T.min(row, shape.queries - 1)
            return q[self.batch, row, start + d]

        def finish(r: Any, at: Any, value: Any) -> None:
            scaled = value * f32(shape.scale) + self.bias[at]
            T.buffer_store(self.score, scaled, [r, at])

        self.multiply("scores", query, self.keys, shape.head_dim, self.key_pad, finish)

    def normalise(self) -> None:
        """Replace every scratch row by its exponentials; keep the inverse of their sum."""
        with T.serial(self.rows) as r:
            peak = self._reduce(T.max, lambda at: self.score[r, at])
            with T.serial(self.key_pad // self.lanes) as c, T.vectorized(self.lanes) as x:
                at = c * self.lanes + x
                T.buffer_store(self.score, vector_math.exp(self.score[r, at] - peak), [r, at])
            total = self._reduce(operator.add, lambda at: self.score[r, at])
            T.buffer_store(self.inverse, f32(1.0) / total, [r])

    def _reduce(self, combine: Combine, value: Callable[[Any], Any]) -> Any:
        return emit_reduce(self.partial, self.lanes, self.key_pad, combine, value)

    def values(self, y: Any, first: Any) -> None:
        """Write the weighted sums of the value rows."""
        shape = self.shape

        def finish(r: Any, at: Any, value: Any) -> None:
            T.buffer_store(y, value * self.inverse[r], [self.batch, first + r, self.column + at])

        limits = (shape.queries - first, shape.head_dim)
        steps = self.value_steps()
        self.multiply("values", self.weight, self.table, steps, self.value_pad, finish, limits)

    def weight(self, r: Any, j: Any) -> Any:
        """Return what a value row is multiplied by."""
        return self.score[r, j]

    def value_steps(self) -> int:
        """Return the steps of the product with the values."""
        return self.shape.keys

    def multiply(
        self,
        name: str,
        left: Callable[[Any, Any], Any],
        right: Any,
        length: int,
        width: int,
        finish: Callable[[Any, Any, Any], None],
        limits: tuple[Any, int] | None = None,
    ) -> None:
        """Emit ``left @ right`` on register tiles; ``finish`` stores each element.

        ``limits`` are the rows and columns that exist, where a tile may reach past them.
        """
        lanes, rows = self.lanes, self.rows
        vectors = 2 if width // lanes % 2 == 0 else 1
        with T.serial(width // (lanes * vectors)) as panel, T.sblock(name):
            acc = local(rows, vectors * lanes)
            start = panel * vectors * lanes
            with T.unroll(rows) as r, T.unroll(vectors) as c, T.vectorized(lanes) as x:
                T.buffer_store(acc, f32(0.0), [r, c * lanes + x])
            with T.serial(length) as k:
                self.accumulate(acc, left, right, (k, start, vectors))
            with T.unroll(rows) as r:
                self._finish_row(acc, r, start, vectors, finish, limits)

    def accumulate(
        self, acc: Any, left: Callable[[Any, Any], Any], right: Any, at: tuple[Any, Any, int]
    ) -> None:
        """Add one step of a product to the sums of a tile."""
        (k, start, vectors), lanes = at, self.lanes
        with T.unroll(self.rows) as r, T.unroll(vectors) as c, T.vectorized(lanes) as x:
            column = c * lanes + x
            product = left(r, k) * right[k, start + column]
            T.buffer_store(acc, acc[r, column] + product, [r, column])

    def _finish_row(
        self,
        acc: Any,
        r: Any,
        start: Any,
        vectors: int,
        finish: Callable[[Any, Any, Any], None],
        limits: tuple[Any, int] | None,
    ) -> None:
        lanes = self.lanes
        ragged = limits is not None and limits[1] % lanes != 0
        with contextlib.ExitStack() as stack:
            if limits is not None and self.shape.queries % self.rows:
                enter_if(stack, r < limits[0])
            c = stack.enter_context(T.unroll(vectors))
            x = stack.enter_context(T.serial(lanes) if ragged else T.vectorized(lanes))
            if limits is not None and ragged:
                enter_if(stack, start + c * lanes + x < limits[1])
            finish(r, start + c * lanes + x, acc[r, c * lanes + x])


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def check_attention(shape: AttentionShape) -> None:
    """Raise ShapeError if a size is less than one or a head reaches past its row."""
    sizes = (shape.batch, shape.queries, shape.keys, shape.heads, shape.head_dim)
    if min(sizes) < 1:
        raise ShapeError(f"attention sizes must be at least 1: {sizes}", "check the model")
    if shape.mask_batch not in (1, shape.batch):
        raise ShapeError(
            f"mask batch {shape.mask_batch} is neither 1 nor {shape.batch}", "broadcast the mask"
        )
    for stride, offset in zip(shape.strides, shape.offsets, strict=True):
        if offset + shape.width > stride:
            raise ShapeError(
                f"heads end at column {offset + shape.width} of a row of {stride}", "check offsets"
            )
