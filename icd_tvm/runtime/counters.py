"""What is counted beside the clock: energy where there is a counter, caches as a model."""

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
from icd_tvm.measure.energy import as_json, measure_energy, open_counter
from icd_tvm.runtime.arms import DENSE, ITERATIVE, LINEAR
from icd_tvm.runtime.build import Built
from icd_tvm.steps import steps

ENERGY, CACHES = "ept_j_per_tok", "cache_model"
# The arms that gates and readers compare; the others would only lengthen the run.
ARMS = (DENSE, LINEAR, ITERATIVE)
# One core's own caches: the third level is shared, and hashed by address.
LEVELS = 2


@dataclass
class Counters:
    """Counted and modelled figures of a run.

    Attributes
    ----------
    energy : dict
        Arm -> record of :func:`icd_tvm.measure.energy.measure_energy`.
    caches : dict
        Arm -> record of :meth:`icd_tvm.measure.cache_model.CacheModel.record`.
    reasons : dict
        ``ept_j_per_tok`` or ``cache_model`` -> why it is missing.
    """

    energy: dict[str, Any] = field(default_factory=dict)
    caches: dict[str, Any] = field(default_factory=dict)
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
    built: Mapping[str, Built], feeds: Mapping[str, np.ndarray], keys: MeasureKeys, target: Any
) -> Counters:
    """Count what the configuration asks for and this machine can tell.

    Parameters
    ----------
    built : mapping of str to Built
        Arms; those of :data:`ARMS` are counted.
    feeds : mapping of str to ndarray
        Inputs of the model.
    keys : MeasureKeys
        ``energy`` and ``cache_model``.
    target : tvm.target.Target
        What the arms were built for.
    """
    counters = Counters()
    arms = {name: built[name] for name in ARMS if name in built}
    callers = {name: arm.caller(feeds) for name, arm in arms.items()}
    counters.energy = _energy(callers, keys, counters.reasons)
    try:
        counters.caches = _caches(arms, feeds, keys, target, counters.reasons)
    except IcdError as error:
        counters.reasons[CACHES] = str(error)
    return counters


def _energy(
    callers: Mapping[str, Callable[[], object]], keys: MeasureKeys, reasons: dict[str, str]
) -> dict[str, Any]:
    if not keys.energy:
        reasons[ENERGY] = "not asked for (measure.energy)"
        return {}
    counter, reason = open_counter()
    try:
        found = measure_energy(callers, counter) if counter is not None else {}
    except IcdError as error:
        found, reason = {}, str(error)
    if reason:
        reasons[ENERGY] = reason
    return {name: as_json(record) for name, record in found.items()}


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
