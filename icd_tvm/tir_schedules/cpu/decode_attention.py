"""Attention of one new token over a KV cache, as the cache lies: [batch, KV head, slot, channel].

The query heads of a KV head are computed together, so keys and values are read once, and no
widened or transposed copy of the cache is made.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from icd_tvm.errors import ShapeError
from icd_tvm.tir_schedules.cpu import vector_math
from icd_tvm.tir_schedules.cpu.cache_rows import BYTES, CacheRows
from icd_tvm.tir_schedules.cpu.decode_join import JoinedRuns, WholeCache
from icd_tvm.tir_schedules.cpu.emit import emit_if, f32, local
from icd_tvm.tir_schedules.cpu.lane_reduce import Combine, emit_reduce
from icd_tvm.tir_schedules.cpu.register_transpose import emit_transpose
from icd_tvm.tir_schedules.cpu.row_reduce import OPAQUE
from icd_tvm.tir_schedules.cpu.tile import row_pieces
from icd_tvm.tir_schedules.target import target_threads, vector_bits

_SHAPE_ATTR = "icd.decode_attention"
_MIN_LANES = 4
# Vector registers that hold sums of values; the rest hold a row of values and a weight.
_ACCUMULATORS = 24
_LOWEST = -3.4028234663852886e38


@dataclass(frozen=True)
class DecodeShape:
    """Sizes of one attention over a cache.

    Attributes
    ----------
    batch, kv_heads, share : int
        ``kv_heads * share`` query heads; head ``h`` reads KV head ``h // share``.
    slots, head_dim : int
        Rows of the cache, and channels of a head.
    scale : float
        Factor on the scores, before the mask is added.
    dtype : {"float32", "float16", "bfloat16", "int8"}
        Of keys and values; int8 codes have one float32 scale for every row. All arithmetic is
        float32.
    """

    batch: int
    kv_heads: int
    share: int
    slots: int
    head_dim: int
    scale: float
    dtype: str = "float32"


def decode_lanes(head_dim: int, target: Any) -> int | None:
    """Return the widest vector that divides ``head_dim``, or None if there is none of four."""
    lanes = vector_bits(target) // 32
    while lanes >= _MIN_LANES and head_dim % lanes:
        lanes //= 2
    return lanes if lanes >= _MIN_LANES else None


def decode_attention(shape: DecodeShape, target: Any) -> Any:
    """Return the TIR function of ``softmax(scale * q K^T + mask) V`` for one query a head.

    A task is a run of slots of one KV head: it forms the scores of all query heads that share
    it, their exponentials, and the weighted sum of the values, with one pass over the keys and
    one over the values. Where heads are cut to occupy all threads, a last step joins the runs by
    their peaks and sums.

    Parameters
    ----------
    shape : DecodeShape
    target : tvm.target.Target
        Gives the vector width and the number of threads.

    Returns
    -------
    PrimFunc
        ``(Q: f32[batch, kv_heads * share, 1, head_dim], K: dtype[batch, kv_heads, slots, head_dim],
        V: the same, mask: f32[slots], Y: like Q)``, scheduled. For codes their scales
        f32[batch, kv_heads, slots, 1] of keys and of values follow V: a row's scale is a factor of
        its score or weight, so codes are only widened, in registers, as floats of 16 bits are.

    Raises
    ------
    ShapeError
        A size is less than one, head_dim is no multiple of 4, or the dtype is unknown.

    Notes
    -----
    Joining runs by peak and sum: Dao et al., "Flash-Decoding for long-context inference", 2023.
    """
    lanes = _checked_lanes(shape, target)
    blocks = -(-shape.slots // lanes)
    pieces = row_pieces(shape.batch * shape.kv_heads, blocks, target_threads(target))
    func = _build(_Plan(shape, lanes, blocks, pieces))
    marks = {"op_pattern": OPAQUE, "tirx.is_scheduled": True, _SHAPE_ATTR: asdict(shape)}
    return func.with_attr(marks)


@dataclass(frozen=True)
class _Plan:
    shape: DecodeShape
    lanes: int
    blocks: int
    pieces: int

    @property
    def width(self) -> int:
        """Slots of a task, the last task's padding included."""
        return self.blocks // self.pieces * self.lanes

    @property
    def ragged(self) -> bool:
        return self.blocks * self.lanes != self.shape.slots

    @property
    def tasks(self) -> int:
        return self.shape.batch * self.shape.kv_heads * self.pieces

    @property
    def chunks(self) -> int:
        return self.shape.head_dim // self.lanes


def _build(plan: _Plan) -> Any:
    s = plan.shape
    heads = s.kv_heads * s.share
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_name("decode_attention")
        T.func_attr({"tirx.noalias": True})
        q = T.arg("Q", T.Buffer((s.batch, heads, 1, s.head_dim), "float32"))
        rows = (s.batch, s.kv_heads, s.slots)
        k, v = (CacheRows(name, (*rows, s.head_dim), s.dtype) for name in "KV")
        if s.dtype == "int8":
            for name, own in (("K_scale", k), ("V_scale", v)):
                own.scale = T.arg(name, T.Buffer((*rows, 1), "float32"))
        mask = T.arg("mask", T.Buffer((s.slots,), "float32"))
        y = T.arg("Y", T.Buffer((s.batch, heads, 1, s.head_dim), "float32"))
        k.declare()
        v.declare()
        runs = JoinedRuns(plan) if plan.pieces > 1 else None
        with T.parallel(plan.tasks) as task, T.sblock("run"):
            run = _Run(plan, task)
            run.scores(q, k, mask)
            run.normalise()
            run.weigh(v)
            run.values(v, runs or WholeCache(plan, y))
        if runs is not None:
            with T.serial(s.batch * heads) as head, T.sblock("join"):
                runs.join(y, head)
    return builder.get()


class _Run:
    """Emits one task: some slots of one KV head, for all query heads that share it."""

    def __init__(self, plan: _Plan, task: Any) -> None:
        self.plan = plan
        self.task = task
        self.batch = task // (plan.shape.kv_heads * plan.pieces)
        self.head = task // plan.pieces % plan.shape.kv_heads
        self.first = task % plan.pieces * plan.width
        self.score = local(plan.shape.share, plan.width)
        self.partial = local(plan.lanes)
        self.peak = local(plan.shape.share)
        self.total = local(plan.shape.share)

    def _row(self, slot: Any) -> Any:
        return T.min(slot, self.plan.shape.slots - 1) if self.plan.ragged else slot

    def scores(self, q: Any, k: CacheRows, mask: Any) -> None:
        """Fill the scratch rows with scaled and masked scores; slots past the end get -inf."""
        plan, s = self.plan, self.plan.shape
        lanes = plan.lanes
        # Fetched a few lines at a time: a burst would fill the queue that loads wait in.
        count = -(-k.lines // s.share)
        with T.serial(plan.width // lanes) as block, T.serial(s.share) as r:
            start = self.first + block * lanes
            query = self.head * s.share + r
            acc = local(lanes)
            with T.vectorized(lanes) as x:
                T.buffer_store(acc, f32(0.0), [x])

            def product(j: int, start: Any = start, query: Any = query, r: Any = r) -> Any:
                row = self._row(start + j)
                line = (r * lanes + j) * count
                k.fetch_ahead(self.batch, self.head, start, line, count)
                total = None
                for chunk in range(plan.chunks):
                    at = T.ramp(chunk * lanes, 1, lanes)
                    term = q[self.batch, query, 0, at] * k.at(self.batch, self.head, row, at)
                    total = term if total is None else total + term
                return total

            def add(_: int, vector: Any, acc: Any = acc) -> None:
                at = T.ramp(0, 1, lanes)
                T.buffer_store(acc, acc[at] + vector, [at])

            # Row j holds the lane sums of slot j: the rows of the transpose add up to the scores.
            emit_transpose(lanes, product, add)
            self._finish(acc, k, mask, block, r)

    def _finish(self, acc: Any, k: CacheRows, mask: Any, block: Any, r: Any) -> None:
        plan = self.plan
        start = block * plan.lanes
        with T.vectorized(plan.lanes) as x:
            T.buffer_store(self.score, acc[x] * f32(plan.shape.scale), [r, start + x])

        def finish(x: Any) -> None:
            at = start + x
            score, slot = self.score[r, at], self.first + at
            if k.scale is not None:
                score = score * k.scale[self.batch, self.head, slot, 0]
            T.buffer_store(self.score, score + mask[slot], [r, at])

        def hide(x: Any) -> None:
            T.buffer_store(self.score, f32(float("-inf")), [r, start + x])

        self._each_slot(start, finish, hide)

    def _each_slot(
        self, start: Any, emit: Callable[[Any], None], beyond: Callable[[Any], None] | None = None
    ) -> None:
        """Emit for a vector of slots from ``start`` of the task on; ``beyond`` past the last one.

        A block that reaches past the end goes slot by slot: of a vector nothing may be read there.
        """
        plan, first = self.plan, self.first + start

        def whole() -> None:
            with T.vectorized(plan.lanes) as x:
                emit(x)

        def ragged() -> None:
            with T.serial(plan.lanes) as x, T.If(first + x < plan.shape.slots):
                with T.Then():
                    emit(x)
                if beyond is not None:
                    with T.Else():
                        beyond(x)

        emit_if(plan.ragged, first + plan.lanes > plan.shape.slots, ragged, whole)

    def normalise(self) -> None:
        """Replace every scratch row by its exponentials; keep its peak and its sum."""
        plan = self.plan
        with T.serial(plan.shape.share) as r:
            peak = self._reduce(T.max, r)
            # A run whose slots are all masked with -inf must not subtract -inf from itself.
            T.buffer_store(self.peak, T.max(peak, f32(_LOWEST)), [r])
            with T.serial(plan.width // plan.lanes) as c, T.vectorized(plan.lanes) as x:
                at = c * plan.lanes + x
                value = vector_math.exp(self.score[r, at] - self.peak[r])
                T.buffer_store(self.score, value, [r, at])
            T.buffer_store(self.total, self._reduce(operator.add, r), [r])

    def weigh(self, v: CacheRows) -> None:
        """Multiply the exponentials by the scales of the values that they will weigh."""
        if v.scale is None:
            return
        plan = self.plan
        blocks = plan.width // plan.lanes
        with T.grid(plan.shape.share, blocks) as (r, c):
            start = c * plan.lanes

            def weigh(x: Any) -> None:
                at = start + x
                scale = v.scale[self.batch, self.head, self.first + at, 0]
                T.buffer_store(self.score, self.score[r, at] * scale, [r, at])

            self._each_slot(start, weigh)

    def _reduce(self, combine: Combine, r: Any) -> Any:
        plan = self.plan
        return emit_reduce(
            self.partial, plan.lanes, plan.width, combine, lambda at: self.score[r, at]
        )

    def values(self, v: CacheRows, out: Any) -> None:
        """Sum the value rows by their weights, and hand peak, sum and rows to ``out``."""
        plan, s = self.plan, self.plan.shape
        vectors = _panel(s.share, plan.chunks)
        with T.serial(plan.chunks // vectors) as panel, T.sblock("values"):
            acc = local(s.share, vectors * plan.lanes)
            start = panel * vectors * plan.lanes
            with _tile(s.share, vectors, plan.lanes) as (r, at):
                T.buffer_store(acc, f32(0.0), [r, at])
            with T.serial(plan.width) as j:
                row = self._row(self.first + j)
                v.fetch_ahead(self.batch, self.head, row, 0, v.lines)
                with _tile(s.share, vectors, plan.lanes) as (r, at):
                    value = v.at(self.batch, self.head, row, start + at)
                    T.buffer_store(acc, acc[r, at] + self.score[r, j] * value, [r, at])
            with T.serial(s.share) as r:
                query = self.head * s.share + r
                out.store(self, query, r, start, vectors, acc)


@contextlib.contextmanager
def _tile(rows: int, vectors: int, lanes: int) -> Iterator[tuple[Any, Any]]:
    with T.unroll(rows) as r, T.unroll(vectors) as c, T.vectorized(lanes) as x:
        yield r, c * lanes + x


def _panel(share: int, chunks: int) -> int:
    """Return how many vectors of a value row are summed at once: a divisor of ``chunks``."""
    fits = [n for n in range(1, chunks + 1) if chunks % n == 0 and share * n <= _ACCUMULATORS]
    return max(fits, default=1)


def _checked_lanes(shape: DecodeShape, target: Any) -> int:
    sizes = (shape.batch, shape.kv_heads, shape.share, shape.slots, shape.head_dim)
    if min(sizes) < 1:
        raise ShapeError(f"decode attention sizes must be at least 1: {sizes}", "check the model")
    if shape.dtype not in BYTES:
        raise ShapeError(f"decode attention over a cache of {shape.dtype}", ", ".join(BYTES))
    lanes = decode_lanes(shape.head_dim, target)
    if lanes is None:
        raise ShapeError(
            f"head_dim {shape.head_dim} is not a multiple of {_MIN_LANES}", "leave it unfused"
        )
    return lanes
