"""A chunk of tokens through a Mamba: its states go in and come out, so a prompt can be split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from icd_tvm.errors import ShapeError
from icd_tvm.models.mamba import MambaConfig, MambaGraph
from icd_tvm.models.weights import Weights


def build_mamba_prefill(
    config: MambaConfig,
    weights: Weights,
    seq: int = 64,
    *,
    data: str | Path | None = None,
    trained: bool = False,
    name: str = "mamba-prefill",
) -> onnx.ModelProto:
    """Build the graph that reads ``seq`` tokens.

    Parameters
    ----------
    config, weights, data, trained, name
        See `icd_tvm.models.mamba.build_mamba_step`.
    seq : int
        Tokens of a chunk. The recurrence is an ONNX Scan.

    Returns
    -------
    onnx.ModelProto
        Inputs and outputs of the step with ``seq`` tokens: ``input_ids`` ``[seq]``, ``logits``
        ``[seq, vocab]``, and the same states, so that steps and chunks follow each other.

    Raises
    ------
    ShapeError
        seq is below 1; others as `icd_tvm.models.mamba.build_mamba_step`.
    """
    if seq < 1:
        raise ShapeError(f"seq {seq} is below 1")
    graph = _Chunk(config, weights, data)
    graph.tokens = seq
    return graph.build(name, trained)


class _Chunk(MambaGraph):
    def convolve(self, index: int, path: str, module: str, value: str) -> str:
        """Causal convolution over the state and the chunk: [seq, d_inner]."""
        graph, length, path = self.graph, self.config.conv, f"{path}/conv1d"
        first = graph.constant("/conv/one", [1], np.int64)
        start = graph.constant("/conv/start", [self.tokens], np.int64)
        end = graph.constant("/conv/end", [self.tokens + length], np.int64)
        batch = graph.constant("/conv/batch", [0], np.int64)
        last = graph.constant("/conv/axis", [2], np.int64)
        value = graph.node("Transpose", f"{path}/Transpose", value, perm=[1, 0])
        value = graph.node("Unsqueeze", f"{path}/Unsqueeze", value, batch)
        window = graph.node("Concat", f"{path}/Concat", f"conv_{index}", value, axis=2)
        state = graph.node("Slice", f"{path}/Slice", window, start, end, last)
        graph.rename(state, f"conv_{index}_new")
        window = graph.node("Slice", f"{path}/Slice_1", window, first, end, last)
        weight, bias = graph.weight(f"{module}.conv1d.weight"), f"{module}.conv1d.bias"
        value = graph.node(
            "Conv", f"{path}/Conv", window, weight, graph.weight(bias),
            group=self.config.inner, kernel_shape=[length],
        )  # fmt: skip
        value = graph.node("Squeeze", f"{path}/Squeeze", value, batch)
        value = graph.node("Transpose", f"{path}/Transpose_1", value, perm=[1, 0])
        return graph.silu(f"{path}/act", value)

    def scan(self, index: int, path: str, module: str, value: str) -> str:
        """``h = exp(dt A) h + dt B x``, ``y = C h`` token by token: [seq, d_inner]."""
        graph, path = self.graph, f"{path}/ssm"
        step, key, query, decay = self.selection(path, module, value)
        batch = graph.constant("/ssm/batch", [0], np.int64)
        state = graph.node("Squeeze", f"{path}/Squeeze", f"ssm_{index}", batch)
        out = graph.node(
            "Scan", f"{path}/Scan", state, step, value, key, query,
            body=self.body(f"{path}/body", decay), num_scan_inputs=4,
        )  # fmt: skip
        state, stacked = out, f"{out}_stacked"
        graph.nodes[-1].output.append(stacked)
        state = graph.node("Unsqueeze", f"{path}/Unsqueeze", state, batch)
        graph.rename(state, f"ssm_{index}_new")
        return stacked

    def body(self, name: str, decay: str) -> onnx.GraphProto:
        """One token of one layer; ``decay`` is a value of the graph around it."""
        inner, state = self.config.inner, self.config.state
        shapes = {"h": (inner, state), "dt": (inner,), "x": (inner,), "B": (state,), "C": (state,)}
        nodes = [
            ("Unsqueeze", ("dt", "column"), "dt_column"),
            ("Mul", ("dt_column", decay), "rate"),
            ("Exp", ("rate",), "kept"),
            ("Mul", ("kept", "h"), "old"),
            ("Mul", ("dt", "x"), "drive"),
            ("Unsqueeze", ("drive", "column"), "drive_column"),
            ("Unsqueeze", ("B", "row"), "B_row"),
            ("Mul", ("drive_column", "B_row"), "new"),
            ("Add", ("old", "new"), "h_new"),
            ("Unsqueeze", ("C", "row"), "C_row"),
            ("Mul", ("h_new", "C_row"), "seen"),
            ("ReduceSum", ("seen", "column"), "y"),
        ]
        axes = {"row": np.array([0]), "column": np.array([1])}
        keep = {"ReduceSum": {"keepdims": 0}}
        return helper.make_graph(
            [
                helper.make_node(op, list(reads), [out], name=f"{name}/{out}", **keep.get(op, {}))
                for op, reads, out in nodes
            ],
            name,
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()],
            [
                helper.make_tensor_value_info("h_new", TensorProto.FLOAT, (inner, state)),
                helper.make_tensor_value_info("y", TensorProto.FLOAT, (inner,)),
            ],
            [numpy_helper.from_array(axis, label) for label, axis in axes.items()],
        )
