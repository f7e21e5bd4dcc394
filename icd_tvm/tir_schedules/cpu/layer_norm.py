"""Layer norm over the last axis, with an optional residual before and codes of the result."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from icd_tvm._tvm import i64, te, tirx
from icd_tvm.tir_schedules.cpu import vector_math
from icd_tvm.tir_schedules.cpu.dense import shape64
from icd_tvm.tir_schedules.cpu.row_reduce import row_lanes, row_reduce, schedule_rows

_FORM_ATTR = "icd.layer_norm"


@dataclass(frozen=True)
class NormForm:
    """What a layer norm kernel takes and gives.

    Attributes
    ----------
    eps : float
        Added to the variance.
    residual : bool
        Whether a second input is added to the first.
    codes : bool
        Whether it also writes the result as uint8, by a factor for every column and a zero point.
    """

    eps: float
    residual: bool = False
    codes: bool = False


def norm_form(func: Any) -> NormForm | None:
    """Return the form `layer_norm` was built in, or None for any other function."""
    if func.attrs is None or _FORM_ATTR not in func.attrs:
        return None
    form = func.attrs[_FORM_ATTR]
    return NormForm(float(form["eps"]), bool(form["residual"]), bool(form["codes"]))


def layer_norm(
    shape: tuple[int, ...],
    eps: float,
    target: Any,
    *,
    residual: bool = False,
    codes: bool = False,
) -> Any:
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
    codes : bool, optional
        Whether the result is also written as uint8.

    Returns
    -------
    PrimFunc
        ``(X: f32[shape], [R: f32[shape],] gamma: f32[d], beta: f32[d], Y: f32[shape])``,
        scheduled. With codes ``factor: f32[d]`` (steps per unit) and ``point: f32[1]`` come
        before Y and ``C: u8[shape]``, which is ``round(Y * factor) + point`` saturated, after it.
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
    stages = [*sums, mean, *squares, inverse, y]
    inputs += affine
    more = []
    if codes:
        factor = te.placeholder((i64(d),), "float32", name="factor")
        point = te.placeholder((i64(1),), "float32", name="point")
        inputs += [factor, point]
        more = [te.compute(shape64(shape), lambda *r: _code(y[r], factor[r[-1]], point), name="C")]
    func = schedule_rows(stages, inputs, target, more)
    return func.with_attr(_FORM_ATTR, asdict(NormForm(eps, residual, codes)))


def _code(value: Any, factor: Any, point: Any) -> Any:
    return vector_math.to_code(value * factor, point[0], "uint8")
