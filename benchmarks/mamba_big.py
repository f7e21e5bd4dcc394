"""A decode step of a Mamba of any size in int8 with half of its d_inner channels pruned.

Weights are random and lie in a data file; they are mapped, pruned and quantised a few layers at a
time, so that two full copies never exist. Three builds are timed interleaved: "dense" (int8
alone), "linear" (pruned, the order decided before) and "iterative" (pruned, order decided again,
dead channels gone). Saliency is the product of norms: calibration would need a Gram matrix of
d_inner^2 for each layer.

Run: TVM_NUM_THREADS=1 OMP_NUM_THREADS=1 python benchmarks/mamba_big.py --size 2.8b
     [--folder runs/mamba] [--rate 0.5] [--steps 5] [--chunk 8] [--layers N] [--out FILE]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import resource
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from icd_tvm._tvm import apply_pass
from icd_tvm.adapters.sparsity import parse_sparsity
from icd_tvm.measure.environment import fingerprint
from icd_tvm.measure.latency import interleave
from icd_tvm.measure.statistics import ratio, summarise
from icd_tvm.models.__main__ import save_model
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.inputs import random_inputs
from icd_tvm.models.mamba import (
    MAMBA_1_4B,
    MAMBA_2_8B,
    MAMBA_130M,
    MAMBA_370M,
    MAMBA_790M,
    MAMBA_MINI,
    MambaConfig,
    build_mamba_step,
    mamba_shapes,
    mamba_states,
    random_mamba_weights,
)
from icd_tvm.models.mapped_weights import bind_weights, release
from icd_tvm.models.weights import parameter_count
from icd_tvm.relax_passes.apply_quant import ApplyQuant, parse_quant
from icd_tvm.relax_passes.apply_sparsity import ApplySparsity
from icd_tvm.relax_passes.attach_layout_tags import AttachLayoutTags
from icd_tvm.relax_passes.build_access_graph import BuildAccessGraph
from icd_tvm.relax_passes.decide_permutation import DecidePermutation
from icd_tvm.relax_passes.layer_rules import parse_layer_rules
from icd_tvm.relax_passes.rewrite_layout import RewriteLayout
from icd_tvm.relax_passes.verify_layout import difference
from icd_tvm.runtime.build import Built, build
from icd_tvm.runtime.prepare import set_pool_threads
from icd_tvm.tir_schedules.target import host_target

SIZES = {
    "mini": MAMBA_MINI,
    "130m": MAMBA_130M,
    "370m": MAMBA_370M,
    "790m": MAMBA_790M,
    "1.4b": MAMBA_1_4B,
    "2.8b": MAMBA_2_8B,
}
Record = dict[str, Any]


def resident(kind: str = "VmRSS") -> float:
    """Return GiB of this process; RssAnon leaves mapped files out."""
    rows = Path("/proc/self/status").read_text().splitlines()
    return int(next(row for row in rows if row.startswith(kind)).split()[1]) / 2**20


def trim() -> None:
    """Give freed memory back: the allocator keeps arrays of up to 32 MiB for later."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class Stages:
    """Seconds and peak memory of every stage."""

    def __init__(self) -> None:
        self.rows: list[Record] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Sample the memory in the background while inside."""
        peak, done = [resident("RssAnon")], threading.Event()

        def watch() -> None:
            while not done.wait(0.2):
                peak.append(resident("RssAnon"))

        watcher, began = threading.Thread(target=watch, daemon=True), time.perf_counter()
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            trim()
            row = {
                "stage": name,
                "seconds": time.perf_counter() - began,
                "peak_private_gib": max(peak),
                "private_after_gib": resident("RssAnon"),
                "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
            self.rows.append(row)
            print(
                f"  {name:30s} {row['seconds']:7.1f} s  private {row['peak_private_gib']:5.2f} GiB "
                f"({row['private_after_gib']:5.2f} after)  peak RSS {row['peak_rss_gib']:5.2f}",
                flush=True,
            )


def export(config: MambaConfig, folder: Path) -> Path:
    """Write the step once; a finished file of the same name is taken as it is."""
    path = folder / f"mamba-{config.layers}x{config.hidden}.onnx"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        data = path.with_suffix(".data")
        save_model(build_mamba_step(config, random_mamba_weights(config), data=data), path)
    return path


class Job:
    """One model on its way to three builds."""

    def __init__(
        self, path: Path, config: MambaConfig, chunk: int, quant: str, target: Any
    ) -> None:
        self.config, self.chunk, self.target = config, chunk, target
        self.imported = bind_weights(import_onnx(path, parameters=True))
        tag = AttachLayoutTags(mamba_states(config))
        # The largest weight goes first, while there is room for its copies.
        head = [f"*lm_head*={quant}"]
        self.mod = self._quantised(apply_pass(tag, self.imported.mod), head)

    def chunks(self) -> Iterator[list[str]]:
        """Yield name patterns of a few layers at a time."""
        for start in range(0, self.config.layers, self.chunk):
            layers = range(start, min(start + self.chunk, self.config.layers))
            yield [f"*layers.{index}.*" for index in layers]

    def transformed(self, sparsity: str, quant: str) -> Any:
        """Prune and quantise chunk by chunk."""
        mod = self.mod
        for patterns in self.chunks():
            if sparsity != "none":
                texts = [f"{pattern}={sparsity}" for pattern in patterns]
                prune = parse_layer_rules(texts, parse_sparsity("none"), parse_sparsity)
                mod = apply_pass(ApplySparsity(prune), mod)
            mod = self._quantised(mod, [f"{pattern}={quant}" for pattern in patterns])
            release(self.imported.parameters)
            trim()
        return mod

    def _quantised(self, mod: Any, texts: list[str]) -> Any:
        rules = parse_layer_rules(texts, parse_quant("none"), parse_quant)
        return apply_pass(ApplyQuant(rules), mod)

    def order(self, mod: Any, budget_s: float) -> dict[str, np.ndarray]:
        """Return the orders that improve on those of ``mod``; none without a budget."""
        if not budget_s:
            return {}
        decide = DecidePermutation(time_budget_s=budget_s)
        apply_pass(decide, apply_pass(BuildAccessGraph(self.target), mod))
        release(self.imported.parameters)
        return {d.group: d.perm for d in decide.decisions if d.improved}


def builds(
    job: Job, arguments: argparse.Namespace, stages: Stages, record: Record
) -> dict[str, Built]:
    """Make the three builds; no module outlives its build."""
    found: dict[str, Built] = {}
    with stages("order before"):
        before = job.order(job.mod, arguments.budget_s)
    with stages("dense: int8"):
        mod = job.transformed("none", arguments.quant)
    with stages("dense: compile"):
        found["dense"] = build(mod, job.target)
        del mod
    with stages("prune + int8"):
        mod = job.transformed(f"unit:{arguments.rate}", arguments.quant)
    with stages("linear: rewrite, compile"):
        rewrite = RewriteLayout(before, compact=False)
        found["linear"] = build(apply_pass(rewrite, mod), job.target)
    with stages("order after"):
        after = job.order(mod, arguments.budget_s)
    with stages("iterative: rewrite"):
        rewrite = RewriteLayout(after)
        mod = apply_pass(rewrite, mod)
    with stages("iterative: compile"):
        found["iterative"] = build(mod, job.target)
    record |= {
        "orders": {"before": len(before), "after": len(after)},
        "removed": sorted(set(rewrite.removed.values())),
        "kernels": {name: sorted(set(b.kernels.values())) for name, b in found.items()},
    }
    return found


def states_fed_back(built: Built, feeds: Mapping[str, np.ndarray], steps: int) -> list[int]:
    """Return the tokens of a few greedy steps."""
    feeds, tokens = dict(feeds), []
    names = [name for name in feeds if name != "input_ids"]
    for _ in range(steps):
        logits, *states = built.run_all(feeds)
        tokens.append(int(logits[0].argmax()))
        feeds = {"input_ids": np.array([tokens[-1]]), **dict(zip(names, states, strict=True))}
    return tokens


def run(arguments: argparse.Namespace) -> Record:
    config = SIZES[arguments.size]
    if arguments.layers:
        config = replace(config, layers=arguments.layers)
    set_pool_threads(arguments.threads)
    stages = Stages()
    record: Record = {"size": arguments.size, "layers": config.layers, "env": fingerprint()}
    record |= {
        "parameters": parameter_count(mamba_shapes(config)),
        "weights": "random: speed, memory and equality only",
        "request": {"sparsity": f"unit:{arguments.rate}", "quant": arguments.quant},
        "threads": arguments.threads,
    }
    print(f"Mamba {arguments.size}: {record['parameters'] / 1e6:.0f} M parameters")
    with stages("export"):
        path = export(config, arguments.folder)
    with stages("import, tag axes, int8 head"):
        job = Job(path, config, arguments.chunk, arguments.quant, host_target(arguments.threads))
    found = builds(job, arguments, stages, record)
    feeds = random_inputs(job.imported)
    with stages("verify"):
        outputs = {name: found[name].run_all(feeds) for name in ("linear", "iterative")}
        gap = difference(found["iterative"].comparable(outputs["linear"]), outputs["iterative"])
        record["iterative_against_linear"] = {"max_abs": gap.max_abs, "max_rel": gap.max_rel}
        tokens = {name: states_fed_back(built, feeds, 3) for name, built in found.items()}
        record["greedy_tokens"] = tokens
    with stages("measure"):
        calls = {name: built.caller(feeds) for name, built in found.items()}
        samples = interleave(calls, repeats=arguments.steps, warmup=1, min_repeats=1)
    record["step_ms"] = {name: summarise(times) for name, times in samples.items()}
    record["ratios"] = {
        f"{a}/{b}": {
            **ratio(samples[a], samples[b]),
            "minima": float(samples[a].min() / samples[b].min()),
        }
        for a, b in (("iterative", "linear"), ("linear", "dense"), ("iterative", "dense"))
    }
    record["stages"] = stages.rows
    record["peak_rss_gib"] = stages.rows[-1]["peak_rss_gib"]
    return record


def show(record: Record) -> None:
    gap = record["iterative_against_linear"]
    print(f"  channels removed a layer {record['removed']}, orders {record['orders']}")
    print(
        f"  iterative differs from linear by {gap['max_rel']:.1e}, tokens {record['greedy_tokens']}"
    )
    for name, value in record["step_ms"].items():
        print(f"  {name:10s} median {value['median']:9.2f} ms  min {value['min']:9.2f} ms")
    for name, value in record["ratios"].items():
        print(f"  {name:18s} {value['median']:.3f}, minima {value['minima']:.3f}")
    print(f"  peak RSS {record['peak_rss_gib']:.2f} GiB, mapped files included")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="130m")
    parser.add_argument("--layers", type=int, help="fewer layers than the size has")
    parser.add_argument("--folder", type=Path, default=Path("runs/mamba"), help="of the weights")
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--quant", default="int8")
    parser.add_argument("--chunk", type=int, default=8, help="layers transformed at a time")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each build")
    parser.add_argument(
        "--budget-s",
        type=float,
        default=30.0,
        help="solver, for each order; 0 leaves the units in order, dead ones cut",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    record = run(arguments)
    show(record)
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
