"""Layer norm over the last axis, with an optional residual added first."""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import i64, te, tirx
from icd_tvm.tir_schedules.cpu.dense import shape64
from icd_tvm.tir_schedules.cpu.row_reduce import row_lanes, row_reduce, schedule_rows


def layer_norm(shape: tuple[int, ...], eps: float, target: Any, *, residual: bool = False) -> Any:
    """Return the TIR function of ``(h - mean(h)) / sqrt(var(h) + eps) * gamma + beta``.

    ``h`` is X, or X + R with a residual. The variance is the mean of squared differences, a
    second pass over a row that is still in L1, so no cancellation occurs.

    Parameters
    ----------
    shape : tuple of int
        Shape of X, at least two axes; the norm runs over the last.
    eps : float
        Added to the variance.
    target : tvm.target.Target
        Gives the vector width.
    residual : bool, optional
        Whether a second input is added to the first.

    Returns
    -------
    PrimFunc
        ``(X: f32[shape], [R: f32[shape],] gamma: f32[d], beta: f32[d], Y: f32[shape])``,
        scheduled.
    """
    *lead, d = shape
    rows = shape64(tuple(lead))
    inputs = [te.placeholder(shape64(shape), "float32", name=n) for n in ("X", "R")[: 1 + residual]]
    affine = [te.placeholder((i64(d),), "float32", name=name) for name in ("gamma", "beta")]
    lanes = row_lanes(d, target)
    scale = tirx.FloatImm("float32", 1.0 / d)

    # Adding the residual again in each pass is cheaper than a buffer for the row.
    def total(*r: Any) -> Any:
        return inputs[0][r] + inputs[1][r] if residual else inputs[0][r]

    sums = row_reduce(total, rows, d, lanes, "sum")
    mean = te.compute((*rows, i64(1)), lambda *r: sums[-1][r] * scale, name="mean")

    def centred(*r: Any) -> Any:
        return total(*r) - mean[(*r[:-1], 0)]

    squares = row_reduce(lambda *r: centred(*r) * centred(*r), rows, d, lanes, "square")
    inverse = te.compute(
        (*rows, i64(1)),
        lambda *r: te.rsqrt(squares[-1][r] * scale + tirx.FloatImm("float32", eps)),
        name="inverse",
    )
    y = te.compute(
        shape64(shape),
        lambda *r: centred(*r) * inverse[(*r[:-1], 0)] * affine[0][r[-1]] + affine[1][r[-1]],
        name="Y",
    )
    return schedule_rows([*sums, mean, *squares, inverse, y], [*inputs, *affine], target)
