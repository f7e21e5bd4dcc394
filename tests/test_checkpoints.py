"""Checkpoints as they are published, matched random weights, and the exported sizes."""

from __future__ import annotations

import importlib.util
import json
import struct
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest

from icd_tvm.errors import ConfigError, MissingDependencyError, ModelFileError, ShapeError
from icd_tvm.models import typeseg
from icd_tvm.models.__main__ import main
from icd_tvm.models.bert import BERT_BASE, BERT_LARGE, MINILM, weight_shapes
from icd_tvm.models.bert_statistics import (
    matched_bert_weights,
    measure_bert,
    trained_statistics,
    trained_twin,
)
from icd_tvm.models.checkpoint import Checkpoint
from icd_tvm.models.checkpoint_names import bert_name, mamba_name
from icd_tvm.models.mamba import MAMBA_MINI, build_mamba_step, random_mamba_weights
from icd_tvm.models.minilm import PACKAGE, model_file
from icd_tvm.models.registry import build
from icd_tvm.models.weights import parameter_count

pytest.importorskip("safetensors")
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}
MINI = dict(random_mamba_weights(MAMBA_MINI))


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """The format by its specification, so that it is not the library that is trusted."""
    header, offset = {}, 0
    for name, array in tensors.items():
        end = offset + array.nbytes
        header[name] = {
            "dtype": DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    data = b"".join(array.tobytes() for array in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    return {p.key: p.value for p in model.metadata_props}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_floats_of_any_width_are_read(tmp_path: Path, dtype: type) -> None:
    stored = {
        "a": np.array([[1.5, -2.25], [3.0, 0.125]], dtype),
        "ids": np.arange(3),
    }
    write(tmp_path / "w.safetensors", stored)
    read = Checkpoint(tmp_path / "w.safetensors", str.upper)
    assert dict(read.shapes) == {"A": (2, 2)}  # position ids and other integers are no weights
    assert read["A"].dtype == np.float32
    np.testing.assert_array_equal(read["A"], stored["a"].astype(np.float32))


def test_a_published_mamba(tmp_path: Path) -> None:
    """In two files, with transformers' name of the embedding and an untied copy of it."""
    tensors = {k.replace("embedding.", "embeddings."): v for k, v in MINI.items()}
    names = list(tensors)
    parts = {"model-1-of-2.safetensors": names[:7], "model-2-of-2.safetensors": names[7:]}
    for file, own in parts.items():
        write(tmp_path / file, {name: tensors[name] for name in own})
    places = {name: file for file, own in parts.items() for name in own}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    model = build("mamba-mini-random", checkpoint=tmp_path)
    assert metadata(model) == {"weights": "trained"}
    assert model.graph == build_mamba_step(MAMBA_MINI, MINI, name="mamba-mini-random").graph


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"{PACKAGE} is absent")
def test_a_published_bert_with_old_names(tmp_path: Path) -> None:
    own = Checkpoint(model_file("model.safetensors"))
    old = {
        "bert." + n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): own[n]
        for n in own
    }
    write(tmp_path / "model.safetensors", old)
    read = Checkpoint(tmp_path, bert_name)
    assert set(read) == set(own)
    assert set(weight_shapes(MINILM)) <= set(read)
    name = "encoder.layer.5.output.LayerNorm.weight"
    np.testing.assert_array_equal(read[name], own[name])


def test_a_checkpoint_of_another_size_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "w.safetensors", MINI)
    with pytest.raises(ShapeError, match=r"embedding.*has shape \[96, 24\]"):
        build("mamba-130m-step", checkpoint=tmp_path / "w.safetensors")
    with pytest.raises(ShapeError, match=r"word_embeddings\.weight' is missing"):
        build("bert-base", checkpoint=tmp_path / "w.safetensors")


def test_broken_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="does not exist"):
        Checkpoint(tmp_path / "none")
    with pytest.raises(ModelFileError, match=r"holds no model\.safetensors") as caught:
        Checkpoint(tmp_path)
    assert "only safetensors" in caught.value.hint
    index = tmp_path / "model.safetensors.index.json"
    for text in ("[]", "{", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(ModelFileError, match="cannot read"):
            Checkpoint(tmp_path)
    index.write_text('{"weight_map": {"a": "../w.safetensors"}}')
    with pytest.raises(ModelFileError, match="outside its folder"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(ModelFileError, match="cannot read"):
        Checkpoint(tmp_path / "pytorch_model.bin")


def test_published_parameter_counts() -> None:
    """Without the pooler that the published models also hold."""
    for config, whole in ((BERT_BASE, 109_482_240), (BERT_LARGE, 335_141_888)):
        pooler = config.hidden * config.hidden + config.hidden
        assert parameter_count(weight_shapes(config)) == whole - pooler


def test_random_berts_have_trained_statistics() -> None:
    config = replace(BERT_BASE, vocab=500)
    weights = matched_bert_weights(config)
    for name in ("encoder.layer.3.output.dense.weight", "encoder.layer.11.attention.self.key.bias"):
        mean, deviation = trained_statistics()[trained_twin(name, config.layers)]
        scale = (1536 / 3072) ** 0.5 if name.endswith("output.dense.weight") else 1.0
        assert weights[name].std() == pytest.approx(scale * deviation, rel=0.1)
        assert weights[name].mean() == pytest.approx(mean, abs=0.2 * deviation)
    assert trained_twin("encoder.layer.0.x", 12) == "encoder.layer.0.x"
    assert trained_twin("encoder.layer.11.x", 12) == "encoder.layer.5.x"
    assert trained_twin("encoder.layer.0.x", 1) == "encoder.layer.0.x"
    np.testing.assert_array_equal(weights[name], matched_bert_weights(config)[name])
    assert "all-MiniLM-L6-v2" in weights.notes["statistics"]


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"{PACKAGE} is absent")
def test_the_kept_statistics_are_those_of_minilm() -> None:
    found = measure_bert(Checkpoint(model_file("model.safetensors")))
    assert found.keys() == trained_statistics().keys()
    for name, pair in trained_statistics().items():
        np.testing.assert_allclose(pair, found[name], rtol=1e-3, atol=1e-6)


def test_names() -> None:
    assert bert_name("bert.embeddings.LayerNorm.gamma") == "embeddings.LayerNorm.weight"
    assert mamba_name("backbone.embeddings.weight") == "backbone.embedding.weight"
    assert mamba_name("backbone.layers.0.mixer.D") == "backbone.layers.0.mixer.D"


def test_the_command_reads_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "w.safetensors", MINI)
    output = tmp_path / "m.onnx"
    command = ["mamba-mini-random", "--checkpoint", str(tmp_path / "w.safetensors")]
    assert main([*command, "-o", str(output)]) == 0
    assert metadata(onnx.load(output)) == {"weights": "trained"}
    assert main([*command, "--layers", "3", "-o", str(output)]) == 2  # it has two


def test_weights_above_the_limit_go_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from icd_tvm.models import registry, weights

    output = tmp_path / "m.onnx"
    for module in (registry, weights):
        monkeypatch.setattr(module, "PROTO_LIMIT", 4000)
    with pytest.raises(ConfigError, match="do not fit"):
        build("mamba-mini-random")
    assert main(["mamba-mini-random", "-o", str(output)]) == 0
    assert (tmp_path / "m.onnx.data").stat().st_size > 4000
    whole = onnx.load(output).graph.initializer
    plain = build_mamba_step(MAMBA_MINI, MINI, data=tmp_path / "other").graph.initializer
    assert [t.name for t in whole] == [t.name for t in plain]


def test_typeseg_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typeseg, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(MissingDependencyError, match="not installed") as caught:
        build("typeseg")
    assert caught.value.hint == "pip install --no-deps typeseg==0.2.7"
    with pytest.raises(ShapeError, match="seq 0"):
        build("typeseg", seq=0)


@pytest.mark.skipif(importlib.util.find_spec("typeseg") is None, reason="typeseg is absent")
def test_typeseg_is_whole() -> None:
    model = build("typeseg", seq=32)
    onnx.checker.check_model(model)
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [32]
    assert metadata(model) == {"weights": "trained", "text": "bytes"}
