"""What a system does to a run: refused writes, full disks, clocks that are set, late failures."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from run_support import orders_of, quietly, settings, states
from tiny_model import tiny_onnx

from icd_tvm.cli import main
from icd_tvm.config_file import make_config, to_yaml
from icd_tvm.errors import MeasurementError, OutputError
from icd_tvm.runtime import retry
from icd_tvm.runtime.events import EventLog, read_events
from icd_tvm.runtime.progress import Stage
from icd_tvm.runtime.stages import measure, transform
from icd_tvm.runtime.states import State

NOBODY = 65534
UNTIMED = {"measure": {"enabled": False}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_onnx(tmp_path_factory.mktemp("model") / "tiny.onnx")


class _Killed(BaseException):
    """Stands for SIGKILL."""


def stop_after(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    append = EventLog.append

    def stopping(log: EventLog, stage: Stage) -> None:
        append(log, stage)
        if stage.stage == state:
            raise _Killed

    monkeypatch.setattr(EventLog, "append", stopping)


# A directory that may not be written.


def as_nobody(arguments: list[str], errors: Path) -> int:
    """Return the exit status of a command of a user without rights; stderr goes to a file."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        status = main(arguments)
        sys.stderr.flush()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that other users reach, which those of pytest are not."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_a_read_only_directory(shared: Path) -> None:
    config, out, errors = shared / "c.yaml", shared / "runs" / "a", shared / "stderr"
    keys = settings(tiny_onnx(shared / "tiny.onnx"), **UNTIMED)
    config.write_text(to_yaml(make_config(keys)))
    before = quietly(keys, out)
    content = {name: path.read_bytes() for name, path in before.paths.items()}
    for command in (
        ["run", "-c", str(config), "--out", str(shared / "runs" / "new"), "--quiet"],
        ["run", "-c", str(config), "--out", str(shared / "runs" / "new"), "--dry-run"],
        ["run", "--resume", "--out", str(out), "--quiet"],
        ["report", str(out)],
    ):
        assert as_nobody(command, errors) == 2
        (line,) = errors.read_text().splitlines()
        assert line.startswith(f"error {OutputError.code}: "), command
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name in content} == (
        content
    )
    assert not (shared / "runs" / "new").exists()


def test_a_full_disk_and_more_room(model: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a tmpfs")
    try:
        with pytest.raises(OutputError, match="No space left on device"):
            quietly(settings(model), disk / "run")
        reached, kept = states(disk / "run"), orders_of(disk / "run")
        assert reached[-1] == "REPERMUTED"
        subprocess.run(["mount", "-o", "remount,size=32m", str(disk)], check=True)
        found = quietly(settings(model), disk / "run", resume=True)
        assert found.failure is None
        assert orders_of(disk / "run") == kept
        assert states(disk / "run")[-1] == "REPORTED"
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# A clock that is set back.


def test_a_clock_that_runs_backwards(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = settings(model, cache={"enabled": True, "dir": str(tmp_path / "cache")}, **UNTIMED)
    began, jumps = time.time(), itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: began - 3600.0 * next(jumps))
        found = quietly(keys, tmp_path / "run")
    assert found.failure is None
    events = read_events(tmp_path / "run" / "events.jsonl")
    assert all(0 <= event["t_end"] - event["t_start"] < 600 for event in events)
    assert found.metrics["overhead"]["run_s"] > 0
    quietly(keys, tmp_path / "again")
    events = read_events(tmp_path / "again" / "events.jsonl")
    assert "cache" in {event["meta"].get("from") for event in events}
    assert orders_of(tmp_path / "again") == orders_of(tmp_path / "run")


# Failures of one process of a run only.


@pytest.mark.parametrize("fails_first", [False, True])
def test_a_transform_that_fails_in_one_process_only(
    fails_first: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was decided and timed with it does not stand for what is made without it."""

    def failing(*arguments: Any) -> Any:
        raise RuntimeError("no data today")

    def process(fails: bool, act: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            if fails:
                patch.setattr(transform, "calibrate", failing)
            return act()

    def killed() -> None:
        with monkeypatch.context() as patch, pytest.raises(_Killed):
            stop_after(State.MEASURED, patch)
            quietly(settings(model), tmp_path)

    process(fails_first, killed)
    samples = (tmp_path / "measured.npz").read_bytes()
    found = process(not fails_first, lambda: quietly(settings(model), tmp_path, resume=True))
    assert found.failure is None
    flags = [flag["reason"] for flag in found.metrics["flags"]]
    assert any("ordered and measured again" in text for text in flags)
    assert (tmp_path / "measured.npz").read_bytes() != samples
    left_out = "why" in found.metrics["transform"]["sparsity"]
    assert left_out is not fails_first
    assert found.metrics["decision"]["reason"].startswith("no opportunity") is left_out
    assert any(group.get("improved") for group in found.metrics["groups"]) is not left_out


def test_a_measurement_that_works_the_third_time(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries, waits = itertools.count(1), []
    real = measure.measure_arms

    def failing(*arguments: Any) -> Any:
        if next(tries) < 3:
            raise MeasurementError("the clock stood still")
        return real(*arguments)

    monkeypatch.setattr(measure, "measure_arms", failing)
    monkeypatch.setattr(retry.time, "sleep", waits.append)
    found = quietly(settings(model, measure={"energy": False}), tmp_path)
    assert found.failure is None
    assert waits == list(measure.PAUSES_S) == sorted(waits)
    assert found.metrics["flags"] == []
    assert found.metrics["arms"]["linear"]["lat_ms"]["median"] > 0
