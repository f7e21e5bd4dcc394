"""Interleaving: balance, pairing, exclusions and stops; no test depends on how fast a call is."""

import gc
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icd_tvm.errors import ConfigError, MeasurementError
from icd_tvm.measure import latency
from icd_tvm.measure.latency import Account, StopRule, balanced_orders, interleave


class Clock:
    """A clock that only moves when a recorded call moves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0
        monkeypatch.setattr(latency.time, "perf_counter_ns", lambda: self.now)
        monkeypatch.setattr(latency.time, "perf_counter", lambda: self.now * 1e-9)

    def call(self, nanoseconds: int):
        def arm() -> None:
            self.now += nanoseconds

        return arm


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@given(st.integers(1, 7), st.integers(0, 1000))
def test_every_arm_stands_everywhere_equally_often(count: int, seed: int) -> None:
    orders = list(itertools.islice(balanced_orders(count, seed), 2 * count))
    for position in range(count):
        seen = Counter(order[position] for order in orders)
        assert seen == dict.fromkeys(range(count), 2)


def test_two_arms_are_taken_abba() -> None:
    orders = list(itertools.islice(balanced_orders(2, 0), 4))
    assert orders[1] == orders[0][::-1]
    assert orders[2:] == orders[1::-1]


def test_seconds_of_every_arm(clock: Clock) -> None:
    samples = interleave(
        {"a": clock.call(1000), "b": clock.call(3000)}, repeats=20, warmup=2, min_repeats=5
    )
    assert {name: s.shape for name, s in samples.items()} == {"a": (20,), "b": (20,)}
    np.testing.assert_allclose(samples["a"], 1e-6)
    np.testing.assert_allclose(samples["b"], 3e-6)


def test_warm_up_is_thrown_away(clock: Clock) -> None:
    durations = iter([900, 900, *[100] * 10])

    def arm() -> None:
        clock.now += next(durations)

    samples = interleave({"a": arm}, repeats=10, warmup=2)
    np.testing.assert_allclose(samples["a"], 1e-7)


def test_between_and_cold_cache_are_outside_the_timed_region(clock: Clock) -> None:
    calls = []

    def between() -> None:
        calls.append(1)
        clock.now += 10**6

    samples = interleave(
        {"a": clock.call(10), "b": clock.call(10)},
        repeats=7,
        warmup=0,
        between=between,
        cold_cache_bytes=4096,
    )
    assert len(calls) == 14
    np.testing.assert_allclose(samples["a"], 1e-8)


def test_seconds_are_accounted_for(clock: Clock) -> None:
    account = Account()
    between = clock.call(10**6)
    arms = {"a": clock.call(10**9), "b": clock.call(10**8)}
    interleave(arms, repeats=30, warmup=2, between=between, account=account)
    assert account.calls_s == pytest.approx(32 * 1.1)
    assert account.prepare_s == pytest.approx(64 * 1e-3)
    # This clock moves in nothing else.
    assert account.overhead_s == pytest.approx(0, abs=1e-6)


def test_budget_stops_after_the_least_repeats(clock: Clock) -> None:
    second = clock.call(10**9)
    assert len(interleave({"a": second}, repeats=50, warmup=0, min_repeats=4, budget_s=2)["a"]) == 4
    assert len(interleave({"a": second}, repeats=50, warmup=0, min_repeats=4, budget_s=9)["a"]) == 9


def test_budget_limits_the_warm_up(clock: Clock) -> None:
    samples = interleave({"a": clock.call(10**9)}, warmup=50, min_repeats=1, budget_s=10)
    assert len(samples["a"]) == 7


def test_stop_rule_ends_early_and_only_when_tight(clock: Clock) -> None:
    steady = {"a": clock.call(1000), "b": clock.call(2000)}
    rule = StopRule([("a", "b")], half_width=0.01)
    assert len(interleave(steady, repeats=500, warmup=0, stop=rule)["a"]) == 30
    rng = np.random.default_rng(0)

    def noisy() -> None:
        clock.now += int(rng.integers(1000, 3000))

    samples = interleave({"a": noisy, "b": noisy}, repeats=60, warmup=0, stop=rule)
    assert len(samples["a"]) == 60


def test_collector_is_off_while_timing_and_restored() -> None:
    states = []
    interleave({"a": lambda: states.append(gc.isenabled())}, repeats=2, warmup=0)
    assert states == [False, False]
    assert gc.isenabled()


def test_collector_is_restored_after_a_failure() -> None:
    with pytest.raises(MeasurementError, match="arm 'bad' failed while timed: ZeroDivisionError"):
        interleave({"bad": lambda: 1 / 0}, repeats=1)
    assert gc.isenabled()


def test_own_errors_pass_unchanged() -> None:
    def arm() -> None:
        raise ConfigError("mine")

    with pytest.raises(ConfigError, match="mine"):
        interleave({"a": arm}, repeats=1)


@settings(max_examples=20)
@given(st.integers(1, 5), st.integers(1, 12))
def test_all_arms_get_all_rounds(arms: int, rounds: int) -> None:
    calls: Counter[int] = Counter()
    table = {str(i): (lambda i=i: calls.update([i])) for i in range(arms)}
    samples = interleave(table, repeats=rounds, warmup=1, min_repeats=0)
    assert set(calls.values()) == {rounds + 1}
    assert all((s > 0).all() and len(s) == rounds for s in samples.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, "repeats = 0 is below 1"),
        ({"warmup": -1}, "warmup = -1 is below 0"),
        ({"min_repeats": -1}, "min_repeats = -1 is below 0"),
        ({"stop": StopRule([("a", "z")])}, "names 'z'"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        interleave({"a": int}, **options)


def test_no_arms() -> None:
    with pytest.raises(MeasurementError, match="no arm"):
        interleave({})


def test_nothing_is_collected_before_or_between_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    # A full collection takes as long as thousands of calls of a small model.
    def refused(*_: object) -> int:
        raise AssertionError("the collector ran")

    monkeypatch.setattr(gc, "collect", refused)
    enabled: list[bool] = []
    interleave({"a": lambda: enabled.append(gc.isenabled())}, repeats=3, warmup=1, min_repeats=3)
    assert enabled == [False] * 4
    assert gc.isenabled()
