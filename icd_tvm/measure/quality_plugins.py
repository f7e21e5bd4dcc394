"""The tasks that ``--quality NAME[:N]`` knows: add a line to TASKS, and to SEARCH, to add one.

Each has two disjoint parts: what figures are reported on (TASKS), and what a search under a
quality budget may look at as often as it likes (SEARCH).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icd_tvm.errors import ConfigError, MeasurementError
from icd_tvm.measure.datasets import byte_windows, sst2_sentences, token_windows
from icd_tvm.measure.quality import embed
from icd_tvm.measure.quality_task import QualityTask, Run, StsbTask, TaskScore
from icd_tvm.models.smollm2 import smollm2_tokenizer
from icd_tvm.models.tokenize import encode
from icd_tvm.steps import steps

Array = NDArray[Any]
# Weight of the penalty of the linear probe, for unit vectors.
RIDGE = 1.0
# A search looks at every 16th pair of STS-B train, 360 in all, and at as many of SST-2 train.
STSB_TRAIN, SEARCH_STEP = 5749, 16
SEARCH_SENTENCES = 360


def log_probabilities(outputs: Array) -> NDArray[np.float64]:
    """Return log probabilities along the last axis of logits, or of probabilities."""
    wide = outputs.astype(np.float64)
    if wide.min() >= 0 and np.allclose(wide.sum(-1), 1, atol=1e-3):
        return np.asarray(np.log(np.maximum(wide, 1e-12)))
    shifted = wide - wide.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def token_losses(logits: Array, targets: Array) -> NDArray[np.float64]:
    """Return the negative log likelihood of each target [n] under logits [n, vocabulary], nats."""
    found = log_probabilities(logits)[np.arange(len(targets)), targets]
    return np.asarray(-found)


@dataclass(frozen=True)
class SstTask:
    """Accuracy on SST-2 of a classifier, or of a linear probe on an encoder's vectors.

    The probe is fitted once, on the train vectors of the model that :meth:`fitted` is given, and
    judges every model: one fitted again for each would hide what changed.

    Parameters
    ----------
    seq, batch : int
        Shape of the model's inputs.
    limit : int, optional
        Sentences; all that there are if not given.
    train : int
        Sentences the probe is fitted on, the first of train.
    probe : float64 [hidden + 1], optional
    split : {"dev", "train"}
    start : int
        Number of the first sentence.
    """

    seq: int
    batch: int
    limit: int | None = None
    train: int = 500
    probe: Array | None = None
    split: str = "dev"
    start: int = 0
    metric = "sst2_accuracy"

    @property
    def source(self) -> str:
        """Metric, data set and part of it."""
        how = "" if self.probe is None else f", linear probe on {self.train} of train"
        return f"{self.metric}, SST-2 {self.split}, {len(self._judged)} sentences{how}"

    def fitted(self, run: Run) -> SstTask:
        """Return the task with a probe of ``run``, or itself where ``run`` is a classifier."""
        if np.asarray(run(encode([""] * self.batch, self.seq))).ndim == 2:
            return self
        pairs = sst2_sentences("train", self.train)
        rows = self._rows(run, [text for text, _ in pairs])
        wanted = np.array([2.0 * label - 1 for _, label in pairs])
        gram = rows.T @ rows + RIDGE * np.eye(rows.shape[1])
        return replace(self, probe=np.linalg.solve(gram, rows.T @ wanted))

    def evaluate(self, run: Run) -> TaskScore:
        """Return the accuracy x 100 and the logits [sentences, classes]."""
        texts = [text for text, _ in self._judged]
        if self.probe is None:
            logits = self._classified(run, texts)
        else:
            margin = self._rows(run, texts) @ self.probe
            logits = np.stack([-margin, margin], axis=1)
        right = logits.argmax(-1) == np.array([label for _, label in self._judged])
        return TaskScore(100 * float(right.mean()), logits, items=right.astype(float), logits=True)

    def _rows(self, run: Run, texts: Sequence[str]) -> Array:
        vectors = embed(run, texts, self.seq, self.batch)
        return np.concatenate([vectors, np.ones((len(vectors), 1))], axis=1)

    def _classified(self, run: Run, texts: Sequence[str]) -> Array:
        parts = []
        for start in steps(range(0, len(texts), self.batch), "evaluating quality"):
            chunk = list(texts[start : start + self.batch])
            feeds = encode(chunk + [""] * (self.batch - len(chunk)), self.seq)
            parts.append(np.asarray(run(feeds))[: len(chunk)])
        return np.concatenate(parts)

    @cached_property
    def _judged(self) -> list[tuple[str, int]]:
        stop = None if self.limit is None else self.start + self.limit
        return sst2_sentences(self.split, stop)[self.start :]


@dataclass(frozen=True)
class WindowTask:
    """Windows of symbols; the model gives logits of a class for every symbol.

    Parameters
    ----------
    metric, data : str
    feeds : sequence of dict
        Model inputs of each window.
    targets : int64 [windows, symbols]
        The right class of the first ``symbols`` outputs of each window.
    """

    metric: str
    data: str
    feeds: Sequence[dict[str, Array]]
    targets: Array

    @property
    def source(self) -> str:
        """Metric, data set and part of it."""
        return f"{self.metric}, {self.data}, {len(self.feeds)} windows"

    def evaluate(self, run: Run) -> TaskScore:
        """Return the share of right classes x 100; ``nll`` (nats) and ``perplexity`` beside it.

        Raises
        ------
        MeasurementError
            The model's outputs are not finite.
        """
        kept, losses, right = [], [], []
        pairs = list(zip(self.feeds, self.targets, strict=True))
        for feeds, targets in steps(pairs, "evaluating quality"):
            outputs = np.asarray(run(feeds))
            logits = outputs.reshape(-1, outputs.shape[-1])[: len(targets)]
            if not np.isfinite(logits).all():
                raise MeasurementError(f"the model's outputs on {self.data} hold NaN or infinity")
            if targets.max() >= logits.shape[1]:
                raise MeasurementError(
                    f"{self.data} has class {targets.max()}, the model has {logits.shape[1]}",
                    "this task needs a model of the same classes",
                )
            losses.append(float(token_losses(logits, targets).mean()))
            right.append(float((logits.argmax(-1) == targets).mean()))
            # All of a vocabulary for every symbol: half precision, as two models are kept.
            kept.append(log_probabilities(logits).astype(np.float16))
        nll = float(np.mean(losses))
        figures = {"nll": nll, "perplexity": float(np.exp(nll))}
        outputs, items = np.concatenate(kept), np.array(right)
        return TaskScore(100 * float(items.mean()), outputs, figures, items, logits=True)


def spread_rows(total: int, count: int) -> NDArray[np.int64]:
    """Return ``count`` row numbers spread evenly over ``total``."""
    return np.linspace(0, total - 1, count).astype(np.int64)


def _stsb(inputs: Sequence[Any], limit: int | None) -> QualityTask:
    batch, seq = _shape(inputs, "stsb", 2)
    return StsbTask("dev", stop=limit, seq=seq, batch=batch)


def _stsb_search(inputs: Sequence[Any], limit: int | None) -> QualityTask:
    batch, seq = _shape(inputs, "stsb", 2)
    step = max(1, STSB_TRAIN // limit) if limit else SEARCH_STEP
    stop = step * limit if limit else None
    return StsbTask("train", stop=stop, step=step, seq=seq, batch=batch)


def _sst2(inputs: Sequence[Any], limit: int | None) -> QualityTask:
    batch, seq = _shape(inputs, "sst2", 2)
    return SstTask(seq, batch, limit)


def _sst2_search(inputs: Sequence[Any], limit: int | None) -> QualityTask:
    batch, seq = _shape(inputs, "sst2", 2)
    task = SstTask(seq, batch, limit or SEARCH_SENTENCES, split="train")
    return replace(task, start=task.train)


def _bytes(inputs: Sequence[Any], limit: int | None) -> QualityTask:
    ids, _ = byte_windows()
    return _windows_of_code(inputs, spread_rows(len(ids), min(limit or 64, len(ids))))


def _bytes_search(inputs: Sequence[Any], limit: int | None) -> QualityTask:
    ids, _ = byte_windows()
    count = min(limit or 64, len(ids))
    others = np.setdiff1d(np.arange(len(ids)), spread_rows(len(ids), count))
    if not len(others):
        raise ConfigError(f"bytes:{limit} leaves none of {len(ids)} windows to search on")
    chosen = others[spread_rows(len(others), min(count, len(others)))]
    return _windows_of_code(inputs, chosen, "other source code")


def _windows_of_code(
    inputs: Sequence[Any], chosen: NDArray[np.int64], data: str = "source code"
) -> QualityTask:
    shape, (ids, labels) = _shape(inputs, "bytes"), byte_windows()
    if np.prod(shape) != ids.shape[1]:
        raise ConfigError(f"bytes needs an input of {ids.shape[1]} bytes, not {shape}")
    feeds = [{inputs[0].name: ids[i].reshape(shape)} for i in chosen]
    targets = np.repeat(labels[chosen, None], ids.shape[1], axis=1)
    return WindowTask("byte_accuracy", data, feeds, targets)


def _wikitext(inputs: Sequence[Any], limit: int | None) -> QualityTask:
    return _windows_of_text(inputs, 0, limit or 4)


def _wikitext_search(inputs: Sequence[Any], limit: int | None) -> QualityTask:
    count = limit or 4
    return _windows_of_text(inputs, count, count)


def _windows_of_text(inputs: Sequence[Any], first: int, count: int) -> QualityTask:
    batch, seq = _shape(inputs, "wikitext", 2)
    if batch != 1:
        raise ConfigError(f"wikitext needs batch 1, not {batch}")
    tokens = token_windows(smollm2_tokenizer(), first + count, seq)[first:]
    feeds = [{inputs[0].name: window[None]} for window in tokens]
    data = "WikiText-2 validation" + (f" from window {first}" if first else "")
    return WindowTask("top1_next_token", data, feeds, tokens[:, 1:])


def _shape(inputs: Sequence[Any], name: str, rank: int | None = None) -> tuple[int, ...]:
    shape = tuple(inputs[0].shape)
    if rank is not None and len(shape) != rank:
        raise ConfigError(f"{name} needs inputs [batch, seq], not {list(shape)}")
    return shape


TASKS: dict[str, Callable[[Sequence[Any], int | None], QualityTask]] = {
    "stsb": _stsb,
    "sst2": _sst2,
    "bytes": _bytes,
    "wikitext": _wikitext,
}
SEARCH: dict[str, Callable[[Sequence[Any], int | None], QualityTask]] = {
    "stsb": _stsb_search,
    "sst2": _sst2_search,
    "bytes": _bytes_search,
    "wikitext": _wikitext_search,
}


def parse_quality(text: str) -> tuple[str, int | None]:
    """Parse ``NAME`` or ``NAME:N`` into the task and the number of samples (None: its default).

    Raises
    ------
    ConfigError
        If the task is unknown or the number is not above 1.
    """
    name, _, limit = text.partition(":")
    if name not in TASKS:
        raise ConfigError(
            f"unknown quality metric {text!r}", f"known: {', '.join(TASKS)}; NAME:N takes N samples"
        )
    if ":" in text and not (limit.isdecimal() and int(limit) > 1):
        raise ConfigError(f"bad number of samples in {text!r}", f"write {name}:300")
    return name, int(limit) if limit else None


def make_task(text: str, inputs: Sequence[Any], *, search: bool = False) -> QualityTask:
    """Return the task of ``text`` for a model with these inputs (``name``, ``shape``).

    With ``search`` it is the same metric on data that no figure is reported on.

    Raises
    ------
    ConfigError
        An unknown task, or a model that it does not fit.
    MissingDependencyError, ModelFileError
        Data or tokenizer absent, or changed data.
    """
    name, limit = parse_quality(text)
    return (SEARCH if search else TASKS)[name](inputs, limit)
