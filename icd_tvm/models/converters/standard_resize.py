"""Resize and Upsample with static sizes, one axis at a time as a weighted sum of gathers.

Coordinates and kernels follow the ONNX definition of Resize: a kernel of a support of 1 (linear)
or 2 (cubic) samples around the source coordinate, wider by ``1 / scale`` with antialias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from icd_tvm._tvm import relax
from icd_tvm.models.converters.node import (
    Converter,
    OnnxNode,
    cast,
    dtype_of,
    is_float,
    scalar,
    with_name,
)
from icd_tvm.models.converters.standard_activation import widen

Floats: TypeAlias = NDArray[np.float64]

_NEAREST: dict[str, Callable[[Floats], Floats]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}
_POLICIES: dict[str, Callable[[list[float]], float]] = {"not_larger": min, "not_smaller": max}


@dataclass(frozen=True)
class _Axis:
    """How one axis changes: sizes, factor and the region of interest."""

    axis: int
    old: int
    new: int
    scale: float
    start: float = 0.0
    end: float = 1.0

    @property
    def is_identity(self) -> bool:
        return self.old == self.new and self.scale == 1.0 and (self.start, self.end) == (0.0, 1.0)


def resize(node: OnnxNode) -> Any:
    """Resize with constant sizes or scales."""
    if node.opset < 11:
        return _legacy(node, node.constant(1, "the scales"))
    node.allow(
        {
            "mode": ("nearest", "linear", "cubic"),
            "nearest_mode": tuple(_NEAREST),
            "keep_aspect_ratio_policy": ("stretch", *_POLICIES),
        }
    )
    data = node.input(0)
    plan = _plan(node, node.shape(data))
    mode = str(node.attr("coordinate_transformation_mode", "half_pixel"))
    places = {item.axis: _coordinates(node, item, mode) for item in plan}
    result = data
    for item in plan:
        if not item.is_identity:
            result = _resample(node, result, item, places[item.axis])
    result = cast(result, dtype_of(data))
    if mode != "tf_crop_and_resize":
        return result
    return _extrapolate(node, result, plan, places)


def upsample(node: OnnxNode) -> Any:
    """Upsample, the ancestor of Resize: asymmetric coordinates, rounded down."""
    attribute = node.attrs.get("scales")
    if attribute is None and node.opset < 9:
        raise node.refuse("attribute scales is missing")
    return _legacy(node, np.asarray(attribute) if attribute else node.constant(1, "the scales"))


def _legacy(node: OnnxNode, scales: NDArray[Any]) -> Any:
    node.allow({"mode": ("nearest", "linear", "bilinear")})
    data = result = node.input(0)
    for axis, (size, scale) in enumerate(zip(node.shape(data), scales.tolist(), strict=True)):
        item = _Axis(axis, size, int(np.floor(size * scale)), float(scale))
        if not item.is_identity:
            places = np.arange(item.new) / item.scale
            result = _resample(node, result, item, places, nearest="floor")
    return cast(result, dtype_of(data))


def _plan(node: OnnxNode, shape: tuple[int, ...]) -> list[_Axis]:
    axes = [int(axis) % len(shape) for axis in node.attr("axes", range(len(shape)))]
    old = [shape[axis] for axis in axes]
    scales, sizes = _factors(node, old)
    if len(scales) != len(axes):
        raise node.refuse(f"{len(scales)} sizes or scales for {len(axes)} axes")
    region = [0.0] * len(axes) + [1.0] * len(axes)
    if node.attr("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        region = [float(value) for value in node.constant(1, "the region of interest")]
    return [
        _Axis(axis, old[i], sizes[i], scales[i], region[i], region[len(axes) + i])
        for i, axis in enumerate(axes)
    ]


def _factors(node: OnnxNode, old: list[int]) -> tuple[list[float], list[int]]:
    """Return the scale and the new size of each axis."""
    given = node.array(2)
    if given is not None and given.size:
        scales = [float(scale) for scale in given]
        return scales, [int(np.floor(s * size)) for s, size in zip(scales, old, strict=False)]
    if node.has(2) and given is None:
        raise node.refuse("the scales (input 2) are not a constant")
    sizes = [int(size) for size in node.constant(3, "the sizes")]
    scales = [new / size for new, size in zip(sizes, old, strict=False)]
    policy = str(node.attr("keep_aspect_ratio_policy", "stretch"))
    if policy in _POLICIES:
        scale = _POLICIES[policy](scales)
        scales = [scale] * len(scales)
        sizes = [int(np.floor(scale * size + 0.5)) for size in old]
    return scales, sizes


def _coordinates(node: OnnxNode, item: _Axis, mode: str) -> Floats:
    """Return the source coordinate of every output element along an axis."""
    out = np.arange(item.new, dtype=np.float64)
    width = item.scale * item.old
    last = item.old - 1
    if mode == "asymmetric":
        return out / item.scale
    if mode == "align_corners":
        return np.zeros_like(out) if width == 1 else out * last / (width - 1)
    if mode == "tf_crop_and_resize":
        span = (item.end - item.start) * last
        inner = np.full_like(out, span / 2) if width == 1 else out * span / (width - 1)
        return item.start * last + inner
    if mode == "pytorch_half_pixel" and width == 1:
        return np.full_like(out, -0.5)
    half = (out + 0.5) / item.scale - 0.5
    if mode == "half_pixel_symmetric":
        return item.old / 2 * (1 - item.new / width) + half
    if mode in ("half_pixel", "pytorch_half_pixel"):
        return half
    raise node.refuse(f"attribute coordinate_transformation_mode = {mode!r} is not supported")


def _resample(node: OnnxNode, data: Any, item: _Axis, places: Floats, nearest: str = "") -> Any:
    """Return the data resampled along one axis."""
    if node.attr("mode", "nearest") == "nearest":
        rounding = _NEAREST[nearest or str(node.attr("nearest_mode", "round_prefer_floor"))]
        index = np.clip(rounding(places), 0, item.old - 1)
        return _take(node, data, index, item.axis)
    indices, weights = _taps(node, item, places)
    wide = widen(node, data) if is_float(data) else node.emit(cast(data, "float32"))
    total = None
    for index, weight in zip(indices, weights, strict=True):
        shape = [1] * len(node.shape(data))
        shape[item.axis] = item.new
        factor = with_name(weight.astype(dtype_of(wide)).reshape(shape), "")
        part = relax.op.multiply(_take(node, wide, index, item.axis), factor)
        total = node.emit(part if total is None else relax.op.add(total, part))
    return total


def _take(node: OnnxNode, data: Any, index: Floats, axis: int) -> Any:
    return node.emit(relax.op.take(data, with_name(index.astype(np.int64), ""), axis, mode="clip"))


def _taps(node: OnnxNode, item: _Axis, places: Floats) -> tuple[Floats, Floats]:
    """Return source indices and weights, one row a tap."""
    cubic = node.attr("mode", "nearest") == "cubic"
    antialias = bool(node.attr("antialias", 0))
    exclude = bool(node.attr("exclude_outside", 0))
    squeeze = min(item.scale, 1.0) if antialias else 1.0
    reach = int(np.ceil((2 if cubic else 1) / squeeze))
    offsets = np.arange(1.0 - reach, reach + 1.0)[:, None]
    indices: Floats = np.floor(places)[None, :] + offsets
    distance = np.abs((indices - places[None, :]) * squeeze)
    coefficient = float(node.attr("cubic_coeff_a", -0.75))
    weights = _cubic(distance, coefficient) if cubic else np.clip(1 - distance, 0, None)
    if exclude:
        weights = np.where((indices < 0) | (indices >= item.old), 0.0, weights)
    if antialias or exclude:
        weights = weights / weights.sum(axis=0, keepdims=True)
    used = np.any(weights != 0, axis=1)
    return np.clip(indices, 0, item.old - 1)[used], weights[used]


def _cubic(x: Floats, a: float) -> Floats:
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _extrapolate(node: OnnxNode, data: Any, plan: list[_Axis], places: dict[int, Floats]) -> Any:
    """Put the extrapolation value where a coordinate leaves the input."""
    inside = np.ones((1,) * len(node.shape(data)), dtype=bool)
    for item in plan:
        shape = [1] * inside.ndim
        shape[item.axis] = item.new
        here = (places[item.axis] >= 0) & (places[item.axis] <= item.old - 1)
        inside = inside & here.reshape(shape)
    if inside.all():
        return data
    value = scalar(float(node.attr("extrapolation_value", 0.0)), data)
    return node.emit(relax.op.where(with_name(inside, ""), data, value))


CONVERTERS: dict[tuple[str, str], Converter] = {
    ("", "Resize"): resize,
    ("", "Upsample"): upsample,
}
