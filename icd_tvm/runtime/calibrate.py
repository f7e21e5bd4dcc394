"""Run calibration inputs through the compiled model and add up statistics of its matmul inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from icd_tvm._tvm import apply_pass
from icd_tvm.adapters.activation_statistics import activation_statistics
from icd_tvm.relax_passes.collect_activation_stats import CollectActivationStats, Statistic
from icd_tvm.runtime.build import build
from icd_tvm.steps import steps


def calibrate(
    mod: Any,
    requests: Mapping[str, Statistic],
    batches: Sequence[Mapping[str, np.ndarray]],
    target: Any,
) -> dict[str, Any]:
    """Return statistics of matmul inputs over all calibration tokens.

    Parameters
    ----------
    mod : tvm.IRModule
        The model; left untouched.
    requests : Mapping[str, Statistic]
        Matmul binding name -> ``"moment"``, ``"gram"``, ``"gram-halves"``, ``"activation"`` or
        ``"activation+gram"``.
    batches : Sequence[Mapping[str, numpy.ndarray]]
        Calibration inputs by name.
    target : tvm.target.Target
        Where the calibration runs.

    Returns
    -------
    dict
        By binding name: float64 [K] (moment), [K, K] (gram) or [2, K, K] (gram-halves: of the
        batches with even numbers, and of the others), divided by the number of calls; or
        `icd_tvm.adapters.activation_statistics.ActivationStatistics` of all tokens.
    """
    if not requests:
        return {}
    runner = build(apply_pass(CollectActivationStats(requests), mod), target, tune=False)
    totals: dict[str, Any] = {}
    for number, feeds in enumerate(steps(batches, "calibrating activations")):
        statistics = runner.run_all(feeds)[-len(requests) :]
        for (name, kind), found in zip(requests.items(), statistics, strict=True):
            if kind == "gram-halves":
                total = totals.setdefault(name, np.zeros((2, *found.shape)))
                total[number % 2] += found
            else:
                totals[name] = _added(totals.get(name), found, kind)
    return {
        name: totals[name] if kind.startswith("activation") else totals[name] / len(batches)
        for name, kind in requests.items()
    }


def _added(total: Any, found: np.ndarray, kind: Statistic) -> Any:
    if not kind.startswith("activation"):
        return found.astype(np.float64) + (0.0 if total is None else total)
    seen = activation_statistics(found, gram=kind == "activation+gram")
    return seen if total is None else total.merged(seen)
