"""Quality tasks on planted data and models, and the checksums of the real data."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from icd_tvm.errors import (
    ConfigError,
    MeasurementError,
    MissingDependencyError,
    ModelFileError,
    ShapeError,
)
from icd_tvm.measure import datasets, quality_plugins
from icd_tvm.measure.quality import data_dir
from icd_tvm.measure.quality_compare import agreement_of, compare, judge
from icd_tvm.measure.quality_plugins import (
    SEARCH_SENTENCES,
    WindowTask,
    make_task,
    parse_quality,
    token_losses,
)
from icd_tvm.measure.quality_task import TaskScore
from icd_tvm.models import minilm

needs_data = pytest.mark.skipif(data_dir() is None, reason="no evaluation data: set ICD_DATA")
needs_tokenizer = pytest.mark.skipif(
    importlib.util.find_spec(minilm.PACKAGE) is None, reason=f"{minilm.PACKAGE} is not installed"
)


def inputs(*shape: int) -> list[Any]:
    return [SimpleNamespace(name="input_ids", shape=shape)]


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that writes a data file and enters its checksum."""
    monkeypatch.setenv("ICD_DATA", str(tmp_path))

    def write(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        monkeypatch.setitem(datasets.CHECKSUMS, name, hashlib.sha256(content).hexdigest())
        return path

    return write


@needs_data
@pytest.mark.parametrize("name", datasets.CHECKSUMS)
def test_real_data_is_the_known_one(name: str) -> None:
    path = data_dir() / name
    if not path.is_file():
        pytest.skip(f"{name} is absent")
    assert datasets.dataset_file(name) == path


def test_a_changed_file_is_refused_by_name(plant) -> None:
    path = plant("sst2/stsa.binary.dev", b"1 good\n0 bad\n")
    assert datasets.sst2_sentences("dev") == [("good", 1), ("bad", 0)]
    assert datasets.sst2_sentences("dev", 1) == [("good", 1)]
    path.write_bytes(b"0 good\n0 bad!\n")
    with pytest.raises(ModelFileError, match=r"sst2/stsa\.binary\.dev is not the file"):
        datasets.sst2_sentences("dev")
    path.unlink()
    with pytest.raises(MissingDependencyError, match=r"stsa\.binary\.dev not found"):
        datasets.sst2_sentences("dev")


@pytest.mark.parametrize("content", [b"2 good\n", b"1\n", b"good\n"])
def test_damaged_sentences(plant, content: bytes) -> None:
    plant("sst2/stsa.binary.dev", content)
    with pytest.raises(ModelFileError, match="SST-2 dev"):
        datasets.sst2_sentences("dev")


def test_token_windows(plant) -> None:
    plant("wikitext2/valid.txt", b"abcdefgh" * 8)
    tokenizer = SimpleNamespace(encode=lambda text: [ord(c) - 97 for c in text])
    found = datasets.token_windows(tokenizer, 2, 8)
    np.testing.assert_array_equal(found, [np.arange(8)] * 2)
    with pytest.raises(ConfigError, match="no 9 windows"):
        datasets.token_windows(tokenizer, 9, 8)


@pytest.mark.parametrize(
    ("text", "found"), [("sst2", ("sst2", None)), ("wikitext:12", ("wikitext", 12))]
)
def test_names_and_counts(text: str, found: tuple) -> None:
    assert parse_quality(text) == found


@pytest.mark.parametrize("text", ["vibes", "sst2:", "sst2:1", "bytes:-3", "stsb:x", ""])
def test_refused_names_and_counts(text: str) -> None:
    with pytest.raises(ConfigError, match=r"quality metric|number of samples"):
        parse_quality(text)


def test_a_model_that_does_not_fit_is_refused(plant) -> None:
    with pytest.raises(ConfigError, match="batch, seq"):
        make_task("sst2", inputs(4))
    with pytest.raises(ConfigError, match="batch 1"):
        make_task("wikitext", inputs(2, 8))


# Symbols in windows


def windows() -> WindowTask:
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 3, (4, 5))
    feeds = [{"ids": np.arange(5) + 5 * i} for i in range(4)]
    return WindowTask("accuracy", "planted", feeds, targets)


def table_model(task: WindowTask, wrong: int = 0):
    """Return a model that gives the right class 0.8, but in the first ``wrong`` symbols 0.1."""
    right = task.targets.ravel()
    rows = np.full((right.size, 3), 0.1)
    chosen = np.where(np.arange(right.size) < wrong, (right + 1) % 3, right)
    rows[np.arange(right.size), chosen] = 0.8
    return lambda feeds: np.log(rows[feeds["ids"]])[None]


def test_accuracy_and_loss_of_a_known_model() -> None:
    task = windows()
    score = task.evaluate(table_model(task, wrong=5))
    assert score.points == pytest.approx(75)
    expected = -(15 * np.log(0.8) + 5 * np.log(0.1)) / 20
    assert score.figures["nll"] == pytest.approx(expected)
    assert score.figures["perplexity"] == pytest.approx(np.exp(expected))
    np.testing.assert_allclose(score.items, [0, 1, 1, 1])
    with pytest.raises(MeasurementError, match="NaN"):
        task.evaluate(lambda feeds: np.full((1, 5, 3), np.nan))
    with pytest.raises(MeasurementError, match="class 2, the model has 2"):
        task.evaluate(lambda feeds: np.zeros((1, 5, 2)))


def test_probabilities_and_logits_give_the_same_loss() -> None:
    rng = np.random.default_rng(1)
    logits, targets = rng.normal(size=(6, 4)), rng.integers(0, 4, 6)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(shares[np.arange(6), targets])
    np.testing.assert_allclose(token_losses(logits + 7, targets), expected)
    np.testing.assert_allclose(token_losses(shares, targets), expected)


def test_arms_are_judged_and_compared() -> None:
    task = windows()
    runs = {"dense": table_model(task), "identity": table_model(task, wrong=2)}
    found = judge(task, runs, [("identity", "dense"), ("iterative", "identity")])
    assert (found["metric"], found["n"]) == ("accuracy", 4)
    assert found["arms"] == {"dense": pytest.approx(1.0), "identity": pytest.approx(0.9)}
    assert list(found["changes"]) == ["identity/dense"]
    change = found["changes"]["identity/dense"]
    assert change["agreement"] == pytest.approx(0.9)
    # 0.8 and 0.1 changed places in two of twenty symbols.
    assert change["kl_mean"] == pytest.approx(0.1 * 0.7 * np.log(8), rel=0.01)
    assert change["kl_max"] == pytest.approx(0.7 * np.log(8), rel=0.01)
    low, high = change["interval_points"]
    assert low < -10 <= high <= 0


def test_vectors_have_a_cosine_and_no_divergence() -> None:
    a, b = TaskScore(1.0, np.eye(3)), TaskScore(2.0, np.eye(3)[[0, 1, 1]])
    found = compare(a, b)
    assert found["agreement"] == found["cosine_mean"] == pytest.approx(2 / 3)
    assert (found["cosine_min"], found["kl_mean"], found["interval_points"]) == (0.0, None, None)
    with pytest.raises(ShapeError, match="cannot compare"):
        compare(a, TaskScore(1.0, np.eye(2)))


# Sentences

TRAIN = b"1 good film\n0 bad film\n1 good good\n0 bad bad\n"


def encoded(texts: list[str], seq: int) -> dict[str, np.ndarray]:
    """Tokenize: 1 is good, 2 is bad, 3 is another word."""
    ids = np.zeros((len(texts), seq), np.int64)
    for row, text in enumerate(texts):
        for i, word in enumerate(text.split()[:seq]):
            ids[row, i] = {"good": 1, "bad": 2}.get(word, 3)
    return {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)}


def encoder(feeds: dict[str, np.ndarray]) -> np.ndarray:
    return np.eye(4)[feeds["input_ids"]]


def classifier(feeds: dict[str, np.ndarray]) -> np.ndarray:
    counts = encoder(feeds).sum(axis=1)
    return counts[:, [2, 1]]


@pytest.fixture
def sentences(plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant("sst2/stsa.binary.train", TRAIN)
    plant("sst2/stsa.binary.dev", b"1 good one\n0 bad one\n0 so bad\n0 good grief\n1 good\n")
    monkeypatch.setattr(quality_plugins, "encode", encoded)
    monkeypatch.setattr("icd_tvm.measure.quality.encode", encoded)


@pytest.mark.parametrize("model", [encoder, classifier])
def test_accuracy_of_a_classifier_and_of_a_probe(sentences, model: Any) -> None:
    task = make_task("sst2", inputs(2, 4)).fitted(model)
    assert (task.probe is None) is (model is classifier)
    score = task.evaluate(model)
    assert score.points == pytest.approx(80)
    np.testing.assert_array_equal(score.items, [1, 1, 1, 0, 1])
    assert ("probe" in task.source) is (model is encoder)


def test_a_probe_stays_the_one_of_the_first_model(sentences) -> None:
    def swapped(feeds: dict[str, np.ndarray]) -> np.ndarray:
        return encoder(feeds)[:, :, [0, 2, 1, 3]]

    found = judge(make_task("sst2", inputs(2, 4)), {"dense": encoder, "identity": swapped}, [])
    assert found["arms"]["dense"] == pytest.approx(0.8)
    assert found["arms"]["identity"] == pytest.approx(0.2)


# What a search may look at


def test_a_search_sees_other_sentences_than_its_figures(sentences, plant) -> None:
    plant("sst2/stsa.binary.train", TRAIN + b"1 good extra\n0 bad extra\n1 good more\n")
    task = replace(make_task("sst2:2", inputs(2, 4), search=True), start=4)
    assert [text for text, _ in task._judged] == ["good extra", "bad extra"]
    held_out = make_task("sst2:2", inputs(2, 4))
    assert task.source == "sst2_accuracy, SST-2 train, 2 sentences"
    assert held_out.source == "sst2_accuracy, SST-2 dev, 2 sentences"
    # The probe is fitted on the sentences before.
    default = make_task("sst2", inputs(2, 4), search=True)
    assert (default.start, default.limit) == (default.train, SEARCH_SENTENCES)


def test_a_search_takes_pairs_from_all_of_the_train_split() -> None:
    task = make_task("stsb:100", inputs(2, 8), search=True)
    assert (task.split, task.step, len(range(5749)[: task.stop : task.step])) == ("train", 57, 100)
    assert make_task("stsb", inputs(2, 8), search=True).step == 16
    assert make_task("stsb:100", inputs(2, 8)).split == "dev"


@pytest.mark.parametrize("count", [5, 30])
def test_a_search_sees_other_windows_of_code(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.repeat(np.arange(40)[:, None], 4, axis=1)
    monkeypatch.setattr(quality_plugins, "byte_windows", lambda: (ids, ids[:, 0]))
    text = f"bytes:{count}"
    search, held_out = (make_task(text, inputs(4), search=part) for part in (True, False))
    seen, kept = ({int(f["input_ids"][0]) for f in t.feeds} for t in (search, held_out))
    assert (len(seen), len(kept)) == (min(count, 40 - count), count)
    assert not seen & kept
    assert search.source != held_out.source
    with pytest.raises(ConfigError, match="bytes:40 leaves none of 40 windows"):
        make_task("bytes:40", inputs(4), search=True)


def test_a_search_sees_later_windows_of_text(plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant("wikitext2/valid.txt", bytes(range(97, 97 + 24)) * 8)
    tokenizer = SimpleNamespace(encode=lambda text: [ord(c) - 97 for c in text])
    monkeypatch.setattr(quality_plugins, "smollm2_tokenizer", lambda: tokenizer)
    search, held_out = (make_task("wikitext:3", inputs(1, 4), search=s) for s in (True, False))
    tokens = [np.concatenate([f["input_ids"][0] for f in t.feeds]) for t in (held_out, search)]
    np.testing.assert_array_equal(np.concatenate(tokens), np.arange(24))
    assert search.source != held_out.source


def test_agreement_is_that_of_the_comparison() -> None:
    rng = np.random.default_rng(0)
    for logits in (True, False):
        a, b = (TaskScore(1.0, rng.normal(size=(50, 3)), logits=logits) for _ in range(2))
        assert agreement_of(a, b) == compare(a, b)["agreement"]
    with pytest.raises(ShapeError):
        agreement_of(TaskScore(1.0, np.eye(3), logits=True), TaskScore(1.0, np.eye(2), logits=True))


@needs_data
@needs_tokenizer
def test_real_sentences_and_windows() -> None:
    if not (data_dir() / "sst2").is_dir() or not (data_dir() / "pygments").is_dir():
        pytest.skip("sst2/ or pygments/ is absent")
    rng = np.random.default_rng(0)
    task = make_task("sst2:40", inputs(8, 64))
    score = task.evaluate(lambda feeds: rng.normal(size=(8, 2)))
    assert 10 < score.points < 90
    assert score.outputs.shape == (40, 2)
    found = make_task("bytes:3", inputs(512))
    assert found.evaluate(lambda feeds: np.zeros((512, 256))).figures["nll"] == pytest.approx(
        np.log(256)
    )
