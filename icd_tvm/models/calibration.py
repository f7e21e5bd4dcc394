"""Inputs on which activations are observed: real text where the model reads text."""

from __future__ import annotations

from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icd_tvm.errors import ConfigError, MissingDependencyError
from icd_tvm.models.importer import ImportedModel
from icd_tvm.models.inputs import index_limits, random_inputs
from icd_tvm.models.tokenize import VOCAB, encode

EMBEDDED = "embedded text"
RANDOM = "random"
TEXT_INPUTS = frozenset({"input_ids", "attention_mask"})
KNOWN_INPUTS = TEXT_INPUTS | {"token_type_ids"}
MIN_SEQ = 8
TOKENS_PER_WORD = 1.25
# Shortest and longest sample, as a fraction of the sequence length.
FILL = (0.6, 1.0)


def sentences() -> list[str]:
    """Return the calibration sentences that come with the package."""
    text = resources.files("icd_tvm.models").joinpath("calibration.txt").read_text("utf-8")
    return [line.strip() for line in text.splitlines() if line.strip()]


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
        ``"embedded text"`` for BERT-uncased encoders when their tokenizer is installed, else
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
    return [random_inputs(imported, seed + index) for index in range(n)], RANDOM


def reads_text(imported: ImportedModel) -> bool:
    """Return whether a model takes BERT-uncased token ids of shape [batch, seq]."""
    names = {spec.name for spec in imported.inputs}
    if not names >= TEXT_INPUTS or names - KNOWN_INPUTS:
        return False
    if any(len(s.shape) != 2 or s.shape[1] < MIN_SEQ for s in imported.inputs):
        return False
    return index_limits(imported).get("input_ids") == VOCAB


def _text_batches(imported: ImportedModel, n: int, seed: int) -> list[dict[str, NDArray[Any]]]:
    rows, seq = imported.inputs[0].shape
    rng = np.random.default_rng(seed)
    pool = sentences()
    halves = pool[::2], pool[1::2]
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
