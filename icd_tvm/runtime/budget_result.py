"""What a quality budget is, and what a search under it finds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from icd_tvm.adapters.sparsity import SparsitySpec
from icd_tvm.errors import ConfigError
from icd_tvm.relax_passes.layer_rules import LayerRules


@dataclass(frozen=True)
class Budget:
    """What a candidate may cost.

    Parameters
    ----------
    points : float
        Largest absolute change of the metric in points; a rise counts as well, for a metric can
        rise under damage.
    agreement : float
        Least agreement with the dense model: the mean cosine of the outputs, or the share of
        equal decisions where they are logits.

    Raises
    ------
    ConfigError
        Points below 0, or an agreement outside [-1, 1].
    """

    points: float = 0.1
    agreement: float = 0.99

    def __post_init__(self) -> None:
        if not self.points >= 0:
            raise ConfigError(f"quality budget of {self.points} points is below 0", "e.g. 0.1")
        if not -1 <= self.agreement <= 1:
            raise ConfigError(f"agreement {self.agreement} is outside [-1, 1]", "e.g. 0.99")


@dataclass(frozen=True)
class Candidate:
    """One choice of rates and what it costs.

    Attributes
    ----------
    stage : {"profile", "greedy", "held-out", "final"}
    rates : dict of str to float
        Target -> share that is removed; targets without one stay dense.
    removed : float
        Share of the weights of all searched targets that is zero.
    delta : float
        Change of the metric in points.
    agreement : float
        With the dense model: mean cosine, or share of equal decisions.
    fits : bool
        Whether both gates hold.
    """

    stage: str
    rates: dict[str, float]
    removed: float
    delta: float
    agreement: float
    fits: bool


@dataclass
class BudgetResult:
    """What a search found.

    Attributes
    ----------
    rates : dict of str to float
        Target -> rate; empty if nothing fits.
    rules : LayerRules or None
        The same for :class:`icd_tvm.relax_passes.apply_sparsity.ApplySparsity`; None if nothing
        fits.
    reason : str
        One sentence for people.
    best : Candidate
        The final candidate, judged on held-out data and on our build; where nothing fits the
        one that came nearest.
    dense : dict
        Source of the calibration and the held-out data -> points of the dense model.
    candidates : list of Candidate
        Every candidate in the order of the search.
    skipped : dict
        Target -> why it was not searched.
    """

    rates: dict[str, float]
    rules: LayerRules[SparsitySpec] | None
    reason: str
    best: Candidate
    dense: dict[str, float]
    candidates: list[Candidate] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def found(self) -> bool:
        """Whether any sparsity fits the budget."""
        return self.rules is not None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "found": self.found,
            "reason": self.reason,
            "rates": self.rates,
            "rules": {r.pattern: str(r.spec) for r in self.rules.rules} if self.rules else {},
            "best": asdict(self.best),
            "dense_points": self.dense,
            "held_out_looks": sum(c.stage == "held-out" for c in self.candidates),
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "skipped": self.skipped,
        }
