"""The HTML report: what it says about a record, and that it says nothing else."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_pages import Page, empty_record, full_record, record

from icd_tvm.commands import report as command
from icd_tvm.errors import ConfigError, MeasurementError, OutputError
from icd_tvm.measure.metrics import validate_metrics
from icd_tvm.report.comparison import compare
from icd_tvm.report.page import render, write_page
from icd_tvm.report.values import as_number, binary, clip, fixed, si, text

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</title></svg></table>",
    "$\\frac{1}{0}$ and {{ 7 * 7 }}",
    "--><!-- ]]>",
    'id="x" url(#x) #010101',
    "\u202egnp.exe",
    "lone \ud800 half",
    "模型 \x00\x1b[31m",
]


def complete(html: str) -> Page:
    """Return the page after the checks that every page must pass."""
    page = Page(html)
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    links = [*page.attributes("href"), *page.attributes("xlink:href"), *page.attributes("src")]
    for link in links:
        assert link.startswith("data:") or link[1:] in ids, link
    assert all("scope" in cell for cell in page.having("th"))
    assert len(page.having("title")) == 1 + len(page.having("svg"))
    assert all(label in ids for label in page.attributes("aria-labelledby"))
    assert "://" not in page.texts["style"][0] + page.texts["script"][0]
    assert len(page.having("script")) == 1
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    levels = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    return page


@pytest.fixture(scope="module")
def unit() -> Page:
    return complete(render(record()))


def test_verdict_and_gates(unit: Page) -> None:
    assert unit.texts["h1"] == ["minilm"]
    assert unit.texts["h2"][0] == "Accepted: iterative"
    gates = [" ".join(item.split()) for item in unit.texts["li"]]
    assert gates == [
        "Latency fail 17.7 % 95 % interval 17.6 to 17.8 % asked: at least 20 % less time "
        "17.7 % less time, at least 17.6 % with 95 % confidence",
        "L2 hit rate not measured asked: at least 10 points more "
        "no hardware counter was read on this target",
        "Energy not measured asked: at least 15 % less energy per token "
        "no hardware counter was read on this target",
        "Quality not measured asked: at most 0.1 points of change no evaluation was asked for",
    ]
    assert [item["class"] for item in unit.having("li")] == ["fail", *["unknown"] * 3]


def test_arms_and_what_each_step_gains(unit: Page) -> None:
    arms = {row["arm"]: row for row in unit.table("Every arm")}
    assert list(arms) == ["dense", "identity", "random", "linear", "iterative", "onnxruntime"]
    assert arms["iterative"]["median ms"] == "8.877"
    assert arms["iterative"]["/ onnxruntime"] == "0.515"
    assert arms["linear"]["flags"] == "same as identity"
    assert "L2 hit %" not in arms["dense"]
    ratios = {row["ratio"]: row for row in unit.table("Ratios between arms")}
    assert ratios["iterative/linear"]["95 % interval"] == "[0.822, 0.824]"
    steps = {row["step"]: row for row in unit.table("Where the time goes")}
    assert steps["order decided again after it"]["ms saved"] == "1.910"
    assert steps["order decided again after it"]["time ratio"] == "0.823 [0.822, 0.824]"
    assert steps["order decided before the transform"]["ms saved"] == "−0.005"
    # The steps add up to the whole.
    saved = [float(row["ms saved"].replace("−", "-")) for row in unit.table("Where the time goes")]
    assert sum(saved[1:4]) == pytest.approx(saved[4], abs=2e-3)


def test_kernels_units_and_groups(unit: Page) -> None:
    chosen = {row["matmul"]: row for row in unit.table("Kernel of each matmul")}
    node = "/encoder/layer.1/intermediate/dense/MatMul"
    assert chosen[node]["layer"] == "1"
    assert chosen[node]["linear"] == "vcol8, 378 rows"
    assert "iterative" not in chosen[node]
    assert {row["iterative"] for row in unit.table("Units removed")} == {"768"}
    groups = unit.table("Every group")
    assert len(groups) == 34
    assert {row["kind"] for row in groups} == {"free", "output order", "pinned"}
    pinned = {row["axis"]: row["why"] for row in groups if row["kind"] == "pinned"}
    assert "relax.take at /embeddings/word_embeddings/Gather: indexed by data" in pinned.values()
    assert all(row["why"] != "–" for row in groups if row["U ratio"] == "–")


def test_outputs_in_a_new_order_share_the_row_of_their_matmul() -> None:
    rows = complete(render(record("vec16-0.5-2t"))).table("Kernel of each matmul")
    assert len(rows) == 12
    assert rows[1]["linear"] == "vcol8, 1247 rows"
    assert rows[1]["iterative"] == "vcol8, 768 rows"


def test_everything_missing_is_named(unit: Page) -> None:
    assert dict(zip(unit.texts["dt"], unit.texts["dd"], strict=True)) == {
        "l2_hit_pct": "no hardware counter was read on this target",
        "dram_bytes": "no hardware counter was read on this target",
        "ept_j_per_tok": "no hardware counter was read on this target",
        "quality": "no evaluation was asked for",
        "environment: cpu.governor": "no cpufreq in sysfs (virtual machine or fixed clock)",
        "environment: gpu": "NVML: NVML Shared Library Not Found",
        "environment: energy": "no RAPL counter in /sys/class/powercap",
    }
    said = [line for line in unit.texts["p"] if line.startswith(("Not shown", "Nothing to draw"))]
    assert said == [
        "Not shown: no arm of the record was profiled",
        "Not shown: no arm of the record has a cache model",
        "Not shown: no profile was given to this report",
        "Nothing to draw: no flop of a call and no bytes from memory in "
        "dense, identity, random, linear, iterative, onnxruntime.",
        "Not shown: no access graph was given to this report",
        "Not shown: no masks were given to this report",
        "Not shown: no evaluation was asked for",
        "Not shown: no hardware counter was read on this target",
        "Not shown: no power samples were given to this report",
    ]


def test_a_record_with_every_section() -> None:
    ncu = {"source": "ncu", "kernels": [{"name": "k", "dram__bytes_read.sum": 3e6, "x.pct": None}]}
    power = [{"t": 5 + 0.1 * i, "watts": 70.0 + i % 7} for i in range(1300)]
    page = complete(render(full_record(), power=power, ncu=ncu))
    assert len(page.having("svg", "wide")) == len(page.having("svg", "narrow")) == 5
    totals = page.table("Caches of one run (model)")[0]
    assert totals["L1 (48 KiB) requests"] == "1 k"
    assert totals["L1 hit %"] == "75.00"
    assert totals["from memory"] == "42 MB"
    kernels = page.table("Kernels of dense (model)")
    assert kernels[0]["L2 misses"] == "50"
    assert kernels[-1]["remark"] == "no call"
    assert page.table("Nsight Compute, one run") == [{"kernel": "k", "dram__bytes_read.sum": "3 M"}]
    assert page.table("Task quality")[1]["points against dense"] == "−1.010"
    assert page.table("Every arm")[0]["DRAM"] == "50 MB"
    assert any("writing events took 0.050 % and profiling" in line for line in page.texts["p"])
    assert "Power over time, 70.0 to 76.0 W" in page.texts["title"]


def test_the_emptiest_record() -> None:
    validate_metrics(empty_record())
    page = complete(render(empty_record()))
    assert page.texts["h2"][0] == "Not decided"
    assert "Not shown: no clock" in page.texts["p"]
    assert "Not shown: nothing to compare" in page.texts["p"]
    assert page.having("svg") == []
    assert set(page.tables) == {"Machine and versions"}


def test_a_failed_run_says_where_it_failed() -> None:
    failure = {"stage": "MEASURED", "code": "ICD-E601", "message": "no time"}
    flags = [{"stage": "order", "reason": "the budget ended the search"}]
    page = complete(render({**empty_record(), "failure": failure, "flags": flags}))
    assert page.texts["h2"][0] == "Failed in MEASURED (ICD-E601)"
    assert {"no time", "order: the budget ended the search"} <= set(page.texts["p"])


def test_a_planted_graph_is_called_a_mock() -> None:
    html = render({**empty_record(), "graph_source": "mock"})
    assert "W is a mock" in html
    assert "W is a mock" not in render({**empty_record(), "graph_source": "tir"})


def _rename(value: Any, name: str) -> Any:
    """Put a name at every place where a model file can put one."""
    if isinstance(value, dict):
        return {(f"{name} {k}" if "/" in k else k): _rename(v, name) for k, v in value.items()}
    if isinstance(value, list):
        return [_rename(item, name) for item in value]
    return f"{name} {value}" if isinstance(value, str) else value


@pytest.mark.parametrize("name", HOSTILE)
def test_names_of_a_model_are_text(name: str, tmp_path: Path) -> None:
    hostile = _rename(record(), name)
    hostile["arms"] = {f"{name} {arm}": values for arm, values in hostile["arms"].items()}
    page = complete(render(hostile))
    shown = text(name)
    assert page.texts["h1"] == [f"{shown} minilm"]
    assert page.table("Every arm")[0]["arm"] == f"{shown} dense"
    assert page.having("img") == []
    assert clip(f"{shown} dense", 34) in page.texts["text"]
    path = write_page(tmp_path / "page.html", render(hostile))
    complete(path.read_text("utf-8"))


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["id", "arms", "lat_ms", "median", "U", "x"]), inner)
    ),
    max_leaves=6,
)


FIELDS = [*record(), "energy", "roofline", "flags", "failure", "graph_source"]


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_any_record_gives_a_page(found: dict[str, Any]) -> None:
    complete(render(found))
    complete(compare({"a": found, "b": record("vec16-0.5-1t")}))


def test_equal_input_gives_equal_bytes() -> None:
    assert render(full_record()) == render(full_record())


def test_figures_as_text() -> None:
    assert (fixed(-1234.5, 1), fixed(None, 1), fixed(float("nan"), 1)) == ("−1,234.5", "–", "–")
    assert (si(1.5e9, "B"), si(999), si(0.25), si("x")) == ("1.5 GB", "999", "0.25", "–")
    assert (binary(49152), binary(3 << 20)) == ("48 KiB", "3 MiB")
    assert (as_number(True), as_number(10**400), as_number(3)) == (None, None, 3.0)
    assert clip("/encoder/layer.0/dense/MatMul", 11) == "/enco…atMul"
    assert text({"a": [1, None], "b": True}) == "a 1, –, b yes"


def test_compare() -> None:
    runs = {"one": record(), "two <b>": record("vec16-0.5-2t"), "none": empty_record()}
    page = complete(compare(runs))
    verdicts = page.table("Decision of each run")
    assert [row["gates"] for row in verdicts] == [*["1 fail, 3 not measured"] * 2, "no gates"]
    assert page.table("Gates")[1]["Latency"] == "fail 18.4 %"
    ratio = page.table("Ratios")[0]
    assert ratio["two <b>"] == "0.816 [0.815, 0.819]"
    assert ratio["none"] == "–"
    assert len(page.having("svg", "wide")) == 3
    differences = {row["key"]: row for row in page.table("What differs between the runs")}
    assert differences["env.threads.TVM_NUM_THREADS"]["one"] == "1"
    assert differences["env.threads.TVM_NUM_THREADS"]["two <b>"] == "2"
    assert "env.hash" not in differences
    assert any("differ in their model" in line for line in page.texts["p"])


def test_runs_that_are_the_same_have_no_differences() -> None:
    page = complete(compare({"a": record(), "b": record()}))
    assert "Model, target, transform and environment are the same." in page.texts["p"]


def _run(*arguments: str) -> None:
    command.run(command.parser().parse_args(arguments))


def _stored(folder: Path, found: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(found))
    return folder


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = (_stored(tmp_path / name, record()) for name in ("one", "two"))
    _run(str(one))
    assert complete((one / "report.html").read_text("utf-8")).texts["h1"] == ["minilm"]
    assert capsys.readouterr().out == f"wrote {one / 'report.html'}\n"
    _run(str(one / "metrics.json"), "-o", "given.html")
    assert Path("given.html").exists()
    _run(str(one), str(two))
    assert complete(Path("comparison.html").read_text("utf-8")).texts["h1"] == [
        "Comparison of 2 runs"
    ]
    again = _stored(tmp_path / "other" / "one", record())
    _run(str(one), str(again), "-o", "same.html")
    rows = Page(Path("same.html").read_text("utf-8")).table("Decision of each run")
    assert [row["run"] for row in rows] == [f"1 {one}", f"2 {again}"]


def test_command_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="required: RUN"):
        _run()
    with pytest.raises(MeasurementError, match=r"cannot read .*metrics\.json.*run icd run first"):
        _run(str(tmp_path))
    inside = _stored(tmp_path / "pair" / "linear", record())
    with pytest.raises(MeasurementError, match=f"there is one in {inside}"):
        _run(str(inside.parent))
    with pytest.raises(OutputError, match="missing or read-only"):
        _run(str(inside), "-o", str(tmp_path / "no" / "page.html"))
    for content, reason in (("{", "not JSON"), ("[]", "no metrics record"), ("{}", "missing")):
        (inside / "metrics.json").write_text(content)
        with pytest.raises(MeasurementError, match=reason):
            _run(str(inside))


def test_timed_kernels_are_laid_out_by_layer_and_by_kernel() -> None:
    def kernel(node: str, us: float, **more: Any) -> dict[str, Any]:
        known = {"kernel": "k", "node": node, "weights": [], "groups": [], "flop": 6000}
        return {**known, "us": 2 * us, "us_min": us, "bytes": 2000, **more}

    found = copy.deepcopy(record("vec16-0.5-2t"))
    kernels = [
        kernel("lv4", 1.0, weights=["encoder.layer.10.output.dense.weight"]),
        kernel("/encoder/layer.2/Add", 3.0, groups=["/encoder/layer.2/MatMul:2"]),
        kernel("lv5", 2.0, groups=["/encoder/layer.2/MatMul:2"], flop=None),
        kernel("/embeddings/Gather", 4.0),
    ]
    found["arms"]["linear"]["kernel_times"] = {"kernels": kernels}
    page = complete(render(found))
    layers = page.table("Least time of each layer, µs (profiled run)")
    assert [(row["layer"], row["linear"]) for row in layers] == [
        ("2", "5.00"),
        ("10", "1.00"),
        ("outside the layers", "4.00"),
        ("all kernels", "10.00"),
    ]
    first, _, third, _ = page.table("Kernels of linear (profiled run)")
    assert (first["least µs"], first["share %"], first["median"]) == ("1.00", "10.0", "2.00")
    assert (first["flop / s"], first["flop / byte"]) == ("6 G", "3.00")
    assert (third["layer"], third["flop / s"]) == ("2", "–")


def test_an_arm_with_counted_operations_is_drawn_under_the_roof() -> None:
    found = copy.deepcopy(record("vec16-0.5-2t"))
    found["arms"]["linear"] |= {"flop": 2e9, "least_bytes": 4e7}
    found["roofline"] = {"peak_flops": 1e11, "dram_bandwidth": 1e10, "source": "measured, fp32"}
    page = render(found)
    assert "Roofline: linear 50 flop/byte" in page
    assert "Roof: measured, fp32." in page
