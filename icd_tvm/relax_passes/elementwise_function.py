"""Which function of one tensor a group of elementwise operators computes, however it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

from icd_tvm._tvm import Call, Op, relax
from icd_tvm.relax_passes.relax_graph import Dataflow, scalar_constant, static_shape

Array = npt.NDArray[np.float64]

_OPERATORS: dict[str, Callable[..., Any]] = {
    "abs": np.abs, "add": np.add, "divide": np.divide, "equal": np.equal, "erf": special.erf,
    "exp": np.exp, "greater": np.greater, "less": np.less, "log": np.log,
    "maximum": np.maximum, "minimum": np.minimum, "multiply": np.multiply,
    "negative": np.negative, "power": np.power, "sigmoid": special.expit, "sqrt": np.sqrt,
    "subtract": np.subtract, "tanh": np.tanh, "where": np.where,
    "nn.relu": lambda x: np.maximum(x, 0.0), "nn.silu": lambda x: x * special.expit(x),
    "nn.gelu": lambda x: 0.5 * x * (1.0 + special.erf(x / np.sqrt(2.0))),
    "nn.gelu_tanh": lambda x: 0.5 * x * (1.0 + np.tanh(
        np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3))),
}  # fmt: skip
# Both halves of each function, its bend, and where exponentials leave float32.
_POINTS = np.concatenate(
    [np.linspace(-12.0, 12.0, 241) + 1e-3, [-1e4, -300.0, -90.0, -20.5, 20.5, 90.0, 300.0, 1e4]]
)
FUNCTIONS: dict[str, Array] = {
    "gelu": _OPERATORS["nn.gelu"](_POINTS),
    "relu": np.maximum(_POINTS, 0.0),
    "silu": _OPERATORS["nn.silu"](_POINTS),
    "softplus": np.logaddexp(0.0, _POINTS),
}


def function_after(flow: Dataflow, var: Any, names: tuple[str, ...]) -> tuple[str, Any] | None:
    """Return the function that everything which reads ``var`` computes of it, and its result.

    A group of operators is known by its values at points, so that any spelling of GELU is GELU and
    its approximation by tanh is not.

    Parameters
    ----------
    flow : Dataflow
    var : relax.Var
    names : tuple of str
        Keys of `FUNCTIONS` to look for.

    Returns
    -------
    (str, relax.Var) or None
        None too where something else reads a value inside the group.
    """
    group = _group(flow, var)
    for result in list(group)[1:]:
        needed = _needed(flow, result, set(group))
        inside = needed - {result}
        if any(not _within(flow.users.get(one, []), needed) for one in inside):
            continue
        found = _named(group[result], names)
        if found:
            return found, result
    return None


def function_of(flow: Dataflow, result: Any, source: Any, names: tuple[str, ...]) -> str:
    """Return which of ``names`` ``result`` is of ``source``; empty if none."""
    values = _group(flow, source).get(result)
    return "" if values is None else _named(values, names)


def _group(flow: Dataflow, var: Any) -> dict[Any, Array]:
    """Return ``var`` and what elementwise operators make of it alone, with values at the points."""
    found: dict[Any, Array] = {var: _POINTS}
    todo = list(flow.users.get(var, []))
    shape = static_shape(var)
    while todo:
        user = todo.pop(0)
        if user is None or user in found or static_shape(user) != shape:
            continue
        values = _evaluated(flow.values.get(user), found)
        if values is not None:
            found[user] = values
            todo += flow.users.get(user, [])
    return found


def _evaluated(value: Any, known: Mapping[Any, Array]) -> Array | None:
    if not isinstance(value, Call) or not isinstance(value.op, Op):
        return None
    function = _OPERATORS.get(str(value.op.name).removeprefix("relax."))
    if function is None:
        return None
    arguments: list[Any] = []
    for arg in value.args:
        number = known.get(arg) if isinstance(arg, relax.Var) else scalar_constant(arg)
        if number is None:
            return None
        arguments.append(number)
    with np.errstate(all="ignore"):
        return np.asarray(function(*arguments), np.float64)


def _needed(flow: Dataflow, result: Any, group: set[Any]) -> set[Any]:
    found, todo = set(), [result]
    while todo:
        one = todo.pop()
        if one in group and one not in found:
            found.add(one)
            todo += [arg for arg in getattr(flow.values.get(one), "args", []) if arg in group]
    return found


def _within(users: list[Any], needed: set[Any]) -> bool:
    return all(user is not None and user in needed for user in users)


def _named(values: Array, names: tuple[str, ...]) -> str:
    for name in names:
        if np.allclose(values, FUNCTIONS[name], rtol=2e-6, atol=2e-7):
            return name
    return ""
