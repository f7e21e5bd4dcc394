"""Mutate cache entries, archives of them and W files; each must be right or refused.

Run: python benchmarks/cache_fuzz.py [--count 10000] [--seed 0]

``resealed`` entries have strange values in their body under a checksum made right again, as a
forger would write them. Anything but an ``IcdError`` ends the run with its traceback.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from icd_tvm.core.access_graph import build_w, load_w, save_w
from icd_tvm.core.permutation import Constraint
from icd_tvm.errors import IcdError
from icd_tvm.runtime import cache_entry
from icd_tvm.runtime.cache_archive import export_entries, import_entries
from icd_tvm.runtime.cache_entry import CacheEntry, decode, encode
from icd_tvm.runtime.perm_cache import PermutationCache

KEY = "a" * 64
TOKENS = b'{}[]",:0123456789-eE.\\ntf\x00\xff'
VALUES: list[Any] = [
    *(None, True, 0, -1, 12, 1e308, float("nan"), 10**30, 2**31),
    *("", "AAAA", "\ud800", "é" * 9, "free", "pairs"),
    *([], {}, [[]], [1, 2], {"a": 1}, [0, 1, 2, 3], list(range(12))),
]


def entry() -> CacheEntry:
    rules = {
        "free": Constraint.free(),
        "heads": Constraint.factored(3, 4, inside="equal"),
        "rope": Constraint.pairs(),
        "qkv": Constraint.segments((4, 8)),
    }
    perms = {group: rule.random(12, 0) for group, rule in rules.items()}
    return CacheEntry(perms, "f" * 64, rules, {"stats": {"U": 1.5}}, {"numpy": "2"}, "2026")


def mutated(data: bytes, dice: random.Random) -> bytes:
    """Flip, replace, delete, repeat, insert or cut, once or several times."""
    result = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 5, 20])):
        if not result:
            break
        place, span = dice.randrange(len(result)), dice.randrange(1, 50)
        how = dice.randrange(8)
        if how < 3:
            result[place] ^= 1 << dice.randrange(8)
        elif how == 3:
            result[place] = dice.choice(TOKENS)
        elif how == 4:
            del result[place : place + span]
        elif how == 5:
            result[place:place] = result[dice.randrange(len(result)) :][:span]
        elif how == 6:
            result[place:place] = dice.randbytes(8)
        else:
            del result[place:]
    return bytes(result)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything inside a JSON value."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for name, inner in items:
        yield (*path, name)
        yield from places(inner, (*path, name))


def resealed(body: dict[str, Any], version: int, dice: random.Random) -> bytes:
    body = copy.deepcopy(body)
    for _ in range(dice.choice([1, 1, 2, 3])):
        *path, last = dice.choice(list(places(body)))
        holder: Any = body
        for name in path:
            holder = holder[name]
        if dice.random() < 0.8:
            holder[last] = copy.deepcopy(dice.choice(VALUES))
        else:
            del holder[last]
    name = f"icd/perm-cache/v{version}"
    checksum = cache_entry._checksum(name, body)
    return json.dumps({"format": name, "checksum": checksum, "body": body}).encode()


def check_entry(dice: random.Random) -> None:
    found = decode(mutated(encode(entry(), KEY), dice), KEY).perms
    assert all(np.array_equal(found[group], perm) for group, perm in entry().perms.items())


def check_resealed(dice: random.Random) -> None:
    body = json.loads(encode(entry(), KEY))["body"]
    version = dice.choice([1, 2])
    if version == 1:
        perms = {group: perm.tolist() for group, perm in entry().perms.items()}
        body = {"perms": perms, "stats": {}, **{k: v for k, v in body.items() if k != "groups"}}
    found = decode(resealed(body, version, dice), KEY)
    for group, perm in found.perms.items():
        found.constraints[group].check(perm)


def check_archive(folder: Path, dice: random.Random) -> None:
    path = folder / "mutated.zip"
    path.write_bytes(mutated((folder / "good.zip").read_bytes(), dice))
    cache = PermutationCache(folder / "cache")
    cache.store.path(KEY).unlink(missing_ok=True)
    try:
        import_entries(cache, path)
    finally:
        outside = {file.name for file in folder.iterdir()}
        assert outside == {"good.zip", "mutated.zip", "W.npz", "cache"}, outside
    found = cache.get(KEY, lambda _: None)
    assert found is None or np.array_equal(found.perms["rope"], entry().perms["rope"])


def check_w(folder: Path, dice: random.Random) -> None:
    path = folder / "mutated.zip"
    path.write_bytes(mutated((folder / "W.npz").read_bytes(), dice))
    graph, _ = load_w(path)
    assert (graph != load_w(folder / "W.npz")[0]).nnz == 0


def fuzz(check: Callable[[random.Random], None], count: int, dice: random.Random) -> str:
    right, slowest = 0, 0.0
    for _ in range(count):
        began = time.perf_counter()
        try:
            check(dice)
            right += 1
        except IcdError:
            pass
        slowest = max(slowest, time.perf_counter() - began)
    return f"{count}: {right} right, {count - right} refused, slowest {slowest:.3f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="icd-fuzz-") as name:
        folder = Path(name)
        cache = PermutationCache(folder / "cache")
        cache.put(KEY, entry())
        export_entries(cache.store, folder / "good.zip")
        graph = build_w("mock", n=40, blocks=4, density=0.05, seed=1)
        save_w(folder / "W.npz", graph, "mock", 1)
        checks = {
            "entries": check_entry,
            "resealed": check_resealed,
            "archives": partial(check_archive, folder),
            "W files": partial(check_w, folder),
        }
        for title, check in checks.items():
            dice = random.Random(f"{arguments.seed} {title}")
            print(f"{title} {fuzz(check, arguments.count, dice)}", flush=True)


if __name__ == "__main__":
    main()
