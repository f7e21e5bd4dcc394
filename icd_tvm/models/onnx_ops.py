"""Which ONNX operators the Relax importer can convert, checked for a whole model at once."""

from __future__ import annotations

import onnx

from icd_tvm._tvm import onnx_frontend
from icd_tvm.errors import UnsupportedOpError
from icd_tvm.models.converters import find_converter
from icd_tvm.models.onnx_file import iter_graphs, printable

ONNX_DOMAINS = ("", "ai.onnx")
# TVM looks a converter up by name alone, so an operator of another domain would silently get
# the converter of its namesake. These share name and meaning.
SHARED_CONTRIB_OPS = frozenset({"Gelu", "QuantizeLinear", "DequantizeLinear"})
# The only converter for this name is the com.microsoft one.
CONTRIB_ONLY_OPS = frozenset({"Attention"})
HANDLED_BY_IMPORTER = frozenset({"If", "Constant"})


def model_opset(model: onnx.ModelProto) -> int:
    """Return the version of the standard operator set, 1 if the model names none."""
    return next((int(o.version) for o in model.opset_import if o.domain in ONNX_DOMAINS), 1)


def check_operators(model: onnx.ModelProto, passed: frozenset[str] = frozenset()) -> None:
    """Refuse a model with operators that have no converter, in one error for all of them.

    Parameters
    ----------
    model : onnx.ModelProto
    passed : frozenset of str
        Names of standard operators that a later step may still replace.

    Raises
    ------
    UnsupportedOpError
        One line naming every missing operator with its domain, its first node and the number
        of further nodes.
    """
    opset = model_opset(model)
    missing: dict[tuple[str, str], list[str]] = {}
    for graph in iter_graphs(model.graph):
        for node in graph.node:
            later = node.domain in ONNX_DOMAINS and node.op_type in passed
            if not later and not has_converter(node, opset):
                label = node.name or (node.output[0] if node.output else "")
                missing.setdefault((node.op_type, node.domain or "ai.onnx"), []).append(label)
    if missing:
        texts = [_describe(op, domain, names) for (op, domain), names in missing.items()]
        raise UnsupportedOpError(
            f"no converter for {', '.join(texts)} at opset {opset}",
            "export with these operators decomposed, or at another opset",
        )


def _describe(op: str, domain: str, names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{printable(op)} (domain {printable(domain)}, node {names[0]!r}{more})"


def has_converter(node: onnx.NodeProto, opset: int) -> bool:
    """Tell whether an operator has a converter, here or in TVM."""
    op = node.op_type
    standard = node.domain in ONNX_DOMAINS
    if standard and op in HANDLED_BY_IMPORTER:
        return True
    if find_converter(node.domain, op) is not None:
        return True
    converter = onnx_frontend._get_convert_map().get(op)
    if converter is None or (standard and op in CONTRIB_ONLY_OPS):
        return False
    if not standard and not _is_contrib(node):
        return False
    try:
        converter.get_converter(opset)
    except NotImplementedError:
        return False
    return True


def _is_contrib(node: onnx.NodeProto) -> bool:
    if node.domain != "com.microsoft":
        # A domain that ONNX does not know can only mean a converter registered for it.
        return not onnx.defs.has(node.op_type)
    known = SHARED_CONTRIB_OPS | CONTRIB_ONLY_OPS
    return node.op_type in known or not onnx.defs.has(node.op_type)
