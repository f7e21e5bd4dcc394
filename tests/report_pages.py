"""Read a report as a browser would, and records to make reports of."""

from __future__ import annotations

import copy
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).resolve().parent / "data" / "records"
VOID = {"meta", "link", "br", "wbr", "img", "input", "hr"}
# HTML needs no closing tag of these SVG elements, but theirs are written as <x/>.
SVG_EMPTY = {"path", "use", "rect", "image", "g", "defs"}


class Page(HTMLParser):
    """The elements of a page; raises where tags do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")
        if tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SVG_EMPTY, f"<{tag}/> closes nothing"
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag in ("p", "h3") and "li" in self._open:
            self.texts["li"][-1] += " "
        if tag == "table":
            self.tables[self.texts["caption"][-1].strip()] = self._rows

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.texts[tag][-1] += data
        if self._rows and "tr" in self._open and ("td" in self._open or "th" in self._open):
            self._rows[-1][-1] += data

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] for _, attrs in self.tags if name in attrs]

    def having(self, tag: str, css: str = "") -> list[dict[str, str]]:
        found = [attrs for name, attrs in self.tags if name == tag]
        return [attrs for attrs in found if not css or css in attrs.get("class", "").split()]

    def table(self, caption: str) -> list[dict[str, str]]:
        head, *rows = self.tables[caption]
        return [dict(zip(head, row, strict=True)) for row in rows]


def record(name: str = "unit-0.5-1t") -> dict[str, Any]:
    """Return a real record, kept for the tests: the results in docs change with every benchmark."""
    found: dict[str, Any] = json.loads((RECORDS / f"main-job-{name}.json").read_text())
    return found


def full_record() -> dict[str, Any]:
    """Return a real record with planted figures in every field that it lacks."""
    found = copy.deepcopy(record())
    levels = [{"requests": 1000, "misses": 250}, {"requests": 250, "misses": 50}]
    for index, arm in enumerate(found["arms"].values()):
        kernels = [
            {"kernel": "fused_matmul", "node": f"lv{k}", "levels": levels, "reason": ""}
            for k in range(3)
        ]
        kernels.append({"kernel": "", "node": "gv", "levels": [], "reason": "no call"})
        arm["flop"] = 2.8e9
        arm["cache_model"] = {
            "source": "model",
            "levels": [
                {"name": "L1", "size_bytes": 49152, "hit_pct": 75.0, **levels[0]},
                {"name": "L2", "size_bytes": 1 << 20, "hit_pct": 80.0, **levels[1]},
            ],
            "dram_bytes": 4.2e7 - 4e6 * index,
            "kernels": kernels,
        }
    found["arms"]["dense"] |= {"dram_bytes": 5e7, "source": {"dram_bytes": "measured"}}
    found["roofline"] = {"peak_flops": 2.5e11, "dram_bandwidth": 2e10, "source": "planted"}
    found["quality"] = {
        "metric": "STS-B Spearman",
        "n": 1500,
        "source": "planted",
        "arms": {"dense": 0.8672, "identity": 0.8571, "iterative": 0.8571},
        "delta_points": 0.0,
    }
    found["energy"] = {"iterative": {"source": "planted", "joules_per_call": 0.25}}
    found["overhead"] = {"events_pct": 0.05, "profiling_pct": 1.25}
    return found


def empty_record() -> dict[str, Any]:
    """Return the emptiest record that is valid: nothing was measured, with reasons."""
    return {
        "schema": "icd/metrics/v1",
        "model": "nothing",
        "target": "llvm",
        "env": {},
        "arms": {},
        "ratios": {},
        "equivalence": None,
        "quality": None,
        "groups": [],
        "gates": [],
        "decision": {"accepted": None, "reason": "it stopped early"},
        "not_measured": {
            "lat_ms": "no clock",
            "quality": "no data",
            "equivalence": "nothing to compare",
            "ept_j_per_tok": "no meter",
        },
    }
