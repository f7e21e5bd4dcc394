"""Resolve control flow that is decided before compilation: constant If, short counted Loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import onnx
from onnx import helper, numpy_helper

from icd_tvm.models.onnx_file import to_array

# A longer loop would make a module of thousands of bindings.
MAX_TRIPS = 64
# Operators without a converter that may be gone after this step.
UNROLLED_OPS = frozenset({"Loop"})

Names: TypeAlias = dict[str, str]


def unroll_control_flow(model: onnx.ModelProto) -> bool:
    """Replace such nodes by the nodes of their bodies, in place.

    An `If` qualifies when its condition is an initializer, a `Loop` when its trip count is one,
    is at most `MAX_TRIPS`, and its condition is never false.

    Returns
    -------
    bool
        Whether anything was replaced; fold and call again until nothing is.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    changed = False
    for node in graph.node:
        new = _resolve(node, constants, graph, _opset(model))
        nodes.extend([node] if new is None else new)
        changed = changed or new is not None
    if changed:
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(kept)
    return changed


def _opset(model: onnx.ModelProto) -> int:
    return next((int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)


def _resolve(
    node: onnx.NodeProto,
    constants: Mapping[str, onnx.TensorProto],
    graph: onnx.GraphProto,
    opset: int,
) -> list[onnx.NodeProto] | None:
    """Return the nodes that stand for a node, or None if it stays."""
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "If" and node.input[0] in constants:
        taken = bool(to_array(constants[node.input[0]]).reshape(-1)[0])
        body = _attribute(node, "then_branch" if taken else "else_branch")
        nodes, results = _splice(body, {}, f"{node.output[0]}/", graph)
        return [*nodes, *_identities(results, node.output)]
    if node.op_type == "Loop":
        trips = _trip_count(node, constants)
        return None if trips is None else _unrolled(node, trips, graph, opset)
    return None


def _attribute(node: onnx.NodeProto, name: str) -> onnx.GraphProto:
    return next(attribute.g for attribute in node.attribute if attribute.name == name)


def _identities(sources: Sequence[str], targets: Sequence[str]) -> list[onnx.NodeProto]:
    pairs = zip(sources, targets, strict=True)
    return [helper.make_node("Identity", [old], [new]) for old, new in pairs if new]


def _trip_count(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> int | None:
    """Return how often a Loop runs, or None if that is not known, endless or too long."""
    body = _attribute(node, "body")
    condition = node.input[1] if len(node.input) > 1 else ""
    if condition:
        if condition not in constants:
            return None
        if not to_array(constants[condition]).reshape(-1)[0]:
            return 0
    if not node.input[0] or node.input[0] not in constants or not _goes_on(body):
        return None
    trips = max(0, int(to_array(constants[node.input[0]]).reshape(-1)[0]))
    return trips if trips <= MAX_TRIPS else None


def _goes_on(body: onnx.GraphProto) -> bool:
    """Tell whether the condition a body returns is its own input or the constant true."""
    producers = {name: node for node in body.node for name in node.output}
    stored = {tensor.name: tensor for tensor in body.initializer}
    name = body.output[0].name
    while name in producers and producers[name].op_type == "Identity":
        name = producers[name].input[0]
    if name == body.input[1].name:
        return True
    if name in stored:
        return bool(to_array(stored[name]).reshape(-1)[0])
    node = producers.get(name)
    if node is None or node.op_type != "Constant" or node.attribute[0].name != "value":
        return False
    return bool(to_array(node.attribute[0].t).reshape(-1)[0])


def _unrolled(
    node: onnx.NodeProto, trips: int, graph: onnx.GraphProto, opset: int
) -> list[onnx.NodeProto] | None:
    body = _attribute(node, "body")
    label = next(name for name in node.output if name)
    states = list(node.input[2:])
    count = len(states)
    if trips == 0 and any(node.output[count:]):
        return None
    nodes: list[onnx.NodeProto] = []
    scans: list[list[str]] = [[] for _ in body.output[1 + count :]]
    for trip in range(trips):
        prefix = f"{label}/{trip}/"
        bound = {
            body.input[0].name: _store(graph, f"{prefix}trip", np.int64(trip)),
            body.input[1].name: _store(graph, f"{prefix}condition", np.bool_(True)),
            **{value.name: old for value, old in zip(body.input[2:], states, strict=True)},
        }
        copied, results = _splice(body, bound, prefix, graph)
        nodes.extend(copied)
        states = results[1 : 1 + count]
        for values, name in zip(scans, results[1 + count :], strict=True):
            values.append(name)
    nodes.extend(_identities(states, node.output[:count]))
    for values, target in zip(scans, node.output[count:], strict=False):
        if target:
            nodes.extend(_stacked(values, target, graph, opset))
    return nodes


def _store(graph: onnx.GraphProto, name: str, value: np.generic) -> str:
    graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def _stacked(
    values: list[str], target: str, graph: onnx.GraphProto, opset: int
) -> list[onnx.NodeProto]:
    """Return the nodes that stack values along a new first axis."""
    rows = [f"{target}/row{i}" for i in range(len(values))]
    if opset < 13:
        nodes = [
            helper.make_node("Unsqueeze", [old], [row], axes=[0])
            for old, row in zip(values, rows, strict=True)
        ]
    else:
        graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int64), f"{target}/first"))
        nodes = [
            helper.make_node("Unsqueeze", [old, f"{target}/first"], [row])
            for old, row in zip(values, rows, strict=True)
        ]
    return [*nodes, helper.make_node("Concat", rows, [target], axis=0)]


def _splice(
    body: onnx.GraphProto, bound: Names, prefix: str, graph: onnx.GraphProto
) -> tuple[list[onnx.NodeProto], list[str]]:
    """Copy a body; return its nodes under new names and the names of its outputs."""
    names = dict(bound)
    names.update({t.name: prefix + t.name for t in body.initializer})
    names.update({o: prefix + o for node in body.node for o in node.output if o})
    for tensor in body.initializer:
        graph.initializer.append(tensor)
        graph.initializer[-1].name = names[tensor.name]
    nodes = [_renamed(node, names, prefix) for node in body.node]
    return nodes, [names.get(value.name, value.name) for value in body.output]


def _renamed(node: onnx.NodeProto, names: Names, prefix: str) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name = prefix + node.name if node.name else ""
    copy.input[:] = [names.get(name, name) for name in node.input]
    copy.output[:] = [names.get(name, name) for name in node.output]
    for attribute in copy.attribute:
        for nested in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
            _rename_outer(nested, names)
    return copy


def _rename_outer(graph: onnx.GraphProto, names: Names) -> None:
    """Rename, in place, what a nested graph takes from outside."""
    own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    own |= {name for node in graph.node for name in node.output}
    outer = {old: new for old, new in names.items() if old not in own}
    for node in graph.node:
        node.input[:] = [outer.get(name, name) for name in node.input]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename_outer(attribute.g, outer)
    for value in graph.output:
        value.name = outer.get(value.name, value.name)
