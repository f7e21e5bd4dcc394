"""PermuteConstants: apply permutations of free axis groups to the constants of ``main``.

Activations take the new order by themselves, so nothing is added at run time. Convention:
``new[i] = old[perm[i]]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from icd_tvm._tvm import GenericConst, Var, const_name, named_const, relax, tvm
from icd_tvm.core.permutation import invert
from icd_tvm.errors import PermutationError
from icd_tvm.relax_passes.axis_groups import AxisGroup, AxisGroups, find_axis_groups
from icd_tvm.relax_passes.axis_structure import (
    AxisStructure,
    Index,
    axis_index,
    split_permutation,
)
from icd_tvm.relax_passes.compact_groups import compact_groups
from icd_tvm.relax_passes.replace_constants import rewrite_constants
from icd_tvm.relax_passes.state_order import record_states

__all__ = [
    "PermuteConstants",
    "compact_groups",
    "compose_permutations",
    "invert_permutations",
    "leaf_permutations",
    "permute_groups",
    "permute_leaves",
    "rewrite_constants",
    "validate_permutation",
]


def validate_permutation(group: AxisGroup, perm: ArrayLike) -> Index:
    """Check one permutation against its group.

    Parameters
    ----------
    group : AxisGroup
        Atomic or composite.
    perm : array_like of int, shape [group.size]
        ``new[i] = old[perm[i]]``.

    Returns
    -------
    numpy.ndarray
        int64[group.size].

    Raises
    ------
    PermutationError
        With the group, the first bad position and the reason.
    """
    order = _checked_array(group, perm)
    if group.composite:
        try:
            parts = split_permutation(group.structure, order)
        except PermutationError as error:
            raise PermutationError(f"group {group.id!r}: {error.message}", error.hint) from None
        _check_unit_segments(group, order, parts)
    elif group.pins and not np.array_equal(order, np.arange(group.size)):
        pin = group.pins[0]
        raise PermutationError(
            f"group {group.id!r} is pinned by {pin.op} at {pin.node!r}: {pin.reason}",
            "leave it out or permute it by the identity",
        )
    return order


def _checked_array(group: AxisGroup, perm: ArrayLike) -> Index:
    where = f"permutation of group {group.id!r}"
    try:
        array = np.asarray(perm)
    except ValueError as error:
        raise PermutationError(f"{where} is no row of integers") from error
    if array.ndim != 1 or array.size != group.size:
        raise PermutationError(f"{where} has shape {array.shape}, expected ({group.size},)")
    if not np.issubdtype(array.dtype, np.integer):
        whole = np.issubdtype(array.dtype, np.floating) and array == np.floor(array)
        bad = int(np.flatnonzero(~np.broadcast_to(whole, array.shape))[:1].sum())
        raise PermutationError(f"{where} is not integer at position {bad}: dtype {array.dtype}")
    order = array.astype(np.int64)
    outside = np.flatnonzero((order < 0) | (order >= group.size))
    if outside.size:
        bad = int(outside[0])
        raise PermutationError(
            f"{where} is out of range at position {bad}: {int(order[bad])} not in [0, {group.size})"
        )
    _, first = np.unique(order, return_index=True)
    if first.size != order.size:
        bad = int(np.setdiff1d(np.arange(order.size), first)[0])
        raise PermutationError(
            f"{where} has a duplicate at position {bad}: index {int(order[bad])} again"
        )
    return order


def _check_unit_segments(group: AxisGroup, order: Index, parts: Mapping[str, Index]) -> None:
    """Refuse what the leaves cannot express, such as a swap of two one-index segments."""
    built = axis_index(group.structure, parts)
    if not np.array_equal(built, order):
        bad = int(np.flatnonzero(built != order)[0])
        raise PermutationError(f"group {group.id!r}: position {bad} crosses a segment")


def leaf_permutations(groups: AxisGroups, perms: Mapping[str, ArrayLike]) -> dict[str, Index]:
    """Validate permutations and break composite ones down to atomic groups.

    Returns
    -------
    dict of str to numpy.ndarray
        Atomic group id -> int64 permutation; identities are left out.

    Raises
    ------
    PermutationError
        Unknown, pinned or invalid; or two entries that order one group differently.
    """
    leaves: dict[str, Index] = {}
    for group_id, perm in perms.items():
        group = groups.get(group_id)
        order = validate_permutation(group, perm)
        own = split_permutation(group.structure, order)
        for leaf, part in own.items():
            validate_permutation(groups.get(leaf), part)
            known = leaves.setdefault(leaf, part)
            if not np.array_equal(known, part):
                raise PermutationError(
                    f"group {leaf!r} is ordered in two ways, the second through {group_id!r}"
                )
    return {leaf: order for leaf, order in leaves.items() if np.any(order != np.arange(order.size))}


def compose_permutations(
    first: Mapping[str, ArrayLike], second: Mapping[str, ArrayLike]
) -> dict[str, Index]:
    """Return the permutations that apply ``first`` and then ``second`` (atomic ids)."""
    result = {group: np.asarray(perm, dtype=np.int64) for group, perm in first.items()}
    for group, perm in second.items():
        order = np.asarray(perm, dtype=np.int64)
        result[group] = result[group][order] if group in result else order
    return result


def invert_permutations(perms: Mapping[str, ArrayLike]) -> dict[str, Index]:
    """Return the permutations that undo others."""
    return {group: invert(perm).astype(np.int64) for group, perm in perms.items()}


def permute_groups(mod: Any, groups: AxisGroups, perms: Mapping[str, ArrayLike]) -> Any:
    """Permute the constants of free groups.

    Parameters
    ----------
    mod : tvm.IRModule
        ``main`` must be the function that was analysed. Left untouched.
    groups : AxisGroups
    perms : mapping of str to int array
        Group id, atomic or composite -> permutation.

    Returns
    -------
    tvm.IRModule
        The same function up to rounding; a constant that two uses need in different orders
        is split in two.

    Raises
    ------
    PermutationError
        If a permutation is invalid or its group is pinned, unknown or has weights that are
        parameters.
    """
    leaves = leaf_permutations(groups, perms)
    _refuse_params(groups, leaves)
    return permute_leaves(mod, groups, leaves)


def permute_leaves(mod: Any, groups: AxisGroups, leaves: Mapping[str, Index]) -> Any:
    """Permute the constants of checked atomic groups; parameters are the caller's."""
    rewriter = _Permuter(groups, leaves)
    func, mod = mod["main"], mod.clone()
    mod["main"] = rewrite_constants(func, rewriter.rewrite)
    return record_states(relax.transform.Normalize()(mod), func, groups, leaves)


def _refuse_params(groups: AxisGroups, leaves: Iterable[str]) -> None:
    for leaf in leaves:
        names = [m.name for m in groups.get(leaf).members if m.kind == "param"]
        inputs = {name for name, _ in groups.opaque_states}
        if any(name not in inputs for name in names):
            raise PermutationError(
                f"group {leaf!r} holds parameter {names[0]!r}, not only constants",
                "bind the parameters (relax.transform.BindParams), or permute the arrays as well "
                "(permute_with_parameters)",
            )


class _Permuter:
    """Makes each permuted constant once."""

    def __init__(self, groups: AxisGroups, leaves: Mapping[str, Index]) -> None:
        self._groups, self._leaves = groups, leaves
        self._made: dict[Any, GenericConst] = {}

    def rewrite(self, const: GenericConst, var: Var, path: tuple[int, ...]) -> GenericConst:
        """Return the constant as one use of it needs it."""
        axes = self._groups.const_axes.get((var, path))
        if axes is None:
            return const
        points = self._groups.index_axes.get((var, path))
        moved = [(i, own) for i, own in enumerate(axes) if self._moves(own)]
        if points is not None and not self._moves(points):
            points = None
        if not moved and points is None:
            return const
        key = (const, tuple(moved), points)
        if key not in self._made:
            self._made[key] = self._permuted(const, moved, points)
        return self._made[key]

    def _moves(self, structure: AxisStructure) -> bool:
        return any(group in self._leaves for group in structure.groups())

    def _permuted(
        self,
        const: GenericConst,
        moved: Sequence[tuple[int, AxisStructure]],
        points: AxisStructure | None,
    ) -> GenericConst:
        array = const.value.numpy()
        for axis, structure in moved:
            array = np.take(array, axis_index(structure, self._leaves), axis=axis)
        if points is not None:
            array = invert(axis_index(points, self._leaves))[array].astype(array.dtype)
        # asarray, unlike ascontiguousarray, leaves scalars without an axis.
        return named_const(np.asarray(array, order="C"), const_name(const))


@tvm.transform.module_pass(opt_level=0, name="PermuteConstants")
class PermuteConstants:
    """Permute free axis groups of ``main``; the analysis runs inside the pass.

    Parameters
    ----------
    perms : mapping of str to int array
        Group id -> permutation with ``new[i] = old[perm[i]]``.
    opaque_states : sequence of (input name, output name)
        As for `find_axis_groups`.
    """

    def __init__(
        self, perms: Mapping[str, ArrayLike], opaque_states: Sequence[tuple[str, str]] = ()
    ) -> None:
        self.perms = dict(perms)
        self.opaque_states = tuple(opaque_states)

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a module with permuted constants.

        Raises
        ------
        PermutationError
            As `permute_groups`.
        """
        groups = find_axis_groups(mod["main"], opaque_states=self.opaque_states)
        return permute_groups(mod, groups, self.perms)
