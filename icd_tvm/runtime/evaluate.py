"""Task quality of the compiled arms, beside the dense one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from icd_tvm.measure.quality_compare import judge
from icd_tvm.measure.quality_plugins import make_task, parse_quality
from icd_tvm.measure.quality_task import Run
from icd_tvm.models.importer import ImportedModel
from icd_tvm.runtime.arms import DENSE, IDENTITY, ITERATIVE
from icd_tvm.runtime.build import Built

__all__ = ["evaluate", "parse_quality"]


def evaluate(text: str, imported: ImportedModel, arms: Mapping[str, Built]) -> dict[str, Any]:
    """Evaluate the dense, the identity and the iterative arm.

    Parameters
    ----------
    text : str
        ``NAME`` or ``NAME:N``, see :data:`icd_tvm.measure.quality_plugins.TASKS`.
    imported : ImportedModel
        A model that fits the task.
    arms : Mapping[str, Built]
        The compiled arms.

    Returns
    -------
    dict
        See :func:`icd_tvm.measure.quality_compare.judge`; and ``delta_points`` (iterative less
        identity: what the order changed) and ``transform_points`` (identity less dense: what the
        transform changed), both in percentage points.

    Raises
    ------
    MissingDependencyError
        If the evaluation data or the tokenizer is absent.
    ConfigError
        If the model does not fit the task.
    """
    task = make_task(text, imported.inputs)
    types = {spec.name: spec.dtype for spec in imported.inputs}
    runs = {
        name: _runner(arms[name], types) for name in (DENSE, IDENTITY, ITERATIVE) if name in arms
    }
    found = judge(task, runs, [(ITERATIVE, IDENTITY), (IDENTITY, DENSE), (ITERATIVE, DENSE)])
    values = found["arms"]
    same = values.get(IDENTITY, values[DENSE])
    return {
        **found,
        "delta_points": 100 * (values.get(ITERATIVE, same) - same),
        "transform_points": 100 * (same - values[DENSE]),
    }


def _runner(built: Built, types: Mapping[str, str]) -> Run:
    def run(feeds: Mapping[str, Any]) -> Any:
        return np.asarray(built.run_all({n: feeds[n].astype(t) for n, t in types.items()})[0])

    return run
