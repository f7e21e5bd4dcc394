"""Summaries, ratios and noise flags of interleaved timing samples.

Every ratio is paired by round: sample ``i`` of one arm and sample ``i`` of another were taken
within one round of :func:`icd_tvm.measure.latency.interleave`, so a slow phase of the machine
falls on both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
import numpy.typing as npt
from scipy import stats

from icd_tvm.errors import MeasurementError

Samples = npt.NDArray[np.float64]

# A sample this many robust deviations above the median counts as an outlier.
OUTLIER_DEVIATIONS = 5.0
# Scale that makes the median absolute deviation estimate the sigma of a normal distribution.
MAD_TO_SIGMA = 1.4826


class Summary(TypedDict):
    """Latency summary in milliseconds; ``n`` counts samples."""

    median: float
    mean: float
    p5: float
    p50: float
    p95: float
    min: float
    n: int


class Ratio(TypedDict):
    """Ratio ``a / b``: medians with an interval, minima, and P(a is faster than b)."""

    median: float
    lo: float
    hi: float
    min: float
    p_faster: float


class CrossCheck(TypedDict):
    """Another timer on the same arm: median and minimum in ms, and its minimum over ours."""

    median: float
    min: float
    n: int
    min_over_ours: float


class Noise(TypedDict):
    """Outlier share (per cent), drift over the run (per cent) and what to make of both."""

    outlier_pct: float
    drift_pct: float
    outliers: bool
    drift: bool


def summarise(samples: npt.ArrayLike) -> Summary:
    """Summarise call times.

    Parameters
    ----------
    samples : array_like of float, shape [n]
        Seconds per call, positive and finite.

    Returns
    -------
    Summary
        Milliseconds; percentiles by linear interpolation.

    Raises
    ------
    MeasurementError
        No samples, or a sample that is not a positive finite number.
    """
    ms = _checked(samples, "samples") * 1e3
    p5, p50, p95 = (float(v) for v in np.percentile(ms, [5, 50, 95]))
    return Summary(
        median=p50,
        mean=float(ms.mean()),
        p5=p5,
        p50=p50,
        p95=p95,
        min=float(ms.min()),
        n=int(ms.size),
    )


def ratio(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    seed: int = 0,
    *,
    resamples: int = 1000,
    level: float = 0.95,
) -> Ratio:
    """Compare two arms that were timed in the same rounds.

    The interval is a percentile interval of the ratio of medians under a circular block
    bootstrap over rounds: whole rounds are drawn, so pairing is kept, and they are drawn in
    runs of ``n ** (1/3)`` rounds, so slow phases that last longer than one round widen the
    interval instead of hiding in it. The percentiles are spread by Student's t for the number
    of independent runs, because a plain percentile interval is too narrow for few rounds.

    Parameters
    ----------
    a, b : array_like of float, shape [n]
        Seconds per call, sample i of both from round i.
    seed : int
        Seed of the bootstrap.
    resamples : int
        Bootstrap draws.
    level : float
        Coverage of the interval, in (0, 1).

    Returns
    -------
    Ratio
        ``median`` is median(a) / median(b); below 1 means that ``a`` is faster.

    Raises
    ------
    MeasurementError
        Empty, unequal or non-positive samples.

    Notes
    -----
    Politis and Romano, "A circular block-resampling procedure for stationary data", 1992;
    Hesterberg, "What teachers should know about the bootstrap", 2015 (expanded percentiles).
    """
    return ratios({"a": a, "b": b}, [("a", "b")], seed, resamples=resamples, level=level)["a/b"]


def ratios(
    samples: Mapping[str, npt.ArrayLike],
    pairs: Sequence[tuple[str, str]],
    seed: int = 0,
    *,
    resamples: int = 1000,
    level: float = 0.95,
) -> dict[str, Ratio]:
    """Compare pairs of arms that were timed in the same rounds: :func:`ratio` of each.

    The same rounds are drawn for every pair, so the medians of an arm are taken once.

    Parameters
    ----------
    samples : mapping of str to array_like of float, shape [n]
        Seconds per call of each arm, sample i of all from round i.
    pairs : sequence of (str, str)
        Arms of ``samples``.
    seed, resamples, level
        See :func:`ratio`.

    Returns
    -------
    dict of str to Ratio
        ``a/b`` -> comparison.

    Raises
    ------
    MeasurementError
        Empty, unequal or non-positive samples.
    """
    used = dict.fromkeys(name for pair in pairs for name in pair)
    checked = {name: _checked(samples[name], name) for name in used}
    sizes = {name: array.size for name, array in checked.items()}
    for a, b in pairs:
        if sizes[a] != sizes[b]:
            raise MeasurementError(
                f"cannot pair {sizes[a]} samples with {sizes[b]}",
                "time both arms in the same interleaved run",
            )
    drawn = {n: _rounds_drawn(n, seed, resamples) for n in set(sizes.values())}
    medians = {
        name: np.median(x[drawn[x.size]], axis=1, overwrite_input=True)
        for name, x in checked.items()
    }
    return {
        f"{a}/{b}": _ratio(checked[a], checked[b], medians[a] / medians[b], level) for a, b in pairs
    }


def _ratio(first: Samples, second: Samples, draws: Samples, level: float) -> Ratio:
    tail = _expanded_tail_pct(first.size / _block_length(first.size), level)
    lo, hi = (float(v) for v in np.percentile(draws, [tail, 100 - tail]))
    return Ratio(
        median=float(np.median(first) / np.median(second)),
        lo=lo,
        hi=hi,
        min=float(first.min() / second.min()),
        p_faster=p_faster(first, second),
    )


def p_faster(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Return the share of paired rounds in which ``a`` took less time than ``b`` (ties half)."""
    first, second = _checked(a, "a"), _checked(b, "b")
    return float(np.mean((first < second) + 0.5 * (first == second)))


def cross_check(other: npt.ArrayLike, ours: npt.ArrayLike) -> CrossCheck:
    """Compare another timer with our samples of the same arm.

    Parameters
    ----------
    other, ours : array_like of float, shapes [m] and [n]
        Seconds per call. They were taken at different times, so the minima are compared: a slow
        phase of the machine raises the medians of one of them.

    Raises
    ------
    MeasurementError
        No samples, or a sample that is not a positive finite number.
    """
    seconds = _checked(other, "other")
    return CrossCheck(
        median=1e3 * float(np.median(seconds)),
        min=1e3 * float(seconds.min()),
        n=int(seconds.size),
        min_over_ours=float(seconds.min() / _checked(ours, "ours").min()),
    )


def noise(samples: npt.ArrayLike) -> Noise:
    """Flag outliers and drift of one arm.

    Parameters
    ----------
    samples : array_like of float, shape [n]
        Seconds per call in the order they were taken.

    Returns
    -------
    Noise
        ``outliers``: more than 5 % of the samples lie above median + 5 robust sigmas.
        ``drift``: the median of the last third differs from the first third's by more than 2 %
        and time correlates with the round number (Spearman, p < 0.01).

    Raises
    ------
    MeasurementError
        No samples, or a sample that is not a positive finite number.
    """
    seconds = _checked(samples, "samples")
    middle = float(np.median(seconds))
    sigma = max(MAD_TO_SIGMA * float(np.median(np.abs(seconds - middle))), 1e-3 * middle)
    outlier_pct = 100 * float(np.mean(seconds > middle + OUTLIER_DEVIATIONS * sigma))
    drift_pct = 0.0
    trend = False
    third = seconds.size // 3
    if third >= 5:
        drift_pct = 100 * float(np.median(seconds[-third:]) / np.median(seconds[:third]) - 1)
        if np.ptp(seconds) > 0:
            trend = bool(stats.spearmanr(np.arange(seconds.size), seconds).pvalue < 0.01)
    return Noise(
        outlier_pct=outlier_pct,
        drift_pct=drift_pct,
        outliers=outlier_pct > 5.0,
        drift=trend and abs(drift_pct) > 2.0,
    )


def describe(name: str, value: Ratio, rounds: int) -> str:
    """Return a ratio as one line: value, interval, P(faster) and the number of rounds."""
    return (
        f"{name} {value['median']:.3f} [{value['lo']:.3f}, {value['hi']:.3f}], "
        f"minima {value['min']:.3f}, P(faster) {value['p_faster']:.3f}, "
        f"{rounds} interleaved rounds"
    )


def _rounds_drawn(rounds: int, seed: int, resamples: int) -> npt.NDArray[np.int64]:
    """Return the rounds of every bootstrap draw, [resamples, rounds]."""
    length, rng = _block_length(rounds), np.random.default_rng(seed)
    starts = rng.integers(0, rounds, size=(resamples, -(-rounds // length), 1))
    index = (starts + np.arange(length)) % rounds
    return np.asarray(index.reshape(resamples, -1)[:, :rounds])


def _block_length(rounds: int) -> int:
    return max(1, round(rounds ** (1 / 3)))


def _expanded_tail_pct(independent: float, level: float) -> float:
    freedom = max(independent - 1, 1.0)
    quantile = float(stats.t.ppf(0.5 + level / 2, freedom))
    return 100 * float(stats.norm.sf(np.sqrt(1 + 1 / freedom) * quantile))


def _checked(samples: npt.ArrayLike, name: str) -> Samples:
    array = np.asarray(samples, dtype=np.float64).ravel()
    if array.size == 0:
        raise MeasurementError(f"{name} holds no samples", "run at least one repeat")
    if not np.all(np.isfinite(array)) or float(array.min()) <= 0:
        raise MeasurementError(
            f"{name} holds a time that is not positive and finite", "check the clock and the unit"
        )
    return array
