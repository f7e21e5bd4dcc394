"""Recognise the quantised operands of a matmul in the forms the importers leave them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm._tvm import Call, GenericConst, const_name
from icd_tvm.relax_passes.relax_graph import (
    Dataflow,
    constant_array,
    is_call,
    static_shape,
    swaps_axes,
)

_BYTES = ("int8", "uint8")
_STEPS = tuple(
    f"relax.{op}"
    for op in ("permute_dims", "reshape", "dequantize", "astype", "subtract", "multiply")
)
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Activation:
    """An operand ``(data - zero) * scale``, or ``data - zero`` in integers.

    Attributes
    ----------
    data : relax.Expr
        int8 or uint8 [..., m, k].
    zero, scale : relax.Expr or None
        One element, or one for each row ([..., m, 1]); the zero point may be of any type.
    """

    data: Any
    zero: Any = None
    scale: Any = None


@dataclass(frozen=True)
class Weight:
    """A constant operand ``(values - zero) * scale``, or ``values - zero`` in integers.

    Attributes
    ----------
    values : array [K, N] of int8 or uint8
    zero : array that broadcasts to [K, N]
    scale : array of float32 that broadcasts to [K, N], or None
    name : str
        ONNX name of the values.
    """

    values: Array
    zero: Array
    scale: Array | None
    name: str

    @property
    def per_column(self) -> bool:
        """Whether neither scale nor zero point changes along K."""
        return len(self.zero) == 1 and (self.scale is None or len(self.scale) == 1)

    def signed(self) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int32]]:
        """Return int8 values and the zero points [N] that remain, all zero if that fits."""
        zero = self.zero.astype(np.int32)
        if self.values.dtype == np.uint8 or zero.any():
            shifted = self.values.astype(np.int32) - zero
            if shifted.min() >= -128 and shifted.max() <= 127:
                return shifted.astype(np.int8), np.zeros(self.values.shape[1], np.int32)
        offset = 128 if self.values.dtype == np.uint8 else 0
        values = (self.values.astype(np.int16) - offset).astype(np.int8)
        return values, np.broadcast_to(zero - offset, (1, values.shape[1]))[0].copy()

    def block(self) -> int:
        """Return the longest run of rows that share scales and zero points; it divides K."""
        k, block = len(self.values), len(self.values)
        for table in (self.zero, self.scale):
            if table is not None and len(table) > 1:
                changes = np.flatnonzero((table[1:] != table[:-1]).any(axis=1)) + 1
                block = gcd(block, k, *(int(row) for row in changes))
        return block

    def transposed(self) -> Weight:
        """Return the weight with its axes swapped."""
        scale = None if self.scale is None else self.scale.T
        return replace(self, values=self.values.T, zero=self.zero.T, scale=scale)


def find_weight(flow: Dataflow, expr: Any) -> Weight | None:
    """Return the constant 2-D weight that ``expr`` dequantises or widens, or None.

    Recognised: ``dequantize``; ``astype``, with a subtraction of zero points, with a
    multiplication by scales; a transpose around any of them. Scales and zero points may be
    gathered by block.
    """
    value = flow.resolve(expr)
    if not isinstance(value, Call):
        return None
    if is_call(value, "relax.permute_dims"):
        inner = find_weight(flow, value.args[0])
        return inner.transposed() if inner is not None and swaps_axes(value) else inner
    if is_call(value, "relax.dequantize"):
        return _dequantized(flow, value)
    if is_call(value, "relax.astype"):
        return _bytes(flow, value.args[0])
    return _shifted_or_scaled(flow, value)


def _bytes(flow: Dataflow, expr: Any) -> Weight | None:
    source = flow.resolve(expr)
    values = constant_array(source, dims=2)
    if values is None or str(values.dtype) not in _BYTES or values.size == 0:
        return None
    return Weight(values, np.zeros((1, 1), np.int32), None, const_name(source))


def _dequantized(flow: Dataflow, call: Any) -> Weight | None:
    data, axis = _bytes(flow, call.args[0]), int(call.attrs.axis)
    scale, zero = (evaluate(flow, arg) for arg in call.args[1:3])
    if data is None or scale is None or zero is None or max(scale.ndim, zero.ndim) > 1:
        return None
    if scale.dtype != np.float32 or not is_integer(zero):
        return None
    return replace(data, scale=_along(scale, axis), zero=_along(zero, axis))


def _shifted_or_scaled(flow: Dataflow, call: Any) -> Weight | None:
    shift, scale = is_call(call, "relax.subtract"), is_call(call, "relax.multiply")
    if not (shift or scale):
        return None
    inner, table = find_weight(flow, call.args[0]), evaluate(flow, call.args[1])
    if inner is None or table is None or table.ndim > 2 or inner.scale is not None:
        return None
    table = table.reshape((1,) * (2 - table.ndim) + table.shape)
    if shift:
        return None if inner.zero.any() or not is_integer(table) else replace(inner, zero=table)
    return replace(inner, scale=table) if table.dtype == np.float32 else None


def _along(vector: Array, axis: int) -> Array:
    """Return one element or a vector so that it broadcasts along ``axis`` of a matrix."""
    return vector.reshape((-1, 1) if axis % 2 == 0 else (1, -1))


def reads_bytes(flow: Dataflow, expr: Any) -> bool:
    """Tell whether ``expr`` is computed from a constant of int8 or uint8 by quantised steps."""
    value = flow.resolve(expr)
    while isinstance(value, Call) and any(is_call(value, op) for op in _STEPS):
        value = flow.resolve(value.args[0])
    array = constant_array(value)
    return value is not flow.resolve(expr) and array is not None and str(array.dtype) in _BYTES


def find_activation(flow: Dataflow, expr: Any) -> Activation | None:
    """Return the quantised data behind ``expr``, or None.

    Recognised: ``dequantize`` with one scale; ``astype``, with a subtraction of a zero point,
    with a multiplication by a scale, one for all or one for each row.
    """
    value = flow.resolve(expr)
    if is_call(value, "relax.dequantize"):
        data, scale, zero = value.args
        one = all(_one_or_rows(arg, data) and _count(arg) == 1 for arg in (scale, zero))
        return Activation(data, zero, scale) if one and _is_bytes(data) else None
    if is_call(value, "relax.astype"):
        return Activation(value.args[0]) if _is_bytes(value.args[0]) else None
    shift, scale = is_call(value, "relax.subtract"), is_call(value, "relax.multiply")
    if not (shift or scale):
        return None
    inner, factor = find_activation(flow, value.args[0]), value.args[1]
    if inner is None or inner.scale is not None or not _one_or_rows(factor, inner.data):
        return None
    if scale:
        return replace(inner, scale=factor) if str(factor.ty.dtype) == "float32" else None
    zero = _integer_source(flow, factor)
    return replace(inner, zero=zero) if zero is not None and inner.zero is None else None


def _integer_source(flow: Dataflow, expr: Any) -> Any:
    """Return ``expr`` if it is an integer, or the integer it was cast from, or None."""
    if "int" in str(expr.ty.dtype):
        return expr
    array = evaluate(flow, expr)
    if array is not None:
        return expr if is_integer(array) else None
    cast = flow.call(expr, "relax.astype")
    return _integer_source(flow, cast.args[0]) if cast is not None else None


def _is_bytes(expr: Any) -> bool:
    return static_shape(expr) is not None and str(expr.ty.dtype) in _BYTES


def _count(expr: Any) -> int:
    return int(np.prod(static_shape(expr) or ()))


def _one_or_rows(expr: Any, data: Any) -> bool:
    """Tell whether ``expr`` has one element, or one for each row of ``data``."""
    shape, rows = static_shape(expr), static_shape(data) or ()
    if shape is None:
        return False
    return _count(expr) == 1 or (len(shape) == len(rows) and shape[-1] == 1)


def is_integer(array: Array) -> bool:
    """Tell whether every element is a whole number."""
    return bool(np.all(array == np.rint(array)))


def evaluate(flow: Dataflow, expr: Any) -> Array | None:
    """Return the value of constants that are only cast, reshaped or gathered, or None."""
    value = flow.resolve(expr)
    if isinstance(value, GenericConst):
        return constant_array(value)
    if not isinstance(value, Call) or not value.args:
        return None
    source = evaluate(flow, value.args[0])
    if source is None:
        return None
    if is_call(value, "relax.astype"):
        return source.astype(str(value.attrs.dtype))
    if is_call(value, "relax.reshape") or is_call(value, "relax.expand_dims"):
        return source.reshape(static_shape(value) or ())
    if is_call(value, "relax.permute_dims") and source.ndim == 2:
        return source.T if swaps_axes(value) else source
    if is_call(value, "relax.take"):
        index = evaluate(flow, value.args[1])
        return None if index is None else source.take(index, axis=int(value.attrs.axis))
    return None
