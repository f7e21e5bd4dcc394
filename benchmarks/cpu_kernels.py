"""CPU kernels against the FMA peak and ONNX Runtime, one thread, interleaved in one process.

Prints the matmul shapes of MiniLM and BERT-base, V-row kernels at half density, and a whole
dense MiniLM with the time of each kernel:

    TVM_NUM_THREADS=1 TVM_BIND_THREADS=0 python benchmarks/cpu_kernels.py
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from tvm.script import tirx as T

from icd_tvm._tvm import relax, tvm
from icd_tvm.measure.latency import interleave
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.inputs import random_inputs
from icd_tvm.models.minilm import build_minilm
from icd_tvm.relax_passes.lower_cpu import build_cpu
from icd_tvm.tir_schedules.cpu import cpu_rules
from icd_tvm.tir_schedules.cpu.dense import pack_dense
from icd_tvm.tir_schedules.cpu.matmul_kinds import build_matmul, group_width, pack_matmul
from icd_tvm.tir_schedules.cpu.stack import compile_kernel
from icd_tvm.tir_schedules.cpu.tile import choose_tile
from icd_tvm.tir_schedules.target import host_target, vector_bits

SHAPES = {
    "MiniLM out": (128, 384, 384),
    "MiniLM qkv": (128, 384, 1152),
    "MiniLM fc1": (128, 384, 1536),
    "MiniLM fc2": (128, 1536, 384),
    "BERT out": (128, 768, 768),
    "BERT fc1": (128, 768, 3072),
    "BERT fc2": (128, 3072, 768),
}
CHAINS, STEPS = 24, 5_000
Arm = Callable[[], Any]


def peak_arm(target: Any) -> tuple[Arm, float]:
    """Return a call that does nothing but vector multiply-adds in registers, and its FLOP."""
    lanes = vector_bits(target) // 32

    @T.prim_func(private=True, s_tir=True)
    def kernel(X: T.Buffer((lanes,), "float32"), Y: T.Buffer((CHAINS, lanes), "float32")) -> None:
        with T.sblock("peak"):
            acc = T.sblock_alloc_buffer((CHAINS, lanes), "float32", scope="local")
            for c in T.unroll(CHAINS):
                for x in T.vectorized(lanes):
                    acc[c, x] = Y[c, x]
            for _ in range(STEPS):
                for c in T.unroll(CHAINS):
                    for x in T.vectorized(lanes):
                        acc[c, x] = acc[c, x] * X[x] + X[x]
            for c in T.unroll(CHAINS):
                for x in T.vectorized(lanes):
                    Y[c, x] = acc[c, x]

    main = compile_kernel(kernel, target)["main"]
    x = tvm.runtime.tensor(np.full(lanes, 0.5, np.float32))
    y = tvm.runtime.tensor(np.ones((CHAINS, lanes), np.float32))
    return lambda: main(x, y), 2.0 * STEPS * CHAINS * lanes


def kernel_arm(kind: str, shape: tuple[int, int, int], target: Any, rng: Any) -> Arm:
    """Return a call of one matmul kernel; the sparse kinds keep half of the rows per group."""
    m, k, n = shape
    weight = rng.standard_normal((k, n), dtype=np.float32)
    if kind == "dense":
        packed, kept = [pack_dense(weight, choose_tile(m, k, n, target).columns)], k
    else:
        group = group_width(kind) or n
        for start in range(0, n, group):
            weight[rng.permutation(k)[k // 2 :], start : start + group] = 0
        constants = pack_matmul(kind, weight, shape, target)
        packed, kept = list(constants.values()), constants["rows"].shape[-1]
    func = build_matmul(kind, shape, kept, target)
    sch = next(s for s in (rule.apply(func, target, False) for rule in cpu_rules()) if s)
    main = compile_kernel(sch.mod["main"], target)["main"]
    x = rng.standard_normal((m, k), dtype=np.float32)
    arrays = [x, *packed, np.empty((m, n), np.float32)]
    arguments = [tvm.runtime.tensor(array) for array in arrays]
    return lambda: main(*arguments)


def session(model: onnx.ModelProto, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def runtime_arm(shape: tuple[int, int, int], rng: Any, threads: int) -> Arm:
    """Return a call of ONNX Runtime on one MatMul with a constant weight."""
    m, k, n = shape
    weight = numpy_helper.from_array(rng.standard_normal((k, n), dtype=np.float32), "w")
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "matmul",
        [value("x", TensorProto.FLOAT, [m, k])],
        [value("y", TensorProto.FLOAT, [m, n])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    runner = session(model, threads)
    feeds = {"x": rng.standard_normal((m, k), dtype=np.float32)}
    return lambda: runner.run(None, feeds)


def best(arms: dict[str, Arm], repeats: int) -> dict[str, float]:
    samples = interleave(arms, repeats=repeats, warmup=10)
    return {name: float(values.min()) for name, values in samples.items()}


def matmul_table(target: Any, threads: int, repeats: int) -> None:
    peak, peak_flop = peak_arm(target)
    rng = np.random.default_rng(0)
    kinds = ("dense", "vcol8", "vcol16", "vrow16", "vrow32", "rowlist")
    columns = "".join(f"{kind:>8s}" for kind in kinds[1:])
    print(f"shape (m k n)              dense us  GF/s  of peak  vs ORT{columns}")
    for name, shape in SHAPES.items():
        arms = {kind: kernel_arm(kind, shape, target, rng) for kind in kinds}
        arms = {**arms, "ort": runtime_arm(shape, rng, threads), "peak": peak}
        times = best(arms, repeats)
        dense = times["dense"]
        rate = 2.0 * np.prod(shape, dtype=float) / dense
        share = rate / (threads * peak_flop / times["peak"])
        sparse = "".join(f"{times[kind] / dense:8.2f}" for kind in kinds[1:])
        sizes = " ".join(str(extent) for extent in shape)
        print(
            f"{name:11s}{sizes:15s}{dense * 1e6:9.0f}{rate / 1e9:6.0f}{share:9.2f}"
            f"{dense / times['ort']:8.2f}{sparse}"
        )
    print("of peak: of multiply-adds in registers; last columns: half density over our dense")


def model_table(target: Any, threads: int, repeats: int) -> None:
    imported = import_onnx(build_minilm())
    feeds = random_inputs(imported)
    arguments = [tvm.runtime.tensor(feeds[spec.name]) for spec in imported.inputs]
    executable = build_cpu(imported.mod, target)
    main = relax.VirtualMachine(executable, tvm.cpu())["main"]
    runner = session(imported.model, threads)
    times = best(
        {"ours": lambda: main(*arguments), "ort": lambda: runner.run(None, feeds)}, repeats
    )
    print(
        f"MiniLM, 128 tokens, dense: {times['ours'] * 1e3:.2f} ms, ONNX Runtime "
        f"{times['ort'] * 1e3:.2f} ms, ratio {times['ours'] / times['ort']:.3f}"
    )
    breakdown = kernel_times(executable, arguments)
    for name, (seconds, count) in sorted(breakdown.items(), key=lambda item: -item[1][0])[:8]:
        print(f"{seconds * 1e6:9.0f} us {count:4d} x {name}")


def kernel_times(executable: Any, arguments: list[Any]) -> dict[str, tuple[float, int]]:
    """Return the least seconds per inference and the calls of each function of the VM."""
    stamps: dict[str, list[float]] = defaultdict(list)

    def stamp(func: Any, name: str, before: bool, result: Any, *args: Any) -> Any:
        stamps[name].append(time.perf_counter())
        return relax.VMInstrumentReturnKind.NO_OP

    machine = relax.VirtualMachine(executable, tvm.cpu())
    machine.set_instrument(stamp)
    least: dict[str, tuple[float, int]] = {}
    for _ in range(20):
        stamps.clear()
        machine["main"](*arguments)
        for name, marks in stamps.items():
            spent = sum(marks[1::2]) - sum(marks[0::2])
            known = least.get(name, (spent, 0))[0]
            least[name] = (min(spent, known), len(marks) // 2)
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="also set TVM_NUM_THREADS")
    parser.add_argument("--repeats", type=int, default=60)
    options = parser.parse_args()
    target = host_target(options.threads)
    matmul_table(target, options.threads, options.repeats)
    model_table(target, options.threads, options.repeats)


if __name__ == "__main__":
    main()
