"""The work of a decoding step: products of few rows against memory, and whole steps against peers.

"gemv" streams weights that no cache holds, in turns with a kernel that only reads, and gives the
share of its bandwidth, of the bytes that must be read. With eight rows the multiply-adds alone
may take longer than the bytes: "most" is the share that the measured peaks allow; bf16 has dot
products, for which it is too low.

"step" is one token of SmolLM2-135M with int8 weights and a KV cache that a real prompt filled,
beside other runtimes with weights of 8 bits on the same graph, which hands the cache in and out;
llama.cpp, at Q8_0 and with its own float16 cache of the same prompt, is shown but is not one of
the peers that the bar is about. A second line compares the logits of all with those of ONNX
Runtime in float32: the share of tokens with the same largest logit, the largest difference, and
the same over the largest logit.

"typeseg" is a trained Mamba of 512 tokens; ONNX Runtime's Scan is slow, so its bar is low.

What "int8" is: ours and openvino-int8w keep activations in floats; onnxruntime-int8 and torch-int8
quantise them at run time, a tensor at a time; onnxruntime-int8w and llama.cpp by blocks.

    python benchmarks/cpu_decode.py [--only gemv step typeseg] [--quick] [--threads 1 2]
        [--slots N ...] [--caches NAMES] [--peers NAMES] [--gguf FILE] [--work FOLDER]
        [--out docs/results/cpu-decode.json]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle, product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from cpu_peers import Case, run
from cpu_peers import show as show_case
from decode_step import CACHES, PEERS, Contest, show_logits, step_line
from peer_ratios import keep

PARTS = ("gemv", "step", "typeseg")
SHAPES = ((10240, 2560), (2560, 10240))
ROWS = (1, 4, 8)
KINDS = ("fp32", "bf16", "int8", "int8 + 50 % block")
GEMV_BAR, TYPESEG_BAR = 0.85, 0.10
SLOTS = (1024, 4096)
# Columns of a block of zeros: those of the widest panel, so that all kernels skip as much.
BLOCK_COLUMNS = 64
# Several copies of a weight, so that each call reads from memory.
COPY_BYTES = 160 * 2**20
Line = dict[str, Any]


# -- gemv


def kernel(kind: str, m: int, k: int, n: int, target: Any) -> tuple[Any, list[np.ndarray], int]:
    """Return the function that a model would get, its constants, and the digits of its X, or 0."""
    from icd_tvm.relax_passes.narrow_weight import narrow_product
    from icd_tvm.tir_schedules.cpu.bf16_matmul import bf16_matmul, bf16_tile, pack_bf16
    from icd_tvm.tir_schedules.cpu.digit_matmul import DIGITS
    from icd_tvm.tir_schedules.cpu.gemv import NarrowWeight, narrow_matmul, narrow_tile, pack_narrow

    rng = np.random.default_rng(0)
    if kind == "bf16":
        tile = bf16_tile(m, k, n, target)
        packed = [pack_bf16(rng.standard_normal((k, n), dtype=np.float32), tile.columns)]
        return bf16_matmul(m, k, n, target, tile=tile), packed, 0
    if kind == "fp32":
        form, weight = NarrowWeight(32, k), rng.standard_normal((k, n), dtype=np.float32)
        packed = pack_narrow(weight, [], form, narrow_tile(m, target).columns)
        return narrow_matmul(m, k, n, form, target), packed, 0
    product = narrow_product(byte_weight(kind, k, n), (m,), target)
    digits = DIGITS if product.name == "digit_matmul" else 0
    return product.func, list(product.constants.values()), digits


def byte_weight(kind: str, k: int, n: int) -> Any:
    """Return a weight of bytes, from random numbers; half of its blocks are zeros if so asked."""
    from icd_tvm.relax_passes.quantized_operands import Weight
    from icd_tvm.tir_schedules.cpu.gemv import SKIP_ROWS

    rng = np.random.default_rng(0)
    values = rng.integers(-127, 128, (k, n), np.int8)
    if kind != "int8":
        runs = values.reshape(k // SKIP_ROWS, SKIP_ROWS, -1, BLOCK_COLUMNS)
        for panel in range(runs.shape[2]):
            runs[rng.permutation(len(runs))[len(runs) // 2 :], :, panel] = 0
    return Weight(values, np.zeros((1, 1), np.int8), np.full((1, n), 0.01, np.float32), "weight")


def gemv_arm(kind: str, m: int, k: int, n: int, target: Any) -> tuple[Callable[[], Any], int, int]:
    """Return a call that reads another copy of the weight each time, the bytes it reads, digits."""
    from icd_tvm._tvm import tvm
    from icd_tvm.tir_schedules.cpu import cpu_rules
    from icd_tvm.tir_schedules.cpu.stack import compile_kernel

    func, packed, digits = kernel(kind, m, k, n, target)
    sch = next(s for s in (rule.apply(func, target, False) for rule in cpu_rules()) if s)
    main = compile_kernel(sch.mod["main"], target)["main"]
    x = np.random.default_rng(1).standard_normal((m, k), dtype=np.float32)
    if kind == "bf16":
        # In a model the kernel before it rounds.
        x = x.astype(ml_dtypes.bfloat16).view(np.uint16)
    size = sum(array.nbytes for array in packed)
    copies = [[tvm.runtime.tensor(a) for a in packed] for _ in range(1 + COPY_BYTES // size)]
    source, out = tvm.runtime.tensor(x), tvm.runtime.tensor(np.zeros((m, n), np.float32))
    ring = cycle(copies)
    return lambda: main(source, *next(ring), out), size + x.nbytes + 4 * m * n, digits


def gemv_lines(threads: int, rounds: int) -> Iterator[Line]:
    """Time all kinds of weight of a shape in turns with plain reading."""
    from icd_tvm.measure.byte_peak import byte_peak
    from icd_tvm.measure.latency import interleave
    from icd_tvm.measure.peaks import machine_peaks, memory_reader
    from icd_tvm.tir_schedules.target import host_target

    target = host_target(threads)
    read, read_bytes = memory_reader(target)
    flops, products = machine_peaks(target)["peak_flops"], cache(lambda: byte_peak(target))
    for (k, n), m in product(SHAPES, ROWS):
        arms = {kind: gemv_arm(kind, m, k, n, target) for kind in KINDS}
        calls = {**{kind: call for kind, (call, *_) in arms.items()}, "read": read}
        samples = interleave(calls, repeats=rounds, warmup=3)
        bandwidth = read_bytes / samples["read"]
        for kind, (_, size, digits) in arms.items():
            rate = size / samples[kind]
            work = 2 * m * n * (k // 2 if kind.endswith("block") else k)
            computing = digits * work / products() if digits else work / flops
            reading = size / bandwidth.max()
            yield {
                "case": f"GEMV {m} x {k} x {n} {kind}",
                "threads": threads,
                "bytes": size,
                "bandwidth": float(np.median(bandwidth)),
                "share": {
                    "median": float(np.median(rate / bandwidth)),
                    "best": float(rate.max() / bandwidth.max()),
                },
                "most": min(1.0, reading / computing),
                "bar": GEMV_BAR,
            }


# -- table


def show(line: Line) -> str:
    """Return a line of the Markdown table; a step has a second one."""
    if "share" not in line:
        return "\n".join([show_case(line), *([show_logits(line)] if "logits" in line else [])])
    share = line["share"]
    verdict = "met" if share["median"] >= line["bar"] else "MISSED"
    if verdict == "MISSED" and line["most"] < line["bar"]:
        verdict = f"MISSED: the multiply-adds allow {line['most']:.2f}"
    rate = f"{share['median']:.2f} / {share['best']:.2f} of {line['bandwidth'] / 1e9:.1f} GB/s"
    return (
        f"| {line['case']} | {line['threads']} | {line['bytes'] / 2**20:.0f} MiB | {rate} "
        f"| {line['bar']:.2f} | {verdict} |"
    )


def measure(arguments: argparse.Namespace, threads: int) -> Iterator[Line]:
    """Yield the lines of one thread count; TVM's pool has its size for the process's life."""
    if "gemv" in arguments.only:
        yield from gemv_lines(threads, 20 if arguments.quick else 60)
    if "step" in arguments.only:
        contest = Contest(arguments.caches, arguments.peers, arguments.gguf, arguments.work)
        # The longest prompt first: the shorter ones are its beginnings.
        for slots in sorted(arguments.slots, reverse=True):
            yield step_line(slots, threads, 20 if arguments.quick else 100, contest)
    if "typeseg" in arguments.only:
        case = Case(
            "typeseg Mamba T=512",
            "dense",
            TYPESEG_BAR,
            ("onnxruntime",),
            ("typeseg", "--seq", "512"),
        )
        with tempfile.TemporaryDirectory() as folder:
            yield run(case, threads, 40 if arguments.quick else 200, Path(folder) / "run")


def in_processes(arguments: argparse.Namespace) -> int:
    """Run this file once for every thread count."""
    for threads in arguments.threads:
        environment = {**os.environ, "TVM_NUM_THREADS": str(threads)}
        environment["ICD_DECODE_THREADS"] = str(threads)
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:]], env=environment)
        if done.returncode:
            return done.returncode
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="a third of the rounds or fewer")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--slots", type=int, nargs="+", default=SLOTS)
    parser.add_argument("--caches", nargs="*", choices=CACHES, default=CACHES)
    parser.add_argument("--peers", nargs="*", default=PEERS)
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M at Q8_0, for llama.cpp")
    parser.add_argument("--work", type=Path, help="folder that keeps models and the prompt's cache")
    parser.add_argument("--out", type=Path, help="JSON of all lines; lines of other runs stay")
    arguments = parser.parse_args()
    own = os.environ.get("ICD_DECODE_THREADS")
    if own is None:
        print("| case | threads | median ms, or bytes | ours | bar | |")
        print("| --- | --- | --- | --- | --- | --- |", flush=True)
        sys.exit(in_processes(arguments))
    for line in measure(arguments, int(own)):
        print(show(line), flush=True)
        if arguments.out:
            keep(arguments.out, line)


if __name__ == "__main__":
    main()
