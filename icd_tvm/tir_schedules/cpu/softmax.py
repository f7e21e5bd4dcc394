"""Softmax, for what fused attention does not cover: over rows, and over any axis."""

from __future__ import annotations

from collections.abc import Sequence
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


def softmax_along(x: Any, axis: int, *, log: bool = False) -> Any:
    """Return the TE stage of the softmax over any axis, or of its logarithm.

    Parameters
    ----------
    x : te.Tensor
        float32.
    axis : int
        From 0 on.
    log : bool, optional
        Return the logarithm, which does not underflow where the softmax does.

    Returns
    -------
    te.Tensor
        Of the shape of ``x``.
    """

    def row(at: Sequence[Any], along: Any) -> tuple[Any, ...]:
        return (*at[:axis], along, *at[axis + 1 :])

    def reduced(source: Any, reducer: Any, name: str) -> Any:
        k = te.reduce_axis((i64(0), x.shape[axis]), "k")
        return te.compute(
            row(x.shape, i64(1)), lambda *at: reducer(source[row(at, k)], axis=k), name=name
        )

    peak = reduced(x, te.max, "peak")
    power = te.compute(x.shape, lambda *at: vector_math.exp(x[at] - peak[row(at, 0)]), name="power")
    total = reduced(power, te.sum, "sum")
    if not log:
        return te.compute(x.shape, lambda *at: power[at] / total[row(at, 0)], name="Y")
    return te.compute(
        x.shape, lambda *at: x[at] - peak[row(at, 0)] - vector_math.log(total[row(at, 0)]), name="Y"
    )
