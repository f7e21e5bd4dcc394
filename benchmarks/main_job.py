"""The main job on trained MiniLM: every transform and thread count, bars beside the figures.

Run: python benchmarks/main_job.py [--quick] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# (transform, bar for iterative/linear of the whole model)
CASES = (("unit:0.5", 0.80), ("vec16:0.5", 0.85))
DENSE_BAR = 1.0
SETUP_BAR_S = 60.0


def run_case(sparsity: str, threads: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Compile and measure one case in a process of its own; return its metrics."""
    command = [sys.executable, "-m", "icd_tvm.compile", "minilm", "--peer", "onnxruntime"]
    command += ["--sparsity", sparsity, "--threads", str(threads)]
    command += ["--repeats", str(repeats), "--out", str(folder)]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    record: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    record["wall_s"] = time.perf_counter() - start
    return record


def report(sparsity: str, threads: int, bar: float, record: dict[str, Any]) -> None:
    print(f"\n{sparsity}, {threads} thread(s)")
    ratios = record["ratios"]
    for name, limit in (("iterative/linear", bar), ("dense/onnxruntime", DENSE_BAR)):
        found = ratios[name]
        verdict = "met" if found["median"] <= limit else "MISSED"
        print(
            f"  {name:22s} {found['median']:.3f} [{found['lo']:.3f}, {found['hi']:.3f}]"
            f" minima {found['min']:.3f} P(faster) {found['p_faster']:.3f}"
            f" bar {limit:.2f} {verdict}"
        )
    found = ratios["iterative/onnxruntime"]
    print(f"  {'iterative/onnxruntime':22s} {found['median']:.3f}")
    for name, arm in record["arms"].items():
        latency = arm["lat_ms"]
        print(f"  {name:12s} median {latency['median']:7.3f} ms  min {latency['min']:7.3f} ms")
    setup = sum(s["seconds"] for s in record["stages"] if s["stage"] != "measure")
    verdict = "met" if setup <= SETUP_BAR_S else "MISSED"
    print(
        f"  set-up {setup:.1f} s, bar {SETUP_BAR_S:.0f} s {verdict}; wall {record['wall_s']:.1f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="30 rounds instead of 300")
    parser.add_argument("--out", type=Path, help="keep the metrics of every case here")
    arguments = parser.parse_args()
    repeats = 30 if arguments.quick else 300
    with tempfile.TemporaryDirectory() as temporary:
        for sparsity, bar in CASES:
            for threads in (1, 2):
                name = f"main-job-{sparsity.replace(':', '-')}-{threads}t"
                record = run_case(sparsity, threads, repeats, Path(temporary) / name)
                report(sparsity, threads, bar, record)
                if arguments.out:
                    arguments.out.mkdir(parents=True, exist_ok=True)
                    path = arguments.out / f"{name}.json"
                    path.write_text(json.dumps(record, indent=1) + "\n")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"\npeak memory of one case: {peak:.0f} MiB")


if __name__ == "__main__":
    main()
