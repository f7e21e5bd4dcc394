"""From a Relax module to CPU code: fuse, pack, legalise, schedule, compile."""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import dlight, relax, tvm
from icd_tvm.relax_passes.fuse_attention import FuseAttention
from icd_tvm.relax_passes.fuse_residual_norm import FuseResidualNorm
from icd_tvm.relax_passes.merge_parallel_matmul import MergeParallelMatmul
from icd_tvm.relax_passes.pack_weights import PackWeights
from icd_tvm.relax_passes.vector_legalize import legalize_map
from icd_tvm.tir_schedules.cpu import cpu_rules
from icd_tvm.tir_schedules.cpu.stack import register_pipeline


def cpu_pipeline(target: Any) -> Any:
    rx = relax.transform
    return tvm.transform.Sequential(
        [
            # Patterns are easiest to recognise on named operators.
            FuseAttention(target),
            MergeParallelMatmul(target),
            FuseResidualNorm(target),
            PackWeights(target),
            # Everything else becomes loops; what depends on constants alone is computed now.
            rx.LegalizeOps(legalize_map(target)),
            rx.AnnotateTIROpPattern(),
            rx.FoldConstant(),
            # Elementwise consumers join the matmul before them, then run on its registers.
            rx.FuseOps(),
            rx.FuseTIR(),
            rx.DeadCodeElimination(),
            dlight.ApplyDefaultSchedule(*cpu_rules()),
        ],
        name="icd.cpu",
    )


def build_cpu(mod: Any, target: Any) -> Any:
    with target:
        lowered = cpu_pipeline(target)(mod)
        return tvm.compile(lowered, target, tir_pipeline=register_pipeline())
