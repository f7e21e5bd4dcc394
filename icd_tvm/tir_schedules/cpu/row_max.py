"""The largest value of every row, for the range of a dynamic quantisation."""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import te
from icd_tvm.tir_schedules.cpu.dense import shape64
from icd_tvm.tir_schedules.cpu.row_reduce import row_lanes, row_reduce, schedule_rows


def row_max(shape: tuple[int, ...], target: Any, *, negate: bool = False) -> Any:
    """Return the TIR function of the largest value along the last axis.

    Parameters
    ----------
    shape : tuple of int
        Shape of X, at least two axes.
    target : tvm.target.Target
        Gives the vector width.
    negate : bool, optional
        Take the largest of ``-X``: the negative of the least value.

    Returns
    -------
    PrimFunc
        ``(X: f32[shape], Y: f32[*shape[:-1], 1])``, scheduled.
    """
    *lead, length = shape
    x = te.placeholder(shape64(shape), "float32", name="X")
    stages = row_reduce(
        lambda *r: -x[r] if negate else x[r],
        shape64(tuple(lead)),
        length,
        row_lanes(length, target),
        "peak",
        te.max,
    )
    return schedule_rows(stages, [x], target)
