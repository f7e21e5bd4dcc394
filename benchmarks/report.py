"""Size and seconds of the HTML report: of run folders, and of a record of BERT-base's size.

The stand-in for BERT-base has its 12 layers, five arms with a modelled cache of 220 kernels each,
as many timed kernels in three of them, six masks, 64 axis groups, and W of 3,072 indices at the
densest that a run stores (5 %). Its figures are planted; only its size means something.
Run: ``python benchmarks/report.py [RUN_DIRECTORY ...]``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

LAYERS, KERNELS, WIDTH, DENSITY = 12, 220, 3072, 0.05
RECORD = Path(__file__).parents[1] / "docs" / "results" / "main-job-vec16-0.5-2t.json"
MAX_BYTES, MAX_S = 5 << 20, 30.0


def stand_in() -> dict[str, Any]:
    """Return a record with as many entries as BERT-base's."""
    record: dict[str, Any] = json.loads(RECORD.read_text())
    levels = [{"requests": 10**6, "misses": 10**5}] * 3
    kernels = [
        {"kernel": f"fused_matmul{i}", "node": f"lv{i}", "levels": levels, "reason": ""}
        for i in range(KERNELS)
    ]
    sizes = {"L1": 48 << 10, "L2": 1 << 20, "L3": 32 << 20}
    model = {
        "source": "model",
        "levels": [{"name": name, "size_bytes": size} for name, size in sizes.items()],
        "dram_bytes": 4 * 10**8,
        "kernels": kernels,
    }
    for name, arm in record["arms"].items():
        arm["cache_model"] = model
        if name in ("dense", "linear", "iterative"):
            arm["kernel_times"] = {"kernels": [timed(i) for i in range(KERNELS)]}
    record["groups"] = (record["groups"] * 2)[: 5 * LAYERS + 4]
    return {**record, "model": {"name": "stand-in of BERT-base's size"}}


def timed(number: int) -> dict[str, Any]:
    """Return a timed kernel with names as long as BERT-base's."""
    layer = f"encoder.layer.{number * LAYERS // KERNELS}"
    parts = ("query", "key", "value")
    weights = [f"{layer}.attention.self.{part}.weight" for part in parts]
    figures = {"us": 120.0 + number, "us_min": 100.0 + number, "flop": 10**8, "bytes": 10**7}
    groups = [f"/{layer}/attention/self/{part}/MatMul:2.0" for part in parts]
    names = {"kernel": f"fused_dense_matmul{number}_add", "node": " + ".join(weights)}
    return {**names, "weights": weights, "groups": groups, **figures}


def noise_tiles() -> dict[str, Any]:
    """Return six weights in three orders, noise as well."""
    from icd_tvm.report.run_files import TilePicture

    rng, orders = np.random.default_rng(1), ("identity", "linear", "iterative")
    return {
        f"encoder.layer.{i}.output.dense.weight": {
            order: TilePicture(rng.random((192, 48)), 73728, 147456) for order in orders
        }
        for i in range(6)
    }


def noise_graphs() -> list[Any]:
    """Return W of every layer: noise, which compresses worst."""
    from icd_tvm.core.permutation import identity
    from icd_tvm.report.run_files import AxisGraph

    rng = np.random.default_rng(0)
    graphs = []
    for layer in range(LAYERS):
        w = sp.random(WIDTH, WIDTH, DENSITY, format="csr", dtype=np.float32, random_state=layer)
        perm = rng.permutation(WIDTH).astype(np.int32)
        orders = {"as it comes": identity(WIDTH), "re-permuted": perm}
        graphs.append(AxisGraph(f"layer {layer}", w, orders, "noise"))
    return graphs


def report(name: str, make: Callable[[], str]) -> bool:
    """Print one line, and say whether it is within the limits."""
    began = time.perf_counter()
    size = len(make().encode())
    seconds = time.perf_counter() - began
    good = size <= MAX_BYTES and seconds <= MAX_S
    print(f"{name:40s} {size / 1e6:6.2f} MB  {seconds:6.2f} s  {'' if good else 'over the limit'}")
    return good


def main() -> int:
    """Time the import, the stand-in and the run folders that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path)
    arguments = parser.parse_args()
    began = time.perf_counter()
    from icd_tvm.report.page import render, render_folder

    print(f"{'import':40s} {'':9s}  {time.perf_counter() - began:6.2f} s")
    record, graphs, tiles = stand_in(), noise_graphs(), noise_tiles()
    page = partial(render, record, graphs=graphs, tiles=tiles)
    good = report("BERT-base's size, planted", page)
    for run in arguments.runs:
        good &= report(str(run), partial(render_folder, run))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
