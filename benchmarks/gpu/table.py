"""The suite's record as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.gpu.cases import ARMS
from benchmarks.gpu.gates import evaluate


def table(record: Mapping[str, Any]) -> str:
    """Return the record as Markdown: bars, models, kernels."""
    device, rate = record["device"], record["copy_rate"]
    head = f"{device['name']}, {device['arch']}" if device else "no GPU: nothing was run"
    copied = rate if isinstance(rate, str) else f"{rate / 1e12:.2f} TB/s"
    lines = [f"# {head}", "", f"Copy on the device: {copied}.", ""]
    for arch, reason in record.get("left_out", {}).items():
        lines += [f"Kernels of {arch} are left out: {reason}", ""]
    lines += [*_gates(record), ""]
    lines += [*_models(record), "", *_energy(record), "", *_counters(record), ""]
    lines += [*_peers(record), "", *_kernels(record)]
    for part in ("energy", "counters"):
        value = record[part]
        lines += ["", f"{part}: {value}" if isinstance(value, str) else f"{part}: in the record"]
    return "\n".join(lines) + "\n"


def _rows(head: list[str], rows: list[list[str]]) -> list[str]:
    every = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in every]


def _gates(record: Mapping[str, Any]) -> list[str]:
    return _rows(["bar", "", "value", "at, or why not"], [list(gate) for gate in evaluate(record)])


def _models(record: Mapping[str, Any]) -> list[str]:
    found = record["models"]
    if isinstance(found, str):
        return [f"Models: {found}"]
    rows = []
    for name, item in found.items():
        if name == "notes":
            continue
        if isinstance(item, str):
            rows += [[name, "", item, *[""] * (len(ARMS) + 2)]]
            continue
        for mode in ("warm", "cold"):
            times = [f"{item['arms'][arm][mode]['ms']:.3f}" for arm in ARMS]
            ratios = [_ratio(item["ratios"][mode][f"iterative/{over}"]) for over in
                      ("linear", "best unordered")]  # fmt: skip
            how = item["arms"]["iterative"]["by"].split(" ")[0]
            rows.append([name, mode, how, *times, *ratios])
    head = ["model", "caches", "by", *(f"{arm} ms" for arm in ARMS)]
    notes = [f"- {key}: {text}" for key, text in found.get("notes", {}).items()]
    return [*_rows([*head, "iterative/linear", "iterative/best unordered"], rows), "", *notes]


def _ratio(value: Mapping[str, float]) -> str:
    return f"{value['median']:.3f} [{value['lo']:.3f}, {value['hi']:.3f}]"


def _energy(record: Mapping[str, Any]) -> list[str]:
    found = record["model_energy"]
    if isinstance(found, str):
        return [f"Energy of models: {found}"]
    rows = []
    for name, item in found.items():
        if isinstance(item, str):
            rows.append([name, item, "", ""])
            continue
        joules = [f"{item['arms'][arm]['joules_per_token']:.3g}" for arm in ("linear", "iterative")]
        rows.append([name, *joules, f"{item['iterative/linear']:.3f}"])
    return _rows(["model", "linear J/token", "iterative J/token", "ratio"], rows)


def _counters(record: Mapping[str, Any]) -> list[str]:
    found = record["model_counters"]
    if isinstance(found, str):
        return [f"Counters of models: {found}"]
    rows = []
    for name, item in found.items():
        if isinstance(item, str):
            rows.append([name, item, "", ""])
            continue
        for arm, profile in item.items():
            if isinstance(profile, str):
                rows.append([name, arm, profile, ""])
                continue
            summary = profile["summary"]
            rows.append(
                [name, arm, *(_figure(summary[k]) for k in ("l2_read_hit_pct", "dram_bytes"))]
            )
    return _rows(["model", "arm, caches", "L2 read hit %", "DRAM bytes"], rows)


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def _peers(record: Mapping[str, Any]) -> list[str]:
    lines = []
    for part in ("peers", "model_peers"):
        found = record[part]
        if isinstance(found, str):
            lines.append(f"{part}: {found}")
            continue
        more = {n: v for n, v in found.items() if part == "model_peers" or "2:4" in n}
        rows = [[name, _peer(value)] for name, value in more.items() if name != "torch"]
        lines += _rows([f"torch {found['torch']}", "time"], rows)
    return lines


def _peer(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value['us']:.2f} us" if "us" in value else f"{value['stream']['ms']:.3f} ms, stream"


def _kernels(record: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, bound in record["predicted"].items():
        if name != "arch":
            rows.append([
                name,
                _cell(record["correctness"], name, "error_of_allowed"),
                _cell(record["times"], name, "cold"),
                _cell(record["times"], name, "warm"),
                f"{bound['us']:.2f}",
                _cell(record["peers"], name, "us"),
            ])  # fmt: skip
    head = ["kernel", "error / allowed", "cold us", "warm us", "predicted bound us", "torch us"]
    return _rows(head, rows)


def _cell(part: Any, name: str, key: str) -> str:
    found = part if isinstance(part, str) else part.get(name, "-")
    if isinstance(found, str):
        return "not measured" if found.startswith("not measured") else found
    value = found[key]["us"] if isinstance(found[key], dict) else found[key]
    return format(value, ".2f")
