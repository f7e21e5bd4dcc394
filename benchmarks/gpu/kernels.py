"""Machine code of the catalogue's kernels, and their counters by ncu."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from icd_tvm.errors import MeasurementError
from icd_tvm.measure import ncu
from icd_tvm.measure.cuda_driver import CudaDevice
from icd_tvm.measure.cuda_reference import make_trial
from icd_tvm.measure.cuda_timing import CHOSEN, Buffers, Clock, sets_of
from icd_tvm.tir_schedules.cuda.archs import CUDA_ARCHS, runs_on
from icd_tvm.tir_schedules.cuda.catalogue import Entry, catalogue
from icd_tvm.tir_schedules.cuda.source_kernel import SourceKernel, whole_text

SCRIPT = Path(__file__).resolve().parents[1] / "gpu_suite.py"
LAUNCHES = 10
# Of a suite of 480: making the inputs takes most of it.
TRIED_S = 60


def build_kernels(folder: Path) -> None:
    """Write the machine code of every kernel of the catalogue, for every architecture."""
    from icd_tvm.measure.cuda_toolkit import find_nvcc

    folder.mkdir(parents=True, exist_ok=True)
    for arch in CUDA_ARCHS:
        source = folder / f"{arch}.cu"
        source.write_text(whole_text(kernels_of(catalogue(arch))), "utf-8")
        command = [find_nvcc(), "-O3", "-std=c++17", "-w", f"-arch={arch}", "-cubin"]
        subprocess.run([*command, "-o", str(folder / f"{arch}.cubin"), str(source)], check=True)


def kernels_of(entries: Iterable[Entry]) -> list[SourceKernel]:
    """Return the kernels of all rules."""
    return [kernel for entry in entries for kernel in entry.rule.kernels]


def archs_of(device: str) -> list[str]:
    """Return the architectures whose machine code runs on a device, e.g. ``sm_90``."""
    return [arch for arch in CUDA_ARCHS if runs_on(arch, device)]


def open_device(folder: Path | None) -> tuple[CudaDevice, list[Entry], dict[str, str]]:
    """Return the device with all kernels loaded, their catalogue, and why an architecture is not.

    Machine code beyond that of the device's own architecture is tried in another process before: an
    error or an endless wait there would end this one's context, and with it all parts.
    """
    device, entries, left_out = CudaDevice(), list[Entry](), dict[str, str]()
    if not archs_of(device.arch):
        raise MeasurementError(f"kernels are made for {', '.join(CUDA_ARCHS)}, not {device.arch}")
    with tempfile.TemporaryDirectory() as temporary:
        if folder is None:
            build_kernels(folder := Path(temporary))
        for arch in archs_of(device.arch):
            file = folder / f"{arch}.cubin"
            if not file.exists():
                if arch != device.arch:
                    continue
                raise MeasurementError(f"{file} is not there; make it with --build where nvcc is")
            if arch != device.arch and (reason := _fails(folder, arch)):
                left_out[arch] = reason
                continue
            found = catalogue(arch)
            device.load(file.read_bytes(), kernels_of(found))
            # What must be decided first: warpgroups, where the device has them.
            entries = found + entries
    return device, entries, left_out


def _fails(folder: Path, arch: str) -> str:
    """Return why the kernels of an architecture do not come to their end; empty if they do."""
    line = [sys.executable, str(SCRIPT), "--kernels", str(folder), "--child", arch]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=TRIED_S)
    except subprocess.TimeoutExpired:
        return f"its kernels did not come to their end in {TRIED_S} s"
    last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    return last if done.returncode else ""


def try_kernels(folder: Path, arch: str) -> None:
    """Start every rule of an architecture once; an error of CUDA raises."""
    device, entries = CudaDevice(), catalogue(arch)
    device.load((folder / f"{arch}.cubin").read_bytes(), kernels_of(entries))
    for entry in entries:
        buffers = Buffers(device, entry, make_trial(entry.rule, rows=1).inputs, 1)
        buffers.call()
        device.wait()
        buffers.free()


def counters(folder: Path | None, clock: Clock) -> dict[str, Any]:
    """Profile the chosen rules with ncu, in a process of its own, cold and as they follow."""
    if folder is None:
        raise MeasurementError("ncu starts the program often: give --kernels")
    found: dict[str, Any] = {}
    for name in CHOSEN:
        for control, replay in (("all", "kernel"), ("none", "application")):
            left = clock.limit_s - clock.spent()
            if clock.over("counters") or left < 10:
                found[f"{name} ({control})"] = "not measured: no time is left"
                continue
            line = ncu.command(
                [sys.executable, str(SCRIPT), "--kernels", str(folder), "--child", name],
                kernel="icd_",
                launch_skip=LAUNCHES // 2,
                launch_count=3,
                cache_control=control,  # type: ignore[arg-type]
                replay=replay,  # type: ignore[arg-type]
            )
            found[f"{name} ({control})"] = ncu.as_json(ncu.profile(line, timeout_s=left))
    return found


def child(device: CudaDevice, entries: Iterable[Entry], name: str) -> None:
    """Start one rule ten times, with buffers in turn: what ncu looks at."""
    entry = next(entry for entry in entries if entry.name == name)
    sets = sets_of(device, entry, LAUNCHES)
    buffers = Buffers(device, entry, make_trial(entry.rule, rows=1).inputs, sets)
    for index in range(LAUNCHES):
        buffers.call(index)
    device.wait()
