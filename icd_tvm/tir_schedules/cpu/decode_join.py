"""What becomes of the runs of a decode attention: one is the result, several are joined."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from tvm.script.ir_builder import tirx as T

from icd_tvm.tir_schedules.cpu import vector_math
from icd_tvm.tir_schedules.cpu.emit import f32, local


class WholeCache:
    """Takes the result of a task that saw all slots."""

    def __init__(self, plan: Any, y: Any) -> None:
        self.plan, self.y = plan, y

    def store(self, run: Any, query: Any, r: Any, start: Any, vectors: int, acc: Any) -> None:
        """Divide the sums of one query head by its total and write them out."""
        lanes = self.plan.lanes
        with T.serial(vectors) as c, T.vectorized(lanes) as x:
            at = c * lanes + x
            T.buffer_store(self.y, acc[r, at] / run.total[r], [run.batch, query, 0, start + at])


class JoinedRuns:
    """Takes the results of tasks that saw some slots each, and joins them."""

    def __init__(self, plan: Any) -> None:
        self.plan = plan
        heads = plan.shape.batch * plan.shape.kv_heads * plan.shape.share
        self.sums = T.sblock_alloc_buffer((heads, plan.pieces, plan.shape.head_dim), "float32")
        self.peaks = T.sblock_alloc_buffer((heads, plan.pieces), "float32")
        self.totals = T.sblock_alloc_buffer((heads, plan.pieces), "float32")

    def store(self, run: Any, query: Any, r: Any, start: Any, vectors: int, acc: Any) -> None:
        """Keep peak, total and sums of one query head's run."""
        plan = self.plan
        head = run.batch * plan.shape.kv_heads * plan.shape.share + query
        piece = run.task % plan.pieces
        T.buffer_store(self.peaks, run.peak[r], [head, piece])
        T.buffer_store(self.totals, run.total[r], [head, piece])
        with T.serial(vectors) as c, T.vectorized(plan.lanes) as x:
            at = c * plan.lanes + x
            T.buffer_store(self.sums, acc[r, at], [head, piece, start + at])

    def join(self, y: Any, head: Any) -> None:
        """Write one head's result: runs weighted by the exponential of their peaks."""
        plan = self.plan
        heads = plan.shape.kv_heads * plan.shape.share
        peak, total, weight = local(1), local(1), local(1)
        acc = local(plan.shape.head_dim)
        T.buffer_store(peak, self.peaks[head, 0], [0])
        with T.serial(plan.pieces - 1) as p:
            T.buffer_store(peak, T.max(peak[0], self.peaks[head, p + 1]), [0])
        T.buffer_store(total, f32(0.0), [0])
        with _row(plan) as at:
            T.buffer_store(acc, f32(0.0), [at])
        with T.serial(plan.pieces) as p:
            T.buffer_store(weight, vector_math.exp(self.peaks[head, p] - peak[0]), [0])
            T.buffer_store(total, total[0] + weight[0] * self.totals[head, p], [0])
            with _row(plan) as at:
                T.buffer_store(acc, acc[at] + weight[0] * self.sums[head, p, at], [at])
        with _row(plan) as at:
            T.buffer_store(y, acc[at] / total[0], [head // heads, head % heads, 0, at])


@contextlib.contextmanager
def _row(plan: Any) -> Iterator[Any]:
    with T.serial(plan.chunks) as c, T.vectorized(plan.lanes) as x:
        yield c * plan.lanes + x
