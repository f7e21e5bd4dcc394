"""``icd calibrate``: time a pilot of layouts and say how the cost terms rank against it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from icd_tvm.arguments import Parser
from icd_tvm.commands.threads import set_threads

_COLUMNS = ("U", "U_sum", "U_wrong", "-Q", "C", "J")


def parser() -> Parser:
    """Return the argument parser of the command."""
    result = Parser(
        prog="icd calibrate",
        description="Rank the cost terms against measured time on this machine.",
        examples="  icd calibrate --quick\n",
    )
    result.add_argument("--quick", action="store_true", help="three cases, some seconds")
    result.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write the record (default: the cache)"
    )
    result.add_common("print the record instead of a table")
    return result


def run(arguments: argparse.Namespace) -> None:
    """Run the pilot, keep its record, and print it."""
    # TVM reads its thread settings when it is first imported.
    set_threads(1)
    from icd_tvm.measure import calibrate_cost
    from icd_tvm.runtime.output import check_writable_file
    from icd_tvm.runtime.progress import Progress

    check_writable_file(arguments.out)
    quiet = arguments.quiet or arguments.json
    with Progress(quiet).stage("calibrate"):
        record = calibrate_cost.calibrate(
            calibrate_cost.QUICK if arguments.quick else calibrate_cost.FULL,
            rounds=20 if arguments.quick else 60,
            solve_s=2.0 if arguments.quick else 5.0,
            progress=lambda line: quiet or print(line, file=sys.stderr, flush=True),
        )
    path = calibrate_cost.save_calibration(record, arguments.out)
    print(json.dumps(record, indent=1) if arguments.json else table(record))
    print(f"wrote {path}", file=sys.stderr)


def table(record: dict[str, Any]) -> str:
    """Return a record as Markdown: Spearman correlation with its interval, one row a case."""
    lines = [
        "| case | layouts | slowest / fastest | " + " | ".join(_COLUMNS) + " |",
        "| --- | --- | --- |" + " --- |" * len(_COLUMNS),
    ]
    for case in record["cases"]:
        cells = [_cell(case["scores"][name]) for name in _COLUMNS]
        name = case["case"] + (f" (not ranked: {case['unranked']})" if case["unranked"] else "")
        head = f"| {name} | {len(case['layouts'])} | {1 + case['spread']:.2f} | "
        lines.append(head + " | ".join(cells) + " |")
    summary = record["summary"]
    counts = {"median": summary["ranked"], "median_of_all": len(record["cases"])}
    for part, count in counts.items() if summary["unranked"] else [("median", summary["ranked"])]:
        for key in ("spearman", "kendall"):
            cells = [_number(summary[part][name][key]) for name in _COLUMNS]
            lines.append(f"| median {key} of {count} cases | | | " + " | ".join(cells) + " |")
    weights = summary["weights"]
    lines.append("")
    lines.append(
        f"weights of J: {summary['reason']}"
        if weights is None
        else f"weights of J: C {weights['c']:g}, 1 - Q {weights['q']:g}, U {weights['u']:g} "
        f"(median Spearman {summary['weights_spearman']:.3f})"
    )
    return "\n".join(lines)


def _cell(score: dict[str, Any]) -> str:
    if score["spearman"] is None:
        return "constant"
    interval = score["spearman_interval"]
    around = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    return f"{score['spearman']:.2f}{around}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
