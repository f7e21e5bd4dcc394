"""Products and convolutions of integers, with and without requantisation."""

from __future__ import annotations

from typing import Any

import numpy as np

from icd_tvm._tvm import GenericConst, relax
from icd_tvm.models.converters.attention_contrib import attend_rows
from icd_tvm.models.converters.node import Converter, OnnxNode, cast, dtype_of
from icd_tvm.models.converters.products import integer_matmul
from icd_tvm.models.converters.quantize_linear import dynamic_quantize, saturate
from icd_tvm.models.converters.scales import along


def shifted(node: OnnxNode, data: Any, zero: Any, axis: int | None = None) -> Any:
    """Return ``data - zero point`` in int32.

    Parameters
    ----------
    node : OnnxNode
    data : relax.Expr
    zero : relax.Expr or None
    axis : int, optional
        Axis that a zero point with more than one element runs along.
    """
    wide = node.emit(cast(data, "int32"))
    if zero is None or (isinstance(zero, GenericConst) and not np.any(zero.value.numpy())):
        return wide
    point = node.emit(cast(along(node, zero, data, axis), "int32"))
    return node.emit(relax.op.subtract(wide, point))


def requantized(node: OnnxNode, total: Any, factor: Any, zero: Any, dtype: str) -> Any:
    """Return ``saturate(round(total * factor) + zero point)`` of an int32 total."""
    scaled = relax.op.multiply(node.emit(cast(total, "float32")), factor)
    rounded = node.emit(relax.op.round(node.emit(scaled)))
    if zero is not None:
        point = node.emit(cast(along(node, zero, total, None), "float32"))
        rounded = node.emit(relax.op.add(rounded, point))
    info = np.iinfo(dtype)
    return saturate(node, rounded, dtype, int(info.min), int(info.max))


def _product(node: OnnxNode, left: Any, zero_left: Any, right: Any, zero_right: Any) -> Any:
    a, b = shifted(node, left, zero_left, -2), shifted(node, right, zero_right, -1)
    return integer_matmul(node, a, b)


def q_linear_matmul(node: OnnxNode) -> Any:
    """Inputs: A, scale, zero point; B, scale, zero point; scale and zero point of the result."""
    total = _product(node, node.input(0), node.optional(2), node.input(3), node.optional(5))
    left = along(node, node.input(1), node.input(0), -2)
    right = along(node, node.input(4), node.input(3), -1)
    factor = _factor(node, left, right, node.input(6))
    zero = node.optional(7)
    dtype = "uint8" if zero is None else dtype_of(zero)
    return requantized(node, total, factor, zero, dtype)


def _factor(node: OnnxNode, left: Any, right: Any, result: Any) -> Any:
    left, right, result = (node.emit(cast(scale, "float32")) for scale in (left, right, result))
    both = node.emit(relax.op.multiply(left, right))
    return node.emit(relax.op.divide(both, along(node, result, both, None)))


def matmul_integer_to_float(node: OnnxNode) -> Any:
    """Inputs: A, B, their scales, their zero points, bias."""
    total = _product(node, node.input(0), node.optional(4), node.input(1), node.optional(5))
    left = along(node, node.input(2), node.input(0), -2)
    right = along(node, node.input(3), node.input(1), -1)
    return _floats(node, total, left, right, node.optional(6))


def dynamic_quantize_matmul(node: OnnxNode) -> Any:
    """Inputs: A in float, B, its scale, its zero point, bias."""
    data, scale, zero = dynamic_quantize(node, node.input(0))
    total = _product(node, data, zero, node.input(1), node.optional(3))
    right = along(node, node.input(2), node.input(1), -1)
    return _floats(node, total, scale, right, node.optional(4))


def _floats(node: OnnxNode, total: Any, left: Any, right: Any, bias: Any) -> Any:
    factor = node.emit(relax.op.multiply(left, right))
    result = node.emit(relax.op.multiply(node.emit(cast(total, dtype_of(factor))), factor))
    return result if bias is None else node.emit(relax.op.add(result, bias))


def q_attention(node: OnnxNode) -> Any:
    """Attention of com.microsoft whose one product is of integers."""
    node.allow({"do_rotary": (0,), "past_present_share_buffer": (0,)})
    total = _product(node, node.input(0), node.optional(6), node.input(1), node.optional(7))
    left = along(node, node.input(3), node.input(0), None)
    right = along(node, node.input(4), node.input(1), -1)
    product = _floats(node, total, left, right, node.input(2))
    return attend_rows(node, product, mask=node.optional(5), past=node.optional(8), bias=None)


CONVERTERS: dict[tuple[str, str], Converter] = {
    ("", "QLinearMatMul"): q_linear_matmul,
    ("com.microsoft", "MatMulIntegerToFloat"): matmul_integer_to_float,
    ("com.microsoft", "DynamicQuantizeMatMul"): dynamic_quantize_matmul,
    ("com.microsoft", "QAttention"): q_attention,
}
