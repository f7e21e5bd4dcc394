"""Nsight Compute on libraries: a stand-in prints its page, and every failure is a reason."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_ncu import PAGE, fake_ncu

from icd_tvm.runtime import profile_worker
from icd_tvm.runtime.profile_arms import NOT_A_GPU, NOT_ASKED, capability_of, profile_arms
from icd_tvm.runtime.stages import profile as stage

SIGNATURE = {"name": "m", "inputs": [], "outputs": [], "device": "cuda"}
CALLS = [
    {"kernel": "fused_dense_matmul", "node": "layer.0/MatMul", "groups": ["hidden"]},
    {"kernel": "fused_dense_matmul", "node": "layer.1/MatMul", "groups": ["hidden"]},
    {"kernel": "gemv", "node": "head", "groups": []},
]


def profiled(folder: Path, **more: Any) -> tuple[dict[str, Any], str]:
    library = folder / "lib.so"
    library.write_bytes(b"code")
    return profile_arms({"linear": library}, SIGNATURE, {"x": np.ones(3)}, **more)


def test_each_arm_is_profiled_with_warm_and_cold_caches_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "page").write_text(PAGE)
    body = f'echo "$@" >> {tmp_path}/lines; for last; do :; done\n'
    body += f"ls $last >> {tmp_path}/held; cat {tmp_path / 'page'}"
    fake_ncu(tmp_path, monkeypatch, body, "2024.1.1.0")
    metrics = ["l2_tex__t_sector_hit_rate.pct"]
    found, reason = profiled(tmp_path, metrics=metrics, capability=(9, 0), owners={"linear": CALLS})
    assert reason == ""
    assert list(found) == ["linear, warm caches", "linear, cold caches"]
    warm, cold = (tmp_path / "lines").read_text().splitlines()
    assert "--cache-control none --replay-mode application" in warm
    assert "--cache-control all --replay-mode kernel" in cold
    assert "--profile-from-start off" in warm
    assert "lts__t_sectors_srcunit_ltcfabric.sum" in warm
    assert "-m icd_tvm.runtime.profile_worker" in warm
    held = {"inputs.npz", "model.json", "module.so"}
    assert set((tmp_path / "held").read_text().split()) == held
    record = found["linear, warm caches"]
    assert "exists on no GPU" in record["notes"][0]
    assert record["summary"]["l2_read_hit_pct"] == pytest.approx(30)
    first, second = record["kernels"]
    assert first["operators"] == ["layer.0/MatMul", "layer.1/MatMul"]
    assert first["groups"] == ["hidden"]
    # A library's kernel is not a PrimFunc's, however similar its name.
    assert second["operators"] == []
    assert record["by_group"] == {"hidden": record["by_operator"]["layer.0/MatMul"]}
    assert record["by_group"]["hidden"]["l2_read_hit_pct"] == pytest.approx(90)


@pytest.mark.parametrize(
    ("body", "version", "match"),
    [
        ("echo '==ERROR== ERR_NVGPUCTRPERM'; exit 1", "2024.1", "run as root"),
        ("true", "2019.5", "too old"),
        ("exit 3", "2024.1", "status 3"),
        ("echo nothing", "2024.1", "no CSV header"),
    ],
)
def test_failures_are_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, version: str, match: str
) -> None:
    fake_ncu(tmp_path, monkeypatch, body, version)
    found, reason = profiled(tmp_path)
    assert found == {}
    assert match in reason


def test_a_missing_program_and_a_wrong_metric_are_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no metric name" in profiled(tmp_path, metrics=["; rm"])[1]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "not installed" in profiled(tmp_path)[1]


@pytest.mark.parametrize("device", ["cuda", None])
def test_only_the_last_call_of_the_worker_is_profiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str | None
) -> None:
    log: list[str] = []

    class Model:
        def __init__(self, library: Path, signature: dict[str, Any]) -> None:
            assert library == tmp_path / "module.so"
            assert signature == {"device": device}

        def __call__(self, feeds: dict[str, Any]) -> None:
            log.append(f"call {feeds['x'].sum():g}")

    runtime = SimpleNamespace(
        cudaDeviceSynchronize=lambda: None,
        cudaProfilerStart=lambda: log.append("start"),
        cudaProfilerStop=lambda: log.append("stop"),
    )
    monkeypatch.setattr(profile_worker, "LoadedModel", Model)
    monkeypatch.setattr(profile_worker, "_cudart", lambda: runtime)
    (tmp_path / "model.json").write_text(json.dumps({"device": device}))
    np.savez(tmp_path / "inputs.npz", x=np.ones(3))
    profile_worker.main(tmp_path)
    calls = ["call 3"] * profile_worker.WARM_UP
    assert log == [*calls, *(["start", "call 3", "stop"] if device else ["call 3"])]


def test_a_host_without_the_cuda_runtime_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_worker, "_CUDART", ("libnone.so.1",))
    with pytest.raises(SystemExit, match=r"libnone\.so\.1"):
        profile_worker._cudart()


def job(folder: Path, gpu: bool, asked: bool) -> Any:
    reasons: dict[str, str] = {}
    return SimpleNamespace(
        cuda="sm_90" if gpu else None,
        library=folder / "module.so",
        config=SimpleNamespace(measure=SimpleNamespace(ncu=asked)),
        compilation=SimpleNamespace(counters=SimpleNamespace(reasons=reasons)),
    )


@pytest.mark.parametrize(
    ("gpu", "asked", "reason"),
    [(False, True, NOT_A_GPU), (True, False, NOT_ASKED), (True, True, stage.NO_LIBRARY)],
)
def test_a_run_says_why_it_has_no_profile(
    tmp_path: Path, gpu: bool, asked: bool, reason: str
) -> None:
    made = job(tmp_path, gpu, asked)
    stage.profile(made)
    assert made.compilation.counters.reasons == {"ncu": reason}


@pytest.mark.parametrize(
    ("target", "found"),
    [("cuda:sm_90", (9, 0)), ('{"arch":"sm_100","kind":"cuda"}', (10, 0)), ("host", None)],
)
def test_the_capability_stands_in_the_target(target: str, found: tuple[int, int] | None) -> None:
    assert capability_of(target) == found
