"""Shape operators with inputs that TVM's frontend does not take."""

from __future__ import annotations

from typing import Any

import numpy as np

from icd_tvm._tvm import GenericConst, relax
from icd_tvm.models.converters.node import Converter, OnnxNode, with_name


def unsqueeze(node: OnnxNode) -> Any:
    """Insert axes; accepts a scalar ``axes`` as ONNX Runtime does."""
    data = node.input(0)
    tensor = isinstance(data, relax.Expr) and isinstance(data.ty, relax.TensorType)
    if node.opset < 13 or not tensor or isinstance(data, GenericConst):
        return None
    rank = len(node.shape(data))
    axes = node.constant(1, "the axes").reshape(-1)
    places = sorted(int(axis) % (rank + axes.size) for axis in axes)
    return relax.op.expand_dims(data, places)


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
    ("", "Pad"): pad,
    ("", "SpaceToDepth"): space_to_depth,
    ("", "Unsqueeze"): unsqueeze,
}
