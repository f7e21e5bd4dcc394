"""Random inputs that a model accepts, and checks of inputs that a user brings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from icd_tvm.errors import NonFiniteError, ShapeError
from icd_tvm.models.importer import ImportedModel, TensorSpec
from icd_tvm.models.onnx_file import to_array
from icd_tvm.models.onnx_fold import StaticShapes, infer_static_shapes

# A value that passes through one of these still holds the same indices.
MOVES = frozenset(
    {
        "Identity",
        "Cast",
        "Reshape",
        "Unsqueeze",
        "Squeeze",
        "Flatten",
        "Transpose",
        "Slice",
        "Split",
        "Expand",
        "Tile",
        "Concat",
    }
)
GATHERS = frozenset({"Gather", "GatherElements"})
# Input position of the indices and of the table of EmbedLayerNormalization (com.microsoft).
EMBED_TABLES = {0: 2, 1: 4}
MASKED_TAIL = 0.1


def index_limits(imported: ImportedModel) -> dict[str, int]:
    """Return how many rows the smallest table has that an integer input indexes.

    Follows each integer input through data movement and the addition of constants to the
    gathers that consume it.

    Returns
    -------
    dict of str to int
        Valid values of the input are ``0 <= value < limit``. An input that reaches no gather
        is absent.
    """
    shapes = infer_static_shapes(imported.model)
    limits: dict[str, int] = {}
    for spec in imported.inputs:
        if np.issubdtype(np.dtype(spec.dtype), np.integer):
            found = _table_sizes(imported.model.graph, spec.name, shapes)
            if found:
                limits[spec.name] = max(1, min(found))
    return limits


def _table_sizes(graph: onnx.GraphProto, name: str, shapes: StaticShapes) -> list[int]:
    """Return the sizes of the gathered axes, less any constant added to the index."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    offsets = {name: 0}
    sizes: list[int] = []
    for node in graph.node:
        for position, value in enumerate(node.input):
            if value not in offsets:
                continue
            table = _table_axis(node, position, shapes)
            if table is not None:
                sizes.append(table - offsets[value])
                continue
            added = _added_constant(node, position, constants)
            if added is not None:
                for output in node.output:
                    offsets.setdefault(output, offsets[value] + added)
    return sizes


def _table_axis(node: onnx.NodeProto, position: int, shapes: StaticShapes) -> int | None:
    """Return the size of the axis that a node input indexes, None if it indexes nothing."""
    if node.op_type in GATHERS and position == 1:
        axis = next((int(a.i) for a in node.attribute if a.name == "axis"), 0)
        shape = shapes.get(node.input[0])
        return shape[axis] if shape else None
    if node.op_type == "EmbedLayerNormalization" and position in EMBED_TABLES:
        shape = shapes.get(node.input[EMBED_TABLES[position]])
        return shape[0] if shape else None
    return None


def _added_constant(
    node: onnx.NodeProto, position: int, constants: dict[str, onnx.TensorProto]
) -> int | None:
    """Return what a node adds to an index it passes on, None if it does not pass it on."""
    if node.op_type in MOVES:
        return 0 if position == 0 or node.op_type == "Concat" else None
    other = node.input[1 - position] if len(node.input) == 2 else ""
    if node.op_type == "Add" and other in constants:
        array = to_array(constants[other])
        return int(array.max()) if array.dtype.kind in "iu" and array.size else None
    return None


def random_inputs(imported: ImportedModel, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Return one set of inputs the model accepts.

    Floating point inputs are standard normal. Integer inputs that index a table are uniform
    over its rows. Masks are ones whose last tenth along the last axis is zero: inputs with
    "mask" in their name, and integer or boolean inputs that index nothing.

    Parameters
    ----------
    imported : ImportedModel
    seed : int
        The same seed gives the same arrays.

    Returns
    -------
    dict of str to ndarray
        In the order, shapes and dtypes of ``imported.inputs``.
    """
    limits = index_limits(imported)
    feeds: dict[str, NDArray[Any]] = {}
    for position, spec in enumerate(imported.inputs):
        rng = np.random.default_rng([seed, position])
        feeds[spec.name] = _random_array(spec, limits.get(spec.name), rng)
    return feeds


def _random_array(spec: TensorSpec, limit: int | None, rng: np.random.Generator) -> NDArray[Any]:
    dtype = np.dtype(spec.dtype)
    integral = dtype.kind in "iub"
    if "mask" in spec.name.lower() or (integral and limit is None):
        return _mask(spec.shape).astype(dtype)
    if limit is not None:
        return rng.integers(0, min(limit, np.iinfo(dtype).max), spec.shape).astype(dtype)
    return rng.standard_normal(spec.shape, dtype=np.float32).astype(dtype)


def _mask(shape: tuple[int, ...]) -> NDArray[np.int64]:
    mask = np.ones(shape, dtype=np.int64)
    if shape and shape[-1] > 1:
        mask[..., shape[-1] - max(1, round(MASKED_TAIL * shape[-1])) :] = 0
    return mask


def validate_inputs(imported: ImportedModel, feeds: Mapping[str, NDArray[Any]]) -> None:
    """Check that inputs fit the model before they reach compiled code.

    Raises
    ------
    ShapeError
        A missing or unknown input, a wrong shape or dtype, or an index outside its table.
    NonFiniteError
        NaN or infinity in an input.
    """
    names = [spec.name for spec in imported.inputs]
    for name in feeds:
        if name not in names:
            raise ShapeError(f"unknown input {name!r}", f"inputs: {', '.join(names)}")
    for spec in imported.inputs:
        if spec.name not in feeds:
            raise ShapeError(f"input {spec.name!r} is missing", f"inputs: {', '.join(names)}")
        _check_array(spec, np.asarray(feeds[spec.name]))
    for name, limit in index_limits(imported).items():
        array = np.asarray(feeds[name])
        if array.size and not (-limit <= array.min() and array.max() < limit):
            raise ShapeError(
                f"input {name!r} holds {array.min()} to {array.max()}, outside [0, {limit})"
            )


def _check_array(spec: TensorSpec, array: NDArray[Any]) -> None:
    if tuple(array.shape) != spec.shape:
        raise ShapeError(f"input {spec.name!r} has shape {array.shape}, not {spec.shape}")
    if array.dtype != np.dtype(spec.dtype):
        raise ShapeError(f"input {spec.name!r} has dtype {array.dtype}, not {spec.dtype}")
    if array.dtype.kind not in "iub" and not np.isfinite(array).all():
        raise NonFiniteError(f"input {spec.name!r} holds NaN or infinity")
