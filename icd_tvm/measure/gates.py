"""The goals as gates: pass, fail, or not measured with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from icd_tvm.measure.metrics import GateRecord
from icd_tvm.measure.statistics import Ratio

# Reasons used when a counter is missing and the record gives none.
NO_REASON = "not measured"


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
) -> list[GateRecord]:
    """Hold a record against the goals.

    Parameters
    ----------
    record : mapping
        A metrics record; ``quality["arms"]`` holds the metric of each arm as a fraction.
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

    Returns
    -------
    list of GateRecord
        ``latency``, ``l2``, ``energy``, ``quality``, each pass, fail or not measured.
    """
    arms = record["arms"]
    pair = (arms.get(candidate), arms.get(baseline))
    return [
        _latency(record["ratios"].get(f"{candidate}/{baseline}"), latency_gain_pct),
        _counter(record, "l2", "l2_hit_pct", pair, l2_gain_points, relative=False),
        _counter(record, "energy", "ept_j_per_tok", pair, energy_gain_pct, relative=True),
        _quality(record, candidate, quality_reference, quality_loss_points),
    ]


def _latency(ratio: Ratio | None, threshold: float) -> GateRecord:
    if ratio is None:
        return _unknown("latency", threshold, "the two arms were not timed together")
    gain = 100 * (1 - ratio["median"])
    least = 100 * (1 - ratio["hi"])
    reason = f"{gain:.1f} % less time, at least {least:.1f} % with 95 % confidence"
    return _known("latency", gain, threshold, gain >= threshold, reason)


def _counter(
    record: Mapping[str, Any],
    name: str,
    field: str,
    pair: tuple[Any, Any],
    threshold: float,
    *,
    relative: bool,
) -> GateRecord:
    candidate, baseline = (None if arm is None else arm[field] for arm in pair)
    if candidate is None or baseline is None or (relative and baseline <= 0):
        return _unknown(name, threshold, record["not_measured"].get(field, NO_REASON))
    if relative:
        value = 100 * (1 - candidate / baseline)
    else:
        value = candidate - baseline
    unit = "% less" if relative else "points more"
    reason = f"{baseline:.4g} to {candidate:.4g}, {value:.1f} {unit}"
    return _known(name, value, threshold, value >= threshold, reason)


def _quality(
    record: Mapping[str, Any], candidate: str, reference: str, threshold: float
) -> GateRecord:
    values = (record["quality"] or {}).get("arms", {})
    if candidate not in values or reference not in values:
        missing = f"no quality of {candidate} and {reference}"
        return _unknown("quality", threshold, record["not_measured"].get("quality", missing))
    delta = 100 * (values[candidate] - values[reference])
    reason = f"the metric changed by {delta:+.3f} points against {reference}"
    return _known("quality", delta, threshold, abs(delta) <= threshold, reason)


def _known(name: str, value: float, threshold: float, passed: bool, reason: str) -> GateRecord:
    return GateRecord(
        name=name,
        status="pass" if passed else "fail",
        value=value,
        threshold=threshold,
        reason=reason,
    )


def _unknown(name: str, threshold: float, reason: str) -> GateRecord:
    return GateRecord(
        name=name, status="not measured", value=None, threshold=threshold, reason=reason
    )
