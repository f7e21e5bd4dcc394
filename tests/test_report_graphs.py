"""What the report shows of a run folder: heat maps, roofline, and files that are damaged."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from matplotlib.image import imread
from report_pages import Page, full_record, record

from icd_tvm.core.access_graph import mock_w, save_w
from icd_tvm.core.permutation import identity
from icd_tvm.report import heat_map, roofline
from icd_tvm.report.page import render, write_report
from icd_tvm.report.run_files import AxisGraph, read_run


def _scattered(n: int, blocks: int, seed: int) -> tuple[sp.csr_matrix, np.ndarray]:
    """Return blocks on the diagonal, scattered, and the order that gathers them again."""
    rng = np.random.default_rng(seed)
    size = n // blocks
    whole = np.kron(np.eye(blocks), np.ones((size, size))) - np.eye(n)
    scatter = rng.permutation(n)
    perm = np.argsort(scatter).astype(np.int32)
    return sp.csr_matrix(whole[np.ix_(scatter, scatter)].astype(np.float32)), perm


@pytest.mark.parametrize(("n", "pixels"), [(7, 7), (7, 3), (40, 16), (5, 256), (100, 33)])
def test_downsample_is_the_mean_under_each_pixel(n: int, pixels: int) -> None:
    rng = np.random.default_rng(n)
    w = sp.random(n, n, 0.3, format="csr", dtype=np.float32, random_state=0)
    perm = rng.permutation(n).astype(np.int32)
    k = min(n, pixels)
    bins = [np.flatnonzero(np.arange(n) * k // n == i) for i in range(k)]
    moved = w.toarray()[np.ix_(perm, perm)]
    expected = [[moved[np.ix_(rows, columns)].mean() for columns in bins] for rows in bins]
    np.testing.assert_allclose(heat_map.downsample(w, perm, pixels), expected, rtol=1e-5)


@pytest.mark.parametrize(("n", "tile"), [(32, 16), (37, 16), (10, 3), (5, 8)])
def test_occupancy_is_the_share_of_non_zeros(n: int, tile: int) -> None:
    w = sp.random(n, n, 0.1, format="csr", dtype=np.float32, random_state=1)
    perm = np.random.default_rng(n).permutation(n).astype(np.int32)
    moved = w.toarray()[np.ix_(perm, perm)] != 0
    expected = [
        [moved[i : i + tile, j : j + tile].mean() for j in range(0, n, tile)]
        for i in range(0, n, tile)
    ]
    np.testing.assert_allclose(heat_map.occupancy(w, perm, tile), expected)


def test_an_order_that_gathers_blocks_empties_tiles() -> None:
    w, perm = _scattered(128, 8, 0)
    orders = {"as it comes": identity(128), "re-permuted": perm}
    (picture,), left_out = heat_map.heat_maps([AxisGraph("axis", w, orders, "tir")])
    assert picture.occupied["re-permuted"] == 1 / 8
    assert picture.occupied["as it comes"] > 0.9
    assert left_out == 0
    page = Page(str(picture.svg))
    assert sorted(page.texts["text"]) == ["W", "as it comes", "re-permuted", "tiles"]
    images = [_decoded(attrs["xlink:href"]) for attrs in page.having("image")]
    assert sorted(image.shape for image in images) == [(8, 8, 4)] * 2 + [(128, 128, 4)] * 2
    # After the order, the tiles that hold something are those of the diagonal.
    gathered = [image[..., 3] > 0 for image in images if image.shape[0] == 8]
    assert any(np.array_equal(shown, np.eye(8, dtype=bool)) for shown in gathered)


def _decoded(link: str) -> np.ndarray:
    return imread(io.BytesIO(base64.b64decode(link.partition(",")[2])))


def test_pictures_are_few_and_small() -> None:
    n = 700
    rng = np.random.default_rng(0)
    w = sp.random(n, n, 0.05, format="csr", dtype=np.float32, random_state=0)
    graphs = [
        AxisGraph(f"axis {i}", w, {"a": identity(n), "b": rng.permutation(n)}, "tir")
        for i in range(heat_map.MAX_AXES + 2)
    ]
    html = render(record(), graphs=graphs)
    assert len(Page(html).having("svg", "map")) == heat_map.MAX_AXES
    assert "2 more axes are not shown." in html
    assert len(html) < 3 << 20
    assert heat_map._tile(5000) == 32


def test_roofline_marks_what_is_a_model() -> None:
    found = full_record()
    del found["arms"]["random"]["cache_model"]
    found["arms"]["linear"]["flop"] = None
    points, missing = roofline.points(found)
    sources = {point.name: point.source for point in points}
    assert sources == {
        "dense": "measured", "identity": "model", "iterative": "model", "onnxruntime": "model",
    }  # fmt: skip
    assert missing == {"no bytes from memory": ["random"], "no flop of a call": ["linear"]}
    assert points[0].intensity == pytest.approx(2.8e9 / 5e7)
    assert points[0].rate == pytest.approx(2.8e9 / 12.613938e-3)
    text = Page(render(found)).texts
    assert any("Roof: planted." in " ".join(line.split()) for line in text["figcaption"])
    assert "dense" in text["text"]


def test_roofline_without_limits_has_no_roof() -> None:
    found = full_record()
    found["roofline"] = {"points": [{"name": "k", "flop": 1e9, "bytes": 1e6, "seconds": 0.01}]}
    assert roofline.roof(found) is None
    assert next(point.name for point in roofline.points(found)[0]) == "k"
    assert "so there is no roof" in render(found)


def _folder(root: Path) -> Path:
    """Write a run folder with two axes; the transform left its own W."""
    graphs = {"first": mock_w(64, 4, 0.04, 0.1, 0), "second": mock_w(32, 4, 0.04, 0.1, 1)}
    whole = sp.csr_matrix(sp.block_diag(list(graphs.values()), format="csr"), dtype=np.float32)
    save_w(root / "W_after.npz", whole, "tir")
    save_w(root / "W.npz", sp.csr_matrix((96, 96), dtype=np.float32), "tir")
    rows = {"first": [0, 64], "second": [64, 96]}
    events = [
        {"stage": "W_BUILT", "t_start": 1.0, "t_end": 1.5, "ok": True, "meta": {"rows": rows}},
        {"stage": "REPERMUTED", "t_start": 2.0, "t_end": 4.0, "ok": True, "meta": {"rows": rows}},
    ]
    lines = [json.dumps(event) for event in events]
    (root / "events.jsonl").write_text("\n".join([*lines, '{"stage": "MEAS']))
    orders = {
        "before": [{"group": "second", "perm": list(range(32))}],
        "after": [{"group": "first", "perm": list(range(63, -1, -1))}],
    }
    (root / "perm.json").write_text(json.dumps({"orders": orders}))
    (root / "metrics.json").write_text(json.dumps(record()))
    (root / "power.csv").write_text("t,watts,sm_mhz\n0.0,70.5,\n0.1,71.0,\n0.2,72.0,\n")
    profile = {"source": "ncu", "kernels": [{"name": "k", "gpu__time_duration.sum": 1e-5}]}
    (root / "ncu.json").write_text(json.dumps({"iterative": profile}))
    return root


def test_run_folder(tmp_path: Path) -> None:
    run = read_run(_folder(tmp_path))
    assert run.problems == {}
    # The order of the second axis moves nothing.
    (graph,) = run.graphs
    assert (graph.axis, graph.source, list(graph.orders)) == (
        "first", "tir", ["as it comes", "re-permuted"],
    )  # fmt: skip
    assert graph.w.shape == (64, 64)
    page = Page(write_report(tmp_path).read_text("utf-8"))
    assert len(page.having("svg", "map")) == 1
    events = page.table("Events")
    assert [row["state"] for row in events] == ["W_BUILT", "REPERMUTED"]
    assert events[1]["seconds"] == "2.00"
    assert page.table("Nsight Compute, iterative")[0]["kernel"] == "k"
    assert "Power over time, 70.5 to 72.0 W" in page.texts["title"]


def test_a_single_axis_needs_no_event(tmp_path: Path) -> None:
    _folder(tmp_path)
    (tmp_path / "events.jsonl").unlink()
    (tmp_path / "W_after.npz").unlink()
    save_w(tmp_path / "W.npz", mock_w(64, 4, 0.04, 0.1, 0), "mock", 0)
    (tmp_path / "perm.json").write_text(
        json.dumps({"orders": {"before": [{"group": "only", "perm": list(range(63, -1, -1))}]}})
    )
    run = read_run(tmp_path)
    assert [(g.axis, list(g.orders)) for g in run.graphs] == [
        ("only", ["as it comes", "first order"])
    ]
    assert run.problems == {"events.jsonl": "events.jsonl is not in the run folder"}


def _content(name: str, text: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_text(text)


DAMAGE = {
    "no W": (lambda root: [p.unlink() for p in root.glob("W*")], "W.npz is not in the run folder"),
    "no perm": (lambda root: (root / "perm.json").unlink(), "perm.json is not in the run folder"),
    "broken W": (_content("W_after.npz", "PK"), "W_after.npz: File is not a zip file"),
    "broken perm": (_content("perm.json", "{"), "cannot be read"),
    "no permutation": (
        _content("perm.json", '{"orders": {"after": [{"group": "first", "perm": [0, 0]}]}}'),
        "never names index 1",
    ),
    "no rows": (_content("events.jsonl", ""), "which rows of W_after.npz"),
    "bad rows": (
        _content("events.jsonl", '{"stage": "REPERMUTED", "meta": {"rows": {"first": 3}}}'),
        "cannot be read",
    ),
    "no order": (_content("perm.json", "{}"), "no axis has both"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_graph_is_named(tmp_path: Path, case: str) -> None:
    damage, reason = DAMAGE[case]
    damage(_folder(tmp_path))
    assert reason in read_run(tmp_path).problems["W"]
    page = Page(write_report(tmp_path).read_text("utf-8"))
    assert page.having("svg", "map") == []
    assert any(reason in line for line in page.texts["p"])
    assert any(reason in line for line in page.texts["dd"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("power.csv", "t,watts\n0,abc\n"),
        ("power.csv", "time\n1\n"),
        ("ncu.json", "nonsense"),
    ],
)
def test_a_damaged_counter_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    (_folder(tmp_path) / name).write_text(content)
    run = read_run(tmp_path)
    assert "cannot be read" in run.problems[name]
    assert run.graphs
    assert f"<dt>{name}</dt>" in write_report(tmp_path).read_text("utf-8")
