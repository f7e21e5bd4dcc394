"""A model whose idle units a search must find, and a task that stands in for real data."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from icd_tvm.measure.quality_task import Run, TaskScore
from icd_tvm.runtime.candidates import CandidateModel

D, F, N = 16, 64, 8


def two_mlps(idle: float = 0.5) -> onnx.ModelProto:
    """Return x + mlp(x) twice; a share of the second one's hidden units does nothing."""
    rng = np.random.default_rng(0)
    nodes, tensors, value = [], [], "x"
    for block in "ab":
        w1, w2 = (rng.standard_normal(s).astype(np.float32) / 4 for s in ((D, F), (F, D)))
        if block == "b":
            w2[: int(idle * F)] = 0
        tensors += [numpy_helper.from_array(w, f"{block}.{i}") for i, w in enumerate((w1, w2))]
        nodes += [
            helper.make_node("MatMul", [value, f"{block}.0"], [f"{block}.up"], f"{block}/up"),
            helper.make_node("Relu", [f"{block}.up"], [f"{block}.act"], f"{block}/act"),
            helper.make_node(
                "MatMul", [f"{block}.act", f"{block}.1"], [f"{block}.d"], f"{block}/d"
            ),
            helper.make_node("Add", [value, f"{block}.d"], [f"{block}.y"], f"{block}/add"),
        ]
        value = f"{block}.y"
    shape = helper.make_tensor_value_info("x", TensorProto.FLOAT, [N, D])
    out = helper.make_tensor_value_info(value, TensorProto.FLOAT, [N, D])
    graph = helper.make_graph(nodes, "two", [shape], [out], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


class Distance:
    """Points fall by the relative distance from the dense model's outputs."""

    def __init__(self, seed: int, scale: float = 1.0, model: onnx.ModelProto | None = None) -> None:
        self.seed, self.scale, self.calls = seed, scale, 0
        self.source = f"distance {seed}"
        x = np.random.default_rng(seed).standard_normal((N, D)).astype(np.float32)
        self.feeds = {"x": x}
        self.dense = CandidateModel(model or two_mlps(), []).runner({})(self.feeds)

    def evaluate(self, run: Run) -> TaskScore:
        self.calls += 1
        found = run(self.feeds)
        lost = np.linalg.norm(found - self.dense) / np.linalg.norm(self.dense)
        return TaskScore(100 - self.scale * float(lost), found)
