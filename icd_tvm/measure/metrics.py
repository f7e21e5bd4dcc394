"""The metrics record ``icd/metrics/v1``: its types, its check, its file and its table."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt

from icd_tvm.errors import ConfigError, MeasurementError
from icd_tvm.files import make_folder, write_atomically
from icd_tvm.measure.schema import violations
from icd_tvm.measure.statistics import Noise, Ratio, Summary, noise, summarise

SCHEMA = "icd/metrics/v1"
SCHEMA_FILE = Path(__file__).with_name("metrics.schema.json")

# Fields of an arm that may be null when the record says why.
OPTIONAL_FIELDS = ("toks_per_s", "l2_hit_pct", "dram_bytes", "ept_j_per_tok")

Source = Literal["measured", "model", "not measured"]


class ArmRecord(TypedDict):
    """Measurements of one arm: ms, tokens per second, per cent, bytes, joules per token."""

    lat_ms: Summary
    toks_per_s: float | None
    l2_hit_pct: float | None
    dram_bytes: float | None
    ept_j_per_tok: float | None
    noise: Noise | None
    source: dict[str, Source]


class GateRecord(TypedDict):
    """One gate: what was reached, what was asked, and why it says so."""

    name: str
    status: Literal["pass", "fail", "not measured"]
    value: float | None
    interval: list[float] | None
    threshold: float
    reason: str


class Decision(TypedDict):
    """Whether the new order is kept; None where nothing was measured."""

    accepted: bool | None
    reason: str


class Equivalence(TypedDict):
    """Largest difference between arms that must compute the same."""

    max_abs: float
    max_rel: float


class MetricsRecord(TypedDict):
    """The fields every record has; more may follow. See ``metrics.schema.json``."""

    schema: str
    model: Any
    target: Any
    env: dict[str, Any]
    arms: dict[str, ArmRecord]
    ratios: dict[str, Ratio]
    equivalence: Equivalence | None
    quality: dict[str, Any] | None
    groups: list[Any]
    gates: list[GateRecord]
    decision: Decision
    not_measured: dict[str, str]


def arm_record(
    samples: npt.ArrayLike,
    *,
    tokens_per_call: int | None = None,
    **counters: float,
) -> ArmRecord:
    """Build the record of one arm.

    Parameters
    ----------
    samples : array_like of float, shape [n]
        Seconds per call.
    tokens_per_call : int, optional
    **counters : float
        Measured ``l2_hit_pct``, ``dram_bytes`` or ``ept_j_per_tok``.

    Returns
    -------
    ArmRecord

    Raises
    ------
    MeasurementError
        Unusable samples.
    ConfigError
        An unknown counter.
    """
    unknown = set(counters) - set(OPTIONAL_FIELDS)
    if unknown:
        raise ConfigError(
            f"unknown counter {min(unknown)!r}", f"known: {', '.join(OPTIONAL_FIELDS)}"
        )
    latency = summarise(samples)
    values: dict[str, float | None] = {name: counters.get(name) for name in OPTIONAL_FIELDS}
    if tokens_per_call is not None:
        values["toks_per_s"] = tokens_per_call / (latency["median"] * 1e-3)
    source: dict[str, Source] = {"lat_ms": "measured"}
    for name, value in values.items():
        source[name] = "not measured" if value is None else "measured"
    return ArmRecord(
        lat_ms=latency,
        toks_per_s=values["toks_per_s"],
        l2_hit_pct=values["l2_hit_pct"],
        dram_bytes=values["dram_bytes"],
        ept_j_per_tok=values["ept_j_per_tok"],
        noise=noise(samples),
        source=source,
    )


def validate_metrics(record: Mapping[str, Any]) -> None:
    """Check a record against the schema, and that every null has a reason.

    Parameters
    ----------
    record : mapping

    Raises
    ------
    MeasurementError
        The first thing that is wrong, and how many more there are.
    """
    plain = _plain(dict(record))
    schema = json.loads(SCHEMA_FILE.read_text())
    found = [*violations(plain, schema, schema)]
    if not found:
        found = _nulls_without_reason(plain)
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise MeasurementError(f"metrics record: {found[0]}{more}", f"see {SCHEMA_FILE.name}")


def write_metrics(path: str | os.PathLike[str], record: Mapping[str, Any]) -> Path:
    """Check a record and write it in one step: readers see the old file or the new one.

    Parameters
    ----------
    path : path
        File to write; its folder is made.
    record : mapping

    Returns
    -------
    Path

    Raises
    ------
    MeasurementError
        The record is invalid (NaN included).
    OutputError
        The file cannot be written.
    """
    validate_metrics(record)
    text = json.dumps(_plain(dict(record)), indent=1, allow_nan=False) + "\n"
    make_folder(Path(path).parent)
    return write_atomically(
        Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8")
    )


def arms_table(
    record: Mapping[str, Any], baseline: str = "linear", peers: Sequence[str] | None = None
) -> str:
    """Lay out the arms as plain text.

    Parameters
    ----------
    record : mapping
        A metrics record.
    baseline : str
        Arm that the ratios are taken to.
    peers : sequence of str, optional
        Arms that are other runtimes: each arm's median is divided by theirs. Taken from the
        record's ``peers`` when not given.

    Returns
    -------
    str
        Lines without a trailing newline; times in milliseconds.
    """
    shown = [
        name
        for name in ((record.get("peers") or ()) if peers is None else peers)
        if name in record["arms"]
    ]
    head = ["arm", "median", "p5", "p95", "min", f"/{baseline}", "95 % interval", "P(faster)"]
    rows = [[*head, *(f"/{name}" for name in shown)]]
    for name, arm in record["arms"].items():
        latency = arm["lat_ms"]
        times = [f"{latency[key]:.3f}" for key in ("median", "p5", "p95", "min")]
        against = [
            f"{latency['median'] / record['arms'][p]['lat_ms']['median']:.3f}" for p in shown
        ]
        rows.append([name, *times, *_ratio_cells(record, name, baseline), *against])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _ratio_cells(record: Mapping[str, Any], name: str, baseline: str) -> list[str]:
    arms = record["arms"]
    found = record["ratios"].get(f"{name}/{baseline}")
    if found is not None:
        interval = f"[{found['lo']:.3f}, {found['hi']:.3f}]"
        return [f"{found['median']:.3f}", interval, f"{found['p_faster']:.3f}"]
    if baseline not in arms:
        return ["-", "-", "-"]
    plain = arms[name]["lat_ms"]["median"] / arms[baseline]["lat_ms"]["median"]
    return [f"{plain:.3f}", "-", "-"]


def _nulls_without_reason(record: dict[str, Any]) -> list[str]:
    reasons = record["not_measured"]
    found = []
    for name in ("equivalence", "quality", "peers"):
        # Only what compares with other runtimes has peers.
        if record.get(name, {}) is None and not reasons.get(name):
            found.append(f"{name} is null without a reason in not_measured")
    for arm, values in record["arms"].items():
        for name in OPTIONAL_FIELDS:
            keys = (f"arms.{arm}.{name}", name)
            if values[name] is None and not any(reasons.get(key) for key in keys):
                found.append(f"arms.{arm}.{name} is null without a reason in not_measured")
    return found


def _plain(value: Any) -> Any:
    """Turn numpy scalars and arrays, tuples and paths into what JSON knows."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    return value
