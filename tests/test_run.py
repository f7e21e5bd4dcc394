"""``icd run``: states, artifacts, what every failure leads to, and what survives it."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from run_support import not_to_be_called, orders_of, quietly, settings, states
from tiny_model import D, F, tiny_onnx

import icd_tvm
from icd_tvm.cli import main
from icd_tvm.config_file import load_config, make_config
from icd_tvm.core.access_graph import load_w
from icd_tvm.errors import (
    ConfigError,
    ModelFileError,
    OutputError,
    PermutationError,
)
from icd_tvm.measure.latency import StopRule
from icd_tvm.measure.metrics import validate_metrics
from icd_tvm.runtime import orders
from icd_tvm.runtime.events import EventLog, read_events
from icd_tvm.runtime.progress import Stage
from icd_tvm.runtime.run import RunArtifacts, plan, run
from icd_tvm.runtime.run_folder import RunFolder
from icd_tvm.runtime.stages import measure
from icd_tvm.runtime.states import FORWARD, State

STATES = [state.value for state in FORWARD]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_onnx(tmp_path_factory.mktemp("model") / "tiny.onnx")


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunArtifacts:
    return quietly(settings(model), tmp_path_factory.mktemp("runs") / "a" / "finished")


# What a run leaves behind.


def test_artifacts(finished: RunArtifacts) -> None:
    assert finished.failure is None
    assert set(finished.paths) == {
        "W.npz",
        "W_after.npz",
        "config.resolved.yaml",
        "counters.json",
        "environment.json",
        "events.jsonl",
        "measured.npz",
        "metrics.json",
        "module.so",
        "perm.json",
        "report.csv",
        "report.html",
        "tiles.npz",
    }
    validate_metrics(finished.metrics)
    assert finished.metrics["graph_source"] == "tir"
    assert [gate["name"] for gate in finished.gates] == ["latency", "l2", "energy", "quality"]
    assert json.loads(finished.paths["environment.json"].read_text())["packages"]["numpy"]


def test_events(finished: RunArtifacts) -> None:
    events = read_events(finished.paths["events.jsonl"])
    rolled_back = ["ROLLBACK"] if "ROLLBACK" in states(finished.folder) else []
    assert [event["stage"] for event in events] == [*STATES[:-1], *rolled_back, STATES[-1]]
    assert all(set(event) == {"stage", "t_start", "t_end", "ok", "meta"} for event in events)
    ends = [event["t_end"] for event in events]
    assert ends == sorted(ends)
    assert bool(rolled_back) is not finished.metrics["decision"]["accepted"]


def test_permutations(finished: RunArtifacts) -> None:
    content = json.loads(finished.paths["perm.json"].read_text())
    assert set(content["orders"]) == {"before", "after"}
    assert len(content["version"]) == 64
    [hidden] = [d for d in content["orders"]["after"] if d["stats"]["improved"]]
    assert sorted(hidden["perm"]) == list(range(F))


def test_graphs(finished: RunArtifacts) -> None:
    before, about = load_w(finished.paths["W.npz"])
    after, _ = load_w(finished.paths["W_after.npz"])
    # Dense weights touch all alike: such a W has nothing to say and is not stored.
    assert (before.nnz, about["source"]) == (0, "tir")
    assert after.nnz > 0


def test_report(finished: RunArtifacts) -> None:
    rows = list(csv.DictReader(finished.paths["report.csv"].open()))
    arms = {row["name"] for row in rows if row["section"] == "arms"}
    assert arms == set(finished.metrics["arms"])
    assert {"ratios", "groups", "decision", "gates"} <= {row["section"] for row in rows}


def test_conditions_and_overhead(finished: RunArtifacts) -> None:
    found = finished.metrics["conditions"]
    assert found["rounds_asked"] == finished.metrics["arms"]["linear"]["lat_ms"]["n"] == 30
    assert set(found["time_evaluator"]) == set(finished.metrics["arms"])
    assert all(check["n"] == 20 and check["min"] > 0 for check in found["time_evaluator"].values())
    assert set(found["clock"]) == {"before", "after"}
    assert found["threads"]["pinned"] or found["threads"]["reason"]
    assert found["cold_cache_bytes"] == 0
    overhead = finished.metrics["overhead"]
    events = read_events(finished.paths["events.jsonl"])
    assert overhead["run_s"] >= 0.9 * (events[-2]["t_end"] - events[0]["t_start"])
    assert overhead["events_pct"] == pytest.approx(100 * overhead["events_s"] / overhead["run_s"])
    assert 0 < overhead["profiling_s"] < overhead["run_s"]


def test_cold_caches_and_an_early_stop(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    monkeypatch.setattr(StopRule, "met", lambda rule, _: asked.append(rule.half_width) or True)
    keys = {"cold_cache": True, "stop_half_width": 0.25, "pin_threads": False}
    config = settings(model, measure=keys, pipeline={"repeats": 60, "warmup_iter": 0})
    found = quietly(config, tmp_path).metrics
    assert found["conditions"]["cold_cache_bytes"] > 0
    assert asked == [0.25]
    assert found["arms"]["linear"]["lat_ms"]["n"] == 30
    assert found["conditions"]["rounds_asked"] == 60
    assert found["conditions"]["threads"]["pinned"] is False


def test_a_failed_gate_is_an_exit_status(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # No gain reaches 1000 %, whatever the clock says.
    quietly(settings(model, gates={"latency_gain_pct": 1000.0}), tmp_path)
    command = ["run", "--resume", "--quiet", "--out", str(tmp_path)]
    assert main(command) == 0
    assert main([*command, "--fail-on-gate"]) == 3
    assert "gate latency: fail" in capsys.readouterr().err
    assert main([*command, "--fail-on-gate", "energy"]) == 3
    assert "gate energy: not measured" in capsys.readouterr().err
    assert main([*command, "--fail-on-gate", "beauty"]) == 2


def test_module_equals_the_reference(model: Path, tmp_path: Path) -> None:
    from icd_tvm._tvm import relax, tvm

    keys = settings(model, transform={"sparsity": "none"}, measure={"enabled": False})
    module = quietly(keys, tmp_path).paths["module.so"]
    x = np.random.default_rng(0).standard_normal((4, D)).astype(np.float32)
    loaded = tvm.runtime.load_module(str(module))
    found = relax.VirtualMachine(loaded, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(found, session.run(None, {"x": x})[0], rtol=1e-4, atol=1e-5)


def test_resolved_configuration_runs_again(finished: RunArtifacts, model: Path) -> None:
    assert load_config(finished.paths["config.resolved.yaml"]) == make_config(settings(model))


def test_public_names() -> None:
    assert icd_tvm.run is run
    assert icd_tvm.RunArtifacts is RunArtifacts


# Resume, reuse, refuse.


def test_a_finished_run_is_left_alone(finished: RunArtifacts, model: Path) -> None:
    before = finished.paths["events.jsonl"].read_bytes()
    assert quietly(settings(model), finished.folder, resume=True).metrics == finished.metrics
    assert finished.paths["events.jsonl"].read_bytes() == before


def test_a_used_folder_is_refused(finished: RunArtifacts, model: Path) -> None:
    with pytest.raises(OutputError, match="--resume"):
        quietly(settings(model), finished.folder)


def test_another_configuration_is_refused(finished: RunArtifacts, model: Path) -> None:
    with pytest.raises(ConfigError, match=r"pipeline\.repeats: 30 -> 31"):
        quietly(settings(model, pipeline={"repeats": 31}), finished.folder, resume=True)


def test_reused_permutation(
    finished: RunArtifacts, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orders, "_fit", not_to_be_called)
    again = quietly(
        settings(model, measure={"enabled": False}),
        tmp_path / "again",
        reuse_perm=finished.paths["perm.json"],
    )
    assert again.failure is None
    assert orders_of(again.folder) == orders_of(finished.folder)


def test_permutations_of_another_model(finished: RunArtifacts, tmp_path: Path) -> None:
    other = tiny_onnx(tmp_path / "other.onnx", seed=1)
    found = quietly(settings(other), tmp_path / "run", reuse_perm=finished.paths["perm.json"])
    assert found.failure is not None
    assert (found.failure["stage"], found.failure["code"]) == ("READY", PermutationError.code)
    assert "another model" in found.failure["message"]


class _Killed(BaseException):
    """Like a signal: no stage may catch it."""


def _stop_after(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    append = EventLog.append

    def stopping(log: EventLog, stage: Stage) -> None:
        append(log, stage)
        if stage.stage == state.value and stage.ok:
            raise _Killed

    monkeypatch.setattr(EventLog, "append", stopping)


@pytest.mark.parametrize("state", [State.W_BUILT, State.REPERMUTED, State.MEASURED])
def test_resume_after_a_boundary(
    state: State,
    model: Path,
    finished: RunArtifacts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        _stop_after(state, patch)
        with pytest.raises(_Killed):
            quietly(settings(model), tmp_path)
    decided = state in (State.REPERMUTED, State.MEASURED)
    if decided:
        monkeypatch.setattr(orders, "_fit", not_to_be_called)
    if state is State.MEASURED:
        monkeypatch.setattr(measure, "measure_arms", not_to_be_called)
    found = quietly(settings(model), tmp_path, resume=True)
    assert found.failure is None
    assert states(tmp_path)[-1] == "REPORTED"
    assert orders_of(tmp_path) == orders_of(finished.folder)
    assert found.metrics["equivalence"] == finished.metrics["equivalence"]


CHILD = """
import os, signal, sys
from icd_tvm.runtime import run_folder
from icd_tvm.runtime.events import EventLog
from icd_tvm.runtime.run import run
write = run_folder.RunFolder.write_text
def stopping(folder, name, text):
    path = write(folder, name, text)
    if name == "perm.json":
        # What a kill in the middle of a write leaves: a torn line, half a temporary file.
        (folder.root / ".perm.abcdefgh.json").write_text("{")
        with (folder.root / "events.jsonl").open("a") as file:
            file.write('{"stage": "PERMU')
        os.kill(os.getpid(), signal.SIGKILL)
    return path
run_folder.RunFolder.write_text = stopping
run(sys.argv[1], out=sys.argv[2])
"""


def test_sigkill(model: Path, finished: RunArtifacts, tmp_path: Path) -> None:
    config, out = tmp_path / "c.json", tmp_path / "run"
    config.write_text(json.dumps(settings(model, measure={"enabled": False})))
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(config), str(out)], capture_output=True, check=False
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()[-500:]
    assert states(out)[-1] == "W_BUILT"
    found = quietly(load_config(config).model_dump(), out, resume=True)
    assert found.failure is None
    assert orders_of(out) == orders_of(finished.folder)
    assert not [path for path in out.iterdir() if path.name.startswith(".perm")]
    assert not (out / ".owner.json").exists()


def test_a_changed_model_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_onnx(tmp_path / "m.onnx")
    with monkeypatch.context() as patch:
        _stop_after(State.PERMUTED, patch)
        with pytest.raises(_Killed):
            quietly(settings(path), tmp_path / "run")
    kept = (tmp_path / "run" / "perm.json").read_bytes()
    tiny_onnx(path, seed=5)
    with pytest.raises(ConfigError, match="not the one of the earlier run"):
        quietly(settings(path), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "perm.json").read_bytes() == kept


# The lock.


def test_a_folder_in_use_is_refused_with_its_owner(model: Path, tmp_path: Path) -> None:
    with RunFolder(tmp_path), pytest.raises(OutputError) as error:
        RunFolder(tmp_path, wait_s=0.05).__enter__()
    assert f"process {os.getpid()} since 20" in str(error.value)
    with RunFolder(tmp_path, wait_s=0.05):
        pass


def test_folder_that_is_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot write"):
        quietly(settings(model), tmp_path / "file" / "run")


# Plans and pairs.


def test_plan_writes_nothing(model: Path, tmp_path: Path) -> None:
    text = plan(settings(model), out=tmp_path / "run")
    assert "1 free axis group" in text
    assert "unit:0.5" in text
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ModelFileError):
        plan(settings(tmp_path / "absent.onnx"), out=tmp_path / "run")
    with pytest.raises(ConfigError, match="--out"):
        plan(settings(model))


def test_pair_of_a_mock(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.json"
    config.write_text(json.dumps(settings(model, graph={"source": "mock"})))
    assert main(["pair", "-c", str(config), "--out", str(tmp_path / "p"), "--quiet"]) == 0
    assert "W: mock" in capsys.readouterr().out
    found = json.loads((tmp_path / "p" / "pair.json").read_text())
    assert found["ratio"]["median"] > 0
    linear, iterative = (orders_of(tmp_path / "p" / mode) for mode in ("linear", "iterative"))
    assert linear == {"before": iterative["before"]}
    # The planted graph of the transformed model is another one.
    assert iterative["after"] != iterative["before"]
    record = json.loads((tmp_path / "p" / "iterative" / "metrics.json").read_text())
    assert record["equivalence"]["max_rel"] <= 1e-4
    assert all(g["W"] == "mock" for g in record["groups"] if g.get("winner"))
