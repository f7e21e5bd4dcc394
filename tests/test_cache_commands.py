"""``icd cache`` and ``icd solve``: what they print, write and refuse."""

from __future__ import annotations

import json
import stat
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icd_tvm.cli import main
from icd_tvm.core.access_graph import build_w, load_w, save_w
from icd_tvm.core.combined_cost import combined_cost
from icd_tvm.core.cost import distance_cost, modularity
from icd_tvm.core.permutation import Constraint, load_permutation, save_permutation
from icd_tvm.errors import ConfigError, IcdError, OutputError, PermutationError
from icd_tvm.runtime import cache_archive
from icd_tvm.runtime.cache_archive import export_entries, import_entries
from icd_tvm.runtime.cache_entry import CacheEntry, encode
from icd_tvm.runtime.perm_cache import PermutationCache

A, B, C = "aa" + "0" * 62, "ab" + "0" * 62, "cc" + "0" * 62
Capture = pytest.CaptureFixture[str]


def entry(seed: int = 0) -> CacheEntry:
    perms = {"ffn": Constraint.free().random(9, seed)}
    return CacheEntry(perms, "f" * 64, meta={"seed": seed}, created="2026-01-01T00:00:00+00:00")


def anything(_: CacheEntry) -> None:
    pass


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PermutationCache:
    monkeypatch.setenv("ICD_CACHE_DIR", str(tmp_path / "home"))
    result = PermutationCache()
    for seed, key in enumerate((A, B)):
        result.put(key, entry(seed))
    return result


def output(capsys: Capture, *arguments: str, status: int = 0) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


# icd cache


def test_ls_names_every_entry(cache: PermutationCache, capsys: Capture) -> None:
    cache.store.path(C).write_text("x")
    record = output(capsys, "cache", "ls")
    states = {row["key"]: row["state"] for row in record["entries"]}
    assert states[A] == states[B] == "model ffffffffffff, 1 groups"
    assert states[C].startswith("damaged: it is not JSON")
    assert record["bytes"] == sum(file.size for file in cache.store.files())
    assert main(["cache", "ls"]) == 0
    text = capsys.readouterr().out
    assert A[:16] in text
    assert "3 entries" in text
    assert cache.store.path(C).exists()


def test_ls_of_no_cache(tmp_path: Path, capsys: Capture) -> None:
    record = output(capsys, "cache", "ls", "--cache", str(tmp_path / "none"))
    assert record["entries"] == []
    assert not (tmp_path / "none").exists()


def test_show(cache: PermutationCache, capsys: Capture) -> None:
    record = output(capsys, "cache", "show", "ab")
    assert record["key"] == B
    assert record["groups"]["ffn"]["perm"] == entry(1).perms["ffn"].tolist()
    assert record["meta"] == {"seed": 1}
    assert main(["cache", "show", A]) == 0
    assert "group ffn: 9 indices, free, [" in capsys.readouterr().out


def test_verify_puts_damage_aside(cache: PermutationCache, capsys: Capture) -> None:
    assert output(capsys, "cache", "verify") == {"sound": 2, "damaged": {}, "left": {}, "stale": 0}
    cache.store.path(B).write_bytes(encode(entry(), A))
    (cache.store.entries / "notes.txt").write_text("mine")
    record = output(capsys, "cache", "verify", status=2)
    assert record["sound"] == 1
    assert set(record["damaged"]) == {B, "notes.txt"}
    assert "another key" in record["damaged"][B]
    assert len(cache.store.quarantined()) == 2
    assert main(["cache", "verify"]) == 0
    assert capsys.readouterr().out == "1 sound entries\n"


def test_verify_says_what_is_wrong(cache: PermutationCache, capsys: Capture) -> None:
    cache.store.path(A).write_text("{}")
    assert main(["cache", "verify"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith(f"damaged {A}: ")
    assert (
        "error ICD-E401: 1 damaged cache entries (the next run decides them again)" in captured.err
    )


@pytest.mark.parametrize(
    ("size", "left"), [((), 2), (("--max-size", "1G"), 2), (("--max-size", "0"), 0)]
)
def test_prune(cache: PermutationCache, capsys: Capture, size: tuple[str, ...], left: int) -> None:
    record = output(capsys, "cache", "prune", *size)
    assert (record["left"], len(record["removed"])) == (left, 2 - left)


def test_prune_to_a_size(cache: PermutationCache, capsys: Capture) -> None:
    size = cache.store.files()[0].size
    record = output(capsys, "cache", "prune", "--max-size", str(size + 9))
    assert record["removed"] == [A]
    assert record["bytes"] <= size + 9


def test_entries_move_between_machines(
    cache: PermutationCache, tmp_path: Path, capsys: Capture
) -> None:
    archive, other = tmp_path / "perms.zip", tmp_path / "other"
    assert output(capsys, "cache", "export", str(archive), "aa", B)["exported"] == [A, B]
    export_entries(cache.store, tmp_path / "again.zip", [A, B])
    assert archive.read_bytes() == (tmp_path / "again.zip").read_bytes()
    record = output(capsys, "cache", "import", str(archive), "--cache", str(other))
    assert record == {"added": [A, B], "kept": []}
    record = output(capsys, "cache", "import", str(archive), "--cache", str(other))
    assert record == {"added": [], "kept": [A, B]}
    found = PermutationCache(other).get(B, anything)
    assert found is not None
    np.testing.assert_array_equal(found.perms["ffn"], entry(1).perms["ffn"])


def test_a_damaged_entry_is_not_exported(
    cache: PermutationCache, tmp_path: Path, capsys: Capture
) -> None:
    cache.store.path(A).write_text("{}")
    record = output(capsys, "cache", "export", str(tmp_path / "x.zip"))
    assert record["exported"] == [B]
    assert set(record["skipped"]) == {A}
    assert main(["cache", "export", str(tmp_path / "y.zip"), A]) == 2
    assert not (tmp_path / "y.zip").exists()


def member(name: str, mode: int = stat.S_IFREG) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (mode | 0o644) << 16
    return info


def pack(path: Path, *members: tuple[zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for info, data in members:
            archive.writestr(info, data)
    return path


@pytest.mark.parametrize(
    "info",
    [
        member(f"../{A}.json"),
        member(f"/{A}.json"),
        member(f"entries/{A}.json"),
        member(f"C:\\{A}.json"),
        member(f"{A}.json/"),
        member(f"{A.upper()}.json"),
        member(f"{A}"),
        member("notes.txt"),
        member(f"{C}.json", stat.S_IFLNK),
        member(f"{C}.json", stat.S_IFIFO),
        member(f"{A}.json"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_with_odd_members_is_refused_whole(
    cache: PermutationCache, tmp_path: Path, info: zipfile.ZipInfo
) -> None:
    path = pack(tmp_path / "x.zip", (member(f"{A}.json"), encode(entry(), A)), (info, b"/etc"))
    fresh = PermutationCache(tmp_path / "fresh")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"in the archive|the archive holds"):
        import_entries(fresh, path)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_encrypted_member_is_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.zip", (member(f"{A}.json"), encode(entry(), A)))
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="no plain file"):
        import_entries(PermutationCache(tmp_path / "fresh"), path)


@pytest.mark.parametrize("limit", ["MAX_ENTRIES", "MAX_ARCHIVE_BYTES", "MAX_ENTRY_BYTES"])
def test_archives_beyond_the_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    bomb = (member(f"{B}.json"), bytes(1 << 20))
    path = pack(tmp_path / "x.zip", (member(f"{A}.json"), encode(entry(), A)), bomb)
    monkeypatch.setattr(cache_archive, limit, 1 if limit == "MAX_ENTRIES" else 1 << 19)
    with pytest.raises(ConfigError, match=r"at most 1|unpacks to more|is of 1048576 bytes"):
        import_entries(PermutationCache(tmp_path / "fresh"), path)


@pytest.mark.parametrize("data", [b"{}", encode(entry(), B), encode(entry(), A)[:-30]])
def test_one_bad_entry_refuses_an_archive(tmp_path: Path, data: bytes) -> None:
    good = (member(f"{C}.json"), encode(entry(), C))
    path = pack(tmp_path / "x.zip", good, (member(f"{A}.json"), data))
    fresh = PermutationCache(tmp_path / "fresh")
    with pytest.raises(PermutationError, match="entry aa0000000000 of the archive"):
        import_entries(fresh, path)
    assert fresh.store.files() == []


def test_an_import_that_cannot_be_stored(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.zip", (member(f"{A}.json"), encode(entry(), A)))
    with pytest.raises(OutputError, match="cannot import"):
        import_entries(PermutationCache(tmp_path / "fresh", max_bytes=10), path)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_damaged_archives(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    cache = PermutationCache(folder / "one")
    cache.put(A, entry())
    export_entries(cache.store, folder / "x.zip")
    content = bytearray((folder / "x.zip").read_bytes())
    place, bit, cut = data.draw(st.tuples(st.integers(0, 5000), st.integers(0, 7), st.booleans()))
    place %= len(content)
    content[place] ^= 1 << bit
    if cut:
        del content[place:]
    (folder / "x.zip").write_bytes(content)
    other = PermutationCache(folder / "other")
    try:
        added = import_entries(other, folder / "x.zip").added
    except IcdError:
        assert other.store.files() == []
        return
    for key in added:
        found = other.get(key, anything)
        assert found is not None
        np.testing.assert_array_equal(found.perms["ffn"], entry().perms["ffn"])


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((), "ICD-E201"),
        (("list",), "ICD-E201"),
        (("show", "a"), "ICD-E201"),
        (("show", ""), "ICD-E201"),
        (("show", "../x"), "ICD-E201"),
        (("prune", "--max-size", "-1"), "ICD-E201"),
        (("prune", "--max-size", "64X"), "ICD-E201"),
        (("prune", "--max-size", "²"), "ICD-E201"),
        (("export", "x.zip", "dd"), "ICD-E201"),
        (("export", "absent/x.zip"), "ICD-E301"),
        (("import", "absent.zip"), "ICD-E201"),
        (("ls", "--cache", "/proc/self/status"), "ICD-E301"),
    ],
)
def test_refusals_of_cache(
    cache: PermutationCache, arguments: tuple[str, ...], code: str, capsys: Capture
) -> None:
    assert main(["cache", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error {code}: ")


def test_a_damaged_entry_is_not_shown(cache: PermutationCache, capsys: Capture) -> None:
    cache.store.path(A).write_text("{}")
    assert main(["cache", "show", A]) == 2
    assert "ICD-E401" in capsys.readouterr().err


# icd solve


@pytest.fixture
def graph_file(tmp_path: Path) -> Path:
    save_w(tmp_path / "W.npz", build_w("mock", n=320, blocks=8, noise=0.0, seed=3), "mock", 3)
    return tmp_path / "W.npz"


@pytest.mark.parametrize("objective", ["C", "Q", "J"])
def test_solve_lowers_the_objective(
    graph_file: Path, tmp_path: Path, objective: str, capsys: Capture
) -> None:
    out = tmp_path / "perm.json"
    budget = ("--time-budget", "20", "--seed", "1", "--objective", objective)
    stats = output(capsys, "solve", str(graph_file), "-o", str(out), *budget)
    order, meta = load_permutation(out)
    graph, _ = load_w(graph_file)
    assert meta == {"graph": {**meta["graph"], "source": "mock", "seed": 3}, "stats": stats}
    assert stats["improved"] is True
    quality = modularity(graph, order, stats["k_blocks"])
    distance = distance_cost(graph, order, 16)
    found = {"C": distance, "Q": quality, "J": combined_cost(distance, quality, None)}[objective]
    assert stats[objective] == pytest.approx(found)


def test_solve_starts_from_an_order(graph_file: Path, tmp_path: Path, capsys: Capture) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    before = output(capsys, "solve", str(graph_file), "-o", str(first), "--time-budget", "20")
    again = ("-o", str(second), "--time-budget", "20", "--start", str(first))
    after = output(capsys, "solve", str(graph_file), *again)
    assert after["J_before"] == pytest.approx(before["J"])
    assert after["J"] <= before["J"] + 1e-12
    assert main(["solve", str(graph_file), "-o", str(second), "--time-budget", "5"]) == 0
    assert capsys.readouterr().out.startswith("objective J: improved\n")


def test_refusals_of_solve(graph_file: Path, tmp_path: Path, capsys: Capture) -> None:
    short, ragged, deep = (tmp_path / f"{name}.json" for name in ("short", "ragged", "deep"))
    save_permutation(short, [1, 0], {})
    record = {"format": "icd/perm/v1", "n": 2, "perm": [[0], [1, 2]], "meta": {}}
    ragged.write_text(json.dumps(record))
    deep.write_text("[" * 100_000)
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, **{n: np.array([{}]) for n in ("data", "indices", "indptr", "meta")})
    good, out = str(graph_file), ("-o", str(tmp_path / "p.json"))
    cases = {
        ("absent.npz", *out): "E201",
        (str(pickled), *out): "E201",
        (str(short), *out): "E201",
        (good,): "E201",
        (good, "-o", str(tmp_path / "absent" / "p.json")): "E301",
        (good, *out, "--objective", "tiles"): "E201",
        (good, *out, "--time-budget", "0"): "E201",
        (good, *out, "--time-budget", "nan"): "E201",
        (good, *out, "--seed", "x"): "E201",
        (good, *out, "--seed", "-1"): "E201",
        (good, *out, "--start", str(short)): "E401",
        (good, *out, "--start", str(ragged)): "E401",
        (good, *out, "--start", str(deep)): "E401",
        (good, *out, "--start", "absent.json"): "E401",
    }
    for arguments, code in cases.items():
        assert main(["solve", *arguments]) == 2, arguments
        assert capsys.readouterr().err.startswith(f"error ICD-{code}: "), arguments
    assert not (tmp_path / "p.json").exists()
