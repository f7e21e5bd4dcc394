"""RMS norms however an exporter wrote them."""

from __future__ import annotations

from typing import Any, NamedTuple

from icd_tvm.relax_passes.relax_graph import (
    Dataflow,
    scalar_constant,
    static_shape,
)


class RmsNorm(NamedTuple):
    """``rows / sqrt(mean(rows ** 2) + eps) * gamma`` over the last axis."""

    rows: Any
    gamma: Any
    eps: float


def match_rms_norm(flow: Dataflow, var: Any) -> RmsNorm | None:
    """Return the norm whose result is bound to ``var``, or None.

    Recognised: ``relax.nn.rms_norm``; a division by the root, or a product with its reciprocal;
    squares by a product or a power; ``gamma`` on either side. Nothing else may read the rows
    before they are scaled.

    Parameters
    ----------
    flow : Dataflow
    var : relax.Var
    """
    whole = flow.bound(var, "relax.nn.rms_norm")
    if whole is not None:
        found = RmsNorm(whole.args[0], whole.args[1], float(whole.attrs.epsilon))
        return found if _is_last(found.rows, whole.attrs.axes) and _fits(found) else None
    scaled = flow.bound(var, "relax.multiply")
    if scaled is None:
        return None
    for unit, gamma in (scaled.args, reversed(scaled.args)):
        rows, root = _quotient(flow, unit)
        eps = None if root is None else _eps(flow, root, rows)
        if eps is not None and flow.single_use(unit):
            found = RmsNorm(rows, gamma, eps)
            return found if _fits(found) else None
    return None


def _quotient(flow: Dataflow, unit: Any) -> tuple[Any, Any]:
    """Return rows and what their root is taken of, of a division by it; None if it is none."""
    divided = flow.call(unit, "relax.divide")
    if divided is not None:
        root = flow.call(divided.args[1], "relax.sqrt")
        return divided.args[0], None if root is None else root.args[0]
    times = flow.call(unit, "relax.multiply")
    for rows, inverse in () if times is None else (times.args, reversed(times.args)):
        root = _inverse_root(flow, inverse)
        if root is not None:
            return rows, root
    return None, None


def _inverse_root(flow: Dataflow, inverse: Any) -> Any:
    """Return what ``inverse`` is one over the root of, or None."""
    root = flow.call(inverse, "relax.rsqrt")
    over = flow.call(inverse, "relax.divide")
    if root is None and over is not None and scalar_constant(over.args[0]) == 1.0:
        root = flow.call(over.args[1], "relax.sqrt")
    return None if root is None else root.args[0]


def _eps(flow: Dataflow, total: Any, rows: Any) -> float | None:
    """Return what is added to the mean square of ``rows``, or None for another sum."""
    added = flow.call(total, "relax.add")
    if added is None:
        return None
    for mean, eps in (added.args, reversed(added.args)):
        if scalar_constant(eps) is not None and _is_mean_square(flow, mean, rows):
            return scalar_constant(eps)
    return None


def _is_mean_square(flow: Dataflow, mean: Any, rows: Any) -> bool:
    call = flow.call(mean, "relax.mean")
    if call is None or call.attrs.axis is None or not call.attrs.keepdims:
        return False
    if not _is_last(rows, call.attrs.axis):
        return False
    power = flow.call(call.args[0], "relax.power")
    if power is not None:
        return bool(power.args[0].same_as(rows) and scalar_constant(power.args[1]) == 2.0)
    times = flow.call(call.args[0], "relax.multiply")
    return times is not None and all(bool(arg.same_as(rows)) for arg in times.args)


def _is_last(rows: Any, axes: Any) -> bool:
    rank = len(static_shape(rows) or ())
    return rank > 0 and [int(axis) % rank for axis in axes] == [rank - 1]


def _fits(found: RmsNorm) -> bool:
    """Tell whether ``gamma`` has one number for each column of the rows."""
    return static_shape(found.gamma) == (static_shape(found.rows) or ())[-1:]
