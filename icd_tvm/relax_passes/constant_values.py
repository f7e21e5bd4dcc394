"""Values of expressions that depend on constants only, such as dequantised weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icd_tvm._tvm import Call, GenericConst, Op, Var

Array = NDArray[Any]


class ConstantValues:
    """Evaluates in numpy what a function computes from its constants alone.

    Parameters
    ----------
    func : relax.Function
        Its weights may reach a matmul through casts, transposes and dequantisation.
    """

    def __init__(self, func: Any) -> None:
        self._values: dict[Any, Any] = {}
        for block in func.body.blocks:
            for binding in block.bindings:
                value = getattr(binding, "value", None)
                if self._follows(value):
                    self._values[binding.var] = value

    def __contains__(self, expr: Any) -> bool:
        """Whether an expression has a value that is known now."""
        return isinstance(expr, GenericConst) or expr in self._values

    def array(self, expr: Any) -> Array | None:
        """Return the value of a constant or a variable, None if it depends on an input."""
        if isinstance(expr, GenericConst):
            return np.asarray(expr.value.numpy())
        if not isinstance(expr, Var) or expr not in self._values:
            return None
        value = self._values[expr]
        if not isinstance(value, Call):
            return self.array(value)
        operands = [self.array(arg) for arg in value.args]
        return _EVALUATE[value.op.name](value, operands)

    def _follows(self, value: Any) -> bool:
        if isinstance(value, GenericConst | Var):
            return value in self
        if not isinstance(value, Call) or not isinstance(value.op, Op):
            return False
        tensors = value.args[:1] if value.op.name == "relax.reshape" else value.args
        return value.op.name in _EVALUATE and all(arg in self for arg in tensors)


def _reshaped(call: Call, operands: list[Any]) -> Array:
    return np.reshape(operands[0], [int(size) for size in call.ty.shape.values])


def _transposed(call: Call, operands: list[Any]) -> Array:
    axes = call.attrs.axes
    return np.transpose(operands[0], None if axes is None else [int(axis) for axis in axes])


def _taken(call: Call, operands: list[Any]) -> Array:
    axis = call.attrs.axis
    axis = None if axis is None else int(axis)
    if str(call.attrs.mode) == "wrap":
        return np.take(operands[0], operands[1], axis=axis, mode="wrap")
    return np.take(operands[0], operands[1], axis=axis, mode="clip")


def _dequantised(call: Call, operands: list[Any]) -> Array:
    data, *parameters = operands
    shape = [1] * data.ndim
    shape[int(call.attrs.axis)] = -1
    scale, zero = (p.reshape(shape) if p.ndim else p for p in parameters)
    wide = data.astype(np.float32) - zero.astype(np.float32)
    return (wide * scale).astype(str(call.ty.dtype.dtype))


def _elementwise(function: Callable[..., Any]) -> Callable[[Call, list[Any]], Array]:
    return lambda call, operands: np.asarray(function(*operands))


_EVALUATE: dict[str, Callable[[Call, list[Any]], Array]] = {
    "relax.add": _elementwise(np.add),
    "relax.astype": lambda call, operands: operands[0].astype(str(call.ty.dtype.dtype)),
    "relax.dequantize": _dequantised,
    "relax.divide": _elementwise(np.divide),
    "relax.expand_dims": _reshaped,
    "relax.multiply": _elementwise(np.multiply),
    "relax.permute_dims": _transposed,
    "relax.reshape": _reshaped,
    "relax.squeeze": _reshaped,
    "relax.subtract": _elementwise(np.subtract),
    "relax.take": _taken,
}
