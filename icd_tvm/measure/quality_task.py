"""A task that a quality budget is spent on: its figure, and what two models must agree on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from icd_tvm.errors import ConfigError, MeasurementError
from icd_tvm.measure.quality import mean_pool, stsb_pairs
from icd_tvm.models.tokenize import encode
from icd_tvm.steps import steps

Run = Callable[[Mapping[str, NDArray[Any]]], NDArray[Any]]


@dataclass(frozen=True)
class TaskScore:
    """What one model reaches.

    Attributes
    ----------
    points : float
        The metric x 100.
    outputs : ndarray of float, [n, d]
        Vectors that are compared with another model's.
    figures : mapping of str to float
        More of the task: ``nll`` in nats, ``perplexity``.
    items : float64 [samples], optional
        What the metric is the mean of (fractions), sample by sample.
    logits : bool
        The outputs are logits of classes.
    samples : int
        What the metric was measured on; 0: the rows of ``outputs``.
    """

    points: float
    outputs: NDArray[Any]
    figures: Mapping[str, float] = field(default_factory=dict)
    items: NDArray[np.float64] | None = None
    logits: bool = False
    samples: int = 0


class QualityTask(Protocol):
    """Inputs with a metric."""

    @property
    def source(self) -> str:
        """Metric, data set and part of it."""

    def evaluate(self, run: Run) -> TaskScore:
        """Run a model on every input and return its score."""


@dataclass(frozen=True)
class StsbTask:
    """Spearman correlation on a part of STS-B; the outputs are the sentence vectors.

    Parameters
    ----------
    split : str
        ``train`` or ``dev``.
    start, stop, step : int, optional
        Pairs of the split that are used, as in a slice. The files are sorted by origin, so a
        part that stands for the whole takes every ``step``-th pair.
    seq, batch : int
        Shape of the model's inputs; longer sentences are cut.
    fixed : bool
        False for a model that takes any shape: then sentences go by length, so that a batch is
        as short as its longest sentence.
    """

    split: str = "dev"
    start: int = 0
    stop: int | None = None
    step: int = 1
    seq: int = 56
    batch: int = 16
    fixed: bool = True

    @property
    def source(self) -> str:
        """Data set and pairs."""
        pairs = len(self._pairs)
        return f"stsb_spearman, STS-B {self.split} [{self._part}], {pairs} pairs"

    @property
    def _part(self) -> str:
        return f"{self.start}:{'' if self.stop is None else self.stop}:{self.step}"

    def evaluate(self, run: Run) -> TaskScore:
        """Return Spearman x 100 and the sentence vectors, float32 [sentences, hidden].

        Parameters
        ----------
        run : callable
            int64 ``input_ids``, ``attention_mask``, ``token_type_ids`` [batch, seq] -> last
            hidden state [batch, seq, hidden].

        Raises
        ------
        MissingDependencyError
            Data or tokenizer absent.
        MeasurementError
            The model's vectors are not finite, or the correlation is undefined.
        """
        vectors = self._embed(run)
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        row = {text: index for index, text in enumerate(self._texts)}
        left = [row[first] for first, _, _ in self._pairs]
        right = [row[second] for _, second, _ in self._pairs]
        cosines = (unit[left] * unit[right]).sum(axis=1)
        scores = [score for _, _, score in self._pairs]
        if np.ptp(cosines) == 0 or np.ptp(scores) == 0:
            raise MeasurementError(f"Spearman is undefined on {self.source}")
        value = float(stats.spearmanr(cosines, scores).statistic)
        return TaskScore(100 * value, vectors, samples=len(self._pairs))

    def _embed(self, run: Run) -> NDArray[Any]:
        vectors: NDArray[Any] | None = None
        for rows, feeds in steps(self._batches, "evaluating quality"):
            pooled = mean_pool(np.asarray(run(feeds)), feeds["attention_mask"])[: len(rows)]
            if vectors is None:
                vectors = np.zeros((len(self._texts), pooled.shape[1]))
            vectors[rows] = pooled
        if vectors is None or not np.isfinite(vectors).all():
            raise MeasurementError("the model's sentence vectors hold NaN or infinity")
        return vectors

    @cached_property
    def _pairs(self) -> list[tuple[str, str, float]]:
        pairs = stsb_pairs(self.split)[self.start : self.stop : self.step]
        if len(pairs) < 2:
            raise ConfigError(f"part {self._part} of STS-B {self.split} has no two pairs")
        return pairs

    @cached_property
    def _texts(self) -> list[str]:
        return sorted({text for first, second, _ in self._pairs for text in (first, second)})

    @cached_property
    def _batches(self) -> list[tuple[NDArray[Any], dict[str, NDArray[np.int64]]]]:
        """Sentence numbers and model inputs, tokenized once for every candidate."""
        encoded = encode(self._texts, self.seq)
        lengths = encoded["attention_mask"].sum(axis=1)
        order = np.arange(len(lengths)) if self.fixed else np.argsort(lengths, kind="stable")
        batches = []
        for first in range(0, len(order), self.batch):
            rows = order[first : first + self.batch]
            # The last batch is filled up with its last sentence.
            filled = rows if not self.fixed else np.resize(rows, self.batch)
            cut = self.seq if self.fixed else int(lengths[rows].max())
            batches.append((rows, {name: ids[filled, :cut] for name, ids in encoded.items()}))
        return batches
