"""RewriteLayout: fold decided orders into the constants and drop units that are dead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from icd_tvm._tvm import apply_pass, tvm
from icd_tvm.relax_passes.axis_groups import find_axis_groups
from icd_tvm.relax_passes.coaccess_attr import OUTPUT_ORDER
from icd_tvm.relax_passes.compact_groups import compact_groups
from icd_tvm.relax_passes.dead_units import dead_units
from icd_tvm.relax_passes.decide_permutation import read_permutations
from icd_tvm.relax_passes.hidden_groups import hidden_groups
from icd_tvm.relax_passes.permute_constants import permute_groups
from icd_tvm.relax_passes.reorder_outputs import ReorderOutputs


@tvm.transform.module_pass(opt_level=0, name="RewriteLayout")
class RewriteLayout:
    """Apply permutations to constants; optionally remove dead hidden units.

    Parameters
    ----------
    perms : Mapping[str, numpy.ndarray], optional
        Group id, or ``out:NODE``, -> permutation; read from ``icd.layout_perm`` if omitted.
    compact : bool
        Slice dead hidden units off. ``removed`` says how many went from each group.
    lanes : int
        The remaining length stays a multiple of this many units where the group allows it, so
        that kernels keep full vectors; the surplus units are dead and harmless.
    """

    def __init__(
        self,
        perms: Mapping[str, np.ndarray] | None = None,
        *,
        compact: bool = True,
        lanes: int = 16,
    ) -> None:
        self.perms = None if perms is None else dict(perms)
        self.compact = compact
        self.lanes = lanes
        self.removed: dict[str, int] = {}

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a rewritten clone."""
        perms = read_permutations(mod) if self.perms is None else self.perms
        axes = {key: perm for key, perm in perms.items() if not key.startswith(OUTPUT_ORDER)}
        outputs = {
            key.removeprefix(OUTPUT_ORDER): perm
            for key, perm in perms.items()
            if key.startswith(OUTPUT_ORDER)
        }
        if axes:
            mod = permute_groups(mod, find_axis_groups(mod["main"]), axes)
        if self.compact:
            mod = self._drop_dead_units(mod)
        return apply_pass(ReorderOutputs(outputs), mod) if outputs else mod

    def _drop_dead_units(self, mod: Any) -> Any:
        func, groups = mod["main"], find_axis_groups(mod["main"])
        keep: dict[str, np.ndarray] = {}
        for group in hidden_groups(func, groups):
            axes = {use.var: use.axis for use in group.values}
            kept = kept_units(dead_units(func, group.size, axes), self.lanes)
            if len(kept) < group.size:
                keep[group.id] = kept
                self.removed[group.id] = group.size - len(kept)
        return compact_groups(mod, groups, keep) if keep else mod


def kept_units(dead: np.ndarray, lanes: int) -> np.ndarray:
    """Return the indices to keep: all live ones, and dead ones up to a multiple of ``lanes``.

    Parameters
    ----------
    dead : numpy.ndarray
        bool [size].
    lanes : int
        At least one multiple is kept, so an axis never becomes empty.
    """
    live = np.flatnonzero(~dead)
    wanted = min(dead.size, max(1, -(-live.size // lanes)) * lanes)
    return np.sort(np.concatenate([live, np.flatnonzero(dead)[: wanted - live.size]]))
