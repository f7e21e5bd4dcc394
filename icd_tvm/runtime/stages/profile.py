"""Part of REPORTED: hardware counters of the arms that are compared, where the target is a GPU."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from icd_tvm.errors import IcdError
from icd_tvm.measure.ncu import missing_ncu
from icd_tvm.relax_passes.kernel_calls import kernel_calls, owners
from icd_tvm.relax_passes.lower_cuda import lower_cuda
from icd_tvm.relax_passes.plain_names import names_before
from icd_tvm.runtime.arms import ITERATIVE, LINEAR
from icd_tvm.runtime.cross_compile import cross_compile
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
from icd_tvm.tir_schedules.target import cuda_precision, cuda_target

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
    if job.library is None or not job.library.exists():
        return NO_LIBRARY
    # Before the other arm is compiled for it.
    return missing_ncu()


def _profiled(job: Job) -> str:
    """Profile the arms and keep what was counted; return why something is missing."""
    result = job.result
    with (
        job.progress.stage("ncu") as stage,
        tempfile.TemporaryDirectory(prefix="icd-arms-") as folder,
    ):
        libraries, missing = _libraries(job, Path(folder))
        found, reason = profile_arms(
            libraries,
            {**model_record(result, job.config.source), "device": "cuda"},
            result.inputs(job.config.seed),
            metrics=job.config.measure.ncu_metrics,
            capability=capability_of(job.config.target),
            owners={arm: _owners(job, arm) for arm in libraries},
        )
        reason = "; ".join(filter(None, (reason, missing)))
        stage.meta = {"profiles": len(found)} | ({"reason": reason} if reason else {})
    warm = {arm: found.get(f"{arm}, {WARM}") for arm in libraries}
    result.counters.ncu = {arm: record["summary"] for arm, record in warm.items() if record}
    if found and job.folder is not None:
        job.folder.write_json(NCU, found)
    return reason


def _libraries(job: Job, folder: Path) -> tuple[dict[str, Path], str]:
    """Return the kept arm's library and those of the arms that gates compare, compiled here."""
    arms, kept = job.result.arms, job.result.verdict.arm
    if job.library is None or job.cuda is None:
        return {}, NO_LIBRARY
    found = {kept: job.library}
    for name in (LINEAR, ITERATIVE):
        if name not in arms or name in found:
            continue
        twin = next((arm for arm in found if arms[arm].mod.same_as(arms[name].mod)), None)
        if twin is not None:
            found[name] = found[twin]
            continue
        path = folder / f"{name}.so"
        try:
            precision, graph = cuda_precision(job.config.target), job.config.cuda_graph
            cross_compile(arms[name].mod, job.cuda, path, precision, graph=graph)
        except (IcdError, OSError) as error:
            return found, f"{name}: {error}"
        found[name] = path
    return found, ""


def _owners(job: Job, arm: str) -> list[dict[str, Any]]:
    """Return what the kernels of an arm's library belong to."""
    mod, target = job.result.arms[arm].mod, cuda_target(str(job.cuda))
    lowered = lower_cuda(mod, target, cuda_precision(job.config.target))
    return owners(kernel_calls(lowered, names_before(mod)), job.result.groups)
