"""Inputs on which activations are observed: real text where the model reads text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icd_tvm.errors import ConfigError, MissingDependencyError, ModelFileError, ShapeError
from icd_tvm.models.importer import ImportedModel
from icd_tvm.models.inputs import index_limits, random_inputs
from icd_tvm.models.smollm2 import smollm2_tokenizer
from icd_tvm.models.tokenize import VOCAB, encode

EMBEDDED = "embedded text"
# Key of a model's metadata that says how text becomes its ids: a key of READERS.
TEXT_PROPERTY = "text"
RANDOM = "random"
TEXT_INPUTS = frozenset({"input_ids", "attention_mask"})
KNOWN_INPUTS = TEXT_INPUTS | {"token_type_ids"}
MIN_SEQ = 8
TOKENS_PER_WORD = 1.25
# Shortest and longest sample, as a fraction of the sequence length.
FILL = (0.6, 1.0)

Read = Callable[[str], Sequence[int]]
Halves = tuple[list[str], list[str]]


def _bytes() -> Read:
    return lambda text: list(text.encode())


def _smollm2() -> Read:
    return smollm2_tokenizer().encode


# Made when it is needed, as a tokenizer may be absent.
READERS: dict[str, Callable[[], Read]] = {"bytes": _bytes, "smollm2": _smollm2}


def sentences() -> list[str]:
    """Return the calibration sentences that come with the package."""
    text = resources.files("icd_tvm.models").joinpath("calibration.txt").read_text("utf-8")
    return [line.strip() for line in text.splitlines() if line.strip()]


def excerpts() -> list[str]:
    """Return the excerpts of source code that come with the package: of its own files.

    A model of bytes may read files as well as prose: calibrated on prose alone, typeseg lost more
    than on random bytes.
    """
    text = resources.files("icd_tvm.models").joinpath("calibration_code.txt").read_text("utf-8")
    return [part.strip("\n") for part in text.split("\n%%\n")]


def calibration_batches(
    imported: ImportedModel, n: int, seed: int = 0
) -> tuple[list[dict[str, NDArray[Any]]], str]:
    """Return inputs for calibration and where they come from.

    Texts of batches with even numbers share no sentence with those of the others: what is
    fitted on one half can be judged on the other.

    Parameters
    ----------
    imported : ImportedModel
    n : int
        Number of input sets, at least 1.
    seed : int
        The same seed gives the same inputs.

    Returns
    -------
    batches : list of dict of str to ndarray
    source : str
        ``"embedded text"`` for BERT-uncased encoders when their tokenizer is installed;
        ``"embedded text and code as bytes"``, ``"embedded text as smollm2 tokens"`` for models
        whose metadata says that their one input takes these (`TEXT_PROPERTY`); else
        ``"random"`` (`icd_tvm.models.inputs.random_inputs`).

    Raises
    ------
    ConfigError
        n is below 1.
    """
    if n < 1:
        raise ConfigError(f"number of calibration batches {n} is below 1")
    if reads_text(imported):
        try:
            return _text_batches(imported, n, seed), EMBEDDED
        except MissingDependencyError:
            pass
    form = text_form(imported)
    if form:
        try:
            halves = _halves(form == "bytes")
            return _stream_batches(imported, READERS[form](), halves, n, seed), _source(form)
        except (MissingDependencyError, ModelFileError, ShapeError):
            pass
    return [random_inputs(imported, seed + index) for index in range(n)], RANDOM


def reads_text(imported: ImportedModel) -> bool:
    """Return whether a model takes BERT-uncased token ids of shape [batch, seq]."""
    names = {spec.name for spec in imported.inputs}
    if not names >= TEXT_INPUTS or names - KNOWN_INPUTS:
        return False
    if any(len(s.shape) != 2 or s.shape[1] < MIN_SEQ for s in imported.inputs):
        return False
    return index_limits(imported).get("input_ids") == VOCAB


def _source(form: str) -> str:
    return f"{EMBEDDED} and code as bytes" if form == "bytes" else f"{EMBEDDED} as {form} tokens"


def text_form(imported: ImportedModel) -> str:
    """Return how text becomes the ids of a model's one input: a key of `READERS`, or empty."""
    properties = {p.key: p.value for p in imported.model.metadata_props}
    form = properties.get(TEXT_PROPERTY, "")
    if form not in READERS or len(imported.inputs) != 1:
        return ""
    (spec,) = imported.inputs
    fits = spec.shape and spec.shape[-1] >= MIN_SEQ and np.dtype(spec.dtype).kind in "iu"
    return form if fits and spec.name in index_limits(imported) else ""


def _stream_batches(
    imported: ImportedModel, read: Read, halves: Halves, n: int, seed: int
) -> list[dict[str, NDArray[Any]]]:
    """Fill every row of the one input with ids of texts in random order; nothing is padded.

    Raises
    ------
    ShapeError
        An id that the model's table has not.
    """
    (spec,) = imported.inputs
    rng = np.random.default_rng(seed)
    rows = int(np.prod(spec.shape[:-1]))
    batches = [
        np.array([_stream(halves[batch % 2], spec.shape[-1], read, rng) for _ in range(rows)])
        for batch in range(n)
    ]
    limit, largest = index_limits(imported)[spec.name], max(int(ids.max()) for ids in batches)
    if largest >= limit:
        raise ShapeError(f"id {largest} of the calibration text is outside [0, {limit})")
    return [{spec.name: ids.reshape(spec.shape).astype(spec.dtype)} for ids in batches]


def _halves(code: bool = False) -> Halves:
    """Return two lists of texts that share none; with source code each has as much of it."""
    first, second = (sentences()[part::2] for part in (0, 1))
    found = excerpts() if code else []
    return first + found[::2], second + found[1::2]


def _stream(pool: list[str], length: int, read: Read, rng: np.random.Generator) -> list[int]:
    ids: list[int] = []
    while len(ids) < length:
        ids += read(("\n" if ids else "") + pool[rng.integers(len(pool))])
    return ids[:length]


def _text_batches(imported: ImportedModel, n: int, seed: int) -> list[dict[str, NDArray[Any]]]:
    rows, seq = imported.inputs[0].shape
    rng, halves = np.random.default_rng(seed), _halves()
    texts = [_sample(halves[batch % 2], seq, rng) for batch in range(n) for _ in range(rows)]
    encoded = encode(texts, seq)
    return [
        {
            spec.name: encoded[spec.name][index * rows : (index + 1) * rows].astype(spec.dtype)
            for spec in imported.inputs
        }
        for index in range(n)
    ]


def _sample(pool: list[str], seq: int, rng: np.random.Generator) -> str:
    """Join sentences in random order until the sample fills a random part of the sequence."""
    wanted = rng.uniform(*FILL) * seq / TOKENS_PER_WORD
    words: list[str] = []
    while len(words) < wanted:
        words += pool[rng.integers(len(pool))].split()
    return " ".join(words[: max(1, round(wanted))])
