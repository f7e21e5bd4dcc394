"""Turn graph inputs whose value is known before compilation into initializers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from icd_tvm.errors import ShapeError
from icd_tvm.models.onnx_file import printable, real_inputs
from icd_tvm.models.onnx_shapes import declared_shape


def bind_constants(model: onnx.ModelProto, constants: Mapping[str, NDArray[Any]]) -> None:
    """Replace graph inputs by initializers of the given values, in place.

    Parameters
    ----------
    model : onnx.ModelProto
        Changed in place.
    constants : mapping of str to numpy.ndarray
        Value by input name; dtype and shape must be those the model declares.

    Raises
    ------
    ShapeError
        Unknown input name, or a value whose dtype or shape does not fit the input.
    """
    inputs = {value.name: value for value in real_inputs(model.graph)}
    for name, value in constants.items():
        if name not in inputs:
            raise ShapeError(
                f"value given for unknown input {name!r}",
                f"inputs: {', '.join(map(printable, inputs))}",
            )
        array = np.asarray(value)
        _check_fit(name, inputs[name], array)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    for index in reversed(range(len(model.graph.input))):
        if model.graph.input[index].name in constants:
            del model.graph.input[index]


def _check_fit(name: str, declared: onnx.ValueInfoProto, array: NDArray[Any]) -> None:
    element = declared.type.tensor_type.elem_type
    given = helper.np_dtype_to_tensor_dtype(array.dtype)
    if given != element:
        want = onnx.TensorProto.DataType.Name(element)
        raise ShapeError(f"value for input {name!r} is {array.dtype}, the model says {want}")
    shape = declared_shape(declared)
    fits = shape is None or (
        len(shape) == array.ndim
        and all(d == s for d, s in zip(shape, array.shape, strict=True) if isinstance(d, int))
    )
    if not fits:
        text = "x".join(map(str, array.shape)) or "scalar"
        raise ShapeError(f"value for input {name!r} has shape {text}, the model says {shape}")
