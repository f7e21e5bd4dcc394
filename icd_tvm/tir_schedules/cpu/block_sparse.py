"""Matmuls on weights whose columns share their non-zero rows, group by group.

In a V-row kernel each group of V neighbouring columns of W has one list of non-zero rows:
one vector register of accumulators per row of X, no decoding, no branch. With V = N a single
list serves the whole matrix and the kernel is the dense one on gathered columns of X.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm._tvm import ScheduleRule, i64, te
from icd_tvm.errors import TransformError
from icd_tvm.tir_schedules.cpu.dense import (
    matrix_shape,
    pack_dense,
    shape64,
    tiled_func,
)
from icd_tvm.tir_schedules.cpu.tile import (
    Lead,
    Tile,
    choose_tile,
    flat_rows,
    is_prim_func,
    schedule_tiled,
)
from icd_tvm.tir_schedules.target import host_target, vector_bits


def vrow_matmul(
    m: int, k: int, n: int, nk: int, v: int = 16, *, lead: Lead = (), target: Any = None
) -> Any:
    """Return the TIR function of ``Y[i, j] = sum_t X[i, idx[j//v, t]] * data[j//v, t, j%v]``.

    Parameters
    ----------
    m, k, n : int
        Rows of X, columns of X, columns of Y.
    nk : int
        Rows of W kept per group.
    v : int, optional
        Columns of W per group, a multiple of the fp32 lanes of the target.
    lead : tuple of int, optional
        Leading batch axes of X and Y.
    target : tvm.target.Target, optional
        Sizes the register tile; this machine if omitted.

    Returns
    -------
    PrimFunc
        ``(X: f32[*lead, m, k], idx: i32[ceil(n/v), nk], data: f32[ceil(n/v), nk, v],
        Y: f32[*lead, m, n])``, marked so that FuseOps fuses an epilogue into it.

    Raises
    ------
    TransformError
        If ``v`` is no multiple of the lanes, or ``nk`` is not in 1..k.
    """
    _check_kept(nk, k)
    tile = vrow_tile(flat_rows(lead, m)[1], k, n, v, target or host_target())
    groups = -(-n // v)
    x = te.placeholder(shape64((*lead, m, k)), "float32", name="X")
    idx = te.placeholder(shape64((groups, nk)), "int32", name="idx")
    data = te.placeholder(shape64((groups, nk, v)), "float32", name="data")
    axis = te.reduce_axis((i64(0), i64(nk)), "t")

    def product(row: Lead, j: Any) -> Any:
        return te.sum(x[(*row, idx[j // v, axis])] * data[j // v, axis, j % v], axis)

    return tiled_func(product, (x, idx, data), (*lead, m, n), tile, "vrow")


def rowlist_matmul(m: int, k: int, n: int, nk: int, tile: Tile, lead: Lead = ()) -> Any:
    """Return the TIR function of ``Y[i, j] = sum_t X[i, idx[t]] * W[j//P, t, j%P]``.

    Parameters
    ----------
    m, k, n : int
        Rows of X, columns of X, columns of Y.
    nk : int
        Rows of W kept.
    tile : Tile
        Register tile; P is ``tile.columns``.
    lead : tuple of int, optional
        Leading batch axes of X and Y.

    Returns
    -------
    PrimFunc
        ``(X: f32[*lead, m, k], idx: i32[nk], W: f32[ceil(n/P), nk, P], Y: f32[*lead, m, n])``.

    Raises
    ------
    TransformError
        If ``nk`` is not in 1..k.
    """
    _check_kept(nk, k)
    width = tile.columns
    x = te.placeholder(shape64((*lead, m, k)), "float32", name="X")
    idx = te.placeholder(shape64((nk,)), "int32", name="idx")
    w = te.placeholder(shape64((-(-n // width), nk, width)), "float32", name="W")
    axis = te.reduce_axis((i64(0), i64(nk)), "t")

    def product(row: Lead, j: Any) -> Any:
        return te.sum(x[(*row, idx[axis])] * w[j // width, axis, j % width], axis)

    return tiled_func(product, (x, idx, w), (*lead, m, n), tile, "rowlist")


def vrow_tile(m: int, k: int, n: int, v: int, target: Any) -> Tile:
    """Return the register tile of a V-row kernel: ``v`` columns wide.

    Raises
    ------
    TransformError
        If ``v`` is no multiple of the fp32 lanes of ``target``.
    """
    lanes = vector_bits(target) // 32
    if v < lanes or v % lanes:
        raise TransformError(f"V = {v} is no multiple of {lanes} lanes", "use V = 16 or 32")
    return choose_tile(m, k, n, target, vectors=v // lanes)


def group_rows(weight: npt.NDArray[Any], v: int) -> npt.NDArray[np.bool_]:
    """Return which rows each group of ``v`` columns needs.

    Parameters
    ----------
    weight : array [K, N]
    v : int
        Columns per group; the last group may be narrower.

    Returns
    -------
    array [ceil(N / v), K] of bool
        True where a row has a non-zero in the group.
    """
    k, n = matrix_shape(weight)
    padded = np.zeros((k, -(-n // v) * v), bool)
    padded[:, :n] = weight != 0
    return np.ascontiguousarray(padded.reshape(k, -1, v).any(axis=2).T)


def kept_rows(weight: npt.NDArray[Any], v: int) -> int:
    """Return nk of the V-row kernel: the most rows any group of ``v`` columns needs, at least 1."""
    return max(1, int(group_rows(weight, v).sum(axis=1).max(initial=0)))


def pack_vrow(
    weight: npt.NDArray[Any], v: int = 16
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return the row lists and values of a V-row kernel.

    Parameters
    ----------
    weight : array [K, N] of float32
    v : int, optional
        Columns per group.

    Returns
    -------
    idx : array [ceil(N / v), nk] of int32
        Ascending rows of each group; shorter groups are padded with row 0.
    data : array [ceil(N / v), nk, v] of float32
        Their values; zero where padded.
    """
    used = group_rows(weight, v)
    k, n = matrix_shape(weight)
    nk = max(1, int(used.sum(axis=1).max(initial=0)))
    columns = np.zeros((k, used.shape[0] * v), np.float32)
    columns[:, :n] = weight
    blocks = columns.reshape(k, -1, v)
    idx = np.zeros((used.shape[0], nk), np.int32)
    data = np.zeros((used.shape[0], nk, v), np.float32)
    for group, mask in enumerate(used):
        rows = np.flatnonzero(mask)
        idx[group, : rows.size] = rows
        data[group, : rows.size] = blocks[rows, group]
    return idx, data


def pack_rowlist(
    weight: npt.NDArray[Any], columns: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return the row list and the packed values of a row-list kernel.

    Parameters
    ----------
    weight : array [K, N] of float32
    columns : int
        Panel width P.

    Returns
    -------
    idx : array [nk] of int32
        Ascending rows of W that hold a non-zero; row 0 alone if there is none.
    data : array [ceil(N / P), nk, P] of float32
    """
    rows = np.flatnonzero(np.asarray(weight).any(axis=1))
    if not rows.size:
        rows = np.zeros(1, np.intp)
    return rows.astype(np.int32), pack_dense(weight[rows], columns)


class BlockSparseRule(ScheduleRule):
    """Schedule rule for functions that hold one V-row or row-list matmul and its epilogue."""

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        """Return the schedule of ``func``, or None if it holds no such matmul."""
        return schedule_tiled(func, target, ("vrow", "rowlist")) if is_prim_func(func) else None


def _check_kept(nk: int, k: int) -> None:
    if not 1 <= nk <= k:
        raise TransformError(f"kept rows nk = {nk} are not in 1..{k}", "pack the weight first")
