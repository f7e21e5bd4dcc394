"""Many processes on one permutation cache, and processes killed while they write to it.

Run: python benchmarks/cache_stress.py [--processes 8] [--runs 50] [--kills 200] [--json]

Every process asks for random keys, and now and then damages, prunes or verifies. The permutation
of a key follows from the key, so that a wrong one is seen. Each solve writes its start and its end
to one log; two solves of one key that overlap in time are counted as duplicates. Exit status 1 if
anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from icd_tvm.runtime.cache_entry import CacheEntry
from icd_tvm.runtime.cache_key import cache_key
from icd_tvm.runtime.perm_cache import PermutationCache

GROUPS, SIZE = 7, 1536
MODEL = "0" * 64
FORK = multiprocessing.get_context("fork")


def key_of(number: int) -> str:
    return cache_key(
        model_hash=MODEL, task="stress", transforms=[], seed=number, target="none", solver={}
    )


def entry_of(key: str) -> CacheEntry:
    """The one right entry of a key."""
    rng = np.random.default_rng(int(key[:12], 16))
    perms = {f"g{i}": rng.permutation(SIZE).astype(np.int32) for i in range(GROUPS)}
    return CacheEntry(perms, MODEL, created="")


def fits(entry: CacheEntry) -> None:
    entry.check_model(MODEL, {f"g{i}": SIZE for i in range(GROUPS)})


def is_right(entry: CacheEntry, key: str) -> bool:
    wanted = entry_of(key).perms
    return entry.perms.keys() == wanted.keys() and all(
        np.array_equal(entry.perms[group], perm) for group, perm in wanted.items()
    )


def solve(log: int, key: str, seconds: float) -> CacheEntry:
    """Stand in for the solver; one line of less than a page is appended as a whole."""
    os.write(log, f"{time.monotonic_ns()} start {key}\n".encode())
    time.sleep(seconds)
    entry = entry_of(key)
    os.write(log, f"{time.monotonic_ns()} end {key}\n".encode())
    return entry


def damage(cache: PermutationCache, key: str, dice: random.Random) -> None:
    """Flip one bit of an entry, or cut it, as a broken disk would."""
    try:
        with cache.store.path(key).open("r+b") as file:
            data = bytearray(file.read())
            place = dice.randrange(len(data))
            data[place] ^= 1 << dice.randrange(8)
            file.seek(0)
            file.write(data[: place + 1 if dice.random() < 0.5 else None])
            file.truncate()
    except (OSError, ValueError):
        pass


def work(root: Path, number: int, arguments: argparse.Namespace) -> None:
    """One process; leaves its counts in ``counts-NUMBER.json``."""
    logging.disable(logging.CRITICAL)
    dice = random.Random(number)
    log = os.open(root / "solves", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    cache = PermutationCache(root / "cache", max_bytes=arguments.max_bytes, lock_timeout_s=120)
    counts: Counter[str] = Counter()
    for _ in range(arguments.runs):
        key = key_of(dice.randrange(arguments.keys))
        entry, how = cache.get_or_compute(
            key, fits, partial(solve, log, key, dice.uniform(0, 2 * arguments.solve_s))
        )
        counts[how.split(":")[0]] += 1
        counts["wrong"] += not is_right(entry, key)
        if dice.random() < arguments.chaos:
            dice.choice(
                [
                    partial(damage, cache, key, dice),
                    partial(cache.store.prune, arguments.max_bytes // 2),
                    cache.verify,
                ]
            )()
    counts["put aside"] = sum("moved to" in remark for remark in cache.remarks)
    (root / f"counts-{number}.json").write_text(json.dumps(counts))


def duplicates(log: str) -> int:
    """Count solves that began while another solve of the same key was running."""
    running: Counter[str] = Counter()
    found = 0
    for line in sorted(log.splitlines(), key=lambda text: int(text.split()[0])):
        _, what, key = line.split()
        found += what == "start" and running[key] > 0
        running[key] += 1 if what == "start" else -1
    return found


def stress(root: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    workers = [
        FORK.Process(target=work, args=(root, i, arguments)) for i in range(arguments.processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    counts: Counter[str] = Counter()
    for path in root.glob("counts-*.json"):
        counts.update(json.loads(path.read_text()))
    log = (root / "solves").read_text()
    return {
        "processes": arguments.processes,
        "runs": arguments.processes * arguments.runs,
        "failed processes": sum(worker.exitcode != 0 for worker in workers),
        **{name: counts[name] for name in ("hit", "computed", "no cache", "put aside", "wrong")},
        "solves": log.count("start"),
        "duplicate solves": duplicates(log),
        "seconds": round(time.perf_counter() - began, 1),
    }


def write_forever(root: Path) -> None:
    logging.disable(logging.CRITICAL)
    cache = PermutationCache(root)
    while True:
        key = key_of(random.randrange(4))
        cache.put(key, entry_of(key))


def killed(root: Path, kills: int, dice: random.Random) -> dict[str, Any]:
    """Kill writers at random moments; then nothing may be damaged, and no key be blocked."""
    alive = 0
    for _ in range(kills):
        writer = FORK.Process(target=write_forever, args=(root,))
        writer.start()
        time.sleep(dice.uniform(0.01, 0.15))
        alive += writer.is_alive()
        os.kill(writer.pid or 0, signal.SIGKILL)
        writer.join()
    cache = PermutationCache(root, lock_timeout_s=2.0)
    found = cache.verify()
    unfinished = len(list(cache.store.entries.glob(".*")))
    keys = [key_of(number) for number in range(4)]
    for key in keys:
        cache.store.path(key).unlink(missing_ok=True)
    hows = [cache.get_or_compute(key, fits, partial(entry_of, key))[1] for key in keys]
    return {
        "kills": alive,
        "unfinished files": unfinished,
        "damaged": len(found["damaged"]),
        "blocked": sum(how != "computed" for how in hows),
    }


def warm_hit(root: Path, repeats: int = 200) -> dict[str, float]:
    """Milliseconds of a hit: 6 groups of 1,536, 6 of 32, 6 of 12 and one of 384 indices."""
    rng = np.random.default_rng(0)
    sizes = {
        f"{n}.{i}": n for n, count in ((1536, 6), (32, 6), (12, 6), (384, 1)) for i in range(count)
    }
    perms = {group: rng.permutation(n).astype(np.int32) for group, n in sizes.items()}
    cache, key, times = PermutationCache(root), key_of(0), []
    entry = CacheEntry(perms, MODEL)

    def asked() -> str:
        return cache.get_or_compute(key, lambda e: e.check_model(MODEL, sizes), lambda: entry)[1]

    asked()
    for _ in range(repeats):
        start = time.perf_counter()
        how = asked()
        times.append(1e3 * (time.perf_counter() - start))
        assert how == "hit"
    return {
        "min ms": round(min(times), 3),
        "median ms": round(float(np.median(times)), 3),
        "max ms": round(max(times), 3),
        "bytes": cache.store.path(key).stat().st_size,
    }


def in_folder(run: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    root = Path(tempfile.mkdtemp(prefix="icd-stress-"))
    try:
        return run(root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--keys", type=int, default=12)
    parser.add_argument("--solve-s", type=float, default=0.05, help="mean seconds of one solve")
    parser.add_argument("--max-bytes", type=int, default=600_000, help="about ten entries")
    parser.add_argument("--chaos", type=float, default=0.2, help="share of damage, prune, verify")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    record = {
        "shared": in_folder(lambda root: stress(root, arguments)),
        "killed": in_folder(lambda root: killed(root, arguments.kills, random.Random(0))),
        "warm hit": in_folder(warm_hit),
    }
    if arguments.json:
        print(json.dumps(record, indent=1))
    else:
        for title, counts in record.items():
            print(f"{title}: " + ", ".join(f"{name} {value}" for name, value in counts.items()))
    shared, after = record["shared"], record["killed"]
    bad = sum(shared[name] for name in ("failed processes", "wrong", "duplicate solves"))
    return int(bad + after["damaged"] + after["blocked"] > 0)


if __name__ == "__main__":
    sys.exit(main())
