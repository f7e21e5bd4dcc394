"""Counters of a run: energy from a stand-in counter, caches as a model, reasons for the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icd_tvm._tvm import named_const, relax
from icd_tvm.config import MeasureKeys
from icd_tvm.errors import MeasurementError
from icd_tvm.measure.cache_model import model_caches
from icd_tvm.measure.cache_sim import CacheLevel
from icd_tvm.measure.energy import EnergyRecord
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.inputs import random_inputs
from icd_tvm.models.registry import build as build_model
from icd_tvm.relax_passes.axis_groups import find_axis_groups
from icd_tvm.runtime import counters as module
from icd_tvm.runtime.build import build
from icd_tvm.runtime.counters import Counters, count, read_counters
from icd_tvm.runtime.options import CompileOptions
from icd_tvm.runtime.run import run
from icd_tvm.tir_schedules.target import parse_target

V3 = parse_target("x86-64-v3", 1)


@pytest.fixture(scope="module")
def arms() -> Any:
    imported = import_onnx(build_model("bert-mini-random"))
    built = build(imported.mod, V3)
    return {"dense": built, "random": built, "linear": built}, random_inputs(imported, 0)


NOTHING = MeasureKeys(energy=False, kernel_times=False, roofline=False)


def test_nothing_asked_for_is_nothing_counted(arms: Any) -> None:
    found = count(*arms, NOTHING, V3)
    assert (found.energy, found.caches, found.kernels, found.roof) == ({}, {}, {}, {})
    assert set(found.reasons) == {
        "ept_j_per_tok",
        "cache_model",
        "kernel_times",
        "roofline",
        "flop",
    }
    assert found.work == {}
    assert all("not asked for" in reason for reason in found.reasons.values())


def test_caches_are_modelled_for_the_arms_that_are_compared(
    arms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "open_counter", lambda: (None, "no RAPL here"))
    found = count(*arms, MeasureKeys(cache_model=True), V3)
    assert set(found.caches) == {"dense", "linear"}
    assert found.caches["dense"] == found.caches["linear"]
    assert found.caches["dense"]["source"] == "model"
    assert found.reasons == {"ept_j_per_tok": "no RAPL here"}
    nodes = [kernel["node"] for kernel in found.caches["dense"]["kernels"] if kernel["kernel"]]
    assert nodes == [kernel["node"] for kernel in found.kernels["dense"]["kernels"]]


def test_every_kernel_is_timed_counted_and_belongs_somewhere(arms: Any) -> None:
    built, feeds = arms
    groups = find_axis_groups(import_onnx(build_model("bert-mini-random")).mod["main"])
    found = count(built, feeds, NOTHING.model_copy(update={"kernel_times": True}), V3, groups)
    assert set(found.work) == {"dense", "random", "linear"}
    assert set(found.kernels) == {"dense", "linear"}
    record, work = found.kernels["dense"], found.work["dense"]
    assert work["flop"] == sum(kernel["flop"] for kernel in record["kernels"])
    assert found.work["random"] == work
    assert record["source"].startswith("measured in a profiled run of its own")
    assert min(kernel["us_min"] for kernel in record["kernels"]) > 0
    first = "encoder.layer.0.intermediate.dense.weight"
    [kernel] = [kernel for kernel in record["kernels"] if first in kernel["weights"]]
    # 16 tokens, 64 -> 256; bias and GELU on top.
    assert kernel["flop"] > 2 * 16 * 64 * 256
    assert kernel["groups"] == ["/encoder/layer.0/intermediate/dense/MatMul:2"]
    attention = next(k for k in record["kernels"] if k["kernel"].startswith("attention"))
    assert attention["flop"] > 2 * 2 * 16 * 16 * 64
    assert attention["weights"] == []
    assert len(attention["groups"]) == 2
    # All weights but the tables that are looked up, the inputs and the output.
    assert 4 * 2 * (4 * 64 * 64 + 2 * 64 * 256) < work["bytes"] < 4 * 2 * 60_000


def test_an_arm_that_runs_other_kernels_is_not_timed(
    arms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(*_: Any) -> Any:
        raise MeasurementError("the machine ran 3 kernels, not the 4 of the module")

    monkeypatch.setattr(module, "kernel_record", other)
    found = count(*arms, NOTHING.model_copy(update={"kernel_times": True}), V3)
    assert found.kernels == {}
    assert found.reasons["kernel_times"].startswith("linear: the machine ran")


def test_energy_comes_from_the_counter_or_with_the_reason(
    arms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "open_counter", lambda: (object(), ""))
    record = EnergyRecord("rapl", 0.5, None, 30.0, 1.0)
    monkeypatch.setattr(module, "measure_energy", lambda callers, _: dict.fromkeys(callers, record))
    found = count(*arms, MeasureKeys(), V3)
    assert found.energy["linear"]["joules_per_call"] == 0.5
    assert set(found.energy) == {"dense", "linear"}

    def stalled(*_: Any) -> Any:
        raise MeasurementError("the rapl counter stood still")

    monkeypatch.setattr(module, "measure_energy", stalled)
    assert "stood still" in count(*arms, MeasureKeys(), V3).reasons["ept_j_per_tok"]


def test_counters_survive_a_file_and_a_damaged_one_is_none(tmp_path: Path) -> None:
    path = tmp_path / "counters.json"
    kept = Counters({"dense": {"joules_per_call": 1.0}}, {}, {"cache_model": "why"})
    path.write_text(json.dumps(kept.as_json()))
    assert read_counters(path) == kept
    for text in ("{", "[]", '{"else": 1}'):
        path.write_text(text)
        assert "counters.json" in read_counters(path).reasons["ept_j_per_tok"]


def test_a_run_records_energy_per_token_its_gate_and_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joules = {"dense": 4.0, "linear": 2.0, "iterative": 1.0}

    def measured(callers: Any, _: Any) -> Any:
        return {name: EnergyRecord("rapl", joules[name], None, 30.0, 1.0) for name in callers}

    monkeypatch.setattr(module, "open_counter", lambda: (object(), ""))
    monkeypatch.setattr(module, "measure_energy", measured)
    config = {
        "model": {"name": "bert-mini-random"},
        "transform": {"sparsity": "unit:0.5"},
        "pipeline": {"repeats": 30, "warmup_iter": 2},
        "measure": {"cache_model": True},
        "target": "x86-64-v3",
        "threads": 1,
    }
    artifacts = run(config, out=tmp_path / "run")
    arms = artifacts.metrics["arms"]
    assert arms["iterative"]["ept_j_per_tok"] == 1.0 / 16
    assert arms["iterative"]["source"]["ept_j_per_tok"] == "measured"
    assert "iterative only" in artifacts.metrics["not_measured"]["ept_j_per_tok"]
    assert arms["linear"]["cache_model"]["source"] == "model"
    gate = next(gate for gate in artifacts.gates if gate["name"] == "energy")
    assert (gate["status"], gate["value"]) == ("pass", 50.0)
    missing = artifacts.metrics["not_measured"]
    assert "the target is a CPU" in missing["l2_hit_pct"]
    assert "the target is a CPU" in missing["power.csv"]
    assert artifacts.metrics["counted"] == {}
    assert not (tmp_path / "run" / "ncu.json").exists()
    assert artifacts.metrics["roofline"]["peak_flops"] > 0
    page = artifacts.paths["report.html"].read_text("utf-8")
    assert "(profiled run)" in page
    assert 'id="roofline-wide-title"' in page
    assert "model" in page
    assert page.rstrip().endswith("</html>")


def test_a_compilation_counts_nothing() -> None:
    keys = CompileOptions("bert-mini-random").to_config().measure
    assert (keys.energy, keys.kernel_times, keys.roofline, keys.cache_model) == (False,) * 4


def test_a_view_is_no_kernel() -> None:
    """The machine runs none for a reshape: none is timed, counted or modelled."""
    x = relax.Var("x", relax.TensorType((1, 8, 32), "float32"))
    w1, w2 = (named_const(np.ones(s, np.float32), f"w{s[0]}") for s in ((32, 64), (64, 32)))
    builder = relax.BlockBuilder()
    with builder.function("main", [x], attrs={"num_input": 1}):
        with builder.dataflow():
            rows = builder.emit(relax.op.reshape(x, (8, 32)))
            up = builder.emit(relax.op.matmul(rows, w1), "up")
            turned = builder.emit(relax.op.reshape(up, (2, 4, 64)))
            out = builder.emit_output(relax.op.matmul(turned, w2), "down")
        builder.emit_func_output(out)
    arm, feeds = build(builder.get(), V3), {"x": np.ones((1, 8, 32), np.float32)}
    found = count({"dense": arm}, feeds, NOTHING.model_copy(update={"kernel_times": True}), V3)
    assert "kernel_times" not in found.reasons
    kernels = found.kernels["dense"]["kernels"]
    assert [kernel["node"] for kernel in kernels] == ["up", "down"]
    # x counts through its view; what one kernel hands to the next does not.
    between = 4 * 8 * 64
    assert found.work["dense"]["bytes"] == sum(k["bytes"] for k in kernels) - 2 * between
    level = CacheLevel("L", 1 << 20, 16)
    model = model_caches(arm.lowered, V3, feeds, (level,), warm=False)
    assert [kernel.reason for kernel in model.kernels if kernel.kernel] == ["", ""]
    assert model.dram_bytes == found.work["dense"]["bytes"] + between
