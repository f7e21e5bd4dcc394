"""The work of a decoding step: products of few rows against memory, and whole steps against peers.

"gemv" streams weights that no cache holds, in turns with a kernel that only reads, and gives the
share of its bandwidth, of the bytes that must be read. With eight rows the multiply-adds alone
may take longer than the bytes: "most" is the share that the measured peaks allow.

"step" is one token of SmolLM2-135M with int8 weights and a full KV cache of floats, beside other
runtimes with weights of 8 bits on the same graph, which hands the cache in and out; llama.cpp, at
Q8_0 and with its own float16 cache, is shown but is not one of the peers that the bar is about.

"typeseg" is a trained Mamba of 512 tokens; ONNX Runtime's Scan is slow, so its bar is low.

What "int8" is: ours and openvino-int8w keep activations in floats; onnxruntime-int8 and torch-int8
quantise them at run time, a tensor at a time; onnxruntime-int8w and llama.cpp by blocks.

    python benchmarks/cpu_decode.py [--only gemv step typeseg] [--quick] [--threads 1 2]
        [--slots N ...] [--peers NAMES] [--gguf FILE] [--out docs/results/cpu-decode.json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from cpu_peers import Case, run
from cpu_peers import show as show_case
from peer_ratios import to_fastest

PARTS = ("gemv", "step", "typeseg")
SHAPES = ((10240, 2560), (2560, 10240))
ROWS = (1, 4, 8)
KINDS = ("fp32", "bf16", "int8", "int8 + 50 % block")
GEMV_BAR, STEP_BAR, TYPESEG_BAR = 0.85, 0.85, 0.10
SLOTS = (1024, 4096)
QUANT = "int8; *lm_head*=int8"
PEERS = ("onnxruntime-int8", "onnxruntime-int8w", "openvino-int8w", "torch-int8")
LLAMA = "llamacpp"
# Standard deviation of the cached keys and values.
SPREAD = np.float32(0.05)
# Several copies of a weight, so that each call reads from memory.
COPY_BYTES = 160 * 2**20
Line = dict[str, Any]


# -- gemv


def kernel(kind: str, m: int, k: int, n: int, target: Any) -> tuple[Any, list[np.ndarray], int]:
    """Return the function that a model would get, its constants, and the digits of its X, or 0."""
    from icd_tvm.tir_schedules.cpu.digit_matmul import (
        DIGITS,
        digit_matmul,
        digit_tile,
        pack_digits,
        takes_digits,
    )
    from icd_tvm.tir_schedules.cpu.gemv import (
        SKIP_ROWS,
        NarrowWeight,
        narrow_matmul,
        narrow_tile,
        pack_narrow,
        pack_skipping,
    )

    rng = np.random.default_rng(0)
    if kind in ("fp32", "bf16"):
        form = NarrowWeight(32 if kind == "fp32" else 16, k)
        values = rng.standard_normal((k, n), dtype=np.float32)
        packed = pack_narrow(values, [], form, narrow_tile(m, target).columns)
        return narrow_matmul(m, k, n, form, target), packed, 0
    form, values = NarrowWeight(8, k), rng.integers(-127, 128, (k, n), np.int8)
    scale = np.full((1, n), 0.01, np.float32)
    digits = takes_digits(form, m, k, target)
    columns = (digit_tile(m) if digits else narrow_tile(m, target)).columns
    if kind == "int8":
        packed = pack_narrow(values, [scale], form, columns)
    else:
        runs = values.reshape(k // SKIP_ROWS, SKIP_ROWS, -1, columns)
        for panel in range(runs.shape[2]):
            runs[rng.permutation(len(runs))[len(runs) // 2 :], :, panel] = 0
        form, packed = pack_skipping(values, scale, columns)
    if digits:
        return digit_matmul(m, k, n, form, target), pack_digits(packed), DIGITS
    return narrow_matmul(m, k, n, form, target), packed, 0


def gemv_arm(kind: str, m: int, k: int, n: int, target: Any) -> tuple[Callable[[], Any], int, int]:
    """Return a call that reads another copy of the weight each time, the bytes it reads, digits."""
    from icd_tvm._tvm import tvm
    from icd_tvm.tir_schedules.cpu.stack import compile_kernel
    from icd_tvm.tir_schedules.cpu.tile_builder import ExplicitTileRule

    func, packed, digits = kernel(kind, m, k, n, target)
    sch = ExplicitTileRule().apply(func, target, False)
    main = compile_kernel(sch.mod["main"], target)["main"]
    x = np.random.default_rng(1).standard_normal((m, k), dtype=np.float32)
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


# -- step


def step_feeds(slots: int) -> dict[str, np.ndarray]:
    """Return a token and a full cache, of values so small that attention is about even.

    They do not change the time; large ones would make a chaos of it, whose outputs tell nothing.
    """
    from kv_step import feeds

    return {
        name: SPREAD * array if array.dtype == np.float32 else array
        for name, array in feeds(slots).items()
    }


def step_arms(model: onnx.ModelProto, threads: int) -> dict[str, Any]:
    """Build our step: on a cache of floats, and on one of bytes."""
    from icd_tvm._tvm import apply_pass
    from icd_tvm.adapters.kv_spec import KVSpec
    from icd_tvm.models.decoder import SMOLLM2, cache_states
    from icd_tvm.models.importer import import_onnx
    from icd_tvm.relax_passes.apply_kv_compress import ApplyKVCompress
    from icd_tvm.relax_passes.apply_quant import ApplyQuant, parse_quant
    from icd_tvm.relax_passes.attach_layout_tags import AttachLayoutTags
    from icd_tvm.relax_passes.layer_rules import parse_request
    from icd_tvm.runtime.build import build
    from icd_tvm.tir_schedules.target import host_target

    mod = apply_pass(AttachLayoutTags(cache_states(SMOLLM2)), import_onnx(model).mod)
    mod = apply_pass(ApplyQuant(parse_request(QUANT, parse_quant)), mod)
    target = host_target(threads)
    bytes_too = apply_pass(ApplyKVCompress(KVSpec(0.0, 128, dtype="int8")), mod)
    return {"ours": build(mod, target), "ours, int8 cache": build(bytes_too, target)}


def step_line(
    slots: int, threads: int, rounds: int, peers: tuple[str, ...], gguf: Path | None
) -> Line:
    """Measure one size of the cache, all runtimes in turns."""
    from icd_tvm.measure.peers import compare_with_peer
    from icd_tvm.measure.statistics import summarise
    from icd_tvm.models.smollm2 import build_smollm2_step

    feeds = step_feeds(slots)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="icd-step-")))
        model = build_smollm2_step(slots)
        onnx.save(model, folder / "step.onnx")
        built = step_arms(model, threads)
        del model
        files = dict.fromkeys(peers, folder / "step.onnx") | ({LLAMA: gguf} if gguf else {})
        running, missing = started(stack, files, feeds, threads)
        calls = {name: arm.caller(feeds) for name, arm in built.items()}
        samples = compare_with_peer(calls, running, blocks=-(-rounds // 5), block_repeats=5)
        apart = {name: differences(arm, feeds, running) for name, arm in built.items()}
        info = {name: peer.info for name, peer in running.items()}
    times = {name: summarise(values) for name, values in samples.items()}
    line: Line = {"case": f"SmolLM2-135M step, int8 weights, {slots} slots", "threads": threads}
    line |= {"ms": {name: [t["median"], t["min"]] for name, t in times.items()}}
    line |= {"bar": STEP_BAR, "rounds": len(samples["ours"]), "missing": missing, "peers": info}
    line |= {"logits_max_relative_difference": apart}
    present = [name for name in peers if name in times]
    if not present:
        return {**line, "failed": "; ".join(missing.values()) or "no peer was asked for"}
    line |= to_fastest("ours", times, present)
    other = times.get(LLAMA)
    if other:
        line["to_llamacpp"] = {name: times[name]["median"] / other["median"] for name in built}
    return line


def started(
    stack: contextlib.ExitStack, files: dict[str, Path], feeds: dict[str, np.ndarray], threads: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Start every peer on its file; return those that run, and why the others do not."""
    from icd_tvm.measure.peers import Peer, PeerError

    running, missing = {}, {}
    for name, path in files.items():
        try:
            running[name] = stack.enter_context(Peer(name, path, feeds, threads))
        except PeerError as error:
            missing[name] = str(error)
    return running, missing


def differences(arm: Any, feeds: dict[str, np.ndarray], peers: dict[str, Any]) -> dict[str, float]:
    """Return how far our logits are from those of each peer that reads the same cache."""
    logits = arm.run_all(feeds)[0]
    return {
        name: float(np.abs(peer.outputs["logits"] - logits).max() / np.abs(logits).max())
        for name, peer in peers.items()
        if name != LLAMA
    }


# -- table


def show(line: Line) -> str:
    """Return a line of the Markdown table."""
    if "share" not in line:
        return show_case(line)
    share = line["share"]
    verdict = "met" if share["median"] >= line["bar"] else "MISSED"
    if line["most"] < line["bar"]:
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
        for slots in arguments.slots:
            rounds = 20 if arguments.quick else 100
            yield step_line(slots, threads, rounds, tuple(arguments.peers), arguments.gguf)
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
    parser.add_argument("--peers", nargs="*", default=PEERS)
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M at Q8_0, for llama.cpp")
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


def keep(path: Path, line: Line) -> None:
    """Put a line into the record, in place of an older one of the same case and threads."""
    lines = json.loads(path.read_text()) if path.exists() else []
    name = (line["case"], line["threads"])
    lines = [old for old in lines if (old["case"], old["threads"]) != name]
    path.write_text(json.dumps([*lines, line], indent=1) + "\n")


if __name__ == "__main__":
    main()
