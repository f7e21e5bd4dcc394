"""The goals as gates: pass, fail, or not measured with the reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student

from icd_tvm.measure.metrics import GateRecord
from icd_tvm.measure.statistics import Ratio

# Reasons used when a counter is missing and the record gives none.
NO_REASON = "not measured"
# Changes of a counter below these say nothing: a share, and percentage points.
ENERGY_NOISE = 0.02
L2_NOISE_POINTS = 0.5


def evaluate_gates(
    record: Mapping[str, Any],
    *,
    candidate: str = "iterative",
    baseline: str = "linear",
    quality_reference: str = "dense",
    latency_gain_pct: float = 20.0,
    l2_gain_points: float = 10.0,
    energy_gain_pct: float = 15.0,
    quality_loss_points: float = 0.1,
    quality_agreement: float = 0.995,
) -> list[GateRecord]:
    """Hold a record against the goals.

    Parameters
    ----------
    record : mapping
        A metrics record; ``quality["arms"]`` holds the metric of each arm as a fraction, and
        ``counted`` the counters of arms that were not timed.
    candidate, baseline : str
        Arms that are compared.
    quality_reference : str
        Arm whose quality must be kept.
    latency_gain_pct : float
        Least reduction of the median latency, per cent.
    l2_gain_points : float
        Least rise of the L2 hit rate, percentage points.
    energy_gain_pct : float
        Least reduction of the energy per token, per cent.
    quality_loss_points : float
        Largest absolute change of the quality metric, percentage points: a metric can rise under
        damage, so a rise is no licence.
    quality_agreement : float
        Least agreement of the candidate's outputs with the reference's, 0 to 1: share of equal
        decisions, or mean cosine where the outputs are vectors. Both must hold.

    Returns
    -------
    list of GateRecord
        ``latency``, ``l2``, ``energy``, ``quality``, each pass, fail or not measured by the value
        itself; the reason says so where the interval leaves it open. ``interval`` is [lo, hi] of
        the value with 95 % confidence, null where it has none (a hit rate is one reading of each
        arm). That of energy is Student's, over windows of both arms that were neighbours.
    """
    arms = {**record.get("counted", {}), **record["arms"]}
    pair = (arms.get(candidate), arms.get(baseline))
    return [
        _latency(record["ratios"].get(f"{candidate}/{baseline}"), latency_gain_pct),
        _counter(record, "l2", "l2_hit_pct", pair, l2_gain_points, relative=False),
        _counter(
            record,
            "energy",
            "ept_j_per_tok",
            pair,
            energy_gain_pct,
            relative=True,
            interval=_energy_interval(record.get("energy", {}), candidate, baseline),
        ),
        _quality(record, (candidate, quality_reference), quality_loss_points, quality_agreement),
    ]


def _latency(ratio: Ratio | None, threshold: float) -> GateRecord:
    if ratio is None:
        return _unknown("latency", threshold, "the two arms were not timed together")
    gain = 100 * (1 - ratio["median"])
    least = 100 * (1 - ratio["hi"])
    reason = f"{gain:.1f} % less time, at least {least:.1f} % with 95 % confidence"
    interval = [least, 100 * (1 - ratio["lo"])]
    reason += _open(interval, threshold)
    return _known("latency", gain, threshold, gain >= threshold, reason, interval)


def _open(interval: Sequence[float] | None, threshold: float) -> str:
    """Say that measuring again may well decide the other way."""
    if interval is None or not interval[0] < threshold <= interval[1]:
        return ""
    return f"; the interval holds the {threshold:g} % asked for, so more calls may decide otherwise"


def _counter(
    record: Mapping[str, Any],
    name: str,
    field: str,
    pair: tuple[Any, Any],
    threshold: float,
    *,
    relative: bool,
    interval: list[float] | None = None,
) -> GateRecord:
    candidate, baseline = (None if arm is None else arm.get(field) for arm in pair)
    if candidate is None or baseline is None or (relative and baseline <= 0):
        return _unknown(name, threshold, record["not_measured"].get(field, NO_REASON))
    if relative:
        value = 100 * (1 - candidate / baseline)
    else:
        value = candidate - baseline
    unit = "% less" if relative else "points more"
    reason = f"{baseline:.4g} to {candidate:.4g}, {value:.1f} {unit}"
    reason += _open(interval, threshold)
    return _known(name, value, threshold, value >= threshold, reason, interval)


def _energy_interval(
    energy: Mapping[str, Any], candidate: str, baseline: str
) -> list[float] | None:
    """Return [lo, hi] of the reduction in per cent, from the log ratios of paired windows."""
    taken = [energy.get(arm, {}).get("windows", []) for arm in (candidate, baseline)]
    new, old = (np.array([w["joules"] / w["calls"] for w in windows]) for windows in taken)
    if len(new) != len(old) or len(new) < 2 or min(new.min(), old.min()) <= 0:
        return None
    logs = np.log(new / old)
    reach = student.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    return [float(100 * (1 - np.exp(logs.mean() + sign * reach))) for sign in (1, -1)]


def _quality(
    record: Mapping[str, Any], pair: tuple[str, str], threshold: float, floor: float
) -> GateRecord:
    found = record["quality"] or {}
    values, name = found.get("arms", {}), "/".join(pair)
    if any(arm not in values for arm in pair):
        missing = f"no quality of {' and '.join(pair)}"
        return _unknown("quality", threshold, record["not_measured"].get("quality", missing))
    change = found.get("changes", {}).get(name)
    if change is None:
        return _unknown("quality", threshold, f"the agreement {name} was not measured")
    delta, agreed = 100 * (values[pair[0]] - values[pair[1]]), change["agreement"]
    reason = (
        f"the metric changed by {delta:+.3f} points against {pair[1]}, outputs agree to "
        f"{agreed:.4f} (at least {floor:g})"
    )
    passed = abs(delta) <= threshold and agreed >= floor
    return _known("quality", delta, threshold, passed, reason, change.get("interval_points"))


def failed_gates(gates: Sequence[Mapping[str, Any]], asked: Collection[str]) -> list[str]:
    """Return the gates that a caller should stop at, each with its reason.

    Parameters
    ----------
    gates : sequence of GateRecord
    asked : collection of str
        Gates that must pass: one that was not measured counts. Empty: any that failed.
    """
    wrong = [g for g in gates if g["status"] == "fail" or (g["status"] != "pass" and asked)]
    chosen = [gate for gate in wrong if not asked or gate["name"] in asked]
    absent = sorted(set(asked) - {gate["name"] for gate in gates})
    lines = [f"{gate['name']}: {gate['status']}, {gate['reason']}" for gate in chosen]
    return lines + [f"{name}: not measured, the record has no such gate" for name in absent]


def worse_counter(
    counters: Mapping[str, Mapping[str, float]], candidate: str, baseline: str
) -> str:
    """Say which measured counter is worse in the candidate; empty where none is.

    Parameters
    ----------
    counters : mapping
        Arm -> ``joules_per_call`` and ``l2_hit_pct``, where they were read. A change up to
        ``ENERGY_NOISE`` or ``L2_NOISE_POINTS`` is none: counters repeat no better.
    candidate, baseline : str
    """
    new, old = counters.get(candidate, {}), counters.get(baseline, {})
    energy, hits = "joules_per_call", "l2_hit_pct"
    if energy in new and energy in old and new[energy] > old[energy] * (1 + ENERGY_NOISE):
        return f"energy went from {old[energy]:.4g} to {new[energy]:.4g} J per call"
    if hits in new and hits in old and new[hits] < old[hits] - L2_NOISE_POINTS:
        return f"L2 hit rate went from {old[hits]:.4g} to {new[hits]:.4g} %"
    return ""


def _known(
    name: str,
    value: float,
    threshold: float,
    passed: bool,
    reason: str,
    interval: list[float] | None = None,
) -> GateRecord:
    return GateRecord(
        name=name,
        status="pass" if passed else "fail",
        value=value,
        interval=interval,
        threshold=threshold,
        reason=reason,
    )


def _unknown(name: str, threshold: float, reason: str) -> GateRecord:
    return GateRecord(
        name=name,
        status="not measured",
        value=None,
        interval=None,
        threshold=threshold,
        reason=reason,
    )
