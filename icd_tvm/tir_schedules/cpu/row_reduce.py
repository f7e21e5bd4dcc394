"""Reductions of one row held in L1: vector accumulators, then a tree of halves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from icd_tvm._tvm import i64, s_tir, te
from icd_tvm.tir_schedules.target import vector_bits

# Four accumulators hide the latency of one addition.
_CHAINS = 4


def row_lanes(length: int, target: Any) -> int:
    """Return how many partial results a row of ``length`` values is reduced into.

    The largest power of two that divides ``length``, up to four vector registers.
    """
    lanes = _CHAINS * vector_bits(target) // 32
    while length % lanes:
        lanes //= 2
    return lanes


def row_reduce(
    value: Any, lead: tuple[Any, ...], length: int, lanes: int, name: str, reducer: Any = te.sum
) -> list[Any]:
    """Return the TE stages that reduce ``value(*row, c)`` over ``c`` in ``range(length)``.

    Parameters
    ----------
    value : callable
        Maps the row index and a column to an expression.
    lead : tuple of int64 immediates
        Shape of the rows.
    length, lanes : int
        Columns of a row; partial results of the first stage, from `row_lanes`.
    name : str
        Prefix of the stage names.
    reducer : callable, optional
        ``te.sum`` or ``te.max``.

    Returns
    -------
    list of te.Tensor
        The last one holds the results, shape ``lead + (1,)``.
    """
    axis = te.reduce_axis((i64(0), i64(length // lanes)), "c")
    stages = [
        te.compute(
            (*lead, i64(lanes)),
            lambda *r: reducer(value(*r[:-1], axis * lanes + r[-1]), axis=axis),
            name=f"{name}{lanes}",
        )
    ]
    combine = (lambda a, b: a + b) if reducer is te.sum else te.max
    while lanes > 1:
        lanes //= 2
        stages.append(_halve(stages[-1], lead, lanes, combine, name))
    return stages


def schedule_rows(
    stages: list[Any], inputs: list[Any], target: Any, more: Sequence[Any] = ()
) -> Any:
    """Return the scheduled TIR function of a chain of row stages.

    Every stage but the last is computed inside the loop over rows, in stack memory.

    Parameters
    ----------
    stages : list of te.Tensor
        In order of use; the last one is the output, all have the rows as leading axes.
    inputs : list of te.Tensor
        Parameters of the function, which the output follows.
    target : tvm.target.Target
        Gives the vector width.
    more : sequence of te.Tensor, optional
        Further outputs, computed from the first one row by row.

    Returns
    -------
    PrimFunc
        Marked as scheduled, and as opaque to operator fusion.
    """
    sch = s_tir.Schedule(te.create_prim_func([*inputs, stages[-1], *more]))
    blocks = [sch.get_sblock(stage.op.name) for stage in stages]
    *rows, _ = sch.get_loops(blocks[-1])
    row = sch.fuse(*rows) if len(rows) > 1 else rows[0]
    sch.parallel(row)
    for block in reversed(blocks[:-1]):
        sch.compute_at(block, row, preserve_unit_loops=True)
        sch.set_scope(block, 0, "local")
    after = [sch.get_sblock(stage.op.name) for stage in more]
    for block in after:
        sch.reverse_compute_at(block, row, preserve_unit_loops=True)
    for block in [*blocks, *after]:
        _vectorize_row(sch, block, row, target)
    func = sch.mod["main"].without_attr("global_symbol")
    return func.with_attr("op_pattern", OPAQUE).with_attr("tirx.is_scheduled", True)


# FuseOps leaves a function of this kind alone (kOpaque).
OPAQUE = 8


def _halve(stage: Any, lead: tuple[Any, ...], lanes: int, combine: Any, name: str) -> Any:
    return te.compute(
        (*lead, i64(lanes)),
        lambda *r: combine(stage[r], stage[(*r[:-1], r[-1] + lanes)]),
        name=f"{name}{lanes}",
    )


def _vectorize_row(sch: Any, block: Any, row: Any, target: Any) -> None:
    reduces = any(it.iter_type != 0 for it in sch.get(block).iter_vars)
    loops = sch.get_loops(block)
    if reduces:
        lane, column = loops[-2:]
        sch.reorder(column, lane)
        _vectorize(sch, lane, target, unroll=True)
        sch.decompose_reduction(block, column)
    else:
        _vectorize(sch, loops[-1], target, unroll=False)


def _vectorize(sch: Any, loop: Any, target: Any, unroll: bool) -> None:
    extent = int(sch.get(loop).extent)
    width = min(vector_bits(target) // 32, extent)
    while extent % width:
        width //= 2
    if width == 1:
        return
    outer, lane = sch.split(loop, [None, width])
    if unroll:
        sch.unroll(outer)
    sch.vectorize(lane)
