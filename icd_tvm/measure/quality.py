"""Task quality of a sentence encoder, and agreement between two outputs."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from icd_tvm.errors import (
    ConfigError,
    MeasurementError,
    MissingDependencyError,
    ModelFileError,
    ShapeError,
)
from icd_tvm.models.tokenize import encode
from icd_tvm.steps import steps

DATA_VARIABLE = "ICD_DATA"
DATA_HINT = f"set {DATA_VARIABLE} to the folder that holds stsb/, sst2/ and the others"

Feeds = dict[str, NDArray[np.int64]]
Runner = Callable[[Feeds], NDArray[Any]]


@dataclass(frozen=True)
class QualityResult:
    """One task metric.

    Attributes
    ----------
    metric : str
    value : float
        In the metric's own unit; a Spearman correlation lies in -1..1.
    n : int
        Number of samples it was measured on.
    source : str
        Data set and split.
    """

    metric: str
    value: float
    n: int
    source: str


@dataclass(frozen=True)
class Agreement:
    """How close a candidate's output is to the reference's.

    Attributes
    ----------
    cosine_mean, cosine_min : float
        Cosine similarity of the vectors along the last axis.
    max_abs : float
        Largest absolute difference.
    max_rel : float
        ``max_abs`` over the largest magnitude in the reference.
    """

    cosine_mean: float
    cosine_min: float
    max_abs: float
    max_rel: float


def data_dir() -> Path | None:
    """Return the folder with evaluation data, None when there is none.

    The environment variable ICD_DATA wins; otherwise ``../shared/data`` beside the repository
    or the current folder.
    """
    named = os.environ.get(DATA_VARIABLE)
    if named:
        return Path(named) if Path(named).is_dir() else None
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        folder = root.parent / "shared" / "data"
        if folder.is_dir():
            return folder
    return None


def stsb_pairs(split: str = "dev", limit: int | None = None) -> list[tuple[str, str, float]]:
    """Return STS-B sentence pairs with their similarity.

    Parameters
    ----------
    split : str
        ``"train"`` (5,749 pairs) or ``"dev"`` (1,500).
    limit : int, optional
        Only the first pairs.

    Returns
    -------
    list of (str, str, float)
        Two sentences and a score from 0 to 5.

    Raises
    ------
    MissingDependencyError
        The data folder or the split is absent.
    ConfigError
        limit is below 1.
    ModelFileError
        The file is not the expected table.

    Notes
    -----
    Cer et al., "SemEval-2017 Task 1" (STS benchmark), English.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit {limit} is below 1")
    if split not in ("train", "dev"):
        raise MissingDependencyError(f"STS-B split {split!r} not found", "known: train, dev")
    from icd_tvm.measure.datasets import dataset_file

    path = dataset_file(f"stsb/stsb-en-{split}.csv")
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream))[:limit]
    try:
        return [(first, second, float(score)) for first, second, score in rows]
    except ValueError as error:
        raise ModelFileError(f"{path} is not a table of two sentences and a score") from error


def mean_pool(hidden: NDArray[Any], mask: NDArray[Any]) -> NDArray[np.float32]:
    """Average token vectors where the mask is one.

    Parameters
    ----------
    hidden : ndarray of float, [batch, seq, hidden]
    mask : ndarray of int, [batch, seq]

    Returns
    -------
    ndarray of float32, [batch, hidden]

    Raises
    ------
    ShapeError
        The shapes do not belong together.
    """
    if hidden.ndim != 3 or hidden.shape[:2] != mask.shape:
        raise ShapeError(f"hidden states {hidden.shape} do not fit the mask {mask.shape}")
    weights = mask[:, :, None].astype(np.float32)
    total = (hidden.astype(np.float32) * weights).sum(axis=1)
    pooled: NDArray[np.float32] = total / np.maximum(weights.sum(axis=1), 1e-9)
    return pooled


def _unit(vectors: NDArray[Any]) -> NDArray[np.float64]:
    wide = vectors.astype(np.float64)
    unit: NDArray[np.float64] = wide / np.maximum(
        np.linalg.norm(wide, axis=-1, keepdims=True), 1e-12
    )
    return unit


def embed(run: Runner, texts: Sequence[str], seq: int, batch: int = 1) -> NDArray[np.float64]:
    """Return unit sentence vectors.

    Parameters
    ----------
    run : callable
        Takes int64 ``input_ids``, ``attention_mask`` and ``token_type_ids`` of shape
        ``[batch, seq]`` and returns ``last_hidden_state`` ``[batch, seq, hidden]``.
    texts : sequence of str
    seq, batch : int
        The shape the model was compiled for; the last batch is filled up.

    Returns
    -------
    ndarray of float64, [len(texts), hidden]

    Raises
    ------
    MeasurementError
        The model returned NaN or infinity.
    """
    if batch < 1:
        raise ConfigError(f"batch {batch} is below 1")
    pooled = []
    for start in steps(range(0, len(texts), batch), "evaluating quality"):
        chunk = list(texts[start : start + batch])
        feeds = encode(chunk + [""] * (batch - len(chunk)), seq)
        vectors = mean_pool(np.asarray(run(feeds)), feeds["attention_mask"])
        pooled.append(vectors[: len(chunk)])
    vectors = np.concatenate(pooled)
    if not np.isfinite(vectors).all():
        raise MeasurementError("the model's sentence vectors hold NaN or infinity")
    return _unit(vectors)


def stsb_spearman(
    run: Runner,
    seq: int = 128,
    limit: int | None = None,
    *,
    split: str = "dev",
    batch: int = 1,
) -> QualityResult:
    """Measure STS-B: Spearman correlation of cosine similarity with the human scores.

    Each distinct sentence is encoded once; token vectors are averaged over the mask.

    Parameters
    ----------
    run, seq, batch
        See `embed`.
    limit : int, optional
        Only the first pairs.
    split : str
        See `stsb_pairs`.

    Returns
    -------
    QualityResult
        ``metric`` is ``stsb_spearman``.

    Raises
    ------
    MissingDependencyError
        Data or tokenizer absent.
    MeasurementError
        The correlation is undefined: fewer than two pairs, equal scores or not finite.
    """
    pairs = stsb_pairs(split, limit)
    texts = sorted({text for first, second, _ in pairs for text in (first, second)})
    row = {text: index for index, text in enumerate(texts)}
    vectors = embed(run, texts, seq, batch)
    left = vectors[[row[first] for first, _, _ in pairs]]
    right = vectors[[row[second] for _, second, _ in pairs]]
    cosines = (left * right).sum(axis=1)
    scores = [score for _, _, score in pairs]
    if len(pairs) < 2 or np.ptp(cosines) == 0 or np.ptp(scores) == 0:
        raise MeasurementError(f"Spearman is undefined on these {len(pairs)} STS-B pairs")
    value = float(stats.spearmanr(cosines, scores).statistic)
    return QualityResult("stsb_spearman", value, len(pairs), f"STS-B {split}")


def agreement(reference: NDArray[Any], candidate: NDArray[Any]) -> Agreement:
    """Compare two outputs of the same inputs.

    Parameters
    ----------
    reference, candidate : ndarray of float, [..., hidden]

    Returns
    -------
    Agreement
        Two zero vectors count as equal (cosine 1).

    Raises
    ------
    ShapeError
        Shapes differ, or the arrays are empty or scalars.
    MeasurementError
        One of them holds NaN or infinity.
    """
    if reference.shape != candidate.shape or reference.size == 0 or reference.ndim == 0:
        raise ShapeError(f"cannot compare outputs of shapes {reference.shape}, {candidate.shape}")
    if not (np.isfinite(reference).all() and np.isfinite(candidate).all()):
        raise MeasurementError("an output to compare holds NaN or infinity")
    left, right = reference.astype(np.float64), candidate.astype(np.float64)
    cosines = (_unit(left) * _unit(right)).sum(axis=-1)
    cosines = np.where((left == right).all(axis=-1), 1.0, cosines)
    max_abs = float(np.abs(left - right).max())
    scale = float(np.abs(left).max())
    max_rel = max_abs / scale if scale else (0.0 if max_abs == 0 else float("inf"))
    return Agreement(float(cosines.mean()), float(cosines.min()), max_abs, max_rel)
