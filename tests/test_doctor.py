"""``icd doctor`` tells what is missing and how to enable it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_energy import rapl

from icd_tvm.commands import doctor
from icd_tvm.measure import capabilities as module
from icd_tvm.measure.capabilities import capabilities
from icd_tvm.measure.energy import RaplCounter

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
