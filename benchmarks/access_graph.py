"""Time and memory of W on an axis of 16,384 indices, every case in a process of its own.

Run: OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/access_graph.py [--n N] [--json F]

Each process may map 8 GiB (RLIMIT_AS): a case that needs more fails. Peak resident memory is that
of the whole process, the input and the libraries included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from icd_tvm.core.access_graph import build_w
from icd_tvm.core.cost import TileAccess
from icd_tvm.core.solver import fit_permutation

LIMIT = 8 << 30
# Rows of the mask: the other axis of a weight.
WINDOWS = 4096


def random_mask(n: int, density: float) -> TileAccess:
    """An unstructured mask [WINDOWS, n]."""
    rng = np.random.default_rng(0)
    kept = round(density * n)
    columns = np.argsort(rng.random((WINDOWS, n), dtype=np.float32), axis=1)[:, :kept]
    pointers = np.arange(WINDOWS + 1) * kept
    data = np.ones(columns.size, dtype=np.bool_)
    return TileAccess(
        sp.csr_matrix((data, columns.ravel().astype(np.int32), pointers), shape=(WINDOWS, n)), 16
    )


def dense_mask(n: int) -> TileAccess:
    return TileAccess(sp.csr_matrix(np.ones((WINDOWS, n), dtype=np.bool_)), 16)


def trace(n: int) -> dict[str, Any]:
    """A million events in windows of 64."""
    rng = np.random.default_rng(0)
    return {"windows": np.arange(1 << 20) // 64, "indices": rng.integers(n, size=1 << 20), "n": n}


def activations(n: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2048, n), dtype=np.float32)


def no_opportunity(n: int) -> dict[str, Any]:
    _, stats = fit_permutation(accesses=[dense_mask(n)])
    return {"no_opportunity": stats.no_opportunity}


def graph(source: str, **cfg: Any) -> dict[str, Any]:
    return {"nnz": int(build_w(source, **cfg).nnz)}


CASES: dict[str, Callable[[int], dict[str, Any]]] = {
    "dense mask, no cap": lambda n: graph("tir", accesses=[dense_mask(n)]),
    "50 % mask, no cap": lambda n: graph("tir", accesses=[random_mask(n, 0.5)]),
    "99 % sparse mask, no cap": lambda n: graph("tir", accesses=[random_mask(n, 0.01)]),
    "50 % mask, nnz_cap 5 %": lambda n: graph(
        "tir", accesses=[random_mask(n, 0.5)], nnz_cap=n * n // 20
    ),
    "99 % sparse mask, nnz_cap 5 %": lambda n: graph(
        "tir", accesses=[random_mask(n, 0.01)], nnz_cap=n * n // 20
    ),
    "mock, 4 %": lambda n: graph("mock", n=n, density=0.04),
    "trace, 2^20 events": lambda n: graph("trace", **trace(n)),
    "trace, 2,048 activations": lambda n: graph("trace", activations=activations(n)),
    "fit of a dense mask": no_opportunity,
}


def one(name: str, n: int) -> dict[str, Any]:
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    start = time.perf_counter()
    found = CASES[name](n)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    return {"case": name, "n": n, "seconds": round(seconds, 2), "peak_gib": round(peak, 2), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=16_384)
    parser.add_argument("--case", choices=list(CASES), help="run this one in this process")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(one(args.case, args.n)))
        return
    rows = []
    for name in CASES:
        command = [sys.executable, __file__, "--n", str(args.n), "--case", name]
        run = subprocess.run(command, capture_output=True, text=True)
        failed = {"case": name, "n": args.n, "error": run.stderr.strip().splitlines()[-1:]}
        rows.append(json.loads(run.stdout) if run.returncode == 0 else failed)
        print(rows[-1], flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
