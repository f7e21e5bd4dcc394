"""Rank correlation of a score with measured times, and how sure it is."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import numpy.typing as npt
from scipy import stats

from icd_tvm.errors import MeasurementError

Array = npt.NDArray[np.float64]

# Share of the samples of an arm that lie below its time: interference only ever adds time.
TIME_QUANTILE = 0.25
# With fewer layouts every rank correlation is one of a handful of values.
MIN_LAYOUTS = 3


class RankCorrelation(TypedDict):
    """Spearman's and Kendall's coefficients with 95 % intervals; None with a reason."""

    spearman: float | None
    spearman_interval: tuple[float, float] | None
    kendall: float | None
    kendall_interval: tuple[float, float] | None
    reason: str


def rank_correlation(
    score: npt.ArrayLike, samples: npt.ArrayLike, *, seed: int = 0, resamples: int = 500
) -> RankCorrelation:
    """Correlate the ranks of a score with those of measured times.

    The interval is a percentile interval of a bootstrap over layouts and over rounds: the layouts
    are a sample of all orders, the rounds a sample of the machine's behaviour.

    Parameters
    ----------
    score : array_like of float, shape [layouts]
        Lower is meant to be faster.
    samples : array_like of float, shape [rounds, layouts]
        Seconds; the layouts of one row were timed in one interleaved round.
    seed : int
    resamples : int
        Bootstrap draws.

    Returns
    -------
    RankCorrelation
        None throughout, with a reason, where the score or the time is the same for all layouts.

    Raises
    ------
    MeasurementError
        If the shapes disagree, there are fewer than three layouts, or a value is not finite.
    """
    values, table = _checked(score, samples)
    times = lower_quartiles(table)
    for name, array in (("score", values), ("time", times)):
        if np.ptp(array) == 0:
            reason = f"the {name} is the same for all layouts"
            return _record(None, None, None, None, reason)
    rng = np.random.default_rng(seed)
    rounds, layouts = table.shape
    drawn_rounds = rng.integers(0, rounds, size=(resamples, rounds))
    drawn = rng.integers(0, layouts, size=(resamples, layouts))
    quartiles = np.quantile(table[drawn_rounds], TIME_QUANTILE, axis=1)
    picked = np.take_along_axis(quartiles, drawn, axis=1)
    return _record(
        float(spearman_rows(values[None], times[None])[0]),
        _interval(spearman_rows(values[drawn], picked)),
        float(kendall_rows(values[None], times[None])[0]),
        _interval(kendall_rows(values[drawn], picked)),
        "",
    )


def lower_quartiles(samples: npt.ArrayLike) -> Array:
    """Return the lower quartile of each column of ``samples`` [rounds, layouts]."""
    return np.asarray(np.quantile(np.asarray(samples, np.float64), TIME_QUANTILE, axis=0))


def repeatability(samples: npt.ArrayLike) -> tuple[float | None, float]:
    """Say how well one half of the rounds repeats the other half.

    Parameters
    ----------
    samples : array_like of float, shape [rounds, layouts]
        At least two rounds.

    Returns
    -------
    ceiling : float or None
        Spearman correlation of the times of even and odd rounds: no score can be expected to
        rank better. None where all times are equal.
    noise : float
        Median over layouts of the relative difference between the halves.
    """
    table = np.asarray(samples, np.float64)
    if table.ndim != 2 or table.shape[0] < 2:
        raise MeasurementError(f"repeatability needs two rounds, not {table.shape}")
    even, odd = lower_quartiles(table[::2]), lower_quartiles(table[1::2])
    ceiling = float(spearman_rows(even[None], odd[None])[0])
    noise = float(np.median(np.abs(even / odd - 1)))
    return (ceiling if np.isfinite(ceiling) else None), noise


def spearman_rows(a: Array, b: Array) -> Array:
    """Return Spearman's rho of each row of ``a`` with that of ``b``, NaN where one is constant."""
    first, second = (stats.rankdata(x, axis=1) for x in (a, b))
    first = first - first.mean(axis=1, keepdims=True)
    second = second - second.mean(axis=1, keepdims=True)
    scale = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    return _ratio((first * second).sum(axis=1), scale)


def kendall_rows(a: Array, b: Array) -> Array:
    """Return Kendall's tau-b of each row of ``a`` with that of ``b``, NaN where one is constant."""
    first, second = (np.sign(x[:, :, None] - x[:, None, :]) for x in (a, b))
    agree = (first * second).sum(axis=(1, 2))
    scale = np.sqrt(np.abs(first).sum(axis=(1, 2)) * np.abs(second).sum(axis=(1, 2)))
    return _ratio(agree, scale)


def _ratio(top: Array, bottom: Array) -> Array:
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom > 0)


def _interval(draws: Array) -> tuple[float, float] | None:
    found = draws[np.isfinite(draws)]
    if not found.size:
        return None
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def _record(
    spearman: float | None,
    spearman_interval: tuple[float, float] | None,
    kendall: float | None,
    kendall_interval: tuple[float, float] | None,
    reason: str,
) -> RankCorrelation:
    return RankCorrelation(
        spearman=spearman,
        spearman_interval=spearman_interval,
        kendall=kendall,
        kendall_interval=kendall_interval,
        reason=reason,
    )


def _checked(score: npt.ArrayLike, samples: npt.ArrayLike) -> tuple[Array, Array]:
    values, table = np.asarray(score, np.float64), np.asarray(samples, np.float64)
    if values.ndim != 1 or table.ndim != 2 or table.shape[1] != values.size:
        raise MeasurementError(f"score {values.shape} does not fit samples {table.shape}")
    if values.size < MIN_LAYOUTS or not table.shape[0]:
        raise MeasurementError(
            f"{values.size} layouts and {table.shape[0]} rounds give no rank correlation",
            f"time at least {MIN_LAYOUTS} layouts",
        )
    if not np.all(np.isfinite(values)) or not np.all(np.isfinite(table)):
        raise MeasurementError("a score or a time is not finite")
    return values, table
