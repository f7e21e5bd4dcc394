"""The main job on trained MiniLM: every transform and thread count, bars beside the figures.

Run: python benchmarks/main_job.py [--quick] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# (sparsity, quantisation, bar for iterative/linear of the whole model)
W8A8 = "int8:w8a8:smooth0.75"
CASES = (
    ("unit:0.5", "none", 0.80),
    ("vec16:0.5", "none", 0.85),
    ("unit:0.5", W8A8, 0.80),
    ("none", W8A8, None),
)
DENSE_BAR = 1.0
SETUP_BAR_S = 60.0


def run_case(sparsity: str, quant: str, threads: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Compile and measure one case in a process of its own; return its metrics."""
    command = [sys.executable, "-m", "icd_tvm.compile", "minilm", "--peer", "onnxruntime"]
    command += ["--sparsity", sparsity, "--quant", quant, "--threads", str(threads)]
    command += ["--repeats", str(repeats), "--out", str(folder)]
    # An order from an earlier run would take the solver out of the set-up time.
    fresh = {**os.environ, "ICD_CACHE_DIR": str(folder.with_suffix(".cache"))}
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=fresh)
    record: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    record["wall_s"] = time.perf_counter() - start
    return record


def report(case: str, threads: int, bar: float | None, record: dict[str, Any]) -> None:
    print(f"\n{case}, {threads} thread(s)")
    ratios = record["ratios"]
    for name, limit in (("iterative/linear", bar), ("dense/onnxruntime", DENSE_BAR)):
        found = ratios.get(name)
        if found is None or limit is None:
            continue
        verdict = "met" if found["median"] <= limit else "MISSED"
        print(
            f"  {name:22s} {found['median']:.3f} [{found['lo']:.3f}, {found['hi']:.3f}]"
            f" minima {found['min']:.3f} P(faster) {found['p_faster']:.3f}"
            f" bar {limit:.2f} {verdict}"
        )
    for name in ("iterative/onnxruntime", "linear/onnxruntime", "identity/dense"):
        if name in ratios:
            print(f"  {name:22s} {ratios[name]['median']:.3f}")
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
        for sparsity, quant, bar in CASES:
            case = " + ".join(text for text in (sparsity, quant) if text != "none")
            for threads in (1, 2):
                name = f"main-job-{case.replace(':', '-').replace(' + ', '-')}-{threads}t"
                record = run_case(sparsity, quant, threads, repeats, Path(temporary) / name)
                report(case, threads, bar, record)
                if arguments.out:
                    arguments.out.mkdir(parents=True, exist_ok=True)
                    path = arguments.out / f"{name}.json"
                    path.write_text(json.dumps(record, indent=1) + "\n")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"\npeak memory of one case: {peak:.0f} MiB")


if __name__ == "__main__":
    main()
