"""What bookkeeping costs: event logging (bar: 1 %) and profiling orchestration (bar: 5 % of a run).

Whole runs of a configuration, each in a folder of its own; the shares are those of the runs' own
records (``overhead`` in metrics.json). Beside them the seconds of one event, from a log of many.

Run: TVM_NUM_THREADS=1 OMP_NUM_THREADS=1 python benchmarks/overhead.py [--runs 3]
     [--model bert-mini-random] [--repeats 1000] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from icd_tvm.runtime.events import EventLog
from icd_tvm.runtime.progress import Progress
from icd_tvm.runtime.run import run
from icd_tvm.runtime.states import State

EVENTS_BAR_PCT, PROFILING_BAR_PCT = 1.0, 5.0


def event_us(folder: Path, count: int = 2000) -> float:
    """Return microseconds that one logged state takes on this disk."""
    log = EventLog(folder / "many.jsonl")
    began = time.perf_counter()
    for _ in range(count):
        with log.state(State.READY):
            pass
    return 1e6 * (time.perf_counter() - began) / count


def one(model: str, repeats: int, folder: Path) -> dict[str, Any]:
    config = {
        "model": {"name": model},
        "pipeline": {"repeats": repeats},
        "transform": {"sparsity": "unit:0.5"},
        "cache": {"enabled": False},
        "threads": 1,
    }
    return run(config, out=folder, progress=Progress(quiet=True)).metrics["overhead"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--model", default="bert-mini-random")
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="icd-overhead-") as folder:
        found = [
            one(arguments.model, arguments.repeats, Path(folder) / str(i))
            for i in range(arguments.runs)
        ]
        each_us = event_us(Path(folder))
    for name, bar in (("events_pct", EVENTS_BAR_PCT), ("profiling_pct", PROFILING_BAR_PCT)):
        worst = max(item[name] for item in found)
        shares = ", ".join(f"{item[name]:.4f}" for item in found)
        print(f"{name}: {shares}; worst {worst:.4f} of {bar}: {'ok' if worst < bar else 'MISS'}")
    seconds = ", ".join(f"{item['run_s']:.2f}" for item in found)
    print(f"run_s: {seconds}; one event {each_us:.1f} us")
    if arguments.out:
        record = {**vars(arguments), "out": None, "event_us": each_us, "records": found}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
