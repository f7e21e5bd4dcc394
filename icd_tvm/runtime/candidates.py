"""Run many weight candidates of one model through one ONNX Runtime session.

A candidate differs from the model in a few constants only. They become inputs of the graph, so
nothing is compiled or serialised for a candidate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from icd_tvm.errors import ConfigError, ShapeError
from icd_tvm.measure.quality_task import Run


class CandidateModel:
    """A model whose chosen initialisers can be replaced at run time.

    Parameters
    ----------
    model : onnx.ModelProto
        Left untouched.
    names : iterable of str
        Initialisers that candidates replace.
    threads : int
        Threads of the session.

    Attributes
    ----------
    dense : dict of str to ndarray
        The model's own values of those initialisers.
    session : onnxruntime.InferenceSession
        Its inputs are the model's and the initialisers.

    Raises
    ------
    ConfigError
        A name is no initialiser of the model's main graph.
    """

    def __init__(self, model: onnx.ModelProto, names: Iterable[str], threads: int = 1) -> None:
        stored = {tensor.name: tensor for tensor in model.graph.initializer}
        wanted = list(dict.fromkeys(names))
        missing = [name for name in wanted if name not in stored]
        if missing:
            raise ConfigError(
                f"weight {missing[0]!r} is no initialiser of the model that evaluates candidates",
                "evaluate on the model that was imported",
            )
        self.dense = {name: numpy_helper.to_array(stored[name]) for name in wanted}
        opened = onnx.ModelProto()
        opened.CopyFrom(model)
        for name in wanted:
            tensor = stored[name]
            info = helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
            opened.graph.input.append(info)
            opened.graph.initializer.remove(tensor)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = ort.InferenceSession(
            opened.SerializeToString(), options, ["CPUExecutionProvider"]
        )
        self._inputs = {i.name: i.type for i in self.session.get_inputs()}

    def runner(self, arrays: Mapping[str, np.ndarray]) -> Run:
        """Return what runs the model with some of its weights replaced.

        Parameters
        ----------
        arrays : Mapping[str, numpy.ndarray]
            New values by initialiser name; the others keep the model's.

        Returns
        -------
        callable
            Inputs by name -> the first output.

        Raises
        ------
        ConfigError
            A name was not announced to the constructor.
        ShapeError
            An array of another shape or dtype.
        """
        for name, array in arrays.items():
            dense = self.dense.get(name)
            if dense is None:
                raise ConfigError(f"weight {name!r} is not one that candidates replace")
            if array.shape != dense.shape or array.dtype != dense.dtype:
                raise ShapeError(
                    f"candidate of {name!r} is {array.dtype} {list(array.shape)}",
                    f"the model's is {dense.dtype} {list(dense.shape)}",
                )
        weights = {n: np.asarray(arrays.get(n, a), order="C") for n, a in self.dense.items()}

        def run(feeds: Mapping[str, Any]) -> np.ndarray:
            known = {name: value for name, value in feeds.items() if name in self._inputs}
            return np.asarray(self.session.run(None, {**known, **weights})[0])

        return run
