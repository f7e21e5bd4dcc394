"""Write a run's report: one HTML file that needs nothing else."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from icd_tvm.files import write_atomically
from icd_tvm.report import charts, kernel_tables, kernel_times, roofline, tables, verdict
from icd_tvm.report.heat_map import heat_maps
from icd_tvm.report.run_files import (
    EVENTS,
    NCU,
    POWER,
    TILES,
    AxisGraph,
    TilePicture,
    read_run,
)
from icd_tvm.report.table import pairs
from icd_tvm.report.tile_map import tile_maps
from icd_tvm.report.values import as_list, as_mapping, as_number, dig, fixed, interval, text

REPORT = "report.html"
MAX_POWER_POINTS = 600
_SECTIONS = (
    ("arms", "Arms"),
    ("kernels", "Kernels"),
    ("roofline", "Roofline"),
    ("groups", "Axis groups"),
    ("heat-maps", "Access graph"),
    ("tiles", "Tiles"),
    ("quality", "Quality"),
    ("energy", "Energy"),
    ("stages", "Stages"),
    ("environment", "Environment"),
    ("missing", "Not measured"),
)
_NOT_GIVEN = {
    "W": "no access graph was given to this report",
    EVENTS: "no events were given to this report",
    POWER: "no power samples were given to this report",
    NCU: "no profile was given to this report",
    TILES: "no masks were given to this report",
}


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` into a run folder.

    Parameters
    ----------
    folder : str or Path
        Holds ``metrics.json``; ``events.jsonl``, ``W.npz``, ``perm.json``, ``power.csv`` and
        ``ncu.json`` are shown where they are there.

    Raises
    ------
    MeasurementError
        If the record is missing or invalid.
    OutputError
        If the file cannot be written.
    """
    return write_page(Path(folder) / REPORT, render_folder(Path(folder)))


def write_page(path: Path, page: str) -> Path:
    """Write a page whole, as UTF-8."""
    return write_atomically(path, lambda file: file.write_bytes(page.encode("utf-8", "replace")))


def render_folder(folder: Path) -> str:
    """Return the report of a run folder; see :func:`write_report`."""
    run = read_run(folder)
    return render(
        run.record,
        events=run.events,
        graphs=run.graphs,
        power=run.power,
        ncu=run.ncu,
        tiles=run.tiles,
        problems=run.problems,
    )


def render(
    record: Mapping[str, Any],
    *,
    events: Sequence[Mapping[str, Any]] | None = None,
    graphs: Sequence[AxisGraph] | None = None,
    power: Sequence[Mapping[str, float]] | None = None,
    ncu: Mapping[str, Any] | None = None,
    tiles: Mapping[str, Mapping[str, TilePicture]] | None = None,
    problems: Mapping[str, str] | None = None,
) -> str:
    """Return the report of a record as one HTML page.

    Parameters
    ----------
    record : mapping
        A metrics record (``icd/metrics/v1``). What it lacks is named as missing.
    events : sequence of mapping, optional
        Lines of ``events.jsonl``.
    graphs : sequence of AxisGraph, optional
    power : sequence of mapping, optional
        ``t`` in seconds and ``watts``.
    ncu : mapping, optional
        See :func:`icd_tvm.measure.ncu.as_json`; of one arm, or arm -> that.
    tiles : mapping, optional
        Weight -> arm -> its tiles.
    problems : mapping of str to str, optional
        File -> why nothing of it is shown.
    """
    problems = problems or {}
    maps, left_out = heat_maps(graphs or ())
    return template("report.html.j2").render(
        **_head(record),
        **_arms(record),
        **_kernels(record, ncu or {}),
        **_roofline(record),
        **_rest(record, events or (), power or ()),
        maps=maps,
        maps_left_out=left_out,
        tile_maps=tile_maps(tiles or {}),
        gaps={**_NOT_GIVEN, **problems, **_reasons(record)},
        missing=verdict.not_measured(record, problems),
        sections=_SECTIONS,
    )


def _reasons(record: Mapping[str, Any]) -> dict[str, str]:
    """Return why a run wrote no power samples and no profile, where it says so."""
    known = as_mapping(record.get("not_measured"))
    keys = {POWER: "power.csv", NCU: "ncu"}
    return {file: text(known[key]) for file, key in keys.items() if known.get(key)}


def template(name: str) -> Any:
    """Return one of the templates beside this file; what goes into them is escaped."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def model_name(record: Mapping[str, Any]) -> str:
    """Return what a record calls its model."""
    model = record.get("model")
    if isinstance(model, str):
        return text(model)
    found = dig(model, "name") or dig(model, "source")
    return text(found) if found else "unnamed model"


def _head(record: Mapping[str, Any]) -> dict[str, Any]:
    inputs = [_input(item) for item in as_list(dig(record, "model", "inputs"))]
    return {
        "name": model_name(record),
        "inputs": "inputs: " + (", ".join(inputs) or "not in the record"),
        "target": f"target: {_target(record.get('target'))}",
        "verdict": verdict.verdict(record),
        "gates": verdict.gates(record),
    }


def _input(item: Any) -> str:
    shape = " × ".join(map(text, as_list(dig(item, "shape"))))
    return f"{text(dig(item, 'name'))} {shape} {text(dig(item, 'dtype'))}"


def _target(value: Any) -> str:
    """Return a target as words; the record holds TVM's JSON text."""
    try:
        found = json.loads(value)
    except (TypeError, ValueError, RecursionError):
        return text(value)
    return (
        text({key: item for key, item in as_mapping(found).items() if item})
        if found
        else text(value)
    )


def _arms(record: Mapping[str, Any]) -> dict[str, Any]:
    reasons = as_mapping(record.get("not_measured"))
    return {
        "arms": tables.arms(record),
        "arms_chart": _arms_chart(record),
        "ratios": tables.ratios(record),
        "ratios_chart": _ratios_chart(record),
        "shares": tables.shares(record),
        "no_latency": text(reasons.get("lat_ms") or "the record has no timed arms"),
    }


def _arms_chart(record: Mapping[str, Any]) -> Markup | None:
    items = []
    for name, arm in as_mapping(record.get("arms")).items():
        value = tables.median(arm)
        if value is None:
            continue
        low, high = (as_number(dig(arm, "lat_ms", key)) for key in ("p5", "p95"))
        note = f"{fixed(value, 3)} ms"
        around = interval(low, high, 3)
        strong = name == dig(record, "decision", "arm")
        items.append(charts.Item(text(name), value, low, high, f"{note} {around}", note, strong))
    if not items:
        return None
    said = ", ".join(f"{item.label} {item.note}" for item in items)
    return charts.bars(items, "arms-chart", f"Median latency: {said}", "ms")


def _ratios_chart(record: Mapping[str, Any]) -> Markup | None:
    found = as_mapping(record.get("ratios"))
    return ratios_chart(found, "ratios-chart", "Ratios of medians")


def ratios_chart(ratios: Mapping[str, Any], name: str, title: str) -> Markup | None:
    """Draw ratios with their intervals; None where there is none."""
    items = []
    for label, ratio in ratios.items():
        value, low, high = (as_number(dig(ratio, key)) for key in ("median", "lo", "hi"))
        if value is not None:
            note, around = f"{value:.3f}", interval(low, high, 3)
            faster = high is not None and high < 1
            full = f"{note} {around}"
            items.append(charts.Item(text(label), value, low, high, full, note, faster))
    if not items:
        return None
    said = ", ".join(f"{item.label} {item.note}" for item in items)
    return charts.ratios(items, name, f"{title}: {said}", "ratio of medians")


def _kernels(record: Mapping[str, Any], ncu: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kernels": kernel_tables.kernels(record),
        "removed": kernel_tables.removed_units(record),
        "layers": kernel_times.layers(record),
        "kernel_times": kernel_times.all_kernel_times(record),
        "no_kernel_times": text(
            dig(record, "not_measured", "kernel_times") or "no arm of the record was profiled"
        ),
        "cache_totals": kernel_tables.cache_totals(record),
        "cache_kernels": kernel_tables.all_cache_kernels(record),
        "profiles": kernel_tables.profiles(ncu),
    }


def _roofline(record: Mapping[str, Any]) -> dict[str, Any]:
    points, missing = roofline.points(record)
    roof = roofline.roof(record)
    drawn = roofline.draw_roofline(points, roof) if points else None
    return {"roofline": drawn, "roof": roof, "roofline_missing": missing}


def _rest(
    record: Mapping[str, Any],
    events: Sequence[Mapping[str, Any]],
    power: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    reasons = as_mapping(record.get("not_measured"))
    kinds = Counter(text(dig(group, "kind")) for group in as_list(record.get("groups")))
    quality = {k: v for k, v in as_mapping(record.get("quality")).items() if k != "arms"}
    if "budget" in quality:
        # Its candidates are too many to read; the record has them.
        quality["budget"] = as_mapping(quality["budget"]).get("reason")
    environment = {k: v for k, v in as_mapping(record.get("env")).items() if k != "reasons"}
    more = {key: record.get(key) for key in ("seed", "wall_s", "peak_memory_mib", "graph_source")}
    return {
        "groups": tables.groups(record),
        "groups_line": ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
        "quality": tables.quality(record),
        "quality_facts": pairs("Evaluation", quality),
        "no_quality": text(reasons.get("quality") or "the record does not say why"),
        "equivalence": pairs("Largest difference between arms", record.get("equivalence")),
        "no_equivalence": text(reasons.get("equivalence") or "the record has no equivalence check"),
        "energy": pairs("Energy", record.get("energy")),
        "no_energy": text(reasons.get("ept_j_per_tok") or "the record has no energy figures"),
        "power_chart": _power_chart(power),
        "stages_chart": _stages_chart(record),
        "stages": tables.stages(record, events),
        "overhead": _overhead(record),
        "environment": pairs("Machine and versions", {**environment, **more}),
        "transforms": tables.transforms(record),
        "peers": pairs("Peers", record.get("peers")),
    }


def _power_chart(power: Sequence[Mapping[str, float]]) -> Markup | None:
    step = -(-len(power) // MAX_POWER_POINTS)
    samples = power[::step] if step else power
    if len(samples) < 2:
        return None
    times = [sample["t"] - samples[0]["t"] for sample in samples]
    watts = [sample["watts"] for sample in samples]
    title = f"Power over time, {min(watts):.1f} to {max(watts):.1f} W"
    return charts.line(times, watts, "power-chart", title, ("s", "W"))


def _stages_chart(record: Mapping[str, Any]) -> Markup | None:
    items = []
    for stage in as_list(record.get("stages")):
        seconds = as_number(dig(stage, "seconds"))
        if seconds is not None:
            note = f"{fixed(seconds, 2)} s"
            items.append(charts.Item(text(dig(stage, "stage")), seconds, note=note, short=note))
    if not items:
        return None
    said = ", ".join(f"{item.label} {item.note}" for item in items)
    return charts.bars(items, "stages-chart", f"Seconds of each stage: {said}", "s")


def _overhead(record: Mapping[str, Any]) -> str:
    """Return what writing events and profiling cost this run, where the record knows."""
    found = as_mapping(record.get("overhead"))
    events, profiling = (as_number(found.get(f"{name}_pct")) for name in ("events", "profiling"))
    if events is None:
        return ""
    said = f"Of the run's time, writing events took {events:.3f} %"
    if profiling is None:
        return f"{said}; profiling: {text(found.get('reason') or 'not measured')}."
    return f"{said} and profiling, without the timed calls, {profiling:.2f} %."
