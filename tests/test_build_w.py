"""The co-access graph W, its file, and graphs of correlations."""

from __future__ import annotations

import json
import tempfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from icd_tvm.core import access_graph
from icd_tvm.core.access_graph import (
    build_w,
    is_uniform,
    load_w,
    planted_order,
    save_w,
    validate_w,
)
from icd_tvm.core.communities import cluster_graph
from icd_tvm.core.correlation import collect_correlations
from icd_tvm.core.cost import TileAccess, block_labels, modularity
from icd_tvm.errors import ConfigError, IcdError, NonFiniteError, OutputError, ShapeError


def random_access(seed: int, windows: int = 9, n: int = 14, share: float = 0.4) -> TileAccess:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 4, windows).astype(np.float64)
    return TileAccess(sp.csr_matrix(rng.random((windows, n)) < share), 4, 0.5, "x", counts)


def dense_w(accesses: list[TileAccess]) -> np.ndarray:
    total = sum(
        a.incidence.toarray().T.astype(float) @ np.diag(a.unit_weights) @ a.incidence.toarray()
        for a in accesses
    )
    np.fill_diagonal(total, 0.0)
    return total


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.0, 1.0))
def test_tir_w_is_the_weighted_product(seed: int, share: float) -> None:
    accesses = [random_access(seed, share=share), random_access(seed + 1, windows=5)]
    graph = build_w("tir", accesses=accesses)
    np.testing.assert_allclose(graph.toarray(), dense_w(accesses), rtol=1e-6)
    assert graph.dtype == np.float32
    validate_w(graph)


@pytest.mark.parametrize("share", [0.0, 1e9])
def test_blocks_and_both_products_agree(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    accesses = [random_access(1, 40, 30), random_access(2, 20, 30)]
    monkeypatch.setattr(access_graph, "_BLOCK_BYTES", 8 * 30 * 7)
    monkeypatch.setattr(access_graph, "_DENSE_SHARE", share)
    np.testing.assert_allclose(
        build_w("tir", accesses=accesses).toarray(), dense_w(accesses), rtol=1e-6
    )


def test_trace_counts_windows_once() -> None:
    graph = build_w("trace", windows=[7, 7, 7, 9, 9, 4], indices=[0, 1, 1, 1, 0, 2], n=3)
    np.testing.assert_array_equal(graph.toarray(), [[0, 2, 0], [2, 0, 0], [0, 0, 0]])


def test_mock_plants_blocks_and_hides_them() -> None:
    graph = build_w("mock", n=640, blocks=16, density=0.04, noise=0.1, seed=5)
    validate_w(graph)
    assert graph.nnz <= 0.05 * 640**2
    assert modularity(graph, planted_order(640, 5), 16) > 0.8
    assert modularity(graph, np.arange(640), 16) < 0.1
    again = build_w("mock", n=640, blocks=16, density=0.04, noise=0.1, seed=5)
    np.testing.assert_array_equal(graph.data, again.data)
    np.testing.assert_array_equal(graph.indices, again.indices)
    other = build_w("mock", n=640, blocks=16, density=0.04, noise=0.1, seed=6)
    assert other.nnz != graph.nnz or not np.array_equal(other.indices, graph.indices)


def test_mock_block_edges_are_distinct_and_inside() -> None:
    graph = build_w("mock", n=64, blocks=8, density=0.05, noise=0.0, seed=0, shuffle=False)
    assert graph.nnz == 2 * int(0.05 * 64 * 64 / 2)
    label = block_labels(64, 8)
    rows = np.repeat(np.arange(64), np.diff(graph.indptr))
    np.testing.assert_array_equal(label[rows], label[graph.indices])


@pytest.mark.parametrize("how", ["row", "sym"])
def test_normalisation_keeps_the_promises(how: str) -> None:
    raw = dense_w([random_access(3)])
    graph = build_w("tir", accesses=[random_access(3)], normalize=how)
    validate_w(graph)
    degree = raw.sum(axis=1)
    inverse = np.where(degree > 0, 1.0 / np.where(degree > 0, degree, 1), 0)
    if how == "row":
        scaled = inverse[:, None] * raw
        expected = (scaled + scaled.T) / 2
    else:
        expected = np.sqrt(inverse)[:, None] * raw * np.sqrt(inverse)
    np.testing.assert_allclose(graph.toarray(), expected, rtol=1e-5, atol=1e-7)


def test_cap_keeps_the_strongest_edges_symmetrically() -> None:
    full = build_w("tir", accesses=[random_access(4, 60, 20)])
    cut = build_w("tir", accesses=[random_access(4, 60, 20)], nnz_cap=100)
    validate_w(cut)
    assert 0 < cut.nnz <= 100
    kept, lost = cut.toarray(), full.toarray() * (cut.toarray() == 0)
    # Every row keeps at most its five strongest, so nothing lost beats the best edge kept.
    assert kept.max() == full.max()
    np.testing.assert_array_equal(kept[kept > 0], full.toarray()[kept > 0])
    assert np.median(kept[kept > 0]) > np.median(lost[lost > 0])


def test_uniform_w_is_recognised_with_and_without_w() -> None:
    dense = TileAccess(sp.csr_matrix(np.ones((6, 12), dtype=bool)), 4)
    assert is_uniform(accesses=[dense])
    assert is_uniform(build_w("tir", accesses=[dense]))
    assert not is_uniform(accesses=[random_access(0)])
    assert not is_uniform(build_w("tir", accesses=[random_access(0)]))
    assert is_uniform(sp.csr_matrix((5, 5), dtype=np.float32))


BAD_CONFIGS = {
    "source": ("nowhere", {}),
    "key": ("mock", {"sigma": 1}),
    "missing": ("tir", {}),
    "normalize": ("mock", {"normalize": "max"}),
    "cap": ("mock", {"nnz_cap": 0}),
    "density": ("mock", {"density": 0.06}),
    "noise": ("mock", {"noise": -0.1}),
    "blocks": ("mock", {"n": 10, "blocks": 11}),
    "room": ("mock", {"n": 640, "blocks": 64, "density": 0.05}),
    "no events": ("trace", {"windows": np.array([], int), "indices": np.array([], int), "n": 3}),
    "range": ("trace", {"windows": [0, 0], "indices": [0, 3], "n": 3}),
    "negative": ("trace", {"windows": [0, 0], "indices": [0, -1], "n": 3}),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configurations_are_refused(name: str) -> None:
    source, cfg = BAD_CONFIGS[name]
    with pytest.raises(ConfigError):
        build_w(source, **cfg)


def test_bad_events_are_refused() -> None:
    with pytest.raises(ShapeError, match="differ"):
        build_w("trace", windows=[0, 1], indices=[0], n=3)
    with pytest.raises(NonFiniteError):
        build_w("trace", windows=[0.0, np.nan], indices=[0, 1], n=3)
    with pytest.raises(ShapeError, match="integers"):
        build_w("trace", windows=[0.0, 1.0], indices=[0, 1], n=3)


def symmetric(value: float) -> sp.csr_matrix:
    return sp.csr_matrix(np.array([[0.0, value], [value, 0.0]], dtype=np.float32))


@pytest.mark.parametrize(
    ("graph", "error"),
    [
        (symmetric(np.nan), NonFiniteError),
        (symmetric(np.inf), NonFiniteError),
        (symmetric(-1.0), ConfigError),
        (sp.csr_matrix(np.eye(3, dtype=np.float32)), ConfigError),
        (sp.csr_matrix(np.triu(np.ones((3, 3)), 1)), ConfigError),
        (sp.csr_matrix(np.ones((2, 3))), ShapeError),
        (np.zeros((2, 2)), ShapeError),
    ],
)
def test_invalid_w_is_refused(graph: sp.csr_matrix, error: type[IcdError]) -> None:
    with pytest.raises(error):
        validate_w(graph)


def test_file_round_trip_and_meta(tmp_path: Path) -> None:
    graph = build_w("mock", n=320, blocks=8, seed=2)
    save_w(tmp_path / "W.npz", graph, "mock", 2)
    loaded, meta = load_w(tmp_path / "W.npz")
    assert (graph != loaded).nnz == 0
    assert loaded.dtype == np.float32
    assert meta == {
        "shape": [320, 320],
        "format": "csr",
        "nnz": graph.nnz,
        "source": "mock",
        "seed": 2,
    }
    with pytest.raises(OutputError):
        save_w(tmp_path / "absent" / "W.npz", graph, "mock")


def test_broken_files_are_refused(tmp_path: Path) -> None:
    graph = build_w("mock", n=320, blocks=8, seed=2)
    path = tmp_path / "W.npz"
    save_w(path, graph, "mock", 2)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match="cannot read"):
        load_w(path)
    with pytest.raises(ConfigError, match="cannot read"):
        load_w(tmp_path / "absent.npz")
    meta = {"shape": [320, 320], "format": "csr", "nnz": 1, "source": "mock", "seed": 2}
    arrays = {"data": graph.data, "indices": graph.indices, "indptr": graph.indptr}
    np.savez(path, **arrays, meta=np.array(json.dumps(meta)))
    with pytest.raises(ConfigError, match="at most 1028 expected"):
        load_w(path)
    np.savez(path, data=np.array([object()]), meta=np.array("{}"))
    with pytest.raises(ConfigError, match="cannot read"):
        load_w(path)


def saved_w(path: Path, **changes: Any) -> Path:
    """A file of W whose arrays or meta data are changed."""
    graph = symmetric(1.0)
    meta = {"shape": list(graph.shape), "format": "csr", "nnz": graph.nnz, "source": "mock"}
    meta |= {"seed": 0, **changes.pop("meta", {})}
    arrays = {"data": graph.data, "indices": graph.indices, "indptr": graph.indptr}
    np.savez(path, **{**arrays, "meta": np.array(json.dumps(meta)), **changes})
    return path


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": np.array([object()] * 2)}, "bytes|dtype object"),
        ({"data": np.ones(1, np.float32)}, "dtype float32 and shape"),
        ({"data": np.ones((1, 2), np.float32)}, "dtype float32 and shape"),
        ({"indices": np.zeros(2, np.float32)}, "dtype float32"),
        ({"indices": np.array([0, 77], np.int32)}, "indices"),
        ({"meta": {"source": "x" * (1 << 15)}}, "bytes, at most 65536"),
        ({"meta": {"nnz": 1 << 40, "shape": [1 << 20, 1 << 20]}}, "at most"),
        ({"meta": {"nnz": 7}}, "non-zeros"),
        ({"meta": {"nnz": True}}, "meta data"),
        ({"meta": {"shape": [3]}}, "meta data"),
        ({"meta": {"more": 1}}, "meta data"),
        ({"other": np.zeros(1)}, "it holds"),
    ],
)
def test_hostile_files_are_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    path = saved_w(tmp_path / "W.npz", **changes)
    with pytest.raises(ConfigError, match=reason):
        load_w(path)


def test_a_zip_bomb_is_refused_unread(tmp_path: Path) -> None:
    path = saved_w(tmp_path / "W.npz")
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    members["data.npy"] += bytes(64 << 20)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    assert path.stat().st_size < 1 << 17
    tracemalloc.start()
    with pytest.raises(ConfigError, match="bytes, at most"):
        load_w(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_never_give_another_w(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = saved_w(Path(folder) / "W.npz")
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        else:
            del content[place:]
        path.write_bytes(content)
        try:
            graph, meta = load_w(path)
        except IcdError:
            return
    assert (graph != symmetric(1.0)).nnz == 0
    assert meta["nnz"] == graph.nnz


def test_correlations_find_what_moves_together() -> None:
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((400, 6))
    signs = rng.choice([-1.0, 1.0], 30)
    batch = hidden[:, np.arange(30) % 6] * signs + 0.1 * rng.standard_normal((400, 30))
    batch[:, 29] = 7.0
    graph, meta = collect_correlations(batch.astype(np.float32), {"neighbours": 4, "block": 8})
    validate_w(graph)
    assert meta["constant"] == 1
    assert graph[29].nnz == 0
    rows = np.repeat(np.arange(30), np.diff(graph.indptr))
    strong = graph.data > 0.5
    np.testing.assert_array_equal(rows[strong] % 6, graph.indices[strong] % 6)
    exact = np.abs(np.corrcoef(batch[:, :29].T))
    np.testing.assert_allclose(graph.data, exact[rows, graph.indices], rtol=1e-3, atol=1e-4)
    halves, _ = collect_correlations(
        [batch[:200].reshape(2, 100, 30), batch[200:]], {"neighbours": 4}
    )
    np.testing.assert_allclose(halves.toarray(), graph.toarray(), atol=1e-5)


def test_bad_activations_are_refused() -> None:
    good = np.ones((4, 3), dtype=np.float32)
    with pytest.raises(NonFiniteError):
        collect_correlations(np.full((4, 3), np.nan))
    for bad in (np.ones(4), np.ones((1, 3)), [good, np.ones((4, 2))], []):
        with pytest.raises(ShapeError):
            collect_correlations(bad)
    for cfg in ({"neighbors": 3}, {"neighbours": 0}, {"threshold": 2.0}):
        with pytest.raises(ConfigError):
            collect_correlations(good, cfg)


@pytest.mark.parametrize("method", ["louvain", "leiden"])
def test_communities_are_the_planted_blocks(method: str) -> None:
    pytest.importorskip("sknetwork")
    graph = build_w("mock", n=640, blocks=16, density=0.04, noise=0.1, seed=1)
    labels = cluster_graph(graph, {"method": method, "seed": 3})
    truth = block_labels(640, 16)
    found = labels[planted_order(640, 1)]
    assert len(np.unique(found)) == len({(a, b) for a, b in zip(found, truth, strict=True)}) == 16
    np.testing.assert_array_equal(labels, cluster_graph(graph, {"method": method, "seed": 3}))


def test_bad_cluster_requests_are_refused() -> None:
    graph = symmetric(1.0)
    for cfg in ({"method": "metis"}, {"resolution": 0.0}, {"rng": 1}):
        with pytest.raises(ConfigError):
            cluster_graph(graph, cfg)
    with pytest.raises(NonFiniteError):
        cluster_graph(symmetric(np.nan))
    with pytest.raises(ConfigError):
        cluster_graph(symmetric(-1.0))
    with pytest.raises(ShapeError):
        cluster_graph(sp.csr_matrix(np.ones((2, 3))))
    np.testing.assert_array_equal(cluster_graph(sp.csr_matrix((3, 3))), [0, 1, 2])
