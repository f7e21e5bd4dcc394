"""A feed-forward block as an ONNX file: seconds to compile, and its hidden axis may move."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# Large enough for the default least size of a weight that transforms change.
D, F = 64, 64


def tiny_onnx(path: Path, seed: int = 0) -> Path:
    """Write ``y = relu(x w1) w2`` with x [4, D] and hidden width F; return the path."""
    rng = np.random.default_rng(seed)
    weights = {"w1": (D, F), "w2": (F, D)}
    tensors = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) / 4, name)
        for name, shape in weights.items()
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], name="up"),
        helper.make_node("Relu", ["a"], ["h"], name="act"),
        helper.make_node("MatMul", ["h", "w2"], ["y"], name="down"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, D]) for name in "xy"]
    graph = helper.make_graph(nodes, "tiny", ends[:1], ends[1:], tensors)
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path
