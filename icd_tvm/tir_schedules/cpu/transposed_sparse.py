"""Block-sparse matmul on transposed activations: vectors along the rows of X.

The V-row kernel keeps one vector of columns per row of X, so that every multiply-add needs a
broadcast of X of its own: it waits for loads. Here vectors run along the rows of X, in the frame of
:mod:`icd_tvm.tir_schedules.cpu.panel_builder`: a step loads two vectors of one column of X and
multiplies them by eight weights. A group of columns may be as narrow as eight and reads exactly
the rows of W it needs. X and Y keep their layout: both transposes together cost 2 to 4 % of a
half-dense matmul of an encoder.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm._tvm import ScheduleRule, s_tir
from icd_tvm.errors import TransformError
from icd_tvm.tir_schedules.cpu.block_sparse import group_rows
from icd_tvm.tir_schedules.cpu.dense import matrix_shape
from icd_tvm.tir_schedules.cpu.elementwise import inline_spatial
from icd_tvm.tir_schedules.cpu.panel_builder import (
    KERNEL,
    PanelBuilder,
    VColShape,
    block_columns,
)
from icd_tvm.tir_schedules.cpu.prefetch import prefetch_next_output
from icd_tvm.tir_schedules.cpu.tile import (
    Lead,
    annotated_tile,
    find_tiled_block,
    fuse_epilogue,
    is_prim_func,
    row_pieces,
)
from icd_tvm.tir_schedules.target import host_target, target_threads, vector_bits


def vcol_matmul(
    m: int, k: int, n: int, nk: int, v: int = 8, *, lead: Lead = (), target: Any = None
) -> Any:
    """Return the TIR function of ``Y[i, j] = sum_t X[i, idx[j//v, t]] * data[j//v, t, j%v]``.

    The sum runs over ``t < counts[j//v]``: every group has a number of rows of its own.

    Parameters
    ----------
    m, k, n : int
        Rows of X, columns of X, columns of Y.
    nk : int
        Rows of W for which ``idx`` and ``data`` have space.
    v : int, optional
        Columns of W per group: 8 or a multiple (4 where vectors are short), or 1: each column
        has a row list of its own, which is the CSR form of the transposed weight.
    lead : tuple of int, optional
        Leading batch axes of X and Y.
    target : tvm.target.Target, optional
        Gives the width of the vectors; this machine if omitted.

    Returns
    -------
    PrimFunc
        ``(X: f32[*lead, m, k], counts: i32[G], idx: i32[G, nk], data: f32[G, nk, v],
        Y: f32[*lead, m, n])`` with G from `pack_vcol`, marked so that FuseOps fuses an epilogue
        into it.

    Raises
    ------
    TransformError
        If a vector of columns is not made of whole groups or a group of whole vectors, or
        ``nk`` is less than one.
    """
    lanes = vector_bits(target or host_target()) // 32
    shape = VColShape(lead, m, k, n, nk, v, lanes)
    if v % shape.tile or (v % lanes and lanes % v):
        raise TransformError(f"groups of {v} columns do not fit vectors of {lanes}", "use v = 8")
    if nk < 1:
        raise TransformError(f"kept rows nk = {nk} must be at least 1", "pack the weight first")
    return PanelBuilder(shape).build()


def pack_vcol(
    weight: npt.NDArray[Any], v: int, lanes: int, space: int = 0
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return the counts, row lists and values of a `vcol_matmul`.

    Parameters
    ----------
    weight : array [K, N] of float32
    v : int
        Columns per group.
    lanes : int
        fp32 values of a vector register of the target.
    space : int, optional
        Least length of the row lists; functions are shared between weights of one length.

    Returns
    -------
    counts : array [G] of int32
        Rows of each group; G groups of v columns fill whole vectors, so the last may be empty.
    idx : array [G, nk] of int32
        Ascending rows, then zeros.
    data : array [G, nk, v] of float32
        Their values, then zeros.
    """
    k, n = matrix_shape(weight)
    columns = -(-n // block_columns(v, lanes)) * block_columns(v, lanes)
    padded = np.zeros((k, columns), np.float32)
    padded[:, :n] = weight
    used = group_rows(padded, v)
    counts = used.sum(axis=1).astype(np.int32)
    nk = max(1, space, int(counts.max(initial=0)))
    idx = np.zeros((counts.size, nk), np.int32)
    data = np.zeros((counts.size, nk, v), np.float32)
    for group, mask in enumerate(used):
        rows = np.flatnonzero(mask)
        idx[group, : rows.size] = rows
        data[group, : rows.size] = padded[rows, group * v : (group + 1) * v]
    return counts, idx, data


class TransposedSparseRule(ScheduleRule):
    """Schedule rule for functions that hold one `vcol_matmul` and its epilogue."""

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        """Return the schedule of ``func``, or None if it holds no such matmul."""
        if not is_prim_func(func):
            return None
        sch = s_tir.Schedule(func)
        acc = find_tiled_block(sch, (KERNEL,))
        if acc is None:
            return None
        (panel,) = sch.get_producers(acc)
        inline_spatial(sch, keep=[acc, panel])
        *tasks, block = sch.get_loops(acc)
        pieces = _pieces(sch, tasks, block, target_threads(target))
        if pieces > 1:
            piece, block = sch.split(block, [pieces, None])
            _parallel(sch, sch.get_loops(panel)[:-1])
        else:
            sch.compute_at(panel, tasks[-1], preserve_unit_loops=True)
        tile = annotated_tile(sch.get(acc))
        consumer = fuse_epilogue(sch, acc, block, tile, target)
        _parallel(sch, [*tasks, piece] if pieces > 1 else tasks)
        return sch if consumer is None else prefetch_next_output(sch, consumer, tile.columns)


def _pieces(sch: Any, tasks: list[Any], block: Any, threads: int) -> int:
    """Return into how many pieces the columns are cut so that every thread has work."""
    count = prod(int(sch.get(loop).extent) for loop in tasks)
    return row_pieces(count, int(sch.get(block).extent), threads)


def _parallel(sch: Any, loops: list[Any]) -> None:
    sch.parallel(sch.fuse(*loops) if len(loops) > 1 else loops[0])
