"""ApplySparsity: the S transform on every hidden group of a module."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from icd_tvm._tvm import tvm
from icd_tvm.adapters.sparsity import (
    SparsitySpec,
    apply_sparsity,
    select_units,
    unit_scores,
    zero_units,
)
from icd_tvm.adapters.units import refit_consumer
from icd_tvm.relax_passes.axis_groups import find_axis_groups
from icd_tvm.relax_passes.collect_activation_stats import Statistic
from icd_tvm.relax_passes.hidden_groups import hidden_groups
from icd_tvm.relax_passes.replace_constants import replace_constants

TRANSFORM_META = "icd.transform_meta"


def calibration_requests(mod: Any, spec: SparsitySpec) -> dict[str, Statistic]:
    """Return the statistics that ``spec`` wants of ``mod``: the Gram matrix of each input.

    A unit is scored and refitted on the activations of the group; a weight that keeps groups of
    rows is refitted on its own input.
    """
    if spec.kind == "none":
        return {}
    groups = hidden_groups(mod["main"], find_axis_groups(mod["main"]))
    sides = {"K"} if spec.kind == "unit" else {"K", "N"}
    return {use.node: "gram" for group in groups for use in group.weights if use.side in sides}


@tvm.transform.module_pass(opt_level=0, name="ApplySparsity")
class ApplySparsity:
    """Make the weights of hidden groups sparse; the order of every axis stays as it is.

    Parameters
    ----------
    spec : SparsitySpec
        ``unit`` zeroes whole hidden units over all members of a group; every other kind is
        applied to each weight of the group on its own.
    statistics : Mapping[str, numpy.ndarray]
        Matmul binding -> Gram matrix [K, K] of its input (:func:`calibration_requests`). Without
        it the saliency is the magnitude and nothing is refitted.
    seed : int
        Seed of the adapters.

    Attributes
    ----------
    meta : dict
        JSON record: the spec, and one entry for every weight or group, skipped ones with the
        reason. Also attached as ``icd.transform_meta``.
    """

    def __init__(
        self,
        spec: SparsitySpec,
        statistics: Mapping[str, np.ndarray] | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self.spec = spec
        self.statistics = dict(statistics or {})
        self.seed = seed
        self.meta: dict[str, Any] = {}

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a module with sparse constants and the metadata attached."""
        groups = [] if self.spec.kind == "none" else self._groups(mod)
        arrays: dict[Any, np.ndarray] = {}
        entries = []
        for group in groups:
            prune = self._prune_units if self.spec.kind == "unit" else self._prune_weights
            entries += prune(group, arrays)
        self.meta = {"sparsity": {"spec": str(self.spec), "entries": entries}}
        return replace_constants(mod, arrays).with_attr(TRANSFORM_META, json.dumps(self.meta))

    def _groups(self, mod: Any) -> list[Any]:
        return hidden_groups(mod["main"], find_axis_groups(mod["main"]))

    def _prune_units(self, group: Any, arrays: dict[Any, np.ndarray]) -> list[dict[str, Any]]:
        makers = [use for use in group.weights if use.side == "N"]
        takers = [use for use in group.weights if use.side == "K"]
        gram = self.statistics.get(takers[0].node) if len(takers) == 1 else None
        scores = unit_scores([_array(use) for use in makers], [_array(use) for use in takers], gram)
        kept = select_units(scores, self.spec.rate)
        for use in group.consts:
            arrays[use.const] = zero_units(arrays.get(use.const, _array(use)), kept, use.axis)
        if gram is not None:
            arrays[takers[0].const] = refit_consumer(_array(takers[0]), gram, kept)
        return [
            {
                "group": group.id,
                "units": group.size,
                "kept": int(kept.sum()),
                "delta_layout": not kept.all(),
            }
        ]

    def _prune_weights(self, group: Any, arrays: dict[Any, np.ndarray]) -> list[dict[str, Any]]:
        entries = []
        for use in group.weights:
            gram = self.statistics.get(use.node)
            arrays[use.const], meta = apply_sparsity(
                _array(use),
                self.spec.type_name,
                self.spec.rate,
                saliency="magnitude" if gram is None else "wanda",
                calibration=gram,
                seed=self.seed,
                refit=gram is not None,
            )
            entries.append({"weight": use.name, **_brief(meta)})
        return entries


def _array(use: Any) -> np.ndarray:
    return use.const.value.numpy()


def _brief(meta: dict[str, Any]) -> dict[str, Any]:
    wanted = ("type", "rate", "density", "loss", "bytes_before", "bytes_after")
    return {key: meta[key] for key in (*wanted, "delta_layout", "skipped", "why")}
