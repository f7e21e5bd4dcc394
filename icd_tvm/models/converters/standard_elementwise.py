"""Element-wise operators with mixed types or edge cases that TVM's frontend gets wrong."""

from __future__ import annotations

from typing import Any

import numpy as np

from icd_tvm._tvm import relax
from icd_tvm.models.converters.node import Converter, OnnxNode, cast, dtype_of, is_float, scalar
from icd_tvm.models.converters.standard_activation import widen


def power(node: OnnxNode) -> Any:
    """``base ** exponent`` in the type of the base.

    Integers go through float64, as ONNX Runtime computes them.
    """
    base, exponent = node.input(0), node.input(1)
    dtype = dtype_of(base)
    if is_float(base) and dtype_of(exponent) == dtype:
        return None
    wide = dtype if is_float(base) and is_float(exponent) else "float64"
    result = relax.op.power(cast(base, wide), cast(exponent, wide))
    return node.emit(cast(node.emit(result), dtype))


def modulo(node: OnnxNode) -> Any:
    """Floating-point ``a - floor(a / b) * b`` with its special cases; the rest is TVM's."""
    left, right = node.input(0), node.input(1)
    if node.attr("fmod", 0) or not is_float(left):
        return None
    dtype = dtype_of(left)
    left, right = widen(node, left), widen(node, right)
    zero = scalar(0.0, left)
    # The truncated remainder is exact; a remainder of the wrong sign is off by one divisor.
    rest = node.emit(relax.op.mod(left, right))
    wrong = relax.op.logical_and(
        relax.op.not_equal(rest, zero),
        relax.op.logical_xor(relax.op.less(rest, zero), relax.op.less(right, zero)),
    )
    result = node.emit(relax.op.where(wrong, relax.op.add(rest, right), rest))
    # A zero takes the sign of the divisor: zero / b has it.
    signed = relax.op.divide(zero, right)
    exact = relax.op.logical_and(relax.op.equal(result, zero), relax.op.not_equal(right, zero))
    return cast(node.emit(relax.op.where(exact, signed, result)), dtype)


def is_inf(node: OnnxNode) -> Any:
    """Tell infinities of either sign, or of the sign the attributes ask for."""
    data = node.input(0)
    positive = bool(node.attr("detect_positive", 1))
    negative = bool(node.attr("detect_negative", 1))
    if positive and negative:
        return None
    if not positive and not negative:
        return relax.op.zeros(relax.ShapeExpr(node.shape(data)), "bool")
    bound = relax.const(np.inf if positive else -np.inf, dtype_of(data))
    return relax.op.equal(data, bound)


def bit_shift(node: OnnxNode) -> Any:
    """Shift; amounts outside the width leave only the sign extension."""
    data, amount = node.input(0), node.input(1)
    bits = np.dtype(dtype_of(data)).itemsize * 8
    signed = dtype_of(data).startswith("int")
    last = scalar(bits - 1, amount)
    outside = relax.op.greater(amount, last)
    if signed:
        outside = relax.op.logical_or(outside, relax.op.less(amount, scalar(0, amount)))
    outside = node.emit(outside)
    zero = scalar(0, data)
    if node.required("direction") == "RIGHT":
        safe = node.emit(relax.op.where(outside, last, amount))
        shifted = relax.op.right_shift(data, safe)
        return shifted if signed else relax.op.where(outside, zero, shifted)
    safe = node.emit(relax.op.where(outside, scalar(0, amount), amount))
    return relax.op.where(outside, zero, relax.op.left_shift(data, safe))


CONVERTERS: dict[tuple[str, str], Converter] = {
    ("", "BitShift"): bit_shift,
    ("", "IsInf"): is_inf,
    ("", "Mod"): modulo,
    ("", "Pow"): power,
}
