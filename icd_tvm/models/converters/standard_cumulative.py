"""Cumulative sums and products along a constant axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from icd_tvm._tvm import relax
from icd_tvm.models.converters.node import Converter, OnnxNode, dtype_of


def cumulative(scan: Callable[..., Any], neutral: int) -> Converter:
    """Return the converter of a scan with ONNX's ``reverse`` and ``exclusive``."""

    def convert(node: OnnxNode) -> Any:
        data = node.input(0)
        rank = len(node.shape(data))
        axis = int(node.constant(1, "the axis").reshape(-1)[0])
        if not -rank <= axis < rank:
            raise node.refuse(f"axis {axis} of a tensor with {rank} axes")
        axis %= rank
        reverse = bool(node.attr("reverse", 0))
        if reverse:
            data = node.emit(relax.op.flip(data, axis))
        if node.attr("exclusive", 0):
            data = _shift(node, data, axis, neutral)
        result = node.emit(scan(data, axis, dtype_of(data)))
        return relax.op.flip(result, axis) if reverse else result

    return convert


def _shift(node: OnnxNode, data: Any, axis: int, neutral: int) -> Any:
    """Move every element one place on and put the neutral element first."""
    shape = list(node.shape(data))
    kept = relax.op.strided_slice(data, [axis], [0], [shape[axis] - 1])
    shape[axis] = 1
    first = relax.op.full(relax.ShapeExpr(shape), relax.const(neutral, dtype_of(data)))
    return node.emit(relax.op.concat([node.emit(first), node.emit(kept)], axis))


CONVERTERS: dict[tuple[str, str], Converter] = {
    ("", "CumProd"): cumulative(relax.op.cumprod, 1),
    ("", "CumSum"): cumulative(relax.op.cumsum, 0),
}
