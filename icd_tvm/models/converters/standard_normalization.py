"""Normalisations with all their ONNX outputs and modes."""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import relax
from icd_tvm.models.converters.node import Converter, OnnxNode, cast, dtype_of, scalar
from icd_tvm.models.converters.standard_activation import widen


def layer_normalization(node: OnnxNode) -> Any:
    """Layer norm over the axes from ``axis`` on; mean and inverse deviation where used."""
    if not node.wants(1) and not node.wants(2):
        return None
    data = node.input(0)
    dtype = dtype_of(data)
    rank = len(node.shape(data))
    axes = list(range(int(node.attr("axis", -1)) % rank, rank))
    wide = widen(node, data)
    mean = node.emit(relax.op.mean(wide, axes, keepdims=True))
    centred = node.emit(relax.op.subtract(wide, mean))
    variance = relax.op.mean(relax.op.multiply(centred, centred), axes, keepdims=True)
    epsilon = scalar(float(node.attr("epsilon", 1e-5)), wide)
    inverse = node.emit(relax.op.rsqrt(relax.op.add(variance, epsilon)))
    result = node.emit(cast(node.emit(relax.op.multiply(centred, inverse)), dtype))
    result = node.emit(relax.op.multiply(result, node.input(1)))
    if node.has(2):
        result = node.emit(relax.op.add(result, node.input(2)))
    return result, mean, inverse


def rms_normalization(node: OnnxNode) -> Any:
    """RMS norm over the axes from ``axis`` on; TVM's converter, but for all axes at once."""
    data = node.input(0)
    rank = len(node.shape(data))
    axis = int(node.attr("axis", -1)) % rank
    if axis:
        return None
    dtype = dtype_of(data)
    wide = widen(node, data)
    square = relax.op.mean(relax.op.multiply(wide, wide), keepdims=True)
    epsilon = scalar(float(node.attr("epsilon", 1e-5)), wide)
    inverse = node.emit(relax.op.rsqrt(relax.op.add(square, epsilon)))
    result = node.emit(cast(node.emit(relax.op.multiply(wide, inverse)), dtype))
    return relax.op.multiply(result, node.input(1))


def lp_normalization(node: OnnxNode) -> Any:
    """Divide by the L1 or L2 norm along an axis; a zero norm gives zero."""
    node.allow({"p": (2, 1)})
    data = node.input(0)
    wide = widen(node, data)
    axis = int(node.attr("axis", -1))
    magnitude = relax.op.abs(wide) if node.attr("p", 2) == 1 else relax.op.multiply(wide, wide)
    norm = relax.op.sum(node.emit(magnitude), axis, keepdims=True)
    norm = node.emit(norm if node.attr("p", 2) == 1 else relax.op.sqrt(norm))
    zero = relax.op.equal(norm, scalar(0.0, wide))
    safe = node.emit(relax.op.where(zero, scalar(1.0, wide), norm))
    return cast(node.emit(relax.op.divide(wide, safe)), dtype_of(data))


def batch_normalization(node: OnnxNode) -> Any:
    """Normalise by the batch's own moments and return the running ones; inference is TVM's."""
    if not node.attr("training_mode", 0):
        if any(node.wants(position) for position in range(1, 5)):
            raise node.refuse("its training outputs are used but training_mode is 0")
        return None
    data, scale, bias, mean, variance = (node.input(position) for position in range(5))
    shape = node.shape(data)
    axes = [axis for axis in range(len(shape)) if axis != 1]
    column = [1, shape[1]] + [1] * (len(shape) - 2)
    batch_mean = node.emit(relax.op.mean(data, axes, keepdims=True))
    centred = node.emit(relax.op.subtract(data, batch_mean))
    batch_variance = node.emit(
        relax.op.mean(relax.op.multiply(centred, centred), axes, keepdims=True)
    )
    epsilon = scalar(float(node.attr("epsilon", 1e-5)), data)
    inverse = relax.op.rsqrt(relax.op.add(batch_variance, epsilon))
    result = node.emit(relax.op.multiply(centred, inverse))
    result = node.emit(relax.op.multiply(result, relax.op.reshape(scale, column)))
    result = node.emit(relax.op.add(result, relax.op.reshape(bias, column)))
    momentum = float(node.attr("momentum", 0.9))
    running = (
        _running(node, old, relax.op.reshape(new, [shape[1]]), momentum)
        for old, new in ((mean, batch_mean), (variance, batch_variance))
    )
    return (result, *running)


def _running(node: OnnxNode, old: Any, new: Any, momentum: float) -> Any:
    kept = relax.op.multiply(old, scalar(momentum, old))
    fresh = relax.op.multiply(node.emit(new), scalar(1.0 - momentum, old))
    return node.emit(relax.op.add(kept, fresh))


def dropout(node: OnnxNode) -> Any:
    """Pass the input on, with an all-true mask; training with a ratio is refused."""
    data = node.input(0)
    if node.has(2) and bool(node.constant(2, "training_mode")):
        ratio = float(node.constant(1, "the ratio")) if node.has(1) else 0.5
        if ratio:
            raise node.refuse(f"it is in training mode with ratio {ratio:g}")
    if node.opset < 7 and not node.attr("is_test", 0):
        raise node.refuse("it is in training mode (is_test = 0)")
    dtype = "bool" if node.opset >= 10 else dtype_of(data)
    mask = relax.op.ones(relax.ShapeExpr(node.shape(data)), dtype) if node.wants(1) else None
    return (data, mask) if node.wants(1) else data


CONVERTERS: dict[tuple[str, str], Converter] = {
    ("", "BatchNormalization"): batch_normalization,
    ("", "Dropout"): dropout,
    ("", "LayerNormalization"): layer_normalization,
    ("", "LpNormalization"): lp_normalization,
    ("", "RMSNormalization"): rms_normalization,
}
