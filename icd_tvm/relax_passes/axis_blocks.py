"""Blocked constraint: an axis whose scales or zero points are shared by blocks of indices.

The converters read block-wise scales through a constant index, which can follow any order. As
long as whole blocks move, and indices inside a block, the index stays ``i // block`` and the
packed formats need no index at all; any other order costs one index for every row.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from icd_tvm.errors import PermutationError
from icd_tvm.relax_passes.axis_model import AxisGroup, AxisGroups
from icd_tvm.relax_passes.permute_constants import leaf_permutations

Index = NDArray[np.int64]


def check_blocks(group: AxisGroup, order: Index) -> None:
    """Refuse an order that breaks a block.

    Raises
    ------
    PermutationError
        With the first position that takes an index from another block than its neighbours.
    """
    places = np.arange(group.size)
    for block in group.blocks:
        source = order // block
        wrong = np.flatnonzero(source != source[places // block * block])
        if wrong.size:
            bad = int(wrong[0])
            raise PermutationError(
                f"group {group.id!r}: position {bad} breaks a block of {block}: it takes index "
                f"{int(order[bad])} of block {int(source[bad])}",
                "move whole blocks and indices inside a block, or store a scale index per row",
            )


def with_tables(groups: AxisGroups, perms: Mapping[str, ArrayLike]) -> dict[str, Index]:
    """Return permutations that move whole blocks, and the tables of scales along with them.

    Parameters
    ----------
    groups : AxisGroups
    perms : mapping of str to int array
        Group id -> permutation.

    Returns
    -------
    dict of str to numpy.ndarray
        Atomic group id -> permutation, with one more entry for every table whose blocks move:
        the index that reads the table stays ``i // block``.

    Raises
    ------
    PermutationError
        If a permutation is invalid or breaks a block, or orders one table in two ways.
    """
    leaves = leaf_permutations(groups, perms)
    for leaf, order in leaves.items():
        check_blocks(groups.get(leaf), order)
    tables: dict[str, Index] = {}
    for place, table in groups.index_axes.items():
        axis = groups.const_axes[place][0] if len(groups.const_axes[place]) == 1 else None
        if axis is None or axis.group not in leaves or not table.is_leaf or table.size < 2:
            continue
        block = -(-axis.size // table.size)
        if block in groups.get(axis.group).blocks:
            order = leaves[axis.group][::block] // block
            if not np.array_equal(tables.setdefault(table.group, order), order):
                raise PermutationError(f"table {table.group!r} is shared by axes in two orders")
    return {**tables, **leaves}
