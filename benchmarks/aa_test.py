"""Identical arms of one compiled model: does the procedure call them equal?

Every trial times two callers of the same compiled module, and a third that does 5 % more work by
the clock (it waits after the call), interleaved in this process. Printed: in how many trials the
interval of equal/equal holds 1, in how many P(faster) lies within 0.2 to 0.8, and in how many the
whole interval of slower/equal lies above 1. "void" trials carry a drift or outlier flag; they are
counted too. On a loaded machine read the share, not the times.

Run: TVM_NUM_THREADS=1 OMP_NUM_THREADS=1 python benchmarks/aa_test.py [--trials 100] [--rounds 150]
     [--slower 0.05] [--model bert-mini-random] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from icd_tvm.measure.conditions import clock, pinned
from icd_tvm.measure.environment import fingerprint
from icd_tvm.measure.latency import interleave
from icd_tvm.measure.statistics import noise, ratio
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.inputs import random_inputs
from icd_tvm.models.registry import build as build_model
from icd_tvm.runtime.build import build
from icd_tvm.tir_schedules.target import host_target


def slowed(call: Callable[[], Any], seconds: float) -> Callable[[], Any]:
    """Return a caller that keeps the core busy for ``seconds`` more."""

    def arm() -> Any:
        result = call()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        return result

    return arm


def trial(call: Callable[[], Any], extra_s: float, rounds: int, seed: int) -> dict[str, Any]:
    arms = {"a": call, "b": call, "slower": slowed(call, extra_s)}
    samples = interleave(arms, repeats=rounds, warmup=5, seed=seed)
    flags = noise(samples["a"])
    return {
        "equal": ratio(samples["a"], samples["b"], seed),
        "slower": ratio(samples["slower"], samples["b"], seed),
        "void": flags["drift"] or flags["outliers"],
    }


def summary(trials: list[dict[str, Any]]) -> dict[str, Any]:
    equal = [found["equal"] for found in trials]
    return {
        "trials": len(trials),
        "interval_holds_1": sum(r["lo"] <= 1 <= r["hi"] for r in equal),
        "p_faster_within_0.2_0.8": sum(0.2 <= r["p_faster"] <= 0.8 for r in equal),
        "slowdown_found": sum(found["slower"]["lo"] > 1 for found in trials),
        "void": sum(found["void"] for found in trials),
        "median_half_width": float(np.median([(r["hi"] - r["lo"]) / 2 for r in equal])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--slower", type=float, default=0.05)
    parser.add_argument("--model", default="bert-mini-random")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    imported = import_onnx(build_model(arguments.model))
    call = build(imported.mod, host_target()).caller(random_inputs(imported, 0))
    first = interleave({"a": call}, repeats=200, warmup=20)["a"]
    extra_s = arguments.slower * float(np.median(first))
    before = clock()
    with pinned() as threads:
        trials = [trial(call, extra_s, arguments.rounds, seed) for seed in range(arguments.trials)]
    record = {
        "model": arguments.model,
        "call_ms": 1e3 * float(np.median(first)),
        "rounds": arguments.rounds,
        "slower": arguments.slower,
        **summary(trials),
        "clock": {"before": before, "after": clock()},
        "threads": threads,
        "env": fingerprint(),
    }
    shown = {name: value for name, value in record.items() if name not in ("env", "clock")}
    print("\n".join(f"{name}: {value}" for name, value in shown.items()))
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
