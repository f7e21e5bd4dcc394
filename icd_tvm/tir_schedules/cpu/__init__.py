"""CPU kernels: builders, packings and the schedule rules that recognise them."""

from __future__ import annotations

from icd_tvm._tvm import ScheduleRule
from icd_tvm.tir_schedules.cpu.block_sparse import BlockSparseRule
from icd_tvm.tir_schedules.cpu.dense import DenseRule
from icd_tvm.tir_schedules.cpu.elementwise import ElementwiseRule
from icd_tvm.tir_schedules.cpu.plain_matmul import PlainMatmulRule
from icd_tvm.tir_schedules.cpu.tile_builder import ExplicitTileRule
from icd_tvm.tir_schedules.cpu.transposed_sparse import TransposedSparseRule

__all__ = ["cpu_rules"]


def cpu_rules() -> list[ScheduleRule]:
    """Return the schedule rules for ``ApplyDefaultSchedule``, most specific first."""
    return [
        DenseRule(),
        BlockSparseRule(),
        TransposedSparseRule(),
        ExplicitTileRule(),
        PlainMatmulRule(),
        ElementwiseRule(),
    ]
