"""Replace operators that have no converter by the function body of their ONNX schema."""

from __future__ import annotations

import onnx
from onnx import inliner

from icd_tvm.models.onnx_file import iter_graphs
from icd_tvm.models.onnx_ops import ONNX_DOMAINS, has_converter, model_opset

# Bodies use other functions: SoftmaxCrossEntropyLoss, NegativeLogLikelihoodLoss, Reduce*.
MAX_DEPTH = 4


def expand_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with such operators expanded; the model itself if there are none.

    Parameters
    ----------
    model : onnx.ModelProto
        Not changed. What cannot be expanded stays and is refused with the other operators
        that lack a converter.
    """
    for _ in range(MAX_DEPTH):
        wanted = _expandable(model)
        if not wanted:
            break
        model = _with_defaults(model, wanted)
        try:
            model = inliner.inline_selected_functions(
                model, sorted(wanted), inline_schema_functions=True
            )
        except Exception:
            break
    return model


def _expandable(model: onnx.ModelProto) -> set[tuple[str, str]]:
    """Return domain and name of every operator that only its function body can convert."""
    opset = model_opset(model)
    return {
        (node.domain, node.op_type)
        for graph in iter_graphs(model.graph)
        for node in graph.node
        if not has_converter(node, opset) and _has_body(_schema(node, model))
    }


def _schema(node: onnx.NodeProto, model: onnx.ModelProto) -> onnx.defs.OpSchema | None:
    domain = "" if node.domain in ONNX_DOMAINS else node.domain
    versions = {o.domain: int(o.version) for o in model.opset_import}
    version = versions.get(node.domain, 1) if domain else model_opset(model)
    try:
        return onnx.defs.get_schema(node.op_type, version, domain)
    except onnx.defs.SchemaError:
        return None


def _has_body(schema: onnx.defs.OpSchema | None) -> bool:
    if schema is None:
        return False
    return bool(schema.has_function or schema.has_context_dependent_function)


def _with_defaults(model: onnx.ModelProto, wanted: set[tuple[str, str]]) -> onnx.ModelProto:
    """Return a copy whose nodes state the defaults that a function body refers to."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for graph in iter_graphs(copy.graph):
        for node in graph.node:
            if (node.domain, node.op_type) in wanted:
                _state_defaults(node, _schema(node, copy))
    return copy


def _state_defaults(node: onnx.NodeProto, schema: onnx.defs.OpSchema | None) -> None:
    if schema is None:
        return
    given = {attribute.name for attribute in node.attribute}
    for name, attribute in schema.attributes.items():
        if name not in given and attribute.default_value.name:
            node.attribute.append(attribute.default_value)
