"""Kernels and whole models on a GPU host in one call of at most eight minutes.

    python benchmarks/gpu_suite.py --build gpu-suite     # anywhere nvcc and TVM are; take it along
    python benchmarks/gpu_suite.py --kernels gpu-suite   # on the GPU host

Kernels need numpy and ml_dtypes, whole models TVM's runtime too; neither needs the toolkit. Each
part has a share of the time and the record is written after each, so that a short slot still gives
whole results: kernels against float64, their times by CUDA events around graphs of launches
(`icd_tvm.measure.cuda_timing` says what cold and warm are), cuBLAS and cuSPARSELt by torch, the
arms of whole models (`benchmarks/gpu/models.py`), their energy by NVML and counters by ncu. Without
a GPU it comes to its end too, and says "not measured" everywhere.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu import peers
from benchmarks.gpu.gates import wrong_values
from benchmarks.gpu.kernels import (
    archs_of,
    build_kernels,
    child,
    counters,
    open_device,
    try_kernels,
)
from benchmarks.gpu.machine import Machine, TvmMachine
from benchmarks.gpu.model_counters import model_child, model_counters, model_energy
from benchmarks.gpu.model_times import measure_models
from benchmarks.gpu.models import Models
from benchmarks.gpu.table import table
from benchmarks.gpu.wheels import add_runtime
from icd_tvm.errors import IcdError
from icd_tvm.files import write_atomically
from icd_tvm.measure.cuda_driver import CudaDevice
from icd_tvm.measure.cuda_roofline import predict
from icd_tvm.measure.cuda_timing import (
    PARTS,
    Clock,
    check_values,
    copy_rate,
    count_joules,
    measure_times,
)
from icd_tvm.tir_schedules.cuda.archs import CUDA_ARCHS
from icd_tvm.tir_schedules.cuda.catalogue import Entry, catalogue

LIMIT_S = 480.0
Record = dict[str, Any]
MakeMachine = Callable[[CudaDevice, Path], Machine]


def run_suite(
    opened: Callable[[], tuple[CudaDevice, list[Entry], dict[str, str]]],
    arguments: argparse.Namespace,
    keep: Callable[[Record], None] = lambda record: None,
    machine: MakeMachine = TvmMachine,
) -> Record:
    """Return the record of all parts; one that fails says why, and the next one follows.

    Parameters
    ----------
    opened : callable
        Returns the device with the catalogue's kernels loaded, as `open_device` does.
    arguments : argparse.Namespace
        ``kernels``, ``limit``.
    keep : callable
        Takes the record so far, after every part.
    machine : callable
        Returns what runs libraries of models.
    """
    clock = Clock(arguments.limit)
    began = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    record: Record = {"schema": "icd/gpu-suite/v2", "began": began, "limit_s": clock.limit_s}
    record["device"] = None
    record |= dict.fromkeys(("copy_rate", *PARTS), "not measured: the suite did not come to it")
    record["predicted"] = _predicted()
    try:
        device, entries, record["left_out"] = opened()
    except (IcdError, OSError, subprocess.CalledProcessError) as error:
        record |= dict.fromkeys(("copy_rate", *PARTS), f"not measured: {error}")
        keep(record)
        return record
    record["predicted"] = _predicted(device.arch)
    record["device"] = {
        "name": device.name,
        "arch": device.arch,
        "l2_bytes": device.l2_bytes,
        "multiprocessors": device.multiprocessors,
    }
    for name, part in _parts(device, entries, arguments, clock, machine).items():
        try:
            record[name] = part()
        except Exception as error:
            record[name] = f"not measured: {type(error).__name__}: {error}"
        record["seconds"] = clock.spent()
        keep(record)
        print(f"{name}: {clock.spent():.0f} s", file=sys.stderr)
    return record


def _parts(
    device: CudaDevice,
    entries: list[Entry],
    arguments: argparse.Namespace,
    clock: Clock,
    machine: MakeMachine,
) -> Mapping[str, Callable[[], Any]]:
    """Return the parts, most important first."""

    @cache
    def models() -> Models:
        return Models(arguments.kernels, device.arch, lambda folder: machine(device, folder))

    return {
        "copy_rate": lambda: copy_rate(device),
        "correctness": lambda: check_values(device, entries, clock),
        "times": lambda: measure_times(device, entries, clock),
        "peers": lambda: peers.products(clock),
        "models": lambda: measure_models(device, models(), clock),
        "model_energy": lambda: model_energy(device, models(), clock),
        "model_counters": lambda: model_counters(models(), clock, device.arch),
        "model_peers": lambda: peers.model_peers(models().cases, clock),
        "counters": lambda: counters(arguments.kernels, clock),
        "energy": lambda: count_joules(device, entries, clock),
    }


def _predicted(device: str = "sm_90") -> Record:
    return {"arch": device} | {
        item.name: {"us": item.microseconds, "bound": item.bound, "bytes": item.mbytes * 1e6}
        for arch in archs_of(device)
        for item in predict(catalogue(arch), arch)
    }


def build(arguments: argparse.Namespace) -> None:
    """Write kernels, and libraries of the models' arms."""
    build_kernels(arguments.build)
    add_runtime(arguments.build, arguments.wheels)
    from benchmarks.gpu.build_models import CASES, Device, build_models

    chosen = [case for case in CASES if arguments.only in case.name]
    build_models(arguments.build, Device(arguments.arch), chosen)


def run_child(folder: Path, what: str) -> None:
    """Run what ncu looks at: a rule of the catalogue, or ``CASE/ARM``; or try an architecture."""
    if what in CUDA_ARCHS:
        try_kernels(folder, what)
        return
    if "/" not in what:
        child(*open_device(folder)[:2], what)
        return
    device, (case, arm) = CudaDevice(), what.rsplit("/", 1)
    models = Models(folder, device.arch, lambda place: TvmMachine(device, place))
    model_child(device, models, case, arm)


def writer(folder: Path) -> Callable[[Record], None]:
    """Return what writes the record and its table."""
    folder.mkdir(parents=True, exist_ok=True)
    date = datetime.datetime.now(datetime.timezone.utc).date()

    def keep(record: Record) -> None:
        device = record["device"]["name"] if record["device"] else "no-gpu"
        stem = f"{device.lower().replace(' ', '-')}-{date}"
        text = json.dumps(record, indent=1, default=float) + "\n"
        write_atomically(folder / f"{stem}.json", lambda path: path.write_text(text, "utf-8"))
        shown = table(record)
        write_atomically(folder / f"{stem}.md", lambda path: path.write_text(shown, "utf-8"))

    return keep


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    result = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = result.add_argument
    add("--build", type=Path, metavar="DIR", help="compile kernels and models, run none")
    add("--arch", default="sm_90", help="with --build: of the models; kernels are made for all")
    add("--only", default="", metavar="TEXT", help="with --build: models whose name holds it")
    add("--wheels", type=Path, metavar="DIR", help="with --build: wheels that the host installs")
    add("--kernels", type=Path, metavar="DIR", help="what --build wrote")
    add("--out", type=Path, default=Path("docs/results"), help="folder for results")
    add("--limit", type=float, default=LIMIT_S, help="seconds for everything")
    add("--child", help=argparse.SUPPRESS)
    return result


def main() -> int:
    """Build, or run the suite; 1 if a kernel or an arm computes something else."""
    arguments = parser().parse_args()
    if arguments.build:
        build(arguments)
        return 0
    if arguments.child:
        run_child(arguments.kernels, arguments.child)
        return 0
    record = run_suite(
        lambda: open_device(arguments.kernels), arguments, keep=writer(arguments.out)
    )
    print(table(record))
    wrong = wrong_values(record)
    print(f"wrong: {'; '.join(wrong)}" if wrong else "", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
