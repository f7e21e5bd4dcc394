"""Task quality of the compiled arms, beside the dense one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from icd_tvm.errors import ConfigError
from icd_tvm.measure.quality import stsb_spearman
from icd_tvm.models.importer import ImportedModel
from icd_tvm.runtime.build import Built


def parse_quality(text: str) -> tuple[str, int | None]:
    """Parse ``stsb`` or ``stsb:300`` into the metric and the number of pairs (None: all).

    Raises
    ------
    ConfigError
        If the metric is unknown or the number is not positive.
    """
    metric, _, limit = text.partition(":")
    if metric != "stsb":
        raise ConfigError(f"unknown quality metric {text!r}", "known: stsb, stsb:PAIRS")
    if limit and not (limit.isdigit() and int(limit) > 1):
        raise ConfigError(f"bad number of pairs in {text!r}", "write stsb:300")
    return metric, int(limit) if limit else None


def evaluate(
    text: str, imported: ImportedModel, arms: Mapping[str, Built], kept: str
) -> dict[str, Any]:
    """Evaluate the dense arm, the identity arm and the arm that is kept.

    Parameters
    ----------
    text : str
        See :func:`parse_quality`.
    imported : ImportedModel
        A BERT-like encoder [batch, seq] -> last hidden state.
    arms : Mapping[str, Built]
        The compiled arms.
    kept : str
        Name of the arm that is kept.

    Returns
    -------
    dict
        ``metric``, ``n``, ``source``, ``arms`` (name -> value), ``delta_points`` (kept less
        identity: what the order changed) and ``transform_points`` (identity less dense: what the
        transform changed), both in percentage points.

    Raises
    ------
    MissingDependencyError
        If the evaluation data or the tokenizer is absent.
    """
    _, limit = parse_quality(text)
    batch, seq = imported.inputs[0].shape
    names = {spec.name: spec.dtype for spec in imported.inputs}

    def score(built: Built) -> Any:
        def run(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
            return built.run_all({n: feeds[n].astype(t) for n, t in names.items()})[0]

        return stsb_spearman(run, seq, limit, batch=batch)

    names_scored = dict.fromkeys(("dense", "identity", kept))
    results = {name: score(arms[name]) for name in names_scored}
    any_result = next(iter(results.values()))
    values = {name: result.value for name, result in results.items()}
    return {
        "metric": any_result.metric,
        "n": any_result.n,
        "source": any_result.source,
        "arms": values,
        "delta_points": 100 * (values[kept] - values["identity"]),
        "transform_points": 100 * (values["identity"] - values["dense"]),
    }
