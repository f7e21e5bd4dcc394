"""Our arms beside ONNX Runtime, OpenVINO, PyTorch and DeepSparse: one run a case, turn by turn.

Each case is one ``icd compile`` in a process of its own, as a user would run it; every peer has a
process of its own too, with the same threads and inputs. The ratio that counts is against the
fastest peer of the case, by medians and by minima.

    pip install 'icd_tvm[peers]'      # DeepSparse: a Python of its own, ICD_PYTHON_DEEPSPARSE
    python benchmarks/cpu_peers.py --only minilm [--rounds 200] [--full] [--threads 1 2]
        [--peers openvino openvino-bf16 openvino-int8] [--out docs/results/cpu-peers.json]
    python benchmarks/cpu_peers.py --only gemm [--out docs/results/cpu-gemm.json]

A record that is there keeps the lines that are not measured again. Products also get their share of
the measured peak, and what two threads gain over one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from gemm_figures import figures, sparse_weight, summary
from onnx import TensorProto, helper, numpy_helper
from peer_ratios import keep, to_fastest

FLOAT_PEERS = ("onnxruntime", "openvino", "torch", "deepsparse")
INT8_PEERS = ("onnxruntime-int8", "openvino-int8")
BF16_PEERS = ("openvino-bf16", "torch-bf16")
W8A8 = "int8:w8a8:attention:smooth0.75"
# (rows, reduced axis, columns) of the products of BERT-base, MiniLM and SmolLM2.
GEMMS = (
    (128, 768, 3072),
    (128, 3072, 768),
    (128, 768, 768),
    (128, 384, 1536),
    (128, 1536, 384),
    (128, 384, 384),
    (128, 576, 1536),
    (384, 768, 3072),
    (32, 768, 3072),
)
# The bars are the issue's: ours over the fastest peer of the same precision.
UNIT = "unit:0.5"


@dataclass(frozen=True)
class Case:
    """One model with one transform, and the peers beside it.

    Attributes
    ----------
    name : str
    arm : str
        The arm of ours that is compared.
    bar : float
        Largest ratio to the fastest peer.
    peers : tuple of str
    flags : tuple of str
        Of ``icd compile``; the model comes first.
    """

    name: str
    arm: str
    bar: float
    peers: tuple[str, ...]
    flags: tuple[str, ...]


def gemm_cases(folder: Path) -> Iterator[Case]:
    """Yield every product in fp32, in bf16 and in bytes."""
    for m, k, n in GEMMS:
        path = folder / f"gemm-{m}-{k}-{n}.onnx"
        onnx.save(gemm(m, k, n), path)
        name = f"GEMM {m} x {k} x {n}"
        yield Case(f"{name} fp32", "dense", 1.0, FLOAT_PEERS, (str(path),))
        # The only product of a model is its last one, which is left alone unless it is named.
        flags = (str(path), "--quant", "none; weight=int8:w8a8")
        yield Case(f"{name} int8", "linear", 1.0, (*INT8_PEERS, "torch-int8"), flags)
        flags = (str(path), "--quant", "none; weight=bf16")
        yield Case(f"{name} bf16", "linear", 1.0, BF16_PEERS, flags)


def sparse_cases(folder: Path) -> Iterator[Case]:
    """Yield the largest products with weights of which 16 columns share their rows or blocks."""
    for (m, k, n), pattern, percent in product(GEMMS[:2], ("vec16", "block16"), (50, 75, 90)):
        path = folder / f"gemm-{m}-{k}-{n}-{pattern}-{percent}.onnx"
        weight = sparse_weight(k, n, pattern, percent, np.random.default_rng(0))
        onnx.save(gemm(m, k, n, weight), path)
        name = f"GEMM {m} x {k} x {n} {pattern} {percent}%"
        yield Case(f"{name} fp32", "dense", 0.8, ("deepsparse",), (str(path),))
        flags = (str(path), "--quant", "none; weight=int8:w8a8")
        yield Case(f"{name} int8", "linear", 1.0, INT8_PEERS, flags)


def gemm(m: int, k: int, n: int, weight: npt.NDArray[np.float32] | None = None) -> onnx.ModelProto:
    """Return ``y = x @ weight`` as a model, with random weights if none are given."""
    if weight is None:
        weight = np.random.default_rng(0).normal(0, k**-0.5, (k, n)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"], "product")],
        "gemm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [m, k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [m, n])],
        [numpy_helper.from_array(weight, "weight")],
    )
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=9)


def model_cases(folder: Path, full: bool) -> Iterator[Case]:
    """Yield MiniLM and BERT-base at every length, in each form; ``full`` adds batches of 8."""
    single, more = ((32, 1), (128, 1), (384, 1)), ((32, 8), (128, 8), (384, 8))
    for model, sizes in (
        ("minilm", (*single, *(more if full else more[1:2]))),
        ("bert-base", (*single, *(more if full else ()))),
    ):
        for seq, batch in sizes:
            path = str(folder / f"{model}-{seq}-{batch}.onnx")
            name = f"{model} S={seq} batch {batch}"
            quant = ("--quant", W8A8)
            both = (*INT8_PEERS, "openvino-bf16")
            yield Case(f"{name} fp32", "dense", 0.95, FLOAT_PEERS, (path,))
            bf16 = (path, "--quant", "bf16:attention")
            yield Case(f"{name} bf16", "linear", 1.0, BF16_PEERS, bf16)
            yield Case(f"{name} W8A8", "linear", 0.95, both, (path, *quant))
            unit = (path, "--sparsity", UNIT, *quant)
            yield Case(f"{name} {UNIT} + W8A8", "iterative", 0.65, both, unit)


def export(path: Path) -> None:
    """Write the model that the file is named after; products are written when they are listed."""
    if path.exists():
        return
    model, seq, batch = path.stem.rsplit("-", 2)
    command = ["-m", "icd_tvm.models", model, "--seq", seq, "--batch", batch, "-o", str(path)]
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)


def run(case: Case, threads: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Compile and measure one case; return its line of the table, or why there is none."""
    command = [sys.executable, "-m", "icd_tvm.compile", *case.flags, "--threads", str(threads)]
    command += ["--repeats", str(rounds), "--peer", ",".join(case.peers), "--out", str(folder)]
    fresh = {**os.environ, "ICD_CACHE_DIR": str(folder.with_suffix(".cache"))}
    done = subprocess.run(command, env=fresh, capture_output=True, text=True)
    line: dict[str, Any] = {"case": case.name, "threads": threads, "rounds": rounds}
    line |= {"arm": case.arm, "bar": case.bar}
    if done.returncode:
        return {**line, "failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    record = json.loads((folder / "metrics.json").read_text())
    times = {name: arm["lat_ms"] for name, arm in record["arms"].items()}
    return {**line, "not_measured": record["not_measured"], "peers": record["peers"]} | ratios(
        case, times, record
    )


def ratios(case: Case, times: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Return medians and minima, and the ratios to the fastest peer by each."""
    present = [name for name in case.peers if name in times]
    shown = [case.arm, *(a for a in ("dense", "linear") if a != case.arm), *present]
    found: dict[str, Any] = {
        "ms": {name: [times[name]["median"], times[name]["min"]] for name in shown if name in times}
    }
    flags = [flag["reason"] for flag in record["flags"]]
    if not present or case.arm not in times:
        return {**found, "failed": "; ".join(flags) or f"no arm {case.arm}"}
    found |= to_fastest(case.arm, times, present)
    return {**found, "missing": [name for name in case.peers if name not in times], "flags": flags}


def show(line: dict[str, Any]) -> str:
    """Return a line of the Markdown table."""
    head = f"| {line['case']} | {line['threads']} |"
    if "failed" in line:
        return f"{head} failed: {line['failed']} | | | |"
    times = ", ".join(f"{name} {ms[0]:.2f}" for name, ms in line["ms"].items())
    verdict = "met" if line["median"] <= line["bar"] else "MISSED"
    ratio = f"{line['median']:.3f} / {line['min']:.3f} of {line['fastest_median']}"
    if "of_peak" in line:
        ratio += f"; {line['gflops'][1]:.0f} GF/s, {100 * line['of_peak'][1]:.0f} % of peak"
    return f"{head} {times} | {ratio} | {line['bar']:.2f} | {verdict} |"


def main() -> None:
    arguments = parsed()
    print("| case | threads | median ms | ours / fastest peer (median / min) | bar | |")
    print("| --- | --- | --- | --- | --- | --- |")
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for case, threads in product(chosen(arguments, folder), arguments.threads):
            export(Path(case.flags[0]))
            line = run(case, threads, arguments.rounds, Path(tempfile.mkdtemp(dir=folder)))
            line |= figures(line)
            print(show(line), flush=True)
            lines = keep(arguments.out, line) if arguments.out else [*lines, line]
    print("", *summary(lines), sep="\n")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name contains one")
    parser.add_argument("--peers", nargs="+", help="only these, of those that a case has")
    parser.add_argument("--rounds", type=int, default=200, help="of each case, turn by turn")
    parser.add_argument("--full", action="store_true", help="batches of 8 at every length too")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, help="JSON of all lines")
    return parser.parse_args()


def chosen(arguments: argparse.Namespace, folder: Path) -> list[Case]:
    """Return the cases whose name contains one of the words, beside the peers that are wanted."""
    cases = chain(gemm_cases(folder), sparse_cases(folder), model_cases(folder, arguments.full))
    words = [word.lower() for word in arguments.only]
    found = [case for case in cases if any(word in case.name.lower() for word in words)]
    if arguments.peers is None:
        return found
    wanted = set(arguments.peers)
    return [replace(case, peers=tuple(p for p in case.peers if p in wanted)) for case in found]


if __name__ == "__main__":
    main()
