"""The fingerprint reads a machine from its files, says why a field is null, hashes what matters."""

import copy
import json
from pathlib import Path

import pytest

from icd_tvm.measure.environment import (
    environment_hash,
    fingerprint,
    last_level_cache_bytes,
)

CPUINFO = """processor\t: 0
model name\t: Example CPU 9000
flags\t\t: fpu avx2 fma avx512f hypervisor
cpu MHz\t\t: 2500.125
"""


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    def put(path: str, text: str) -> None:
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    cpu = "sys/devices/system/cpu/cpu0"
    put("proc/cpuinfo", CPUINFO)
    put(f"{cpu}/cpufreq/scaling_governor", "performance\n")
    for index, (level, kind, size) in enumerate(
        [(1, "Data", "48K"), (2, "Unified", "1024K"), (3, "Unified", "32M")]
    ):
        put(f"{cpu}/cache/index{index}/level", f"{level}\n")
        put(f"{cpu}/cache/index{index}/type", f"{kind}\n")
        put(f"{cpu}/cache/index{index}/size", f"{size}\n")
        put(f"{cpu}/cache/index{index}/shared_cpu_list", "0-1\n")
    return tmp_path


def test_reads_the_machine(machine: Path) -> None:
    record = fingerprint(machine)
    cpu = record["cpu"]
    assert cpu["model"] == "Example CPU 9000"
    assert cpu["flags"] == ["avx2", "fma", "avx512f"]
    assert cpu["governor"] == "performance"
    assert cpu["mhz"] == 2500.125
    assert [c["bytes"] for c in cpu["caches"]] == [48 << 10, 1 << 20, 32 << 20]
    assert record["container"] == "virtual machine"
    assert last_level_cache_bytes(machine) == 32 << 20


def test_null_fields_have_reasons(tmp_path: Path) -> None:
    record = fingerprint(tmp_path)
    assert record["cpu"]["governor"] is None
    assert record["energy"] is None
    assert {"cpu.governor", "cpu.mhz", "energy"} <= set(record["reasons"])
    assert record["gpu"] is not None or record["reasons"]["gpu"]
    assert last_level_cache_bytes(tmp_path, default=7) == 7


def test_this_machine_fits_json() -> None:
    record = fingerprint()
    assert json.loads(json.dumps(record)) == record
    assert record["packages"]["numpy"]
    assert record["cpu"]["usable_cores"] >= 1


def test_hash_ignores_load_and_clock(machine: Path) -> None:
    record = fingerprint(machine)
    other = copy.deepcopy(record)
    other["load_average"] = [99.0, 99.0, 99.0]
    other["cpu"]["mhz"] = 1.0
    assert environment_hash(other) == record["hash"]
    assert len(record["hash"]) == 16


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [("packages", "numpy", "0.1"), ("threads", "OMP_NUM_THREADS", "64"), ("cpu", "model", "x")],
)
def test_hash_follows_what_matters(machine: Path, part: str, key: str, value: str) -> None:
    record = fingerprint(machine)
    other = copy.deepcopy(record)
    other[part][key] = value
    assert environment_hash(other) != record["hash"]


def test_thread_variables_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "3")
    assert fingerprint()["threads"]["TVM_NUM_THREADS"] == "3"
