"""``icd doctor`` tells what is missing and how to enable it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_energy import rapl
from test_ncu import fake_ncu

from icd_tvm.commands import doctor
from icd_tvm.measure import capabilities as module
from icd_tvm.measure.capabilities import capabilities, locked_counters
from icd_tvm.measure.energy import RaplCounter
from icd_tvm.measure.environment import fingerprint

NAMES = {
    "latency",
    "energy, CPU",
    "energy and power, GPU",
    "L2 and DRAM counters, GPU",
    "cache model, CPU",
    "cachegrind",
    "peer",
    "task quality",
    "export of a library",
}


def test_everything_missing_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("ICD_DATA", str(tmp_path / "nothing"))
    monkeypatch.setattr(module, "open_counter", lambda: (None, "no RAPL here"))
    found = {c.name: c for c in capabilities()}
    assert set(found) == NAMES
    hints = {
        "energy, CPU": "no RAPL here",
        "L2 and DRAM counters, GPU": "not installed",
        "cachegrind": "install valgrind",
        "task quality": "ICD_DATA",
        "export of a library": "compiler",
    }
    for name, hint in hints.items():
        assert not found[name].available
        assert hint in found[name].detail
    assert "model" in found["cache model, CPU"].detail
    doctor.run(doctor.parser().parse_args([]))
    assert "no   no RAPL here" in capsys.readouterr().out


def test_available_counters_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rapl(tmp_path, 5)
    monkeypatch.setattr(module, "open_counter", lambda: (RaplCounter(tmp_path), ""))
    monkeypatch.setenv("ICD_DATA", str(tmp_path))
    doctor.run(doctor.parser().parse_args(["--json"]))
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["energy, CPU"] == {"name": "energy, CPU", "available": True, "detail": "RAPL"}
    assert found["task quality"]["detail"] == str(tmp_path)


def test_ncu_without_a_gpu_or_without_permission_counts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_ncu(tmp_path, monkeypatch, "true", "2024.1")
    name = "L2 and DRAM counters, GPU"
    monkeypatch.setattr(module, "_gpu", lambda: (False, "no driver"))
    assert module._ncu() == (False, "no driver")
    monkeypatch.setattr(module, "_gpu", lambda: (True, "NVML"))
    monkeypatch.setattr(module, "locked_counters", lambda: "run as root")
    assert module._CHECKS[name]() == (False, "run as root")
    monkeypatch.setattr(module, "locked_counters", lambda: "")
    assert module._ncu() == (True, f"ncu at {tmp_path / 'ncu'}")


def test_the_driver_says_who_may_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert locked_counters(tmp_path) == ""
    params = tmp_path / "proc/driver/nvidia/params"
    params.parent.mkdir(parents=True)
    params.write_text("ResmanDebugLevel: 1\nRmProfilingAdminOnly: 1\n")
    assert "NVreg_RestrictProfilingToAdminUsers=0" in locked_counters(tmp_path)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert locked_counters(tmp_path) == ""


def test_the_fingerprint_of_a_gpu_holds_its_driver_cuda_and_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        NVML_CLOCK_SM=1,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: b"580.1",
        nvmlSystemGetCudaDriverVersion=lambda: 12080,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: "H200",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=7),
        nvmlDeviceGetMaxClockInfo=lambda handle, kind: 1980,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    expected = {"name": "H200", "memory_bytes": 7, "driver": "580.1", "cuda": "12.8"}
    assert fingerprint()["gpu"] == [{**expected, "max_sm_mhz": 1980}]
