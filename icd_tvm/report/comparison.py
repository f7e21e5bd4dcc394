"""Compare runs: their verdicts, their ratios, and what differed between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from icd_tvm.report import tables, verdict
from icd_tvm.report.page import model_name, ratios_chart, template
from icd_tvm.report.table import Cell, Table, numeric
from icd_tvm.report.values import ABSENT, as_mapping, dig, flat, text

# What makes two runs comparable; loads and hashes differ every time.
_PARTS = ("model", "target", "transform", "graph_source", "seed", "env", "peers")
MAX_CHARTS = 3
_VOLATILE = ("env.load_average", "env.hash")

Runs = Mapping[str, Mapping[str, Any]]


def compare(runs: Runs) -> str:
    """Return one HTML page about several runs.

    Parameters
    ----------
    runs : mapping of str to mapping
        Name -> metrics record (``icd/metrics/v1``).
    """
    return str(
        template("comparison.html.j2").render(
            names=[text(name) for name in runs],
            warnings=list(_warnings(runs)),
            verdicts=_verdicts(runs),
            gates=_gates(runs),
            charts=list(_charts(runs)),
            latencies=_by_run("Median latency, ms", "arm", runs, _latencies),
            ratios=_by_run("Ratios", "ratio", runs, _ratios),
            quality=_by_run("Quality", "arm", runs, _quality),
            differences=_differences(runs),
        )
    )


def _warnings(runs: Runs) -> Iterator[str]:
    for title, keys in (("model", ("model", "name")), ("processor", ("env", "cpu", "model"))):
        found = dict.fromkeys(text(dig(record, *keys)) for record in runs.values())
        if len(found) > 1:
            yield f"The runs differ in their {title}: {', '.join(found)}."


def _verdicts(runs: Runs) -> Table:
    table = Table("Decision of each run", ["run", "model", "decision", "reason", "gates"])
    for name, record in runs.items():
        found = verdict.verdict(record)
        table.add(name, model_name(record), found.title, found.reason, verdict.gates_line(record))
    return table


def _gates(runs: Runs) -> Table:
    found = {name: {gate.title: gate for gate in verdict.gates(r)} for name, r in runs.items()}
    titles = dict.fromkeys(title for gates in found.values() for title in gates)
    table = Table("Gates", ["run", *titles])
    for name, gates in found.items():
        shown = [gates.get(title) for title in titles]
        table.add(name, *(f"{g.status} {g.value}".strip() if g else ABSENT for g in shown))
    return table


def _charts(runs: Runs) -> Iterator[dict[str, Any]]:
    """Draw the first ratios that more than one run has, a row for each run."""
    found = {name: as_mapping(record.get("ratios")) for name, record in runs.items()}
    pairs = dict.fromkeys(pair for ratios in found.values() for pair in ratios)
    shared = [pair for pair in pairs if sum(pair in ratios for ratios in found.values()) > 1]
    for index, pair in enumerate(shared[:MAX_CHARTS]):
        rows = {name: ratios[pair] for name, ratios in found.items() if pair in ratios}
        svg = ratios_chart(rows, f"ratio{index}", text(pair))
        if svg is not None:
            yield {"title": text(pair), "svg": svg}


def _by_run(caption: str, head: str, runs: Runs, read: Any) -> Table:
    """Return a table with a column for each run, and a row for each key that ``read`` yields."""
    found = {name: dict(read(record)) for name, record in runs.items()}
    table = Table(caption, [head, *map(text, found)])
    for key in dict.fromkeys(key for cells in found.values() for key in cells):
        table.add(key, *(cells.get(key, Cell(ABSENT)) for cells in found.values()))
    return table


def _latencies(record: Mapping[str, Any]) -> Iterator[tuple[str, Cell]]:
    for name, arm in as_mapping(record.get("arms")).items():
        yield name, numeric(tables.median(arm), 3)


def _ratios(record: Mapping[str, Any]) -> Iterator[tuple[str, Cell]]:
    for pair in as_mapping(record.get("ratios")):
        a, _, b = pair.partition("/")
        yield pair, tables.ratio_cell(record, a, b)


def _quality(record: Mapping[str, Any]) -> Iterator[tuple[str, Cell]]:
    found = as_mapping(record.get("quality"))
    for name, value in as_mapping(found.get("arms")).items():
        yield f"{text(found.get('metric'))}, {text(name)}", numeric(value, 5)


def _differences(runs: Runs) -> Table:
    found = {
        name: dict(flat({part: record.get(part) for part in _PARTS}))
        for name, record in runs.items()
    }
    table = Table("What differs between the runs", ["key", *map(text, found)])
    for key in dict.fromkeys(key for values in found.values() for key in values):
        shown = [text(values.get(key)) for values in found.values()]
        if len(set(shown)) > 1 and key not in _VOLATILE and ".entries." not in key:
            table.add(key, *shown)
    return table
