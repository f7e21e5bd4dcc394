"""Codes of a tensor by the range that it has at run time, however an exporter wrote them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from icd_tvm._tvm import Call, Op, relax
from icd_tvm.relax_passes.attention_match import need, require
from icd_tvm.relax_passes.relax_graph import Dataflow, is_call, scalar_constant

Array = npt.NDArray[np.float64]
_OPERATORS: dict[str, Callable[..., Any]] = {
    "add": np.add, "subtract": np.subtract, "multiply": np.multiply, "divide": np.divide,
    "minimum": np.minimum, "maximum": np.maximum, "negative": np.negative, "round": np.rint,
    "equal": np.equal, "where": np.where, "astype": lambda x: x,
}  # fmt: skip
# Least and greatest elements: on both sides of 0, on one of them, all 0, and of other sizes.
_LOWEST = np.array([-1.5, 0.25, -3.0, 0.0, -0.01, -700.0])
_HIGHEST = np.array([2.0, 3.0, -1.0, 0.0, 90.0, 1e-3])


class RangeCodes(NamedTuple):
    """uint8 codes of ``source`` by ONNX's DynamicQuantizeLinear, and the scale's variable."""

    source: Any
    scale: Any


def range_codes(flow: Dataflow, codes: Any, zero: Any) -> RangeCodes:
    """Return what dynamic codes were made of.

    Scale and zero point are known by their values at some ranges, so that any spelling is one.

    Parameters
    ----------
    flow : Dataflow
    codes : relax.Expr
        uint8.
    zero : relax.Expr
        Their zero point, of any type.

    Raises
    ------
    Refused
        If they are other codes.
    """
    why = "the codes of its input are not made as DynamicQuantizeLinear makes them"
    bounded = need(flow.call(codes, "relax.astype"), why)
    shifted = need(flow.call(_unbounded(flow, bounded.args[0]), "relax.add"), why)
    rounded = need(flow.call(shifted.args[0], "relax.round"), why)
    divided = need(flow.call(rounded.args[0], "relax.divide"), why)
    source, scale = divided.args
    point = _uncast(flow, shifted.args[1])
    require(zero is not None and point.same_as(_uncast(flow, zero)), why)
    low, high = np.minimum(_LOWEST, 0), np.maximum(_HIGHEST, 0)
    step = (high - low) / 255
    step = np.where(step == 0, 1, step)
    given = {"relax.min": _LOWEST, "relax.max": _HIGHEST}
    found = (_value(flow, one, source, given) for one in (scale, point))
    for one, expected in zip(found, (step, np.rint(-low / step)), strict=True):
        require(one is not None and np.allclose(one, expected, rtol=1e-6), why)
    return RangeCodes(source, scale)


def _unbounded(flow: Dataflow, expr: Any) -> Any:
    """Return what was bounded to the codes of uint8; the expression itself if nothing was."""
    inner, bounds = expr, set()
    for op in ("relax.maximum", "relax.minimum") * 2:
        call = flow.call(inner, op)
        if call is not None and scalar_constant(call.args[1]) is not None:
            bounds.add((op, scalar_constant(call.args[1])))
            inner = call.args[0]
    return inner if bounds == {("relax.maximum", 0.0), ("relax.minimum", 255.0)} else expr


def _uncast(flow: Dataflow, expr: Any) -> Any:
    """Return the variable behind casts and other names."""
    while isinstance(expr, relax.Var) and expr in flow.values:
        value = flow.values[expr]
        if is_call(value, "relax.astype"):
            expr = value.args[0]
        elif isinstance(value, relax.Var):
            expr = value
        else:
            break
    return expr


def _value(flow: Dataflow, expr: Any, source: Any, given: Mapping[str, Array]) -> Array | None:
    """Return a scalar expression of the range of ``source`` at some ranges, or None."""
    constant = scalar_constant(flow.resolve(expr))
    if constant is not None:
        return np.asarray(constant)
    call = flow.resolve(expr)
    if not isinstance(call, Call) or not isinstance(call.op, Op):
        return None
    name = str(call.op.name)
    if name in given:
        whole = call.attrs.axis is None and call.args[0].same_as(source)
        return given[name] if whole else None
    function = _OPERATORS.get(name.removeprefix("relax."))
    arguments = [_value(flow, arg, source, given) for arg in call.args]
    if function is None or any(one is None for one in arguments):
        return None
    with np.errstate(all="ignore"):
        return np.asarray(function(*arguments), np.float64)
