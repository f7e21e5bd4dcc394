"""Random weights of a BERT with the statistics that a trained one has, layer by layer."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from icd_tvm.models.bert import MINILM, BertConfig, weight_shapes
from icd_tvm.models.weights import Float32, RandomWeights, Weights, normal

FILE = Path(__file__).with_name("bert_statistics.json")
LAYER = "encoder.layer."
NOTE = "mean and deviation of all-MiniLM-L6-v2 at the same depth, deviations scaled to the width"


def measure_bert(weights: Weights) -> dict[str, tuple[float, float]]:
    """Return the mean and the standard deviation of every weight of MiniLM-L6 by name."""
    names = weight_shapes(MINILM)
    return {n: (float(weights[n].mean()), float(weights[n].std())) for n in names}


@lru_cache(maxsize=1)
def trained_statistics() -> dict[str, Any]:
    """Return what `measure_bert` found on the trained MiniLM-L6, four digits each."""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def trained_twin(name: str, layers: int) -> str:
    """Return the weight of MiniLM-L6 that lies at the same relative depth."""
    if not name.startswith(LAYER):
        return name
    index, part = name.removeprefix(LAYER).split(".", 1)
    depth = int(index) / max(1, layers - 1)
    return f"{LAYER}{round(depth * (MINILM.layers - 1))}.{part}"


def matched_bert_weights(config: BertConfig, seed: int = 0) -> RandomWeights:
    """Return normal weights with the trained means and deviations.

    Parameters
    ----------
    config : BertConfig
    seed : int

    Returns
    -------
    RandomWeights
        Deviations of matrices are scaled by ``sqrt(trained width / width)``, so that sums keep
        their size. Its notes, which become metadata, say where the statistics come from.
    """
    trained = weight_shapes(MINILM)

    def fill(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Float32:
        twin = trained_twin(name, config.layers)
        mean, deviation = trained_statistics()[twin]
        if len(shape) == 2 and name.startswith(LAYER):
            deviation *= (trained[twin][1] / shape[1]) ** 0.5
        return normal(rng, shape, deviation, mean)

    weights = RandomWeights(weight_shapes(config), fill, seed)
    weights.notes = {"statistics": NOTE}
    return weights
