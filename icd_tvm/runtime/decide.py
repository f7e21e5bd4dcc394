"""Keep the re-permuted arm, or roll back to the order it replaces, with the reason."""

from __future__ import annotations

from dataclasses import dataclass

from icd_tvm.measure.statistics import Ratio
from icd_tvm.relax_passes.verify_layout import FP32_TOLERANCE, Difference

LINEAR, ITERATIVE = "linear", "iterative"


@dataclass(frozen=True)
class Verdict:
    """Which arm is kept, whether the new order was accepted, and why.

    ``accepted`` is None where nothing was measured: a new order is never accepted on the cost
    model alone. ``rolled_back`` says that an order was tried and given up.
    """

    arm: str
    accepted: bool | None
    reason: str
    rolled_back: bool = False


def decide(
    equivalence: Difference,
    opportunity: str,
    ratio: Ratio | None,
    *,
    iterative: bool = True,
    tolerance: float = FP32_TOLERANCE,
    worse: str = "",
) -> Verdict:
    """Decide which arm to keep.

    Parameters
    ----------
    equivalence : Difference
        Iterative outputs against identity outputs.
    opportunity : str
        Empty if the new order differs from the old one, else why there is nothing to gain.
    ratio : Ratio or None
        Measured iterative/linear; None if nothing was measured.
    iterative : bool
        False if only the linear order was asked for.
    tolerance : float
        Largest relative difference that passes as equal.
    worse : str
        Which measured counter (energy, L2 hits) is worse; empty if none is.
    """
    if not iterative:
        return Verdict(LINEAR, False, "linear mode: the order decided before the transform is kept")
    if not equivalence.within(tolerance):
        return Verdict(
            LINEAR,
            False,
            f"rolled back: outputs differ by {equivalence.max_rel:.1e} relative, more than "
            f"{tolerance:.1e}",
            rolled_back=True,
        )
    if opportunity:
        return Verdict(LINEAR, False, f"no opportunity: {opportunity}")
    if ratio is None:
        return Verdict(LINEAR, None, "not measured: a new order is never accepted unmeasured")
    interval = f"{ratio['median']:.3f} [{ratio['lo']:.3f}, {ratio['hi']:.3f}]"
    if worse:
        return Verdict(LINEAR, False, f"rolled back: {worse}", rolled_back=True)
    if ratio["hi"] < 1.0:
        return Verdict(ITERATIVE, True, f"measured iterative/linear {interval}")
    reason = f"rolled back: iterative/linear {interval} is not below 1"
    return Verdict(LINEAR, False, reason, rolled_back=True)
