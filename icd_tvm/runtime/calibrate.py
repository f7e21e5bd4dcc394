"""Run calibration inputs through the compiled model and add up second moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from icd_tvm._tvm import apply_pass
from icd_tvm.relax_passes.collect_activation_stats import CollectActivationStats, Statistic
from icd_tvm.runtime.build import build


def calibrate(
    mod: Any,
    requests: Mapping[str, Statistic],
    batches: Sequence[Mapping[str, np.ndarray]],
    target: Any,
) -> dict[str, np.ndarray]:
    """Return the mean second moments of matmul inputs over all calibration tokens.

    Parameters
    ----------
    mod : tvm.IRModule
        The model; left untouched.
    requests : Mapping[str, Statistic]
        Matmul binding name -> ``"moment"`` or ``"gram"``.
    batches : Sequence[Mapping[str, numpy.ndarray]]
        Calibration inputs by name.
    target : tvm.target.Target
        Where the calibration runs.

    Returns
    -------
    dict[str, numpy.ndarray]
        float64 [K] (moment) or [K, K] (gram) by binding name, divided by the number of calls.
    """
    runner = build(apply_pass(CollectActivationStats(requests), mod), target)
    totals = [np.zeros(1)] * len(requests)
    for feeds in batches:
        statistics = runner.run_all(feeds)[-len(requests) :]
        totals = [t + s.astype(np.float64) for t, s in zip(totals, statistics, strict=True)]
    return {n: total / len(batches) for n, total in zip(requests, totals, strict=True)}
