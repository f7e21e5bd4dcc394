"""The tables about arms, groups, stages and quality."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from icd_tvm.report.table import Cell, Table, numeric, pairs, scaled
from icd_tvm.report.values import (
    ABSENT,
    as_list,
    as_mapping,
    as_number,
    dig,
    fixed,
    flat,
    interval,
    si,
    signed,
    text,
)

_COUNTERS = {
    "toks_per_s": ("tokens / s", None, 1),
    "l2_hit_pct": ("L2 hit %", "", 1),
    "dram_bytes": ("DRAM", "B", 1),
    "ept_j_per_tok": ("mJ / token", "", 1e3),
}
# From, to, what lies between them.
_STEPS = (
    ("dense", "identity", "transform and its kernels"),
    ("identity", "linear", "order decided before the transform"),
    ("linear", "iterative", "order decided again after it"),
    ("dense", "iterative", "all of it"),
    ("linear", "random", "control: a random order"),
)


def median(arm: Any) -> float | None:
    """Return the median latency of an arm in ms."""
    return as_number(dig(arm, "lat_ms", "median"))


def plain_ratio(record: Mapping[str, Any], a: str, b: str) -> Cell:
    """Return the ratio ``a / b`` of the medians."""
    return Cell(ratio_cell(record, a, b).shown.split(" ")[0], ratio_cell(record, a, b).value)


def ratio_cell(record: Mapping[str, Any], a: str, b: str) -> Cell:
    """Return ``a / b``: the record's ratio with its interval, else that of the medians."""
    found = as_mapping(dig(record, "ratios", f"{a}/{b}"))
    value = as_number(found.get("median"))
    if value is not None:
        around = interval(found.get("lo"), found.get("hi"), 3)
        return Cell(f"{value:.3f} {around}".rstrip(), value)
    over, under = (median(dig(record, "arms", name)) for name in (a, b))
    if over is None or not under:
        return Cell(ABSENT)
    return Cell(f"{over / under:.3f}", over / under)


def arms(record: Mapping[str, Any]) -> Table:
    """Lay out latency, throughput and counters of every arm, and its share of the others."""
    found = as_mapping(record.get("arms"))
    peers = [name for name in as_mapping(record.get("peers")) if name in found]
    against = [name for name in ("dense", "linear", *peers) if name in found]
    heads = ["median ms", "p5", "p95", "min", "calls"]
    counters = [title for title, _, _ in _COUNTERS.values()]
    shares = [f"/ {name}" for name in against]
    table = Table("Every arm", ["arm", *heads, *shares, *counters, "flags"])
    for name, arm in found.items():
        times = [numeric(dig(arm, "lat_ms", key), 3) for key in ("median", "p5", "p95", "min")]
        table.add(
            name,
            *times,
            numeric(dig(arm, "lat_ms", "n"), 0),
            *(plain_ratio(record, name, other) for other in against),
            *(_counter(arm, key) for key in _COUNTERS),
            _flags(arm),
        )
    return table.without_empty_columns()


def _counter(arm: Any, key: str) -> Cell:
    _, unit, factor = _COUNTERS[key]
    value = as_number(dig(arm, key))
    value = None if value is None else value * factor
    cell = numeric(value, 0) if unit is None else scaled(value, unit)
    model = dig(arm, "source", key) == "model" and value is not None
    return Cell(f"{cell.shown} (model)", cell.value) if model else cell


def _flags(arm: Any) -> str:
    noise = as_mapping(dig(arm, "noise"))
    found = [name for name in ("outliers", "drift") if noise.get(name) is True]
    twin = dig(arm, "same_module_as")
    return ", ".join([*found, *([f"same as {text(twin)}"] if twin else [])])


def shares(record: Mapping[str, Any]) -> Table:
    """Split the time between dense and iterative into its steps, peers first."""
    found = as_mapping(record.get("arms"))
    peers = [name for name in found if name in as_mapping(record.get("peers"))]
    steps = [
        *((peer, "dense", f"our compile instead of {text(peer)}") for peer in peers),
        *_STEPS,
        *((peer, "iterative", f"all of it, from {text(peer)}") for peer in peers),
    ]
    columns = ["step", "from", "to", "ms saved", "share of dense", "time ratio"]
    table = Table("Where the time goes", columns)
    dense = median(found.get("dense"))
    for start, end, title in steps:
        before, after = median(found.get(start)), median(found.get(end))
        if before is None or after is None:
            continue
        saved = before - after
        share = None if not dense else 100 * saved / dense
        percent = Cell(ABSENT) if share is None else Cell(f"{fixed(share, 1)} %", share)
        ratio = ratio_cell(record, end, start)
        table.add(title, start, end, numeric(saved, 3), percent, ratio)
    return table


def groups(record: Mapping[str, Any]) -> Table:
    """Lay out the axis groups: may it move, was it worth it, and why not."""
    heads = ["axis", "kind", "size", "U ratio", "why", "order from", "U", "U bound", "C", "Q"]
    table = Table("Every group", [*heads, "constraint", "role", "tensors"])
    # Those that a solver saw come first, then the other free ones, then the pinned ones.
    found = sorted(as_list(record.get("groups")), key=lambda g: as_mapping(dig(g, "U")) == {})
    for group in found:
        before, after = (as_number(dig(group, "U", key)) for key in ("before", "after"))
        ratio = after / before if before and after is not None else None
        table.add(
            dig(group, "id"),
            dig(group, "kind"),
            numeric(dig(group, "size"), 0),
            numeric(ratio, 3),
            dig(group, "reason"),
            dig(group, "winner"),
            _change(dig(group, "U"), si),
            scaled(dig(group, "U_bound")),
            *(_change(dig(group, key), lambda v: fixed(v, 3)) for key in "CQ"),
            dig(group, "constraint"),
            dig(group, "role"),
            numeric(len(as_list(dig(group, "tensors"))) or None, 0),
        )
    return table.without_empty_columns()


def _change(values: Any, show: Callable[[Any], str]) -> Cell:
    """Return ``before → after``, sorted by what is reached."""
    before, after = (as_number(dig(values, key)) for key in ("before", "after"))
    if before is None and after is None:
        return Cell(ABSENT)
    return Cell(f"{show(before)} → {show(after)}", before if after is None else after)


def stages(record: Mapping[str, Any], events: Iterable[Mapping[str, Any]]) -> list[Table]:
    """Lay out the timed stages, and the states that the event log holds."""
    timed = Table("Stages", ["stage", "seconds", "finished", "remark"])
    for stage in as_list(record.get("stages")):
        seconds = numeric(dig(stage, "seconds"), 2)
        timed.add(dig(stage, "stage"), seconds, dig(stage, "ok"), as_mapping(dig(stage, "meta")))
    logged = Table("Events", ["state", "seconds", "finished", "remark"])
    for event in events:
        start, end = (as_number(dig(event, key)) for key in ("t_start", "t_end"))
        seconds = numeric(None if start is None or end is None else end - start, 2)
        meta = as_mapping(dig(event, "meta"))
        remark = {k: v for k, v in meta.items() if k not in ("steps", "rows", "decision")}
        logged.add(dig(event, "stage"), seconds, dig(event, "ok"), remark)
    return [table.without_empty_columns() for table in (timed, logged) if table.rows]


def quality(record: Mapping[str, Any]) -> Table | None:
    """Lay out the task metric of every arm that was evaluated."""
    found = as_mapping(record.get("quality"))
    values = as_mapping(found.get("arms"))
    if not values:
        return None
    head = text(found.get("metric"))
    table = Table("Task quality", ["arm", head, "points against dense"])
    reference = as_number(values.get("dense"))
    for name, value in values.items():
        score = as_number(value)
        delta = None if score is None or reference is None else 100 * (score - reference)
        change = Cell(ABSENT) if delta is None else Cell(signed(delta, 3), delta)
        table.add(name, numeric(value, 5), change)
    return table


def ratios(record: Mapping[str, Any]) -> Table:
    """Lay out the ratios between arms that were timed in turns."""
    columns = ["ratio", "of medians", "95 % interval", "of minima", "P(faster)"]
    table = Table("Ratios between arms", columns)
    for pair, ratio in as_mapping(record.get("ratios")).items():
        around = interval(dig(ratio, "lo"), dig(ratio, "hi"), 3)
        middle, least, faster = (
            numeric(dig(ratio, key), 3) for key in ("median", "min", "p_faster")
        )
        table.add(pair, middle, around, least, faster)
    return table


def transforms(record: Mapping[str, Any]) -> list[Table]:
    """Lay out what each transform did: its settings, and a row for every tensor or group."""
    found = []
    for kind, value in as_mapping(record.get("transform")).items():
        entries = as_list(dig(value, "entries"))
        settings = {k: v for k, v in as_mapping(value).items() if k != "entries"} or value
        found.append(pairs(f"Transform: {text(kind)}", {kind: settings}))
        rows = [dict(flat(entry)) for entry in entries]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        if columns:
            table = Table(f"What {text(kind)} changed", columns)
            for row in rows:
                table.add(*(Cell(text(row.get(k)), as_number(row.get(k))) for k in columns))
            found.append(table.without_empty_columns())
    return [table for table in found if table.rows]
