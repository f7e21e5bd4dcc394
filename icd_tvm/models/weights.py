"""What every builder shares: sizes, named weights, random ones, and their checks."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from icd_tvm.errors import ConfigError, ShapeError

# Protobuf refuses to serialise more; graph and names need a little of it.
PROTO_LIMIT = 2**31 - 2**24

Float32 = NDArray[np.float32]
Weights = Mapping[str, Float32]
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Fill = Callable[[np.random.Generator, str, Shape], Float32]


class ShapedWeights(Mapping[str, Float32]):
    """Weights made or read when they are asked for, so that they never lie in memory whole.

    Parameters
    ----------
    shapes : mapping of str to tuple of int

    Attributes
    ----------
    notes : dict of str to str
        What a model's metadata says of them beside "trained" or "random".
    """

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self.notes: dict[str, str] = {}

    def __getitem__(self, name: str) -> Float32:
        raise NotImplementedError

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class RandomWeights(ShapedWeights):
    """Weights drawn when they are read.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
    fill : callable
        Takes a generator, a name and a shape; returns float32 values.
    seed : int
        The same seed and name give the same values, in whatever order they are read.
    """

    def __init__(self, shapes: Shapes, fill: Fill, seed: int) -> None:
        super().__init__(shapes)
        self.fill = fill
        self.seed = seed

    def __getitem__(self, name: str) -> Float32:
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        return self.fill(rng, name, self.shapes[name])


def normal(
    rng: np.random.Generator, shape: Shape, deviation: float = 1.0, mean: float = 0.0
) -> Float32:
    """Draw float32 values."""
    values = rng.standard_normal(shape, dtype=np.float32)
    return np.float32(mean) + np.float32(deviation) * values


def origin(weights: Weights, trained: bool) -> dict[str, str]:
    """Return what a model's metadata says about its weights."""
    notes = weights.notes if isinstance(weights, ShapedWeights) else {}
    return {"weights": "trained" if trained else "random", **notes}


def parameter_count(shapes: Shapes) -> int:
    """Return the number of weights."""
    return sum(int(np.prod(shape, dtype=object)) for shape in shapes.values())


def require_sizes(config: object, sizes: Mapping[str, int], least: int = 1) -> None:
    """Refuse sizes that are too small.

    Raises
    ------
    ConfigError
        Naming the first one.
    """
    for name, size in sizes.items():
        if size < least:
            raise ConfigError(f"{name} {size} must be at least {least} in {config}")


def check_weights(shapes: Shapes, weights: Weights) -> None:
    """Refuse missing weights and wrong shapes without reading or drawing any.

    Raises
    ------
    ShapeError
        Naming the weight.
    """
    known = weights.shapes if isinstance(weights, ShapedWeights) else None
    for name, shape in shapes.items():
        if name not in weights:
            raise ShapeError(f"weight {name!r} is missing")
        actual = known[name] if known is not None else tuple(weights[name].shape)
        if actual != shape:
            raise ShapeError(f"weight {name!r} has shape {list(actual)}, not {list(shape)}")


def check_proto_size(shapes: Shapes, data: Path | None, hint: str) -> None:
    """Refuse weights that a proto cannot hold when there is no data file.

    Raises
    ------
    ConfigError
        The weights are larger than `PROTO_LIMIT`.
    """
    total = 4 * parameter_count(shapes)
    if data is None and total > PROTO_LIMIT:
        raise ConfigError(f"{total / 1e9:.1f} GB of weights do not fit an ONNX proto (2 GB)", hint)
