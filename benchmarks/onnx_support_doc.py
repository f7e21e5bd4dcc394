"""Rewrite the generated tables of docs/ONNX_Support.md from stored outcomes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

Outcomes: TypeAlias = Mapping[str, Mapping[str, Any]]

# The first pattern found in a refusal names its group.
REASONS = (
    (r"sequence_type|optional_type|Optional ", "sequences and optionals as inputs"),
    (
        r"no tensors of|element type (U?INT|FLOAT4)|float4|int[24] ",
        "numbers of 2 or 4 bits, E8M0: TVM has no tensors of them",
    ),
    (r"String|STRING|Regex|TfIdf|LabelEncoder|strings", "strings"),
    (r"Random|Bernoulli|Multinomial|training mode", "random numbers"),
    (r"Image|ai\.onnx\.ml", "image decoding, classical learning (`ai.onnx.ml`)"),
    (r"preview\.training", "training operators (`ai.onnx.preview.training`)"),
    (r"float8", "8-bit floats outside Cast"),
    (r"DeformConv|Det |MelWeight|MaxUnpool|RoiAlign|TopK", "rare operators: Det, DeformConv, ..."),
    (r"Loop|Scan", "loops that are not counted, short and static"),
    (r"Attention|CausalConv|QLinear|QuantizeLinear|Quantize", "rare variants of listed operators"),
)


def write_tables(path: Path, stored: Mapping[str, Outcomes]) -> None:
    """Replace what stands between the markers of each table."""
    text = path.read_text()
    tables = {
        "cases": _cases(stored),
        "refusals": _refusals(stored.get("node", {})),
        "models": _models(stored.get("real", {})),
    }
    for name, table in tables.items():
        marks = (f"<!-- {name} -->", f"<!-- /{name} -->")
        body = re.compile(re.escape(marks[0]) + ".*?" + re.escape(marks[1]), re.DOTALL)
        text = body.sub(lambda _, t=table, m=marks: f"{m[0]}\n{t}\n{m[1]}", text)
    path.write_text(text)


def _cases(stored: Mapping[str, Outcomes]) -> str:
    rows = ["| cases | number | right | refused | differ |", "|---|---:|---:|---:|---:|"]
    for suite, outcomes in stored.items():
        if suite == "real":
            continue
        status = Counter(outcome["status"] for outcome in outcomes.values())
        right, refused = status["ok"] + status["folded"], status["refused"]
        share = right / len(outcomes)
        other = len(outcomes) - right - refused
        rows.append(f"| {suite} | {len(outcomes)} | {right} ({share:.1%}) | {refused} | {other} |")
    return "\n".join(rows)


def _refusals(outcomes: Outcomes) -> str:
    counts = Counter(
        _group(outcome["reason"]) for outcome in outcomes.values() if outcome["status"] == "refused"
    )
    rows = ["| refused because of | cases |", "|---|---:|"]
    return "\n".join([*rows, *(f"| {group} | {count} |" for group, count in counts.most_common())])


def _group(reason: str) -> str:
    found = (group for pattern, group in REASONS if re.search(pattern, reason))
    return next(found, "other")


def _models(outcomes: Outcomes) -> str:
    rows = ["| model | result | against ONNX Runtime |", "|---|---|---|"]
    return "\n".join(
        [*rows, *(f"| {name} | {o['status']} | {o['reason']} |" for name, o in outcomes.items())]
    )
