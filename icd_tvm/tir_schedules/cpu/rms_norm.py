"""RMS norm over the last axis."""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import i64, te, tirx
from icd_tvm.tir_schedules.cpu.dense import shape64
from icd_tvm.tir_schedules.cpu.row_reduce import row_lanes, row_reduce, schedule_rows


def rms_norm(shape: tuple[int, ...], eps: float, target: Any) -> Any:
    """Return the TIR function of ``x / sqrt(mean(x ** 2) + eps) * gamma``.

    Parameters
    ----------
    shape : tuple of int
        Shape of X, at least two axes; the norm runs over the last.
    eps : float
        Added to the mean square.
    target : tvm.target.Target
        Gives the vector width.

    Returns
    -------
    PrimFunc
        ``(X: f32[shape], gamma: f32[d], Y: f32[shape])``, scheduled.

    Notes
    -----
    Zhang & Sennrich, "Root mean square layer normalization", 2019.
    """
    *lead, d = shape
    rows, lanes = shape64(tuple(lead)), row_lanes(d, target)
    x = te.placeholder(shape64(shape), "float32", name="X")
    gamma = te.placeholder((i64(d),), "float32", name="gamma")
    scale, small = (tirx.FloatImm("float32", number) for number in (1.0 / d, eps))
    squares = row_reduce(lambda *r: x[r] * x[r], rows, d, lanes, "square")
    inverse = te.compute(
        (*rows, i64(1)), lambda *r: te.rsqrt(squares[-1][r] * scale + small), name="inverse"
    )
    y = te.compute(shape64(shape), lambda *r: x[r] * inverse[(*r[:-1], 0)] * gamma[r[-1]], name="Y")
    return schedule_rows([*squares, inverse, y], [x, gamma], target)
