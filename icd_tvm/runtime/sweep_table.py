"""One row for each point of a sweep, from what its run left behind."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from icd_tvm.runtime.run_folder import METRICS
from icd_tvm.runtime.sweep_grid import Point

SCHEMA = "icd/sweep/v1"
JSON, CSV = "sweep.json", "sweep.csv"
DONE, FAILED, PENDING = "done", "failed", "pending"


def row(point: Point, folder: Path, failed: str | None) -> dict[str, Any]:
    """Return what became of a point.

    Parameters
    ----------
    point : Point
    folder : Path
        Of its run.
    failed : str or None
        Why the run failed, empty if it did not; None if it has not ended.

    Returns
    -------
    dict
        ``point``, ``keys``, ``status``, ``reason``; of a finished run also ``kept``,
        ``accepted``, ``lat_ms`` (arm -> median, ms), ``ratios`` (pair -> median, lo, hi),
        ``gates`` (name -> status), ``quality`` (arm -> value, or null), ``not_measured`` (what is
        missing -> why) and ``device``.
    """
    head: dict[str, Any] = {"point": point.name, "keys": point.keys}
    if failed is None:
        return {**head, "status": PENDING, "reason": "has not ended"}
    record = _metrics(folder / METRICS)
    if failed or record is None:
        return {**head, "status": FAILED, "reason": failed or f"left no sound {METRICS}"}
    return {**head, "status": DONE, "reason": record["decision"]["reason"], **_figures(record)}


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the record of ``sweep.json``."""
    counts = Counter(item["status"] for item in rows)
    return {
        "schema": SCHEMA,
        "counts": {status: counts[status] for status in (DONE, FAILED, PENDING)},
        "points": list(rows),
    }


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows with a column for every figure that any of them has."""
    flat = [dict(_flat(item)) for item in rows]
    columns = dict.fromkeys(key for item in flat for key in item)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [*columns], lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return stream.getvalue()


def table(record: Mapping[str, Any]) -> str:
    """Return one line for each point as plain text, medians in milliseconds."""
    points = record["points"]
    keys = [*points[0]["keys"]] if points else []
    head = [*(key.rpartition(".")[2] for key in keys), "status", "linear ms", "iter. ms", "ratio"]
    rows = [[*head, "kept"]]
    for item in points:
        times, ratio = item.get("lat_ms", {}), item.get("ratios", {}).get("iterative/linear")
        figures = [times.get("linear"), times.get("iterative"), ratio and ratio["median"]]
        cells = ["-" if value is None else f"{value:.3f}" for value in figures]
        rows.append(
            [*map(_text, item["keys"].values()), item["status"], *cells, item.get("kept") or "-"]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(n) for cell, n in zip(cells, widths, strict=True)).rstrip()
        for cells in rows
    ]
    lines += [f"{i['point']} failed: {i['reason']}" for i in points if i["status"] == FAILED]
    return "\n".join(lines)


def _metrics(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _figures(record: Mapping[str, Any]) -> dict[str, Any]:
    quality = record["quality"]
    return {
        "kept": record["decision"]["arm"],
        "accepted": record["decision"]["accepted"],
        "lat_ms": {name: arm["lat_ms"]["median"] for name, arm in record["arms"].items()},
        "ratios": {
            pair: {key: value[key] for key in ("median", "lo", "hi")}
            for pair, value in record["ratios"].items()
        },
        "gates": {gate["name"]: gate["status"] for gate in record["gates"]},
        "quality": quality and quality["arms"],
        "not_measured": record["not_measured"],
        "device": record["device"],
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if key == "keys" and not prefix:
            # Their own names; a value that is a list or a map stays one cell.
            yield from ((name, _text(item)) for name, item in value.items())
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
