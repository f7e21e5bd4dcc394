"""The report in a real browser: no complaints, charts drawn, tables sorted by a click."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from report_pages import full_record, record

from icd_tvm.core.access_graph import mock_w
from icd_tvm.core.permutation import identity
from icd_tvm.report.comparison import compare
from icd_tvm.report.page import render, write_page
from icd_tvm.report.run_files import AxisGraph

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
DARK = "--blink-settings=preferredColorScheme=0"

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed")

DRIVER = """<script>
const found = {};
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead button").forEach((button, column) => {
    const read = () => Array.from(table.tBodies[0].rows, (row) => {
      const cell = row.cells[column];
      return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
    });
    const name = table.caption.textContent + ": " + button.textContent;
    const before = read();
    button.click();
    const up = read();
    const aria = button.parentElement.getAttribute("aria-sort");
    button.click();
    const down = read();
    found[name] = {before, up, down, aria, after: button.parentElement.getAttribute("aria-sort")};
  });
}
const charts = Array.from(document.querySelectorAll("figure svg"), (svg) => {
  const box = svg.getBoundingClientRect();
  const outside = Array.from(svg.querySelectorAll("text")).filter((text) => {
    const inner = text.getBoundingClientRect();
    return inner.left < box.left - 1 || inner.right > box.right + 1;
  });
  return {width: box.width, height: box.height, outside: outside.map((t) => t.textContent)};
});
const page = document.documentElement;
const result = document.createElement("pre");
result.id = "result";
result.textContent = JSON.stringify({found, charts, scroll: page.scrollWidth - page.clientWidth});
document.body.append(result);
</script>"""


def chromium(page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Open a page without a window."""
    profile = page.with_suffix(".profile")
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    more = ["--enable-logging=stderr", "--virtual-time-budget=2000", f"--user-data-dir={profile}"]
    line = [str(BROWSER), *fixed, *more, *flags, page.as_uri()]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=True)


def complaints(run: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in run.stderr.splitlines() if "CONSOLE" in line]


def driven(page: Path, *flags: str) -> dict[str, Any]:
    """Click every header, and return what came of it."""
    run = chromium(page, "--dump-dom", *flags)
    assert complaints(run) == []
    result = re.search(r'<pre id="result">(.*?)</pre>', run.stdout, re.S)
    assert result is not None
    found: dict[str, Any] = json.loads(html.unescape(result[1]))
    return found


@pytest.fixture(scope="module")
def page() -> str:
    w = mock_w(96, 6, 0.04, 0.1, 0)
    orders = {"as it comes": identity(96), "re-permuted": identity(96)[::-1].copy()}
    power = [{"t": 0.1 * i, "watts": 70.0 + i % 5} for i in range(50)]
    return render(full_record(), graphs=[AxisGraph("axis", w, orders, "mock")], power=power)


def _copy(path: Path, page: str, script: str = DRIVER) -> Path:
    return write_page(path, page.replace("</body>", f"{script}\n</body>"))


def test_charts_and_sorting(tmp_path: Path, page: str) -> None:
    result = driven(_copy(tmp_path / "page.html", page), "--window-size=1200,900")
    assert result["scroll"] <= 0
    shown = [chart for chart in result["charts"] if chart["width"] > 0]
    # One of each pair is for phones.
    assert len(result["charts"]) == 11
    assert len(shown) == 6
    assert all(chart["height"] > 50 and chart["outside"] == [] for chart in shown)
    for name, sort in result["found"].items():
        assert (sort["aria"], sort["after"]) == ("ascending", "descending"), name
        assert sorted(map(str, sort["up"])) == sorted(map(str, sort["before"])), name
        numbers = [value for value in sort["up"] if not isinstance(value, str)]
        assert numbers == sorted(numbers), name
        numbers = [value for value in sort["down"] if not isinstance(value, str)]
        assert numbers == sorted(numbers, reverse=True), name
    medians = result["found"]["Every arm: median ms"]
    assert medians["up"] != medians["before"]
    # What is absent stays last, whichever way the rest is sorted.
    ratios = result["found"]["Every group: U ratio"]
    assert ratios["up"][-1] == ratios["down"][-1] == "–"
    assert isinstance(ratios["down"][0], float | int)
    assert result["found"]["Every arm: arm"]["up"][0] == "dense"


def test_a_phone_needs_no_sideways_scrolling(tmp_path: Path, page: str) -> None:
    inner = html.escape(page.replace("</body>", f"{DRIVER}\n</body>"))
    relay = """<script>onload = () => {
      const inside = document.querySelector("iframe").contentDocument;
      document.body.append(inside.getElementById("result"));
    };</script>"""
    frame = f'<iframe srcdoc="{inner}" style="width:390px;height:4000px;border:0"></iframe>'
    outer = f'<!DOCTYPE html><title>x</title><link rel="icon" href="data:,">{frame}{relay}'
    result = driven(write_page(tmp_path / "phone.html", outer))
    assert result["scroll"] <= 0
    shown = [chart for chart in result["charts"] if chart["width"] > 0]
    assert len(shown) == 6
    assert all(chart["width"] <= 390 and chart["outside"] == [] for chart in shown)


def test_a_complaint_would_be_seen(tmp_path: Path, page: str) -> None:
    broken = _copy(tmp_path / "broken.html", page, "<script>missing.call()</script>")
    assert complaints(chromium(broken, "--dump-dom")) != []


def test_screenshots(tmp_path: Path, page: str) -> None:
    runs = {"unit": record(), "vec16": record("vec16-0.5-2t")}
    pages = {
        "report-light": (page, ()),
        "report-dark": (page, (DARK,)),
        "comparison": (compare(runs), ()),
    }
    sizes = []
    for name, (content, flags) in pages.items():
        picture = tmp_path / f"{name}.png"
        file = write_page(tmp_path / f"{name}.html", content)
        run = chromium(file, f"--screenshot={picture}", "--window-size=1200,2400", *flags)
        assert complaints(run) == []
        sizes.append(picture.stat().st_size)
        if os.environ.get("ICD_TEST_ARTIFACTS"):
            folder = Path(os.environ["ICD_TEST_ARTIFACTS"])
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, folder)
    assert min(sizes) > 20_000
    light, dark = ((tmp_path / f"report-{theme}.png").read_bytes() for theme in ("light", "dark"))
    assert light != dark
