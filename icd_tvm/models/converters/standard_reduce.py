"""Maximum and minimum reductions of types and values that TVM's do not cover."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from icd_tvm._tvm import relax, te, tirx
from icd_tvm.models.converters.node import Converter, OnnxNode, dtype_of, is_float, scalar


def reduce_extreme(maximum: bool) -> Converter:
    """Return the converter of ReduceMax or ReduceMin on bool and floats.

    TVM starts a float reduction from the largest finite value, so that the maximum of values
    that are all ``-inf`` (a fully masked row) would be finite.
    """

    def convert(node: OnnxNode) -> Any:
        data = node.input(0)
        if dtype_of(data) != "bool" and not is_float(data):
            return None
        axes = _axes(node)
        if axes is None:
            return data
        keep = bool(node.attr("keepdims", 1))
        if is_float(data):
            return _reduce_float(node, data, axes, keep, maximum)
        wide = node.emit(relax.op.astype(data, "int8"))
        reduce = relax.op.max if maximum else relax.op.min
        result = node.emit(reduce(wide, axes, keepdims=keep))
        return relax.op.greater(result, scalar(0, result))

    return convert


def _axes(node: OnnxNode) -> list[int] | None:
    """Return the axes to reduce, or None if there are none by ``noop_with_empty_axes``."""
    rank = len(node.shape(node.input(0)))
    given: Sequence[Any] = node.attr("axes", [])
    if node.opset >= 18:
        given = list(node.constant(1, "the axes").reshape(-1)) if node.has(1) else []
    if not len(given):
        return None if node.attr("noop_with_empty_axes", 0) else list(range(rank))
    return sorted({int(axis) % rank for axis in given})


def _reduce_float(node: OnnxNode, data: Any, axes: list[int], keep: bool, maximum: bool) -> Any:
    shape = node.shape(data)
    start = -math.inf if maximum else math.inf
    combine = tirx.max if maximum else tirx.min
    reducer = te.comm_reducer(
        lambda x, y: combine(x, y), lambda t: tirx.FloatImm(t, start), name="extreme"
    )
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    result_axes = range(len(shape)) if keep else kept
    new = [1 if axis in axes else shape[axis] for axis in result_axes]

    def kernel(values: Any) -> Any:
        loops = {axis: te.reduce_axis((0, shape[axis]), f"k{axis}") for axis in axes}

        def element(*place: Any) -> Any:
            own = dict(zip(result_axes, place, strict=True))
            index = [loops.get(axis, own.get(axis)) for axis in range(len(shape))]
            return reducer(values[tuple(index)], axis=list(loops.values()))

        return te.compute(tuple(tirx.IntImm("int64", s) for s in new), element, name="extreme")

    return node.bb.emit_te(kernel, data, primfunc_name_hint="max" if maximum else "min")


CONVERTERS: dict[tuple[str, str], Converter] = {
    ("", "ReduceMax"): reduce_extreme(True),
    ("", "ReduceMin"): reduce_extreme(False),
}
