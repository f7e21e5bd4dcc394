"""Elements of a weight outside its live blocks: split off, and packed by column.

A block of W that holds few elements costs as much as a full one. The strays are added to the sums
of the live blocks before the epilogue, in float32, in the order of their inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from icd_tvm.errors import ShapeError
from icd_tvm.tir_schedules.cuda.gemm import SLAB, STRAY_INPUTS

Array = npt.NDArray[np.generic]
_FOUR = 4


class Strays(NamedTuple):
    """``starts`` int32[N + 1], in fours; ``list`` uint32[fours, 4]: input, and value << 16."""

    starts: npt.NDArray[np.int32]
    list: npt.NDArray[np.uint32]


def split_strays(weight: Array, columns: int, least: int) -> tuple[Array, Array]:
    """Return W without the blocks of fewer than ``least`` elements, and those elements alone.

    Parameters
    ----------
    weight : [K, N]
    columns : int
        Of a group; a block is 16 rows of W for a group.
    least : int
        Elements other than zero that keep a block.
    """
    k, n = weight.shape
    padded = np.zeros((-(-k // SLAB) * SLAB, -(-n // columns) * columns), bool)
    padded[:k, :n] = weight != 0
    count = padded.reshape(-1, SLAB, padded.shape[1] // columns, columns).sum((1, 3))
    keep = np.kron(count >= least, np.ones((SLAB, columns), bool))[:k, :n]
    none = np.zeros_like(weight)
    return np.where(keep, weight, none), np.where(keep, none, weight)


def pack_strays(strays: Array) -> Strays:
    """Return the elements other than zero as the kernel reads them, padded to fours by zeros.

    Parameters
    ----------
    strays : float16 or bfloat16 [K, N]
        K at most 65536.

    Raises
    ------
    ShapeError
        If a value or the number of an input has more than 16 bits.
    """
    k, n = strays.shape
    if strays.dtype.itemsize != 2:
        raise ShapeError(f"strays are {strays.dtype}", "expected float16 or bfloat16")
    if k > STRAY_INPUTS:
        raise ShapeError(f"{k} inputs of strays have no numbers of 16 bits")
    columns, inputs = np.nonzero(strays.T)
    counts = np.bincount(columns, minlength=n)
    starts = np.concatenate([[0], np.cumsum(-(-counts // _FOUR))])
    # An empty list still is an array that a kernel may be given.
    packed = np.zeros(max(_FOUR, int(starts[-1]) * _FOUR), np.uint32)
    first = np.cumsum(counts) - counts
    place = starts[columns] * _FOUR + np.arange(len(columns)) - first[columns]
    bits = np.asarray(strays.T[columns, inputs]).view(np.uint16).astype(np.uint32)
    packed[place] = inputs.astype(np.uint32) | bits << 16
    return Strays(starts.astype(np.int32), packed.reshape(-1, _FOUR))


def unpack_strays(packed: Strays, k: int, dtype: np.dtype[np.generic]) -> Array:
    """Return [k, N] from what `pack_strays` made."""
    n = len(packed.starts) - 1
    columns = np.repeat(np.arange(n), np.diff(packed.starts) * _FOUR)
    words = packed.list.reshape(-1)[: len(columns)]
    values = (words >> 16).astype(np.uint16).view(dtype)
    full = np.zeros((k, n), dtype)
    there = values != 0
    full[(words & 0xFFFF)[there], columns[there]] = values[there]
    return full
