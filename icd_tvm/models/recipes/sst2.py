"""MiniLM-L6 as a classifier of SST-2, dense and with dropped feed-forward units."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from icd_tvm.measure.datasets import CHECKSUMS, sst2_sentences
from icd_tvm.models.bert import MINILM
from icd_tvm.models.checkpoint import Checkpoint
from icd_tvm.models.minilm import PACKAGE, model_file
from icd_tvm.models.recipes.recipe import Source
from icd_tvm.models.recipes.training import Sentences
from icd_tvm.models.tokenize import encode

# No sentence of dev has more tokens (60); four of train are cut.
SEQ = 64


def sst2_source(seed: int = 0, seq: int = SEQ) -> Source:
    """Return MiniLM-L6 with a fresh head for two classes, and SST-2's train and dev.

    Parameters
    ----------
    seed : int
        Of the head's weights, normal with deviation 0.02.
    seq : int
        Tokens a sentence is cut or padded to.

    Raises
    ------
    MissingDependencyError, ModelFileError
        Weights, tokenizer or data are absent or changed.
    """
    file = model_file("model.safetensors")
    weights: dict[str, NDArray[np.float32]] = dict(Checkpoint(file))
    fresh = np.random.default_rng(seed).standard_normal((2, MINILM.hidden)) * 0.02
    weights |= {
        "classifier.weight": fresh.astype(np.float32),
        "classifier.bias": np.zeros(2, np.float32),
    }
    content = file.read_bytes()
    origin = {
        "encoder": {"package": PACKAGE, "sha256": hashlib.sha256(content).hexdigest()},
        "head_seed": seed,
        "data": {name: CHECKSUMS[name] for name in CHECKSUMS if name.startswith("sst2/")},
    }
    data, judged = _sentences("train", seq), _sentences("dev", seq)
    return Source("minilm-sst2", MINILM, weights, data, judged, origin)


def _sentences(split: str, seq: int) -> Sentences:
    pairs = sst2_sentences(split)
    tokens = encode([text for text, _ in pairs], seq)
    labels = np.array([label for _, label in pairs])
    return Sentences(tokens["input_ids"], tokens["attention_mask"], labels)
