"""The permutation cache: never a wrong permutation, never a failed run."""

from __future__ import annotations

import copy
import errno
import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icd_tvm.core.permutation import Constraint
from icd_tvm.errors import ConfigError, ModelFileError, PermutationError
from icd_tvm.runtime import cache_entry, cache_key, cache_store
from icd_tvm.runtime.cache_entry import CacheEntry, NewerFormatError, decode, encode
from icd_tvm.runtime.cache_key import model_content_hash, tool_versions
from icd_tvm.runtime.perm_cache import PermutationCache, cache_folder

KEY, OTHER = "a" * 64, "b" * 64
MODEL = "f" * 64
SIZES = {"ffn": 12, "heads": 12, "rope": 8, "qkv": 6}
FORK = multiprocessing.get_context("fork")


def make_entry(seed: int = 0) -> CacheEntry:
    rules = {
        "heads": Constraint.factored(3, 4, inside="equal"),
        "rope": Constraint.pairs(),
        "qkv": Constraint.segments((2, 4)),
    }
    perms = {
        group: rules.get(group, Constraint.free()).random(n, seed) for group, n in SIZES.items()
    }
    meta = {"stats": {"ffn": {"U": np.float32(2.5), "improved": True, 7: None}}}
    return CacheEntry(perms, MODEL, rules, meta, {"numpy": "2"}, "2026-01-01T00:00:00+00:00")


def fits(entry: CacheEntry) -> None:
    entry.check_model(MODEL, SIZES)


def same(entry: CacheEntry | None, wanted: CacheEntry) -> bool:
    return (
        entry is not None
        and entry.perms.keys() == wanted.perms.keys()
        and all(np.array_equal(entry.perms[g], p) for g, p in wanted.perms.items())
    )


def never() -> CacheEntry:
    raise AssertionError("solved although the entry was there")


@pytest.fixture
def cache(tmp_path: Path) -> PermutationCache:
    return PermutationCache(tmp_path / "cache", lock_timeout_s=10.0)


def envelope(version: int, body: dict[str, Any]) -> bytes:
    name = f"icd/perm-cache/v{version}"
    checksum = cache_entry._checksum(name, body)
    return json.dumps({"format": name, "checksum": checksum, "body": body}).encode()


def body_of(entry: CacheEntry, key: str = KEY) -> dict[str, Any]:
    return json.loads(encode(entry, key))["body"]


def plant(cache: PermutationCache, data: bytes, key: str = KEY) -> Path:
    cache.store.entries.mkdir(parents=True, exist_ok=True)
    cache.store.path(key).write_bytes(data)
    return cache.store.path(key)


# What is kept comes back.


def test_the_second_call_is_a_hit(cache: PermutationCache) -> None:
    entry, how = cache.get_or_compute(KEY, fits, make_entry)
    assert how == "computed"
    again, how = cache.get_or_compute(KEY, fits, never)
    assert how == "hit"
    assert same(again, entry)
    assert all(perm.dtype == np.int32 for perm in again.perms.values())
    assert again.constraints["heads"] == Constraint.factored(3, 4, inside="equal")
    assert again.meta == {"stats": {"ffn": {"U": 2.5, "improved": True, "7": None}}}
    assert (again.versions, again.created) == (entry.versions, entry.created)
    assert cache.remarks == []


def test_get_and_put(cache: PermutationCache) -> None:
    assert cache.get(KEY, fits) is None
    assert cache.put(KEY, make_entry()) == ""
    assert same(cache.get(KEY, fits), make_entry())
    assert cache.get(OTHER, fits) is None


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.sampled_from(["free", "pairs", "factored"]))
def test_any_permutation_survives_a_round_trip(seed: int, n: int, kind: str) -> None:
    n *= 2
    rule = {"free": Constraint.free(), "pairs": Constraint.pairs()}.get(
        kind, Constraint.factored(2, n // 2)
    )
    entry = CacheEntry({"g": rule.random(n, seed)}, MODEL, {"g": rule})
    assert same(decode(encode(entry, KEY), KEY), entry)


def test_the_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICD_CACHE_DIR", str(tmp_path))
    assert cache_folder() == tmp_path / "permutations" == PermutationCache().store.root


@pytest.mark.parametrize("key", ["", "abc", "../" + "a" * 61, "A" * 64, "a" * 64 + "\n"])
def test_only_hashes_are_keys(cache: PermutationCache, key: str) -> None:
    for call in (cache.get, cache.put, lambda *a: cache.get_or_compute(*a, never)):
        with pytest.raises(ConfigError, match="cache key"):
            call(key, fits)


@pytest.mark.parametrize("options", [{"max_bytes": -1}, {"lock_timeout_s": float("nan")}])
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        PermutationCache(tmp_path, **options)


def test_what_compute_raises_is_not_caught(cache: PermutationCache) -> None:
    def broken() -> CacheEntry:
        raise OSError("the solver's own")

    with pytest.raises(OSError, match="the solver's own"):
        cache.get_or_compute(KEY, fits, broken)
    assert cache.get_or_compute(KEY, fits, make_entry)[1] == "computed"


# A damaged or foreign entry is put aside, and the order decided again.


def assert_recovers(cache: PermutationCache, reason: str) -> None:
    entry, how = cache.get_or_compute(KEY, fits, make_entry)
    assert (how, same(entry, make_entry())) == ("computed", True)
    assert any(reason in remark and "moved to" in remark for remark in cache.remarks)
    assert len(cache.store.quarantined()) == 1
    assert cache.get_or_compute(KEY, fits, never)[1] == "hit"


def test_a_damaged_entry_is_said(cache: PermutationCache, caplog: pytest.LogCaptureFixture) -> None:
    plant(cache, encode(make_entry(), KEY)[:-40])
    with caplog.at_level(logging.WARNING, "icd_tvm"):
        assert_recovers(cache, "is damaged: it is not JSON")
    assert [record.name for record in caplog.records] == ["icd_tvm"]
    assert caplog.messages == cache.remarks


def changed(**fields: Any) -> dict[str, Any]:
    return {**body_of(make_entry()), **fields}


def changed_group(**fields: Any) -> dict[str, Any]:
    body = body_of(make_entry())
    body["groups"]["heads"] = {**body["groups"]["heads"], **fields}
    return body


def rule(kind: str, lengths: Any, inside: Any = "fixed") -> dict[str, Any]:
    return {"kind": kind, "lengths": lengths, "blocks": True, "inside": inside}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (changed(key=OTHER), "another key"),
        (changed(model_hash="e" * 64), "another model"),
        (changed(model_hash=3), "model_hash"),
        (changed(groups=[]), "groups is missing"),
        (changed(groups={"ffn": 3}), "'ffn' is malformed"),
        (changed(groups={"more": body_of(make_entry())["groups"]["ffn"]}), "no group 'more'"),
        (changed_group(perm="AAAA"), "'heads' is malformed"),
        (changed_group(perm="é"), "'heads' is malformed"),
        (changed_group(perm=""), "length 0, expected 12"),
        (changed_group(n=None), "n is no integer"),
        (changed_group(n=11), "length 12, expected 11"),
        (changed_group(constraint=rule("factored", [4, 3])), "breaks the factored constraint"),
        (changed_group(constraint=rule("factored", [4])), "'heads' is malformed"),
        (changed_group(constraint=rule("factored", [4, 3], [])), "'heads' is malformed"),
        (changed_group(constraint=rule("segments", [-1, 13])), "'heads' is malformed"),
        (changed_group(constraint=rule("segments", [True, 11])), "a length is no integer"),
        (changed_group(constraint=rule("any", [])), "unknown constraint 'any'"),
    ],
)
def test_a_forged_entry_with_a_right_checksum(
    cache: PermutationCache, body: dict[str, Any], reason: str
) -> None:
    plant(cache, envelope(2, body))
    assert_recovers(cache, reason)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"1" * 9999,
    ]
    + [json.dumps({"format": f, "checksum": "", "body": {}}).encode() for f in (1, "x", [])],
)
def test_files_that_are_no_entries(cache: PermutationCache, data: bytes) -> None:
    plant(cache, data)
    assert_recovers(cache, "is damaged")


@pytest.mark.parametrize("kind", ["folder", "fifo", "link", "huge"])
def test_entries_that_are_no_files(
    cache: PermutationCache, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = plant(cache, encode(make_entry(), KEY))
    if kind == "huge":
        monkeypatch.setattr(cache_store, "MAX_ENTRY_BYTES", 2000)
        os.truncate(path, 5000)
    else:
        target = path.rename(path.with_name("target"))
        {"folder": path.mkdir, "fifo": lambda: os.mkfifo(path)}.get(
            kind, lambda: path.symlink_to(target)
        )()
    assert_recovers(cache, "larger than" if kind == "huge" else "no regular file")


def test_a_validator_may_raise_anything(cache: PermutationCache) -> None:
    cache.put(KEY, make_entry())
    asked = iter([KeyError("x"), KeyError("x"), None])

    def validate(entry: CacheEntry) -> None:
        if error := next(asked):
            raise error

    assert cache.get_or_compute(KEY, validate, make_entry)[1] == "computed"
    assert "is refused: KeyError: 'x'" in cache.remarks[0]


def test_an_entry_that_its_own_model_refuses_is_not_kept(cache: PermutationCache) -> None:
    wrong = CacheEntry({"ffn": np.arange(5, dtype=np.int32)}, MODEL)
    entry, how = cache.get_or_compute(KEY, fits, lambda: wrong)
    assert entry is wrong
    assert how == "no cache: permutation has length 5, expected 12"
    assert cache.store.files() == []


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (CacheEntry({"g": np.array([0, 0], np.int32)}, MODEL), "never names index 1"),
        (CacheEntry({"g": np.arange(3)}, MODEL, {"g": Constraint.pairs()}), "even length"),
        (CacheEntry({}, MODEL, {"g": Constraint.pairs()}), "no permutation"),
        (CacheEntry({}, MODEL, meta={"x": float("nan")}), "cannot be stored"),
        (CacheEntry({}, MODEL, meta={"x": object()}), "cannot be stored: object is not JSON"),
    ],
)
def test_what_cannot_be_stored(cache: PermutationCache, entry: CacheEntry, reason: str) -> None:
    with pytest.raises(PermutationError, match=reason):
        encode(entry, KEY)
    found, how = cache.get_or_compute(KEY, lambda _: None, lambda: entry)
    assert found is entry
    assert how.startswith("no cache: ")
    assert reason in how


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_flipped_bits_and_cuts(data: st.DataObject) -> None:
    """Whatever happens to a file: its own permutations, or a refusal."""
    wanted = make_entry(3)
    content = bytearray(encode(wanted, KEY))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    try:
        found = decode(bytes(content), KEY)
    except NewerFormatError:
        pytest.fail("damage passed for a newer format")
    except PermutationError:
        return
    assert same(found, wanted)
    assert found.constraints == {**wanted.constraints, "ffn": Constraint.free()}


def test_every_bit_of_an_entry() -> None:
    """No single flip gives another entry; only one of a byte that JSON ignores is not seen."""
    entry = CacheEntry({"g": np.array([2, 0, 1], np.int32)}, MODEL, created="")
    content = encode(entry, KEY)
    unseen = 0
    for place in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            try:
                found = decode(bytes(damaged), KEY)
            except PermutationError:
                continue
            unseen += 1
            assert same(found, entry)
            assert found.model_hash == MODEL
    assert unseen < len(content) // 20
    for end in range(len(content)):
        with pytest.raises(PermutationError):
            decode(content[:end], KEY)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
PARTS = ["key", "model_hash", "groups", "meta", "versions", "created", "perms", "stats"]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2), st.sampled_from(PARTS), JSON, st.booleans())
def test_strange_bodies_are_refused_or_right(
    version: int, part: str, value: Any, in_group: bool
) -> None:
    body = body_of(make_entry()) if version == 2 else old_body()
    if in_group and version == 2:
        body["groups"]["ffn"] = {**body["groups"]["ffn"], "constraint": value}
    else:
        body[part] = value
    try:
        entry = decode(envelope(version, body), KEY)
    except PermutationError:
        return
    for group, perm in entry.perms.items():
        entry.constraints[group].check(perm)


# Formats.


def old_body() -> dict[str, Any]:
    return {
        "key": KEY,
        "model_hash": MODEL,
        "perms": {group: perm.tolist() for group, perm in make_entry().perms.items()},
        "stats": {"ffn": {"U": 1.0}},
        "versions": {},
        "created": "",
    }


def test_an_old_format_is_understood(cache: PermutationCache) -> None:
    plant(cache, envelope(1, old_body()))
    entry, how = cache.get_or_compute(KEY, fits, never)
    assert how == "hit"
    assert same(entry, make_entry())
    assert entry.meta == {"ffn": {"U": 1.0}}


@pytest.mark.parametrize(
    "perms", [{"ffn": [0, 0]}, {"ffn": "ab"}, {"ffn": [[0], [1, 2]]}, [], {"f": 3}]
)
def test_a_broken_old_format_is_put_aside(cache: PermutationCache, perms: Any) -> None:
    plant(cache, envelope(1, {**old_body(), "perms": perms}))
    assert_recovers(cache, "is damaged")


def test_a_newer_format_is_left_alone(cache: PermutationCache) -> None:
    path = plant(cache, envelope(3, {"anything": "else"}))
    before = path.read_bytes()
    entry, how = cache.get_or_compute(KEY, fits, make_entry)
    assert how.startswith("no cache: ")
    assert "format 3, newer than 2" in how
    assert same(entry, make_entry())
    assert cache.get(KEY, fits) is None
    assert "newer" in cache.put(KEY, make_entry())
    assert cache.store.prune(0) == []
    assert cache.verify() == {
        "sound": 0,
        "damaged": {},
        "left": {KEY: cache.remarks[0]},
        "stale": 0,
    }
    assert path.read_bytes() == before


# The size cap.


def used(cache: PermutationCache, key: str, seconds_ago: float) -> None:
    moment = time.time() - seconds_ago
    os.utime(cache.store.path(key), (moment, moment))


def test_the_entries_unused_for_longest_go(tmp_path: Path) -> None:
    size = len(encode(make_entry(), KEY))
    cache = PermutationCache(tmp_path, max_bytes=3 * size + 50)
    keys = [f"{number:064x}" for number in range(4)]
    for key in keys[:3]:
        cache.put(key, make_entry())
    for ago, key in zip((300, 200, 100), keys, strict=False):
        used(cache, key, ago)
    assert cache.get(keys[0], fits) is not None
    cache.put(keys[3], make_entry())
    assert {file.key for file in cache.store.files()} == {keys[0], keys[2], keys[3]}
    assert sum(file.size for file in cache.store.files()) <= cache.store.max_bytes


def test_an_entry_beyond_the_cap_is_not_kept(tmp_path: Path) -> None:
    cache = PermutationCache(tmp_path, max_bytes=100)
    assert "more than the cache may hold" in cache.get_or_compute(KEY, fits, make_entry)[1]
    assert cache.store.files() == []


def test_a_clock_that_jumped(tmp_path: Path) -> None:
    """An entry used in the future is not kept for ever, nor thrown away first."""
    size = len(encode(make_entry(), KEY))
    cache = PermutationCache(tmp_path, max_bytes=2 * size + 50)
    future, old, new = (f"{number:064x}" for number in range(3))
    for key in (future, old):
        cache.put(key, make_entry())
    used(cache, future, -1e9)
    used(cache, old, 50)
    assert same(cache.get(future, fits), make_entry())
    used(cache, future, -1e9)
    cache.put(new, make_entry())
    files = {file.key: file.used for file in cache.store.files()}
    assert set(files) == {future, new}
    assert files[future] < time.time() + 60


def test_unfinished_files_go_by_age(cache: PermutationCache) -> None:
    cache.put(KEY, make_entry())
    stale, future, fresh = (cache.store.entries / f".{name}.json" for name in "abc")
    for path, ago in ((stale, 9000), (future, -9000), (fresh, 5)):
        path.write_text("half")
        os.utime(path, (time.time() - ago, time.time() - ago))
    assert cache.verify()["stale"] == 2
    assert fresh.exists()
    assert cache.get_or_compute(KEY, fits, never)[1] == "hit"


def test_prune_removes_old_locks_and_quarantine(cache: PermutationCache) -> None:
    cache.put(KEY, make_entry())
    cache.put(OTHER, make_entry())
    plant(cache, b"")
    cache.get(KEY, fits)
    lock = cache.store.locks / f"{KEY}.lock"
    os.utime(lock, (1e9, 1e9))
    held = cache.store.locks / f"{OTHER}.lock"
    os.utime(held, (1e9, 1e9))
    assert cache.store.prune(1 << 30) == []
    assert not lock.exists()
    assert held.exists()
    assert cache.store.quarantined() == []
    assert cache.store.prune(0) == [OTHER]


def test_the_quarantine_does_not_grow_for_ever(
    cache: PermutationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_store, "_QUARANTINED", 3)
    for _ in range(5):
        plant(cache, b"")
        assert cache.get(KEY, fits) is None
    assert len(cache.store.quarantined()) == 3


# A folder that cannot be used is no reason for a run to fail.


def as_nobody(task: Callable[[], object]) -> str:
    """Run ``task`` in a child without the rights of root; return what it returned as text."""
    receive, send = FORK.Pipe(duplex=False)

    def child() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        try:
            send.send(str(task()))
        except BaseException as error:
            send.send(f"raised {error!r}")

    process = FORK.Process(target=child)
    process.start()
    assert receive.poll(20)
    process.join()
    return receive.recv()


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that other users reach, which those of pytest are not."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def test_a_folder_that_is_read_only(shared_folder: Path) -> None:
    cache = PermutationCache(shared_folder / "cache")
    cache.put(KEY, make_entry())
    plant(cache, b"damaged", "c" * 64)
    folders = [cache.store.root, *cache.store.root.iterdir()]
    for folder in folders:
        folder.chmod(0o555)

    def ask(key: str) -> str:
        return as_nobody(lambda: cache.get_or_compute(key, fits, make_entry)[1])

    assert ask(KEY) == "hit"
    for key in (OTHER, "c" * 64):
        assert ask(key).startswith("no cache: cannot lock")
        assert "Permission denied" in ask(key)
    assert as_nobody(lambda: cache.get("c" * 64, fits)) == "None"
    assert "it cannot be put aside" in as_nobody(lambda: cache.verify()["damaged"])
    for folder in folders:
        folder.chmod(0o755)


def test_an_entry_that_may_not_be_read(shared_folder: Path) -> None:
    cache = PermutationCache(shared_folder)
    cache.put(KEY, make_entry())
    for folder in (cache.store.entries, cache.store.locks):
        folder.chmod(0o777)
    for file in cache.store.locks.iterdir():
        file.chmod(0o666)
    cache.store.path(KEY).chmod(0)
    how = as_nobody(lambda: cache.get_or_compute(KEY, fits, make_entry)[1])
    assert how.startswith("no cache: cannot read cache entry")
    assert cache.store.path(KEY).exists()


@pytest.mark.parametrize("root", ["file/below", "/proc/absent/cache"])
def test_a_folder_that_cannot_be(tmp_path: Path, root: str) -> None:
    (tmp_path / "file").write_text("")
    cache = PermutationCache(tmp_path / root)
    assert cache.get(KEY, fits) is None
    assert cache.get_or_compute(KEY, fits, make_entry)[1].startswith("no cache: cannot lock")
    assert cache.put(KEY, make_entry()).startswith("cannot lock")


def full(*_: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk(cache: PermutationCache, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    owner = os if call == "fsync" else Path
    with monkeypatch.context() as patch:
        patch.setattr(owner, call, full)
        entry, how = cache.get_or_compute(KEY, fits, make_entry)
    assert same(entry, make_entry())
    assert how.startswith("no cache: cannot write")
    assert "No space left on device" in how
    assert list(cache.store.entries.iterdir()) == []
    assert cache.get_or_compute(KEY, fits, make_entry)[1] == "computed"


def test_a_file_that_may_not_grow(shared_folder: Path) -> None:
    """The system itself refuses the write half way."""
    shared_folder.chmod(0o777)
    cache = PermutationCache(shared_folder / "cache")

    def task() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
        return cache.get_or_compute(KEY, fits, make_entry)[1]

    assert as_nobody(task).startswith("no cache: cannot write")
    assert list(cache.store.entries.iterdir()) == []


def test_a_small_file_system_fills_up(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a tmpfs")
    try:
        cache = PermutationCache(tmp_path / "cache")
        hows = []
        for number in range(30):
            key = f"{number:064x}"
            entry, how = cache.get_or_compute(key, fits, make_entry)
            assert same(entry, make_entry())
            hows.append(how)
        assert hows[0] == "computed"
        assert hows[-1].startswith("no cache: ")
        assert cache.get_or_compute("0" * 64, fits, never)[1] == "hit"
        assert cache.verify()["damaged"] == {}
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_stale_nfs_handle_is_asked_again(
    cache: PermutationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.put(KEY, make_entry())
    real, failures = cache_store._read_regular, iter([errno.ESTALE, errno.ESTALE, None])

    def read(path: Path) -> bytes:
        if number := next(failures, None):
            raise OSError(number, os.strerror(number))
        return real(path)

    monkeypatch.setattr(cache_store, "_read_regular", read)
    assert cache.get_or_compute(KEY, fits, never)[1] == "hit"


def test_an_input_output_error(cache: PermutationCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    cache.put(KEY, make_entry())
    monkeypatch.setattr(cache_store, "_read_regular", fail)
    assert "Input/output error" in cache.get_or_compute(KEY, fits, make_entry)[1]


# Many at once.


def test_a_lock_that_nobody_gives_up(cache: PermutationCache) -> None:
    impatient = PermutationCache(cache.store.root, lock_timeout_s=0.05)
    results: list[str] = []

    def ask() -> None:
        results.append(impatient.get_or_compute(KEY, fits, make_entry)[1])

    def slow() -> CacheEntry:
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        return make_entry()

    assert cache.get_or_compute(KEY, fits, slow)[1] == "computed"
    assert results == ["no cache: another process has held the lock 'aaaaaaaaaaaa' for 0.05 s"]


def test_threads_solve_a_key_once(cache: PermutationCache) -> None:
    solved: list[int] = []

    def solve() -> CacheEntry:
        solved.append(1)
        time.sleep(0.1)
        return make_entry()

    hows: list[str] = []
    threads = [
        threading.Thread(target=lambda: hows.append(cache.get_or_compute(KEY, fits, solve)[1]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(hows) == ["computed", "hit", "hit", "hit"]
    assert len(solved) == 1


def test_another_takes_over_from_a_killed_solver(cache: PermutationCache) -> None:
    receive, send = FORK.Pipe(duplex=False)

    def solve_for_ever() -> None:
        cache.get_or_compute(KEY, fits, lambda: (send.send("began"), time.sleep(60))[1])

    process = FORK.Process(target=solve_for_ever)
    process.start()
    assert receive.poll(20)
    killer = threading.Timer(0.2, lambda: os.kill(process.pid or 0, signal.SIGKILL))
    killer.start()
    assert cache.get_or_compute(KEY, fits, make_entry)[1] == "computed"
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_processes_share_a_cache_and_die(tmp_path: Path) -> None:
    """A small run of the stress test, which says what it counts."""
    script = Path(__file__).parents[1] / "benchmarks" / "cache_stress.py"
    sizes = ["--processes", "6", "--runs", "15", "--kills", "15", "--solve-s", "0.02"]
    done = subprocess.run(
        [sys.executable, str(script), "--json", "--chaos", "0.3", *sizes],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(script.parents[1]), "TMPDIR": str(tmp_path)},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shared, killed = (json.loads(done.stdout)[name] for name in ("shared", "killed"))
    assert shared["hit"] + shared["computed"] == shared["runs"] == 90
    assert shared["solves"] == shared["computed"] < 90
    for name in ("no cache", "wrong", "failed processes", "duplicate solves"):
        assert shared[name] == 0, name
    assert killed["kills"] == 15
    assert (killed["damaged"], killed["blocked"]) == (0, 0)


# Keys.

FIELDS: dict[str, Any] = {
    "model_hash": MODEL,
    "task": "after",
    "transforms": {"sparsity": "unit:0.5", "quant": None},
    "seed": 0,
    "target": "llvm -mcpu=x86-64-v3",
    "solver": {"time_budget_s": 30.0, "refine_steps": 2000},
    "versions": {"numpy": "2.0", "apache-tvm": "0.27"},
}
CHANGES: dict[str, Any] = {
    "model_hash": "e" * 64,
    "task": "before",
    "transforms": {"sparsity": "unit:0.25", "quant": None},
    "seed": 1,
    "target": "llvm -mcpu=x86-64-v4",
    "solver": {"time_budget_s": 30.0, "refine_steps": 2001},
    "versions": {"numpy": "2.1", "apache-tvm": "0.27"},
}


def test_every_field_of_a_key_counts() -> None:
    keys = [cache_key.cache_key(**{**FIELDS, name: value}) for name, value in CHANGES.items()]
    keys.append(cache_key.cache_key(**FIELDS))
    assert len(set(keys)) == len(CHANGES) + 1
    assert all(cache_entry.is_key(key) for key in keys)
    shuffled = {name: FIELDS[name] for name in sorted(FIELDS, reverse=True)}
    shuffled["solver"] = dict(reversed(list(FIELDS["solver"].items())))
    assert cache_key.cache_key(**shuffled) == keys[-1]


def test_the_installed_versions_are_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {name: value for name, value in FIELDS.items() if name != "versions"}
    before = cache_key.cache_key(**fields)
    assert set(tool_versions()) >= {"icd-tvm", "apache-tvm", "numpy", "scipy", "scikit-network"}
    assert cache_key.cache_key(**fields, versions=tool_versions()) == before
    changed_versions = (*cache_key._installed()[1:], ("icd-tvm", "9.9"))
    monkeypatch.setattr(cache_key, "_installed", lambda: changed_versions)
    assert cache_key.cache_key(**fields) != before


def test_the_code_that_decides_is_in_the_key(tmp_path: Path) -> None:
    package = Path(cache_key.__file__).parents[1]
    copy = tmp_path / "icd_tvm"
    for name in ("core", "relax_passes", "tir_schedules"):
        shutil.copytree(package / name, copy / name, ignore=shutil.ignore_patterns("*.pyc"))
    (copy / "runtime").mkdir()
    for name in ("access_graphs.py", "orders.py"):
        shutil.copy(package / "runtime" / name, copy / "runtime")
    digest = cache_key.code_digest(copy)
    assert tool_versions()["icd-tvm code"] == digest == cache_key.code_digest(package)
    (copy / "core" / "README.txt").write_text("no code")
    assert cache_key.code_digest(copy) == digest
    seen = {digest}
    for name in ("core/solver.py", "core/cost.py", "relax_passes/build_access_graph.py"):
        with (copy / name).open("a") as file:
            file.write("# changed\n")
        seen.add(cache_key.code_digest(copy))
    (copy / "core" / "cost.py").rename(copy / "core" / "cost_of.py")
    assert len(seen | {cache_key.code_digest(copy)}) == 5


@pytest.mark.parametrize("value", [{1, 2}, float("nan"), object(), {"x": np.float32(1)}])
def test_a_key_of_what_is_not_plain_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="cache key"):
        cache_key.cache_key(**{**FIELDS, "transforms": [value]})


def test_the_hash_of_a_model(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    weight = onnx.numpy_helper.from_array(np.arange(2048, dtype=np.float32), "w")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 2048])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    node = onnx.helper.make_node("Mul", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [value], [result], [weight])
    model = onnx.helper.make_model(graph)
    inline, outside = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(model, inline)
    # It leaves the proto that it is given without weights.
    unloaded = copy.deepcopy(model)
    onnx.save(unloaded, outside, save_as_external_data=True, location="w.bin", size_threshold=0)
    shapes = {"x": (1, 2048)}
    found = model_content_hash(inline, shapes)
    assert found == model_content_hash(outside, shapes) == model_content_hash(model, shapes)
    assert found != model_content_hash(inline, {"x": (2, 2048)})
    data = bytearray((tmp_path / "w.bin").read_bytes())
    data[4000] ^= 1
    (tmp_path / "w.bin").write_bytes(data)
    assert found != model_content_hash(outside, shapes)
    with pytest.raises(ModelFileError, match="'w' is not loaded"):
        model_content_hash(unloaded)
    model.graph.node[0].op_type = "Add"
    assert found != model_content_hash(model, shapes)
