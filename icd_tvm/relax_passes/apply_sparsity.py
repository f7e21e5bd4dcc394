"""ApplySparsity: the S transform, layer by layer as rules say."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from icd_tvm._tvm import tvm
from icd_tvm.adapters.sparsity import SparsitySpec
from icd_tvm.errors import IcdError
from icd_tvm.relax_passes.attach_layout_tags import tagged_groups
from icd_tvm.relax_passes.collect_activation_stats import Statistic
from icd_tvm.relax_passes.layer_rules import LayerRules, as_rules
from icd_tvm.relax_passes.prune_target import prune_target
from icd_tvm.relax_passes.replace_constants import replace_constants
from icd_tvm.relax_passes.sparsity_targets import (
    SparsityTarget,
    fits,
    sparsity_targets,
    unread_units,
)
from icd_tvm.relax_passes.transform_meta import with_transform_meta

Rules = SparsitySpec | LayerRules[SparsitySpec]


def calibration_requests(mod: Any, spec: Rules) -> dict[str, Statistic]:
    """Return the statistics that ``spec`` wants of ``mod``: the Gram matrices of each input.

    They come in two halves, as the ridge of a refit is chosen on inputs that it did not see. A
    unit is scored and refitted on the activations that its readers see; a weight that keeps
    groups of rows is refitted on its own input.
    """
    rules = as_rules(spec)
    requests: dict[str, Statistic] = {}
    for target in _targets(mod):
        chosen = target.choose(rules).spec
        if chosen is None or not _acts(chosen) or target.quantised:
            continue
        if fits(target, chosen):
            requests |= dict.fromkeys((use.node for use in target.takers), "gram-halves")
    return requests


@tvm.transform.module_pass(opt_level=0, name="ApplySparsity")
class ApplySparsity:
    """Make weights sparse; the order of every axis stays as it is.

    ``unit`` zeroes whole units over all members of an axis group: hidden units, channels of a
    scan block, and attention heads where a rule names them. Every other kind is applied to each
    weight between hidden units on its own, and to any other matmul weight that a rule names. What
    fails is left as it is, with a warning and the reason.

    Parameters
    ----------
    spec : SparsitySpec or LayerRules
        One spec for all layers, or one by name; embeddings, heads of classifiers and tiny weights
        are left out unless a rule names them.
    statistics : Mapping[str, numpy.ndarray]
        Matmul binding -> Gram matrix [K, K] of its input, or those of two halves of the inputs
        [2, K, K] (:func:`calibration_requests`). Without it the saliency is the magnitude and
        nothing is refitted; a spec that names ``wanda`` or ``obs`` then leaves the weight dense.
    seed : int
        Seed of the adapters.

    Attributes
    ----------
    meta : dict
        JSON record: the spec, ``entries`` of what was pruned, ``skipped`` with a reason each,
        and the patterns in ``unmatched`` that no layer fits. Also attached as
        ``icd.transform_meta``.
    """

    def __init__(
        self,
        spec: Rules,
        statistics: Mapping[str, np.ndarray] | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self.rules = as_rules(spec)
        self.statistics = dict(statistics or {})
        self.seed = seed
        self.meta: dict[str, Any] = {}

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a module with sparse constants and the metadata attached."""
        arrays: dict[Any, np.ndarray] = {}
        entries: list[dict[str, Any]] = []
        skipped: list[dict[str, str]] = []
        targets = _targets(mod) if self._specs() else []
        for target in targets:
            why = self._prune(mod["main"], target, arrays, entries)
            if why and any(fits(target, spec) for spec in self._specs()):
                skipped.append({"target": target.id, "kind": target.kind, "why": why})
        layers = [layer for target in targets for layer in target.layers]
        self.meta = {
            "sparsity": {
                "spec": str(self.rules.default),
                "rules": {r.pattern: str(r.spec or "none") for r in self.rules.rules},
                "entries": entries,
                "skipped": skipped,
                "unmatched": self._unmatched(layers),
            }
        }
        return with_transform_meta(replace_constants(mod, arrays), self.meta)

    def _specs(self) -> list[SparsitySpec]:
        specs = [self.rules.default, *(rule.spec for rule in self.rules.rules)]
        return [spec for spec in specs if spec is not None and _acts(spec)]

    def _prune(
        self,
        func: Any,
        target: SparsityTarget,
        arrays: dict[Any, np.ndarray],
        entries: list[dict[str, Any]],
    ) -> str:
        """Prune one target into ``arrays`` and ``entries``, or return why not."""
        choice = target.choose(self.rules)
        if choice.spec is None or not _acts(choice.spec):
            return choice.why or f"{choice.spec} removes nothing"
        if not fits(target, choice.spec):
            # Not a skip: the weights of a group and the group itself are both listed.
            return ""
        unread = unread_units(target, lambda const: arrays.get(const, const.value.numpy()))
        try:
            with warnings.catch_warnings():
                # The adapter's own warning does not know the layer; ours below does.
                warnings.simplefilter("ignore", RuntimeWarning)
                found, entry = prune_target(
                    func, target, choice.spec, self.statistics, self.seed, unread
                )
        except (IcdError, ArithmeticError, MemoryError, ValueError) as error:
            return _warned(target, str(error))
        if not found:
            return _warned(target, entry["why"])
        if any(const in arrays for const in found):
            return _warned(target, "a constant of it was pruned with another target")
        arrays |= found
        entries.append(entry)
        return ""

    def _unmatched(self, layers: Sequence[Any]) -> list[str]:
        patterns = self.rules.unmatched(layers)
        for pattern in patterns:
            warnings.warn(f"sparsity rule {pattern!r} fits no layer", RuntimeWarning, stacklevel=2)
        return patterns


def _targets(mod: Any) -> list[SparsityTarget]:
    return sparsity_targets(mod["main"], tagged_groups(mod))


def _acts(spec: SparsitySpec) -> bool:
    return spec.kind != "none" and spec.rate > 0


def _warned(target: SparsityTarget, why: str) -> str:
    warnings.warn(f"{target.id} stays dense: {why}", RuntimeWarning, stacklevel=2)
    return why
