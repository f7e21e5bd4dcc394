"""What every failure of a run leads to: as the error model says, and REPORTED in any case."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_support import not_to_be_called, orders_of, quietly, settings, states
from tiny_model import tiny_onnx

import icd_tvm
from icd_tvm.cli import main
from icd_tvm.config_file import make_config
from icd_tvm.core.mock_graph import mock_w
from icd_tvm.core.solver import fit_permutation
from icd_tvm.errors import IcdError, MeasurementError, ModelFileError, OutputError
from icd_tvm.measure.metrics import validate_metrics
from icd_tvm.relax_passes.decide_permutation import Decision
from icd_tvm.runtime import orders, retry
from icd_tvm.runtime.access_graphs import AccessGraphs
from icd_tvm.runtime.job import Job
from icd_tvm.runtime.progress import Progress
from icd_tvm.runtime.stages import measure, repermute, report, transform


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_onnx(tmp_path_factory.mktemp("model") / "tiny.onnx")


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PAUSES_S", (0.0, 0.0))


def _failing(*arguments: Any, **keywords: Any) -> Any:
    raise RuntimeError("boom")


def test_a_failure_rolls_back_and_is_reported(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(repermute, "verify", _failing)
        found = quietly(settings(model), tmp_path)
    assert found.failure == {
        "stage": "REPERMUTED",
        "code": IcdError.code,
        "message": "RuntimeError: boom",
        "traceback": "traceback.txt",
    }
    assert states(tmp_path)[-2:] == ["ROLLBACK", "REPORTED"]
    assert "boom" in found.paths["traceback.txt"].read_text()
    validate_metrics(found.metrics)
    assert found.metrics["decision"]["arm"] == "linear"
    assert found.paths["module.so"].stat().st_size > 0
    again = quietly(settings(model), tmp_path, resume=True)
    assert again.failure is None
    assert "traceback.txt" not in again.paths


def test_a_failure_before_the_transform_keeps_the_model(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orders, "_fit", _failing)
    found = quietly(settings(model), tmp_path)
    assert found.failure is not None
    assert found.failure["stage"] == "PERMUTED"
    assert found.metrics["decision"]["arm"] == "dense"
    assert "module.so" in found.paths


def test_a_refused_model_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.json"
    config.write_text(json.dumps(settings(tmp_path / "absent.onnx")))
    assert main(["run", "-c", str(config), "--out", str(tmp_path / "run"), "--quiet"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error {ModelFileError.code}: ")
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    validate_metrics(record)
    assert record["failure"]["stage"] == "READY"


def killed(*arguments: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_solver_keeps_the_order(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(orders, "_fit", killed)
        found = quietly(settings(model, measure={"enabled": False}), tmp_path / "a")
    assert found.failure is None
    flags = [flag["reason"] for flag in found.metrics["flags"]]
    assert [text.split(": ")[0] for text in flags] == [
        f"the solver failed {when} the transform" for when in ("before", "after")
    ]
    assert all("SIGKILL" in text for text in flags)
    assert found.metrics["decision"]["arm"] == "linear"
    assert "not decided" in found.metrics["decision"]["reason"]
    # Nothing was decided, so nothing is taken for a decision later.
    assert "perm.json" not in found.paths


def test_a_solver_without_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is the system's, in the child that solves."""
    graph = mock_w(256, 4, 0.05, 0.1, 0)

    def fit(*arguments: Any) -> Any:
        # More than any heap has at hand: a small graph might fit in what this process freed.
        assert np.ones(256 << 20, np.uint8).all()
        perm, stats = fit_permutation(graph, time_budget_s=20.0, refine_steps=20)
        return [Decision("large", perm, stats.to_dict(), graph.nnz)]

    def asked(megabytes: int | None) -> tuple[Any, list[str]]:
        config = make_config(settings(model, solver={"memory_mb": megabytes}))
        job = Job(config, None, [], Progress(quiet=True))
        job.graphs["before"] = AccessGraphs("mock", None, {})
        return orders.decided(job, "before", None), [flag.reason for flag in job.flags]

    monkeypatch.setattr(orders, "_fit", fit)
    (decisions, how), flags = asked(1)
    assert (decisions, how) == ([], orders.NOTHING)
    assert flags[0].endswith("it ran out of memory; the order stays")
    limited, free = asked(2048), asked(None)
    assert limited[0][0][0].improved
    assert limited[0][0][0].perm.tolist() == free[0][0][0].perm.tolist()
    assert limited[1] == free[1] == []


def test_without_a_second_order_the_first_one_stays(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"measure": {"enabled": False}, "graph": {"source": "mock"}}
    real = orders.access_graphs

    def graphs(job: Any, when: str, mod: Any) -> Any:
        if when == "after":
            monkeypatch.setattr(orders, "_fit", killed)
        return real(job, when, mod)

    monkeypatch.setattr(orders, "access_graphs", graphs)
    found = quietly(settings(model, **keys), tmp_path)
    assert found.failure is None
    assert [flag["stage"] for flag in found.metrics["flags"]] == ["order"]
    assert "first order stays" in found.metrics["decision"]["reason"]
    assert set(orders_of(tmp_path)) == {"before"}
    monkeypatch.undo()
    again = quietly(settings(model, **keys), tmp_path, resume=True)
    assert again.failure is None


def test_failing_transform_is_left_out(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transform, "calibrate", _failing)
    found = quietly(settings(model, measure={"enabled": False}), tmp_path)
    assert found.failure is None
    assert found.metrics["transform"]["sparsity"]["why"] == "boom"
    assert "left out: boom" in found.metrics["flags"][0]["reason"]
    assert found.metrics["decision"]["accepted"] is False


@pytest.mark.parametrize("broken", ["peer", "all"])
def test_failing_measurement(
    broken: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[list[str]] = []
    real = measure.measure_arms

    def failing(callers: Any, proto: Any, feeds: Any, config: Any, peers: list[str]) -> Any:
        tries.append(list(peers))
        if broken == "all" or peers:
            raise MeasurementError("no clock")
        return real(callers, proto, feeds, config, peers)

    monkeypatch.setattr(measure, "measure_arms", failing)
    found = quietly(settings(model, measure={"peer": "onnxruntime"}), tmp_path)
    assert found.failure is None
    assert tries[:4] == [["onnxruntime"]] * 3 + [[]]
    assert "no clock" in found.metrics["flags"][0]["reason"]
    if broken == "all":
        assert (len(tries), found.metrics["arms"]) == (6, {})
        assert found.metrics["decision"]["accepted"] is None
        assert "no clock" in found.metrics["not_measured"]["lat_ms"]
    else:
        assert set(found.metrics["arms"]) >= {"linear", "iterative"}


def test_only_the_failing_peer_is_left_out(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ICD_PYTHON_OPENVINO", str(tmp_path / "no-python"))
    peers = {"peer": "openvino,onnxruntime"}
    found = quietly(settings(model, measure=peers), tmp_path / "run")
    assert "onnxruntime" in found.metrics["arms"]
    assert list(found.metrics["peers"]) == ["onnxruntime"]
    (flag,) = [f["reason"] for f in found.metrics["flags"] if f["stage"] == "measure"]
    assert flag.startswith("peer openvino could not be timed")


def test_unequal_outputs_are_rolled_back(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = repermute.ordered_arms

    def corrupting(transformed: Any, *rest: Any) -> Any:
        arms = real(transformed, *rest)
        arms["iterative"].mod = icd_tvm.import_onnx(str(model)).mod
        return arms

    monkeypatch.setattr(repermute, "ordered_arms", corrupting)
    found = quietly(settings(model), tmp_path)
    assert found.failure is None
    assert found.metrics["decision"]["arm"] == "linear"
    assert "outputs differ" in found.metrics["decision"]["reason"]
    assert "ROLLBACK" in states(tmp_path)


def test_a_full_disk_loses_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> Any:
        raise OutputError("cannot write: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(report, "write_metrics", full)
        with pytest.raises(OutputError, match="No space"):
            quietly(settings(model), tmp_path)
    kept = orders_of(tmp_path)
    monkeypatch.setattr(orders, "_fit", not_to_be_called)
    monkeypatch.setattr(measure, "measure_arms", not_to_be_called)
    found = quietly(settings(model), tmp_path, resume=True)
    assert found.failure is None
    assert orders_of(tmp_path) == kept


def test_retries_wait_longer_and_give_up() -> None:
    heard: list[str] = []
    with pytest.raises(ValueError, match="no"):
        retry.retried(lambda: int("no"), ValueError, heard.append, (0.0, 0.001))
    assert len(heard) == 2
    with pytest.raises(ValueError):
        retry.retried(lambda: int("no"), KeyError, heard.append, (0.0,))
    assert len(heard) == 2
