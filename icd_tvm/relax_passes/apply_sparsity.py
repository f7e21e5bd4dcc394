"""ApplySparsity: the S transform on every hidden group of a module."""

from __future__ import annotations

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
from icd_tvm.relax_passes.attach_layout_tags import tagged_groups
from icd_tvm.relax_passes.collect_activation_stats import Statistic
from icd_tvm.relax_passes.hidden_groups import hidden_groups
from icd_tvm.relax_passes.replace_constants import replace_constants
from icd_tvm.relax_passes.transform_meta import with_transform_meta
from icd_tvm.relax_passes.unit_weights import in_floats, is_float, kept_places, unit_rows


def calibration_requests(mod: Any, spec: SparsitySpec) -> dict[str, Statistic]:
    """Return the statistics that ``spec`` wants of ``mod``: the Gram matrix of each input.

    A unit is scored and refitted on the activations of the group; a weight that keeps groups of
    rows is refitted on its own input.
    """
    if spec.kind == "none":
        return {}
    groups = in_floats(hidden_groups(mod["main"], tagged_groups(mod)))
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
        return with_transform_meta(replace_constants(mod, arrays), self.meta)

    def _groups(self, mod: Any) -> list[Any]:
        return in_floats(hidden_groups(mod["main"], tagged_groups(mod)))

    def _prune_units(self, group: Any, arrays: dict[Any, np.ndarray]) -> list[dict[str, Any]]:
        takers = [use for use in group.weights if use.side == "K"]
        single = len(takers) == 1 and takers[0].structure.is_leaf and takers[0].axis == 0
        gram = self.statistics.get(takers[0].node) if single else None
        makers = [rows.T for u in group.weights if u.side == "N" for rows in unit_rows(u, group)]
        readers = [rows for use in takers for rows in unit_rows(use, group)]
        kept = select_units(unit_scores(makers, readers, gram), self.spec.rate)
        for use in filter(is_float, group.consts):
            array = arrays.get(use.const, _array(use))
            arrays[use.const] = zero_units(array, kept_places(use, group, kept), use.axis)
        if gram is not None:
            arrays[takers[0].const] = refit_consumer(_array(takers[0]), gram, kept)
        return [{"group": group.id, "units": group.size, "kept": int(kept.sum())}]

    def _prune_weights(self, group: Any, arrays: dict[Any, np.ndarray]) -> list[dict[str, Any]]:
        entries = []
        for use in group.weights:
            if use.const in arrays:  # another group's axis of the same weight
                continue
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
    wanted = ("type", "rate", "density", "loss", "bytes_before", "bytes_after", "skipped", "why")
    return {key: meta[key] for key in wanted}
