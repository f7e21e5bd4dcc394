"""Byte and narrow-weight kernels against the machine and ONNX Runtime, one thread, interleaved.

Prints the byte products of MiniLM and BERT-base as shares of the measured peak of the byte
product instruction, decoding steps as shares of the measured read bandwidth (weights from
memory), and MiniLM in fp32, W8A8 (quantize and dequantize nodes) and dynamic int8. Times are the
least CPU time of the one thread, which neighbours on the machine disturb less than wall time:

    TVM_NUM_THREADS=1 TVM_BIND_THREADS=0 python benchmarks/cpu_int8.py
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from cpu_kernels import SHAPES, kernel_arm, kernel_times, session
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from icd_tvm._tvm import relax, tirx, tvm
from icd_tvm.models.importer import ImportedModel, import_onnx
from icd_tvm.models.inputs import random_inputs
from icd_tvm.models.minilm import build_minilm
from icd_tvm.relax_passes.lower_cpu import build_cpu
from icd_tvm.tir_schedules.cpu import cpu_rules
from icd_tvm.tir_schedules.cpu.block_int8 import block_int8_matmul, pack_block_int8
from icd_tvm.tir_schedules.cpu.dot_product import dot_product
from icd_tvm.tir_schedules.cpu.gemv import NarrowWeight, narrow_matmul, narrow_tile, pack_narrow
from icd_tvm.tir_schedules.cpu.int8_matmul import int8_matmul, int8_tile, pack_int8
from icd_tvm.tir_schedules.cpu.stack import compile_kernel
from icd_tvm.tir_schedules.target import host_target

DECODE = {
    "SmolLM2 up": (1, 576, 1536),
    "SmolLM2 head": (1, 576, 49152),
    "Mamba out": (1, 2560, 5120),
    "4 rows": (4, 2560, 5120),
    "8 rows": (8, 2560, 5120),
}
CHAINS, STEPS = 24, 5_000
READ_BYTES = COLD_BYTES = 128 * 2**20
Shape = tuple[int, int, int]
Arm = Callable[[], Any]
Constants = dict[str, Any]


def best(arms: dict[str, Arm], repeats: int) -> dict[str, float]:
    """Return the least seconds of CPU time of each arm, run in turns."""
    least = dict.fromkeys(arms, float("inf"))
    for _ in range(repeats):
        for name, arm in arms.items():
            start = time.thread_time()
            arm()
            least[name] = min(least[name], time.thread_time() - start)
    return least


def peak_arm(target: Any) -> tuple[Arm, float]:
    """Return a call that does nothing but byte products in registers, and its operations."""
    dot = dot_product(target)
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        y = T.arg("Y", T.Buffer((CHAINS, dot.lanes), "int32"))
        with T.sblock("peak"):
            sums = T.sblock_alloc_buffer((CHAINS, dot.lanes), "int32", scope="local")
            run = T.ramp(0, 1, dot.lanes)
            with T.unroll(CHAINS) as c:
                T.buffer_store(sums, y[c, run], [c, run])
            with T.serial(STEPS), T.unroll(CHAINS) as c:
                weight = T.reinterpret(f"int8x{4 * dot.lanes}", y[0, run])
                four = tirx.IntImm("int32", 0x01020304)
                T.buffer_store(sums, dot.add(sums[c, run], four, weight), [c, run])
            with T.unroll(CHAINS) as c:
                T.buffer_store(y, sums[c, run], [c, run])
    main = compile_kernel(builder.get(), target)["main"]
    argument = tvm.runtime.tensor(np.ones((CHAINS, dot.lanes), np.int32))
    return lambda: main(argument), 8.0 * STEPS * CHAINS * dot.lanes


def read_arm(target: Any) -> Arm:
    """Return a call that sums `READ_BYTES` of memory."""
    rows = READ_BYTES // (16 * 64)
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        x = T.arg("X", T.Buffer((rows, 256), "float32"))
        y = T.arg("Y", T.Buffer((256,), "float32"))
        with T.sblock("read"):
            sums = T.sblock_alloc_buffer((256,), "float32", scope="local")
            with T.serial(16) as c, T.vectorized(16) as lane:
                T.buffer_store(sums, tirx.FloatImm("float32", 0.0), [c * 16 + lane])
            with T.serial(rows) as r, T.unroll(16) as c, T.vectorized(16) as lane:
                at = c * 16 + lane
                T.buffer_store(sums, sums[at] + x[r, at], [at])
            with T.serial(16) as c, T.vectorized(16) as lane:
                T.buffer_store(y, sums[c * 16 + lane], [c * 16 + lane])
    main = compile_kernel(builder.get(), target)["main"]
    data = tvm.runtime.tensor(np.zeros((rows, 256), np.float32))
    out = tvm.runtime.tensor(np.zeros(256, np.float32))
    return lambda: main(data, out)


def compiled(func: Any, target: Any) -> Any:
    sch = next(s for s in (rule.apply(func, target, False) for rule in cpu_rules()) if s)
    return compile_kernel(sch.mod["main"], target)["main"]


def cold(constants: list[Any]) -> Iterator[list[Any]]:
    """Return copies of the constants in turn, together larger than the caches."""
    copies = max(1, COLD_BYTES // sum(array.nbytes for array in constants))
    return cycle([[tvm.runtime.tensor(array) for array in constants] for _ in range(copies)])


def byte_arm(shape: Shape, target: Any, rng: Any, *, warm: bool = True) -> Arm:
    m, k, n = shape
    weight = rng.integers(-127, 128, (k, n)).astype(np.int8)
    packed = pack_int8(weight, int8_tile(m, k, n, target).columns)
    main = compiled(int8_matmul(m, k, n, target), target)
    x = tvm.runtime.tensor(rng.integers(0, 256, (m, k)).astype(np.uint8))
    y = tvm.runtime.tensor(np.empty((m, n), np.int32))
    weights = cycle([[tvm.runtime.tensor(packed)]]) if warm else cold([packed])
    return lambda: main(x, *next(weights), y)


def block_arm(shape: Shape, vectors: int, target: Any, rng: Any) -> Arm:
    """Return a call on a weight of which every group of columns keeps half of the quads."""
    m, k, n = shape
    tile = int8_tile(m, k, n, target, vectors)
    weight = rng.integers(-127, 128, (k // 4, 4, n)).astype(np.int8)
    for start in range(0, n, tile.columns):
        weight[rng.permutation(k // 4)[k // 8 :], :, start : start + tile.columns] = 0
    constants = pack_block_int8(weight.reshape(k, n), tile.columns)
    func = block_int8_matmul(m, k, n, constants[1].shape[1], tile, target)
    main = compiled(func, target)
    arrays = [rng.integers(0, 256, (m, k)).astype(np.uint8), *constants, np.empty((m, n), np.int32)]
    arguments = [tvm.runtime.tensor(array) for array in arrays]
    return lambda: main(*arguments)


def narrow_arm(shape: Shape, bits: int, block: int, target: Any, rng: Any) -> tuple[Arm, int]:
    """Return a call of a narrow kernel on cold weights, and the bytes of its constants."""
    m, k, n = shape
    form = NarrowWeight(bits, block, -8 if bits == 4 else 0)
    values = rng.integers(-8, 8, (k, n))
    scale = rng.random((k // block, n))
    constants = pack_narrow(values, [scale], form, narrow_tile(m, target).columns)
    main = compiled(narrow_matmul(m, k, n, form, target), target)
    x = tvm.runtime.tensor(rng.standard_normal((m, k), dtype=np.float32))
    y = tvm.runtime.tensor(np.empty((m, n), np.float32))
    weights = cold(constants)
    return lambda: main(x, *next(weights), y), sum(array.nbytes for array in constants)


def node_arm(
    op: str, shape: Shape, constants: Constants, *, copies: int = 1, domain: str = "", **attrs: Any
) -> Arm:
    """Return a call of ONNX Runtime on one node; ``copies`` sessions take turns."""
    m, k, n = shape
    kinds = {"MatMulInteger": ("UINT8", "INT32"), "QLinearMatMul": ("UINT8", "UINT8")}
    source, result = (getattr(TensorProto, t) for t in kinds.get(op, ("FLOAT", "FLOAT")))
    names = ["x", *constants] if op != "QLinearMatMul" else ["x", "sx", "zx", *list(constants)[2:]]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node(op, names, ["y"], domain=domain, **attrs)],
        "node",
        [value("x", source, [m, k])],
        [value("y", result, [m, n])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=sets, ir_version=10)
    runners = cycle([session(model, 1) for _ in range(copies)])
    feeds = {"x": np.ones((m, k), np.float32 if source == TensorProto.FLOAT else np.uint8)}
    return lambda: next(runners).run(None, feeds)


def runtime_arms(shape: Shape, rng: Any) -> dict[str, Arm]:
    """Return ONNX Runtime's products of one shape."""
    _, k, n = shape
    w = rng.integers(-127, 128, (k, n)).astype(np.int8)
    one, zero, columns = np.float32(0.01), np.uint8(0), np.full(n, 0.01, np.float32)
    points = np.zeros(n, np.int8)
    linear = {"sx": one, "zx": zero, "w": w, "sw": columns, "zw": points, "so": one, "zo": zero}
    dynamic = {"w": w, "sw": columns, "zw": points}
    return {
        "MatMul": node_arm("MatMul", shape, {"w": w.astype(np.float32)}),
        "MatMulInteger": node_arm("MatMulInteger", shape, {"w": w}),
        "QLinearMatMul": node_arm("QLinearMatMul", shape, linear),
        "DynamicQuantizeMatMul": node_arm(
            "DynamicQuantizeMatMul", shape, dynamic, domain="com.microsoft"
        ),
    }


def matmul_table(target: Any, repeats: int) -> None:
    peak, operations = peak_arm(target)
    rng = np.random.default_rng(0)
    others = ("MatMul", "MatMulInteger", "QLinearMatMul", "DynamicQuantizeMatMul")
    heads = "".join(f"{name:>23s}" for name in others)
    print(f"bytes (m k n)               us   GOP/s  of peak  / our fp32  half16  half32 {heads}")
    for name, shape in SHAPES.items():
        arms = {
            "int8": byte_arm(shape, target, rng),
            "dense": kernel_arm("dense", shape, target, rng),
            **{f"half {v}": block_arm(shape, v, target, rng) for v in (1, 2)},
        }
        times = best({**arms, **runtime_arms(shape, rng), "peak": peak}, repeats)
        ours = times["int8"]
        rate = 2.0 * np.prod(shape, dtype=float) / ours
        share = rate * times["peak"] / operations
        ratios = "".join(f"{ours / times[other]:23.2f}" for other in others)
        sizes = " ".join(str(extent) for extent in shape)
        print(
            f"{name:11s}{sizes:14s}{ours * 1e6:6.0f}{rate / 1e9:8.0f}{share:9.2f}"
            f"{ours / times['dense']:12.2f}"
            f"{times['half 1'] / ours:8.2f}{times['half 2'] / ours:8.2f} {ratios}"
        )
    print(
        "of peak: of byte products in registers; half: groups of 16 and 32 columns that keep half"
    )
    print("of their quads, over dense bytes; last columns: our time over ONNX Runtime's")


def nbits_arm(shape: Shape, bits: int, rng: Any) -> Arm:
    _, k, n = shape
    packed = rng.integers(0, 256, (n, k // 32, 4 * bits)).astype(np.uint8)
    constants = {"w": packed, "s": np.ones(n * k // 32, np.float32)}
    copies = min(16, max(1, COLD_BYTES // packed.nbytes))
    sizes = {"K": k, "N": n, "bits": bits, "block_size": 32}
    return node_arm("MatMulNBits", shape, constants, copies=copies, domain="com.microsoft", **sizes)


def decode_table(target: Any, repeats: int) -> None:
    read = read_arm(target)
    rng = np.random.default_rng(0)
    print("decode (m k n): us, GB/s of the weights (share of read bandwidth)")
    for name, shape in DECODE.items():
        _, k, n = shape
        arms: dict[str, Arm] = {"read": read, "W8A8": byte_arm(shape, target, rng, warm=False)}
        sizes = {"W8A8": k * n}
        for label, bits, block in (("int8", 8, k), ("int4 g32", 4, 32)):
            arms[label], sizes[label] = narrow_arm(shape, bits, block, target, rng)
        arms["ORT int8 g32"], arms["ORT int4 g32"] = (nbits_arm(shape, b, rng) for b in (8, 4))
        times = best(arms, repeats)
        bandwidth = READ_BYTES / times["read"]
        print(f"{name} {shape}, read {bandwidth / 1e9:.1f} GB/s")
        for label, seconds in times.items():
            rate = sizes.get(label, 0) / seconds
            share = f"{rate / 1e9:6.1f} GB/s ({rate / bandwidth:.2f})" if rate else ""
            if label != "read":
                print(f"  {label:14s}{seconds * 1e6:8.0f} us {share}")


class _Batches(CalibrationDataReader):
    def __init__(self, imported: ImportedModel) -> None:
        self._batches = iter([random_inputs(imported, seed) for seed in range(4)])

    def get_next(self) -> Any:
        return next(self._batches, None)


def quantised(model: onnx.ModelProto, folder: Path) -> dict[str, onnx.ModelProto]:
    """Return the model with its constant products in W8A8, and quantised dynamically.

    Activations are uint8 over their full range, weights int8 with a scale for every column.
    ``W8A8 out`` quantises the results of the products too, which ONNX Runtime needs in order to
    multiply bytes.
    """
    source = folder / "model.onnx"
    onnx.save(model, source)
    weights = {tensor.name for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    others = [node.name for node in products if node.input[1] not in weights]
    made = {"fp32": model}
    for name, kept in (("W8A8", ["MatMul"]), ("W8A8 out", [])):
        quantize_static(
            source,
            folder / "static.onnx",
            _Batches(import_onnx(model)),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=others,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"OpTypesToExcludeOutputQuantization": kept},
        )
        made[name] = onnx.load(folder / "static.onnx")
    quantize_dynamic(
        source, folder / "dynamic.onnx", op_types_to_quantize=["MatMul"], nodes_to_exclude=others
    )
    return {**made, "dynamic": onnx.load(folder / "dynamic.onnx")}


def model_table(target: Any, repeats: int) -> None:
    arms: dict[str, Arm] = {}
    executables: dict[str, Any] = {}
    outputs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = quantised(build_minilm(), Path(folder))
    for name, model in models.items():
        imported = import_onnx(model)
        feeds = random_inputs(imported, 9)
        arguments = [tvm.runtime.tensor(feeds[spec.name]) for spec in imported.inputs]
        executables[name] = (build_cpu(imported.mod, target), arguments)
        main = relax.VirtualMachine(executables[name][0], tvm.cpu())["main"]
        runner = session(model, 1)
        arms[name] = lambda main=main, arguments=arguments: main(*arguments)
        arms[f"ORT {name}"] = lambda runner=runner, feeds=feeds: runner.run(None, feeds)
        outputs[name], outputs[f"ORT {name}"] = main(*arguments).numpy(), runner.run(None, feeds)[0]
    times = best(arms, repeats)
    for name, seconds in times.items():
        distance = np.abs(outputs[name] - outputs["fp32"]).max() / np.abs(outputs["fp32"]).max()
        print(
            f"MiniLM {name:12s}{seconds * 1e3:7.2f} ms, / our fp32 {seconds / times['fp32']:.3f}, "
            f"largest difference to fp32 {distance:.4f}"
        )
    for kernel, (seconds, count) in sorted(
        kernel_times(*executables["W8A8"]).items(), key=lambda item: -item[1][0]
    )[:8]:
        print(f"{seconds * 1e6:9.0f} us {count:4d} x {kernel}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--only", choices=("matmul", "decode", "model"))
    options = parser.parse_args()
    target = host_target(1)
    tables = {"matmul": matmul_table, "decode": decode_table, "model": model_table}
    for name, table in tables.items():
        if options.only in (None, name):
            table(target, options.repeats)


if __name__ == "__main__":
    main()
