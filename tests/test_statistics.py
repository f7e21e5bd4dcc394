"""Ratios between equal arms hold 1, planted slowdowns are found, noise is flagged."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icd_tvm.errors import MeasurementError
from icd_tvm.measure.statistics import cross_check, describe, noise, p_faster, ratio, summarise

SEEDS = range(100)


def heavy_tailed(rng: np.random.Generator, rounds: int) -> np.ndarray:
    """Call times around 1 ms: a skewed body, and 5 % Pareto outliers without a variance."""
    body = 1e-3 * (1 + 0.02 * rng.standard_gamma(2, rounds))
    return body * (1 + (rng.random(rounds) < 0.05) * rng.pareto(1.5, rounds))


def slow_phases(rng: np.random.Generator, rounds: int) -> np.ndarray:
    """A factor common to the arms of a round that stays for many rounds."""
    steps = rng.normal(0, 0.01, rounds)
    level = np.zeros(rounds)
    for i in range(1, rounds):
        level[i] = 0.9 * level[i - 1] + steps[i]
    return np.exp(level)


@pytest.mark.parametrize("rounds", [40, 150])
@pytest.mark.parametrize("phases", [False, True])
def test_equal_arms_hold_one(rounds: int, phases: bool) -> None:
    holds = 0
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        common = slow_phases(rng, rounds) if phases else 1.0
        a, b = heavy_tailed(rng, rounds) * common, heavy_tailed(rng, rounds) * common
        value = ratio(a, b, seed, resamples=1000)
        holds += value["lo"] <= 1 <= value["hi"]
        assert 0.2 <= value["p_faster"] <= 0.8
    assert holds >= 95


def gaussian(rng: np.random.Generator, rounds: int) -> np.ndarray:
    """Log times of two equal arms, [rounds, 2]: independent noise of 2 %."""
    return rng.normal(0, 0.02, (rounds, 2))


def student(rng: np.random.Generator, rounds: int) -> np.ndarray:
    """Heavy tails on both sides, 2 % scale."""
    return 0.02 * rng.standard_t(2.5, (rounds, 2)).clip(-15, 60)


def wander(rng: np.random.Generator, rounds: int) -> np.ndarray:
    """A random walk that both arms of a round share: a drifting clock."""
    return gaussian(rng, rounds) + np.cumsum(rng.normal(0, 0.003, rounds))[:, None]


def bursts(rng: np.random.Generator, rounds: int) -> np.ndarray:
    """Runs of rounds, 8 on average, in which every call is hit by itself and up to doubled."""
    hit, start = np.zeros(rounds, bool), 0
    while start < rounds:
        start += rng.geometric(1 / 40)
        length = rng.geometric(1 / 8)
        hit[start : start + length] = True
        start += length
    own = rng.exponential(0.5, (rounds, 2))
    return rng.normal(0, 0.01, (rounds, 2)) + np.where(hit[:, None], own, 0)


def levels(rng: np.random.Generator, rounds: int) -> np.ndarray:
    """A clock with two levels, 30 % apart, that stays for 50 rounds on average."""
    level = np.cumsum(rng.random(rounds) < 0.02) % 2
    return gaussian(rng, rounds) + 0.3 * level[:, None]


@pytest.mark.parametrize("shape", [gaussian, student, wander, bursts, levels])
def test_equal_arms_and_a_planted_slowdown(shape: Callable[..., np.ndarray]) -> None:
    equal = balanced = found = 0
    for seed in SEEDS:
        times = 1e-3 * np.exp(shape(np.random.default_rng(seed), 150))
        same = ratio(times[:, 0], times[:, 1], seed, resamples=500)
        equal += same["lo"] <= 1 <= same["hi"]
        balanced += 0.2 <= same["p_faster"] <= 0.8
        found += ratio(1.05 * times[:, 0], times[:, 1], seed, resamples=500)["lo"] > 1
    assert equal >= 95
    assert balanced == 100
    assert found >= 95


def test_another_timer_is_compared_by_its_minimum() -> None:
    found = cross_check([0.002, 0.003, 0.004], [0.004, 0.009])
    assert found == {"median": 3.0, "min": 2.0, "n": 3, "min_over_ours": 0.5}
    with pytest.raises(MeasurementError, match="other holds"):
        cross_check([], [1.0])


def test_five_per_cent_slowdown_is_found() -> None:
    found = 0
    for seed in SEEDS:
        rng = np.random.default_rng(1000 + seed)
        common = slow_phases(rng, 100)
        a, b = 1.05 * heavy_tailed(rng, 100) * common, heavy_tailed(rng, 100) * common
        found += ratio(a, b, seed, resamples=1000)["lo"] > 1
    assert found >= 95


def test_ratio_of_known_samples() -> None:
    b = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    value = ratio(b / 2, b)
    assert value["median"] == value["min"] == 0.5
    assert value["lo"] <= 0.5 <= value["hi"]
    assert value["p_faster"] == 1.0


def test_interval_narrows_with_rounds() -> None:
    rng = np.random.default_rng(3)
    a, b = heavy_tailed(rng, 1000), heavy_tailed(rng, 1000)
    few, many = ratio(a[:50], b[:50]), ratio(a, b)
    assert many["hi"] - many["lo"] < 0.5 * (few["hi"] - few["lo"])


def test_same_seed_same_interval() -> None:
    rng = np.random.default_rng(4)
    a, b = heavy_tailed(rng, 60), heavy_tailed(rng, 60)
    assert ratio(a, b, 7) == ratio(a, b, 7)
    assert ratio(a, b, 7) != ratio(a, b, 8)


def test_ties_count_half() -> None:
    assert p_faster([1, 1, 1, 2], [1, 2, 3, 1]) == 0.625


def test_summary_is_in_milliseconds() -> None:
    value = summarise(np.arange(1, 102) * 1e-3)
    assert value["n"] == 101
    expected = {"median": 51, "p50": 51, "mean": 51, "p5": 6, "p95": 96, "min": 1}
    for key, wanted in expected.items():
        assert value[key] == pytest.approx(wanted)


def test_steady_samples_raise_no_flag() -> None:
    flags = noise(heavy_tailed(np.random.default_rng(0), 300) * 1.0)
    assert not flags["drift"]
    quiet = noise(1e-3 * (1 + 0.01 * np.random.default_rng(1).normal(size=300)))
    assert not quiet["outliers"]
    assert quiet["outlier_pct"] < 1


def test_drift_and_outliers_are_flagged() -> None:
    rng = np.random.default_rng(2)
    samples = 1e-3 * (1 + 0.01 * rng.normal(size=300))
    rising = noise(samples * np.linspace(1, 1.2, 300))
    assert rising["drift"]
    assert rising["drift_pct"] == pytest.approx(14, abs=3)
    samples[::10] *= 3
    assert noise(samples)["outliers"]


def test_constant_samples_do_not_drift() -> None:
    assert noise([1e-3] * 30) == {
        "outlier_pct": 0.0,
        "drift_pct": 0.0,
        "outliers": False,
        "drift": False,
    }


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40), st.floats(0.1, 10))
def test_ratio_scales_with_its_first_argument(samples: list[float], factor: float) -> None:
    base = np.array(samples)
    value = ratio(factor * base, base, resamples=50)
    assert value["median"] == pytest.approx(factor)
    assert value["lo"] == pytest.approx(factor)
    assert value["hi"] == pytest.approx(factor)


@pytest.mark.parametrize("bad", [[], [1.0, float("nan")], [0.0], [-1.0], [float("inf")]])
def test_unusable_samples(bad: list[float]) -> None:
    with pytest.raises(MeasurementError):
        summarise(bad)


def test_unequal_rounds_cannot_be_paired() -> None:
    with pytest.raises(MeasurementError, match="cannot pair 2 samples with 3"):
        ratio([1, 2], [1, 2, 3])


def test_one_line_says_it_all() -> None:
    text = describe("iterative/linear", ratio([1.0] * 9, [2.0] * 9), 9)
    assert text.startswith("iterative/linear 0.500 [0.500, 0.500]")
    assert text.endswith("P(faster) 1.000, 9 interleaved rounds")
