"""The whole command line on a miniature BERT, and one clear line for every bad input."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from icd_tvm.compile import main
from icd_tvm.measure.metrics import validate_metrics
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.inputs import random_inputs
from icd_tvm.models.registry import build

FAST = ["--repeats", "30", "--threads", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "mini.onnx"
    onnx.save(build("bert-mini-random"), path)
    return path


def _metrics(folder: Path) -> dict[str, Any]:
    record = json.loads((folder / "metrics.json").read_text())
    validate_metrics(record)
    return record


@pytest.mark.parametrize("sparsity", ["unit:0.5", "vec16:0.5"])
def test_main_job(model: Path, tmp_path: Path, sparsity: str) -> None:
    arguments = [str(model), "--sparsity", sparsity, "--out", str(tmp_path / "run"), *FAST]
    assert main(arguments) == 0
    record = _metrics(tmp_path / "run")
    assert set(record["arms"]) == {"dense", "identity", "random", "linear", "iterative"}
    assert record["equivalence"]["max_rel"] <= 1e-4
    hidden = [g for g in record["groups"] if g.get("improved") and g["kind"] == "free"]
    assert [g["size"] for g in hidden] == [256, 256]
    assert all(g["U"]["after"] <= 0.6 * g["U"]["before"] for g in hidden)
    assert any(g["kind"] == "pinned" and "output" in g["reason"] for g in record["groups"])
    assert record["not_measured"]["ept_j_per_tok"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.json"]


def test_incoming_structure_is_used_without_a_flag(tmp_path: Path) -> None:
    proto = build("bert-mini-random")
    dead = np.random.default_rng(0).permutation(256)[:128]
    for tensor in proto.graph.initializer:
        if tensor.name.endswith(("intermediate.dense.weight", "intermediate.dense.bias")):
            array = numpy_helper.to_array(tensor).copy()
            array[..., dead] = 0
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    path = tmp_path / "pruned.onnx"
    onnx.save(proto, path)
    assert main([str(path), "--out", str(tmp_path / "run"), *FAST]) == 0
    record = _metrics(tmp_path / "run")
    assert sum(record["arms"]["iterative"]["removed_units"].values()) == 256


def test_dense_model_has_no_opportunity(model: Path, tmp_path: Path) -> None:
    assert main([str(model), "--out", str(tmp_path), *FAST]) == 0
    record = _metrics(tmp_path)
    decision = record["decision"]
    assert set(record["arms"]) == {"dense", "linear"}
    assert record["arms"]["linear"]["same_module_as"] == "dense"
    assert decision["accepted"] is False
    assert decision["reason"].startswith("no opportunity")


def test_library_runs_and_equals_the_reference(model: Path, tmp_path: Path) -> None:
    library = tmp_path / "lib.so"
    assert main([str(model), "-o", str(library), "--no-measure", "--threads", "1"]) == 0
    from icd_tvm._tvm import relax, tvm

    imported = import_onnx(str(model))
    feeds = random_inputs(imported)
    main_function = relax.VirtualMachine(tvm.runtime.load_module(str(library)), tvm.cpu())["main"]
    found = main_function(*(tvm.runtime.tensor(array) for array in feeds.values())).numpy()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(found, session.run(None, feeds)[0], rtol=1e-4, atol=1e-4)


def test_unmeasured_is_never_accepted(model: Path, tmp_path: Path) -> None:
    arguments = [str(model), "--sparsity", "unit:0.5", "--no-measure", "--out", str(tmp_path)]
    assert main(arguments) == 0
    record = _metrics(tmp_path)
    assert record["decision"]["accepted"] is None
    assert record["arms"] == {}
    assert record["not_measured"]["lat_ms"] == "--no-measure"


def test_linear_mode_builds_no_iterative_arm(model: Path, tmp_path: Path) -> None:
    arguments = [str(model), "--sparsity", "unit:0.5", "--mode", "linear", "--out", str(tmp_path)]
    assert main([*arguments, *FAST]) == 0
    record = _metrics(tmp_path)
    assert "iterative" not in record["arms"]
    assert record["decision"]["arm"] == "linear"


def test_explain_prints_groups(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(model), "--explain", "--no-measure"]) == 0
    text = capsys.readouterr().out
    assert "encoder.layer.0.intermediate.dense.weight" in text
    assert "PINNED" in text


# Bad input: status 2, one line with the code, nothing left behind.


def _refused(arguments: list[str], code: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error ")]
    assert len(lines) == 1
    assert lines[0].startswith(f"error {code}: ")
    assert "Traceback" not in captured.err
    return lines[0]


def test_missing_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert "absent.onnx" in _refused(["absent.onnx"], "ICD-E101", capsys)


def test_truncated_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cut.onnx"
    path.write_bytes(model.read_bytes()[:5000])
    _refused([str(path)], "ICD-E101", capsys)


def test_not_onnx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "noise.onnx"
    path.write_bytes(np.random.default_rng(0).bytes(4096))
    _refused([str(path), "--out", str(tmp_path / "run")], "ICD-E101", capsys)
    assert not (tmp_path / "run").exists()


def test_unsupported_op(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xy"]
    node = helper.make_node("NoSuchOp", ["x"], ["y"], name="strange", domain="com.example")
    graph = helper.make_graph([node], "g", value[:1], value[1:])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)]
    path = tmp_path / "op.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    line = _refused([str(path)], "ICD-E102", capsys)
    assert "NoSuchOp" in line
    assert "strange" in line


def test_dynamic_dimension(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "dynamic.onnx"
    onnx.save(build("bert-mini-random", seq="seq"), path)
    assert "--shape" in _refused([str(path)], "ICD-E103", capsys)


def test_nan_weight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proto = build("bert-mini-random")
    tensor = next(t for t in proto.graph.initializer if t.name.endswith("0.output.dense.weight"))
    array = numpy_helper.to_array(tensor).copy()
    array[3, 4] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    path = tmp_path / "nan.onnx"
    onnx.save(proto, path)
    assert tensor.name in _refused([str(path)], "ICD-E104", capsys)


@pytest.mark.parametrize(
    "flags",
    [
        ["--mode", "sideways"],
        ["--target", "toaster"],
        ["--sparsity", "unit:1.0"],
        ["--sparsity", "unit:-0.1"],
        ["--sparsity", "units:0.5"],
        ["--sparsity", "unit:nan"],
        ["--peer", "abacus"],
        ["--repeats", "3"],
        ["--repeats", "many"],
        ["--threads", "0"],
        ["--time-budget", "0"],
        ["--shape", "input_ids"],
        ["--shape", "input_ids=1x0"],
        ["--quality", "vibes"],
        ["--no-such-flag"],
    ],
)
def test_bad_flags(model: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    _refused([str(model), *flags], "ICD-E201", capsys)


def test_wrong_shape(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _refused([str(model), "--shape", "input_ids=2x3x4"], "ICD-E105", capsys)


def test_unwritable_out(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    _refused([str(model), "--out", str(tmp_path / "file" / "run")], "ICD-E301", capsys)


def test_unwritable_library(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _refused([str(model), "-o", str(tmp_path / "none" / "lib.so")], "ICD-E301", capsys)


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["absent.onnx", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
