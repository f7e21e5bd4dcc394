"""RewriteLayout: fold decided orders into the constants and drop units that are dead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from icd_tvm._tvm import apply_pass, tvm
from icd_tvm.adapters.units import zero_units
from icd_tvm.relax_passes.attach_layout_tags import tagged_groups
from icd_tvm.relax_passes.axis_groups import AxisGroups
from icd_tvm.relax_passes.axis_structure import axis_index
from icd_tvm.relax_passes.coaccess_attr import OUTPUT_ORDER
from icd_tvm.relax_passes.compact_groups import compact_groups
from icd_tvm.relax_passes.dead_units import dead_heads, dead_units
from icd_tvm.relax_passes.decide_permutation import read_permutations
from icd_tvm.relax_passes.hidden_groups import hidden_groups
from icd_tvm.relax_passes.permute_constants import leaf_permutations, permute_groups
from icd_tvm.relax_passes.reorder_outputs import ReorderOutputs
from icd_tvm.relax_passes.replace_constants import replace_constants
from icd_tvm.relax_passes.unit_weights import is_float, kept_places
from icd_tvm.tir_schedules.cuda.gemm import LIVE_COLUMNS

Orders = dict[str, np.ndarray]
# Columns of a V-row kernel's tile on most CPUs.
LANES = 16


@tvm.transform.module_pass(opt_level=0, name="RewriteLayout")
class RewriteLayout:
    """Apply permutations to constants; optionally remove dead hidden units.

    Parameters
    ----------
    perms : Mapping[str, numpy.ndarray], optional
        Group id, or ``out:NODE``, -> permutation; read from ``icd.layout_perm`` if omitted.
    compact : bool
        Zero dead hidden units and slice them off, as well as attention heads that nothing reads.
        ``removed`` says how many went from each group.
    lanes : int
        The remaining length stays a multiple of this many units where the group allows it, so
        that kernels keep full vectors. In a group whose order was decided only whole tiles of
        this many units go, so that the tiles of the order stay what they are. The surplus units
        are zero and harmless.
    """

    def __init__(
        self,
        perms: Mapping[str, np.ndarray] | None = None,
        *,
        compact: bool = True,
        lanes: int = LANES,
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
            groups = tagged_groups(mod)
            outputs = _followed(outputs, groups, leaf_permutations(groups, axes))
            mod = permute_groups(mod, groups, axes)
        if self.compact:
            mod = _zero_dead_units(mod)
            groups = tagged_groups(mod)
            keep = self._live_units(mod["main"], groups, set(axes))
            outputs = _followed(outputs, groups, keep)
            mod = compact_groups(mod, groups, keep) if keep else mod
        return apply_pass(ReorderOutputs(outputs), mod) if outputs else mod

    def _live_units(self, func: Any, groups: AxisGroups, ordered: set[str]) -> Orders:
        keep: Orders = {}
        for group in hidden_groups(func, groups):
            dead = dead_units(func, group)
            kept = (live_tiles if group.id in ordered else kept_units)(dead, self.lanes)
            if len(kept) < group.size:
                keep[group.id] = kept
                self.removed[group.id] = group.size - len(kept)
        for group in groups.free:
            dead = dead_heads(func, group)
            if dead.any():
                keep[group.id] = np.flatnonzero(~dead)
                self.removed[group.id] = int(dead.sum())
        return keep


def lanes_of(target: Any) -> int:
    """Return the columns of a tile of the kernels for a target; None is this machine."""
    return LIVE_COLUMNS if target is not None and target.kind.name == "cuda" else LANES


def _followed(orders: Orders, groups: AxisGroups, moved: Mapping[str, np.ndarray]) -> Orders:
    """Return output orders for axes that were permuted, or shortened, underneath them."""
    axes = {var.name: own[-1] for var, own in groups.value_axes.items() if var.name in orders}
    followed = dict(orders)
    for node, structure in axes.items():
        if set(structure.groups()) & moved.keys():
            place = np.full(structure.size, -1)
            index = axis_index(structure, moved)
            place[index] = np.arange(index.size)
            own = place[orders[node]]
            followed[node] = own[own >= 0]
    return followed


def _zero_dead_units(mod: Any) -> Any:
    """Zero every constant of a dead unit: what contributes nothing need not be computed."""
    func = mod["main"]
    arrays: dict[Any, np.ndarray] = {}
    for group in hidden_groups(func, tagged_groups(mod)):
        dead = dead_units(func, group)
        for use in filter(is_float, group.consts if dead.any() else ()):
            array = arrays.get(use.const, use.const.value.numpy())
            arrays[use.const] = zero_units(array, kept_places(use, group, ~dead), use.axis)
    return replace_constants(mod, arrays) if arrays else mod


def live_tiles(dead: np.ndarray, lanes: int) -> np.ndarray:
    """Return the indices of all tiles of ``lanes`` units that hold a live one, at least one tile.

    Parameters
    ----------
    dead : numpy.ndarray
        bool [size].
    lanes : int
        Units of a tile; the last one may be shorter.
    """
    tile = np.arange(dead.size) // lanes
    kept = np.isin(tile, np.unique(tile[~dead]) if not dead.all() else [0])
    return np.flatnonzero(kept)


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
