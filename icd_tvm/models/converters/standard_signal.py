"""Fourier transforms of constant length as products with a constant matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from icd_tvm._tvm import relax
from icd_tvm.models.converters.node import Converter, OnnxNode, dtype_of, with_name

# The matrix has length * bins entries; longer transforms need an FFT.
_MAX_LENGTH = 4096


def dft(node: OnnxNode) -> Any:
    """Discrete Fourier transform along one axis, forward or inverse, full or one-sided."""
    data = node.input(0)
    shape = node.shape(data)
    axis = int(node.attr("axis", 1))
    if node.opset >= 20:
        axis = int(node.constant(2, "the axis").reshape(-1)[0]) if node.has(2) else -2
    axis %= len(shape)
    if axis == len(shape) - 1:
        raise node.refuse("the axis holds the real and imaginary parts")
    inverse, onesided = bool(node.attr("inverse", 0)), bool(node.attr("onesided", 0))
    size = shape[axis]
    length = 2 * (size - 1) if inverse and onesided else size
    if node.has(1):
        length = int(node.constant(1, "the length").reshape(-1)[0])
    order = [i for i in range(len(shape) - 1) if i != axis] + [axis, len(shape) - 1]
    moved = node.emit(relax.op.permute_dims(data, order))
    result = transform(node, moved, length, inverse, onesided)
    return relax.op.permute_dims(result, list(np.argsort(order)))


def transform(node: OnnxNode, data: Any, length: int, inverse: bool, onesided: bool) -> Any:
    """Transform the last axis but one of ``(..., size, 1 or 2)``.

    Zeros stand for what is missing up to the length, what is beyond it is dropped.
    """
    if not 1 <= length <= _MAX_LENGTH:
        raise node.refuse(f"a transform of length {length} (at most {_MAX_LENGTH})")
    size, parts = node.shape(data)[-2:]
    real_output = inverse and onesided
    cosine, sine = _matrices(size, length, inverse, onesided, dtype_of(data))
    rows = [_part(node, data, index) for index in range(parts)]

    def product(row: Any, matrix: NDArray[Any]) -> Any:
        return node.emit(relax.op.matmul(row, with_name(matrix, "")))

    real, imaginary = product(rows[0], cosine), None
    if parts == 2:
        real = node.emit(relax.op.subtract(real, product(rows[1], sine)))
    if real_output:
        return node.emit(relax.op.expand_dims(real, -1))
    imaginary = product(rows[0], sine)
    if parts == 2:
        imaginary = node.emit(relax.op.add(imaginary, product(rows[1], cosine)))
    return node.emit(relax.op.stack([real, imaginary], -1))


def _part(node: OnnxNode, data: Any, index: int) -> Any:
    """Return the real (0) or imaginary (1) part."""
    axis = len(node.shape(data)) - 1
    return node.emit(relax.op.take(data, relax.const(index, "int64"), axis))


def _matrices(
    size: int, length: int, inverse: bool, onesided: bool, dtype: str
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the real and imaginary part of the transform as (size, bins) matrices."""
    half = length // 2 + 1
    bins = half if onesided and not inverse else length
    rows, columns = np.arange(size), np.arange(bins)
    angle = 2 * np.pi * (np.outer(rows, columns) % length) / length
    sign, factor = (1, 1 / length) if inverse else (-1, 1.0)
    weight = np.full((size, 1), factor)
    if inverse and onesided:
        # The missing half is the conjugate: every bin but the first and the middle counts twice.
        twice = (rows > 0) & (rows * 2 != length) & (rows < half)
        weight[twice] *= 2
        weight[rows >= half] = 0
    else:
        weight[rows >= length] = 0
    return (weight * np.cos(angle)).astype(dtype), (sign * weight * np.sin(angle)).astype(dtype)


def stft(node: OnnxNode) -> Any:
    """Fourier transform of overlapping windows of a signal ``(batch, length, 1 or 2)``."""
    signal = node.input(0)
    shape = node.shape(signal)
    if len(shape) == 2:
        signal = node.emit(relax.op.expand_dims(signal, -1))
        shape = (*shape, 1)
    step = int(node.constant(1, "the frame step").reshape(-1)[0])
    frame = shape[1]
    if node.has(2):
        frame = node.shape(node.input(2))[0]
    if node.has(3):
        frame = int(node.constant(3, "the frame length").reshape(-1)[0])
    count = (shape[1] - frame) // step + 1
    places = np.arange(count)[:, None] * step + np.arange(frame)[None, :]
    frames = node.emit(
        relax.op.take(signal, with_name(places.astype(np.int64), ""), 1, mode="clip")
    )
    if node.has(2):
        window = node.emit(relax.op.reshape(node.input(2), [1, 1, frame, 1]))
        frames = node.emit(relax.op.multiply(frames, window))
    return transform(node, frames, frame, False, bool(node.attr("onesided", 1)))


CONVERTERS: dict[tuple[str, str], Converter] = {
    ("", "DFT"): dft,
    ("", "STFT"): stft,
}
