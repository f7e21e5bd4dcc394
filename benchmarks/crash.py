"""Kill runs at every state and at random moments; resumed, they must end as if nothing had been.

Run: python benchmarks/crash.py [--random 50] [--seed 0] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from icd_tvm.models.importer import import_onnx
from icd_tvm.models.inputs import random_inputs
from icd_tvm.runtime.run_folder import RunFolder
from icd_tvm.runtime.states import FORWARD

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny_model import tiny_onnx

CONFIG = {
    "pipeline": {"repeats": 30, "warmup_iter": 3},
    "transform": {"sparsity": "unit:0.5"},
    "threads": 1,
}
# Kills its own process right after the event of one state is on the disk.
SUICIDE = """
import os, signal, sys
from icd_tvm.runtime.events import EventLog
append = EventLog.append
def stopping(log, stage):
    append(log, stage)
    if stage.stage == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)
EventLog.append = stopping
from icd_tvm.cli import main
sys.exit(main(["run", "-c", sys.argv[1], "--out", sys.argv[2], "--quiet"]))
"""


class Workplace:
    """A configuration, an environment with a cache of its own, and the reference run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.json"
        model = tiny_onnx(root / "tiny.onnx")
        self.config.write_text(json.dumps({"model": {"path": str(model)}, **CONFIG}))
        self.env = {**os.environ, "ICD_CACHE_DIR": str(root / "cache")}
        self.reference = root / "reference"
        began = time.perf_counter()
        self.run(self.reference)
        self.seconds = time.perf_counter() - began
        self.feeds = random_inputs(import_onnx(model), 0)
        self.outputs = self.result(self.reference)

    def command(self, out: Path, *flags: str) -> list[str]:
        """Return the command line of a run."""
        words = [sys.executable, "-m", "icd_tvm", "run", "-c", str(self.config)]
        return [*words, "--out", str(out), "--quiet", *flags]

    def run(self, out: Path, *flags: str) -> None:
        """Run to the end; RuntimeError with the last words of a run that fails."""
        done = subprocess.run(
            self.command(out, *flags), env=self.env, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"exit status {done.returncode}: {done.stderr[-800:]}")

    def result(self, out: Path) -> np.ndarray:
        """Return the first output of the kept module on fixed inputs."""
        from icd_tvm._tvm import relax, tvm

        module = tvm.runtime.load_module(str(out / "module.so"))
        arguments = [tvm.runtime.tensor(array) for array in self.feeds.values()]
        found = relax.VirtualMachine(module, tvm.cpu())["main"](*arguments)
        first = found if isinstance(found, tvm.runtime.Tensor) else found[0]
        return np.asarray(first.numpy())

    def check(self, out: Path) -> str:
        """Return what is wrong with a resumed run, or an empty string."""
        if orders(out) != orders(self.reference):
            return "another permutation"
        gap = float(np.abs(self.result(out) - self.outputs).max() / np.abs(self.outputs).max())
        if not gap <= 1e-4:
            return f"outputs differ by {gap:.1e}"
        with RunFolder(out, wait_s=0.1):
            pass
        left = sorted(path.name for path in out.glob(".*") if path.name != ".lock")
        return f"left behind: {left}" if left else ""


def orders(out: Path) -> Any:
    content = json.loads((out / "perm.json").read_text())["orders"]
    return {when: [(d["group"], d["perm"]) for d in items] for when, items in content.items()}


def killed_at(place: Workplace, out: Path, state: str) -> bool:
    arguments = [sys.executable, "-c", SUICIDE, str(place.config), str(out), state]
    done = subprocess.run(arguments, env=place.env, capture_output=True, check=False)
    return done.returncode == -signal.SIGKILL


def killed_after(place: Workplace, out: Path, seconds: float) -> bool:
    process = subprocess.Popen(
        place.command(out), env=place.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    return process.wait() == -signal.SIGKILL


def attempt(place: Workplace, name: str, kill: Any) -> dict[str, Any]:
    """Kill one run, resume it, and say how it ended."""
    out = place.root / name
    killed = kill(out)
    try:
        place.run(out, "--resume")
        wrong = place.check(out)
    except Exception as error:
        wrong = str(error)
    shutil.rmtree(out, ignore_errors=True)
    print(f"{name:24s} {'killed' if killed else 'ended before':12s} {wrong or 'ok'}", flush=True)
    return {"name": name, "killed": killed, "wrong": wrong}


def random_moments(place: Workplace, count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Kill ``count`` runs at moments spread over the time that a run takes."""
    found: list[dict[str, Any]] = []
    latest = place.seconds
    while sum(bool(item["killed"]) for item in found) < count:
        # Half of them with an empty cache, so that kills also fall into the solver.
        if len(found) % 2:
            shutil.rmtree(place.root / "cache", ignore_errors=True)
        t = rng.uniform(0.0, latest)
        name = f"{len(found)}-{t:.2f}s"
        found.append(attempt(place, name, partial(killed_after, place, seconds=t)))
        # On a machine under load one run takes much longer than another.
        latest = latest if found[-1]["killed"] else max(1.0, min(latest, t))
    return found


def full_disk(place: Workplace, megabytes: float) -> dict[str, Any]:
    """Run on a small file system; the refusal must be one line, and the run must be resumable."""
    disk, name = place.root / "disk", f"disk-{megabytes:g}MB"
    disk.mkdir(exist_ok=True)
    size = f"size={int(megabytes * 1024)}k"
    mount = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        print(f"{name:24s} skipped: no file system can be mounted here")
        return {"name": name, "killed": None, "wrong": ""}
    try:
        done = subprocess.run(
            place.command(disk / "run"), env=place.env, capture_output=True, text=True, check=False
        )
        lines = [line for line in done.stderr.splitlines() if line.startswith("error ")]
        wrong = "" if done.returncode == 2 and len(lines) == 1 else done.stderr[-400:]
        grow = ["mount", "-o", "remount,size=64m", str(disk)]
        subprocess.run(grow, check=True)
        place.run(disk / "run", "--resume")
        wrong = wrong or place.check(disk / "run")
        print(f"{name:24s} {(lines or ['no refusal'])[0][:100]}: {wrong or 'ok'}", flush=True)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
    return {"name": name, "killed": None, "wrong": wrong}


def crowd(place: Workplace, count: int) -> dict[str, Any]:
    """Start several processes on one directory: one runs, the others are refused in one line."""
    out = place.root / "crowd"
    started = [
        subprocess.Popen(
            place.command(out), env=place.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        for _ in range(count)
    ]
    errors = [process.communicate()[1].decode() for process in started]
    codes = sorted(process.returncode for process in started)
    wrong = (
        "" if codes == [0] + [2] * (count - 1) else f"exit statuses {codes}: {errors[-1][-300:]}"
    )
    wrong = wrong or place.check(out)
    print(f"{count} on one directory        {wrong or 'ok'}", flush=True)
    return {"name": "crowd", "killed": None, "wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--random", type=int, default=50, help="kills at random moments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the record here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="icd-crash-") as folder:
        place = Workplace(Path(folder))
        print(f"one run takes {place.seconds:.1f} s")
        found = [
            attempt(place, state.value, partial(killed_at, place, state=state.value))
            for state in FORWARD
        ]
        found += random_moments(place, arguments.random, random.Random(arguments.seed))
        found += [full_disk(place, size) for size in (0.008, 0.03, 0.08)]
        found.append(crowd(place, 4))
        verify = [sys.executable, "-m", "icd_tvm", "cache", "verify"]
        cache = subprocess.run(verify, env=place.env, capture_output=True, text=True, check=False)
    bad = [item for item in found if item["wrong"]]
    killed = sum(bool(item["killed"]) for item in found)
    print(
        f"{len(found)} cases, {killed} killed, {len(bad)} wrong; cache verify: {cache.returncode}"
    )
    if arguments.out:
        record = {"cases": found, "cache_verify": cache.returncode, "run_s": place.seconds}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(bool(bad or cache.returncode))


if __name__ == "__main__":
    main()
