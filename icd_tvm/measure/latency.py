"""Wall-clock timing of several arms in one process, interleaved and balanced."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from icd_tvm.errors import IcdError, MeasurementError
from icd_tvm.measure.statistics import ratio
from icd_tvm.steps import counted

Arm = Callable[[], object]
Samples = npt.NDArray[np.float64]

# Warm-up may use at most this share of a time budget.
WARMUP_SHARE = 0.2
# A sequential stop looks again after this many times the rounds of its last look.
LOOK_GROWTH = 1.25


@dataclass(frozen=True)
class StopRule:
    """Stop early once every pair's interval is tight enough.

    The rule looks at the width of the intervals only, never at where they lie, so that stopping
    does not favour either arm.

    Parameters
    ----------
    pairs : sequence of (str, str)
        Arms whose ratio must be known.
    half_width : float
        Largest allowed half width of the 95 % interval, relative to the ratio.
    """

    pairs: Sequence[tuple[str, str]]
    half_width: float = 0.005

    def met(self, samples: Mapping[str, Samples]) -> bool:
        """Return whether all pairs are known to within ``half_width``."""
        for a, b in self.pairs:
            value = ratio(samples[a], samples[b], resamples=500)
            if value["hi"] - value["lo"] > 2 * self.half_width * value["median"]:
                return False
        return True


@dataclass
class Account:
    """Where the seconds of measuring went.

    Attributes
    ----------
    calls_s : float
        Inside the arms, warm-up included.
    prepare_s : float
        Asked for before the calls: emptied caches and the like.
    total_s : float
        All of it; what is left is the cost of measuring.
    """

    calls_s: float = 0.0
    prepare_s: float = 0.0
    total_s: float = 0.0

    @property
    def overhead_s(self) -> float:
        """Seconds that went neither into the arms nor into what was asked for."""
        return max(0.0, self.total_s - self.calls_s - self.prepare_s)


def interleave(
    arms: Mapping[str, Arm],
    *,
    repeats: int = 1000,
    warmup: int = 50,
    min_repeats: int = 30,
    budget_s: float | None = None,
    seed: int = 0,
    between: Callable[[], object] | None = None,
    stop: StopRule | None = None,
    cold_cache_bytes: int = 0,
    account: Account | None = None,
) -> dict[str, Samples]:
    """Time every arm once a round, in an order that is balanced over positions.

    Parameters
    ----------
    arms : mapping of str to callable
        What to time; the call must return only when its work is done.
    repeats : int
        Rounds to take.
    warmup : int
        Rounds taken first and thrown away. Under a budget they use at most a fifth of it, and
        at least one is taken.
    min_repeats : int
        Rounds taken whatever the budget and the stop rule say.
    budget_s : float, optional
        Wall-clock seconds for warm-up and rounds together.
    seed : int
        Seed of the order.
    between : callable, optional
        Called before every timed call, outside the timed region.
    stop : StopRule, optional
        Sequential stop.
    cold_cache_bytes : int
        Size of a buffer written before every timed call, outside the timed region; choose more
        than the last-level cache. 0 leaves the caches warm. The buffer is written by the calling
        thread, so private caches of other cores may keep their lines.
    account : Account, optional
        Where the seconds go that this call takes.

    Returns
    -------
    dict of str to float64 array, shape [rounds]
        Seconds per call; sample i of every arm is from round i.

    Raises
    ------
    MeasurementError
        No arms, a count out of range, a stop rule naming an unknown arm, or an arm that raised.
    """
    _check(arms, repeats, warmup, min_repeats, stop)
    spent = Account() if account is None else account
    began = time.perf_counter()
    prepare = _preparation(between, cold_cache_bytes, spent)
    orders = balanced_orders(len(arms), seed)
    names = list(arms)
    deadline = None if budget_s is None else time.perf_counter() + budget_s
    rows: list[list[float]] = []
    with _collector_off(), counted("measuring rounds", repeats) as advance:
        _warm_up(arms, orders, prepare, warmup, budget_s, spent)
        look = max(min_repeats, 1)
        while len(rows) < repeats:
            rows.append(_round(arms, names, next(orders), prepare))
            spent.calls_s += sum(rows[-1])
            advance()
            done = len(rows)
            if done < min_repeats:
                continue
            if deadline is not None and time.perf_counter() >= deadline:
                break
            if stop is not None and done >= look:
                if stop.met(_columns(names, rows)):
                    break
                look = int(done * LOOK_GROWTH) + 1
    spent.total_s += time.perf_counter() - began
    return _columns(names, rows)


def balanced_orders(count: int, seed: int) -> Iterator[list[int]]:
    """Yield orders of ``count`` arms for ever, balanced over positions.

    Each block takes a random order, all its rotations, and the reverse of each right after it:
    in ``2 * count`` rounds every arm stands in every position exactly twice. For two arms this
    is ABBA followed by BAAB.
    """
    rng = np.random.default_rng(seed)
    while True:
        base = rng.permutation(count)
        for shift in range(count):
            order = np.roll(base, -shift).tolist()
            yield order
            yield order[::-1]


def _round(
    arms: Mapping[str, Arm],
    names: list[str],
    order: list[int],
    prepare: Callable[[], None] | None,
) -> list[float]:
    seconds = [0.0] * len(names)
    for position in order:
        name = names[position]
        if prepare is not None:
            prepare()
        seconds[position] = _time_call(name, arms[name])
    return seconds


def _time_call(name: str, arm: Arm) -> float:
    try:
        start = time.perf_counter_ns()
        result = arm()
        elapsed = time.perf_counter_ns() - start
    except IcdError:
        raise
    except Exception as error:
        raise MeasurementError(
            f"arm {name!r} failed while timed: {type(error).__name__}: {error}",
            "run the arm alone to see the failure",
        ) from error
    # Freed here, so that freeing the outputs is not part of the next timed call.
    del result
    return max(elapsed, 1) * 1e-9


def _warm_up(
    arms: Mapping[str, Arm],
    orders: Iterator[list[int]],
    prepare: Callable[[], None] | None,
    rounds: int,
    budget_s: float | None,
    spent: Account,
) -> None:
    names = list(arms)
    start = time.perf_counter()
    for _ in range(rounds):
        spent.calls_s += sum(_round(arms, names, next(orders), prepare))
        if budget_s is not None and time.perf_counter() - start > WARMUP_SHARE * budget_s:
            return


def _preparation(
    between: Callable[[], object] | None, cold_cache_bytes: int, spent: Account
) -> Callable[[], None] | None:
    if between is None and cold_cache_bytes <= 0:
        return None
    buffer = np.ones(max(cold_cache_bytes, 0), dtype=np.uint8)

    def prepare() -> None:
        start = time.perf_counter()
        if between is not None:
            between()
        if buffer.size:
            np.add(buffer, 1, out=buffer)
        spent.prepare_s += time.perf_counter() - start

    return prepare


@contextmanager
def _collector_off() -> Iterator[None]:
    # Nothing is collected first: that takes longer than a thousand calls of a small model, and
    # garbage that waits disturbs nobody.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _columns(names: list[str], rows: list[list[float]]) -> dict[str, Samples]:
    table = np.asarray(rows, dtype=np.float64)
    return {name: table[:, i].copy() for i, name in enumerate(names)}


def _check(
    arms: Mapping[str, Arm], repeats: int, warmup: int, min_repeats: int, stop: StopRule | None
) -> None:
    if not arms:
        raise MeasurementError("there is no arm to time", "pass at least one callable")
    for name, value, least in (
        ("repeats", repeats, 1),
        ("warmup", warmup, 0),
        ("min_repeats", min_repeats, 0),
    ):
        if value < least:
            raise MeasurementError(f"{name} = {value} is below {least}", f"set {name} >= {least}")
    unknown = [n for pair in (stop.pairs if stop else ()) for n in pair if n not in arms]
    if unknown:
        raise MeasurementError(
            f"the stop rule names {unknown[0]!r}, which is no arm", f"arms: {', '.join(arms)}"
        )
