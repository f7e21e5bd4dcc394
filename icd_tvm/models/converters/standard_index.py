"""Operators that place elements by index: one-hot, reversal, caches, column blocks."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from onnx import helper

from icd_tvm._tvm import relax
from icd_tvm.models.converters.node import Converter, OnnxNode, cast, dtype_of, scalar, with_name


def one_hot(node: OnnxNode) -> Any:
    """``on`` where the new axis equals the index (modulo depth), ``off`` elsewhere."""
    indices, values = node.input(0), node.input(2)
    depth = int(node.constant(1, "the depth").reshape(-1)[0])
    shape = node.shape(indices)
    axis = int(node.attr("axis", -1)) % (len(shape) + 1)
    places = node.emit(relax.op.expand_dims(cast(indices, "int64"), axis))
    low = relax.const(0, "int64")
    wrapped = relax.op.where(
        relax.op.less(places, low), relax.op.add(places, relax.const(depth, "int64")), places
    )
    column = [1] * (len(shape) + 1)
    column[axis] = depth
    classes = with_name(np.arange(depth, dtype=np.int64).reshape(column), "")
    hit = node.emit(relax.op.equal(node.emit(wrapped), classes))
    off, on = (
        node.emit(relax.op.reshape(relax.op.take(values, relax.const(i, "int64"), 0), []))
        for i in (0, 1)
    )
    return relax.op.where(hit, on, off)


def eye_like(node: OnnxNode) -> Any:
    """Ones on the k-th diagonal of a matrix of the input's shape."""
    rows, columns = node.shape(node.input(0))
    value = np.eye(rows, columns, int(node.attr("k", 0)), dtype=np.float32)
    dtype = dtype_of(node.input(0))
    if "dtype" in node.attrs:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(node.attrs["dtype"])).name
    return cast(with_name(value, node.name), dtype)


def reverse_sequence(node: OnnxNode) -> Any:
    """Reverse the first ``sequence_lens[b]`` elements along the time axis of each batch row."""
    data, lengths = node.input(0), node.input(1)
    shape = node.shape(data)
    time, batch = int(node.attr("time_axis", 0)), int(node.attr("batch_axis", 1))
    steps = _along(np.arange(shape[time]), time, len(shape))
    column = [1] * len(shape)
    column[batch] = shape[batch]
    lengths = node.emit(relax.op.reshape(cast(lengths, "int64"), column))
    mirrored = relax.op.subtract(relax.op.subtract(lengths, relax.const(1, "int64")), steps)
    inside = relax.op.less(steps, lengths)
    source = node.emit(relax.op.where(inside, mirrored, steps))
    source = node.emit(relax.op.broadcast_to(source, relax.ShapeExpr(shape)))
    return relax.op.gather_elements(data, source, time)


def tensor_scatter(node: OnnxNode) -> Any:
    """Write an update into a cache at a start position per batch row."""
    node.allow({"mode": ("linear", "circular")})
    cache, update = node.input(0), node.input(1)
    shape, new = node.shape(cache), node.shape(update)
    axis = int(node.attr("axis", -2)) % len(shape)
    size, count = shape[axis], new[axis]
    steps = _along(np.arange(size), axis, len(shape))
    starts: Any = relax.const(0, "int64")
    if node.has(2):
        column = [shape[0]] + [1] * (len(shape) - 1)
        starts = node.emit(relax.op.reshape(cast(node.input(2), "int64"), column))
    offset = node.emit(relax.op.subtract(steps, starts))
    if node.attr("mode", "linear") == "circular":
        offset = node.emit(relax.op.floor_mod(offset, relax.const(size, "int64")))
    low, high = relax.const(0, "int64"), relax.const(count, "int64")
    fresh = relax.op.logical_and(relax.op.greater_equal(offset, low), relax.op.less(offset, high))
    target = relax.ShapeExpr(shape)
    fresh = node.emit(relax.op.broadcast_to(node.emit(fresh), target))
    source = relax.op.clip(offset, 0, count - 1)
    source = node.emit(relax.op.broadcast_to(node.emit(source), target))
    gathered = node.emit(relax.op.gather_elements(update, source, axis))
    return relax.op.where(fresh, gathered, cache)


def _along(values: np.ndarray[Any, Any], axis: int, rank: int) -> Any:
    """Return an int64 constant that varies along one axis only."""
    shape = [1] * rank
    shape[axis] = values.size
    return with_name(values.astype(np.int64).reshape(shape), "")


def column_to_image(node: OnnxNode) -> Any:
    """Sum the blocks of a column matrix at their places in the image (Col2Im)."""
    data = node.input(0)
    image = [int(size) for size in node.constant(1, "the image shape")]
    block = [int(size) for size in node.constant(2, "the block shape")]
    batch, rows, blocks = node.shape(data)
    taps = int(np.prod(block))
    index, inside = _block_places(node, image, block, blocks)
    flat = node.emit(relax.op.reshape(data, [batch, rows // taps, taps * blocks]))
    gathered = node.emit(relax.op.take(flat, with_name(index, ""), 2, mode="clip"))
    kept = relax.op.where(with_name(inside, ""), gathered, scalar(0, data))
    total = node.emit(relax.op.sum(node.emit(kept), 2))
    return relax.op.reshape(total, [batch, rows // taps, *image])


def _block_places(
    node: OnnxNode, image: list[int], block: list[int], blocks: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """For each tap and pixel, return its flat index in ``taps * blocks`` and if it has one."""
    rank = len(image)
    strides = list(node.attr("strides", [1] * rank))
    dilations = list(node.attr("dilations", [1] * rank))
    pads = list(node.attr("pads", [0] * 2 * rank))
    counts = [
        (image[d] + pads[d] + pads[rank + d] - dilations[d] * (block[d] - 1) - 1) // strides[d] + 1
        for d in range(rank)
    ]
    if int(np.prod(counts)) != blocks:
        raise node.refuse(f"{blocks} blocks do not tile the image ({np.prod(counts)} would)")
    pixels = np.indices(image).reshape(rank, -1)
    indices, insides = [], []
    for tap, place in enumerate(itertools.product(*map(range, block))):
        index = np.zeros(pixels.shape[1], np.int64)
        inside = np.ones(pixels.shape[1], bool)
        for d in range(rank):
            shifted = pixels[d] + pads[d] - place[d] * dilations[d]
            step = shifted // strides[d]
            inside &= (shifted % strides[d] == 0) & (step >= 0) & (step < counts[d])
            index = index * counts[d] + np.clip(step, 0, counts[d] - 1)
        indices.append(tap * blocks + index)
        insides.append(inside)
    return np.stack(indices), np.stack(insides)


CONVERTERS: dict[tuple[str, str], Converter] = {
    ("", "Col2Im"): column_to_image,
    ("", "EyeLike"): eye_like,
    ("", "OneHot"): one_hot,
    ("", "ReverseSequence"): reverse_sequence,
    ("", "TensorScatter"): tensor_scatter,
}
