"""Read an ONNX file and refuse what is missing, damaged or not finite.

Every function here works on the protobuf only and knows no TVM.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import external_data_helper, numpy_helper

from icd_tvm.errors import ModelFileError, NonFiniteError, UnsupportedOpError

# Initializers above this size carry weights, not shapes; checker and shape inference
# get their type only, so that they never copy the weights.
SMALL_ELEMENTS = 1024


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, or its type if it has none."""
    text = str(error).strip()
    return printable(text.splitlines()[0].strip()) if text else type(error).__name__


def printable(text: str) -> str:
    """Return a name from a file so that it cannot break a one-line message."""
    return text if text.isprintable() else repr(text)


def load_proto(source: str | Path | onnx.ModelProto) -> onnx.ModelProto:
    """Return a model that the caller may change.

    Parameters
    ----------
    source : str, Path or onnx.ModelProto
        A path to a binary ONNX file, whose external data must lie in the same folder, or a
        proto, which is copied.

    Returns
    -------
    onnx.ModelProto
        The model with external data loaded.

    Raises
    ------
    ModelFileError
        The file is missing, unreadable, truncated or not ONNX, or external data points
        outside the model's folder, is missing or too short.
    """
    if isinstance(source, onnx.ModelProto):
        copy = onnx.ModelProto()
        copy.CopyFrom(source)
        return _require_graph(copy, "model proto")
    path = Path(source)
    try:
        found = path.is_file()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelFileError(f"cannot read {path}: {reason}") from error
    if not found:
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise ModelFileError(f"model file {path} {what}", "give the path of an .onnx file")
    try:
        model = onnx.load_model(str(path), format="protobuf", load_external_data=False)
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # protobuf's DecodeError derives from Exception alone
        raise ModelFileError(
            f"{path} is not an ONNX model or is truncated: {first_line(error)}",
            "export it again or check the download",
        ) from error
    _require_graph(model, str(path))
    _load_external_data(model, path.parent)
    return model


def _require_graph(model: onnx.ModelProto, label: str) -> onnx.ModelProto:
    """Refuse bytes that parse as protobuf by luck."""
    if model.ir_version < 1 or not model.HasField("graph"):
        raise ModelFileError(
            f"{label} is not an ONNX model or is truncated: it holds no graph",
            "export it again or check the download",
        )
    try:
        broken = next((n for n in _names(model) if not isinstance(n, str)), None)
    except UnicodeDecodeError as error:
        broken = error.object
    if broken is not None:
        raise ModelFileError(
            f"{label} is damaged: the name {broken!r} is not UTF-8",
            "export it again or check the download",
        )
    return model


def _names(model: onnx.ModelProto) -> Iterator[str | bytes]:
    """Yield every name; damaged ones come as bytes or raise UnicodeDecodeError."""
    yield from (opset.domain for opset in model.opset_import)
    for graph in iter_graphs(model.graph):
        yield graph.name
        for node in graph.node:
            yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
            yield from (attribute.name for attribute in node.attribute)
        for value in (*graph.input, *graph.output, *graph.value_info):
            yield value.name
            yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)
        yield from (tensor.name for tensor in graph.initializer)


def iter_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and every graph nested in its nodes' attributes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            nested = list(attribute.graphs)
            if attribute.type == onnx.AttributeProto.GRAPH:
                nested.append(attribute.g)
            for sub in nested:
                yield from iter_graphs(sub)


def _iter_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for sub in iter_graphs(graph):
        yield from sub.initializer
        for node in sub.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.TENSOR:
                    yield attribute.t
                yield from attribute.tensors


def _load_external_data(model: onnx.ModelProto, folder: Path) -> None:
    for tensor in _iter_tensors(model.graph):
        if not external_data_helper.uses_external_data(tensor):
            continue
        _check_location(tensor)
        try:
            external_data_helper.load_external_data_for_tensor(tensor, str(folder))
        except Exception as error:
            raise ModelFileError(
                f"external data of {tensor.name!r} cannot be read: {first_line(error)}",
                "keep the data file beside the model",
            ) from error


def _check_location(tensor: onnx.TensorProto) -> None:
    location = next((e.value for e in tensor.external_data if e.key == "location"), "")
    parts = PurePosixPath(location).parts + PureWindowsPath(location).parts
    absolute = PurePosixPath(location).is_absolute() or PureWindowsPath(location).is_absolute()
    if not location or absolute or ".." in parts:
        raise ModelFileError(
            f"external data of {tensor.name!r} points outside the model's folder: {location!r}"
        )


def to_array(tensor: onnx.TensorProto) -> NDArray[Any]:
    """Return a tensor's values.

    Raises
    ------
    ModelFileError
        The stored bytes do not fit the declared shape and type.
    """
    try:
        return np.asarray(numpy_helper.to_array(tensor))
    except Exception as error:
        raise ModelFileError(
            f"initializer {tensor.name!r} is damaged: {first_line(error)}"
        ) from error


def real_inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """Return the graph inputs that are not initializers, in order."""
    weights = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def element_count(tensor: onnx.TensorProto) -> int:
    """Return the number of elements a tensor declares."""
    return int(np.prod([int(d) for d in tensor.dims], dtype=object))


def skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which large initializers are inputs of the same type and shape."""
    copy = onnx.ModelProto(ir_version=model.ir_version)
    copy.opset_import.extend(model.opset_import)
    copy.functions.extend(model.functions)
    copy.graph.name = model.graph.name
    for field in ("node", "input", "output", "value_info", "sparse_initializer"):
        getattr(copy.graph, field).extend(getattr(model.graph, field))
    declared = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if element_count(tensor) <= SMALL_ELEMENTS:
            copy.graph.initializer.append(tensor)
        elif tensor.name not in declared:
            copy.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    return copy


def check_model(model: onnx.ModelProto) -> None:
    """Run the ONNX checker.

    Raises
    ------
    ModelFileError
        With the first line of the checker's message.
    UnsupportedOpError
        The model holds sparse initializers, which the importer would drop.
    """
    copy = skeleton(model)
    for value in (*copy.graph.input, *copy.graph.output):
        # The checker wants a shape where runtimes accept its absence.
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.shape.SetInParent()
    _move_unknown(copy)
    try:
        onnx.checker.check_model(copy)
    except Exception as error:
        raise ModelFileError(f"the ONNX checker refuses the model: {first_line(error)}") from error
    if model.graph.sparse_initializer:
        name = model.graph.sparse_initializer[0].values.name
        raise UnsupportedOpError(
            f"initializer {name!r} is stored sparse", "store it dense: zeros are found anyway"
        )


def _move_unknown(model: onnx.ModelProto) -> None:
    """Move operators that exporters put into the standard domain by mistake to com.microsoft."""
    domains = {opset.domain for opset in model.opset_import}
    for node in model.graph.node:
        if node.domain in ("", "ai.onnx") and not onnx.defs.has(node.op_type):
            node.domain = "com.microsoft"
            if node.domain not in domains:
                model.opset_import.append(onnx.helper.make_opsetid(node.domain, 1))
                domains.add(node.domain)


def check_finite(graph: onnx.GraphProto) -> None:
    """Refuse NaN and infinity in initializers.

    A single infinite element (a fill value) and a tensor of zeros and -inf (an attention mask)
    are legitimate and pass.

    Raises
    ------
    NonFiniteError
        Naming the initializer and how many of its elements are not finite.
    """
    for tensor in graph.initializer:
        array = to_array(tensor)
        if array.dtype.kind in "iubOSU":
            continue
        bad = ~np.isfinite(array)
        count = int(bad.sum())
        if count and not _is_mask(array, bad):
            raise NonFiniteError(
                f"initializer {tensor.name!r} holds {count} NaN or infinite of {array.size} values",
                "the export or the training is broken",
            )


def _is_mask(array: NDArray[Any], bad: NDArray[np.bool_]) -> bool:
    if np.isnan(array[bad]).any():
        return False
    return array.size == 1 or not (array[~bad].any() or (array[bad] > 0).any())
