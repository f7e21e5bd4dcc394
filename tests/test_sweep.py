"""Sweeps: every point checked first, each a run of its own, failures kept, resumable."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import tiny_onnx

from icd_tvm.cli import main
from icd_tvm.errors import ConfigError, IcdError, MissingDependencyError, OutputError
from icd_tvm.runtime import sweep as sweeping
from icd_tvm.runtime.machine_lock import lock_path, machine_lock
from icd_tvm.runtime.sweep import Task, run_point, sweep
from icd_tvm.runtime.sweep_grid import MAX_POINTS, Point, read_sweep
from icd_tvm.runtime.sweep_table import as_csv

ROOT = Path(__file__).parents[1]


def base(model: Path | str = "tiny.onnx", **more: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(model)},
        "pipeline": {"repeats": 30, "warmup_iter": 1},
        "transform": {"sparsity": "unit:0.5"},
        "cache": {"enabled": False},
        "threads": 1,
        **more,
    }


def written(folder: Path, grid: Any, **content: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(json.dumps({"base": base(), "grid": grid, **content}))
    return path


def points(folder: Path, grid: Any, **content: Any) -> list[Point]:
    return read_sweep(written(folder, grid, **content))


# The grid.


def test_the_last_key_varies_fastest(tmp_path: Path) -> None:
    grid = {"transform.sparsity": ["unit:0.25", "2:4"], "seed": [0, 7]}
    found = points(tmp_path, grid)
    assert [(p.config.transform.sparsity, p.config.seed) for p in found] == [
        ("unit:0.25", 0),
        ("unit:0.25", 7),
        ("2:4", 0),
        ("2:4", 7),
    ]
    assert [p.keys["seed"] for p in found] == [0, 7, 0, 7]
    assert len({p.name for p in found}) == 4
    assert found[0].name.startswith("sparsity-unit-0.25_seed-0-")


def test_values_may_be_maps_and_parts_of_keys(tmp_path: Path) -> None:
    content = base(transform={"sparsity": {"type": "unit", "rate": 0.5}})
    grid = {"transform.sparsity.rate": [0.25], "model.shapes": [{"x": [1, 64]}, {"x": [1, 128]}]}
    found = points(tmp_path, grid, base=content)
    assert [p.config.model.shapes["x"][1] for p in found] == [64, 128]
    assert found[0].config.transform.sparsity == "unit:0.25"


def test_a_name_stands_for_the_whole_configuration(tmp_path: Path) -> None:
    [first] = points(tmp_path, {"seed": [1]})
    [again] = points(tmp_path, {"seed": [1]}, base=base(report={"out_dir": "elsewhere"}))
    [other] = points(tmp_path, {"seed": [1]}, base=base(threads=2))
    assert first.name == again.name != other.name
    assert first.config.report.out_dir is None


def test_overrides_lose_against_the_grid(tmp_path: Path) -> None:
    path = written(tmp_path, {"seed": [1]})
    [point] = read_sweep(path, ["seed=5", "pipeline.repeats=40"])
    assert (point.config.seed, point.config.pipeline.repeats) == (1, 40)


def test_the_example(tmp_path: Path) -> None:
    assert len(read_sweep(ROOT / "configs" / "sweeps" / "rates.yaml")) == 12


@pytest.mark.parametrize(
    ("grid", "content", "text"),
    [
        ({"transform.sparsty": ["2:4"]}, {}, "point .*unknown key .*mean transform.sparsity"),
        ({"seed": [0, "a"]}, {}, "point seed='a': bad value: seed 'a'"),
        ({"seed": [0, 0]}, {}, "seed: a value stands twice"),
        ({"seed": 0}, {}, "write a list"),
        ({"seed": []}, {}, "write a list"),
        ({}, {}, "bad value: grid"),
        ([1], {}, "bad value: grid"),
        ({"seed": list(range(MAX_POINTS + 1))}, {}, "more than 10000 points"),
        ({"report.out_dir": ["a"]}, {}, "give --out"),
        ({"transform": [{}], "transform.kv": ["none"]}, {}, "transform.kv is part of transform"),
        ({"a..b": [1]}, {}, "grid a..b is no key"),
        ({"seed=1 #": [1]}, {}, "grid seed=1 # is no key"),
        ({"pipeline.fixed_clock": [False, True], "seed": [1]}, {"bse": 1}, "did you mean base"),
        ({"seed": [1]}, {"zzz": 1}, "known: base, grid"),
        ({"seed": [1]}, {"base": 3}, "bad value: base 3"),
        ({"seed": [1]}, {"base": "absent.yaml"}, "cannot read .*absent.yaml"),
        (
            {"transform.sparsity": ["unit:0.5", {"type": "unit", "rate": 0.5}]},
            {},
            "are the same configuration",
        ),
    ],
)
def test_refused_sweeps(tmp_path: Path, grid: Any, content: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        points(tmp_path, grid, **content)


def test_a_missing_part(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("grid: {seed: [1]}")
    with pytest.raises(ConfigError, match="base is missing"):
        read_sweep(tmp_path / "a.yaml")


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["seed", "threads", "solver.refine_steps", "pipeline.repeats"]),
        st.lists(st.integers(30, 4000), min_size=1, max_size=3, unique=True),
        min_size=1,
    )
)
def test_every_combination_is_a_point(
    tmp_path_factory: pytest.TempPathFactory, grid: dict[str, list[int]]
) -> None:
    found = points(tmp_path_factory.mktemp("grid"), grid)
    wanted = 1
    for values in grid.values():
        wanted *= len(values)
    assert len({p.name for p in found}) == len(found) == wanted
    for point in found:
        dumped = point.config.model_dump()
        for key, value in point.keys.items():
            section, _, name = key.rpartition(".")
            assert (dumped[section] if section else dumped)[name] == value


# Running it.


def test_failed_points_are_kept_and_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, late = tiny_onnx(tmp_path / "tiny.onnx"), tmp_path / "late.onnx"
    path = written(tmp_path, {"model.path": [str(model), str(late)]})
    out = tmp_path / "out"
    command = ["sweep", "-c", str(path), "--out", str(out)]
    assert main([*command, "--json"]) == 2
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((out / "sweep.json").read_text())
    assert record["counts"] == {"done": 1, "failed": 1, "pending": 0}
    good, bad = record["points"]
    assert set(good["lat_ms"]) == {"dense", "identity", "random", "linear", "iterative"}
    assert set(good["ratios"]["iterative/linear"]) == {"median", "lo", "hi"}
    assert set(good["gates"]) == {"latency", "l2", "energy", "quality"}
    assert good["quality"] is None
    assert good["not_measured"]["quality"]
    assert "ICD-E101" in bad["reason"]
    assert "late.onnx" in bad["reason"]

    assert main(command) == 2
    assert "--resume continues it" in capsys.readouterr().err

    tiny_onnx(late)
    events = out / "runs" / good["point"] / "events.jsonl"
    before = events.read_bytes()
    assert main([*command, "--resume"]) == 0
    shown = capsys.readouterr()
    assert f"{good['point']}: finished before" in shown.err
    assert shown.out.count(" done ") == 2
    assert events.read_bytes() == before
    rows = list(csv.DictReader((out / "sweep.csv").open()))
    assert [row["status"] for row in rows] == ["done", "done"]
    assert [row["model.path"] for row in rows] == [str(model), str(late)]
    assert float(rows[0]["lat_ms.dense"]) == good["lat_ms"]["dense"]
    assert rows[1]["ratios.iterative/linear.median"]


def test_all_points_are_checked_before_the_first_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "run_point", lambda task: pytest.fail("a point ran"))
    found = points(tmp_path, {"target": ["host", "z80"]})
    with pytest.raises(IcdError, match=r"point target-z80-.*: unknown CPU target"):
        sweep(found, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_sweep_says_what_is_pending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def run_two(task: Task) -> str:
        ran.append(task.name)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return "no such luck"

    monkeypatch.setattr(sweeping, "run_point", run_two)
    with pytest.raises(KeyboardInterrupt):
        sweep(points(tmp_path, {"seed": [0, 1, 2]}), tmp_path / "out", tell=lambda _: None)
    record = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [p["status"] for p in record["points"]] == ["failed", "pending", "pending"]
    assert record["points"][0]["reason"] == "no such luck"


def test_a_sweep_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = points(tmp_path, {"seed": [0]})

    def inside(task: Task) -> str:
        with pytest.raises(OutputError, match="is in use"):
            sweep(found, tmp_path / "out", resume=True)
        return ""

    monkeypatch.setattr(sweeping, "run_point", inside)
    record = sweep(found, tmp_path / "out", tell=lambda _: None)
    assert record["points"][0]["reason"] == "left no sound metrics.json"


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, {"seed": [0, 1]})
    assert main(["sweep", "-c", str(path), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert not (tmp_path / "out").exists()


def test_only_local_timing_is_exclusive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, bool] = {}
    monkeypatch.setattr(sweeping, "run_point", lambda task: seen.update({task.name: task.timed}))
    measures = [{}, {"enabled": False}, {"rpc": "tracker:9190", "rpc_key": "a"}]
    found = points(tmp_path, {"measure": measures})
    sweep(found, tmp_path / "out", tell=lambda _: None)
    assert [seen[point.name] for point in found] == [True, False, False]


def _task(tmp_path: Path) -> Task:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(base()))
    return Task("a", str(tmp_path / "a.yaml"), str(tmp_path / "run"), str(tmp_path), True)


def test_a_killed_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = tmp_path / "python"
    shell.write_text("#!/bin/sh\nkill -9 $$\n")
    shell.chmod(0o755)
    monkeypatch.setattr(sweeping.sys, "executable", str(shell))
    assert run_point(_task(tmp_path)) == "killed by signal 9: Killed"


def test_a_point_that_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping.sys, "executable", str(tmp_path / "absent"))
    assert "cannot start on" in run_point(_task(tmp_path))


def test_a_worker_that_does_not_see_the_folder(tmp_path: Path) -> None:
    task = Task("a", str(tmp_path / "absent.yaml"), "run", str(tmp_path), False)
    assert "share the folder" in run_point(task)


def test_csv_has_a_column_for_every_figure() -> None:
    rows = [
        {"point": "a", "keys": {"seed": 0}, "status": "failed"},
        {"point": "b", "keys": {"seed": 1}, "status": "done", "lat_ms": {"dense": 2.5}},
    ]
    assert as_csv(rows) == "point,seed,status,lat_ms.dense\na,0,failed,\nb,1,done,2.5\n"


# One timed run on a machine.


def _tries(exclusive: bool) -> tuple[threading.Thread, threading.Event]:
    got = threading.Event()

    def work() -> None:
        with machine_lock(exclusive):
            got.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread, got


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True)])
def test_a_timed_run_is_alone(first: bool, second: bool) -> None:
    with machine_lock(first):
        thread, got = _tries(second)
        assert not got.wait(0.1)
    thread.join(30)
    assert got.is_set()


def test_runs_that_do_not_time_share() -> None:
    with machine_lock(False):
        thread, got = _tries(False)
        thread.join(30)
        assert got.is_set()


def test_a_child_keeps_the_lock_of_a_killed_parent() -> None:
    with machine_lock(True) as lock:
        child = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock]
        )
    thread, got = _tries(True)
    assert not got.wait(0.1)
    child.communicate(b"\n", timeout=30)
    thread.join(30)
    assert got.is_set()


def test_a_lock_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICD_CACHE_DIR", str(tmp_path))
    lock_path().mkdir()
    with pytest.raises(OutputError, match="cannot lock"), machine_lock(True):
        pytest.fail("locked")


# Dask.


@contextmanager
def cluster(workers: int) -> Iterator[str]:
    distributed = pytest.importorskip("distributed", reason="pip install icd-tvm[sweep]")
    local = distributed.LocalCluster(
        n_workers=workers,
        threads_per_worker=2,
        processes=False,
        protocol="tcp://",
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
    )
    with local:
        yield local.scheduler_address


def test_on_dask(tmp_path: Path) -> None:
    tiny = tiny_onnx(tmp_path / "tiny.onnx")
    keys = base(tiny, measure={"enabled": False})
    found = points(tmp_path, {"model.path": [str(tiny), "absent.onnx"]}, base=keys)
    with cluster(1) as address:
        record = sweep(found, tmp_path / "out", scheduler=address, tell=lambda _: None)
    assert [p["status"] for p in record["points"]] == ["done", "failed"]
    assert "absent.onnx" in record["points"][1]["reason"]


def test_a_lost_worker_fails_its_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(task: Task) -> str:
        raise RuntimeError("the worker died")

    monkeypatch.setattr(sweeping, "run_point", lost)
    found = points(tmp_path, {"seed": [0]})
    with cluster(1) as address:
        record = sweep(found, tmp_path / "out", scheduler=address, tell=lambda _: None)
    assert record["points"][0]["reason"] == "Dask: the worker died"


def test_a_scheduler_without_workers(tmp_path: Path) -> None:
    found = points(tmp_path, {"seed": [0]})
    with cluster(0) as address, pytest.raises(ConfigError, match="has no worker"):
        sweep(found, tmp_path / "out", scheduler=address)


def test_no_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed", reason="pip install icd-tvm[sweep]")
    monkeypatch.setattr(sweeping, "CONNECT_S", 0.2)
    with pytest.raises(ConfigError, match=r"no Dask scheduler answers at 'tcp:"):
        sweep(points(tmp_path, {"seed": [0]}), tmp_path / "out", scheduler="tcp://127.0.0.1:1")


def test_without_distributed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingDependencyError, match=r"icd-tvm\[sweep\]"):
        sweep(points(tmp_path, {"seed": [0]}), tmp_path / "out", scheduler="tcp://a:1")
