"""Judge several models on one task: the metric of each, and how far outputs agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from icd_tvm.errors import ShapeError
from icd_tvm.measure.quality import agreement
from icd_tvm.measure.quality_task import QualityTask, Run, TaskScore
from icd_tvm.steps import steps

# Rows of logits that are widened at a time.
CHUNK = 1024
RESAMPLES = 1000


def judge(
    task: QualityTask, runs: Mapping[str, Run], pairs: list[tuple[str, str]]
) -> dict[str, Any]:
    """Evaluate models; the first one is what a probe is fitted on, where a task has one.

    Parameters
    ----------
    task : QualityTask
    runs : mapping of str to callable
        Arm -> model.
    pairs : list of (str, str)
        Candidate and reference whose outputs are compared, where both are in ``runs``.

    Returns
    -------
    dict
        ``metric``, ``source``, ``n``, ``arms`` (metric as a fraction), ``figures`` by arm and
        ``changes`` ``{"candidate/reference": ...}``, see :func:`compare`.
    """
    fit = getattr(task, "fitted", None)
    task = task if fit is None else fit(next(iter(runs.values())))
    scores = {name: task.evaluate(run) for name, run in steps(runs.items(), "evaluating arms")}
    first = next(iter(scores.values()))
    return {
        "metric": task.source.split(",")[0],
        "source": task.source,
        "n": first.samples or len(first.outputs if first.items is None else first.items),
        "arms": {name: score.points / 100 for name, score in scores.items()},
        "figures": {name: dict(score.figures) for name, score in scores.items() if score.figures},
        "changes": {
            f"{a}/{b}": compare(scores[b], scores[a])
            for a, b in pairs
            if a in scores and b in scores
        },
    }


def compare(reference: TaskScore, candidate: TaskScore) -> dict[str, Any]:
    """Compare two models on the same inputs.

    Returns
    -------
    dict
        ``agreement``: the share of equal decisions (largest logit), or the mean cosine where the
        outputs are vectors; ``cosine_mean``, ``cosine_min``; ``kl_mean``, ``kl_max`` in nats,
        reference against candidate, null for vectors; ``interval_points``: 95 % of the change of
        the metric by a paired bootstrap over samples, null where it is no mean over samples.

    Raises
    ------
    ShapeError
        Outputs of different shapes.
    """
    a, b = reference.outputs, candidate.outputs
    if a.shape != b.shape:
        raise ShapeError(f"cannot compare outputs of shapes {a.shape}, {b.shape}")
    slices = _slices(a)
    logits = reference.logits and candidate.logits
    mean, least = _cosines(a, b)
    kl = np.concatenate([_kl(a[part], b[part]) for part in slices]) if logits else None
    return {
        "agreement": same_decisions(reference, candidate) if logits else mean,
        "cosine_mean": mean,
        "cosine_min": least,
        "kl_mean": None if kl is None else float(kl.mean()),
        "kl_max": None if kl is None else float(kl.max()),
        "interval_points": _interval(reference, candidate),
    }


def agreement_of(reference: TaskScore, candidate: TaskScore) -> float:
    """Return the ``agreement`` of :func:`compare` alone.

    Raises
    ------
    ShapeError
        Outputs of different shapes.
    """
    if reference.logits and candidate.logits:
        return same_decisions(reference, candidate)
    return _cosines(reference.outputs, candidate.outputs)[0]


def same_decisions(reference: TaskScore, candidate: TaskScore) -> float:
    """Return the share of rows whose largest logit is the same."""
    a, b = reference.outputs, candidate.outputs
    if a.shape != b.shape:
        raise ShapeError(f"cannot compare outputs of shapes {a.shape}, {b.shape}")
    return float(np.mean(a.argmax(-1) == b.argmax(-1)))


def _cosines(a: Any, b: Any) -> tuple[float, float]:
    """Return the mean and the least cosine of rows."""
    found = [agreement(a[part], b[part]) for part in _slices(a)]
    weights = [len(a[part]) for part in _slices(a)]
    mean = float(np.average([one.cosine_mean for one in found], weights=weights))
    return mean, min(one.cosine_min for one in found)


def _slices(rows: Any) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, len(rows), CHUNK)]


def _kl(a: Any, b: Any) -> Any:
    from icd_tvm.measure.quality_plugins import log_probabilities

    left, right = log_probabilities(a), log_probabilities(b)
    return np.maximum((np.exp(left) * (left - right)).sum(-1), 0)


def _interval(reference: TaskScore, candidate: TaskScore) -> list[float] | None:
    if reference.items is None or candidate.items is None:
        return None
    change = candidate.items - reference.items
    rows = np.random.default_rng(0).integers(0, len(change), (RESAMPLES, len(change)))
    low, high = np.percentile(100 * change[rows].mean(axis=1), [2.5, 97.5])
    return [float(low), float(high)]
