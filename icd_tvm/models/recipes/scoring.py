"""What the feed-forward units of a classifier do to its logits, and beside one another."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icd_tvm.models.bert import BertConfig
from icd_tvm.models.recipes._jax import jax
from icd_tvm.models.recipes.classifier import layer_outputs, logits
from icd_tvm.models.recipes.training import Sentences
from icd_tvm.models.recipes.units import Weights


def unit_costs(
    config: BertConfig, weights: Weights, data: Sentences, batch: int = 32
) -> list[NDArray[np.float64]]:
    """Return what dropping each feed-forward unit would do to the logits, per layer.

    Returns
    -------
    list of float64 [units]
        Mean over the sentences of the squared first-order change of the difference between the
        last and the first class' logit.

    Notes
    -----
    Molchanov et al., "Importance estimation for neural network pruning", 2019, with the logits
    in place of the loss: the loss of a fitted classifier is flat on what it was fitted to.
    """

    widths = [
        len(weights[f"encoder.layer.{i}.intermediate.dense.bias"]) for i in range(config.layers)
    ]
    costs = [np.zeros(width) for width in widths]
    for rows, (ids, mask, _) in data.by_length(batch):
        # A gate for each sentence: its gradient is that sentence's own.
        gates = [np.ones((batch, 1, width), np.float32) for width in widths]
        for cost, slope in zip(
            costs, _margin_slopes(config, gates, weights, ids, mask), strict=True
        ):
            cost += (np.asarray(slope, np.float64)[: len(rows), 0] ** 2).sum(0) / len(data)
    return costs


def unit_grams(
    config: BertConfig, weights: Weights, data: Sentences, batch: int = 32
) -> list[NDArray[np.float64]]:
    """Return the Gram matrix of each layer's units over all tokens, float64 [units, units]."""
    grams: list[NDArray[np.float64]] = []
    for rows, (ids, mask, _) in data.by_length(batch):
        # Sentences that only fill the batch count for nothing.
        counted = mask * (np.arange(batch) < len(rows))[:, None]
        found = [
            np.asarray(gram, np.float64) for gram in _grams(config, weights, ids, mask, counted)
        ]
        grams = [a + b for a, b in zip(grams, found, strict=True)] if grams else found
    return grams


@partial(jax.jit, static_argnums=0)
def _margin_slopes(config: BertConfig, gates: Any, params: Any, ids: Any, mask: Any) -> Any:
    """Return what the difference of the logits changes by with each sentence's gates."""

    def margin(gates: Any) -> Any:
        found = logits(params, layer_outputs(config, params, ids, mask, gates)[0][-1])
        return (found[:, -1] - found[:, 0]).sum()

    return jax.grad(margin)(gates)


@partial(jax.jit, static_argnums=0)
def _grams(config: BertConfig, params: Any, ids: Any, mask: Any, counted: Any) -> Any:
    units = layer_outputs(config, params, ids, mask)[1]
    flat = ((layer * counted[:, :, None]).reshape(-1, layer.shape[-1]) for layer in units)
    return [rows.T @ rows for rows in flat]
