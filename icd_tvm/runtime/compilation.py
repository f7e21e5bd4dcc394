"""What a compilation has made so far, and in the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from icd_tvm.models.importer import ImportedModel
from icd_tvm.relax_passes.axis_groups import AxisGroups
from icd_tvm.relax_passes.decide_permutation import Decision
from icd_tvm.relax_passes.verify_layout import Difference
from icd_tvm.runtime.arms import DENSE, Arm
from icd_tvm.runtime.build import Built
from icd_tvm.runtime.counters import Counters
from icd_tvm.runtime.decide import Verdict
from icd_tvm.runtime.measure_arms import Measured


@dataclass
class Compilation:
    """Everything one compilation made.

    Attributes
    ----------
    imported : ImportedModel
        The model as it came in.
    groups : AxisGroups
        Its axis groups, free and pinned.
    widths : dict[str, int]
        ``out:NODE`` -> columns of that matmul, whose output may have an order of its own.
    arms : dict[str, Arm]
        The modules that were compared.
    built : dict[str, Built]
        The same, compiled.
    before, after : list[Decision]
        What was decided before and after the transform.
    transform : dict
        What the transforms did.
    equivalence : Difference
        Iterative outputs (linear in linear mode) against identity outputs.
    verified : list[str]
        Arms that were found equal to the identity arm.
    no_opportunity : str
        Why the new order cannot gain anything; empty if it can.
    measured : Measured or None
        None where nothing was timed.
    counters : Counters
        Energy and modelled caches, or why there are none.
    quality : dict or None
        Task quality of the arms, where it was asked for.
    verdict : Verdict
        Which arm is kept and why.
    record : dict
        What ``metrics.json`` holds (schema ``icd/metrics/v1``).
    """

    imported: ImportedModel
    groups: AxisGroups
    widths: dict[str, int] = field(default_factory=dict)
    arms: dict[str, Arm] = field(default_factory=dict)
    built: dict[str, Built] = field(default_factory=dict)
    before: list[Decision] = field(default_factory=list)
    after: list[Decision] = field(default_factory=list)
    transform: dict[str, Any] = field(default_factory=dict)
    equivalence: Difference = field(default_factory=lambda: Difference(0.0, 0.0))
    verified: list[str] = field(default_factory=list)
    no_opportunity: str = ""
    measured: Measured | None = None
    counters: Counters = field(default_factory=Counters)
    quality: dict[str, Any] | None = None
    verdict: Verdict = field(default_factory=lambda: Verdict(DENSE, False, "nothing was done"))
    record: dict[str, Any] = field(default_factory=dict)
