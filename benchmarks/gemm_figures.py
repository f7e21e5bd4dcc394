"""What is said of a product beside its ratio to the peers: rate, share of the peak, scaling.

python benchmarks/gemm_figures.py      # prints the peaks; TVM_NUM_THREADS says of how many cores
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from math import prod
from statistics import geometric_mean
from typing import Any

import numpy as np
import numpy.typing as npt

GEMM_NAME = re.compile(r"GEMM (\d+) x (\d+) x (\d+) (fp32|int8|bf16)$")
SPARSE_NAME = re.compile(r"GEMM (.*) (?:vec16|block16) (.*)% (fp32|int8)$")
# Ours on a weight with zeros over ours on the dense one; the bars of the issue.
SPARSE_BARS = {"50": 0.60, "75": 0.35, "90": 0.18}
SCALING_BAR = 1.7
BLOCK = 16

Line = dict[str, Any]


def sparse_weight(
    k: int, n: int, pattern: str, percent: int, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Return a weight of which every 16 columns keep the same number of random rows or blocks."""
    height = BLOCK if pattern == "block16" else 1
    weight = rng.normal(0, k**-0.5, (k, n)).astype(np.float32)
    blocks = weight.reshape(k // height, height, n // BLOCK, BLOCK)
    dropped = round(blocks.shape[0] * percent / 100)
    for group in range(n // BLOCK):
        blocks[rng.permutation(blocks.shape[0])[:dropped], :, group] = 0
    return weight


def peaks(threads: int) -> dict[str, float]:
    """Return the operations a second that ``threads`` cores reach now, by type, in GF/s."""
    environment = {**os.environ, "TVM_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout))


def figures(line: Line) -> Line:
    """Return the rate of a dense product and its share of the peak; nothing for other cases.

    No peak is measured for bfloat16.
    """
    found = GEMM_NAME.fullmatch(line["case"])
    if found is None or "ms" not in line or found[4] == "bf16":
        return {}
    *shape, kind = found.groups()
    peak = peaks(line["threads"])[kind]
    median, least = (2e-6 * prod(map(int, shape)) / ms for ms in line["ms"][line["arm"]])
    return {
        "gflops": [median, least],
        "peak_gflops": peak,
        "of_peak": [median / peak, least / peak],
    }


def summary(lines: list[Line]) -> Iterator[str]:
    """Yield what follows from several lines: geometric means, sparse over dense, scaling."""
    done = {(line["case"], line["threads"]): line for line in lines if "median" in line}
    for kind in ("fp32", "int8", "bf16"):
        for threads in sorted({threads for _, threads in done}):
            products = [
                line
                for (name, count), line in done.items()
                if count == threads and (m := GEMM_NAME.fullmatch(name)) and m[4] == kind
            ]
            if products:
                yield _means(kind, threads, products)
    for (name, threads), line in done.items():
        if (sparse := SPARSE_NAME.fullmatch(name)) is None:
            continue
        dense = done.get((f"GEMM {sparse[1]} {sparse[3]}", threads))
        if dense is not None:
            ratio, bar = _own(line) / _own(dense), SPARSE_BARS[sparse[2]]
            yield f"{name}, threads {threads}: {ratio:.3f} of our dense, bar {bar:.2f}"
    for (name, threads), line in done.items():
        if threads == 2 and GEMM_NAME.fullmatch(name) and (name, 1) in done:
            gain = _own(done[name, 1]) / _own(line)
            yield f"{name}: two threads are {gain:.2f} times one, bar {SCALING_BAR}"


def _means(kind: str, threads: int, lines: list[Line]) -> str:
    text = f"{len(lines)} products {kind}, threads {threads}: geometric mean of ours / fastest peer"
    median, least = (geometric_mean(line[key] for line in lines) for key in ("median", "min"))
    text += f" {median:.3f} / {least:.3f} (median / min)"
    shares = [line["of_peak"][1] for line in lines if "of_peak" in line]
    return f"{text}; {geometric_mean(shares):.3f} of the peak (min)" if shares else text


def _own(line: Mapping[str, Any]) -> float:
    return float(line["ms"][line["arm"]][1])


def main() -> None:
    # The peaks are of the threads that TVM finds in the environment when it is loaded.
    from icd_tvm.measure.byte_peak import byte_peak
    from icd_tvm.measure.conditions import pinned
    from icd_tvm.measure.peaks import machine_peaks
    from icd_tvm.tir_schedules.target import host_target

    target = host_target(int(os.environ["TVM_NUM_THREADS"]))
    # Only once the pool runs is there a CPU without a worker, for this thread to stay on.
    byte_peak(target)
    with pinned():
        rates = {"fp32": machine_peaks(target)["peak_flops"], "int8": byte_peak(target)}
    print(json.dumps({kind: rate / 1e9 for kind, rate in rates.items()}))


if __name__ == "__main__":
    main()
