"""Casts: 8-bit floats by their definition, reinterpreted bits, and refusals.

TVM's LLVM code generator converts 8-bit floats wrongly where they are subnormal or overflow, so
they are decoded by a table of 256 values and encoded in integer arithmetic on the float32 bits
(tables of the ONNX operator Cast).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import helper

from icd_tvm._tvm import relax, te, tirx
from icd_tvm.models.converters.node import Converter, OnnxNode, cast, dtype_of, is_float, with_name


@dataclass(frozen=True)
class _Float8:
    """Layout of an 8-bit float: mantissa bits, exponent bias and special codes."""

    mantissa: int
    bias: int
    largest: int
    nan: int
    overflow: int  # code of a value too large when the cast does not saturate
    signed_zero: bool = True


_FLOAT8 = {
    "float8_e4m3fn": _Float8(3, 7, 0x7E, 0x7F, 0x7F),
    "float8_e4m3fnuz": _Float8(3, 8, 0x7F, 0x80, 0x80, signed_zero=False),
    "float8_e5m2": _Float8(2, 15, 0x7B, 0x7E, 0x7C),
    "float8_e5m2fnuz": _Float8(2, 16, 0x7F, 0x80, 0x80, signed_zero=False),
}
_FLOAT32_BIAS = 127
_SUB_BYTE = ("int4", "uint4", "int2", "uint2", "float4_e2m1fn")
_NO_TENSOR = (*_SUB_BYTE, "float8_e8m0fnu")


def cast_to(node: OnnxNode) -> Any:
    """Cast to the type of the attribute ``to``."""
    return _convert(node, _target(node, int(node.required("to"))))


def cast_like(node: OnnxNode) -> Any:
    """Cast to the type of the second input."""
    return _convert(node, node.stored.get(1) or dtype_of(node.input(1)))


def bit_cast(node: OnnxNode) -> Any:
    """Reinterpret the bits as another type of the same width."""
    data = node.input(0)
    target = _target(node, int(node.required("to")))
    source = dtype_of(data)
    if source == target:
        return data
    if "bool" in (source, target):
        # A bool is stored as a byte of 0 or 1.
        return _bool_bits(node, data, source, target)
    if _width(source) != _width(target):
        raise node.refuse(f"{source} and {target} differ in width")
    return _reinterpret(node, data, target)


def _bool_bits(node: OnnxNode, data: Any, source: str, target: str) -> Any:
    if source != "bool":
        raise node.refuse("bits of other types are no bool")
    byte = node.emit(cast(data, "uint8"))
    return byte if target == "uint8" else _reinterpret(node, byte, target)


def _target(node: OnnxNode, element: int) -> str:
    if element == onnx.TensorProto.STRING:
        raise node.refuse("strings have no tensor")
    return str(np.dtype(helper.tensor_dtype_to_np_dtype(element)).name)


def _width(dtype: str) -> int:
    return int(np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize)


def _convert(node: OnnxNode, target: str) -> Any:
    data = node.input(0)
    if not isinstance(data.ty, relax.TensorType):
        return None  # a shape, which TVM's converter carries on
    source = dtype_of(data)
    for name in (source, target):
        if name in _NO_TENSOR:
            raise node.refuse(f"TVM has no tensors of {name}")
    if source == target:
        return data
    if source in _FLOAT8:
        data = _decode(node, data)
        source = "float32"
    if target in _FLOAT8:
        return _encode(node, data, target)
    if source in ("float32", "float64", "float16", "bfloat16") and target == "bool":
        return relax.op.not_equal(data, relax.const(0, source))
    return cast(data, target)


def _decode(node: OnnxNode, data: Any) -> Any:
    """Return an 8-bit float as float32."""
    codes = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, dtype_of(data)))
    bits = node.emit(cast(_reinterpret(node, data, "uint8"), "int32"))
    return node.emit(relax.op.take(with_name(codes.astype(np.float32), ""), bits, 0, mode="clip"))


def _encode(node: OnnxNode, data: Any, target: str) -> Any:
    """Return float32 or float16 as an 8-bit float, rounded to nearest even."""
    if not is_float(data) or dtype_of(data) == "float64":
        raise node.refuse(f"a cast from {dtype_of(data)} to {target} is not supported")
    layout, saturate = _FLOAT8[target], bool(node.attr("saturate", 1))
    wide = node.emit(cast(data, "float32"))

    def kernel(values: Any) -> Any:
        return te.compute(
            values.shape, lambda *i: _code(values[i], layout, saturate), name="float8_code"
        )

    return _reinterpret(node, node.bb.emit_te(kernel, wide), target)


def _code(value: Any, layout: _Float8, saturate: bool) -> Any:
    """Return the uint8 code of a float32 value, in unsigned arithmetic on its bits."""
    bits = tirx.reinterpret("uint32", value)
    sign = tirx.bitwise_and(tirx.shift_right(bits, _u32(24)), _u32(0x80))
    magnitude = tirx.bitwise_and(bits, _u32(0x7FFFFFFF))
    lowest = _u32(_FLOAT32_BIAS + 1 - layout.bias)
    exponent = tirx.max(tirx.shift_right(magnitude, _u32(23)), lowest)
    # In units of the last mantissa place; the scaling by a power of two is exact.
    inverse = _u32(2 * _FLOAT32_BIAS + layout.mantissa) - exponent
    unit = tirx.reinterpret("float32", tirx.shift_left(inverse, _u32(23)))
    count = tirx.nearbyint(tirx.reinterpret("float32", magnitude) * unit)
    infinite = _u32(0x7F800000)
    count = tirx.if_then_else(magnitude < infinite, count, tirx.FloatImm("float32", 0.0))
    code = tirx.shift_left(exponent - lowest, _u32(layout.mantissa)) + count.astype("uint32")
    beyond = tirx.any(code > _u32(layout.largest), magnitude >= infinite)
    code = tirx.if_then_else(beyond, _u32(layout.largest if saturate else layout.overflow), code)
    code = tirx.if_then_else(magnitude > infinite, _u32(layout.nan), code)
    keeps_sign = code != _u32(layout.nan)
    if not layout.signed_zero:
        keeps_sign = tirx.all(keeps_sign, code != _u32(0))
    return tirx.if_then_else(keeps_sign, tirx.bitwise_or(code, sign), code).astype("uint8")


def _u32(value: int) -> Any:
    return tirx.IntImm("uint32", value)


def _reinterpret(node: OnnxNode, data: Any, dtype: str) -> Any:
    def kernel(values: Any) -> Any:
        return te.compute(
            values.shape, lambda *i: tirx.reinterpret(dtype, values[i]), name="reinterpret"
        )

    return node.bb.emit_te(kernel, data)


CONVERTERS: dict[tuple[str, str], Converter] = {
    ("", "BitCast"): bit_cast,
    ("", "Cast"): cast_to,
    ("", "CastLike"): cast_like,
}
