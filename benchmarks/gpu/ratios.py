"""Summaries and ratios of interleaved samples with numpy alone: a GPU host may lack scipy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 1000


def summary_of(seconds: Sequence[float]) -> dict[str, float]:
    """Return median, quartiles and minimum in milliseconds, and the number of samples."""
    low, middle, high = np.percentile(seconds, (25, 50, 75)) * 1e3
    return {
        "ms": float(middle),
        "q25": float(low),
        "q75": float(high),
        "min": float(np.min(seconds) * 1e3),
        "n": len(seconds),
    }


def ratio_of(first: Sequence[float], second: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Return the ratio of medians, its 95 % interval (rounds drawn again), and that of minima."""
    a, b = np.asarray(first), np.asarray(second)
    drawn = np.random.default_rng(seed).integers(0, len(a), (RESAMPLES, len(a)))
    again = np.median(a[drawn], axis=1) / np.median(b[drawn], axis=1)
    low, high = np.percentile(again, (2.5, 97.5))
    return {
        "median": float(np.median(a) / np.median(b)),
        "lo": float(low),
        "hi": float(high),
        "min": float(a.min() / b.min()),
    }
