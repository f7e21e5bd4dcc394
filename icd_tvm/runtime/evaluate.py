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


def evaluate(text: str, imported: ImportedModel, arms: Mapping[str, Built]) -> dict[str, Any]:
    """Evaluate the dense, the identity and the iterative arm.

    Parameters
    ----------
    text : str
        See :func:`parse_quality`.
    imported : ImportedModel
        A BERT-like encoder [batch, seq] -> last hidden state.
    arms : Mapping[str, Built]
        The compiled arms.

    Returns
    -------
    dict
        ``metric``, ``n``, ``source``, ``arms`` (name -> value), ``delta_points`` (iterative
        less identity: what the order changed) and ``transform_points`` (identity less dense:
        what the transform changed), both in percentage points.

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

    scored = [name for name in ("dense", "identity", "iterative") if name in arms]
    results = {name: score(arms[name]) for name in scored}
    any_result = next(iter(results.values()))
    values = {name: result.value for name, result in results.items()}
    same = values.get("identity", values["dense"])
    return {
        "metric": any_result.metric,
        "n": any_result.n,
        "source": any_result.source,
        "arms": values,
        "delta_points": 100 * (values.get("iterative", same) - same),
        "transform_points": 100 * (same - values["dense"]),
    }
