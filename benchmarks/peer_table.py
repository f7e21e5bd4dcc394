"""The models of a record of ``cpu_peers.py`` as a table: a size a row, a precision a column.

python benchmarks/peer_table.py docs/results/cpu-peers.json > docs/results/cpu-peers.md
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FORMS = ("fp32", "bf16", "W8A8", "unit:0.5 + W8A8")
_CASE = re.compile(r"(?P<model>\S+) S=(?P<seq>\d+) batch (?P<batch>\d+) (?P<form>.+)")
_HEAD = """# Beside the fastest CPU peer

Ours over the fastest of ONNX Runtime, OpenVINO, PyTorch and DeepSparse (bf16: OpenVINO and PyTorch;
the last two columns: the 8-bit ones of ONNX Runtime and OpenVINO, and OpenVINO's bf16), medians of
one run, one thread / two threads. Written by `benchmarks/peer_table.py` from
[cpu-peers.json](cpu-peers.json), which holds the milliseconds, minima and versions. Bold: above its
bar. BERT-base has random weights; at 384 tokens in batches of 8 it ran beside OpenVINO alone.

"""


def table(lines: Iterable[Mapping[str, Any]]) -> str:
    """Return the table of those lines whose case is a model at some size."""
    cells: dict[tuple[str, int, int], dict[str, dict[int, str]]] = {}
    bars: dict[str, float] = {}
    for line in lines:
        case = _CASE.fullmatch(line["case"])
        if case is None:
            continue
        size = (case["model"], int(case["batch"]), int(case["seq"]))
        own = cells.setdefault(size, {}).setdefault(case["form"], {})
        own[line["threads"]] = _cell(line)
        bars[case["form"]] = line["bar"]
    rows = [("model", "batch", "S", *FORMS), ("---",) * (3 + len(FORMS))]
    rows += [("bar", "", "", *(f"{bars[form]:.2f}" if form in bars else "-" for form in FORMS))]
    for size in sorted(cells, key=lambda size: (size[0] != "minilm", *size)):
        found = [cells[size].get(form, {}) for form in FORMS]
        rows += [(*map(str, size), *(" / ".join(own.get(t, "-") for t in (1, 2)) for own in found))]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _cell(line: Mapping[str, Any]) -> str:
    if "failed" in line:
        return "failed"
    ratio = f"{line['median']:.3f}"
    return ratio if line["median"] <= line["bar"] else f"**{ratio}**"


if __name__ == "__main__":
    print(_HEAD + table(json.loads(Path(sys.argv[1]).read_text("utf-8"))), end="")
