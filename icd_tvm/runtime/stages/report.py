"""REPORTED: the kept arm's library, the metrics record, and the reports made from it."""

from __future__ import annotations

import time
from pathlib import Path

from icd_tvm.errors import IcdError, OutputError
from icd_tvm.files import write_atomically
from icd_tvm.measure.metrics import write_metrics
from icd_tvm.runtime.build import Built
from icd_tvm.runtime.cross_compile import cross_compile
from icd_tvm.runtime.foreign_cpu import export_foreign
from icd_tvm.runtime.job import Job
from icd_tvm.runtime.overhead import overhead
from icd_tvm.runtime.progress import Stage
from icd_tvm.runtime.record import make_record
from icd_tvm.runtime.reports import REPORTS
from icd_tvm.runtime.run_folder import TILES, TRACEBACK, RunFolder
from icd_tvm.runtime.stages.profile import profile
from icd_tvm.runtime.tile_occupancy import save_tiles, tile_occupancy
from icd_tvm.tir_schedules.target import cuda_precision


def report(job: Job, event: Stage) -> None:
    """Write everything a user reads; the record is in memory where there is no folder."""
    began = time.perf_counter()
    _export(job)
    profile(job)
    record_began = time.perf_counter()
    record = make_record(job)
    now = time.perf_counter()
    record["overhead"] = overhead(job, now - record_began, now - began)
    if job.metrics is not None:
        write_metrics(job.metrics, record)
    if job.folder is not None:
        for name, text in REPORTS.items():
            job.folder.write_text(name, text(record))
        _tiles(job, job.folder)
        _page(job, job.folder)
        if job.failure is not None:
            job.folder.write_text(TRACEBACK, job.failure.trace)
        else:
            job.folder.path(TRACEBACK).unlink(missing_ok=True)
    if job.compilation is not None:
        job.compilation.record = record
    event.meta |= {
        "failure": job.failure.code if job.failure else None,
        "decision": record["decision"],
        "overhead": record["overhead"],
    }


def _tiles(job: Job, folder: RunFolder) -> None:
    """Keep what the orders did to the masks of the weights, for the page."""
    tiles = tile_occupancy(job.compilation.arms) if job.compilation is not None else {}
    if tiles and job.config.report.html:
        save_tiles(folder.path(TILES), tiles)


def _page(job: Job, folder: RunFolder) -> None:
    """Write the HTML page; a run whose page cannot be drawn is still a run."""
    if not job.config.report.html:
        return
    # Drawing needs a second of imports that nothing else here does.
    from icd_tvm.report.page import write_report

    with job.progress.stage("page") as stage:
        try:
            stage.meta = {"file": write_report(folder.root).name}
        except OutputError:
            raise
        except Exception as error:
            job.warn("page", f"report.html is left out: {error}")


def _export(job: Job) -> None:
    if job.library is None or job.compilation is None:
        return
    built = job.result.built.get(job.result.verdict.arm)
    if built is None:
        return
    with job.progress.stage("export") as stage:
        stage.meta = {"arm": job.result.verdict.arm}
        try:
            write_atomically(job.library, lambda path: _write(job, built, path, stage))
        except IcdError:
            raise
        except Exception as error:
            # The linker runs in a process of its own; a full disk is its error, not the system's.
            raise OutputError(
                f"cannot write {str(job.library)!r}: {_reason(error)}", "is the disk full?"
            ) from error


def _write(job: Job, built: Built, path: Path, stage: Stage) -> None:
    """Write the kept arm's library for the target."""
    mod = job.result.arms[job.result.verdict.arm].mod
    if (foreign := job.foreign) is not None:
        export_foreign(mod, foreign, path)
        stage.meta["untested"] = f"compiled for {job.config.target}, which this machine cannot run"
        return
    if job.cuda is None:
        built.export(str(path))
        return
    precision = cuda_precision(job.config.target)
    if precision is not None:
        job.warn("export", f"matmul operands are {precision}; equality was checked in float32")
    code = cross_compile(mod, job.cuda, path, precision, graph=job.config.cuda_graph)
    stage.meta["machine code"] = f"{job.cuda}, {sum(entry.size for entry in code)} bytes"


def _reason(error: Exception) -> str:
    """Return the line of a linker's output that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = (line for line in lines if "No space left" in line or "error:" in line)
    return next(telling, lines[0] if lines else type(error).__name__)[:300]
