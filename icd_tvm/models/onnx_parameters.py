"""Weights as parameters: large initializers become graph inputs, their data stays in its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import external_data_helper, helper

from icd_tvm.errors import ModelFileError
from icd_tvm.models.onnx_file import SMALL_ELEMENTS, element_count, first_line, to_array


def detach_parameters(model: onnx.ModelProto, folder: Path | None) -> dict[str, NDArray[Any]]:
    """Turn initializers of more than `SMALL_ELEMENTS` elements into inputs after the real ones.

    Parameters
    ----------
    model : onnx.ModelProto
        Changed in place. External data need not be loaded.
    folder : Path or None
        Where external data lies.

    Returns
    -------
    dict of str to numpy.ndarray
        Value by ONNX name. External data is memory-mapped, so nothing is read yet;
        what is written into it stays in memory.

    Raises
    ------
    ModelFileError
        External data is missing or too short.
    """
    graph = model.graph
    parameters: dict[str, NDArray[Any]] = {}
    for index in reversed(range(len(graph.initializer))):
        tensor = graph.initializer[index]
        if element_count(tensor) > SMALL_ELEMENTS:
            parameters[tensor.name] = _value(tensor, folder)
            del graph.initializer[index]
    _drop_inputs(graph, parameters)
    for name, array in (parameters := dict(reversed(parameters.items()))).items():
        element = helper.np_dtype_to_tensor_dtype(array.dtype)
        graph.input.append(helper.make_tensor_value_info(name, element, array.shape))
    return parameters


def _drop_inputs(graph: onnx.GraphProto, names: dict[str, NDArray[Any]]) -> None:
    """Old files restate every initializer as an input."""
    for index in reversed(range(len(graph.input))):
        if graph.input[index].name in names:
            del graph.input[index]


def _value(tensor: onnx.TensorProto, folder: Path | None) -> NDArray[Any]:
    if folder is None or not external_data_helper.uses_external_data(tensor):
        return to_array(tensor)
    info = external_data_helper.ExternalDataInfo(tensor)
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    try:
        return np.memmap(
            folder / info.location, dtype, "c", offset=info.offset or 0, shape=tuple(tensor.dims)
        )
    except (OSError, ValueError) as error:
        raise ModelFileError(
            f"external data of {tensor.name!r} cannot be read: {first_line(error)}",
            "keep the data file beside the model",
        ) from error
