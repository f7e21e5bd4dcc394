"""Matmuls without a constant weight, such as an attention that was not fused."""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import ScheduleRule, s_tir, tirx
from icd_tvm.tir_schedules.cpu.elementwise import schedule_spatial
from icd_tvm.tir_schedules.cpu.tile import is_prim_func
from icd_tvm.tir_schedules.target import vector_bits

_REDUCE = 2
_MAX_ROWS, _MAX_VECTORS = 8, 2


class PlainMatmulRule(ScheduleRule):
    """Schedule rule for one reduction ``C[..., i, j] += f(..., k)`` with a contiguous j.

    Register tile of up to 8 rows x 2 vectors, sizes that divide the extents only.
    """

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        """Return the schedule of ``func``, or None if it has another form."""
        if not is_prim_func(func):
            return None
        sch = s_tir.Schedule(func)
        blocks = sch.get_child_blocks(sch.get_sblock("root"))
        reductions = [block for block in blocks if _kinds(sch.get(block))[-1:] == [_REDUCE]]
        if len(reductions) != 1 or not _is_matmul(sch.get(reductions[0])):
            return None
        block = reductions[0]
        lanes = vector_bits(target) // 32
        width = _divisor(_extents(sch.get(block))[-2], [_MAX_VECTORS * lanes, lanes])
        if width is None:
            return None
        _tile(sch, block, width, lanes)
        for other in blocks:
            if sch.get(other).name_hint != sch.get(block).name_hint:
                schedule_spatial(sch, other, target)
        return sch


def _tile(sch: Any, block: Any, width: int, lanes: int) -> None:
    extents = _extents(sch.get(block))
    rows = _divisor(extents[-3], list(range(_MAX_ROWS, 0, -1))) or 1
    *batch, i, j, k = sch.get_loops(block)
    io, ii = sch.split(i, [None, rows])
    jo, jv, lane = sch.split(j, [None, width // lanes, lanes])
    sch.reorder(*batch, io, jo, k, ii, jv, lane)
    write = sch.cache_write(block, 0, "local")
    sch.reverse_compute_at(write, jo, preserve_unit_loops=True)
    sch.vectorize(sch.split(sch.get_loops(write)[-1], [None, lanes])[1])
    sch.parallel(sch.fuse(*batch, io) if batch else io)
    sch.unroll(ii)
    sch.unroll(jv)
    sch.vectorize(lane)
    sch.decompose_reduction(block, k)


def _is_matmul(block: Any) -> bool:
    kinds = _kinds(block)
    static = all(isinstance(it.dom.extent, tirx.IntImm) for it in block.iter_vars)
    if not static or len(kinds) < 3 or kinds[-1] != _REDUCE or any(kinds[:-1]):
        return False
    return _reads_along(block, block.iter_vars[-2].var)


def _reads_along(block: Any, var: Any) -> bool:
    """Tell whether some input is read with ``var`` as its last, contiguous index."""
    return any(region.region[-1].min.same_as(var) for region in block.reads)


def _kinds(block: Any) -> list[int]:
    return [int(it.iter_type) for it in block.iter_vars]


def _extents(block: Any) -> list[int]:
    return [int(it.dom.extent) for it in block.iter_vars]


def _divisor(extent: int, candidates: list[int]) -> int | None:
    return next((c for c in candidates if extent % c == 0), None)
