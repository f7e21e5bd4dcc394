"""Build models of single nodes and compare the import with a reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from icd_tvm._tvm import relax, tvm
from icd_tvm.models.importer import ImportedModel, import_onnx

MS = "com.microsoft"
Arrays = Mapping[str, np.ndarray]


def array_model(
    nodes: Sequence[onnx.NodeProto],
    feeds: Arrays,
    outputs: Sequence[str],
    weights: Arrays | None = None,
    opset: int = 17,
    dtypes: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """A model whose inputs have the shapes and types of the feeds; outputs are float32."""
    graph = helper.make_graph(
        nodes,
        "nodes",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in feeds.items()
        ],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in (weights or {}).items()],
    )
    for value in graph.output:
        dtype = np.dtype((dtypes or {}).get(value.name, "float32"))
        value.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(dtype)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MS, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def run_ort(model: onnx.ModelProto, feeds: Arrays) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, dict(feeds))


def run_reference(model: onnx.ModelProto, feeds: Arrays) -> list[np.ndarray]:
    return [np.asarray(value) for value in ReferenceEvaluator(model).run(None, dict(feeds))]


def run_imported(imported: ImportedModel, feeds: Arrays) -> list[np.ndarray]:
    # Unoptimised code compiles in a quarter of the time.
    target = tvm.target.Target({"kind": "llvm", "opt-level": 0})
    machine = relax.VirtualMachine(tvm.compile(imported.mod, target), tvm.cpu())
    result = machine["main"](*[tvm.runtime.tensor(feeds[s.name]) for s in imported.inputs])
    results = [result] if len(imported.outputs) == 1 else list(result)
    return [r.numpy() for r in results]


def check(
    nodes: Sequence[onnx.NodeProto] | onnx.NodeProto,
    feeds: Arrays,
    outputs: Sequence[str] = ("y",),
    weights: Arrays | None = None,
    *,
    opset: int = 17,
    dtypes: Mapping[str, str] | None = None,
    run=run_ort,
    rel: float = 1e-5,
) -> ImportedModel:
    """Import nodes, run them, compare all outputs with a reference.

    Integers are equal; floats differ by at most ``rel`` times the largest one.
    """
    nodes = [nodes] if isinstance(nodes, onnx.NodeProto) else list(nodes)
    model = array_model(nodes, feeds, outputs, weights, opset, dtypes)
    imported = import_onnx(model)
    found, wanted = run_imported(imported, feeds), run(model, feeds)
    for name, own, other in zip(outputs, found, wanted, strict=True):
        assert own.shape == other.shape, name
        assert own.dtype == other.dtype, name
        if other.dtype.kind in "iub":
            np.testing.assert_array_equal(own, other, err_msg=name)
        else:
            own, other = (np.asarray(value, np.float64) for value in (own, other))
            bound = rel * np.abs(other).max(initial=1e-30)
            np.testing.assert_allclose(own, other, rtol=0, atol=bound, err_msg=name)
    return imported


def named_inputs(count: int, given: Mapping[int, str]) -> list[str]:
    """Input names of a node by position; the others are omitted."""
    return [given.get(position, "") for position in range(count)]
