"""What a sparsity spec can act on: coupled units of an axis group, or single matmul weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from icd_tvm.adapters.sparsity import SparsitySpec
from icd_tvm.relax_passes.axis_groups import AxisGroup, AxisGroups, WeightUse
from icd_tvm.relax_passes.head_matmuls import head_matmuls
from icd_tvm.relax_passes.hidden_groups import hidden_groups
from icd_tvm.relax_passes.layer_rules import Choice, Layer, LayerRules, Role
from icd_tvm.relax_passes.unit_weights import is_float

Kind = Literal["units", "heads", "weight"]


@dataclass(frozen=True)
class SparsityTarget:
    """One thing that is made sparse with one spec.

    Attributes
    ----------
    id : str
        Axis group, or matmul binding of a weight.
    kind : {"units", "heads", "weight"}
        Hidden units of an MLP or channels of a scan block; attention heads; or one weight.
    weights : tuple of WeightUse
        The matmul weights that change.
    group : AxisGroup or None
        None for a weight.
    layers : tuple of Layer
        What rules look at: the weights that make the units first, then those that read them.
    named_only : str
        Why only a rule that names the target reaches it; empty if the default does as well.
    units : AxisGroup or None
        Hidden group of which each unit has several columns of the weight, as in a gated layer.
    """

    id: str
    kind: Kind
    weights: tuple[WeightUse, ...]
    group: AxisGroup | None
    layers: tuple[Layer, ...]
    named_only: str = ""
    units: AxisGroup | None = None

    @property
    def makers(self) -> tuple[WeightUse, ...]:
        """Weights whose columns are the units."""
        return tuple(use for use in self.weights if use.side == "N")

    @property
    def takers(self) -> tuple[WeightUse, ...]:
        """Weights whose rows read the units; of a weight, the weight itself."""
        return tuple(use for use in self.weights if self.group is None or use.side == "K")

    @property
    def quantised(self) -> bool:
        """Whether a weight holds codes: its zeros are not those of the product."""
        return not all(map(is_float, self.weights))

    def choose(self, rules: LayerRules[SparsitySpec]) -> Choice[SparsitySpec]:
        """Return the spec of the first rule that fits any of the weights, else the default."""
        for rule in rules.rules:
            for layer in self.layers:
                if layer.matches(rule.pattern):
                    return rules.choose(layer)
        if self.named_only:
            return Choice(None, self.named_only)
        return rules.choose(max(self.layers[: len(self.makers) or 1], key=attrgetter("size")))


def sparsity_targets(func: Any, groups: AxisGroups) -> list[SparsityTarget]:
    """Return every target of a function: units first, weights with several columns a unit last.

    Parameters
    ----------
    func : relax.Function
    groups : AxisGroups
        Of the same function.
    """
    hidden = hidden_groups(func, groups)
    heads = head_matmuls(func)
    kinds = [(group, _unit_kind(group, hidden)) for group in groups.free]
    units = [_units(group, kind, heads) for group, kind in kinds if kind is not None]
    inside = {use.node for unit in units if unit.kind == "units" for use in unit.weights}
    return units + _weights(groups, hidden, inside, heads)


def fits(target: SparsityTarget, spec: SparsitySpec) -> bool:
    """Tell whether a spec is of the target's sort: ``unit`` for units, all others for weights."""
    return (spec.kind == "unit") == (target.group is not None)


def _unit_kind(group: AxisGroup, hidden: Sequence[AxisGroup]) -> Kind | None:
    if group in hidden:
        return "units"
    if group.counted or {use.side for use in group.weights} != {"K", "N"}:
        return None
    if group.constraint in ("factored", "pairs") and "heads" in group.role:
        return "heads"
    return None


def _units(group: AxisGroup, kind: Kind, heads: set[str]) -> SparsityTarget:
    ordered = sorted(group.weights, key=lambda use: use.side == "K")
    layers = tuple(_layer(use, heads) for use in ordered)
    named_only = "attention heads are left out unless a rule names them" if kind == "heads" else ""
    return SparsityTarget(group.id, kind, tuple(ordered), group, layers, named_only)


def _weights(
    groups: AxisGroups, hidden: Sequence[AxisGroup], inside: set[str], heads: set[str]
) -> list[SparsityTarget]:
    uses: dict[str, WeightUse] = {}
    for group in (*groups.atomic, *groups.composites):
        for use in group.weights:
            uses.setdefault(use.node, use)
    outside = "it is no layer of hidden units: left out unless a rule names it"
    several = {
        use.node: group
        for group in hidden
        for use in group.weights
        if use.side == "N" and not use.structure.is_leaf
    }
    targets = [
        SparsityTarget(
            node,
            "weight",
            (use,),
            None,
            (_layer(use, heads),),
            "" if node in inside else outside,
            several.get(node),
        )
        for node, use in uses.items()
    ]
    # What reads the units of a weight is pruned before it, and says which of them count.
    makers = [target for target in targets if target.units is not None]
    return [target for target in targets if target.units is None] + makers[::-1]


def unread_units(
    target: SparsityTarget, value: Callable[[Any], NDArray[Any]]
) -> NDArray[np.bool_] | None:
    """Return which of ``target.units`` no weight reads; None where it has none.

    Parameters
    ----------
    target : SparsityTarget
    value : callable
        Constant of a weight -> its array, pruned or not.

    Returns
    -------
    numpy.ndarray or None
        bool [units].
    """
    if target.units is None:
        return None
    read = np.zeros(target.units.size, np.bool_)
    for use in (use for use in target.units.weights if use.side == "K"):
        used = np.any(value(use.const), axis=1 - use.axis)
        read |= used[use.positions(target.units.id)].any(axis=1)
    return ~read


def _layer(use: WeightUse, heads: set[str]) -> Layer:
    role: Role = "head" if use.node in heads else "inner"
    return Layer(use.name, use.node, use.shape, role)
