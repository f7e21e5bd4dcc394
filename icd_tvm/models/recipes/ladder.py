"""Prune a classifier rung by rung, each time a little more, and let it follow its dense twin."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from icd_tvm.models.bert import BertConfig
from icd_tvm.models.recipes.scoring import unit_costs, unit_grams
from icd_tvm.models.recipes.training import Sentences, Training, predict, train
from icd_tvm.models.recipes.units import (
    Units,
    Weights,
    choose_units,
    refitted,
    with_zero_units,
    without_units,
)

# Sentences that tell what the units cost; their tokens must outnumber a layer's units.
SCORED = 512
Right = NDArray[np.bool_]


@dataclass(frozen=True)
class Ladder:
    """How to climb.

    Attributes
    ----------
    sparsities : sequence of float
        Share of dropped feed-forward units at each rung, rising.
    tuning : Training
        After each pruning.
    seconds : float, optional
        No rung is begun that would end later than this, going by the longest so far.
    uniform : bool
        Drop the same share of every layer instead of ranking the units of all layers together.
    """

    sparsities: Sequence[float] = (0.3, 0.5, 0.6, 0.75, 0.85, 0.9)
    tuning: Training = field(default_factory=lambda: Training(epochs=2, rate=2e-4))
    seconds: float | None = None
    uniform: bool = False


@dataclass(frozen=True)
class Rung:
    """A pruned classifier: ``weights`` at full width with zeros where units were dropped.

    Attributes
    ----------
    asked : float
        Share of dropped units that was asked for.
    weights : dict of str to float32 array
    kept : list of int64 arrays
        Units that live, per layer.
    right : bool [n]
        Which sentences of the judged set are classified rightly.
    seconds : float
        Wall time of the rung.
    """

    asked: float
    weights: Weights
    kept: list[Units]
    right: Right
    seconds: float


def right_ones(config: BertConfig, weights: Weights, data: Sentences) -> Right:
    """Return which sentences get their label, bool [n]."""
    return np.asarray(predict(config, weights, data).argmax(-1) == data.labels)


def climb(
    config: BertConfig,
    dense: Weights,
    data: Sentences,
    judged: Sentences,
    ladder: Ladder,
    progress: Callable[[str], None] = lambda line: None,
) -> Iterator[Rung]:
    """Yield one pruned classifier a rung, each made from the one before.

    Parameters
    ----------
    config : BertConfig
    dense : dict of str to float32 array
        The dense twin: the start, and the teacher of every rung.
    data, judged : Sentences
        What is trained on (without its labels), and what ``right`` of a rung tells of.
    ladder : Ladder
    progress : callable
        Is told a line now and then.

    Raises
    ------
    ConfigError
        A sparsity leaves a layer too few units.
    """
    began, longest, student = time.perf_counter(), 0.0, dense
    kept: list[Units] = [np.arange(config.ffn)] * config.layers
    scored = Sentences(data.ids[:SCORED], data.mask[:SCORED], data.labels[:SCORED])
    for sparsity in ladder.sparsities:
        start = time.perf_counter()
        if ladder.seconds is not None and start - began + longest > ladder.seconds:
            progress(f"no time left for sparsity {sparsity}")
            return
        costs = unit_costs(config, student, scored)
        chosen = choose_units(costs, sparsity, config.ffn, ladder.uniform)
        kept = [units[some] for units, some in zip(kept, chosen, strict=True)]
        grams = unit_grams(config, student, scored)
        student = without_units(refitted(student, chosen, grams), chosen)
        student = train(config, student, data, ladder.tuning, dense, progress)
        right = right_ones(config, student, judged)
        longest = max(longest, time.perf_counter() - start)
        whole = with_zero_units(student, kept, config.ffn)
        yield Rung(sparsity, whole, kept, right, time.perf_counter() - start)
