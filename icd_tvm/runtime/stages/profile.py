"""Part of REPORTED: hardware counters of the kept arm's library, where its target is a GPU."""

from __future__ import annotations

from typing import Any

from icd_tvm.relax_passes.kernel_calls import kernel_calls, owners
from icd_tvm.runtime.job import Job
from icd_tvm.runtime.profile_arms import (
    NOT_A_GPU,
    NOT_ASKED,
    WARM,
    capability_of,
    profile_arms,
)
from icd_tvm.runtime.record import model_record
from icd_tvm.runtime.run_folder import NCU

NO_LIBRARY = "no library was written that could be profiled"


def profile(job: Job) -> None:
    """Count with Nsight Compute; what is missing there is a reason, never an error."""
    if job.compilation is not None:
        job.compilation.counters.reasons.pop("ncu", None)
        if reason := _without(job) or _profiled(job):
            job.compilation.counters.reasons["ncu"] = reason


def _without(job: Job) -> str:
    if not job.config.measure.ncu:
        return NOT_ASKED
    if job.cuda is None:
        return NOT_A_GPU
    return "" if job.library is not None and job.library.exists() else NO_LIBRARY


def _profiled(job: Job) -> str:
    """Profile the kept arm and keep what was counted; return why something is missing."""
    result, arm = job.result, job.result.verdict.arm
    with job.progress.stage("ncu") as stage:
        found, reason = profile_arms(
            {arm: job.library} if job.library is not None else {},
            {**model_record(result, job.config.source), "device": "cuda"},
            result.inputs(job.config.seed),
            metrics=job.config.measure.ncu_metrics,
            capability=capability_of(job.config.target) or capability_of(str(job.target)),
            owners={arm: _owners(job, arm)},
        )
        stage.meta = {"profiles": len(found)} | ({"reason": reason} if reason else {})
    warm = found.get(f"{arm}, {WARM}")
    if warm is not None:
        result.counters.ncu = {arm: warm["summary"]}
    if found and job.folder is not None:
        job.folder.write_json(NCU, found)
    return reason


def _owners(job: Job, arm: str) -> list[dict[str, Any]]:
    """Return what the kernels belong to; nothing where another target's module is all there is."""
    built = job.result.built.get(arm)
    if built is None or built.lowered is None or job.target.kind.name != "cuda":
        return []
    return owners(kernel_calls(built.lowered), job.result.groups)
