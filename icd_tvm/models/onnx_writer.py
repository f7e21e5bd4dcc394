"""Write ONNX graphs node by node, with weights inside the file or beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from icd_tvm.errors import OutputError
from icd_tvm.models.weights import Float32, Weights

OPSET = 17
IR_VERSION = 9
PRODUCER = "icd_tvm"
# Smaller tensors stay in the graph, where shape folding can see them.
EXTERNAL_BYTES = 4096
PAGE = 4096


class GraphWriter:
    """Collects nodes and initializers; every method that adds a node returns its output's name.

    Parameters
    ----------
    weights : mapping of str to float32 array
    data : Path, optional
        File that takes the weights, in the folder where the model will be saved; it is
        replaced. Without it they are stored in the model.
    """

    def __init__(self, weights: Weights, data: Path | None = None) -> None:
        self.weights = weights
        self.data = data
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        if data is not None:
            self._write(data, b"", "wb")

    def node(self, op: str, path: str, *inputs: str, **attributes: object) -> str:
        """Append a node called ``path`` with one output ``path_output_0``."""
        output = f"{path}_output_0"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=path, **attributes))
        return output

    def split(self, path: str, value: str, sizes: Sequence[int], axis: int) -> list[str]:
        """Append a Split and return its outputs."""
        outputs = [f"{path}_output_{i}" for i in range(len(sizes))]
        lengths = self.constant(f"{path}/sizes", sizes, np.int64)
        self.nodes.append(
            helper.make_node("Split", [value, lengths], outputs, name=path, axis=axis)
        )
        return outputs

    def rename(self, value: str, output: str) -> str:
        """Give a node's output, read so far by nodes added after it, the name of a graph output."""
        for node in self.nodes:
            node.output[:] = [output if name == value else name for name in node.output]
            node.input[:] = [output if name == value else name for name in node.input]
        return output

    def constant(self, name: str, values: object, dtype: type = np.float32) -> str:
        """Store a small constant and return its name; the first one of a name stays."""
        if name not in self.initializers:
            array: NDArray[Any] = np.asarray(values, dtype=dtype)
            self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str, transpose: bool = False) -> str:
        """Store a weight, ``[out, in]`` as ``[in, out]`` if asked, and return its name."""
        if name not in self.initializers:
            array = np.asarray(self.weights[name], dtype=np.float32)
            self.store(name, array.T if transpose else array)
        return name

    def store(self, name: str, array: Float32) -> str:
        """Store float32 values as an initializer, in the data file if there is one."""
        array = np.ascontiguousarray(array, dtype="<f4")
        if self.data is None or array.nbytes < EXTERNAL_BYTES:
            self.initializers[name] = numpy_helper.from_array(array, name)
            return name
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        offset = self._write(self.data, array.data, "ab")
        place = {"location": self.data.name, "offset": offset, "length": array.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        self.initializers[name] = tensor
        return name

    def dense(self, path: str, module: str, value: str, bias: bool = False) -> str:
        """``value @ W`` over the last axis, plus a bias if there is one."""
        weight = self.weight(f"{module}.weight", transpose=True)
        product = self.node("MatMul", f"{path}/MatMul", value, weight)
        if not bias:
            return product
        return self.node("Add", f"{path}/Add", product, self.weight(f"{module}.bias"))

    def rms_norm(self, path: str, module: str, value: str, eps: float) -> str:
        """``x / sqrt(mean(x^2) + eps) * w`` over the last axis, in elementary operators.

        Notes
        -----
        Zhang & Sennrich, "Root mean square layer normalization", 2019.
        """
        two, small = self.constant("/norm/two", 2.0), self.constant("/norm/eps", eps)
        square = self.node("Pow", f"{path}/Pow", value, two)
        mean = self.node("ReduceMean", f"{path}/ReduceMean", square, axes=[-1], keepdims=1)
        root = self.node("Sqrt", f"{path}/Sqrt", self.node("Add", f"{path}/Add", mean, small))
        unit = self.node("Div", f"{path}/Div", value, root)
        return self.node("Mul", f"{path}/Mul", unit, self.weight(f"{module}.weight"))

    def silu(self, path: str, value: str) -> str:
        """``x * sigmoid(x)``."""
        gate = self.node("Sigmoid", f"{path}/Sigmoid", value)
        return self.node("Mul", f"{path}/Mul", value, gate)

    def tied_logits(self, table: str, value: str) -> str:
        """``value @ table^T`` with the embedding table, which is stored once."""
        weight = self.node("Transpose", "/lm_head/Transpose", self.weight(table), perm=[1, 0])
        return self.node("MatMul", "/lm_head/MatMul", value, weight)

    def finish(
        self,
        name: str,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        properties: Mapping[str, str],
    ) -> onnx.ModelProto:
        """Return the model; ``properties`` become its metadata."""
        graph = helper.make_graph(
            self.nodes, name, list(inputs), list(outputs), list(self.initializers.values())
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name=PRODUCER,
        )
        helper.set_model_props(model, dict(properties))
        return model

    @staticmethod
    def _write(path: Path, values: bytes | memoryview, mode: str) -> int:
        """Write values at the next whole page and return the offset where they begin."""
        try:
            with path.open(mode) as stream:
                # So that a tensor can be mapped by itself, as the ONNX specification advises.
                stream.write(bytes(-stream.tell() % PAGE))
                offset = stream.tell()
                stream.write(values)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
        return offset


def tensor_info(name: str, shape: Sequence[int | str], ids: bool = False) -> onnx.ValueInfoProto:
    """Describe a graph input or output: float32, or int64 for ids."""
    kind = TensorProto.INT64 if ids else TensorProto.FLOAT
    return helper.make_tensor_value_info(name, kind, list(shape))
