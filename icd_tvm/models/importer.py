"""Import an ONNX model into Relax with every name kept."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import helper

from icd_tvm._tvm import (
    Call,
    PyExprMutator,
    Var,
    mutator,
    named_const,
    onnx_frontend,
    relax,
    tirx,
    tvm,
)
from icd_tvm.errors import IcdError, ModelFileError, UnsupportedOpError
from icd_tvm.models.converters import Converter, OnnxNode, find_converter
from icd_tvm.models.converters.quantize_linear import narrow_name, stored_as
from icd_tvm.models.onnx_bind import bind_constants
from icd_tvm.models.onnx_file import (
    check_finite,
    check_model,
    first_line,
    load_proto,
    real_inputs,
    to_array,
)
from icd_tvm.models.onnx_fold import fold_constants
from icd_tvm.models.onnx_functions import expand_functions
from icd_tvm.models.onnx_ops import ONNX_DOMAINS, check_operators, model_opset
from icd_tvm.models.onnx_parameters import detach_parameters
from icd_tvm.models.onnx_shapes import check_outputs, fix_input_shapes
from icd_tvm.models.onnx_unroll import UNROLLED_OPS, unroll_control_flow


@dataclass(frozen=True)
class TensorSpec:
    """Name, static shape and numpy dtype name of one graph input."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class ImportedModel:
    """A model in Relax beside the ONNX graph it was made from.

    Attributes
    ----------
    mod : IRModule
        ``main`` takes the inputs in order. Weights are constants whose span carries their ONNX
        name (`icd_tvm._tvm.const_name`). A binding is named after its ONNX node; further
        bindings of the same node are ``node:1``, ``node:2``; the alias that leaves the dataflow
        block is named after the graph output.
    model : onnx.ModelProto
        The graph as imported: static shapes, shape chains and constant sub-graphs folded.
    inputs : tuple of TensorSpec
        In the order of the parameters of ``main``.
    outputs : tuple of str
        ONNX names; ``main`` returns a tensor when there is one and a tuple otherwise.
    name : str
        File stem, or the graph's name when the source was a proto.
    parameters : mapping of str to numpy.ndarray
        Weights that are parameters of ``main``, after the inputs and in its order, by ONNX name;
        empty unless they were asked for.
    """

    mod: Any
    model: onnx.ModelProto
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    name: str
    parameters: Mapping[str, NDArray[Any]] = field(default_factory=dict)


def import_onnx(
    source: str | Path | onnx.ModelProto,
    shapes: Mapping[str, Sequence[int]] | None = None,
    constants: Mapping[str, NDArray[Any]] | None = None,
    *,
    parameters: bool = False,
) -> ImportedModel:
    """Read, check, fold and import an ONNX model.

    Parameters
    ----------
    source : str, Path or onnx.ModelProto
        Binary ONNX file, external data in the same folder; or a proto, which is not changed.
    shapes : mapping of str to sequence of int, optional
        Full shape of an input by name; needed where the model has symbolic dimensions.
    constants : mapping of str to numpy.ndarray, optional
        Value of an input by name. The input becomes an initializer before anything is folded
        and is no parameter of ``main``: for inputs that decide shapes (the target of a Reshape,
        the axes of a reduction, ``k`` of TopK).
    parameters : bool
        Keep weights of more than 1,024 elements as parameters of ``main``, memory-mapped where
        they are external data: nothing of them is read, so they are not searched for NaN.

    Returns
    -------
    ImportedModel

    Raises
    ------
    ModelFileError
        Missing, unreadable, truncated or invalid model.
    UnsupportedOpError
        Operators without a converter, all named, or one that the converter refuses.
    DynamicShapeError
        A symbolic dimension without a given size.
    ShapeError
        A given shape or constant that does not fit the model.
    NonFiniteError
        NaN or infinity in a weight.

    Examples
    --------
    >>> imported = import_onnx(model_file)
    >>> [(item.name, item.shape, item.dtype) for item in imported.inputs]
    [('x', (4, 64), 'float32')]
    """
    model = load_proto(source, large_data=not parameters)
    if model.functions:
        model = _inline_functions(model)
    model = expand_functions(model)
    check_operators(model, UNROLLED_OPS)
    check_model(model)
    folder = None if isinstance(source, onnx.ModelProto) else Path(source).parent
    weights = detach_parameters(model, folder) if parameters else {}
    bind_constants(model, constants or {})
    fix_input_shapes(model, shapes)
    check_finite(model.graph)
    fold_constants(model)
    while unroll_control_flow(model):
        fold_constants(model)
    check_operators(model)
    check_outputs(model)
    _name_nodes(model.graph)
    name = model.graph.name if isinstance(source, onnx.ModelProto) else Path(source).stem
    inputs = [value for value in real_inputs(model.graph) if value.name not in weights]
    return ImportedModel(
        mod=_to_relax(model, list(weights)),
        model=model,
        inputs=tuple(_spec(value) for value in inputs),
        outputs=tuple(value.name for value in model.graph.output),
        name=name or "model",
        parameters=weights,
    )


def _inline_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnx import inliner

    try:
        return inliner.inline_local_functions(model)
    except Exception as error:
        raise ModelFileError(f"cannot inline local functions: {first_line(error)}") from error


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    return TensorSpec(value.name, tuple(int(d.dim_value) for d in tensor.shape.dim), dtype.name)


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node a unique name; the first holder of a name keeps it."""
    taken = {node.name for node in graph.node}
    seen = {""}
    for node in graph.node:
        if node.name in seen:
            base = node.name or next((name for name in node.output if name), node.op_type)
            node.name = _fresh(base, taken)
            taken.add(node.name)
        seen.add(node.name)


def _fresh(base: str, taken: set[str]) -> str:
    name, count = base, 0
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    return name


class _NamedImporter(onnx_frontend.ONNXGraphImporter):
    """TVM's importer, with named constants, named bindings and bounded gathers."""

    def __init__(self) -> None:
        super().__init__({}, "float32")
        self.binding_names: dict[Any, str] = {}
        self.current = ""
        self._branch_depth = 0
        self._nodes: dict[str, Any] = {}
        self._stored: dict[str, str] = {}
        self._scope = ""
        self._ahead: Iterator[onnx.NodeProto] = iter(())

    def _parse_graph_initializers(self, graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            array = to_array(tensor)
            narrow = narrow_name(tensor.data_type)
            if narrow is not None:
                # Relax stores such types packed; here each number has a byte.
                array = array.astype(stored_as(narrow))
                self._stored[tensor.name] = narrow
            # relax.const narrows numpy's 64-bit types; a TVM tensor keeps its dtype.
            self._nodes[tensor.name] = named_const(tvm.runtime.tensor(array), tensor.name)

    def _check_for_unsupported_ops(self, graph: onnx.GraphProto) -> None:
        """Do nothing: `check_operators` has looked at every operator with its domain."""

    def _construct_nodes(self, graph: onnx.GraphProto) -> None:
        with self._walking(graph):
            super()._construct_nodes(graph)

    def _convert_subgraph(self, bb: Any, graph: onnx.GraphProto) -> Any:
        self._branch_depth += 1
        try:
            with self._walking(graph):
                return super()._convert_subgraph(bb, graph)
        finally:
            self._branch_depth -= 1

    @contextlib.contextmanager
    def _walking(self, graph: onnx.GraphProto) -> Iterator[None]:
        """Know the node behind each `_convert_operator`, which TVM calls without its domain."""
        outer = self._ahead
        self._ahead = (node for node in graph.node if node.op_type != "If")
        try:
            yield
        finally:
            self._ahead = outer

    def _inline(self, graph: onnx.GraphProto, values: Mapping[str, Any], scope: str) -> list[Any]:
        """Convert a body graph where its node stands; its names hide those of outer graphs."""
        outer, outer_scope = self._nodes, self._scope
        self._nodes, self._scope = {**outer, **values}, f"{outer_scope}{scope}/"
        try:
            self._parse_graph_initializers(graph)
            self._construct_nodes(graph)
            return [self._nodes[value.name] for value in graph.output]
        finally:
            self._nodes, self._scope = outer, outer_scope

    def _convert_operator(
        self, op_name: str, inputs: Any, attrs: dict[str, Any], opset: int
    ) -> Any:
        proto = next(self._ahead)
        name = self._scope + (proto.name or next(filter(None, proto.output), op_name))
        self.current = f"{op_name} at node {name!r}"
        converter = find_converter(proto.domain, op_name)
        if converter is not None:
            value = self._convert(converter, proto, inputs, name)
        else:
            value = _bounded_gather(self.bb, inputs, attrs) if op_name == "Gather" else None
        if value is None:
            value = super()._convert_operator(op_name, inputs, attrs, opset)
        # Bindings made inside an If branch would be evaluated whichever way it goes.
        return value if self._branch_depth else self._bind(value, name)

    def _convert(self, converter: Converter, proto: onnx.NodeProto, inputs: Any, name: str) -> Any:
        """Run one of this package's converters; None leaves the node to TVM's."""
        attrs = {a.name: _attribute(a) for a in proto.attribute}
        domain = "" if proto.domain in ONNX_DOMAINS else proto.domain
        node = OnnxNode(
            bb=self.bb,
            op=proto.op_type,
            domain=domain,
            name=name,
            opset=self.opset,
            inputs=tuple(inputs),
            outputs=tuple(proto.output),
            attrs=attrs,
            stored={i: self._stored[n] for i, n in enumerate(proto.input) if n in self._stored},
            inline=self._inline,
            scope=self._nodes,
        )
        value = converter(node)
        if isinstance(value, tuple):
            bound = [f if f is None else self._bind_one(self.bb.normalize(f), name) for f in value]
            # An unused output still has its place in TVM's list.
            fields = [bound[0] if field is None else field for field in bound]
            return relax.Tuple(fields) if len(fields) > 1 else fields[0]
        return None if value is None else self.bb.normalize(value)

    def _bind(self, value: Any, name: str) -> Any:
        """Emit a converter's result under the node's name and unpack tuples."""
        if isinstance(value, relax.Tuple):
            return relax.Tuple([self._bind_one(field, name) for field in value.fields])
        value = self._bind_one(value, name)
        if isinstance(value, Var) and isinstance(value.ty, relax.TupleType):
            items = [relax.TupleGetItem(value, i) for i in range(len(value.ty.fields))]
            return relax.Tuple([self._bind_one(self.bb.normalize(i), name) for i in items])
        return value

    def _bind_one(self, value: Any, name: str) -> Any:
        emitted = isinstance(value, Call | relax.TupleGetItem)
        if emitted and isinstance(value.ty, relax.TensorType | relax.TupleType):
            value = self.bb.emit(value, name_hint=name)
        if isinstance(value, Var):
            self.binding_names.setdefault(value, name)
        return value


def _attribute(proto: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(proto)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if proto.type == onnx.AttributeProto.STRINGS:
        return [item.decode(errors="replace") for item in value]
    return value


def _bounded_gather(bb: Any, inputs: Any, attrs: dict[str, Any]) -> Any:
    """Convert Gather to one `take` that wraps negative indices and cannot leave the table.

    TVM's converter spends six bindings on negative indices and then reads without a bound.
    None leaves the case (shape expressions, symbolic axis) to TVM's converter.
    """
    data, indices = inputs[0], inputs[1]
    for value in (data, indices):
        if not isinstance(value, relax.Expr) or not isinstance(value.ty, relax.TensorType):
            return None
    shape = getattr(data.ty.shape, "values", None)
    if not shape:
        return None
    axis = int(attrs.get("axis", 0)) % len(shape)
    if not isinstance(shape[axis], tirx.IntImm):
        return None
    return bb.normalize(relax.op.take(data, indices, axis, mode="wrap"))


@mutator
class _Renamer(PyExprMutator):
    """Give bound variables new names."""

    def __init__(self, mod: Any, names: dict[Any, str]) -> None:
        super().__init__(mod)
        self.names = names

    def visit_dataflow_var_def_(self, var: Any) -> Any:
        return relax.DataflowVar(self.names[var], var.ty) if var in self.names else var

    def visit_var_def_(self, var: Any) -> Any:
        return Var(self.names[var], var.ty) if var in self.names else var


def _to_relax(model: onnx.ModelProto, weights: list[str]) -> Any:
    importer = _NamedImporter()
    try:
        with _quiet():
            mod = importer.from_onnx(model.graph, model_opset(model))
    except IcdError:
        _close(importer)
        raise
    except Exception as error:
        _close(importer)
        where = importer.current or "the graph"
        raise UnsupportedOpError(
            f"the importer cannot convert {where}: {first_line(error)}",
            "fix the input shapes with --shape or export with simpler operators",
        ) from error
    main = mod["main"]
    count = len(main.params) - len(weights)
    names = {**importer.binding_names, **dict(zip(main.params[count:], weights, strict=True))}
    mod["main"] = main.with_attr("num_input", count) if weights else main
    return _rename_bindings(mod, names, [v.name for v in model.graph.output])


def _close(importer: _NamedImporter) -> None:
    """Close the block that a converter left open, or TVM warns about it on stderr."""
    with contextlib.suppress(Exception):
        importer.bb._end_block()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop what the importer prints: renamed inputs and, on failure, whole expressions."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _rename_bindings(mod: Any, known: dict[Any, str], outputs: list[str]) -> Any:
    """Name every binding of ``main`` after its node.

    Helpers that a converter or the normaliser emitted come before the binding that ends their
    node, so a walk from the end meets that one first.
    """
    mod = mod.clone()
    main = mod["main"]
    node = "/".join(outputs)
    owners: dict[Any, str] = {}
    for block in reversed(list(main.body.blocks)):
        for binding in reversed(list(block.bindings)):
            node = known.get(binding.var, node)
            owners[binding.var] = node
    names = _number(owners, known)
    names |= {param: known[param] for param in main.params if param in known}
    mod.update_func(mod.get_global_var("main"), _Renamer(mod, names).visit_expr(main))
    return mod


def _number(owners: dict[Any, str], known: dict[Any, str]) -> dict[Any, str]:
    """Name the first result of a node like the node, its other bindings ``node:1`` and on."""
    results = {node: var for var, node in reversed(known.items()) if var in owners}
    counts: dict[str, int] = {}
    names: dict[Any, str] = {}
    for var, node in reversed(owners.items()):
        if node not in results or results[node].same_as(var):
            results.setdefault(node, var)
            names[var] = node
        else:
            counts[node] = counts.get(node, 0) + 1
            names[var] = f"{node}:{counts[node]}"
    return names
