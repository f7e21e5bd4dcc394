"""The matmul kernels by name: how each is built, packed and modelled."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from icd_tvm.tir_schedules.cpu.block_sparse import (
    group_rows,
    kept_rows,
    pack_rowlist,
    pack_vrow,
    rowlist_matmul,
    vrow_matmul,
    vrow_tile,
)
from icd_tvm.tir_schedules.cpu.dense import dense_matmul, pack_dense
from icd_tvm.tir_schedules.cpu.gemv import (
    MAX_ROWS,
    NarrowWeight,
    narrow_matmul,
    narrow_tile,
    pack_narrow,
)
from icd_tvm.tir_schedules.cpu.panel_builder import VColShape, vcol_cycles
from icd_tvm.tir_schedules.cpu.tile import (
    INDEX_COST,
    Tile,
    choose_tile,
    flat_rows,
    tile_cycles,
)
from icd_tvm.tir_schedules.cpu.transposed_sparse import pack_vcol, vcol_matmul
from icd_tvm.tir_schedules.target import vector_bits

# Simplest first: of two that take about the same time, the earlier is chosen.
KINDS = ("dense", "rowlist", "vrow32", "vrow16", "vcol16", "vcol8", "vcol1")
# Groups of 8 read no more rows than groups of 16, at the same speed; vcol1 is CSR.
CANDIDATES = ("rowlist", "vrow32", "vrow16", "vcol8", "vcol1")
# Bytes a cycle that one core reads from memory: 43 GB/s measured at 3.6 GHz, Zen 5.
_MEMORY_BYTES = 12
# Row lists are padded so that weights of nearly one size share a function.
_ROW_STEP, _MAX_PADDING, _VCOL_STEP = 8, 0.03, 64
# With fewer panels the padding of the last one is a large part of the weight.
_MIN_PANELS = 4

Array = npt.NDArray[Any]
Shape = tuple[int, ...]


class DenseKernel(NamedTuple):
    """The kernel of a product with a weight of which every row is read.

    Attributes
    ----------
    name : str
    func : PrimFunc
        Of X, the packed weight and Y.
    pack : callable
        Weight [K, N] of float32 -> what the function takes.
    """

    name: str
    func: Any
    pack: Callable[[Array], Array]


def dense_kernel(shape: Shape, target: Any) -> DenseKernel:
    """Return the kernel of ``X[*lead, m, k] @ weight[k, n]`` in float32.

    Few rows take what the weight takes to arrive, so that for them fetching ahead pays.

    Parameters
    ----------
    shape : tuple of int
        ``(*lead, m, k, n)``.
    target : tvm.target.Target
    """
    *lead, m, k, n = shape
    batch, rows = flat_rows(tuple(lead), m)
    columns = narrow_tile(min(rows, MAX_ROWS), target).columns
    if rows * prod(batch) <= MAX_ROWS and n >= _MIN_PANELS * columns:
        form = NarrowWeight(32, k)
        func = narrow_matmul(m, k, n, form, target, lead=tuple(lead))
        return DenseKernel("narrow_matmul", func, lambda w: pack_narrow(w, [], form, columns)[0])
    tile = choose_tile(rows, k, n, target)
    func = dense_matmul(m, k, n, tile, tuple(lead))
    return DenseKernel("dense_matmul", func, lambda w: pack_dense(w, tile.columns))


def group_width(kind: str) -> int:
    """Return the columns per group of a kind; 0 for those without groups."""
    return int(kind[4:]) if kind[:4] in ("vrow", "vcol") else 0


def read_rows(kind: str, weight: Array) -> int:
    """Return how many rows of the weight a kernel reads per group, on average and rounded up."""
    group = group_width(kind)
    if kind.startswith("vcol"):
        return max(1, int(np.ceil(group_rows(weight, group).sum(axis=1).mean())))
    if group:
        return kept_rows(weight, group)
    return max(1, int(np.count_nonzero(weight.any(axis=1)))) if kind == "rowlist" else len(weight)


def candidate_rows(weight: Array, target: Any) -> dict[str, int]:
    """Return the rows per group that each sparse kernel of the target would read, by kind."""
    lanes = vector_bits(target) // 32
    fits = [k for k in CANDIDATES if not k.startswith("vrow") or group_width(k) % lanes == 0]
    return {kind: read_rows(kind, weight) for kind in fits}


def build_matmul(kind: str, shape: Shape, nk: int, target: Any) -> Any:
    """Return the TIR function of one kernel kind.

    Parameters
    ----------
    kind : str
        One of `KINDS`.
    shape : tuple of int
        ``(*lead, m, k, n)``.
    nk : int
        Length of the row lists; the dense kernel has none.
    target : tvm.target.Target
    """
    *lead, m, k, n = shape
    group = group_width(kind)
    if kind.startswith("vcol"):
        return vcol_matmul(m, k, n, nk, group, lead=tuple(lead), target=target)
    if group:
        return vrow_matmul(m, k, n, nk, group, lead=tuple(lead), target=target)
    if kind == "rowlist":
        return rowlist_matmul(m, k, n, nk, _tile(kind, shape, target), tuple(lead))
    return dense_kernel(shape, target).func


def pack_matmul(kind: str, weight: Array, shape: Shape, target: Any) -> dict[str, Array]:
    """Return the constants of a sparse kernel, in the order of its parameters.

    Parameters
    ----------
    kind : str
        A sparse kind.
    weight : array [K, N] of float32
    shape : tuple of int
        ``(*lead, m, k, n)``.
    target : tvm.target.Target

    Returns
    -------
    dict of str to array
        ``rows`` (int32 row lists, whose last axis is nk), ``data`` (float32) and, where each
        group has its own number of rows, ``counts``.
    """
    group, k = group_width(kind), shape[-2]
    if kind.startswith("vcol"):
        most = kept_rows(weight, group)
        space = min(k, _round_up(most, _VCOL_STEP))
        counts, rows, data = pack_vcol(weight, group, vector_bits(target) // 32, space)
        return {"counts": counts, "rows": rows, "data": data}
    if group:
        rows, data = pack_vrow(weight, group)
    else:
        rows, data = pack_rowlist(weight, _tile(kind, shape, target).columns)
    nk = padded_rows(rows.shape[-1], k)
    return {"rows": _pad(rows, rows.ndim - 1, nk), "data": _pad(data, 1, nk)}


def padded_rows(nk: int, k: int) -> int:
    """Return ``nk`` rounded up to a multiple of eight where that costs less than 3 %."""
    rounded = _round_up(nk, _ROW_STEP)
    return rounded if rounded <= min(k, nk * (1 + _MAX_PADDING)) else nk


def modelled_cycles(kind: str, shape: Shape, rows: float, target: Any) -> float:
    """Return the modelled cycles of one kernel that reads ``rows`` rows of W per group.

    The busier of the core and the memory that the weights come from: few rows of X leave the
    core waiting for W.
    """
    weights = rows * shape[-1]
    indices = weights / width if (width := group_width(kind)) else 0
    read = 4 * (weights + indices) / _MEMORY_BYTES
    return max(_core_cycles(kind, shape, rows, target), read)


def _core_cycles(kind: str, shape: Shape, rows: float, target: Any) -> float:
    *lead, m, k, n = shape
    if kind.startswith("vcol"):
        lanes = vector_bits(target) // 32
        return vcol_cycles(VColShape(tuple(lead), m, k, n, 1, group_width(kind), lanes), rows)
    batch, m = flat_rows(tuple(lead), m)
    tile = _tile(kind, shape, target)
    factor = INDEX_COST if kind != "dense" and tile.vectors == 1 else 1.0
    return prod(batch) * tile_cycles(tile, m, k, n) * rows * factor


def _tile(kind: str, shape: Shape, target: Any) -> Tile:
    *lead, m, k, n = shape
    rows = flat_rows(tuple(lead), m)[1]
    if kind.startswith("vrow"):
        return vrow_tile(rows, k, n, group_width(kind), target)
    return choose_tile(rows, k, n, target)


def _pad(array: Array, axis: int, length: int) -> Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, length - array.shape[axis])
    return np.ascontiguousarray(np.pad(array, widths))


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
