"""Softmax over the last axis, for what fused attention does not cover."""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import i64, te, tirx
from icd_tvm.tir_schedules.cpu import vector_math
from icd_tvm.tir_schedules.cpu.dense import shape64
from icd_tvm.tir_schedules.cpu.row_reduce import row_lanes, row_reduce, schedule_rows


def softmax(shape: tuple[int, ...], target: Any) -> Any:
    """Return the TIR function of the softmax over the last axis.

    Parameters
    ----------
    shape : tuple of int
        Shape of X, at least two axes.
    target : tvm.target.Target
        Gives the vector width.

    Returns
    -------
    PrimFunc
        ``(X: f32[shape], Y: f32[shape])``, scheduled.
    """
    *lead, d = shape
    rows = shape64(tuple(lead))
    x = te.placeholder(shape64(shape), "float32", name="X")
    lanes = row_lanes(d, target)
    peaks = row_reduce(lambda *r: x[r], rows, d, lanes, "peak", te.max)
    power = te.compute(
        shape64(shape),
        lambda *r: vector_math.exp(x[r] - peaks[-1][(*r[:-1], 0)]),
        name="power",
    )
    sums = row_reduce(lambda *r: power[r], rows, d, lanes, "sum")
    inverse = te.compute(
        (*rows, i64(1)), lambda *r: tirx.FloatImm("float32", 1.0) / sums[-1][r], name="inverse"
    )
    y = te.compute(shape64(shape), lambda *r: power[r] * inverse[(*r[:-1], 0)], name="Y")
    return schedule_rows([*peaks, power, *sums, inverse, y], [x], target)
