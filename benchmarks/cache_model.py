"""Check the cache model against cachegrind on every distinct kernel of a compiled model.

Cachegrind runs the machine code, the model the scheduled TIR; both count the misses of one cold
call. Run: ``python benchmarks/cache_model.py [--model NAME] [--sparsity SPEC] [--out FILE]``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from icd_tvm._tvm import GenericConst, apply_pass
from icd_tvm.adapters.sparsity import parse_sparsity
from icd_tvm.files import write_atomically
from icd_tvm.measure.cache_sim import CacheLevel, CacheSimulator
from icd_tvm.measure.cachegrind import arena_offsets, run_cachegrind
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.inputs import random_inputs
from icd_tvm.models.registry import build
from icd_tvm.relax_passes.apply_sparsity import ApplySparsity
from icd_tvm.relax_passes.lower_cpu import cpu_pipeline
from icd_tvm.tir_schedules.address_trace import address_trace, lower_loops
from icd_tvm.tir_schedules.target import parse_target

TARGET = parse_target("x86-64-v3", 1)
LEVELS = (CacheLevel("L1", 49152, 12), CacheLevel("L2", 1 << 20, 16))
Kernel = tuple[str, Any, list[np.ndarray]]


def kernels(model: str, sparsity: str) -> Iterator[Kernel]:
    """Yield name, function and argument arrays of every distinct kernel of the lowered model."""
    imported = import_onnx(build(model))
    mod = apply_pass(ApplySparsity(parse_sparsity(sparsity)), imported.mod)
    with TARGET:
        lowered = cpu_pipeline(TARGET, tune=False)(mod)
    feeds = random_inputs(imported, 0)
    seen = set()
    for block in lowered["main"].body.blocks:
        for call in (binding.value for binding in block.bindings):
            name = str(call.args[0].name_hint)
            if name not in seen:
                seen.add(name)
                arguments = [array(a, feeds) for a in [*call.args[1].fields, call]]
                yield name, lowered[name], arguments


def array(expr: Any, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """Return a value for an argument or a result; activations are zeros."""
    if isinstance(expr, GenericConst):
        return expr.value.numpy()
    name = str(getattr(expr, "name", ""))
    shape = [int(s) for s in expr.ty.shape.values]
    return feeds.get(name, np.zeros(shape, str(expr.ty.dtype)))


def compare(name: str, func: Any, arrays: list[np.ndarray]) -> dict[str, Any]:
    """Count one cold call both ways."""
    started = time.perf_counter()
    counted = run_cachegrind(func, arrays, TARGET, *LEVELS)
    middle = time.perf_counter()
    names = [str(p.name) for p in func.params]
    consts = {n: a for n, a in zip(names, arrays, strict=True) if a.dtype.kind in "iu"}
    offsets, end = arena_offsets(arrays)
    simulator, model = CacheSimulator(LEVELS), np.zeros(3, np.int64)
    loops = lower_loops(func, TARGET)
    for chunk in address_trace(loops, offsets, end, consts=consts):
        first, last = simulator.access(chunk.units(64))
        model += [first.requests, first.misses, last.misses]
    return {
        "kernel": name,
        "cachegrind": vars(counted),
        "model": dict(
            zip(("requests", "first_misses", "last_misses"), model.tolist(), strict=True)
        ),
        "first_error_pct": 100 * (int(model[1]) / counted.first_misses - 1),
        "last_error_pct": 100 * (int(model[2]) / counted.last_misses - 1),
        "cachegrind_s": middle - started,
        "model_s": time.perf_counter() - middle,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--sparsity", default="vec16:0.5")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    print(f"{'kernel':44s} {'D1 misses':>10s} {'model':>9s} {'LL misses':>10s} {'model':>9s}")
    for kernel in kernels(arguments.model, arguments.sparsity):
        row = compare(*kernel)
        rows.append(row)
        counted = row["cachegrind"]
        print(
            f"{row['kernel'][:44]:44s}",
            f"{counted['first_misses']:10d} {row['first_error_pct']:+8.2f}%",
            f"{counted['last_misses']:10d} {row['last_error_pct']:+8.2f}%",
            flush=True,
        )
    worst = max(max(abs(r["first_error_pct"]), abs(r["last_error_pct"])) for r in rows)
    print(f"{len(rows)} kernels, largest error {worst:.2f} % (bar 5 %)")
    if arguments.out:
        record = {"levels": [vars(level) for level in LEVELS], "kernels": rows}
        text = json.dumps(record, indent=1)
        write_atomically(arguments.out, lambda path: Path(path).write_text(text))


if __name__ == "__main__":
    main()
