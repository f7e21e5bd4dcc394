"""The reports of a run: file name -> text of a metrics record. Add a line to add a report."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Record = Mapping[str, Any]
Row = tuple[str, str, str, Any]


def csv_report(record: Record) -> str:
    """Return ``section,name,key,value``: one line for every figure of arms, ratios and groups."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("section", "name", "key", "value"))
    writer.writerows(_rows(record))
    return stream.getvalue()


def _rows(record: Record) -> Iterator[Row]:
    yield from (("decision", "", key, value) for key, value in _flat(record["decision"]))
    for section in ("arms", "ratios"):
        for name, values in record[section].items():
            yield from ((section, name, key, value) for key, value in _flat(values))
    for section, title in (("gates", "name"), ("groups", "id")):
        for item in record[section]:
            rest = {key: value for key, value in item.items() if key != title}
            yield from ((section, str(item[title]), key, value) for key, value in _flat(rest))
    for item in (*record["flags"], *([record["failure"]] if record["failure"] else [])):
        yield "flags", item["stage"], "reason", item.get("reason", item.get("message"))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            yield prefix + key, "; ".join(map(str, value))
        else:
            yield prefix + key, value


REPORTS: dict[str, Callable[[Record], str]] = {"report.csv": csv_report}
