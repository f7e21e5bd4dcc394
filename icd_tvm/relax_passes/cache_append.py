"""How a decoder step appends to a cache: ``where(slot == length, row, past)``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from icd_tvm._tvm import relax
from icd_tvm.relax_passes.attention_match import Refused, need, require
from icd_tvm.relax_passes.axis_rules.trace import state_places
from icd_tvm.relax_passes.relax_graph import (
    Dataflow,
    constant_array,
    is_call,
    operands,
    static_shape,
)

_RANK = 4
_SLOTS = -2
_RESHAPES = ("relax.reshape", "relax.expand_dims", "relax.squeeze")


@dataclass(frozen=True)
class CacheAppend:
    """One state, and the binding that makes the new state out of it.

    Attributes
    ----------
    past : relax.Var
        The state as it comes in, [batch, heads, slots, channels]; read by the append alone.
    row : relax.Expr
        The new token's row, [batch, heads, 1, channels].
    mark : relax.Expr
        True at the new token's slot.
    length : relax.Var
        Integer input of one element: the slot that is written.
    result : relax.Var
        The state as it goes out.
    output : int
        Number of the output that returns it.
    """

    past: Any
    row: Any
    mark: Any
    length: Any
    result: Any
    output: int


def find_appends(
    func: Any, states: Sequence[tuple[str, str]]
) -> tuple[dict[str, CacheAppend], dict[str, str]]:
    """Find the states that a step only appends a row to.

    Parameters
    ----------
    func : relax.Function
    states : sequence of (input name, output name)

    Returns
    -------
    found : dict of str to CacheAppend
        By the name of the input.
    refusals : dict of str to str
        Every other state, and why.

    Raises
    ------
    TransformError
        A state names no input or output.
    """
    flow, found, refusals = Dataflow(func), {}, {}
    params = {param.name: param for param in func.params}
    returned = _returned(flow, func.body.body)
    for name, place in state_places(func, states):
        try:
            found[name] = _match(flow, params[name], params, returned[place], place)
        except Refused as refusal:
            refusals[name] = str(refusal)
    return found, refusals


def _returned(flow: Dataflow, body: Any) -> list[Any]:
    value = flow.resolve(body)
    fields = list(value.fields) if isinstance(value, relax.Tuple) else [body]
    return [_unaliased(flow, field) for field in fields]


def _unaliased(flow: Dataflow, expr: Any) -> Any:
    while isinstance(flow.values.get(expr), relax.Var):
        expr = flow.values[expr]
    return expr


def _match(
    flow: Dataflow, past: Any, params: dict[str, Any], returned: Any, place: int
) -> CacheAppend:
    result = need(flow.only_user(past), "it is not read exactly once")
    where = need(flow.call(result, "relax.where"), "it is not read by a where")
    require(result.same_as(returned), "the where that reads it is not what is returned")
    mark, row, kept = where.args
    shape = need(static_shape(past), "its shape is not static")
    require(len(shape) == _RANK and kept.same_as(past), "it is not what the where keeps")
    one = (*shape[:_SLOTS], 1, shape[-1])
    require(static_shape(row) == one, f"the new row has shape {static_shape(row)}, not {one}")
    require(static_shape(result) == shape, "the where widens it")
    length = _length(flow, mark, shape[_SLOTS])
    require(params.get(str(length.name)) is not None, "its slot is computed, not an input")
    return CacheAppend(past, row, mark, length, result, place)


def _length(flow: Dataflow, mark: Any, slots: int) -> Any:
    shape = static_shape(mark) or ()
    column = len(shape) >= -_SLOTS and shape[_SLOTS] == slots == int(np.prod(shape))
    require(column, f"the mark has shape {shape}, not one value a slot")
    equal = flow.call(_through_reshapes(flow, mark), "relax.equal")
    require(equal is not None, "the mark is no comparison with a slot number")
    length, numbers = operands(equal)
    array = need(constant_array(numbers), "no constant slot numbers are compared")
    numbered = array.size == slots and bool((array.ravel() == np.arange(slots)).all())
    require(numbered, "the slots are not numbered 0, 1, 2 ...")
    length = _through_reshapes(flow, length)
    require(set(static_shape(length) or (0,)) <= {1}, "the length has several elements")
    require(str(length.ty.dtype) in ("int64", "int32"), "the length is no integer")
    return length


def _through_reshapes(flow: Dataflow, expr: Any) -> Any:
    while True:
        expr = _unaliased(flow, expr)
        value: Any = flow.values.get(expr)
        if not any(is_call(value, op) for op in _RESHAPES):
            return expr
        expr = value.args[0]
