"""Activations and co-activation of a whole model, against ONNX Runtime and numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from relax_models import F, example, mlp_weights, random_mlp
from scipy.special import erf

import icd_tvm
from icd_tvm._tvm import tvm
from icd_tvm.core.access_graph import build_w, validate_w
from icd_tvm.errors import ConfigError, NonFiniteError, ShapeError, TransformError
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.inputs import random_inputs
from icd_tvm.models.registry import build
from icd_tvm.relax_passes.collect_activation_stats import CollectActivationStats

CONSUMERS = [f"/encoder/layer.{k}/output/dense/MatMul" for k in (0, 1)]


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return build("bert-mini-random")


@pytest.fixture(scope="module")
def batches(model: onnx.ModelProto) -> list[dict[str, np.ndarray]]:
    imported = import_onnx(model)
    return [random_inputs(imported, seed) for seed in range(4)]


@pytest.fixture(scope="module")
def expected(model: onnx.ModelProto, batches: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What ONNX Runtime feeds each consumer, [samples, units]."""
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    names = {node.name: node.input[0] for node in probed.graph.node if node.name in CONSUMERS}
    for value in names.values():
        probed.graph.output.append(helper.make_tensor_value_info(value, 1, None))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        probed.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    runs = [session.run([names[c] for c in CONSUMERS], feeds) for feeds in batches]
    return {
        name: np.concatenate([run[k].reshape(-1, run[k].shape[-1]) for run in runs])
        for k, name in enumerate(CONSUMERS)
    }


def test_activations_of_hidden_groups_are_those_of_onnxruntime(
    model: onnx.ModelProto, batches: Any, expected: dict[str, np.ndarray]
) -> None:
    found = icd_tvm.collect_activations(model, batches)
    assert list(found) == CONSUMERS
    for name, rows in found.items():
        assert rows.dtype == np.float32
        np.testing.assert_allclose(rows, expected[name], rtol=1e-4, atol=1e-5)


def test_a_sample_is_capped_and_made_of_real_rows(
    model: onnx.ModelProto, batches: Any, expected: dict[str, np.ndarray]
) -> None:
    cfg = {"matmul": CONSUMERS[1], "rows": 20, "seed": 3}
    rows = icd_tvm.collect_activations(model, batches, cfg)[CONSUMERS[1]]
    assert rows.shape == (20, expected[CONSUMERS[1]].shape[1])
    gaps = np.abs(rows[:, None] - expected[CONSUMERS[1]]).max(axis=2)
    places = gaps.argmin(axis=1)
    assert gaps.min(axis=1).max() < 1e-4
    assert len(set(places)) == 20
    # The same five places of every batch, and not merely the first ones.
    np.testing.assert_array_equal(places % 16, np.tile(places[:5], 4))
    assert places[:5].tolist() != list(range(5))


def test_correlations_are_those_of_numpy(
    model: onnx.ModelProto, batches: Any, expected: dict[str, np.ndarray]
) -> None:
    matrix, meta = icd_tvm.collect_correlations(model, batches, {"neighbours": 6})
    validate_w(matrix)
    assert meta["units"] == matrix.shape[0] == 512
    assert meta["neighbours"] == 6
    for name, axis in meta["axes"].items():
        part = matrix[axis["start"] : axis["stop"], axis["start"] : axis["stop"]]
        exact = np.abs(np.corrcoef(expected[name].T))
        rows = np.repeat(np.arange(part.shape[0]), np.diff(part.indptr))
        np.testing.assert_allclose(part.data, exact[rows, part.indices], atol=2e-3)
        assert part.nnz >= 6 * part.shape[0]
        assert axis["samples"] == len(expected[name])
    # No edge leaves its axis, so communities never cross from one to another.
    assert matrix[:256, 256:].nnz == 0
    labels = icd_tvm.cluster_graph(matrix, {"seed": 1})
    assert not set(labels[:256]) & set(labels[256:])


def test_trace_w_of_activations_is_the_correlation_graph(model: Any, batches: Any) -> None:
    cfg = {"matmul": CONSUMERS[0]}
    rows = icd_tvm.collect_activations(model, batches, cfg)[CONSUMERS[0]]
    graph = build_w("trace", activations=rows, correlation={"neighbours": 6})
    imported = import_onnx(model)
    matrix, _ = icd_tvm.collect_correlations(imported, batches, {**cfg, "neighbours": 6})
    assert (graph != matrix).nnz == 0
    capped = build_w("trace", activations=rows, correlation={"neighbours": 6}, nnz_cap=300)
    validate_w(capped)
    assert 0 < capped.nnz <= 300
    with pytest.raises(ConfigError, match="does not go with activations"):
        build_w("trace", activations=rows, n=256)
    with pytest.raises(ConfigError, match="unknown key"):
        build_w("trace", activations=rows, correlation={"near": 6})


def test_files_and_modules_are_models_too(
    model: onnx.ModelProto, batches: Any, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    cfg = {"matmul": CONSUMERS[0], "rows": 8}
    imported = import_onnx(model)
    first, second = (
        icd_tvm.collect_activations(source, batches[0], cfg)[CONSUMERS[0]]
        for source in (str(path), imported.mod)
    )
    np.testing.assert_array_equal(first, second)


def test_rows_of_a_module_are_the_hidden_layer() -> None:
    mod, x = random_mlp(), example(rows=8)
    rows = icd_tvm.collect_activations(mod, {"x": x})["fc2"]
    w1, b1, _ = mlp_weights()
    hidden = x.reshape(-1, x.shape[-1]) @ w1 + b1
    np.testing.assert_allclose(rows, hidden * (1 + erf(hidden / np.sqrt(2))) / 2, atol=1e-4)
    assert rows.shape[1] == F


def test_bad_requests_are_refused(model: Any, batches: Any) -> None:
    for cfg in ({"rows": 0}, {"rows": "all"}, {"near": 3}, {"matmul": []}):
        with pytest.raises(ConfigError):
            icd_tvm.collect_activations(model, batches, cfg)
    with pytest.raises(ConfigError, match="unknown key"):
        icd_tvm.collect_correlations(model, batches[0], {"near": 3})
    with pytest.raises(ConfigError, match="no inputs"):
        icd_tvm.collect_activations(model, [])
    with pytest.raises(TransformError, match="no matmul named"):
        icd_tvm.collect_activations(model, batches, {"matmul": "/Sub"})
    with pytest.raises(ShapeError, match="missing"):
        icd_tvm.collect_activations(model, {})
    with pytest.raises(ShapeError, match="missing or unknown"):
        icd_tvm.collect_activations(random_mlp(), {"y": example()})
    with pytest.raises(ConfigError, match="row_cap"):
        CollectActivationStats({"fc1": "rows"}, row_cap=0)


def test_a_model_without_hidden_units_needs_a_name() -> None:
    x = helper.make_tensor_value_info("x", 1, [4, 8])
    y = helper.make_tensor_value_info("y", 1, [4, 8])
    weight = onnx.numpy_helper.from_array(np.eye(8, dtype=np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="only")
    graph = helper.make_graph([node], "g", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    feeds = {"x": np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)}
    with pytest.raises(ConfigError, match="no hidden units"):
        icd_tvm.collect_activations(model, feeds)
    found = icd_tvm.collect_activations(model, feeds, {"matmul": "only"})
    np.testing.assert_array_equal(found["only"], feeds["x"])
    with pytest.raises(NonFiniteError):
        icd_tvm.collect_activations(model, {"x": feeds["x"] * np.nan})


def test_the_pass_leaves_the_module_alone() -> None:
    mod = random_mlp()
    before = tvm.ir.save_json(mod)
    CollectActivationStats({"fc2": "rows"}, row_cap=2)(mod)
    assert tvm.ir.save_json(mod) == before
