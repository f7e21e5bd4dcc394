"""Which feed-forward units to drop, and the weights with and without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from icd_tvm.adapters.units import refit_consumer
from icd_tvm.errors import ConfigError

Weights = dict[str, NDArray[np.float32]]
Units = NDArray[np.int64]

# A layer's width stays a multiple of this, as vector registers want it.
STEP = 16

# Grams of a whole training set need little: it is far longer than a layer is wide.
RIDGE = 0.01


def choose_units(
    scores: Sequence[NDArray[np.float64]], sparsity: float, width: int, uniform: bool = False
) -> list[Units]:
    """Choose the units that stay, over all layers together, so that layers may differ.

    Parameters
    ----------
    scores : sequence of float64 [units], one per layer
        What dropping a unit costs; a layer may have lost units already.
    sparsity : float
        Share of all ``layers x width`` units that is dropped, at least; below 1.
    width : int
        Units of a layer before anything was dropped.
    uniform : bool
        Choose in each layer apart, so that all keep the same number.

    Returns
    -------
    list of int64 arrays
        Ascending indices into each layer's scores. Each layer keeps a multiple of 16 units, at
        least 16 (or all it has, if those are fewer).

    Raises
    ------
    ConfigError
        The sparsity is outside [0, 1), or leaves no 16 units to every layer.
    """
    if not 0 <= sparsity < 1:
        raise ConfigError(f"unit sparsity {sparsity} is outside 0 to 1", "e.g. 0.5")
    steps = int(len(scores) * width * (1 - sparsity)) // STEP
    if steps < len(scores):
        raise ConfigError(
            f"unit sparsity {sparsity} leaves fewer than {STEP} of {width} units to a layer",
            "ask for less",
        )
    counts = [steps // len(scores) * STEP] * len(scores)
    if not uniform:
        counts = _shared_out(scores, steps)
    return [
        np.sort(np.argsort(-layer, kind="stable")[:count])
        for layer, count in zip(scores, counts, strict=True)
    ]


def _shared_out(scores: Sequence[NDArray[np.float64]], steps: int) -> list[int]:
    """Return how many units each layer keeps if ``steps`` times 16 stay and layers compete."""
    ranked = [np.sort(layer)[::-1] for layer in scores]
    # The worth of each further step of a layer: falling, so taking the best keeps whole prefixes.
    worth = [
        (float(layer[at : at + STEP].mean()), index)
        for index, layer in enumerate(ranked)
        for at in range(STEP, len(layer) - STEP + 1, STEP)
    ]
    taken = sorted(worth, reverse=True)[: steps - len(scores)]
    counts = STEP * (1 + np.bincount([index for _, index in taken], minlength=len(scores)))
    return [int(count) for count in counts]


def refitted(
    weights: Mapping[str, NDArray[np.float32]],
    kept: Sequence[Units],
    grams: Sequence[NDArray[np.float64]],
) -> Weights:
    """Let the kept units of each layer make up for the others, as far as they can.

    Parameters
    ----------
    weights : mapping of str to float32 array
    kept : sequence of int64 arrays
        Units that stay, per layer.
    grams : sequence of float64 [units, units]
        Gram matrix of each layer's units, see `icd_tvm.adapters.units.refit_consumer`.
    """
    result = dict(weights)
    for index, (units, gram) in enumerate(zip(kept, grams, strict=True)):
        name = f"encoder.layer.{index}.output.dense.weight"
        alive = np.isin(np.arange(len(gram)), units)
        result[name] = refit_consumer(weights[name].T, gram, alive, RIDGE).T
    return result


def without_units(weights: Mapping[str, NDArray[np.float32]], kept: Sequence[Units]) -> Weights:
    """Return the weights of an encoder that has only the kept units of each layer."""
    narrow = dict(weights)
    for index, units in enumerate(kept):
        for name, axis in _holders(index):
            narrow[name] = np.take(weights[name], units, axis)
    return narrow


def with_zero_units(
    weights: Mapping[str, NDArray[np.float32]], kept: Sequence[Units], width: int
) -> Weights:
    """Undo `without_units` at full width: units that are gone are zero where they stood."""
    wide = dict(weights)
    for index, units in enumerate(kept):
        for name, axis in _holders(index):
            shape = list(weights[name].shape)
            shape[axis] = width
            wide[name] = np.zeros(shape, np.float32)
            wide[name][(slice(None),) * axis + (units,)] = weights[name]
    return wide


def _holders(index: int) -> tuple[tuple[str, int], ...]:
    """Return the weights [out, in] that hold a layer's units, and on which axis."""
    at = f"encoder.layer.{index}"
    inner, outer = f"{at}.intermediate.dense", f"{at}.output.dense"
    return (f"{inner}.weight", 0), (f"{inner}.bias", 0), (f"{outer}.weight", 1)
