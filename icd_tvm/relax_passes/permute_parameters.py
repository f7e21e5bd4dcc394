"""Permute groups whose weights are parameters of ``main``: the module and the host arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from icd_tvm.errors import PermutationError
from icd_tvm.relax_passes.axis_groups import AxisGroups
from icd_tvm.relax_passes.axis_structure import AxisStructure, Index, axis_index
from icd_tvm.relax_passes.permute_constants import leaf_permutations, permute_leaves

Arrays = dict[str, NDArray[Any]]


def permute_with_parameters(
    mod: Any, groups: AxisGroups, perms: Mapping[str, ArrayLike], arrays: Mapping[str, Any]
) -> tuple[Any, Arrays]:
    """Permute the constants of a module and the parameters that go with it.

    Parameters
    ----------
    mod : tvm.IRModule
        ``main`` must be the function that was analysed; its parameters beyond the attribute
        ``num_input`` are weights. Left untouched.
    groups : AxisGroups
    perms : mapping of str to int array
        Group id, atomic or composite -> permutation; ``new[i] = old[perm[i]]``.
    arrays : mapping of str to array
        Host arrays by parameter name; not changed. Those that no permutation touches are passed
        on without a copy, also when they are memory-mapped.

    Returns
    -------
    (tvm.IRModule, dict of str to numpy.ndarray)

    Raises
    ------
    PermutationError
        If a permutation is invalid, or an array that has to be permuted is missing or has
        another shape.
    """
    leaves = leaf_permutations(groups, perms)
    result = dict(arrays)
    params = {param.name: groups.value_axes.get(param, ()) for param in weight_params(mod)}
    for name, axes in params.items():
        moved = [(i, own) for i, own in enumerate(axes) if set(own.groups()) & leaves.keys()]
        if moved:
            sizes = tuple(structure.size for structure in axes)
            result[name] = _permuted(_checked(name, result.get(name), sizes), moved, leaves)
    return permute_leaves(mod, groups, leaves), result


def weight_params(mod: Any) -> list[Any]:
    """Return the parameters of ``main`` that are weights."""
    main = mod["main"]
    attrs = main.attrs or {}
    count = int(attrs["num_input"]) if "num_input" in attrs else len(main.params)
    return list(main.params)[count:]


def _checked(name: str, array: Any, sizes: tuple[int, ...]) -> NDArray[Any]:
    if array is None:
        raise PermutationError(f"no array is given for parameter {name!r}")
    if tuple(np.shape(array)) != sizes:
        raise PermutationError(
            f"parameter {name!r} has shape {np.shape(array)}, the function says {sizes}"
        )
    return np.asarray(array)


def _permuted(
    array: NDArray[Any], moved: list[tuple[int, AxisStructure]], leaves: Mapping[str, Index]
) -> NDArray[Any]:
    for axis, structure in moved:
        array = np.take(array, axis_index(structure, leaves), axis=axis)
    return array
