"""Convolutions of integers."""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import relax
from icd_tvm.models.converters.integer import requantized, shifted
from icd_tvm.models.converters.node import Converter, OnnxNode, cast, dtype_of
from icd_tvm.models.converters.scales import along

_LAYOUTS = {
    3: ("conv1d", "NCW", "OIW"),
    4: ("conv2d", "NCHW", "OIHW"),
    5: ("conv3d", "NCDHW", "OIDHW"),
}


def conv_integer(node: OnnxNode) -> Any:
    """Inputs: X, W, their zero points; the result is int32."""
    return _convolved(node, 0, node.optional(2), 1, node.optional(3))


def q_linear_conv(node: OnnxNode) -> Any:
    """Inputs: X, scale, zero point; W, scale, zero point; scale, zero point of the result; B."""
    total = _convolved(node, 0, node.optional(2), 3, node.optional(5))
    if node.has(8):
        bias = along(node, node.emit(cast(node.input(8), "int32")), total, 1)
        total = node.emit(relax.op.add(total, bias))
    left, right = along(node, node.input(1), total, None), along(node, node.input(4), total, 1)
    both = node.emit(relax.op.multiply(left, right))
    factor = node.emit(relax.op.divide(both, along(node, node.input(6), total, None)))
    zero = node.input(7)
    return requantized(node, total, factor, zero, dtype_of(zero))


def _convolved(node: OnnxNode, x: int, zero_x: Any, w: int, zero_w: Any) -> Any:
    """Return the int32 convolution; padding has the value of the zero point."""
    data = shifted(node, node.input(x), zero_x)
    weight = shifted(node, node.input(w), zero_w, 0)
    rank = len(node.shape(data))
    if rank not in _LAYOUTS:
        raise node.refuse(f"a convolution over {rank - 2} axes")
    name, data_layout, kernel_layout = _LAYOUTS[rank]
    spatial = rank - 2
    strides = [int(s) for s in node.attr("strides", [1] * spatial)]
    dilation = [int(d) for d in node.attr("dilations", [1] * spatial)]
    return node.emit(
        getattr(relax.op.nn, name)(
            data,
            weight,
            strides=strides,
            padding=_padding(node, data, weight, strides, dilation),
            dilation=dilation,
            groups=int(node.attr("group", 1)),
            data_layout=data_layout,
            kernel_layout=kernel_layout,
            out_dtype="int32",
        )
    )


def _padding(
    node: OnnxNode, data: Any, weight: Any, strides: list[int], dilation: list[int]
) -> list[int]:
    """Return the padding before every axis, then after every axis."""
    mode, spatial = node.attr("auto_pad", "NOTSET"), len(strides)
    if mode == "NOTSET":
        return [int(p) for p in node.attr("pads", [0] * (2 * spatial))]
    if mode == "VALID":
        return [0] * (2 * spatial)
    before, after = [], []
    sizes = zip(node.shape(data)[2:], node.shape(weight)[2:], strides, dilation, strict=True)
    for size, kernel, stride, step in sizes:
        reach = (-(-size // stride) - 1) * stride + (kernel - 1) * step + 1
        total = max(0, reach - size)
        small, large = total // 2, total - total // 2
        before.append(small if mode == "SAME_UPPER" else large)
        after.append(large if mode == "SAME_UPPER" else small)
    return before + after


CONVERTERS: dict[tuple[str, str], Converter] = {
    ("", "ConvInteger"): conv_integer,
    ("", "QLinearConv"): q_linear_conv,
}
