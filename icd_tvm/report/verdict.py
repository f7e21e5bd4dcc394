"""What a run says at its top: the decision, the gates, and what was not measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from icd_tvm.report.values import as_list, as_mapping, as_number, dig, fixed, text

# Unit of a gate's value, and what its threshold asks for.
_GATES = {
    "latency": ("%", "at least {} % less time"),
    "l2": ("points", "at least {} points more"),
    "energy": ("%", "at least {} % less energy per token"),
    "quality": ("points", "at most {} points of change"),
}
_TITLES = {"latency": "Latency", "l2": "L2 hit rate", "energy": "Energy", "quality": "Quality"}
_KINDS = {"pass": "pass", "fail": "fail"}


@dataclass(frozen=True)
class Gate:
    """One gate as it is shown; ``kind`` is pass, fail or unknown."""

    title: str
    kind: str
    status: str
    value: str
    asked: str
    around: str
    reason: str


@dataclass(frozen=True)
class Verdict:
    """The headline; ``kind`` is pass, fail or unknown."""

    kind: str
    title: str
    reason: str
    notes: list[str]


def verdict(record: Mapping[str, Any]) -> Verdict:
    """Return the decision as a headline, and what a reader must know beside it."""
    decision = as_mapping(record.get("decision"))
    reason = text(decision.get("reason") or "the record gives no reason")
    notes = _notes(record)
    failure = as_mapping(record.get("failure"))
    if failure:
        title = f"Failed in {text(failure.get('stage'))} ({text(failure.get('code'))})"
        return Verdict("fail", title, text(failure.get("message")), notes)
    arm = text(decision.get("arm"))
    accepted = decision.get("accepted")
    if accepted is True:
        return Verdict("pass", f"Accepted: {arm}", reason, notes)
    if accepted is False:
        return Verdict("unknown", f"Not accepted: {arm} is kept", reason, notes)
    return Verdict("unknown", "Not decided", reason, notes)


def _notes(record: Mapping[str, Any]) -> list[str]:
    notes = [
        f"{text(dig(flag, 'stage'))}: {text(dig(flag, 'reason'))}"
        for flag in as_list(record.get("flags"))
    ]
    if "mock" in str(record.get("graph_source", "")):
        notes.append("W is a mock: the orders follow planted communities, not the model.")
    weights = dig(record, "model", "weights")
    if isinstance(weights, str) and weights != "trained":
        notes.append(f"Weights: {text(weights)}. Only speed, memory and equality mean something.")
    return notes


def gates(record: Mapping[str, Any]) -> list[Gate]:
    """Return every gate of a record."""
    return [_gate(record, as_mapping(gate)) for gate in as_list(record.get("gates"))]


def _gate(record: Mapping[str, Any], gate: Mapping[str, Any]) -> Gate:
    name, status = str(gate.get("name")), text(gate.get("status"))
    unit, asks = _GATES.get(name, ("", "threshold {}"))
    value, threshold = as_number(gate.get("value")), as_number(gate.get("threshold"))
    return Gate(
        title=_TITLES.get(name, text(name)),
        kind=_KINDS.get(status, "unknown"),
        status=status,
        value="" if value is None else f"{fixed(value, 3 if name == 'quality' else 1)} {unit}",
        asked="" if threshold is None else asks.format(f"{threshold:g}"),
        around=_around(record, gate, value, unit),
        reason=text(gate.get("reason")),
    )


def _around(
    record: Mapping[str, Any], gate: Mapping[str, Any], value: float | None, unit: str
) -> str:
    """Return the gate's interval; that of a latency gate is the one of the ratio it was made of."""
    ends = [as_number(end) for end in as_list(gate.get("interval"))]
    if gate.get("name") == "latency" and value is not None and not ends:
        for ratio in as_mapping(record.get("ratios")).values():
            middle, low, high = (as_number(dig(ratio, key)) for key in ("median", "lo", "hi"))
            if middle is None or low is None or high is None:
                continue
            if math.isclose(100 * (1 - middle), value, rel_tol=1e-9, abs_tol=1e-9):
                ends = [100 * (1 - high), 100 * (1 - low)]
    if len(ends) != 2 or None in ends:
        return ""
    return f"95 % interval {fixed(ends[0], 1)} to {fixed(ends[1], 1)} {unit}"


def gates_line(record: Mapping[str, Any]) -> str:
    """Return how many gates passed, failed and were not measured."""
    found = [gate.status for gate in gates(record)]
    return ", ".join(f"{found.count(s)} {s}" for s in dict.fromkeys(found)) or "no gates"


def not_measured(record: Mapping[str, Any], problems: Mapping[str, str]) -> dict[str, str]:
    """Return everything that the record or the run folder lacks, with the reason."""
    missing = {text(k): text(v) for k, v in as_mapping(record.get("not_measured")).items()}
    reasons = as_mapping(dig(record, "env", "reasons"))
    missing |= {f"environment: {text(k)}": text(v) for k, v in reasons.items()}
    # The run's own reason says more than that a file is not there.
    told = {"ncu.json": "ncu", "power.csv": "power.csv"}
    absent = {k: v for k, v in problems.items() if told.get(k) not in missing}
    return missing | {text(k): text(v) for k, v in absent.items()}
