"""Quantised matmuls as importers leave them: recognised, exact, equal to ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

from icd_tvm._tvm import GenericConst, const_name, relax, tvm
from icd_tvm.models.bert import BertConfig, build_bert, random_bert_weights
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.inputs import random_inputs
from icd_tvm.relax_passes.fuse_quantized_matmul import (
    BYTE_KERNELS_ATTR,
    FuseQuantizedMatmul,
)
from icd_tvm.relax_passes.lower_cpu import build_cpu, cpu_pipeline
from icd_tvm.relax_passes.relax_graph import call_func
from icd_tvm.runtime.build import build
from icd_tvm.tir_schedules.cpu.digit_matmul import takes_digits
from icd_tvm.tir_schedules.cpu.gemv import NarrowWeight
from icd_tvm.tir_schedules.cpu.int8_matmul import int8_matmul, int8_tile, pack_int8
from icd_tvm.tir_schedules.target import host_target

Array = np.ndarray
TARGET = host_target(1)
K, N, M = 36, 20, 7
node = helper.make_node
few = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def model(nodes: list[Any], constants: dict[str, Any], shape: tuple[int, ...]) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "quantised",
        [value("x", TensorProto.FLOAT, shape)],
        [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=sets, ir_version=10)


def weights(dtype: Any = np.int8, zero: int = 0, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    info = np.iinfo(dtype)
    return {
        "w": rng.integers(info.min, info.max + 1, (K, N)).astype(dtype),
        "sw": (rng.random(N) * 0.01 + 0.001).astype(np.float32),
        "zw": np.full(N, zero, dtype),
        "b": rng.standard_normal(N).astype(np.float32),
    }


def scales(dtype: Any = np.uint8, zero: int = 7) -> dict[str, Any]:
    return {"sx": np.float32(0.031), "zx": dtype(zero)}


QDQ = [
    node("QuantizeLinear", ["x", "sx", "zx"], ["q"]),
    node("DequantizeLinear", ["q", "sx", "zx"], ["d"]),
    node("DequantizeLinear", ["w", "sw", "zw"], ["dw"], axis=1),
    node("MatMul", ["d", "dw"], ["m"]),
    node("Add", ["m", "b"], ["y"]),
]


def qdq(shape: tuple[int, ...] = (1, M, K), **constants: Any) -> onnx.ModelProto:
    return model(QDQ, {**weights(), **scales(), **constants}, shape)


def lowered(mod: Any) -> str:
    with TARGET:
        return str(cpu_pipeline(TARGET)(mod)["main"].script())


def kernels(mod: Any) -> list[str]:
    """Return the names of the functions that the lowered main calls."""
    lines = [line for line in lowered(mod).splitlines() if "R.call_tir" in line]
    return [line.split("R.call_tir(")[1].split(",")[0].removeprefix("cls.") for line in lines]


def data(shape: tuple[int, ...], seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 3


def reference(proto: onnx.ModelProto, feeds: dict[str, Array]) -> Array:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)[0]


def check(proto: onnx.ModelProto, shape: tuple[int, ...], *, step: float = 0.0) -> Any:
    """Compare with ONNX Runtime; ``step`` is a rounding that may fall either way."""
    mod = import_onnx(proto).mod
    x = data(shape)
    machine = relax.VirtualMachine(build_cpu(mod, TARGET), tvm.cpu())
    actual, expected = machine["main"](tvm.runtime.tensor(x)).numpy(), reference(proto, {"x": x})
    np.testing.assert_allclose(
        actual, expected, rtol=0, atol=step + 1e-5 * np.abs(expected).max(initial=1.0)
    )
    return mod


def fuse(mod: Any) -> tuple[Any, FuseQuantizedMatmul]:
    rewrite = FuseQuantizedMatmul(TARGET)
    return rewrite(mod), rewrite


# Quantise and dequantise


@pytest.mark.parametrize("shape", [(1, M, K), (M, K), (2, 3, K), (2, 1, 4, K)])
def test_qdq_is_one_quantisation_and_one_kernel(shape: tuple[int, ...]) -> None:
    names = kernels(check(qdq(shape), shape))
    assert names == ["quantize", "fused_int8_matmul_subtract_cast_multiply_add"]


@pytest.mark.parametrize("weight", [(np.int8, 0), (np.int8, 5), (np.uint8, 128), (np.uint8, 90)])
@pytest.mark.parametrize("activation", [(np.uint8, 0), (np.uint8, 200), (np.int8, 0)])
def test_types_and_zero_points(weight: tuple[Any, int], activation: tuple[Any, int]) -> None:
    proto = model(QDQ, {**weights(*weight), **scales(*activation)}, (1, M, K))
    names = kernels(check(proto, (1, M, K)))
    assert sum("int8_matmul" in name for name in names) == (1 if weight[1] in (0, 128) else 2)
    assert sum("quantize" in name for name in names) == 1


@few
@given(
    m=st.integers(1, 20),
    zero=st.integers(-128, 127),
    point=st.integers(-128, 127),
    seed=st.integers(0, 99),
)
def test_any_zero_points_equal_onnx_runtime(m: int, zero: int, point: int, seed: int) -> None:
    proto = model(QDQ, {**weights(np.int8, zero, seed), **scales(np.int8, point)}, (m, K))
    check(proto, (m, K))


def test_small_weights_absorb_their_zero_points() -> None:
    w = np.random.default_rng(0).integers(60, 120, (K, N)).astype(np.uint8)
    proto = qdq(w=w, zw=np.full(N, 90, np.uint8))
    assert sum("int8_matmul" in name for name in kernels(check(proto, (1, M, K)))) == 1


def test_transposed_weight_of_a_gemm() -> None:
    constants = {**weights(), **scales()}
    constants["w"] = np.ascontiguousarray(constants["w"].T)
    nodes = [
        *QDQ[:2],
        node("DequantizeLinear", ["w", "sw", "zw"], ["dw"], axis=0),
        node("Gemm", ["d", "dw", "b"], ["y"], transB=1),
    ]
    assert "int8_matmul" in kernels(check(model(nodes, constants, (M, K)), (M, K)))[-1]


def test_a_transpose_that_leaves_the_axes_turns_nothing() -> None:
    """Where the weight is square no shape tells."""
    constants = {**weights(), **scales(), "w": weights()["w"][:20], "sw": np.float32(0.01)}
    constants["zw"] = np.int8(0)
    nodes = [
        *QDQ[:2],
        node("DequantizeLinear", ["w", "sw", "zw"], ["dw"]),
        node("Transpose", ["dw"], ["tw"], perm=[0, 1]),
        node("MatMul", ["d", "tw"], ["y"]),
    ]
    check(model(nodes, constants, (M, N)), (M, N))


def test_one_quantisation_feeds_several_matmuls_and_other_readers() -> None:
    constants = {**weights(), **scales(np.int8, 3), "v": weights(seed=3)["w"]}
    nodes = [
        *QDQ,
        node("DequantizeLinear", ["v", "sw", "zw"], ["dv"], axis=1),
        node("MatMul", ["d", "dv"], ["n"]),
        node("ReduceMean", ["d"], ["mean"], keepdims=1),
        node("Add", ["n", "mean"], ["o"]),
        node("Add", ["y", "o"], ["z"]),
    ]
    proto = model(nodes, constants, (M, K))
    proto.graph.output[0].name = "z"
    names = kernels(check(proto, (M, K)))
    assert sum("int8_matmul" in name for name in names) == 2
    assert sum(name.startswith("quantize") for name in names) == 1


def test_the_following_activation_and_quantisation_join_the_kernel() -> None:
    nodes = [
        *QDQ[:-1],
        node("Add", ["m", "b"], ["a"]),
        node("Relu", ["a"], ["r"]),
        node("QuantizeLinear", ["r", "sx", "zx"], ["rq"]),
        node("DequantizeLinear", ["rq", "sx", "zx"], ["y"]),
    ]
    mod = check(model(nodes, {**weights(), **scales()}, (M, K)), (M, K), step=0.032)
    assert [name for name in kernels(mod) if "int8_matmul" in name] == [
        "fused_int8_matmul_subtract_cast_multiply_add_relu_quantize1_dequantize"
    ]


# Integers


@pytest.mark.parametrize("zero", [0, 3])
def test_dynamic_quantisation(zero: int) -> None:
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["q", "sx", "zx"]),
        node("MatMulInteger", ["q", "w", "zx", "z"], ["i"]),
        node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        node("Mul", ["sx", "s"], ["factor"]),
        node("Mul", ["f", "factor"], ["m"]),
        node("Add", ["m", "b"], ["y"]),
    ]
    constants = {**weights(), "z": np.int8(zero), "s": np.float32(0.003)}
    del constants["sw"], constants["zw"]
    names = kernels(check(model(nodes, constants, (1, M, K)), (1, M, K)))
    assert "add" in names[-1]
    assert "int8_matmul" in names[-1]
    assert sum("row_max" in name for name in names) == 2


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_dynamic_quantize_matmul(dtype: Any) -> None:
    nodes = [
        node("DynamicQuantizeMatMul", ["x", "w", "sw", "zw", "b"], ["y"], domain="com.microsoft")
    ]
    proto = model(nodes, weights(dtype, 10), (1, M, K))
    assert "int8_matmul" in kernels(check(proto, (1, M, K)))[-1]


def test_q_linear_matmul() -> None:
    nodes = [
        QDQ[0],
        node("QLinearMatMul", ["q", "sx", "zx", "w", "sw", "zw", "so", "zo"], ["o"]),
        node("DequantizeLinear", ["o", "so", "zo"], ["y"]),
    ]
    constants = {**weights(), **scales(), "so": np.float32(0.2), "zo": np.uint8(100)}
    del constants["b"]
    names = kernels(check(model(nodes, constants, (1, M, K)), (1, M, K), step=0.2))
    assert len(names) == 2
    assert "int8_matmul" in names[-1]


def test_zero_point_of_every_row() -> None:
    rng = np.random.default_rng(0)
    a, w = rng.integers(0, 256, (M, K)).astype(np.uint8), weights()["w"]
    zero = rng.integers(0, 256, (M, 1)).astype(np.uint8)
    scale = rng.random((M, 1)).astype(np.float32)
    builder = relax.BlockBuilder()
    types = ((a.shape, "uint8"), (zero.shape, "uint8"), (scale.shape, "float32"))
    x, z, s = (relax.Var(n, relax.TensorType(*t)) for n, t in zip("xzs", types, strict=True))
    with builder.function("main", [x, z, s]):
        with builder.dataflow():
            op, emit = relax.op, builder.emit
            wide = emit(op.astype(x, "float32"))
            less = emit(op.subtract(wide, emit(op.astype(z, "float32"))))
            left = emit(op.multiply(less, s))
            floats = emit(op.astype(relax.const(w), "float32"))
            right = emit(op.multiply(floats, relax.const(np.float32(0.5))))
            out = builder.emit_output(op.matmul(left, right))
        builder.emit_func_output(out)
    mod, rewrite = fuse(builder.get())
    assert len(rewrite.fused) == 1
    machine = relax.VirtualMachine(build_cpu(mod, TARGET), tvm.cpu())
    actual = machine["main"](*[tvm.runtime.tensor(array) for array in (a, zero, scale)]).numpy()
    expected = (a.astype(np.int64) - zero) @ w.astype(np.int64) * scale * 0.5
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


# What stays


def refusal(proto: onnx.ModelProto, shape: tuple[int, ...]) -> str:
    mod = import_onnx(proto).mod
    after, rewrite = fuse(mod)
    tvm.ir.assert_structural_equal(after, mod)
    assert rewrite.fused == []
    assert "int8_matmul" not in lowered(check(proto, shape))
    (reason,) = rewrite.refused.values()
    return reason


def test_weight_only_is_folded_to_floats() -> None:
    nodes = [QDQ[2], node("MatMul", ["x", "dw"], ["m"]), QDQ[4]]
    reason = refusal(model(nodes, weights(), (40, K)), (40, K))
    assert "40 rows" in reason
    assert "dequantised once" in reason


def blocked(size: int, shape: tuple[int, ...]) -> onnx.ModelProto:
    nodes = [
        *QDQ[:2],
        node("DequantizeLinear", ["w", "sw"], ["dw"], axis=0, block_size=size),
        *QDQ[3:],
    ]
    constants = {**weights(), **scales()}
    constants["sw"] = np.random.default_rng(0).random((K // size, N)).astype(np.float32)
    del constants["zw"]
    return model(nodes, constants, shape)


def test_scales_by_block_of_k_are_refused_for_quantised_activations() -> None:
    assert "every 18 rows" in refusal(blocked(18, (12, K)), (12, K))
    assert "every 12 rows" in refusal(blocked(12, (M, K)), (M, K))


def test_a_few_quantised_rows_read_the_blocks_of_a_narrow_weight() -> None:
    assert "narrow_matmul" in kernels(check(blocked(18, (M, K)), (M, K)))[-1]


def test_long_sums_are_refused() -> None:
    k = 16400
    w = np.ones((k, 2), np.int8)
    constants = {"w": w, "sw": np.ones(2, np.float32), "zw": np.zeros(2, np.int8)}
    constants["b"] = np.zeros(2, np.float32)
    proto = model(QDQ, {**constants, **scales()}, (9, k))
    _, rewrite = fuse(import_onnx(proto).mod)
    assert "16400" in next(iter(rewrite.refused.values()))


def test_a_target_without_byte_products_is_refused() -> None:
    arm = tvm.target.Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu"})
    rewrite = FuseQuantizedMatmul(arm)
    rewrite(import_onnx(qdq()).mod)
    assert "x86" in next(iter(rewrite.refused.values()))


def test_per_channel_activations_are_refused() -> None:
    constants = {
        **weights(),
        "sx": np.linspace(0.01, 0.05, K).astype(np.float32),
        "zx": np.zeros(K, np.uint8),
    }
    assert "quantise the activation" in refusal(model(QDQ, constants, (12, K)), (12, K))


@pytest.mark.parametrize("shape", [(K, N), (1, K, N)])
def test_other_weights_of_bytes_are_refused(shape: tuple[int, ...]) -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, M, K), "float32"))
    scale = relax.Var("scale", relax.TensorType((), "float32"))
    with builder.function("main", [x, scale]):
        with builder.dataflow():
            w = relax.const(np.ones(shape, np.int8))
            factor = scale if len(shape) == 2 else relax.const(np.float32(0.5))
            right = builder.emit(relax.op.multiply(relax.op.astype(w, "float32"), factor))
            out = builder.emit_output(relax.op.matmul(x, right))
        builder.emit_func_output(out)
    before = builder.get()
    after, rewrite = fuse(before)
    tvm.ir.assert_structural_equal(after, before)
    (reason,) = rewrite.refused.values()
    assert "no matrix of bytes with constant float32 scales" in reason


def test_the_expected_module() -> None:
    w = weights()["w"]
    scale, step = np.linspace(0.1, 0.2, N, dtype=np.float32), np.float32(0.25)
    tile = int8_tile(M, K, N, TARGET)
    op = relax.op

    def before(emit: Any, q: Any) -> Any:
        left = emit(op.dequantize(q, relax.const(step), relax.const(np.uint8(3)), axis=1))
        zero = relax.const(np.int8(0))
        right = emit(op.dequantize(relax.const(w), relax.const(scale), zero, axis=1))
        return op.matmul(left, right)

    def expected(emit: Any, q: Any, builder: Any) -> Any:
        func = int8_matmul(M, K, N, TARGET, tile=tile)
        packed = relax.const(pack_int8(w, tile.columns))
        like = relax.TensorType((M, N), "int32")
        total = emit(call_func(builder, func, "int8_matmul", [q, packed], like))
        sums = relax.const(w.sum(axis=0, dtype=np.int32) * np.int32(3))
        floats = emit(op.astype(emit(op.subtract(total, sums)), "float32"))
        return op.multiply(floats, relax.const(scale * step))

    modules = []
    for made in (before, expected):
        builder = relax.BlockBuilder()
        q = relax.Var("q", relax.TensorType((M, K), "uint8"))
        with builder.function("main", [q]):
            with builder.dataflow():
                more = (builder,) if made is expected else ()
                out = builder.emit_output(made(builder.emit, q, *more))
            builder.emit_func_output(out)
        modules.append(builder.get())
    wanted = modules[1].with_attr(BYTE_KERNELS_ATTR, json.dumps({"gv": f"int8, {K} rows"}))
    tvm.ir.assert_structural_equal(fuse(modules[0])[0], wanted)


def test_a_model_of_floats_is_untouched() -> None:
    config = BertConfig(layers=1, hidden=32, heads=2, ffn=48, vocab=20, max_position=16)
    mod = import_onnx(build_bert(config, random_bert_weights(config), seq=8, batch=1)).mod
    after, rewrite = fuse(mod)
    tvm.ir.assert_structural_equal(after, mod)
    assert (rewrite.fused, rewrite.refused) == ([], {})


def test_the_module_of_the_caller_stays_and_constants_keep_their_names() -> None:
    mod = import_onnx(qdq()).mod
    before = mod.clone()
    after, _ = fuse(mod)
    tvm.ir.assert_structural_equal(mod, before)
    names: dict[str, str] = {}

    def visit(expr: Any) -> None:
        if isinstance(expr, GenericConst):
            names[const_name(expr)] = str(expr.value.dtype)

    relax.analysis.post_order_visit(after["main"], visit)
    assert names["w"] == "int8"
    assert names["w.scale"] == "float32"
    assert names["w.zero_sums"] == "int32"
    assert "b" in names


def test_a_range_of_zeros_keeps_its_scale() -> None:
    nodes = [
        node("DynamicQuantizeMatMul", ["x", "w", "sw", "zw", "b"], ["y"], domain="com.microsoft")
    ]
    proto = model(nodes, weights(), (1, M, K))
    machine = relax.VirtualMachine(build_cpu(import_onnx(proto).mod, TARGET), tvm.cpu())
    y = machine["main"](tvm.runtime.tensor(np.zeros((1, M, K), np.float32))).numpy()
    np.testing.assert_array_equal(y, np.broadcast_to(weights()["b"], y.shape))


def test_rounding_is_half_to_even() -> None:
    ties = (np.arange(64, dtype=np.float32) - 32).reshape(2, 32) / 2
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(ties.shape, "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            one, point = relax.const(np.float32(1.0)), relax.const(np.int8(1))
            steps = builder.emit(relax.op.quantize(x, one, point, axis=0, out_dtype="int8"))
            out = builder.emit_output((steps, builder.emit(relax.op.round(x))))
        builder.emit_func_output(out)
    machine = relax.VirtualMachine(build_cpu(builder.get(), TARGET), tvm.cpu())
    steps, rounded = (part.numpy() for part in machine["main"](tvm.runtime.tensor(ties)))
    np.testing.assert_array_equal(rounded, np.rint(ties))
    np.testing.assert_array_equal(steps, np.rint(ties) + 1)


# Only the weight


@pytest.mark.parametrize("shape", [(1, K), (1, 8, K), (3, 1, K)])
def test_a_few_rows_read_the_narrow_weight(shape: tuple[int, ...]) -> None:
    nodes = [QDQ[2], node("MatMul", ["x", "dw"], ["m"]), QDQ[4]]
    assert kernels(check(model(nodes, weights(), shape), shape)) == ["fused_narrow_matmul_add"]


@pytest.mark.parametrize("rows", [1, 4])
def test_a_few_rows_skip_what_a_narrow_weight_has_no_numbers_for(rows: int) -> None:
    k, shape = 64, (rows, 64)
    constants = weights() | {
        "w": np.random.default_rng(0).integers(-128, 128, (k, N)).astype(np.int8)
    }
    constants["w"][8:40] = 0
    nodes = [QDQ[2], node("MatMul", ["x", "dw"], ["m"]), QDQ[4]]
    proto = model(nodes, constants, shape)
    kind = "digit" if takes_digits(NarrowWeight(8, k), rows, k, TARGET) else "narrow"
    assert kernels(check(proto, shape)) == [f"fused_{kind}_matmul_add"]
    built = build(import_onnx(proto).mod, TARGET)
    assert list(built.kernels.values()) == [f"{kind}, 32 rows of 8 bits"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_matmul_nbits_of_a_few_rows(bits: int, zeros: bool) -> None:
    rng = np.random.default_rng(0)
    k, blocks = 64, 2
    constants = {
        "w": rng.integers(0, 256, (N, blocks, 32 * bits // 8)).astype(np.uint8),
        "s": rng.random(N * blocks).astype(np.float32),
    }
    if zeros:
        constants["z"] = rng.integers(0, 256, N * blocks * bits // 8).astype(np.uint8)
    product = node(
        "MatMulNBits", ["x", *constants], ["y"], domain="com.microsoft", K=k, N=N, bits=bits,
        block_size=32,
    )  # fmt: skip
    shape = (1, 3, k)
    assert kernels(check(model([product], constants, shape), shape)) == ["narrow_matmul"]


def test_scattered_groups_are_refused() -> None:
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.integers(0, 256, (N, 2, 16)).astype(np.uint8),
        "s": rng.random(N * 2).astype(np.float32),
        "g": rng.permutation(np.arange(64, dtype=np.int32) // 32),
    }
    product = node(
        "MatMulNBits", ["x", "w", "s", "", "g"], ["y"], domain="com.microsoft", K=64, N=N, bits=4,
        block_size=32,
    )  # fmt: skip
    assert "sort its rows" in refusal(model([product], constants, (1, 64)), (1, 64))


# Zeros in a weight of bytes


@pytest.mark.parametrize("zero", [(np.int8, 0), (np.uint8, 128)])
def test_groups_of_zeros_are_skipped(zero: tuple[Any, int]) -> None:
    dtype, point = zero
    rng = np.random.default_rng(0)
    keep = np.repeat(np.repeat(rng.random((16, 6)) < 0.4, 4, 0), 16, 1)
    w = (np.where(keep, rng.integers(-127, 128, keep.shape), 0) + point).astype(dtype)
    constants = {
        "w": w,
        "sw": np.full(96, 0.01, np.float32),
        "zw": np.full(96, point, dtype),
        "b": rng.standard_normal(96).astype(np.float32),
    }
    proto = model(QDQ, {**constants, **scales()}, (40, 64))
    mod = check(proto, (40, 64))
    assert kernels(mod)[-1] == "fused_block_int8_matmul_subtract_cast_multiply_add"
    rewrite = fuse(mod)[1]
    assert "of the dense byte product" in rewrite.sparse["w"]
    assert list(build(mod, TARGET).kernels.values()) == ["block_int8, 64 rows"]


def test_a_build_names_the_kernel_of_every_quantised_matmul() -> None:
    mod = import_onnx(qdq()).mod
    assert list(build(mod, TARGET).kernels.values()) == [f"int8, {K} rows"]
    narrow = import_onnx(blocked(18, (M, K))).mod
    assert list(build(narrow, TARGET).kernels.values()) == [f"narrow, {K} rows of 8 bits"]


# A whole encoder


class _Batches(CalibrationDataReader):
    def __init__(self, feeds: list[dict[str, Array]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Any:
        return next(self._feeds, None)


def test_a_quantised_encoder_equals_onnx_runtime(tmp_path: Path) -> None:
    config = BertConfig(layers=2, hidden=32, heads=2, ffn=96, vocab=20, max_position=16)
    proto = build_bert(config, random_bert_weights(config), seq=12, batch=1)
    imported = import_onnx(proto)
    onnx.save(proto, tmp_path / "floats.onnx")
    constants = {tensor.name for tensor in proto.graph.initializer}
    products = [n for n in proto.graph.node if n.op_type == "MatMul"]
    quantize_static(
        tmp_path / "floats.onnx",
        tmp_path / "bytes.onnx",
        _Batches([random_inputs(imported, seed) for seed in range(3)]),
        op_types_to_quantize=["MatMul"],
        nodes_to_exclude=[n.name for n in products if n.input[1] not in constants],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    quantised = import_onnx(onnx.load(tmp_path / "bytes.onnx"))
    assert len(fuse(quantised.mod)[1].fused) == 6 * config.layers
    names = kernels(quantised.mod)
    assert sum("int8_matmul" in name for name in names) == 6 * config.layers
    assert sum(name.startswith("attention") for name in names) == config.layers
    feeds = random_inputs(quantised, 7)
    machine = relax.VirtualMachine(build_cpu(quantised.mod, TARGET), tvm.cpu())
    inputs = [tvm.runtime.tensor(feeds[spec.name]) for spec in quantised.inputs]
    expected = reference(quantised.model, feeds)
    # A value near the middle of two steps may be rounded the other way, and that travels on.
    difference = np.abs(machine["main"](*inputs).numpy() - expected)
    assert np.median(difference) <= 0.01 * np.abs(expected).max()
    assert difference.max() <= 0.1 * np.abs(expected).max()
