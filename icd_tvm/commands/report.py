"""``icd report``: one HTML file about a run, or about several."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from icd_tvm.arguments import Parser

COMPARISON = "comparison.html"


def parser() -> Parser:
    """Return the argument parser of the command."""
    result = Parser(
        prog="icd report",
        description="Write the HTML report of a run, or the comparison of several.",
        examples="  icd report runs/a\n  icd report runs/a runs/b -o compared.html\n",
    )
    result.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run directory, or a metrics.json",
    )
    result.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help=f"default: report.html beside the record; {COMPARISON} here for several runs",
    )
    result.add_common("print the file's name as JSON")
    return result


def run(arguments: argparse.Namespace) -> None:
    """Write the page and print where it is."""
    from icd_tvm.report.comparison import compare
    from icd_tvm.report.page import REPORT, render, render_folder, write_page
    from icd_tvm.report.run_files import read_record
    from icd_tvm.runtime.output import check_writable_file

    runs: list[Path] = arguments.runs
    first = runs[0] if runs[0].is_dir() else runs[0].parent
    path = arguments.output or (first / REPORT if len(runs) == 1 else Path(COMPARISON))
    check_writable_file(path)
    if len(runs) > 1:
        page = compare(dict(zip(_names(runs), map(read_record, runs), strict=True)))
    elif runs[0].is_dir():
        page = render_folder(runs[0])
    else:
        page = render(read_record(runs[0]))
    written = str(write_page(path, page))
    if arguments.json or not arguments.quiet:
        print(json.dumps({"file": written}) if arguments.json else f"wrote {written}")


def _names(runs: list[Path]) -> list[str]:
    """Return a name for each run: its last part, or the whole path where that is not unique."""
    short = [run.resolve().name for run in runs]
    if len(set(short)) == len(short):
        return short
    return [f"{index} {run}" for index, run in enumerate(runs, 1)]
