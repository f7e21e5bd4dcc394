"""CausalConvWithState: a depthwise convolution over the past (opset 27)."""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import relax
from icd_tvm.models.converters.node import Converter, OnnxNode, cast, dtype_of

_DATA, _WEIGHT, _BIAS, _PAST = range(4)


def causal_conv_with_state(node: OnnxNode) -> Any:
    """Convert to a padded depthwise convolution in float32; the state is the end of its input."""
    activation = str(node.attr("activation", "none"))
    if activation not in ("none", "silu", "swish"):
        raise node.refuse(f"attribute activation = {activation!r}")
    weight = node.input(_WEIGHT)
    channels, _, width = node.shape(weight)
    data = _extended(node, width - 1)
    wide = [node.emit(cast(value, "float32")) for value in (data, weight)]
    result = node.emit(relax.op.nn.conv1d(*wide, groups=channels))
    if node.has(_BIAS):
        bias = relax.op.reshape(node.emit(cast(node.input(_BIAS), "float32")), (1, channels, 1))
        result = node.emit(relax.op.add(result, node.emit(bias)))
    if activation != "none":
        result = node.emit(relax.op.nn.silu(result))
    result = node.emit(cast(result, dtype_of(node.input(_DATA))))
    if not node.wants(1):
        return result
    if width == 1:
        raise node.refuse("its state has no elements, and it is used")
    length = node.shape(data)[2]
    return result, relax.op.strided_slice(data, [2], [length - width + 1], [length])


def _extended(node: OnnxNode, before: int) -> Any:
    """Return the data behind the state, or behind zeros."""
    data = node.input(_DATA)
    if not before:
        return data
    if node.has(_PAST):
        return node.emit(relax.op.concat([node.input(_PAST), data], axis=2))
    return node.emit(relax.op.nn.pad(data, [0, 0, 0, 0, before, 0]))


CONVERTERS: dict[tuple[str, str], Converter] = {("", "CausalConvWithState"): causal_conv_with_state}
