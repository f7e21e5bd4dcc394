"""Models in floating point and their quantised twins in ONNX."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from converter_check import MS, array_model
from onnx import helper, numpy_helper

from icd_tvm._tvm import relax, tvm
from icd_tvm.models.importer import import_onnx

K, H, N = 64, 96, 32


def two_layers(seed: int = 0) -> onnx.ModelProto:
    """relu(x @ w1) @ w2 for x [2, 3, K]."""
    rng = np.random.default_rng(seed)
    weights = {
        "w1": (rng.standard_normal((K, H)) / 8).astype(np.float32),
        "w2": (rng.standard_normal((H, N)) / 8).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], name="up"),
        helper.make_node("Relu", ["h"], ["r"], name="act"),
        helper.make_node("MatMul", ["r", "w2"], ["y"], name="down"),
    ]
    return array_model(nodes, {"x": example()}, ["y"], weights)


def example(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, 3, K)).astype(np.float32)


def quantised_twin(model: onnx.ModelProto, constants: dict[str, np.ndarray], kind: str) -> Any:
    """Rewrite every MatMul whose weight has codes among ``constants`` as a tool would store it.

    ``kind`` is ``dequantize``, ``static``, ``dynamic`` or ``nbits``.
    """
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    nodes, arrays, done = [], _of_quantisation(constants), {}
    # Constants of an input are named after the binding that makes it: the node.
    for node in twin.graph.node:
        for what in ("scale", "zero_point"):
            if f"{node.name}.{what}" in arrays:
                arrays[f"{node.output[0]}.{what}"] = arrays[f"{node.name}.{what}"]
    for node in twin.graph.node:
        coded = node.op_type == "MatMul" and f"{node.input[1]}.scale" in constants
        nodes += _REWRITES[kind](node, arrays, done) if coded else [node]
    kept = {t.name: t for t in twin.graph.initializer}
    kept |= {n: numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items()}
    copied = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    read = {name for node in copied for name in node.input}
    del twin.graph.node[:], twin.graph.initializer[:]
    twin.graph.node.extend(copied)
    twin.graph.initializer.extend(t for n, t in kept.items() if n in read)
    if kind == "nbits" and not any(o.domain == MS for o in twin.opset_import):
        twin.opset_import.append(helper.make_opsetid(MS, 1))
    return twin


def _of_quantisation(constants: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the codes, scales, zero points and group numbers among the constants of a module."""
    ends = (".scale", ".zero_point", ".g_idx")
    return {n: a for n, a in constants.items() if n.endswith(ends) or f"{n}.scale" in constants}


def run(mod: Any, x: np.ndarray) -> np.ndarray:
    """Run ``main`` without optimisation: the code compiles in a quarter of the time."""
    executable = tvm.compile(mod, tvm.target.Target({"kind": "llvm", "opt-level": 0}))
    return relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()


def imported_twin(model: onnx.ModelProto, constants: dict[str, np.ndarray], kind: str) -> Any:
    return import_onnx(quantised_twin(model, constants, kind)).mod


def _dequantize(node: Any, arrays: dict[str, Any], done: dict[str, str]) -> list[Any]:
    source, weight = node.input
    zero = f"{weight}.zero_point"
    inputs = [weight, f"{weight}.scale", *([zero] if zero in arrays else [])]
    restored = f"{weight}.restored"
    read = helper.make_node("DequantizeLinear", inputs, [restored], axis=1)
    product = helper.make_node("MatMul", [source, restored], list(node.output), name=node.name)
    return [read, product]


def _static(node: Any, arrays: dict[str, Any], done: dict[str, str]) -> list[Any]:
    source = node.input[0]
    read, product = _dequantize(node, arrays, done)
    nodes = []
    if source not in done:
        done[source] = f"{source}.restored"
        scale = [f"{source}.{what}" for what in ("scale", "zero_point")]
        codes = f"{source}.codes"
        nodes.append(helper.make_node("QuantizeLinear", [source, *scale], [codes]))
        nodes.append(helper.make_node("DequantizeLinear", [codes, *scale], [done[source]]))
    product.input[0] = done[source]
    # As the pass does: the weight first, then the input.
    return [read, *nodes, product]


def _dynamic(node: Any, arrays: dict[str, Any], done: dict[str, str]) -> list[Any]:
    source, weight = node.input
    made = [f"{node.name}.{part}" for part in ("codes", "scale", "zero", "sum", "float", "scales")]
    codes, scale, zero, total, wide, scales = made
    return [
        helper.make_node("DynamicQuantizeLinear", [source], [codes, scale, zero]),
        helper.make_node("MatMulInteger", [codes, weight, zero], [total]),
        helper.make_node("Cast", [total], [wide], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", [scale, f"{weight}.scale"], [scales]),
        helper.make_node("Mul", [wide, scales], list(node.output)),
    ]


def _nbits(node: Any, arrays: dict[str, Any], done: dict[str, str]) -> list[Any]:
    source, weight = node.input
    codes, scale = arrays[weight], arrays[f"{weight}.scale"]
    k, n = codes.shape
    block = -(-k // len(scale))
    halves = codes.T.reshape(n, len(scale), block // 2, 2)
    arrays[f"{weight}.packed"] = halves[..., 0] | halves[..., 1] << 4
    arrays[f"{weight}.flat"] = np.ascontiguousarray(scale.T).reshape(-1)
    inputs = [source, f"{weight}.packed", f"{weight}.flat"]
    zero = f"{weight}.zero_point"
    if zero in arrays:
        points = np.pad(arrays[zero].T, ((0, 0), (0, len(scale) % 2)))
        arrays[f"{weight}.zeros"] = (points[:, 0::2] | points[:, 1::2] << 4).reshape(-1)
        inputs.append(f"{weight}.zeros")
    return [
        helper.make_node(
            "MatMulNBits",
            inputs,
            list(node.output),
            name=node.name,
            domain=MS,
            K=k,
            N=n,
            bits=4,
            block_size=block,
        )
    ]


_REWRITES = {
    "dequantize": _dequantize,
    "static": _static,
    "dynamic": _dynamic,
    "nbits": _nbits,
}
