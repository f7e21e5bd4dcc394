"""Whatever is not a matmul, norm or attention: inline, run in parallel, vectorise."""

from __future__ import annotations

from math import prod
from typing import Any

from icd_tvm._tvm import ScheduleRule, s_tir, tirx
from icd_tvm.tir_schedules.target import vector_bits

_MIN_PARALLEL = 16384
_DATA_PARALLEL = 0


class ElementwiseRule(ScheduleRule):
    """Fallback rule: inline what can be inlined, then schedule every block left by itself."""

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        """Return the schedule of ``func``, or None if it is no TIR function."""
        if not isinstance(func, tirx.PrimFunc):
            return None
        sch = s_tir.Schedule(func)
        inline_spatial(sch)
        for block in sch.get_child_blocks(sch.get_sblock("root")):
            schedule_spatial(sch, block, target)
        return sch


def inline_spatial(sch: Any, keep: tuple[Any, ...] | list[Any] = ()) -> None:
    """Inline every elementwise block into its consumers, except those in ``keep``.

    Blocks that cannot be inlined (reductions, outputs) stay.
    """
    kept = {sch.get(block).name_hint for block in keep}
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        if sch.get(block).name_hint in kept or not _is_spatial(sch.get(block)):
            continue
        try:
            sch.compute_inline(block)
        except s_tir.ScheduleError:
            continue


def schedule_spatial(sch: Any, block: Any, target: Any) -> None:
    """Run the leading spatial loops of ``block`` in parallel and vectorise its last one.

    A block whose reduction comes last keeps that loop serial; loops that were already
    transformed are left alone.
    """
    loops = sch.get_loops(block)
    iters = sch.get(block).iter_vars
    if not loops or len(loops) != len(iters):
        return
    spatial = _leading_spatial(iters)
    reduces = spatial < len(iters)
    outer = loops[:spatial] if reduces else loops[:-1]
    width = None if reduces else _vector_width(_extent(iters[-1]), target)
    if width is not None:
        sch.vectorize(sch.split(loops[-1], [None, width])[1])
    if outer and _elements(iters) >= _MIN_PARALLEL:
        sch.parallel(sch.fuse(*outer) if len(outer) > 1 else outer[0])


def _is_spatial(block: Any) -> bool:
    return all(it.iter_type == _DATA_PARALLEL for it in block.iter_vars)


def _leading_spatial(iters: Any) -> int:
    count = 0
    for it in iters:
        if it.iter_type != _DATA_PARALLEL:
            break
        count += 1
    return count


def _extent(it: Any) -> int | None:
    extent = it.dom.extent
    return int(extent) if isinstance(extent, tirx.IntImm) else None


def _elements(iters: Any) -> int:
    return prod(_extent(it) or _MIN_PARALLEL for it in iters)


def _vector_width(extent: int | None, target: Any) -> int | None:
    width = vector_bits(target) // 32
    while width >= 4:
        if extent is not None and extent % width == 0:
            return width
        width //= 2
    return None
