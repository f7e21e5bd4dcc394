"""QuantizeLinear and DequantizeLinear in blocks, of 4 bits and of float8.

Whatever TVM's own frontend converts right (8 bits and more, one scale or one a channel) is left
to it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper

from icd_tvm._tvm import GenericConst, const_name, relax
from icd_tvm.models.converters.node import Converter, OnnxNode, cast, dtype_of, scalar, with_name
from icd_tvm.models.converters.scales import along

# Stored types that have no type of their own here -> bounds of their integers.
NARROW = {"int4": (-8, 7), "uint4": (0, 15), "int2": (-2, 1), "uint2": (0, 3)}
_SMALL_FLOATS = ("float8", "float4")


def dequantize_linear(node: OnnxNode) -> Any:
    """``(x - zero point) * scale``, or None where TVM's converter will do."""
    data = node.input(0)
    if dtype_of(data).startswith(_SMALL_FLOATS):
        return _decoded(node)
    if not node.attr("block_size", 0):
        return None
    scale = _spread(node, node.input(1))
    result = node.emit(cast(data, dtype_of(scale)))
    if node.has(2):
        zero = node.emit(cast(_spread(node, node.input(2)), dtype_of(scale)))
        result = node.emit(relax.op.subtract(result, zero))
    return relax.op.multiply(result, scale)


def _decoded(node: OnnxNode) -> Any:
    """Decode float8 while importing: TVM's CPU code reads subnormals wrongly."""
    values = node.constant(0, f"{dtype_of(node.input(0))} data")
    zero = node.array(2)
    if node.has(2) and (zero is None or np.any(np.asarray(zero, np.float32))):
        raise node.refuse("a zero point of small floats is not zero")
    scale = node.input(1)
    if node.attr("block_size", 0):
        scale = _spread(node, scale)
    else:
        scale = _per_channel(node, scale)
    decoded = with_name(values.astype(np.float32).astype(dtype_of(scale)), node.label(0))
    return relax.op.multiply(decoded, scale)


def quantize_linear(node: OnnxNode) -> Any:
    """``saturate(round(x / scale) + zero point)``, or None where TVM's converter will do."""
    dtype, low, high = _target(node)
    if dtype.startswith("float"):
        raise node.refuse(f"{dtype} is written wrongly by TVM's CPU code")
    blocked = bool(node.attr("block_size", 0))
    if not blocked and dtype in ("int8", "uint8", "int16", "uint16"):
        return None
    place = _spread if blocked else _per_channel
    scale = place(node, node.input(1))
    zero = place(node, node.input(2)) if node.has(2) else None
    data = node.emit(cast(node.input(0), "float32"))
    quotient = node.emit(relax.op.divide(data, node.emit(cast(scale, "float32"))))
    rounded = node.emit(relax.op.round(quotient))
    if zero is not None:
        rounded = node.emit(relax.op.add(rounded, node.emit(cast(zero, "float32"))))
    return saturate(node, rounded, stored_as(dtype), low, high)


def saturate(node: OnnxNode, rounded: Any, dtype: str, low: int, high: int) -> Any:
    """Return rounded floats as integers between two bounds."""
    bounded = relax.op.minimum(rounded, scalar(float(high), rounded))
    bounded = relax.op.maximum(bounded, scalar(float(low), rounded))
    return node.emit(relax.op.astype(node.emit(bounded), dtype))


def stored_as(dtype: str) -> str:
    """Return the type that holds the values of a dtype: a byte for what is narrower."""
    return dtype.rstrip("0123456789") + "8" if dtype in NARROW else dtype


def _target(node: OnnxNode) -> tuple[str, int, int]:
    """Return the dtype to quantise to and its bounds."""
    given = int(node.attr("output_dtype", 0))
    if given:
        dtype = helper.tensor_dtype_to_np_dtype(given).name
    else:
        dtype = node.stored.get(2, dtype_of(node.input(2))) if node.has(2) else "uint8"
    if dtype in NARROW:
        return dtype, *NARROW[dtype]
    if dtype.startswith("float"):
        return dtype, 0, 0
    info = np.iinfo(dtype)
    return dtype, int(info.min), int(info.max)


def _per_channel(node: OnnxNode, vector: Any) -> Any:
    """Return a scale or zero point so that it broadcasts along its axis of the data."""
    data = node.input(0)
    return along(node, vector, data, int(node.attr("axis", 1)) if node.shape(data)[1:] else 0)


def _spread(node: OnnxNode, blocks: Any) -> Any:
    """Repeat a scale or zero point so that every element of a block has its own.

    It is read through a constant index: the axis that is cut into blocks can then still be
    permuted, with the index following it.
    """
    shape = node.shape(node.input(0))
    axis = int(node.attr("axis", 1)) % len(shape)
    size = int(node.attr("block_size", 0))
    if len(node.shape(blocks)) != len(shape) or node.shape(blocks)[axis] != -(-shape[axis] // size):
        raise node.refuse(f"blocks {node.shape(blocks)} of {size} do not cover {shape}")
    if node.shape(blocks)[axis] == 1:
        return blocks
    index = np.arange(shape[axis], dtype=np.int32) // size
    label = const_name(blocks) if isinstance(blocks, GenericConst) else node.name
    name = with_name(index, f"{label}.blocks")
    return node.emit(relax.op.take(blocks, name, axis=axis, mode="clip"))


def dynamic_quantize_linear(node: OnnxNode) -> Any:
    """Quantise to uint8 by the range of the data; all zeros have scale 1 and zero point 0."""
    return dynamic_quantize(node, node.input(0))


def dynamic_quantize(node: OnnxNode, data: Any) -> tuple[Any, Any, Any]:
    """Return uint8 data, its float32 scale and its uint8 zero point."""
    zero = scalar(0.0, data)
    low = node.emit(relax.op.minimum(node.emit(relax.op.min(data)), zero))
    high = node.emit(relax.op.maximum(node.emit(relax.op.max(data)), zero))
    span = node.emit(relax.op.divide(relax.op.subtract(high, low), scalar(255.0, data)))
    scale = node.emit(relax.op.where(relax.op.equal(span, zero), scalar(1.0, data), span))
    offset = node.emit(relax.op.divide(relax.op.negative(low), scale))
    point = saturate(node, node.emit(relax.op.round(offset)), "uint8", 0, 255)
    steps = node.emit(relax.op.round(relax.op.divide(data, scale)))
    shifted = node.emit(relax.op.add(steps, node.emit(cast(point, dtype_of(data)))))
    return saturate(node, shifted, "uint8", 0, 255), scale, point


def narrow_name(data_type: int) -> str | None:
    """Return the name of an ONNX type of fewer than eight integer bits, None for any other."""
    try:
        name = onnx.TensorProto.DataType.Name(data_type).lower()
    except ValueError:
        return None
    return name if name in NARROW else None


CONVERTERS: dict[tuple[str, str], Converter] = {
    ("", "DequantizeLinear"): dequantize_linear,
    ("com.microsoft", "DequantizeLinear"): dequantize_linear,
    ("", "QuantizeLinear"): quantize_linear,
    ("com.microsoft", "QuantizeLinear"): quantize_linear,
    ("", "DynamicQuantizeLinear"): dynamic_quantize_linear,
}
