"""Energy and hardware counters of the arms of whole models."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.cases import RESIDENT
from benchmarks.gpu.kernels import SCRIPT
from benchmarks.gpu.model_times import SAMPLE_S, Prepared
from benchmarks.gpu.models import Models
from icd_tvm.errors import MeasurementError
from icd_tvm.measure import ncu
from icd_tvm.measure.cuda_driver import CudaDevice
from icd_tvm.measure.cuda_timing import Clock
from icd_tvm.measure.energy import MIN_WINDOW_S, MIN_WINDOWS, as_json, measure_energy
from icd_tvm.measure.nvml import NvmlDevice, PowerSample, integral_joules

COMPARED = ("linear", "iterative")
# Windows of both arms, the idle one, and waiting for the counter to tick.
CASE_S = 1.15 * MIN_WINDOW_S * (len(COMPARED) * MIN_WINDOWS + 1)
NO_TIME = "not measured: no time is left"
# Caches as other calls leave them; caches flushed before every kernel.
MODES: Mapping[str, tuple[ncu.CacheControl, ncu.Replay]] = {
    "warm": ("none", "application"),
    "cold": ("all", "kernel"),
}


def model_energy(device: CudaDevice, models: Models, clock: Clock) -> dict[str, Any]:
    """Count joules per token of the two arms that gates compare, first cases first."""
    counter = NvmlDevice()
    found: dict[str, Any] = {}
    for name in models.cases:
        if models.superfluous(name, found):
            found[name] = "not measured: the whole model is"
            continue
        if clock.left("model_energy") < CASE_S:
            found[name] = NO_TIME
            continue
        try:
            found[name] = _joules(device, models, name, counter)
        except Exception as error:
            found[name] = f"not measured: {type(error).__name__}: {error}"
    return found


def _joules(device: CudaDevice, models: Models, name: str, counter: NvmlDevice) -> dict[str, Any]:
    runs = models.runs(name, COMPARED, sets=1)
    ready = {arm: Prepared(device, run, sets=1) for arm, run in runs.items()}
    calls, counts = {}, {}
    for arm, item in ready.items():
        # Long enough that reading the counter between calls costs nothing.
        counts[arm] = int(np.clip(10 * SAMPLE_S / max(device.seconds(item.works[0]), 1e-6), 1, 500))
        calls[arm] = _repeating(device, item.works[0], counts[arm])
    with counter.sampling() as samples:
        measured = measure_energy(calls, counter)
    tokens = models.cases[name]["tokens"]
    arms = {
        arm: {
            **as_json(energy),
            "model_calls_per_call": counts[arm],
            "joules_per_token": energy.joules_per_call / counts[arm] / tokens,
            "by": ready[arm].how,
        }
        for arm, energy in measured.items()
    }
    ratio = arms["iterative"]["joules_per_token"] / arms["linear"]["joules_per_token"]
    return {"arms": arms, "iterative/linear": ratio, "conditions": _conditions(samples)}


def _repeating(device: CudaDevice, work: Callable[[], Any], count: int) -> Callable[[], None]:
    def call() -> None:
        for _ in range(count):
            work()
        device.wait()

    return call


def _conditions(samples: Sequence[PowerSample]) -> dict[str, Any]:
    """Return the sampled power as a cross-check, clocks, temperature and throttling."""
    seconds = samples[-1].t - samples[0].t if len(samples) > 1 else 0.0
    joules = integral_joules(list(samples))
    reasons = 0
    for sample in samples:
        reasons |= sample.throttle or 0
    return {
        "samples": len(samples),
        "sampled_watts": joules / seconds if joules is not None and seconds else None,
        "sm_mhz": _range([s.sm_mhz for s in samples]),
        "celsius": _range([s.celsius for s in samples]),
        "throttle_reasons": reasons,
    }


def _range(values: Sequence[int | None]) -> list[int] | None:
    known = [value for value in values if value is not None]
    return [min(known), max(known)] if known else None


def model_counters(models: Models, clock: Clock, arch: str) -> dict[str, Any]:
    """Profile one call of each compared arm with ncu, the residency case first."""
    if reason := ncu.missing_ncu():
        raise MeasurementError(reason)
    names = sorted(models.cases, key=lambda name: name != RESIDENT.name)
    found: dict[str, Any] = {}
    for name in names:
        if "refused" in models.cases[name]:
            found[name] = f"not measured: {models.cases[name]['refused']}"
            continue
        found[name] = {
            f"{arm}, {mode}": _counted(models.folder, name, arm, mode, clock, arch)
            for mode in MODES
            for arm in COMPARED
        }
    return found


def _counted(
    folder: Path, name: str, arm: str, mode: str, clock: Clock, arch: str
) -> dict[str, Any] | str:
    left = clock.left("model_counters")
    if left < 10:
        return NO_TIME
    control, replay = MODES[mode]
    metrics, _ = ncu.resolve_metrics((), (int(arch[3:-1]), int(arch[-1])))
    program = [sys.executable, str(SCRIPT), "--kernels", str(folder), "--child", f"{name}/{arm}"]
    line = ncu.command(
        program, metrics=metrics, cache_control=control, replay=replay, from_start=False
    )
    try:
        return ncu.as_json(ncu.profile(line, timeout_s=left))
    except Exception as error:
        return f"not measured: {error}"


def model_child(device: CudaDevice, models: Models, name: str, arm: str) -> None:
    """Call one arm some times, the last one inside the profiler's range: what ncu looks at."""
    run = models.runs(name, (arm,), sets=1)[arm]
    for _ in range(5):
        run()
    device.wait()
    with device.profiled():
        run()
        device.wait()
