"""STS-B quality of the trained MiniLM, and agreement between outputs."""

from __future__ import annotations

import hashlib
import importlib.util

import numpy as np
import onnxruntime as ort
import pytest

from icd_tvm.errors import (
    ConfigError,
    MeasurementError,
    MissingDependencyError,
    ModelFileError,
    ShapeError,
)
from icd_tvm.measure import quality
from icd_tvm.measure.datasets import CHECKSUMS
from icd_tvm.models import minilm
from icd_tvm.models.registry import build

has_package = importlib.util.find_spec(minilm.PACKAGE) is not None
needs_minilm = pytest.mark.skipif(not has_package, reason=f"{minilm.PACKAGE} is not installed")
needs_data = pytest.mark.skipif(
    quality.data_dir() is None, reason="no evaluation data: set ICD_DATA"
)

SEQ = 64  # the longest sentence of the dev split has 53 tokens
BATCH = 4
DEV_SPEARMAN = 0.867163
FIRST_300_SPEARMAN = 0.933362


@pytest.fixture(scope="module")
def run():
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        build("minilm", seq=SEQ, batch=BATCH).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    return lambda feeds: session.run(None, feeds)[0]


@needs_minilm
@needs_data
def test_spearman_of_the_first_pairs(run):
    result = quality.stsb_spearman(run, SEQ, 300, batch=BATCH)
    assert (result.metric, result.n, result.source) == ("stsb_spearman", 300, "STS-B dev")
    assert result.value == pytest.approx(FIRST_300_SPEARMAN, abs=1e-3)


@pytest.mark.slow
@needs_minilm
@needs_data
def test_spearman_of_the_whole_dev_split(run):
    result = quality.stsb_spearman(run, SEQ, batch=BATCH)
    assert result.n == 1500
    assert result.value == pytest.approx(DEV_SPEARMAN, abs=1e-4)


@needs_minilm
@needs_data
def test_a_broken_model_scores_low_and_a_useless_one_is_refused():
    rng = np.random.default_rng(0)

    def noise(feeds):
        return rng.standard_normal((*feeds["input_ids"].shape, 8))

    assert abs(quality.stsb_spearman(noise, SEQ, 200, batch=8).value) < 0.3
    with pytest.raises(MeasurementError, match="undefined"):
        quality.stsb_spearman(lambda f: np.ones((*f["input_ids"].shape, 8)), SEQ, 20, batch=8)
    with pytest.raises(MeasurementError, match="NaN"):
        quality.stsb_spearman(
            lambda f: np.full((*f["input_ids"].shape, 8), np.nan), SEQ, 20, batch=8
        )


@needs_minilm
def test_embedding_does_not_depend_on_the_batch():
    def model(feeds):
        ids = feeds["input_ids"].astype(np.float32)
        return np.stack([ids, np.sqrt(ids), np.ones_like(ids)], axis=-1)

    texts = ["one", "two words", "three more words", "a fourth", "fifth"]
    alone = quality.embed(model, texts, 8, batch=1)
    padded = quality.embed(model, texts, 8, batch=3)
    np.testing.assert_allclose(alone, padded, rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1)
    with pytest.raises(ConfigError, match="batch 0"):
        quality.embed(model, texts, 8, batch=0)


def test_mean_pool_ignores_masked_tokens():
    hidden = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    mask = np.array([[1, 1, 0], [0, 0, 0]])
    pooled = quality.mean_pool(hidden, mask)
    np.testing.assert_array_equal(pooled, [hidden[0, :2].mean(axis=0), np.zeros(4)])
    with pytest.raises(ShapeError, match="do not fit the mask"):
        quality.mean_pool(hidden, mask[:, :2])


# Data


def write_split(folder, text, monkeypatch):
    name = "stsb/stsb-en-dev.csv"
    monkeypatch.setitem(CHECKSUMS, name, hashlib.sha256(text.encode()).hexdigest())
    (folder / "stsb").mkdir()
    (folder / "stsb" / "stsb-en-dev.csv").write_text(text, encoding="utf-8")


def test_pairs_are_read_from_the_named_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ICD_DATA", str(tmp_path))
    write_split(tmp_path, '"a, b",c,2.5\nd,e,0\n', monkeypatch)
    assert quality.data_dir() == tmp_path
    assert quality.stsb_pairs() == [("a, b", "c", 2.5), ("d", "e", 0.0)]
    assert quality.stsb_pairs(limit=1) == [("a, b", "c", 2.5)]
    with pytest.raises(ConfigError, match="limit 0"):
        quality.stsb_pairs(limit=0)
    with pytest.raises(MissingDependencyError, match="'test' not found"):
        quality.stsb_pairs("test")


@pytest.mark.parametrize("text", ["a,b\n", "a,b,high\n"])
def test_damaged_table(tmp_path, monkeypatch, text):
    monkeypatch.setenv("ICD_DATA", str(tmp_path))
    write_split(tmp_path, text, monkeypatch)
    with pytest.raises(ModelFileError, match="not a table"):
        quality.stsb_pairs()


def test_absent_data_names_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("ICD_DATA", str(tmp_path / "none"))
    assert quality.data_dir() is None
    with pytest.raises(MissingDependencyError) as caught:
        quality.stsb_pairs()
    assert "ICD_DATA" in caught.value.hint


# Agreement


def test_agreement_of_equal_and_different_outputs():
    reference = np.array([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]], np.float32)
    same = quality.agreement(reference, reference.copy())
    assert same == quality.Agreement(1.0, 1.0, 0.0, 0.0)
    candidate = reference.copy()
    candidate[2] = [0.0, 1.0]
    other = quality.agreement(reference, candidate)
    assert other.cosine_min == 0
    assert other.cosine_mean == pytest.approx(2 / 3)
    assert other.max_abs == 1
    assert other.max_rel == 0.25


def test_agreement_refuses_what_cannot_be_compared():
    ones = np.ones((2, 3))
    with pytest.raises(ShapeError, match="cannot compare"):
        quality.agreement(ones, np.ones((3, 2)))
    with pytest.raises(ShapeError, match="cannot compare"):
        quality.agreement(np.ones((0, 3)), np.ones((0, 3)))
    with pytest.raises(MeasurementError, match="NaN"):
        quality.agreement(ones, np.full((2, 3), np.nan))
    assert quality.agreement(np.zeros((1, 2)), np.ones((1, 2))).max_rel == np.inf
