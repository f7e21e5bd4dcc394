"""What the encoder attention kernels share: sizes, tasks, and products on register tiles."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from icd_tvm._tvm import tirx
from icd_tvm.errors import ShapeError
from icd_tvm.tir_schedules.cpu import vector_math
from icd_tvm.tir_schedules.cpu.emit import enter_if, f32, local, zeros
from icd_tvm.tir_schedules.cpu.lane_reduce import emit_reduce
from icd_tvm.tir_schedules.cpu.register_transpose import emit_transpose
from icd_tvm.tir_schedules.cpu.row_reduce import OPAQUE
from icd_tvm.tir_schedules.cpu.tile import row_pieces
from icd_tvm.tir_schedules.target import target_threads

# The most negative mask stays finite in units of log 2: minus itself must be zero.
LEAST_MASK = float(np.finfo(np.float32).min)
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
        What both products of a kernel on floats multiply.
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


def attention_shape(func: Any) -> AttentionShape | None:
    """Return the shape an attention kernel was built from, or None for any other function."""
    if func.attrs is None or _SHAPE_ATTR not in func.attrs:
        return None
    sizes = dict(func.attrs[_SHAPE_ATTR])
    for name in ("strides", "offsets"):
        sizes[name] = tuple(int(value) for value in sizes[name])
    sizes["products"] = str(sizes["products"])
    return AttentionShape(**sizes)


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


class HeadTask:
    """Emits the statements of one task: one head of one sequence, in scratch memory.

    Parameters
    ----------
    shape : AttentionShape
    lanes : int
        32-bit values of a vector register.
    at : (expr, expr)
        Number of the sequence and of the head.
    """

    # Keys, transposed: [words of a head, key_pad]. Of the type that a subclass multiplies.
    keys: Any

    def __init__(self, shape: AttentionShape, lanes: int, at: tuple[Any, Any]) -> None:
        self.shape, self.lanes = shape, lanes
        self.batch, head = at
        self.column = head * shape.head_dim
        self.rows = min(_ROWS, shape.queries)
        self.tiles = -(-shape.queries // self.rows)
        self.key_pad = -(-shape.keys // lanes) * lanes
        self.value_pad = -(-shape.head_dim // lanes) * lanes
        self.bias = local(self.key_pad)
        self.score = local(self.rows, self.key_pad)
        self.partial, self.each = local(lanes), local(self.rows)

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Return the scope in which the statements are emitted."""
        return contextlib.nullcontext()

    def load(self, k: Any, v: Any, mask: Any) -> None:
        """Copy this head's keys, values and mask into scratch memory."""
        raise NotImplementedError

    def scores(self, q: Any, first: Any) -> None:
        """Fill the scratch rows with the scores of the query rows from first on.

        They are scaled, masked and in units of log 2.
        """
        raise NotImplementedError

    def normalise(self) -> None:
        """Make the weights of the values of every scratch row."""
        raise NotImplementedError

    def values(self, y: Any, first: Any) -> None:
        """Write the weighted sums of the value rows."""
        raise NotImplementedError

    def transpose_keys(self, word: Callable[[Any, Any, int], Any], most: int) -> None:
        """Fill ``keys`` with the keys of this head, transposed, and with zeros past the last one.

        They are turned in squares where these fit. Squares reach past the last key and repeat it.

        Parameters
        ----------
        word : callable
            (key, first word, count) -> so many words of its row: a vector, or one number.
        most : int
            Words in the longest such vector.
        """
        words, last = int(self.keys.shape[0]), self.shape.keys - 1
        side = next((s for s in (16, 8, 4) if s <= most and words % s == 0), 1)
        if side == 1:
            with T.serial(self.shape.keys) as j, T.serial(words) as d:
                T.buffer_store(self.keys, word(j, d, 1), [d, j])
        else:
            with T.serial(last // side + 1) as square:
                for first in range(0, words, side):
                    emit_transpose(
                        side,
                        lambda row, first=first: word(  # type: ignore[misc]
                            T.min(square * side + row, last), first, side
                        ),
                        lambda row, vector, first=first: T.buffer_store(  # type: ignore[misc]
                            self.keys, vector, [first + row, T.ramp(square * side, 1, side)]
                        ),
                    )
        if self.key_pad > self.shape.keys:
            zero = tirx.const(0, str(self.keys.dtype))
            with T.serial(self.key_pad - self.shape.keys) as j, T.serial(words) as d:
                T.buffer_store(self.keys, zero, [d, self.shape.keys + j])

    def load_mask(self, mask: Any) -> None:
        """Fill ``bias`` with the mask in units of log 2; keys past the last one are hidden."""
        shape = self.shape
        with T.serial(shape.keys) as j:
            bias = mask[self.batch % shape.mask_batch, 0, 0, j]
            T.buffer_store(self.bias, self.scaled_mask(bias), [j])
        if self.key_pad > shape.keys:
            with T.serial(self.key_pad - shape.keys) as j:
                T.buffer_store(self.bias, f32(float("-inf")), [shape.keys + j])

    def scaled_mask(self, bias: Any) -> Any:
        """Return one number of the mask in units of log 2; what was finite stays so."""
        return T.max(f32(LEAST_MASK), bias * f32(vector_math.LOG2_E))

    def exponentiate(self, power: Callable[[Any], Any], factor: Any) -> None:
        """Replace the scores by the powers of 2 over their peaks.

        ``each`` holds ``factor`` over the sum of every row's powers then.
        """
        lanes = self.lanes
        # One loop for each step: a core overlaps the short chains of many rows, not long ones.
        with T.serial(self.rows) as r:
            peak = emit_reduce(
                self.partial, lanes, self.key_pad, T.max, lambda at: self.score[r, at]
            )
            T.buffer_store(self.each, peak, [r])
        with T.serial(self.rows) as r:
            T.buffer_store(self.partial, zeros("float32", lanes), [T.ramp(0, 1, lanes)])
            with T.serial(self.key_pad // lanes) as c, T.vectorized(lanes) as x:
                at = c * lanes + x
                T.buffer_store(self.score, power(self.score[r, at] - self.each[r]), [r, at])
                T.buffer_store(self.partial, self.partial[x] + self.score[r, at], [x])
            total = emit_reduce(self.partial, lanes, lanes, operator.add, lambda x: self.partial[x])
            T.buffer_store(self.each, factor / total, [r])

    def query_row(self, first: Any, r: Any) -> Any:
        """Return the number of a query row; rows past the end repeat the last one."""
        row = first + r
        whole = self.shape.queries % self.rows == 0
        return row if whole else T.min(row, self.shape.queries - 1)

    def multiply(
        self,
        name: str,
        size: tuple[int, int],
        initial: Callable[[Any], Any],
        step: Callable[[Any, Any, Any, Any], Any],
        finish: Callable[[Any, Any, Any], None],
        *,
        dtype: str = "float32",
        limits: tuple[Any, int] | None = None,
    ) -> None:
        """Emit a product on register tiles.

        Parameters
        ----------
        name : str
            Of the block.
        size : (int, int)
            Steps of the reduction; columns, a multiple of the lanes.
        initial : callable
            Columns -> what the sums start from, a vector.
        step : callable
            (sums, row, step, columns) -> sums; vectors.
        finish : callable
            (row, column, sum) -> None; stores one element.
        dtype : str
            Of the sums.
        limits : (expr, int), optional
            The rows and columns that exist, where a tile may reach past them.
        """
        (length, width), lanes = size, self.lanes
        vectors = 2 if width // lanes % 2 == 0 else 1
        with T.serial(width // (lanes * vectors)) as panel, T.sblock(name):
            acc = local(self.rows, vectors * lanes, dtype=dtype)
            start = panel * vectors * lanes

            def runs(c: Any) -> tuple[Any, Any]:
                return T.ramp(c * lanes, 1, lanes), T.ramp(start + c * lanes, 1, lanes)

            with T.unroll(self.rows) as r, T.unroll(vectors) as c:
                T.buffer_store(acc, initial(runs(c)[1]), [r, runs(c)[0]])
            with T.serial(length) as k, T.unroll(self.rows) as r, T.unroll(vectors) as c:
                own, columns = runs(c)
                T.buffer_store(acc, step(acc[r, own], r, k, columns), [r, own])
            with T.unroll(self.rows) as r:
                self._finish_row(acc, r, start, vectors, finish, limits)

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


def build_attention(
    name: str,
    shape: AttentionShape,
    target: Any,
    types: tuple[str, str, str, str],
    extras: Sequence[tuple[str, tuple[int, ...], str]],
    task: Callable[[tuple[Any, Any], list[Any]], HeadTask],
) -> Any:
    """Return the TIR function of an attention, marked as scheduled; its tasks run in parallel.

    Parameters
    ----------
    name : str
    shape : AttentionShape
    target : tvm.target.Target
        Gives the number of threads.
    types : tuple of str
        Element types of Q, K, V and Y.
    extras : sequence of (str, tuple of int, str)
        Name, shape and type of the parameters between the mask and Y.
    task : callable
        (sequence and head, those parameters) -> `HeadTask`.
    """
    check_attention(shape)
    row_tiles = -(-shape.queries // min(_ROWS, shape.queries))
    pieces = row_pieces(shape.batch * shape.heads, row_tiles, target_threads(target))
    lengths = (shape.queries, shape.keys, shape.keys)
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True})
        q, k, v = (
            T.arg(operand, T.Buffer((shape.batch, length, stride), dtype))
            for operand, length, stride, dtype in zip(
                "QKV", lengths, shape.strides, types[:3], strict=True
            )
        )
        mask = T.arg("mask", T.Buffer((shape.mask_batch, 1, 1, shape.keys), "float32"))
        more = [T.arg(label, T.Buffer(size, dtype)) for label, size, dtype in extras]
        y = T.arg("Y", T.Buffer((shape.batch, shape.queries, shape.width), types[3]))
        with T.parallel(shape.batch * shape.heads * pieces) as number, T.sblock("head"):
            at = (number // (shape.heads * pieces), number // pieces % shape.heads)
            head = task(at, more)
            with head.scope():
                head.load(k, v, mask)
                with T.serial(head.tiles // pieces) as tile:
                    first = (number % pieces * (head.tiles // pieces) + tile) * head.rows
                    head.scores(q, first)
                    head.normalise()
                    head.values(y, first)
    marks = {"op_pattern": OPAQUE, "tirx.is_scheduled": True, _SHAPE_ATTR: asdict(shape)}
    return builder.get().with_attr(marks)
