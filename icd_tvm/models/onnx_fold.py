"""Evaluate what does not depend on the inputs: shape chains and constant sub-graphs."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from icd_tvm.models.onnx_file import iter_graphs, skeleton, to_array
from icd_tvm.models.onnx_shapes import declared_shape

# Folding these would lose the quantised weights or freeze what must stay random.
NEVER_FOLDED = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Bernoulli",
        "Multinomial",
    }
)
# A folded value may be this large, or four times its inputs (int8 weights cast to float32).
MAX_NEW_BYTES = 4 << 20

StaticShapes = dict[str, tuple[int, ...]]


def fold_constants(model: onnx.ModelProto) -> None:
    """Replace every node that has a constant value by an initializer, in place.

    The initializer takes the name of the node's output. `Shape` and `Size` of a value with a
    static shape are constants. Nodes and initializers that nothing uses any more are removed,
    and so are graph inputs that only restate an initializer. Output shapes are filled in.

    Parameters
    ----------
    model : onnx.ModelProto
        With static input shapes; changed in place.
    """
    graph = model.graph
    _drop_shadow_inputs(graph)
    refused: set[str] = set()
    shapes = infer_static_shapes(model)
    while _fold_once(model, shapes, refused):
        shapes = infer_static_shapes(model)
    _drop_dead(graph)
    _fill_outputs(graph, shapes)


def infer_static_shapes(model: onnx.ModelProto) -> StaticShapes:
    """Return the shape of every value whose shape is static, by name."""
    inferred = onnx.shape_inference.infer_shapes(skeleton(model), data_prop=True).graph
    found: StaticShapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        sizes = declared_shape(value) if value.type.HasField("tensor_type") else None
        if sizes is not None and all(isinstance(size, int) for size in sizes):
            found[value.name] = tuple(int(size) for size in sizes if size is not None)
    return found


def _drop_shadow_inputs(graph: onnx.GraphProto) -> None:
    weights = {tensor.name for tensor in graph.initializer}
    for index in reversed(range(len(graph.input))):
        if graph.input[index].name in weights:
            del graph.input[index]


def _fold_once(model: onnx.ModelProto, shapes: StaticShapes, refused: set[str]) -> bool:
    """Fold in one topological sweep; return whether anything was folded."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    folded: list[int] = []
    for index, node in enumerate(graph.node):
        if node.output[0] in refused:
            continue
        tensors = _evaluate(model, node, constants, shapes)
        if tensors is None:
            continue
        if not tensors:
            refused.add(node.output[0])
            continue
        for tensor in tensors:
            graph.initializer.append(tensor)
            constants[tensor.name] = graph.initializer[-1]
        folded.append(index)
    for index in reversed(folded):
        del graph.node[index]
    return bool(folded)


def _evaluate(
    model: onnx.ModelProto,
    node: onnx.NodeProto,
    constants: dict[str, onnx.TensorProto],
    shapes: StaticShapes,
) -> list[onnx.TensorProto] | None:
    """Return a node's constant outputs, None if it may become one later, [] if it never will."""
    if node.domain not in ("", "ai.onnx") or node.op_type in NEVER_FOLDED:
        return []
    if node.op_type in ("Shape", "Size"):
        if node.input[0] not in shapes:
            return None
        # Only the shape matters: a broadcast zero stands for the value.
        feeds = {node.input[0]: np.broadcast_to(np.float32(0), shapes[node.input[0]])}
        return _run_node(model, node, feeds)
    if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
        return []
    names = [name for name in node.input if name]
    if not all(name in constants for name in names):
        return None
    limit = max(MAX_NEW_BYTES, 4 * sum(_tensor_bytes(constants[name]) for name in names))
    if any(_shape_elements(shapes, name) > limit for name in node.output):
        return []
    tensors = _run_node(model, node, {name: to_array(constants[name]) for name in names})
    if sum(_tensor_bytes(tensor) for tensor in tensors) > limit:
        return []
    return tensors


def _shape_elements(shapes: StaticShapes, name: str) -> int:
    return int(np.prod(shapes.get(name, ()), dtype=np.float64))


def _tensor_bytes(tensor: onnx.TensorProto) -> int:
    try:
        itemsize = int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    except KeyError:
        itemsize = 1
    return itemsize * int(np.prod(list(tensor.dims), dtype=np.float64))


def _run_node(
    model: onnx.ModelProto, node: onnx.NodeProto, feeds: dict[str, NDArray[Any]]
) -> list[onnx.TensorProto]:
    """Evaluate one node; an empty list means that it cannot be evaluated here."""
    outputs = [name for name in node.output if name]
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for name, a in feeds.items()
        if a.dtype.kind not in "OSU"
    ]
    if len(inputs) != len(feeds):
        return []
    empty = [helper.make_empty_tensor_value_info(name) for name in outputs]
    single = helper.make_model(
        helper.make_graph([node], "fold", inputs, empty), opset_imports=model.opset_import
    )
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            values = ReferenceEvaluator(single).run(outputs, feeds)
    except Exception:
        # Not a failure: the node stays in the graph and the importer or TVM decides.
        return []
    arrays = [value for value in values if isinstance(value, np.ndarray | np.generic)]
    if len(arrays) != len(outputs) or any(a.dtype.kind in "OSU" for a in arrays):
        return []
    return [
        numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        for name, array in zip(outputs, arrays, strict=True)
    ]


def _used_names(graph: onnx.GraphProto) -> set[str]:
    used = {value.name for sub in iter_graphs(graph) for value in sub.output}
    for sub in iter_graphs(graph):
        used.update(name for node in sub.node for name in node.input if name)
    return used


def _drop_dead(graph: onnx.GraphProto) -> None:
    """Remove nodes and initializers that no output depends on."""
    while True:
        used = _used_names(graph)
        dead = [i for i, node in enumerate(graph.node) if not used.intersection(node.output)]
        for index in reversed(dead):
            del graph.node[index]
        if not dead:
            break
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in used:
            del graph.initializer[index]


def _fill_outputs(graph: onnx.GraphProto, shapes: StaticShapes) -> None:
    for value in graph.output:
        tensor = value.type.tensor_type
        if value.name in shapes and not tensor.HasField("shape"):
            tensor.shape.SetInParent()
            for size in shapes[value.name]:
                tensor.shape.dim.add(dim_value=size)
