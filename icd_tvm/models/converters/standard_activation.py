"""Activations whose definition in TVM's frontend is missing, single-type or imprecise."""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import relax
from icd_tvm.models.converters.node import Converter, OnnxNode, cast, dtype_of, scalar

_NARROW = ("float16", "bfloat16")
# Above this the Mish quotient is 1 in float32 and its square stays finite.
_MISH_LIMIT = 20.0


def widen(node: OnnxNode, expr: Any) -> Any:
    """Return 16-bit floats as float32, anything else unchanged."""
    return node.emit(relax.op.astype(expr, "float32")) if dtype_of(expr) in _NARROW else expr


def elu(node: OnnxNode) -> Any:
    """``x`` above zero, ``alpha * (exp(x) - 1)`` below."""
    data = node.input(0)
    return cast(_elu(node, widen(node, data), float(node.attr("alpha", 1.0))), dtype_of(data))


def celu(node: OnnxNode) -> Any:
    """``alpha * elu(x / alpha)``."""
    data = node.input(0)
    alpha = float(node.attr("alpha", 1.0))
    wide = widen(node, data)
    scaled = node.emit(relax.op.divide(wide, scalar(alpha, wide)))
    result = relax.op.multiply(_elu(node, scaled, 1.0), scalar(alpha, wide))
    return cast(node.emit(result), dtype_of(data))


def selu(node: OnnxNode) -> Any:
    """``gamma * elu(x, alpha)``."""
    data = node.input(0)
    wide = widen(node, data)
    inner = _elu(node, wide, float(node.attr("alpha", 1.67326319217681884765625)))
    gamma = scalar(float(node.attr("gamma", 1.05070102214813232421875)), wide)
    return cast(node.emit(relax.op.multiply(inner, gamma)), dtype_of(data))


def _elu(node: OnnxNode, data: Any, alpha: float) -> Any:
    zero, one = scalar(0.0, data), scalar(1.0, data)
    below = relax.op.minimum(data, zero)  # keeps exp finite where the branch is not taken
    curve = relax.op.multiply(relax.op.subtract(relax.op.exp(below), one), scalar(alpha, data))
    return node.emit(relax.op.where(relax.op.greater(data, zero), data, curve))


def prelu(node: OnnxNode) -> Any:
    """``x`` above zero, ``slope * x`` below; a lone axis meant channels before opset 7."""
    data, slope = node.input(0), node.input(1)
    rank, shape = len(node.shape(data)), node.shape(slope)
    if node.opset < 7 and len(shape) == 1 and rank > 1:
        column = [1, shape[0]] + [1] * (rank - 2)
        slope = node.emit(relax.op.reshape(slope, column))
    above = relax.op.greater(data, scalar(0, data))
    return relax.op.where(above, data, relax.op.multiply(data, slope))


def softplus(node: OnnxNode) -> Any:
    """``log(1 + exp(x))`` without overflow and with relative accuracy far below zero."""
    data = node.input(0)
    wide = widen(node, data)
    zero, one = scalar(0.0, wide), scalar(1.0, wide)
    small = node.emit(relax.op.exp(relax.op.negative(relax.op.abs(wide))))
    total = node.emit(relax.op.add(small, one))
    # Kahan's log1p: the rounding error of 1 + t cancels in the quotient.
    quotient = relax.op.divide(
        relax.op.multiply(relax.op.log(total), small), relax.op.subtract(total, one)
    )
    tail = relax.op.where(relax.op.equal(total, one), small, quotient)
    return cast(node.emit(relax.op.add(relax.op.maximum(wide, zero), tail)), dtype_of(data))


def mish(node: OnnxNode) -> Any:
    """``x * tanh(softplus(x))`` as a quotient of polynomials in ``exp(x)``."""
    data = node.input(0)
    wide = widen(node, data)
    power = node.emit(relax.op.exp(relax.op.minimum(wide, scalar(_MISH_LIMIT, wide))))
    two = scalar(2.0, wide)
    numerator = node.emit(relax.op.multiply(power, relax.op.add(power, two)))
    quotient = relax.op.divide(numerator, relax.op.add(numerator, two))
    return cast(node.emit(relax.op.multiply(wide, quotient)), dtype_of(data))


CONVERTERS: dict[tuple[str, str], Converter] = {
    ("", "Celu"): celu,
    ("", "Elu"): elu,
    ("", "Mish"): mish,
    ("", "PRelu"): prelu,
    ("", "Selu"): selu,
    ("", "Softplus"): softplus,
}
