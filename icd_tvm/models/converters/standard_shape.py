"""Shape operators with inputs that TVM's frontend does not take."""

from __future__ import annotations

from typing import Any

import numpy as np

from icd_tvm._tvm import GenericConst, relax
from icd_tvm.models.converters.node import Converter, OnnxNode, with_name


def unsqueeze(node: OnnxNode) -> Any:
    """Insert axes; accepts a scalar ``axes`` as ONNX Runtime does."""
    data = node.input(0)
    if node.opset < 13 or not _is_tensor(data) or isinstance(data, GenericConst):
        return None
    rank = len(node.shape(data))
    axes = node.constant(1, "the axes").reshape(-1)
    places = sorted(int(axis) % (rank + axes.size) for axis in axes)
    return relax.op.expand_dims(data, places)


def expand(node: OnnxNode) -> Any:
    """Broadcast both ways: a size of 1 in the target keeps the input's."""
    data = node.input(0)
    if not _is_tensor(data) or not _is_tensor(node.input(1)):
        return None
    target = node.constant(1, "the target shape")
    shape = np.broadcast_shapes(node.shape(data), tuple(int(size) for size in target))
    return relax.op.broadcast_to(data, relax.ShapeExpr(shape))


def slice_before_10(node: OnnxNode) -> Any:
    """Slice with attributes, where ``axes`` may be left out; later versions are TVM's."""
    if node.opset >= 10:
        return None
    data, starts, ends = node.input(0), node.required("starts"), node.required("ends")
    axes = node.attr("axes", list(range(len(starts))))
    shape = node.shape(data)
    low, high = [], []
    for axis, start, end in zip(axes, starts, ends, strict=True):
        begin, stop, _ = slice(int(start), int(end)).indices(shape[axis])
        low.append(begin)
        high.append(max(begin, stop))
    return relax.op.strided_slice(data, [int(a) % len(shape) for a in axes], low, high)


def _is_tensor(expr: Any) -> bool:
    return isinstance(expr, relax.Expr) and isinstance(expr.ty, relax.TensorType)


def pad(node: OnnxNode) -> Any:
    """Pad with a value computed at run time, or crop by negative pads; the rest is TVM's."""
    if node.opset < 11:
        return None
    pads = node.constant(1, "the pads").astype(np.int64)
    constant = node.attr("mode", "constant") == "constant"
    computed = constant and node.has(2) and node.array(2) is None
    if not computed:
        if not constant and (pads < 0).any():
            raise node.refuse(f"negative pads in mode {node.attr('mode', '')}")
        return None
    data = node.input(0)
    before, after = _pads_by_axis(node, pads)
    if min(*before, *after) < 0:
        raise node.refuse("negative pads with a value computed at run time")
    widths = [width for pair in zip(before, after, strict=True) for width in pair]
    padded = node.emit(relax.op.nn.pad(data, widths, "constant", 0))
    inside = np.pad(np.ones(node.shape(data), bool), list(zip(before, after, strict=True)))
    value = node.emit(relax.op.reshape(node.input(2), []))
    return relax.op.where(with_name(inside, ""), padded, value)


def _pads_by_axis(node: OnnxNode, pads: np.ndarray[Any, Any]) -> tuple[list[int], list[int]]:
    rank = len(node.shape(node.input(0)))
    given = node.array(3)
    axes = range(rank) if given is None else [int(axis) % rank for axis in given]
    before, after = [0] * rank, [0] * rank
    for position, axis in enumerate(axes):
        before[axis] = int(pads[position])
        after[axis] = int(pads[len(axes) + position])
    return before, after


def space_to_depth(node: OnnxNode) -> Any:
    """Move blocks into channels, block position first (DCR) or channel first (CRD)."""
    node.allow({"mode": ("DCR", "CRD")})
    batch, channels, height, width = node.shape(node.input(0))
    size = int(node.required("blocksize"))
    rows, columns = height // size, width // size
    split = relax.op.reshape(node.input(0), [batch, channels, rows, size, columns, size])
    depth_first = node.attr("mode", "DCR") == "DCR"
    order = [0, 3, 5, 1, 2, 4] if depth_first else [0, 1, 3, 5, 2, 4]
    moved = node.emit(relax.op.permute_dims(node.emit(split), order))
    return relax.op.reshape(moved, [batch, channels * size * size, rows, columns])


CONVERTERS: dict[tuple[str, str], Converter] = {
    ("", "Expand"): expand,
    ("", "Pad"): pad,
    ("", "Slice"): slice_before_10,
    ("", "SpaceToDepth"): space_to_depth,
    ("", "Unsqueeze"): unsqueeze,
}
