"""A new order is kept only if it is equal and measured faster."""

import pytest

from icd_tvm.measure.gates import worse_counter
from icd_tvm.measure.statistics import Ratio
from icd_tvm.relax_passes.verify_layout import Difference
from icd_tvm.runtime.counters import Counters
from icd_tvm.runtime.decide import decide

EQUAL = Difference(1e-6, 1e-6)


def _ratio(lo: float, median: float, hi: float) -> Ratio:
    return Ratio(median=median, lo=lo, hi=hi, min=median, p_faster=0.9)


def test_faster_and_equal_is_accepted() -> None:
    verdict = decide(EQUAL, "", _ratio(0.7, 0.75, 0.8))
    assert (verdict.arm, verdict.accepted) == ("iterative", True)
    assert "0.750" in verdict.reason


@pytest.mark.parametrize("hi", [1.0, 1.02])
def test_an_interval_that_reaches_one_rolls_back(hi: float) -> None:
    verdict = decide(EQUAL, "", _ratio(0.9, 0.97, hi))
    assert (verdict.arm, verdict.accepted) == ("linear", False)
    assert "rolled back" in verdict.reason


@pytest.mark.parametrize("worst", [1e-3, float("inf"), float("nan")])
def test_unequal_outputs_roll_back_however_fast(worst: float) -> None:
    verdict = decide(Difference(worst, worst), "", _ratio(0.1, 0.1, 0.1))
    assert (verdict.arm, verdict.accepted) == ("linear", False)


def test_what_passes_as_equal_is_the_callers() -> None:
    unequal = Difference(1.0, 5e-3)
    assert decide(unequal, "", None, tolerance=1e-2).accepted is None
    refused = decide(unequal, "", None, tolerance=1e-3)
    assert refused.rolled_back
    assert "more than 1.0e-03" in refused.reason


def test_nothing_measured_is_not_accepted() -> None:
    verdict = decide(EQUAL, "", None)
    assert (verdict.arm, verdict.accepted) == ("linear", None)


def test_no_opportunity_says_why() -> None:
    verdict = decide(EQUAL, "W is uniform", _ratio(0.9, 0.9, 0.9))
    assert (verdict.accepted, verdict.reason) == (False, "no opportunity: W is uniform")


def test_linear_mode_keeps_linear() -> None:
    assert decide(EQUAL, "", None, iterative=False).arm == "linear"


def test_a_worse_counter_rolls_back_however_fast() -> None:
    verdict = decide(EQUAL, "", _ratio(0.7, 0.75, 0.8), worse="energy per token went up")
    assert (verdict.arm, verdict.accepted, verdict.rolled_back) == ("linear", False, True)
    assert "energy" in verdict.reason


def test_energy_is_compared_where_both_arms_were_counted() -> None:
    counted = {arm: {"joules_per_call": j} for arm, j in (("linear", 1.0), ("iterative", 1.2))}
    assert "energy" in worse_counter(Counters(energy=counted).by_arm(), "iterative", "linear")
    assert worse_counter(Counters().by_arm(), "iterative", "linear") == ""
