"""Recipes: a classifier's graph, the units that go, and a miniature trained and pruned."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from icd_tvm.errors import ConfigError, ShapeError
from icd_tvm.models.bert import BERT_MINI, BertConfig, build_bert, random_bert_weights
from icd_tvm.models.bert_classifier import build_bert_classifier
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.recipes.__main__ import main
from icd_tvm.models.recipes.units import (
    STEP,
    choose_units,
    refitted,
    with_zero_units,
    without_units,
)
from icd_tvm.relax_passes.axis_groups import find_axis_groups
from icd_tvm.relax_passes.dead_units import dead_units

needs_jax = pytest.mark.skipif(
    importlib.util.find_spec("jax") is None, reason="jax is not installed: the extra recipes"
)
TINY = replace(BERT_MINI, hidden=16, heads=2, ffn=64)
SEQ = 16


def classifier_weights(config: BertConfig, seed: int = 0) -> dict[str, Any]:
    """Random weights large enough for every sentence to get logits of its own."""
    rng = np.random.default_rng(seed)
    hidden = config.hidden
    head = {"pooler.dense": (hidden, hidden), "classifier": (2, hidden)}
    weights = {n: a if "Norm" in n else a * 5 for n, a in random_bert_weights(config, seed).items()}
    for module, shape in head.items():
        weights[f"{module}.weight"] = rng.normal(0, 0.2, shape).astype(np.float32)
        weights[f"{module}.bias"] = rng.normal(0, 0.1, shape[:1]).astype(np.float32)
    return weights


def tokens(count: int, seed: int = 0) -> dict[str, Any]:
    """Sentences of 4 to SEQ tokens as inputs of a graph."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, SEQ + 1, count)
    mask = (np.arange(SEQ) < lengths[:, None]).astype(np.int64)
    ids = rng.integers(1, TINY.vocab, (count, SEQ)) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": 0 * ids}


def run_onnx(model: Any, feeds: dict[str, Any]) -> Any:
    content = model if isinstance(model, str) else model.SerializeToString()
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


# The graph


def test_classifier_is_the_encoder_and_its_head() -> None:
    weights, feeds = classifier_weights(TINY), tokens(3)
    hidden = run_onnx(build_bert(TINY, weights, SEQ, 3), feeds).astype(np.float64)
    pooled = np.tanh(hidden[:, 0] @ weights["pooler.dense.weight"].T + weights["pooler.dense.bias"])
    wanted = pooled @ weights["classifier.weight"].T + weights["classifier.bias"]
    model = build_bert_classifier(TINY, weights, SEQ, 3, trained=True)
    onnx.checker.check_model(model, full_check=True)
    assert [d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim] == [3, 2]
    assert {p.key: p.value for p in model.metadata_props} == {"weights": "trained"}
    np.testing.assert_allclose(run_onnx(model, feeds), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["pooler.dense.weight", "classifier.weight", "classifier.bias"])
def test_a_head_that_does_not_fit_is_refused(name: str) -> None:
    weights = classifier_weights(TINY)
    with pytest.raises(ShapeError, match=f"'{name}' is missing"):
        build_bert_classifier(TINY, {k: v for k, v in weights.items() if k != name}, SEQ)
    # Any number of classes will do: a bias alone does not tell what is wrong.
    bad = "classifier.weight" if name == "classifier.bias" else name
    with pytest.raises(ShapeError, match=f"'{bad}' has shape"):
        build_bert_classifier(TINY, {**weights, bad: weights[bad][..., :1]}, SEQ)


# The units


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 0.7), st.integers(1, 4))
def test_units_that_matter_stay(seed: int, sparsity: float, layers: int) -> None:
    width, rng = 8 * STEP, np.random.default_rng(seed)
    scores = [rng.random(width) for _ in range(layers)]
    kept = choose_units(scores, sparsity, width)
    counts = np.array([len(units) for units in kept])
    assert (counts % STEP == 0).all()
    assert counts.min() >= STEP
    assert counts.sum() == int(layers * width * (1 - sparsity)) // STEP * STEP
    for units, costs in zip(kept, scores, strict=True):
        assert (np.diff(units) > 0).all()
        assert set(units) == set(np.argsort(-costs)[: len(units)])


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.75])
def test_a_uniform_choice_takes_the_best_of_each_layer(sparsity: float) -> None:
    rng = np.random.default_rng(0)
    scores = [scale * rng.random(8 * STEP) for scale in (1.0, 100.0)]
    kept = choose_units(scores, sparsity, 8 * STEP, uniform=True)
    count = int(8 * (1 - sparsity)) * STEP
    for units, costs in zip(kept, scores, strict=True):
        np.testing.assert_array_equal(units, np.sort(np.argsort(-costs)[:count]))


def test_layers_lose_what_they_can_spare() -> None:
    rich, poor = np.full(64, 2.0), np.full(64, 1.0)
    rich[5] = 0.5
    kept = choose_units([rich, poor], 0.375, 64)
    assert [len(units) for units in kept] == [64, STEP]
    again = choose_units([rich[kept[0]], poor[kept[1]]], 0.5, 64)
    assert [len(units) for units in again] == [3 * STEP, STEP]
    assert 5 not in again[0]


@pytest.mark.parametrize(
    ("sparsity", "match"), [(-0.1, "outside"), (1.0, "outside"), (0.8, "fewer than 16 of 64")]
)
def test_impossible_sparsities(sparsity: float, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        choose_units([np.ones(64), np.ones(64)], sparsity, 64)


def test_zero_units_stand_where_they_stood_and_are_found_dead() -> None:
    weights, feeds = classifier_weights(TINY), tokens(2)
    rng = np.random.default_rng(3)
    kept = [np.sort(rng.permutation(TINY.ffn)[:count]) for count in (48, 16)]
    narrow = without_units(weights, kept)
    assert narrow["encoder.layer.1.output.dense.weight"].shape == (TINY.hidden, 16)
    wide = with_zero_units(narrow, kept, TINY.ffn)
    for index, units in enumerate(kept):
        gone = np.setdiff1d(np.arange(TINY.ffn), units)
        inner, outer = (f"encoder.layer.{index}.{n}.dense" for n in ("intermediate", "output"))
        silenced = weights[f"{outer}.weight"].copy()
        silenced[:, gone] = 0
        np.testing.assert_array_equal(wide[f"{outer}.weight"], silenced)
        assert not wide[f"{inner}.weight"][gone].any()
        assert not wide[f"{inner}.bias"][gone].any()
        weights[f"{outer}.weight"] = silenced
    model = build_bert_classifier(TINY, wide, SEQ, 2)
    masked = build_bert_classifier(TINY, weights, SEQ, 2)
    np.testing.assert_allclose(run_onnx(model, feeds), run_onnx(masked, feeds), atol=1e-6)
    main_function = import_onnx(model).mod["main"]
    groups = [g for g in find_axis_groups(main_function).free if g.size == TINY.ffn]
    found = [np.flatnonzero(~dead_units(main_function, group)).tolist() for group in groups]
    assert sorted(found) == sorted(units.tolist() for units in kept)


# The command


@pytest.mark.parametrize("rates", ["0.5,0.3", "0.5,1", "0,0.5", "half", "0.5,,0.7", "nan"])
def test_sparsities_that_do_not_rise(rates: str, tmp_path: Path, capsys: Any) -> None:
    assert main(["sst2", "--out", str(tmp_path), "--sparsity", rates]) == 2
    assert "ICD-E201: sparsities" in capsys.readouterr().err


def test_without_jax_one_line_says_how_to_get_it(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.startswith("icd_tvm.models.recipes.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jax", None)
    assert main(["sst2", "--out", str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert line == "error ICD-E106: training a recipe needs jax (pip install 'icd-tvm[recipes]')\n"


@needs_jax
@pytest.mark.parametrize("content", [None, b"no model"])
def test_a_dense_twin_that_is_no_model(content: bytes | None, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "dense.onnx"
    if content:
        path.write_bytes(content)
    assert main(["sst2", "--out", str(tmp_path), "--dense", str(path)]) == 2
    assert "ICD-E101" in capsys.readouterr().err


@needs_jax
def test_no_epochs(tmp_path: Path, capsys: Any) -> None:
    assert main(["sst2", "--out", str(tmp_path), "--epochs", "0"]) == 2
    assert "epochs 0" in capsys.readouterr().err


# The miniature


def sentences(count: int, seed: int) -> Any:
    """Sentences of one of two classes, each with four words that are mostly its own."""
    from icd_tvm.models.recipes.training import Sentences

    feeds, rng = tokens(count, seed), np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    ids, mask = feeds["input_ids"], feeds["attention_mask"]
    side = np.where(rng.random(ids.shape) < 0.8, labels[:, None], 1 - labels[:, None])
    ids = (1 + ids % 4 + 4 * side) * mask
    return Sentences(ids, mask, labels)


@needs_jax
def test_jax_computes_the_graph() -> None:
    from icd_tvm.models.recipes.training import Sentences, predict

    weights, feeds = classifier_weights(TINY), tokens(37)
    wanted = run_onnx(build_bert_classifier(TINY, weights, SEQ, 37), feeds)
    data = Sentences(feeds["input_ids"], feeds["attention_mask"], np.zeros(37, np.int64))
    # One whole batch, and one that five sentences fill.
    np.testing.assert_allclose(predict(TINY, weights, data), wanted, rtol=1e-4, atol=1e-5)


@needs_jax
def test_a_unit_costs_what_the_logits_change_by() -> None:
    from icd_tvm.models.recipes.scoring import unit_costs
    from icd_tvm.models.recipes.training import predict

    weights, data = classifier_weights(TINY), sentences(4, 1)
    unit, step, name = 7, 0.05, "encoder.layer.1.output.dense.weight"
    margins = []
    for factor in (1 - step, 1 + step):
        changed = weights[name].copy()
        changed[:, unit] *= factor
        found = predict(TINY, {**weights, name: changed}, data).astype(np.float64)
        margins.append(found[:, 1] - found[:, 0])
    wanted = (((margins[1] - margins[0]) / (2 * step)) ** 2).mean()
    assert wanted > 0
    assert unit_costs(TINY, weights, data)[1][unit] == pytest.approx(wanted, rel=0.02)


@needs_jax
def test_a_refit_makes_up_for_a_twin() -> None:
    from icd_tvm.models.recipes.scoring import unit_grams
    from icd_tvm.models.recipes.training import predict

    # Unit 9 of each layer says what unit 8 says, so that either can do the work of both.
    weights, data = classifier_weights(TINY), sentences(37, 1)
    for index in range(TINY.layers):
        for part in ("weight", "bias"):
            inner = weights[f"encoder.layer.{index}.intermediate.dense.{part}"]
            inner[9] = inner[8]
    grams = unit_grams(TINY, weights, data)
    assert grams[0].shape == (TINY.ffn, TINY.ffn)
    np.testing.assert_allclose(grams[0][8], grams[0][9], rtol=1e-5)
    kept = [np.delete(np.arange(TINY.ffn), 9)] * TINY.layers
    wanted = predict(TINY, weights, data)
    plain = predict(TINY, without_units(weights, kept), data)
    made_up = predict(TINY, without_units(refitted(weights, kept, grams), kept), data)
    assert abs(made_up - wanted).max() < 0.1 * abs(plain - wanted).max()


@needs_jax
def test_miniature(tmp_path: Path) -> None:
    from icd_tvm.models.recipes.ladder import Ladder
    from icd_tvm.models.recipes.recipe import Plan, Source, cook, read_weights
    from icd_tvm.models.recipes.training import Training

    judged = sentences(200, 2)
    source = Source("mini", TINY, classifier_weights(TINY), sentences(320, 1), judged, {})
    tuning = Training(epochs=1, rate=3e-3)
    plan = Plan(Training(epochs=3, rate=1e-2), Ladder((0.5,), tuning), tolerance=100)
    lines: list[str] = []
    card = cook(source, plan, tmp_path, lines.append)
    assert json.loads((tmp_path / "card.json").read_text()) == json.loads(json.dumps(card))
    assert card["dense"]["accuracy_percent"] > 70, lines
    # Following the dense twin brings the pruned one back.
    assert card["chosen"]["accuracy_percent"] > 70, lines
    assert sum(card["chosen"]["kept_units"]) == TINY.ffn
    model = onnx.load(tmp_path / "pruned.onnx")
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for index, count in enumerate(card["chosen"]["kept_units"]):
        outer = arrays[f"encoder.layer.{index}.output.dense.weight"]
        assert outer.shape == (TINY.ffn, TINY.hidden)
        assert np.count_nonzero(outer.any(axis=1)) == count
    session = ort.InferenceSession(
        str(tmp_path / "pruned.onnx"), providers=["CPUExecutionProvider"]
    )
    right = 0
    for ids, mask, label in zip(judged.ids, judged.mask, judged.labels, strict=True):
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": 0 * ids}
        right += session.run(None, {k: v[None] for k, v in feeds.items()})[0].argmax() == label
    assert 100 * right / len(judged) == pytest.approx(card["chosen"]["accuracy_percent"])

    # The same seeds give the same files; with no time there is no rung, and no file of one.
    again = cook(source, replace(plan, tolerance=-101), tmp_path / "again", lines.append)
    assert again["files"]["dense.onnx"] == card["files"]["dense.onnx"]
    assert again["chosen"] is None
    assert [r["accuracy_percent"] for r in again["rungs"]] == [card["chosen"]["accuracy_percent"]]
    assert not (tmp_path / "again" / "pruned.onnx").exists()
    dense = read_weights(tmp_path / "again" / "dense.onnx")
    plan = replace(plan, ladder=Ladder((0.5,), tuning, 0))
    late = cook(source, plan, tmp_path, lines.append, dense)
    assert late["dense"] == {**card["dense"], "seconds": None}
    assert late["files"]["dense.onnx"] == card["files"]["dense.onnx"]
    with pytest.raises(ShapeError, match="is missing"):
        cook(source, plan, tmp_path, dense={})
    assert late["rungs"] == []
    assert lines[-1] == "no time left for sparsity 0.5"
    assert not (tmp_path / "pruned.onnx").exists()
