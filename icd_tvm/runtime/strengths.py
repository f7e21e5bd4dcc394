"""The strengths that a search may choose from: every target at every rate, as arrays."""

from __future__ import annotations

import glob
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icd_tvm._tvm import const_name
from icd_tvm.adapters.sparsity import SparsitySpec
from icd_tvm.adapters.sparsity_spec import make_spec
from icd_tvm.errors import ConfigError, IcdError
from icd_tvm.relax_passes.apply_sparsity import Rules
from icd_tvm.relax_passes.attach_layout_tags import tagged_groups
from icd_tvm.relax_passes.axis_groups import WeightUse
from icd_tvm.relax_passes.layer_rules import LayerRule, LayerRules, as_rules
from icd_tvm.relax_passes.prune_target import prune_target
from icd_tvm.relax_passes.sparsity_targets import (
    SparsityTarget,
    fits,
    sparsity_targets,
    unread_units,
)

# Shares tried for each layer or group; N:M and V:N:M have one strength only.
RATES = (0.05, 0.1, 0.2, 0.3, 0.5)

Choice = Mapping[str, float]
Named = dict[str, np.ndarray]
Unread = NDArray[np.bool_] | None


class Strengths:
    """Targets of a module and their sparse constants at a few rates, each made once.

    The constants of one target do not depend on the rates of the others, but for a weight with
    several columns a unit, which looks at what reads its units: the saliency and the
    refit read the activations of the dense model.

    Parameters
    ----------
    mod : tvm.IRModule
        Left untouched.
    spec : SparsitySpec or LayerRules
        Which targets are searched, the sparsity type of each, and its strongest rate.
    statistics : Mapping[str, numpy.ndarray]
        See :class:`icd_tvm.relax_passes.apply_sparsity.ApplySparsity`.
    rates : sequence of float
        Rates in (0, 1); those that a type cannot have or that exceed its spec's are left out.
    seed : int
        Seed of the adapters.

    Attributes
    ----------
    ladder : dict
        Target -> its specs, weakest first.
    skipped : dict
        Target -> why it is not searched.

    Raises
    ------
    ConfigError
        A rate outside (0, 1), or nothing to search.
    """

    def __init__(
        self,
        mod: Any,
        spec: Rules,
        statistics: Mapping[str, np.ndarray],
        rates: Sequence[float] = RATES,
        *,
        seed: int = 0,
    ) -> None:
        if not rates or not all(0 < rate < 1 for rate in rates):
            raise ConfigError(f"rates {list(rates)} are not in (0, 1)", "e.g. 0.1, 0.3, 0.5")
        self._func, self._statistics, self._seed = mod["main"], statistics, seed
        self.ladder: dict[str, list[SparsitySpec]] = {}
        self.skipped: dict[str, str] = {}
        self._targets: dict[str, SparsityTarget] = {}
        for target in sparsity_targets(self._func, tagged_groups(mod)):
            self._add(target, as_rules(spec), sorted(set(rates)))
        self._require_any()
        self._made: dict[tuple[str, str, bytes], Named] = {}

    @property
    def elements(self) -> int:
        """Number of weights of all targets together."""
        uses = [use for target in self._targets.values() for use in target.weights]
        return int(sum(np.prod(use.shape) for use in uses))

    @property
    def names(self) -> list[str]:
        """ONNX names of every constant that a choice may change."""
        return [n for t in self._targets.values() for n in _constants(t)]

    @property
    def readers(self) -> list[WeightUse]:
        """Weights that read what is pruned, and pruned weights: those that are refitted."""
        return [use for target in self._targets.values() for use in target.takers]

    def rules(self, choice: Choice) -> LayerRules[SparsitySpec]:
        """Return rules that give :class:`ApplySparsity` the same rates."""
        rules = [
            LayerRule(glob.escape(self._targets[key].layers[0].node), self._spec(key, rate))
            for key, rate in choice.items()
        ]
        return LayerRules(SparsitySpec("none"), tuple(rules))

    def arrays(self, choice: Choice) -> Named:
        """Return the new constants of a choice of rates by ONNX name."""
        found: Named = {}

        def value(const: Any) -> np.ndarray:
            return found.get(const_name(const), const.value.numpy())

        for key in (key for key in self._targets if key in choice):
            unread = unread_units(self._targets[key], value)
            found.update(self._arrays(key, self._spec(key, choice[key]), unread))
        return found

    def removed(self, choice: Choice) -> float:
        """Return the share of the weights of all targets that a choice sets to zero."""
        zeros, arrays = 0, self.arrays(choice)
        for use in (use for key in choice for use in self._targets[key].weights):
            array = arrays.get(const_name(use.const), use.const.value.numpy())
            zeros += array.size - np.count_nonzero(array)
        return zeros / self.elements

    def _spec(self, key: str, rate: float) -> SparsitySpec:
        return next(spec for spec in self.ladder[key] if spec.rate == rate)

    def _arrays(self, key: str, spec: SparsitySpec, unread: Unread = None) -> Named:
        made = (key, str(spec), b"" if unread is None else unread.tobytes())
        if made not in self._made:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                arrays, _ = prune_target(
                    self._func, self._targets[key], spec, self._statistics, self._seed, unread
                )
            self._made[made] = {const_name(c): a for c, a in arrays.items()}
        return self._made[made]

    def _add(
        self, target: SparsityTarget, rules: LayerRules[SparsitySpec], rates: Sequence[float]
    ) -> None:
        choice = target.choose(rules)
        if choice.spec is None or choice.spec.kind == "none":
            self.skipped[target.id] = choice.why or "its rule is none"
        elif fits(target, choice.spec):
            ladder = _ladder(choice.spec, rates)
            known = {name for other in self._targets.values() for name in _constants(other)}
            if known & set(_constants(target)) or "" in _constants(target):
                self.skipped[target.id] = "a constant of it has no name or another target"
            else:
                self._targets[target.id], self.ladder[target.id] = target, ladder

    def drop_failing(self) -> None:
        """Leave out strengths that remove nothing and targets that no strength fits, with why."""
        for key in list(self.ladder):
            why = "no rate removes anything, or the type does not fit its shape"
            try:
                self.ladder[key] = [s for s in self.ladder[key] if self._arrays(key, s)]
            except (IcdError, ArithmeticError, MemoryError, ValueError) as error:
                self.ladder[key], why = [], str(error)
            if not self.ladder[key]:
                self.skipped[key] = why
                del self.ladder[key], self._targets[key]
        self._require_any()

    def _require_any(self) -> None:
        if not self.ladder:
            why = next(iter(self.skipped.values()), "the model has none")
            raise ConfigError("no layer to search for sparsity", why)


def _constants(target: SparsityTarget) -> list[str]:
    uses = target.weights if target.group is None else target.group.consts
    return [const_name(use.const) for use in uses]


def _ladder(spec: SparsitySpec, rates: Sequence[float]) -> list[SparsitySpec]:
    if spec.kind in ("n:m", "v:n:m"):
        return [spec]
    ladder = []
    for rate in (rate for rate in rates if rate <= spec.rate):
        try:
            ladder.append(replace(make_spec(spec.type_name, rate), saliency=spec.saliency))
        except ConfigError:
            continue
    return ladder or [spec]
