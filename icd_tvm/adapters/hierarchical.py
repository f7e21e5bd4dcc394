"""Two-level sparsity: vectors or blocks are kept first, then N of M elements inside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from icd_tvm.adapters.arrays import Bool, Float64, Index
from icd_tvm.adapters.grouping import assign_groups, best_rows
from icd_tvm.adapters.masks import block_mask, n_m_mask, top_mask
from icd_tvm.adapters.sparsity_spec import VECTOR_RUN
from icd_tvm.adapters.units import kept_count

# Bytes of one row or column number in the packed formats.
INDEX_BYTES = 4


@dataclass(frozen=True)
class Hierarchy:
    """A two-level mask.

    Parameters
    ----------
    mask : bool array, shape [K, N]
    groups : dict
        JSON-serialisable description of the outer level.
    index_bytes : int
        Packed size of the outer level.
    """

    mask: Bool
    groups: dict[str, Any]
    index_bytes: int


def v_n_m(saliency: Float64, vector: int, n: int, m: int) -> Hierarchy:
    """Keep 4 rows of every m for each group of columns, then n of those 4 in each column.

    Parameters
    ----------
    saliency : float64 array, shape [K, N]
        K divisible by ``m``, N by ``vector``.
    vector : int
        Consecutive columns that share the row choice.
    n, m : int
        1 <= n < 4 <= m.

    Returns
    -------
    Hierarchy
        Density n / m.

    Notes
    -----
    Castro et al., "VENOM: a vectorized N:M format for unleashing the power of sparse tensor
    cores", 2023.
    """
    length, width = saliency.shape
    runs = saliency.reshape(length // m, m, width // vector, vector)
    rows = top_mask(runs.sum(axis=3), VECTOR_RUN, axis=1)
    # Ranked inside the kept rows alone: a dropped row can never win.
    inside = np.where(rows[..., None], runs, -1.0)
    mask = top_mask(inside, n, axis=1).reshape(length, width)
    groups = {"size": vector, "count": width // vector, "rows_of_run": VECTOR_RUN}
    positions = int(rows.sum()) * _bits(m)
    return Hierarchy(mask, {**groups, "n": n, "m": m}, -(-positions // 8))


def vectors_n_m(
    saliency: Float64,
    vector: int,
    rate: float,
    n: int,
    m: int,
    columns: Index | None = None,
    seed: int = 0,
) -> Hierarchy:
    """Groups of columns share a set of rows; inside it each column keeps n of m packed rows.

    Parameters
    ----------
    saliency : float64 array, shape [K, N]
        K divisible by ``m``, N by ``vector``.
    vector : int
        Columns in a group.
    rate : float
        Share of the rows that the outer level removes, in [0, 1).
    n, m : int
    columns : int array, shape [N / vector, vector], optional
        Groups; chosen by saliency similarity when not given.
    seed : int
        Seed of the group assignment.

    Returns
    -------
    Hierarchy
        Runs are cut from a group's kept rows in ascending order.
    """
    count = kept_count(len(saliency), rate, multiple_of=m)
    if columns is None:
        columns = assign_groups(saliency, vector, count, seed)
    kept = best_rows(saliency, columns, count)
    mask = np.zeros(saliency.shape, dtype=np.bool_)
    for group, support in zip(columns, kept, strict=True):
        cells = np.ix_(np.flatnonzero(support), group)
        mask[cells] = n_m_mask(saliency[cells], n, m)
    groups = {
        "size": vector,
        "count": len(columns),
        "rows_kept": count,
        "columns": columns.tolist(),
        "rows": [np.flatnonzero(row).tolist() for row in kept],
        "n": n,
        "m": m,
    }
    return Hierarchy(mask, groups, len(columns) * count * INDEX_BYTES)


def blocks_n_m(saliency: Float64, block: tuple[int, int], rate: float, n: int, m: int) -> Hierarchy:
    """Keep whole blocks, and n of m consecutive rows inside them.

    Parameters
    ----------
    saliency : float64 array, shape [K, N]
        K and N divisible by the block's rows and columns.
    block : (int, int)
        Rows, divisible by ``m``, and columns.
    rate : float
        Share of the blocks that the outer level removes, in [0, 1).
    n, m : int

    Returns
    -------
    Hierarchy
        Blocks are ranked by what N:M leaves of them.
    """
    inner = n_m_mask(saliency, n, m)
    outer = block_mask(np.where(inner, saliency, 0.0), block, rate)
    count = int(outer.sum()) // (block[0] * block[1])
    groups = {"rows": block[0], "cols": block[1], "count": count, "n": n, "m": m}
    columns = saliency.shape[1] // block[1]
    return Hierarchy(inner & outer, groups, (count + columns + 1) * INDEX_BYTES)


def inner_bytes(mask: Bool, itemsize: int, run: int) -> int:
    """Return the bytes of the kept values and of their positions in runs of ``run``."""
    kept = int(mask.sum())
    return kept * itemsize + -(-kept * _bits(run) // 8)


def _bits(values: int) -> int:
    return max(1, int(np.ceil(np.log2(values))))
