"""What is counted beside the clock: energy, caches as a model, each kernel's work and time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from icd_tvm.config import MeasureKeys
from icd_tvm.errors import IcdError
from icd_tvm.measure.cache_model import host_levels, model_caches
from icd_tvm.measure.energy import EnergyCounter, as_json, measure_energy, open_counter
from icd_tvm.measure.nvml import NvmlDevice
from icd_tvm.measure.peaks import machine_peaks
from icd_tvm.relax_passes.axis_model import AxisGroups
from icd_tvm.runtime.arms import DENSE, ITERATIVE, LINEAR
from icd_tvm.runtime.build import Built
from icd_tvm.runtime.kernel_record import kernel_record, work_of_arms
from icd_tvm.steps import steps

ENERGY, CACHES, KERNELS, ROOF = "ept_j_per_tok", "cache_model", "kernel_times", "roofline"
FLOP = "flop"
# The arms that gates and readers compare; the others would only lengthen the run.
ARMS = (DENSE, LINEAR, ITERATIVE)
# One core's own caches: the third level is shared, and hashed by address.
LEVELS = 2


def not_counted(reason: str) -> dict[str, str]:
    """Return one reason for everything that :func:`count` would count."""
    return dict.fromkeys((ENERGY, CACHES, KERNELS, ROOF, FLOP), reason)


@dataclass
class Counters:
    """Counted and modelled figures of a run.

    Attributes
    ----------
    energy : dict
        Arm -> record of :func:`icd_tvm.measure.energy.measure_energy`.
    caches : dict
        Arm -> record of :meth:`icd_tvm.measure.cache_model.CacheModel.record`.
    work : dict
        Arm -> record of :func:`icd_tvm.runtime.kernel_record.arm_work`.
    kernels : dict
        Arm -> record of :func:`icd_tvm.runtime.kernel_record.kernel_record`.
    roof : dict
        See :func:`icd_tvm.measure.peaks.machine_peaks`.
    ncu : dict
        Arm -> summary of its profile with warm caches, see
        :class:`icd_tvm.measure.ncu.NcuSummary`.
    reasons : dict
        ``ept_j_per_tok``, ``cache_model``, ``kernel_times``, ``flop``, ``roofline``, ``ncu`` or
        ``power.csv`` -> why it is missing.
    """

    energy: dict[str, Any] = field(default_factory=dict)
    caches: dict[str, Any] = field(default_factory=dict)
    work: dict[str, Any] = field(default_factory=dict)
    kernels: dict[str, Any] = field(default_factory=dict)
    roof: dict[str, Any] = field(default_factory=dict)
    ncu: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def by_arm(self) -> dict[str, dict[str, float]]:
        """Return what was measured: arm -> ``joules_per_call``."""
        return {
            arm: {"joules_per_call": found["joules_per_call"]} for arm, found in self.energy.items()
        }

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def read_counters(path: Path) -> Counters:
    """Read what an earlier process of the run counted; a damaged file is as good as none."""
    try:
        return Counters(**json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        return Counters(reasons=dict.fromkeys((ENERGY, CACHES), f"{path.name}: {error}"))


def count(
    built: Mapping[str, Built],
    feeds: Mapping[str, np.ndarray],
    keys: MeasureKeys,
    target: Any,
    groups: AxisGroups | None = None,
) -> Counters:
    """Count what the configuration asks for and this machine can tell.

    Parameters
    ----------
    built : mapping of str to Built
        Arms; those of :data:`ARMS` are counted.
    feeds : mapping of str to ndarray
        Inputs of the model.
    keys : MeasureKeys
        ``energy``, ``cache_model``, ``kernel_times`` and ``roofline``.
    target : tvm.target.Target
        What the arms were built for.
    groups : AxisGroups, optional
        What the kernels may belong to.
    """
    counters = Counters()
    arms = {name: built[name] for name in ARMS if name in built}
    callers = {name: arm.caller(feeds) for name, arm in arms.items()}
    counters.energy = _energy(callers, keys, target, counters.reasons)
    try:
        counters.caches = _caches(arms, feeds, keys, target, counters.reasons)
    except IcdError as error:
        counters.reasons[CACHES] = str(error)
    if keys.kernel_times or keys.roofline:
        counters.work = work_of_arms(built, counters.reasons)
    else:
        counters.reasons[FLOP] = "not asked for (measure.kernel_times, measure.roofline)"
    counters.kernels = _kernels(arms, feeds, keys, counters, groups)
    counters.roof = _roof(keys, target, counters.reasons)
    return counters


def _kernels(
    arms: Mapping[str, Built],
    feeds: Mapping[str, np.ndarray],
    keys: MeasureKeys,
    counters: Counters,
    groups: AxisGroups | None,
) -> dict[str, Any]:
    if not keys.kernel_times:
        counters.reasons[KERNELS] = "not asked for (measure.kernel_times)"
        return {}
    found = {}
    for name, arm in arms.items():
        try:
            found[name] = kernel_record(arm, feeds, groups, counters.work.get(name, {}))
        except IcdError as error:
            counters.reasons[KERNELS] = f"{name}: {error}"
    return found


def _roof(keys: MeasureKeys, target: Any, reasons: dict[str, str]) -> dict[str, Any]:
    if not keys.roofline:
        reasons[ROOF] = "not asked for (measure.roofline)"
        return {}
    try:
        return machine_peaks(target)
    except IcdError as error:
        reasons[ROOF] = str(error)
        return {}


def _energy(
    callers: Mapping[str, Callable[[], object]],
    keys: MeasureKeys,
    target: Any,
    reasons: dict[str, str],
) -> dict[str, Any]:
    if not keys.energy:
        reasons[ENERGY] = "not asked for (measure.energy)"
        return {}
    counter, reason = _counter(target)
    try:
        found = measure_energy(callers, counter) if counter is not None else {}
    except IcdError as error:
        found, reason = {}, str(error)
    if reason:
        reasons[ENERGY] = reason
    return {name: as_json(record) for name, record in found.items()}


def _counter(target: Any) -> tuple[EnergyCounter | None, str]:
    """Return the counter of what the arms run on, or None and the reason."""
    if target.kind.name != "cuda":
        return open_counter()
    try:
        return NvmlDevice(), ""
    except IcdError as error:
        return None, str(error)


def _caches(
    arms: Mapping[str, Built],
    feeds: Mapping[str, np.ndarray],
    keys: MeasureKeys,
    target: Any,
    reasons: dict[str, str],
) -> dict[str, Any]:
    if not keys.cache_model:
        reasons[CACHES] = "not asked for (measure.cache_model)"
        return {}
    levels = host_levels()[:LEVELS]
    return {
        name: model_caches(arm.lowered, target, arm.own_feeds(feeds), levels).record()
        for name, arm in steps(arms.items(), "modelling caches")
    }
