"""Find the hidden units of an axis group that contribute nothing to the result.

A unit is dead if every matmul that consumes it meets a zero: a zero row of the weight, or an
activation that is zero for every input. Zero activations are followed from the producing
weights through bias and activation function, so a model whose exporter pruned only one side of
a layer is recognised as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from icd_tvm._tvm import Call, GenericConst, Op, Var

_ZERO_TO_ZERO = {
    "relax.abs",
    "relax.erf",
    "relax.negative",
    "relax.nn.gelu",
    "relax.nn.gelu_tanh",
    "relax.nn.leakyrelu",
    "relax.nn.relu",
    "relax.nn.silu",
    "relax.sin",
    "relax.sqrt",
    "relax.tan",
    "relax.tanh",
}
_ZERO_IF_BOTH = {"relax.add", "relax.subtract", "relax.maximum", "relax.minimum"}


def dead_units(func: Any, size: int, axes: Mapping[Any, int]) -> np.ndarray:
    """Return which indices of a hidden axis cannot influence the function.

    Parameters
    ----------
    func : relax.Function
        The function that holds the group.
    size : int
        Length of the axis.
    axes : Mapping[Var, int]
        Every value of the group and the axis that belongs to it; only last axes are followed.

    Returns
    -------
    numpy.ndarray
        bool [size]; all False if a consumer is anything but a matmul with a constant weight.
    """
    zero: dict[Any, np.ndarray] = {}
    dead = np.ones(size, dtype=bool)
    consumed = False
    for binding in _bindings(func):
        var, value = binding.var, binding.value
        if var in axes:
            zero[var] = _zero_units(value, size, zero) if _is_last(var, axes) else _none(size)
        elif any(argument in axes for argument in _vars(value)):
            consumed = True
            dead &= _dead_at(value, size, zero)
    return dead if consumed else _none(size)


def _zero_units(value: Any, size: int, zero: Mapping[Any, np.ndarray]) -> np.ndarray:
    if isinstance(value, Var):
        return zero.get(value, _none(size))
    name = _op_name(value)
    if name == "relax.matmul":
        return _zero_columns(value.args[1], size)
    if name in _ZERO_TO_ZERO:
        return _zero_operand(value.args[0], size, zero)
    if name in _ZERO_IF_BOTH:
        left, right = (_zero_operand(a, size, zero) for a in value.args)
        return left & right
    if name == "relax.multiply":
        left, right = (_zero_operand(a, size, zero) for a in value.args)
        return left | right
    if name == "relax.divide":
        return _zero_operand(value.args[0], size, zero)
    return _none(size)


def _zero_operand(operand: Any, size: int, zero: Mapping[Any, np.ndarray]) -> np.ndarray:
    if not isinstance(operand, GenericConst):
        return zero.get(operand, _none(size))
    array = operand.value.numpy()
    if array.ndim == 0 or array.shape[-1] == 1:
        return np.full(size, not array.any())
    flat = array.reshape(-1, array.shape[-1])
    return ~flat.any(axis=0) if flat.shape[1] == size else _none(size)


def _zero_columns(weight: Any, size: int) -> np.ndarray:
    if not isinstance(weight, GenericConst):
        return _none(size)
    array = weight.value.numpy()
    return ~array.reshape(-1, array.shape[-1]).any(axis=0)


def _dead_at(value: Any, size: int, zero: Mapping[Any, np.ndarray]) -> np.ndarray:
    if _op_name(value) != "relax.matmul" or not isinstance(value.args[1], GenericConst):
        return _none(size)
    weight = value.args[1].value.numpy()
    if weight.ndim != 2 or weight.shape[0] != size:
        return _none(size)
    return ~weight.any(axis=1) | zero.get(value.args[0], _none(size))


def _op_name(value: Any) -> str:
    return value.op.name if isinstance(value, Call) and isinstance(value.op, Op) else ""


def _bindings(func: Any) -> list[Any]:
    return [b for block in func.body.blocks for b in block.bindings if hasattr(b, "value")]


def _vars(value: Any) -> list[Any]:
    if isinstance(value, Var):
        return [value]
    arguments = list(value.args) if isinstance(value, Call) else list(getattr(value, "fields", ()))
    return [v for argument in arguments for v in _vars(argument)]


def _is_last(var: Any, axes: Mapping[Any, int]) -> bool:
    return axes[var] in (-1, len(var.ty.shape.values) - 1)


def _none(size: int) -> np.ndarray:
    return np.zeros(size, dtype=bool)
