"""Mutate configurations, models, cache entries, orders and traces; all must be read or refused.

Counted as wrong: any exception but a refusal (IcdError), a refusal of several lines, more than 60
seconds, a process that dies, a file written outside the work folder.

Run: python benchmarks/fuzz.py [--count 10000] [--seed 0] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny_model import tiny_onnx

LIMIT_S = 60
TOKENS = [b"{", b"]", b": ", b"\n- ", b"*a", b"&a ", b"!!", b"'", b"1e999", b"\t", b"null", b"\\u"]
KEY = "0" * 64

# A target takes the path of a mutated file.
Target = Callable[[Path], object]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Flip bits, replace, insert and delete bytes, or cut the end off."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(len(result) + 1)
        kind = rng.randrange(6)
        if kind == 0 and place < len(result):
            result[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            result[place : place + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(9))
        elif kind == 2:
            result[place:place] = rng.choice(TOKENS)
        elif kind == 3:
            del result[place : place + rng.randrange(1, 64)]
        elif kind == 4:
            result[place:place] = result[place : place + rng.randrange(1, 64)]
        elif rng.random() < 0.2:
            del result[place:]
    return bytes(result)


def targets(work: Path) -> dict[str, tuple[bytes, str, Target]]:
    """Return kind -> a valid file, its suffix, and what reads it."""
    from icd_tvm.config_file import load_config
    from icd_tvm.core.permutation import identity
    from icd_tvm.models.importer import import_onnx
    from icd_tvm.runtime.cache_entry import CacheEntry, decode, encode
    from icd_tvm.runtime.run import plan

    model = tiny_onnx(work / "tiny.onnx")
    config = {
        "model": {"path": str(model), "shapes": {}, "task": "fuzz"},
        "graph": {"source": "mock", "mock": {"blocks": 4}},
        "transform": {"sparsity": {"type": "unit", "rate": 0.5}},
        "threads": 1,
    }
    entry = encode(CacheEntry({"g": identity(64)}, "hash", meta={"axes": {"g": {}}}), KEY)
    orders, trace = _run_files(work, model)
    return {
        "yaml": (_yaml(config), ".yaml", lambda path: plan(load_config(path), out=work / "run")),
        "json": (json.dumps(config).encode(), ".json", load_config),
        "onnx": (model.read_bytes(), ".onnx", import_onnx),
        "cache": (entry, ".json", lambda path: decode(path.read_bytes(), KEY)),
        "orders": orders,
        "trace": trace,
    }


def _yaml(config: dict[str, Any]) -> bytes:
    import yaml

    return yaml.safe_dump(config).encode()


def _run_files(work: Path, model: Path) -> list[tuple[bytes, str, Target]]:
    from icd_tvm.config_file import make_config
    from icd_tvm.runtime.job import Job
    from icd_tvm.runtime.order_file import orders_text, read_orders
    from icd_tvm.runtime.orders import decided, made_from
    from icd_tvm.runtime.prepare import prepare
    from icd_tvm.runtime.progress import Progress, Stage
    from icd_tvm.runtime.stages.load import load
    from icd_tvm.runtime.trace_file import read_trace

    base = {"model": {"path": str(model)}, "graph": {"source": "mock"}, "threads": 1}
    config = make_config({**base, "cache": {"enabled": False}})
    job = Job(config, *prepare(config), Progress(quiet=True))
    load(job, Stage("READY", 0.0))
    result = job.result
    decisions, _ = decided(job, "before", result.imported.mod)
    text = orders_text({"before": decisions}, made_from(job)).encode()
    sizes = {group.id: group.size for group in result.groups.free}
    axis = max(sizes, key=lambda name: sizes[name])
    windows = np.repeat(np.arange(4), 16)
    arrays = {f"{axis}/windows": windows, f"{axis}/indices": np.arange(64)}
    np.savez(work / "trace.npz", **arrays)
    return [
        (text, ".json", lambda p: read_orders(p, result.groups, result.widths, job.model_hash)),
        ((work / "trace.npz").read_bytes(), ".npz", lambda p: read_trace(p, sizes)),
    ]


def judged(read: Target, path: Path) -> str:
    """Return ``read``, ``refused``, or what is wrong."""
    from icd_tvm.errors import IcdError

    signal.alarm(LIMIT_S)
    try:
        read(path)
    except IcdError as error:
        return "refused" if "\n" not in error.line() else f"several lines: {error.line()!r:.200}"
    except BaseException as error:
        return f"{type(error).__name__}: {error!s:.200}"
    finally:
        signal.alarm(0)
    return "read"


def worker(kind: str, seeds: range, work: str, found: Any) -> None:
    """Try one kind with many seeds; ``found`` gets (seed, verdict)."""
    folder = Path(work)
    os.environ["ICD_CACHE_DIR"] = str(folder / "cache")
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("over 60 s")))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    data, suffix, read = targets(folder)[kind]
    written: list[str] = []
    sys.addaudithook(lambda event, args: _watch(event, args, work, written))
    for seed in seeds:
        path = folder / f"case{suffix}"
        found.put((seed, "begun"))
        path.write_bytes(mutated(data, random.Random(seed)))
        verdict = judged(read, path)
        if written:
            verdict = f"wrote {written.pop()}"
        found.put((seed, verdict))


def _watch(event: str, args: Any, work: str, written: list[str]) -> None:
    if event == "open" and isinstance(args[0], str):
        flags = args[2] if isinstance(args[2], int) else 0
        changes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        inside = os.path.abspath(args[0]).startswith((work, "/dev/"))
        if changes and not inside:
            written.append(args[0])


def tried(kind: str, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Return how the cases of one kind ended, and the wrong ones."""
    counts: Counter[str] = Counter()
    wrong, first, stop = [], seed, seed + count
    with tempfile.TemporaryDirectory(prefix="icd-fuzz-") as work:
        while first < stop:
            found: Any = multiprocessing.get_context("spawn").SimpleQueue()
            process = multiprocessing.get_context("spawn").Process(
                target=worker, args=(kind, range(first, stop), work, found)
            )
            process.start()
            last = first
            while process.is_alive() or not found.empty():
                if found.empty():
                    time.sleep(0.01)
                    continue
                last, verdict = found.get()
                if verdict in ("read", "refused"):
                    counts[verdict] += 1
                elif verdict != "begun":
                    counts["wrong"] += 1
                    wrong.append(f"{kind} seed {last}: {verdict}")
            process.join()
            if process.exitcode:
                counts["wrong"] += 1
                wrong.append(f"{kind} seed {last}: the process died with {process.exitcode}")
            first = last + 1
    return counts, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", help="some of them")
    parser.add_argument("--out", type=Path, help="write the record here")
    arguments = parser.parse_args()
    record, failed = {}, False
    for kind in arguments.kinds or ("yaml", "json", "onnx", "cache", "orders", "trace"):
        began = time.perf_counter()
        counts, wrong = tried(kind, arguments.count, arguments.seed)
        seconds = time.perf_counter() - began
        print(f"{kind:7s} {dict(counts)} in {seconds:.0f} s", flush=True)
        for line in wrong[:20]:
            print(f"  {line}")
        record[kind] = {**counts, "examples": wrong[:20], "seconds": seconds}
        failed |= bool(wrong)
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
