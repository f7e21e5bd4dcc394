"""Walk a Relax function once and let the rules tie its axes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from icd_tvm._tvm import Call, GenericConst, Op, Var, relax
from icd_tvm.errors import TransformError
from icd_tvm.relax_passes.axis_rules.dims import Dim, DimTable
from icd_tvm.relax_passes.axis_rules.site import (
    RULES,
    Site,
    Tensor,
    Unsupported,
    Value,
    fresh_value,
    value_axes,
)
from icd_tvm.relax_passes.zero_ranges import ranges_with_zero


class Use(NamedTuple):
    """One appearance of a constant.

    ``var`` is the binding that reads it and ``path`` its place among the arguments (one
    number, two inside a tuple). ``points_to`` is the axis that its values index.
    """

    const: GenericConst
    var: Var
    path: tuple[int, ...]
    axes: tuple[Dim, ...]
    points_to: Dim | None


class Step(NamedTuple):
    """One binding: its op, its result, and what it read.

    ``operands`` are the expressions behind ``args``; ``order`` is a transpose's axis order.
    """

    var: Var
    op: str
    out: Value
    args: list[Value]
    uses: list[Use]
    operands: tuple[Any, ...]
    order: tuple[int, ...]


@dataclass
class Trace:
    """Everything the walk saw, in program order."""

    dims: DimTable = field(default_factory=DimTable)
    params: list[tuple[Var, Literal["value", "param"], Value]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    env: dict[Var, Value] = field(default_factory=dict)
    with_zero: set[Var] = field(default_factory=set)


def trace(func: Any, opaque_states: Sequence[tuple[str, str]], keep_outputs: bool) -> Trace:
    """Tie the axes of every value of a function.

    Parameters
    ----------
    func : relax.Function
    opaque_states : sequence of (input name, output name)
        Their axes are tied to each other instead of pinned.
    keep_outputs : bool
        False leaves the outputs unpinned.
    """
    found = Trace(with_zero=ranges_with_zero(func))
    states = state_places(func, opaque_states)
    _enter_params(found, func, {name for name, _ in states})
    for block in func.body.blocks:
        for binding in block.bindings:
            _step(found, binding)
    _leave(found, func, states, keep_outputs)
    return found


def output_names(func: Any) -> list[list[str]]:
    """Return the names that each output answers to.

    A single output is named after the returned variable. Tuple outputs are named after their
    own variables, after the parts of the tuple's name when it joins them with ``/``, and
    after their number (``"0"``).
    """
    body = func.body.body
    value = _definition(func, body)
    if not isinstance(value, relax.Tuple):
        return [[body.name, "0"] if isinstance(body, Var) else ["0"]]
    names = [[item.name] if isinstance(item, Var) else [] for item in value.fields]
    joined = body.name.split("/") if isinstance(body, Var) else []
    for i, own in enumerate(names):
        own.extend(joined[i : i + 1] if len(joined) == len(names) else [])
        own.append(str(i))
    return names


def _definition(func: Any, expr: Any) -> Any:
    """Follow aliases of a returned variable back to what defines it."""
    values = {b.var: b.value for block in func.body.blocks for b in block.bindings}
    while isinstance(expr, Var) and isinstance(values.get(expr), Var | relax.Tuple):
        expr = values[expr]
    return expr


def state_places(func: Any, states: Sequence[tuple[str, str]]) -> list[tuple[str, int]]:
    """Return the parameter's name and the number of the output of every state.

    Raises
    ------
    TransformError
        If a state names no input or output.
    """
    inputs = [[param.name] for param in func.params]
    outputs = output_names(func) if states else []
    return [
        (func.params[_place(inputs, source, "input")].name, _place(outputs, target, "output"))
        for source, target in states
    ]


def _place(names: Sequence[Sequence[str]], wanted: str, what: str) -> int:
    """Find a name, also in the spelling that the ONNX importer gives it (``a.b`` -> ``a_b``)."""
    for spelled in (wanted, re.sub(r"\W", "_", wanted)):
        for i, own in enumerate(names):
            if spelled in own:
                return i
    known = ", ".join(own[0] for own in names)
    raise TransformError(f"no {what} named {wanted!r}", f"{what}s: {known}")


def _enter_params(found: Trace, func: Any, states: set[str]) -> None:
    attrs = func.attrs or {}
    inputs = int(attrs["num_input"]) if "num_input" in attrs else len(func.params)
    for i, param in enumerate(func.params):
        found.dims.op, found.dims.node = "input", param.name
        value = found.env[param] = fresh_value(found.dims, param.ty)
        found.params.append((param, "value" if i < inputs else "param", value))
        if i < inputs and param.name not in states:
            _pin_value(found.dims, value, f"graph input {param.name}")


def _pin_value(dims: DimTable, value: Value, what: str) -> None:
    if isinstance(value, Tensor):
        for i, axis in enumerate(value.axes):
            dims.pin(axis, f"{what} axis {i}")
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            _pin_value(dims, item, f"{what}[{i}]")


def _leave(found: Trace, func: Any, states: Sequence[tuple[str, int]], keep_outputs: bool) -> None:
    uses: list[Use] = []
    value = _read(found, func.body.body, None, (), uses)
    outputs = list(value) if isinstance(value, tuple) else [value]
    names = output_names(func)
    tied = {place: source for source, place in states}
    params = {param.name: own for param, _, own in found.params}
    for place, item in enumerate(outputs):
        found.dims.op, found.dims.node = "output", names[place][0]
        if place in tied:
            _tie_state(found.dims, params[tied[place]], item)
        elif keep_outputs:
            _pin_value(found.dims, item, f"graph output {_output_label(func, place)}")


def _output_label(func: Any, place: int) -> str:
    names = output_names(func)[place]
    return names[-2] if len(names) > 1 else names[0]


def _tie_state(dims: DimTable, source: Value, target: Value) -> None:
    if not isinstance(source, Tensor) or not isinstance(target, Tensor):
        raise TransformError(f"state {dims.node!r} is no tensor of known rank")
    if [axis.size for axis in source.axes] != [axis.size for axis in target.axes]:
        raise TransformError(f"state {dims.node!r} changes its shape between input and output")
    for own, fed in zip(source.axes, target.axes, strict=True):
        dims.tie(own, fed)


def _step(found: Trace, binding: Any) -> None:
    var, value = binding.var, binding.value
    op = _op_name(value)
    found.dims.op, found.dims.node = op, var.name
    uses: list[Use] = []
    if isinstance(value, Call):
        args = [_read(found, arg, var, (i,), uses) for i, arg in enumerate(value.args)]
        out = fresh_value(found.dims, var.ty)
        site = Site(found.dims, value, args, out, with_zero=var in found.with_zero)
        _apply(site)
        uses = [_with_index(use, site) for use in uses]
    else:
        out = _read(found, value, var, (), uses)
        args = [out]
    found.env[var] = out
    operands = tuple(value.args) if isinstance(value, Call) else (value,)
    order = _order(value) if op == "relax.permute_dims" else ()
    found.steps.append(Step(var, op, out, args, uses, operands, order))


def _order(call: Any) -> tuple[int, ...]:
    rank = len(call.ty.shape.values)
    axes = call.attrs.axes
    return tuple(range(rank))[::-1] if axes is None else tuple(int(i) % rank for i in axes)


def _with_index(use: Use, site: Site) -> Use:
    if len(use.path) != 1 or use.path[0] not in site.indexed:
        return use
    return use._replace(points_to=site.indexed[use.path[0]])


def _op_name(value: Any) -> str:
    if isinstance(value, Call):
        return str(value.op.name) if isinstance(value.op, Op) else "call"
    return type(value).__name__


def _apply(site: Site) -> None:
    name = _op_name(site.call)
    rule = RULES.get(name)
    if rule is None:
        site.pin_all("no rule for this op")
        return
    try:
        rule(site)
    except Unsupported as reason:
        site.pin_all(str(reason))


def _read(
    found: Trace, expr: Any, var: Var | None, path: tuple[int, ...], uses: list[Use]
) -> Value:
    """Return the axes of an operand, recording constants; what is unknown pins its inputs."""
    if isinstance(expr, Var):
        return found.env.get(expr)
    if isinstance(expr, GenericConst):
        value = fresh_value(found.dims, expr.ty, expr)
        if var is not None and isinstance(value, Tensor):
            uses.append(Use(expr, var, path, value.axes, None))
        return value
    if isinstance(expr, relax.Tuple):
        items = enumerate(expr.fields)
        return tuple(_read(found, item, var, (*path, i), uses) for i, item in items)
    if isinstance(expr, relax.TupleGetItem):
        whole = _read(found, expr.tuple_value, None, (), uses)
        return whole[int(expr.index)] if isinstance(whole, tuple) else _opaque(found, expr)
    if isinstance(expr, relax.ShapeExpr) or not isinstance(expr, relax.Expr):
        return None
    return _opaque(found, expr)


def _opaque(found: Trace, expr: Any) -> Value:
    """Pin the result of an expression and every variable it reads."""
    result = fresh_value(found.dims, expr.ty)
    reason = f"inside {type(expr).__name__}"
    for value in (result, *(found.env.get(var) for var in relax.analysis.free_vars(expr))):
        for axis in value_axes(value):
            found.dims.pin(axis, reason)
    return result
