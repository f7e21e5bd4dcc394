"""Legalisations that replace scalar library calls by vector code on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from icd_tvm._tvm import GenericConst, Op, named_const, te, tirx
from icd_tvm.relax_passes.relax_graph import (
    call_func,
    constant_array,
    is_float32,
    map_elements,
    scalar_constant,
    static_shape,
)
from icd_tvm.tir_schedules.cpu import vector_math
from icd_tvm.tir_schedules.cpu.emit import f32
from icd_tvm.tir_schedules.cpu.softmax import softmax, softmax_along
from icd_tvm.tir_schedules.cpu.transpose import transpose
from icd_tvm.tir_schedules.target import vector_bits

Legalizer = Callable[[Any, Any], Any]
# Elements from which a transpose takes longer than the fusion that it ends would save.
_LARGE = 1 << 14
# Exponents that are multiplied out; the rounding errors of more factors add up.
_WHOLE_POWERS = range(2, 9)
_FLOAT = np.finfo(np.float32)


def legalize_map(target: Any) -> dict[str, Legalizer]:
    """Return the functions that ``LegalizeOps`` takes instead of TVM's own for float32.

    Parameters
    ----------
    target : tvm.target.Target
        The softmax kernel is built for it.

    Returns
    -------
    dict of str to callable
        Operator name -> ``(BlockBuilder, call) -> expression``. Other types and dynamic
        shapes go to TVM's legalisation.
    """
    unary: dict[str, Callable[[Any], Any]] = {
        "relax.erf": vector_math.erf,
        "relax.exp": vector_math.exp,
        "relax.log": vector_math.log,
        "relax.tanh": vector_math.tanh,
        "relax.sigmoid": vector_math.sigmoid,
        "relax.nn.gelu": vector_math.gelu,
        "relax.nn.gelu_tanh": vector_math.gelu_tanh,
        # Both round half to even; TVM's own `nearbyint` is not vectorised.
        "relax.round": te.round,
        "relax.nn.silu": lambda x: x * vector_math.sigmoid(x),
    }
    table = {name: _unary(function) for name, function in unary.items()}
    table["relax.divide"] = _divide
    table["relax.power"] = _power
    table["relax.quantize"] = _quantize
    table["relax.permute_dims"] = lambda builder, call: _transpose(builder, call, target)
    table["relax.nn.softmax"] = lambda builder, call: _softmax(builder, call, target)
    table["relax.nn.log_softmax"] = lambda builder, call: _softmax_along(builder, call, log=True)
    return table


def _unary(function: Callable[[Any], Any]) -> Legalizer:
    def legalize(builder: Any, call: Any) -> Any:
        return _mapped(builder, call, function) if is_float32(call) else _default(builder, call)

    return legalize


def _divide(builder: Any, call: Any) -> Any:
    """Multiply by the reciprocal of a constant: one rounding more, and no division."""
    number = _own_number(call)
    if number is None or not _has_reciprocal(number):
        return _default(builder, call)
    inverse = tirx.FloatImm("float32", 1.0 / number)
    return _mapped(builder, call, lambda x: x * inverse)


def _power(builder: Any, call: Any) -> Any:
    """Multiply for a small whole exponent; the C library's ``powf`` takes one number at a time."""
    number = _own_number(call)
    if number is None or number not in _WHOLE_POWERS:
        return _default(builder, call)
    return _mapped(builder, call, lambda x: vector_math.whole_power(x, int(number)))


def _own_number(call: Any) -> float | None:
    """Return the constant that a float32 tensor is combined with, if it leaves the shape alone."""
    shape = static_shape(call)
    if not is_float32(call) or shape is None or shape != static_shape(call.args[0]):
        return None
    return scalar_constant(call.args[1])


def _has_reciprocal(number: float) -> bool:
    """Tell whether the reciprocal of a number is one that float32 holds to full precision."""
    least, most = (float(bound) for bound in (_FLOAT.tiny, _FLOAT.max))
    return number != 0.0 and least <= 1.0 / abs(number) <= most


def _mapped(builder: Any, call: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to every element of the first argument."""
    hint = str(call.op.name).rsplit(".", 1)[-1]
    return map_elements(builder, call.args[0], function, hint)


def _quantize(builder: Any, call: Any) -> Any:
    """Multiply by the reciprocals of constant scales, as `_divide` does."""
    scale, zero = (constant_array(arg) for arg in call.args[1:3])
    dtype, axis = str(call.ty.dtype), int(call.attrs.axis)
    if scale is None or zero is None or dtype not in ("int8", "uint8"):
        return _default(builder, call)
    # The reciprocal of zero, and of the least numbers there are, is none.
    with np.errstate(all="ignore"):
        inverses = (np.float32(1.0) / scale).astype(np.float32)
    if not np.isfinite(inverses).all() or not is_float32(call.args[0]):
        return _default(builder, call)
    tables = [inverses, zero.astype(np.float32)]
    vectors = [named_const(t.reshape(-1), "") for t in tables if t.size > 1]

    def compute(x: Any, *given: Any) -> Any:
        rest = iter(given)
        made = [next(rest) if t.size > 1 else f32(float(t.reshape(()))) for t in tables]

        def code(*index: Any) -> Any:
            inverse, point = (v[index[axis]] if isinstance(v, te.Tensor) else v for v in made)
            return vector_math.to_code(x[index] * inverse, point, dtype)

        return te.compute(x.shape, code, name="quantized")

    return builder.call_te(compute, call.args[0], *vectors, primfunc_name_hint="quantize")


def _softmax(builder: Any, call: Any, target: Any) -> Any:
    shape = static_shape(call)
    if shape is None or len(shape) < 2 or min(shape) < 1 or not is_float32(call):
        return _softmax_along(builder, call)
    if int(call.attrs.axis) % len(shape) != len(shape) - 1:
        return _softmax_along(builder, call)
    return call_func(builder, softmax(shape, target), "softmax", [call.args[0]], call.ty)


def _softmax_along(builder: Any, call: Any, *, log: bool = False) -> Any:
    """Softmax over any axis, or its logarithm."""
    shape = static_shape(call)
    if not shape or min(shape) < 1 or not is_float32(call):
        return _default(builder, call)
    axis, hint = int(call.attrs.axis) % len(shape), "log_softmax" if log else "softmax"
    return builder.call_te(softmax_along, call.args[0], axis, log=log, primfunc_name_hint=hint)


def _transpose(builder: Any, call: Any, target: Any) -> Any:
    """Exchange the last two axes of a large tensor in registers."""
    shape, lanes = static_shape(call.args[0]) or (), vector_bits(target) // 32
    axes = call.attrs.axes
    order = list(range(len(shape)))
    swapped = [*order[:-2], *reversed(order[-2:])]
    if axes is None or len(shape) not in (2, 3) or [int(axis) for axis in axes] != swapped:
        return _default(builder, call)
    fits = shape[-2] % lanes == 0 and shape[-1] % lanes == 0 and prod(shape) >= _LARGE
    if not fits or not is_float32(call) or isinstance(call.args[0], GenericConst):
        return _default(builder, call)
    return call_func(builder, transpose(shape, target), "transpose", [call.args[0]], call.ty)


def _default(builder: Any, call: Any) -> Any:
    return Op.get(call.op.name).get_attr("FLegalize")(builder, call)
