"""Counters of a CUDA run: both arms under a stand-in for Nsight Compute, and its L2 gate."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from run_support import quietly, settings
from test_ncu import fake_ncu, page
from tiny_model import F, tiny_onnx

from icd_tvm.errors import IcdError, MeasurementError
from icd_tvm.measure.nvml import PowerSample
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.registry import build as build_model
from icd_tvm.relax_passes.axis_groups import find_axis_groups
from icd_tvm.relax_passes.kernel_calls import KernelCall, kernel_calls, owners
from icd_tvm.relax_passes.lower_cuda import lower_cuda
from icd_tvm.relax_passes.plain_names import names_before
from icd_tvm.runtime import power_samples, prepare
from icd_tvm.runtime.cross_compile import NOT_MEASURED, cross_compile
from icd_tvm.runtime.stages import profile, report
from icd_tvm.tir_schedules.target import cuda_target

QUERY = "encoder.layer.0.attention.self.query.weight"


def lowered(name: str, precision: str | None = None) -> tuple[Any, list[KernelCall]]:
    mod = import_onnx(build_model(name)).mod
    calls = kernel_calls(lower_cuda(mod, cuda_target("sm_90"), precision), names_before(mod))
    return mod, calls


@pytest.mark.parametrize("precision", [None, "float16"])
def test_kernels_for_a_gpu_belong_to_operators_and_groups(precision: str | None) -> None:
    mod, calls = lowered("bert-mini-random", precision)
    found = owners(calls, find_axis_groups(mod["main"]))
    [query] = [call for call in found if QUERY in call["weights"]]
    assert "/encoder/layer.0/attention/self/query/MatMul:2.0" in query["groups"]
    # Names that C does not allow come back as ONNX has them.
    nodes = {call["node"] for call in found}
    assert "/encoder/layer.0/attention/self/Softmax" in nodes
    onnx = {str(b.var.name) for block in mod["main"].body.blocks for b in block.bindings}
    assert not [node for node in nodes if node.startswith("_") and node not in onnx]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
def test_every_kernel_of_the_library_is_one_of_the_module(tmp_path: Path) -> None:
    mod, calls = lowered("bert-mini-random")
    cross_compile(mod, "sm_90", tmp_path / "a.so")
    code = (tmp_path / "a.so").read_bytes()
    names = {name.decode() for name in re.findall(rb"\.text\.(\w+)_kernel(?:_\d+)?\0", code)}
    assert names == {call.kernel for call in calls if call.kernel}


def cuda_run(folder: Path, monkeypatch: pytest.MonkeyPatch, **measure: Any) -> Any:
    """Run with a compiler that writes the arm's hidden units where code would be."""

    def compiled(
        mod: Any, arch: str, path: Path, precision: str | None = None, *, graph: bool
    ) -> list[Any]:
        path.write_text("half" if f"{F // 2}), dtype" in str(mod) else "whole")
        return []

    for name in ("find_nvcc", "find_cudart"):
        monkeypatch.setattr(prepare, name, lambda: None)
    for module in (report, profile):
        monkeypatch.setattr(module, "cross_compile", compiled)
    config = settings(tiny_onnx(folder / "tiny.onnx"), target="cuda:sm_90", measure=measure)
    return quietly(config, folder / "run")


def counted_by(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put an ncu on the path that counts 90 % hits for the smaller library and 30 % else."""
    for name, hits in (("half", "900"), ("whole", "300")):
        text = page(("matmul_kernel(float*)", ["1,000", hits, "32000", "1", "2000"]))
        (folder / name).write_text(text)
    body = 'for last; do :; done\nif grep -q "half" $last/module.so; '
    body += f'then cat "{folder}/half"; else cat "{folder}/whole"; fi'
    fake_ncu(folder, monkeypatch, body, "2024.1.1.0")


def test_both_arms_are_counted_and_decide_the_gate_of_l2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted_by(tmp_path, monkeypatch)
    artifacts = cuda_run(tmp_path, monkeypatch)
    metrics = artifacts.metrics
    assert metrics["failure"] is None
    assert metrics["arms"] == {}
    assert {arm: found["l2_hit_pct"] for arm, found in metrics["counted"].items()} == {
        "linear": pytest.approx(30),
        "iterative": pytest.approx(90),
    }
    gates = {gate["name"]: gate for gate in artifacts.gates}
    assert (gates["l2"]["status"], gates["l2"]["value"]) == ("pass", pytest.approx(60))
    assert gates["latency"]["status"] == gates["energy"]["status"] == "not measured"
    missing = metrics["not_measured"]
    for name in ("lat_ms", "ept_j_per_tok", "cache_model", "kernel_times", "roofline", "flop"):
        assert missing[name] == NOT_MEASURED
    assert missing["power.csv"] == NOT_MEASURED
    profiles = json.loads(artifacts.paths["ncu.json"].read_text())
    modes = ("warm caches", "cold caches")
    assert set(profiles) == {f"{arm}, {mode}" for arm in ("linear", "iterative") for mode in modes}
    assert "matmul_kernel" in artifacts.paths["report.html"].read_text("utf-8")


def test_without_ncu_no_second_arm_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "missing_ncu", lambda: "ncu is not installed")
    monkeypatch.setattr(profile, "_libraries", lambda *_: pytest.fail("an arm was compiled"))
    metrics = cuda_run(tmp_path, monkeypatch).metrics
    assert metrics["counted"] == {}
    assert "ncu is not installed" in metrics["not_measured"]["l2_hit_pct"]
    assert next(g for g in metrics["gates"] if g["name"] == "l2")["status"] == "not measured"


def test_an_arm_that_does_not_compile_leaves_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise IcdError("the CUDA compiler failed: why")

    mod = object()
    other = SimpleNamespace(mod=SimpleNamespace(same_as=lambda _: False))
    arms = {"linear": other, "iterative": SimpleNamespace(mod=mod)}
    result = SimpleNamespace(arms=arms, verdict=SimpleNamespace(arm="linear"))
    config = SimpleNamespace(target="cuda:sm_90", cuda_graph=True)
    job: Any = SimpleNamespace(
        result=result, library=tmp_path / "a.so", cuda="sm_90", config=config
    )
    monkeypatch.setattr(profile, "cross_compile", broken)
    found, reason = profile._libraries(job, tmp_path)
    assert found == {"linear": tmp_path / "a.so"}
    assert reason == "iterative: the CUDA compiler failed: why"


def test_power_is_sampled_around_the_body_or_the_reason_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons: dict[str, str] = {}
    written: dict[str, str] = {}
    job: Any = SimpleNamespace(
        cuda="sm_90",
        result=SimpleNamespace(counters=SimpleNamespace(reasons=reasons)),
        config=SimpleNamespace(measure=SimpleNamespace(power_sample_hz=10.0)),
        folder=SimpleNamespace(write_text=written.__setitem__),
    )

    def missing() -> Any:
        raise MeasurementError("no NVML here")

    monkeypatch.setattr(power_samples, "NvmlDevice", missing)
    with power_samples.sampled_power(job):
        pass
    assert reasons == {"power.csv": "no NVML here"}

    @contextmanager
    def sampling(hz: float) -> Any:
        yield [PowerSample(0.0, 70.5, None, 3, None, None)]

    monkeypatch.setattr(power_samples, "NvmlDevice", lambda: SimpleNamespace(sampling=sampling))
    with power_samples.sampled_power(job):
        pass
    assert "70.5" in written["power.csv"]
