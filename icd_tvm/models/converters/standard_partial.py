"""Operators that TVM's frontend converts in part: corrected where possible, refused elsewhere."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icd_tvm._tvm import onnx_frontend, relax
from icd_tvm.models.converters.node import (
    Converter,
    OnnxNode,
    cast,
    dtype_of,
    is_float,
    scalar,
    with_name,
)
from icd_tvm.models.converters.products import matmul
from icd_tvm.models.converters.standard_activation import widen

_NARROW = ("float16", "bfloat16")


def through_tvm(
    node: OnnxNode, inputs: Sequence[Any], changes: Mapping[str, Any] | None = None
) -> Any:
    """Return what TVM's converter makes of the node with other inputs or attributes."""
    attrs = {name: _for_tvm(value) for name, value in {**node.attrs, **(changes or {})}.items()}
    attrs["tvm_custom"] = {"name": node.name, "num_outputs": len(node.outputs)}
    convert = onnx_frontend._get_convert_map()[node.op].get_converter(node.opset)
    given = onnx_frontend.onnx_input()
    given.extend(inputs)
    return convert(node.bb, given, attrs, [dict(node.scope), {}])


def _for_tvm(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode()
    return tuple(value) if isinstance(value, list) else value


def matrix_product(node: OnnxNode) -> Any:
    """MatMul of 16-bit floats, summed in float32; other types are TVM's."""
    left, right = node.input(0), node.input(1)
    return matmul(node, left, right) if dtype_of(left) in _NARROW else None


def widened(node: OnnxNode) -> Any:
    """An operator on 16-bit floats, computed in float32; other types are TVM's."""
    data = node.input(0)
    if dtype_of(data) not in _NARROW:
        return None
    inputs = [None if expr is None else widen(node, expr) for expr in node.inputs]
    return cast(node.emit(through_tvm(node, inputs)), dtype_of(data))


def transposed_convolution(node: OnnxNode) -> Any:
    """ConvTranspose; ``output_shape`` decides the pads, and what they lack is padded after."""
    target = node.attrs.get("output_shape")
    if not target:
        return widened(node)
    shape, kernel = node.shape(node.input(0)), node.shape(node.input(1))
    rank = len(shape) - 2
    strides = list(node.attr("strides", [1] * rank))
    dilations = list(node.attr("dilations", [1] * rank))
    extra = list(node.attr("output_padding", [0] * rank))
    before, after = [0] * rank, [0] * rank
    for d, size in enumerate(list(target)[-rank:]):
        full = strides[d] * (shape[2 + d] - 1) + dilations[d] * (kernel[2 + d] - 1) + 1
        surplus = full + extra[d] - int(size)
        if surplus < 0:
            extra[d] -= surplus
            surplus = 0
        upper = node.attr("auto_pad", "NOTSET") == "SAME_UPPER"
        before[d] = surplus // 2 if upper else surplus - surplus // 2
        after[d] = surplus - before[d]
    if any(size >= stride for size, stride in zip(extra, strides, strict=True)):
        raise node.refuse(f"output_shape {list(target)} is larger than the stride allows")
    changes = {"pads": before + after, "output_padding": extra, "auto_pad": "NOTSET"}
    return through_tvm(node, node.inputs, changes)


def non_max_suppression(node: OnnxNode) -> Any:
    """NonMaxSuppression with constant limits; boxes at the threshold itself are kept."""
    limits = [node.constant(i, "a limit") if node.has(i) else None for i in (2, 3, 4)]
    inputs = [node.input(0), node.input(1)]
    for position, limit in enumerate(limits, start=2):
        if position == 3 and limit is not None:
            # ONNX suppresses above the threshold, TVM at it.
            above = np.nextafter(limit.astype(np.float32), np.float32(np.inf))
            inputs.append(with_name(above, ""))
        else:
            inputs.append(node.optional(position))
    return through_tvm(node, inputs)


def roi_align(node: OnnxNode) -> Any:
    """RoiAlign by average; ONNX's ``max`` takes the largest weighted corner, TVM's does not."""
    if node.attr("mode", "avg") != "avg":
        raise node.refuse(f"attribute mode = {node.attr('mode', '')!r} is not supported")
    return None


def top_k(node: OnnxNode) -> Any:
    """TopK of the types TVM sorts."""
    if dtype_of(node.input(0)) in ("uint64", "uint32", "uint16"):
        raise node.refuse(f"input of {dtype_of(node.input(0))}")
    return None


def sequence_insert(node: OnnxNode) -> Any:
    """SequenceInsert; a negative position counts from the end, as in Python's ``insert``."""
    if not node.has(2):
        return None
    position = int(node.constant(2, "the position").reshape(-1)[0])
    if position < 0:
        position += len(node.input(0).ty.fields)
    place = relax.const(position, "int64")
    return through_tvm(node, [node.input(0), node.input(1), place])


def split_to_sequence(node: OnnxNode) -> Any:
    """SplitToSequence by a constant chunk size or list of sizes; one by one without."""
    data = node.input(0)
    shape = node.shape(data)
    axis = int(node.attr("axis", 0)) % len(shape)
    split = node.constant(1, "the split") if node.has(1) else np.asarray(1)
    if split.ndim == 0:
        step = int(split)
        edges = [*range(0, shape[axis], step), shape[axis]]
    else:
        edges = [0, *np.cumsum(split).tolist()]
    if edges[-1] != shape[axis]:
        raise node.refuse(f"sizes that add up to {edges[-1]}, not {shape[axis]}")
    pieces = []
    for low, high in itertools.pairwise(edges):
        piece = node.emit(relax.op.strided_slice(data, [axis], [low], [high]))
        if not node.has(1) and not node.attr("keepdims", 1):
            piece = node.emit(relax.op.squeeze(piece, axis))
        pieces.append(piece)
    return relax.Tuple(pieces)


def max_pool(node: OnnxNode) -> Any:
    """MaxPool with the flat index of each maximum, from the windows spelled out."""
    if not node.wants(1):
        return None
    data = node.input(0)
    shape = node.shape(data)
    node.allow({"auto_pad": ("NOTSET", "VALID"), "ceil_mode": (0,)})
    out, places, inside = _windows(node, shape[2:])
    pixels = int(np.prod(shape[2:]))
    flat = node.emit(relax.op.reshape(data, [shape[0] * shape[1], pixels]))
    window = node.emit(relax.op.take(flat, with_name(places, ""), 1, mode="clip"))
    low = -np.inf if is_float(data) else np.iinfo(dtype_of(data)).min
    kept = node.emit(relax.op.where(with_name(inside, ""), window, scalar(low, data)))
    winner = node.emit(relax.op.argmax(kept, -1, keepdims=True))
    best = node.emit(relax.op.gather_elements(kept, winner, 2))
    rows = np.arange(shape[0] * shape[1])[:, None, None] * pixels
    order = _storage_order(node, places, shape[2:])
    table = with_name(np.broadcast_to(rows + order, (rows.size, *places.shape)).copy(), "")
    index = node.emit(relax.op.gather_elements(table, winner, 2))
    target = [shape[0], shape[1], *out]
    return relax.op.reshape(best, target), relax.op.reshape(index, target)


def _windows(
    node: OnnxNode, image: tuple[int, ...]
) -> tuple[list[int], NDArray[Any], NDArray[Any]]:
    """Return the output size, and of each window the flat pixels and which of them exist."""
    rank = len(image)
    kernel = [int(size) for size in node.required("kernel_shape")]
    strides = list(node.attr("strides", [1] * rank))
    dilations = list(node.attr("dilations", [1] * rank))
    pads = list(node.attr("pads", [0] * 2 * rank))
    out = [
        (image[d] + pads[d] + pads[rank + d] - dilations[d] * (kernel[d] - 1) - 1) // strides[d] + 1
        for d in range(rank)
    ]
    steps, taps = np.indices(out).reshape(rank, -1), np.indices(kernel).reshape(rank, -1)
    places = np.zeros((steps.shape[1], taps.shape[1]), np.int64)
    inside = np.ones(places.shape, bool)
    for d in range(rank):
        at = steps[d][:, None] * strides[d] + taps[d][None, :] * dilations[d] - pads[d]
        inside &= (at >= 0) & (at < image[d])
        places = places * image[d] + np.clip(at, 0, image[d] - 1)
    return out, places, inside


def _storage_order(node: OnnxNode, places: NDArray[Any], image: tuple[int, ...]) -> NDArray[Any]:
    if not node.attr("storage_order", 0):
        return places
    axes = np.unravel_index(places, image)
    return np.ravel_multi_index(tuple(reversed(axes)), tuple(reversed(image)))


CONVERTERS: dict[tuple[str, str], Converter] = {
    ("", "Conv"): widened,
    ("", "ConvTranspose"): transposed_convolution,
    ("", "Gemm"): widened,
    ("", "MatMul"): matrix_product,
    ("", "MaxPool"): max_pool,
    ("", "NonMaxSuppression"): non_max_suppression,
    ("", "RoiAlign"): roi_align,
    ("", "SequenceInsert"): sequence_insert,
    ("", "SplitToSequence"): split_to_sequence,
    ("", "TopK"): top_k,
}
