"""The tables of README.md and docs/Repro.md, rewritten from the records of ``main_job.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Case of main_job.py -> its name in the tables, and its row in README.md.
CASES = {
    "unit-0.5": ("`unit:0.5`", "whole dead units, `unit:0.5`"),
    "vec16-0.5": ("`vec16:0.5`", "groups of columns that share rows, `vec16:0.5`"),
    "unit-0.5-int8-w8a8-smooth0.75": ("`unit:0.5` + W8A8", "`unit:0.5` and W8A8"),
    "int8-w8a8-smooth0.75": ("W8A8", "W8A8 alone"),
}
DENSE = "a dense model"


def record(out: Path, case: str, threads: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / f"main-job-{case}-{threads}t.json").read_text())
    return found


def expected_rows(out: Path) -> list[str]:
    """Return the rows of the table in ``docs/Repro.md``."""
    rows = []
    for case, (name, _) in CASES.items():
        for threads in (1, 2):
            found = record(out, case, threads)
            arms, ratios = found["arms"], found["ratios"]
            order = ratios["iterative/linear"]
            cells = [name, str(threads)]
            cells += [
                f"{arms[arm]['lat_ms']['median']:.2f}" for arm in ("dense", "linear", "iterative")
            ]
            cells.append(f"{order['median']:.3f} [{order['lo']:.3f}, {order['hi']:.3f}]")
            cells += [
                f"{ratios[f'{arm}/onnxruntime']['median']:.3f}" for arm in ("dense", "iterative")
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def with_rows(text: str, header: str, rows: list[str]) -> str:
    """Put rows in place of those of the table whose first column is called ``header``."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {header} |")) + 2
    end = next(i for i in range(start, len(lines) + 1) if not "".join(lines[i : i + 1]).strip())
    return "\n".join([*lines[:start], *rows, *lines[end:]]) + "\n"


def with_ratios(text: str, out: Path) -> str:
    """Put the ratios of one thread into the rows of README.md's table; its words stay."""
    lines = text.splitlines()
    found = {row: record(out, case, 1)["ratios"] for case, (_, row) in CASES.items()}
    for at, line in enumerate(lines):
        cells = line.split(" | ")
        row = cells[0].removeprefix("| ") if len(cells) > 2 else ""
        if row == DENSE:
            dense = next(iter(found.values()))["dense/onnxruntime"]
            cells[2] = f"{dense['median']:.2f} (`dense`)"
        elif row in found:
            cells[1] = f"{found[row]['iterative/linear']['median']:.2f}"
            cells[2] = f"{found[row]['iterative/onnxruntime']['median']:.2f}"
        lines[at] = " | ".join(cells)
    return "\n".join(lines) + "\n"


def rewrite(root: Path, out: Path) -> list[Path]:
    """Bring both documents up to date; return those that changed."""
    made = {
        root / "README.md": lambda text: with_ratios(text, out),
        root / "docs" / "Repro.md": lambda text: with_rows(text, "transform", expected_rows(out)),
    }
    changed = []
    for path, make in made.items():
        before = path.read_text()
        after = make(before)
        if after != before:
            path.write_text(after)
            changed.append(path)
    return changed
