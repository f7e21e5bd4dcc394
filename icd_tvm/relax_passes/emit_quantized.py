"""Relax expressions of quantised products, as the ONNX importer makes them.

A model that was quantised here and one that arrives quantised look alike, so one kernel
selection serves both:

============================  =====================================================
one scale a column, a tensor  DequantizeLinear: ``relax.dequantize``
groups of rows                MatMulNBits: unsigned codes less a zero point, times the
                              scale of the row's group
float8                        DequantizeLinear of decoded values (TVM's own float8 code
                              is wrong on the CPU)
static activations            QuantizeLinear, DequantizeLinear
dynamic activations           DynamicQuantizeLinear, MatMulInteger, Cast, Mul
bf16                          float32 values that bfloat16 holds; Cast there and back of
                              the input
============================  =====================================================
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm._tvm import named_const, relax
from icd_tvm.adapters.quant import QuantizedTensor
from icd_tvm.adapters.quant_scales import FORMATS


def dequantized(builder: Any, weight: QuantizedTensor, name: str, grouped: bool) -> Any:
    """Return the float32 weight [K, N] that the codes stand for, without its salient rows.

    Parameters
    ----------
    builder : relax.BlockBuilder
    weight : QuantizedTensor
    name : str
        Name of the constant of codes; those of its scales, zero points and group numbers are
        made from it.
    grouped : bool
        Whether rows come in groups, be it one.
    """
    if not FORMATS[weight.dtype].is_scaled:
        return named_const(weight.dequantize(np.float32), name)
    if FORMATS[weight.dtype].is_float:
        codes = named_const(_coded(weight).astype(np.float32), name)
        return relax.op.multiply(codes, _spread_scales(builder, weight, name))
    if grouped:
        return _grouped(builder, weight, name)
    codes = named_const(_coded(weight), name)
    return relax.op.dequantize(codes, *_parameters(weight, name), axis=1, out_dtype="float32")


def _coded(weight: QuantizedTensor) -> npt.NDArray[Any]:
    """Return the codes; rows that are kept in floating point stand for 0."""
    if weight.salient is None or not weight.zero_points.any():
        return weight.codes
    zeros = weight.zero_points[weight.g_idx]
    return np.where(weight.salient[:, None], zeros, weight.codes)


def _parameters(weight: QuantizedTensor, name: str) -> tuple[Any, Any]:
    """Return scale and zero point: scalars, or one a column."""
    whole = weight.scales.shape[1] == 1 < weight.shape[1]
    scale = weight.scales[0, 0] if whole else weight.scales[0]
    zero = weight.zero_points[0, 0] if whole else weight.zero_points[0]
    if not np.any(zero):
        # What the importer puts where a model gives none.
        point = relax.const(0, str(zero.dtype))
    else:
        point = named_const(np.asarray(zero), f"{name}.zero_point")
    return named_const(np.asarray(scale), f"{name}.scale"), point


def _grouped(builder: Any, weight: QuantizedTensor, name: str) -> Any:
    half = 1 << (FORMATS[weight.dtype].bits - 1)
    codes = named_const((_coded(weight).astype(np.int16) + half).astype(np.uint8), name)
    values = builder.emit(relax.op.astype(codes, "float32"))
    points: Any = relax.const(float(half), "float32")
    if weight.zero_points.any():
        table = (weight.zero_points.astype(np.int16) + half).astype(np.uint8)
        wide = relax.op.astype(named_const(table, f"{name}.zero_point"), "float32")
        points = _rows(builder, builder.emit(wide), weight, name)
    shifted = builder.emit(relax.op.subtract(values, points))
    return relax.op.multiply(shifted, _spread_scales(builder, weight, name))


def _spread_scales(builder: Any, weight: QuantizedTensor, name: str) -> Any:
    """Return the scales so that they broadcast over [K, N]."""
    return _rows(builder, named_const(weight.scales, f"{name}.scale"), weight, name)


def _rows(builder: Any, table: Any, weight: QuantizedTensor, name: str) -> Any:
    """Fetch a table's row for every row of the weight: its rows then stay free to be permuted."""
    if len(weight.scales) == 1:
        return table
    index = named_const(weight.g_idx, f"{name}.g_idx")
    return builder.emit(relax.op.take(table, index, axis=0, mode="clip"))


def static_activation(
    builder: Any, data: Any, scale: tuple[float, int], dtype: str = "uint8"
) -> Any:
    """Return ``data`` after a trip through bytes.

    Parameters
    ----------
    builder : relax.BlockBuilder
    data : relax.Expr
        float32.
    scale : (float, int)
        Scale, and the code of 0.0.
    dtype : {"uint8", "int8"}
        Of the codes.
    """
    name = getattr(data, "name", "")
    parameters = (
        named_const(np.asarray(scale[0], np.float32), f"{name}.scale"),
        named_const(np.asarray(scale[1], dtype), f"{name}.zero_point"),
    )
    axis = min(1, int(data.ty.ndim) - 1)
    codes = builder.emit(relax.op.quantize(data, *parameters, axis=axis, out_dtype=dtype))
    return builder.emit(relax.op.dequantize(codes, *parameters, axis=axis, out_dtype="float32"))


def bf16_activation(builder: Any, data: Any) -> Any:
    """Return float32 ``data`` after a trip through bfloat16."""
    rounded = builder.emit(relax.op.astype(data, "bfloat16"))
    return builder.emit(relax.op.astype(rounded, "float32"))


def dynamic_activation(builder: Any, data: Any) -> tuple[Any, Any, Any]:
    """Return uint8 codes of ``data``, their float32 scale and their uint8 zero point."""
    zero = relax.const(0.0, "float32")
    low = builder.emit(relax.op.minimum(builder.emit(relax.op.min(data)), zero))
    high = builder.emit(relax.op.maximum(builder.emit(relax.op.max(data)), zero))
    span = relax.op.divide(relax.op.subtract(high, low), relax.const(255.0, "float32"))
    span = builder.emit(span)
    one = relax.const(1.0, "float32")
    scale = builder.emit(relax.op.where(relax.op.equal(span, zero), one, span))
    offset = builder.emit(relax.op.divide(relax.op.negative(low), scale))
    point = _byte(builder, builder.emit(relax.op.round(offset)))
    steps = builder.emit(relax.op.round(relax.op.divide(data, scale)))
    shifted = relax.op.add(steps, builder.emit(relax.op.astype(point, "float32")))
    return _byte(builder, builder.emit(shifted)), scale, point


def _byte(builder: Any, rounded: Any) -> Any:
    bounded = relax.op.minimum(rounded, relax.const(255.0, "float32"))
    bounded = relax.op.maximum(bounded, relax.const(0.0, "float32"))
    return builder.emit(relax.op.astype(builder.emit(bounded), "uint8"))


def integer_product(
    builder: Any, data: tuple[Any, Any, Any], weight: QuantizedTensor, name: str, node: str
) -> Any:
    """Return float32 ``data @ weight``, multiplied in integers.

    Parameters
    ----------
    builder : relax.BlockBuilder
    data : tuple of relax.Expr
        From :func:`dynamic_activation`.
    weight : QuantizedTensor
        int8, one scale a column or a tensor.
    name, node : str
        Of the weight and of the matmul. The integer product is bound to the matmul's name: it is
        what names the axis groups, which thus stay the same.
    """
    codes, scale, point = data
    left = relax.op.subtract(relax.op.astype(codes, "int32"), relax.op.astype(point, "int32"))
    right = relax.op.astype(named_const(weight.codes, name), "int32")
    if weight.zero_points.any():
        zeros = named_const(np.asarray(weight.zero_points), f"{name}.zero_point")
        right = relax.op.subtract(right, relax.op.astype(zeros, "int32"))
    total = emit_as(builder, relax.op.matmul(left, right, out_dtype="int32"), node)
    scales = relax.op.multiply(scale, _parameters(weight, name)[0])
    return relax.op.multiply(relax.op.astype(total, "float32"), scales)


def emit_as(builder: Any, expr: Any, name: str) -> Any:
    """Bind an expression to exactly this name; ``builder.emit`` would rewrite its dots."""
    value = builder.normalize(expr)
    kind = relax.DataflowVar if builder.current_block_is_dataflow() else relax.Var
    var = kind(name, value.ty)
    builder.emit_normalized(relax.VarBinding(var, value))
    return var


def salient_product(
    builder: Any,
    data: Any,
    salient: npt.NDArray[np.bool_],
    values: npt.NDArray[Any],
    name: str,
    node: str,
) -> Any:
    """Return the part of a product that floating point rows of the weight make.

    Parameters
    ----------
    builder : relax.BlockBuilder
    data : relax.Expr
        float32 [..., K].
    salient : bool array, shape [K]
        Which rows these are.
    values : float array, shape [S, N]
        Those rows, ascending.
    name, node : str
        Of the weight and of the matmul.
    """
    index = named_const(np.flatnonzero(salient).astype(np.int32), f"{name}.salient_rows")
    picked = relax.op.take(data, index, axis=int(data.ty.ndim) - 1, mode="clip")
    kept: Any = named_const(values, f"{name}.salient")
    if values.dtype != np.float32:
        kept = builder.emit(relax.op.astype(kept, "float32"))
    return builder.emit(relax.op.matmul(builder.emit(picked), kept), f"{node}_salient")
