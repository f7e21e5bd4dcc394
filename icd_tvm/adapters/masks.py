"""Masks of the sparsity types whose pattern is not shared by scattered groups."""

from __future__ import annotations

import numpy as np

from icd_tvm.adapters.arrays import Bool, Float64
from icd_tvm.adapters.units import kept_count


def block_mask(saliency: Float64, block: tuple[int, int], rate: float) -> Bool:
    """Keep the same number of the best blocks in every block column.

    A budget per block column balances the work of the kernel's column tiles.

    Parameters
    ----------
    saliency : float64 array, shape [K, N]
        K and N divisible by the block's rows and columns.
    block : (int, int)
    rate : float
        Removed share in [0, 1).

    Returns
    -------
    bool array, shape [K, N]
    """
    (rows, cols), (length, width) = block, saliency.shape
    sums = saliency.reshape(length // rows, rows, width // cols, cols).sum(axis=(1, 3))
    kept = top_mask(sums, kept_count(length // rows, rate), axis=0)
    return np.repeat(np.repeat(kept, rows, axis=0), cols, axis=1)


def n_m_mask(saliency: Float64, n: int, m: int) -> Bool:
    """Keep the best ``n`` of every ``m`` consecutive rows of a column; K divisible by ``m``."""
    length, width = saliency.shape
    runs = saliency.reshape(length // m, m, width)
    return top_mask(runs, n, axis=1).reshape(length, width)


def unstructured_mask(saliency: Float64, rate: float, per_column: bool) -> Bool:
    """Keep the best elements of the whole matrix, or the same number of every column."""
    if per_column:
        return top_mask(saliency, kept_count(saliency.shape[0], rate), axis=0)
    flat = saliency.reshape(-1, 1)
    return top_mask(flat, kept_count(flat.size, rate), axis=0).reshape(saliency.shape)


def top_mask(values: Float64, count: int, axis: int) -> Bool:
    """Mark the ``count`` largest entries along ``axis``; ties go to the lower index."""
    order = np.argsort(-values, axis=axis, kind="stable")
    first = np.take(order, np.arange(count), axis=axis)
    mask = np.zeros(values.shape, dtype=np.bool_)
    np.put_along_axis(mask, first, True, axis=axis)
    return mask
