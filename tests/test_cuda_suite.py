"""The suite for a GPU host: on an emulated device, against the stub, and without a driver."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_emulation import Emulated

from benchmarks import gpu_suite
from benchmarks.gpu import kernels as suite_kernels
from benchmarks.gpu.cases import ARMS, INDEX, POOL, UNIT, Case
from benchmarks.gpu.gates import UNKNOWN, evaluate
from benchmarks.gpu.recipes import Pool
from icd_tvm.errors import MeasurementError
from icd_tvm.measure import cuda_driver, cuda_timing
from icd_tvm.measure.cuda_driver import CudaDevice
from icd_tvm.measure.cuda_reference import Trial, make_trial
from icd_tvm.measure.energy import EnergyRecord
from icd_tvm.tir_schedules.cuda.append import append_rule
from icd_tvm.tir_schedules.cuda.attention import attention_rule
from icd_tvm.tir_schedules.cuda.catalogue import Entry
from icd_tvm.tir_schedules.cuda.decode_attention import decode_attention_rule
from icd_tvm.tir_schedules.cuda.gemm import gemm_rule
from icd_tvm.tir_schedules.cuda.gemm_tile import TILES
from icd_tvm.tir_schedules.cuda.gemv import gemv_rule
from icd_tvm.tir_schedules.cuda.mamba_step import conv_step_rule, scan_step_rule
from icd_tvm.tir_schedules.cuda.norm import norm_rule
from icd_tvm.tir_schedules.cuda.source_kernel import Epilogue

ROOT = Path(__file__).resolve().parents[1]
FULL = Epilogue("gelu", bias=True, residual=True)
PARTS = replace(TILES[5], splits=2)
ENTRIES = [
    Entry("gemm", gemm_rule(40, 64, 72, "float16", epilogue=FULL, tile=TILES[4])),
    Entry("gemm blocks", gemm_rule(16, 128, 256, "float16", live=8, tile=TILES[5]), "gemm"),
    Entry(
        "gemm parts", gemm_rule(8, 64, 512, "int8", epilogue=FULL, tile=replace(TILES[5], splits=2))
    ),
    Entry("gemv blocks", gemv_rule(64, 256, "bfloat16", x="bfloat16", live=(4, 8))),
    Entry("gemv int4", gemv_rule(16, 256, "int4", group=64)),
    Entry("gemv int8", gemv_rule(16, 128, "int8", epilogue=FULL)),
    Entry("attention", attention_rule(2, 20, 70, 1, 32, "float16")),
    Entry("decode", decode_attention_rule(1, 2, 2, 130, 64, "float16")),
    Entry("decode int8", decode_attention_rule(1, 2, 2, 70, 64, "bfloat16", cache="int8")),
    Entry("conv", conv_step_rule(40, "float16")),
    Entry("scan", scan_step_rule(20, 16, "float16")),
    Entry("norm", norm_rule(5, 72, "float32", "float16", 1e-5, centre=True, beta=True)),
    Entry("append", append_rule(4, 2, 9, 32, "float16")),
]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on the path")


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CudaDevice]:
    """Return the device of a driver that runs kernels on the host, a microsecond each."""
    folder = tmp_path_factory.mktemp("suite")
    kernels = [kernel for entry in ENTRIES for kernel in entry.rule.kernels]
    emulated = Emulated(kernels, folder)
    driver, source = folder / "libcuda.so", ROOT / "tests/cuda_fake_driver.c"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-o", str(driver), str(source), "-ldl"]
    subprocess.run(command, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_driver, "LIBRARY", str(driver))
        found = CudaDevice()
        found.load(str(emulated.path).encode() + b"\0", kernels)
        yield found


def arguments(**changed: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"kernels": None, "limit": 480.0, **changed})


@needs_compiler
def test_whole_suite_on_an_emulated_device(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_suite, "catalogue", lambda arch: ENTRIES)
    monkeypatch.setattr(cuda_timing, "COPY_BYTES", 1 << 12)
    record = gpu_suite.run_suite(lambda: (device, ENTRIES, {}), arguments())
    worst = {name: item["error_of_allowed"] for name, item in record["correctness"].items()}
    assert set(worst) == {entry.name for entry in ENTRIES}
    assert all(0 < value <= 1 for value in worst.values()), worst
    for entry in ENTRIES:
        found = record["times"][entry.name]
        assert found["cold"]["us"] == pytest.approx(len(entry.rule.kernels))
        assert found["warm"]["by"] == "graph"
        assert found["sets"] >= 2
    assert record["copy_rate"] == pytest.approx(2 * (1 << 12) / 1e-6)
    # No counter, no torch GPU and no ncu here: said, not invented.
    assert all(str(record[part]).startswith("not measured") for part in ("energy", "peers"))
    text = gpu_suite.table(record)
    assert "| gemm blocks | 0." in text
    assert text.startswith("# Emulated, sm_90")
    assert "--build" in record["models"]
    json.dumps(record, default=float)


class LaunchingMachine:
    """Whatever the library, a call starts one of our kernels and returns ones."""

    def __init__(self, device: CudaDevice, folder: Path) -> None:
        entry = next(entry for entry in ENTRIES if entry.name == "conv")
        self.buffers = cuda_timing.Buffers(device, entry, make_trial(entry.rule).inputs, 1)

    def load(self, library: Path) -> Any:
        def main(*arguments: Any) -> np.ndarray:
            self.buffers.call()
            return np.ones(3)

        return main

    def tensor(self, array: np.ndarray) -> np.ndarray:
        return array

    def free_bytes(self) -> int:
        return 3 << 30

    def arrays(self, outputs: np.ndarray) -> list[np.ndarray]:
        return [outputs]


@needs_compiler
def test_models_are_timed_as_graphs_and_kept_after_every_part(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = Case("bert-base", 1, 16, UNIT)
    parameter = {"stored": (pool := Pool()).put(np.ones(3))}
    fed = [{"name": "ids", "shape": [1, 16], "dtype": "int64"}]
    arm = {"library": "a.so", "inputs": fed, "parameters": [parameter], "parameter_bytes": 24}
    built = {"case": vars(case), "tokens": 16, "weights": {}, "inputs": {"ids": "ids:5"}}
    built |= {"arms": dict.fromkeys(ARMS, arm), "orders": {}}
    index = {"arch": "sm_90", "notes": {}, "cases": {case.name: built, "b": {"refused": "why"}}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    pool.save(tmp_path / POOL)
    monkeypatch.setattr(gpu_suite, "catalogue", lambda arch: ENTRIES)
    monkeypatch.setattr(cuda_timing, "COPY_BYTES", 1 << 12)
    monkeypatch.setattr(gpu_suite, "check_values", lambda *_: 1 / 0)
    monkeypatch.setattr(gpu_suite, "measure_times", lambda *_: {})
    kept: list[dict[str, Any]] = []
    record = gpu_suite.run_suite(
        lambda: (device, ENTRIES, {}),
        arguments(kernels=tmp_path),
        keep=lambda record: kept.append(dict(record)),
        machine=LaunchingMachine,
    )
    item = record["models"][case.name]
    assert item["arms"]["linear"]["by"] == "graph"
    # One launch of a microsecond, whether alone or in a graph.
    for mode in ("warm", "cold", "stream"):
        assert item["arms"]["iterative"][mode]["ms"] == pytest.approx(1e-3)
    assert record["models"]["b"] == "not measured: MeasurementError: why"
    assert record["correctness"] == "not measured: ZeroDivisionError: division by zero"
    assert len(kept) == 1 + len(cuda_timing.PARTS)
    assert kept[4]["models"]["notes"] == {}
    assert kept[4]["model_energy"] == "not measured: the suite did not come to it"
    assert case.name in gpu_suite.table(record)


def test_a_record_is_written_while_the_suite_runs(tmp_path: Path) -> None:
    keep = gpu_suite.writer(tmp_path / "out")
    empty = dict.fromkeys(("copy_rate", *cuda_timing.PARTS), "not measured: late")
    for name in ("A B", None):
        device = None if name is None else {"name": name, "arch": "sm_90"}
        keep({"device": device, "predicted": {"arch": "sm_90"}, **empty})
    stems = {path.name[:6] for path in (tmp_path / "out").iterdir()}
    assert stems == {"a-b-20", "no-gpu"}
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_child_of_a_model_is_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(gpu_suite, "open_device", lambda folder: ("device", "entries", {}))
    monkeypatch.setattr(gpu_suite, "child", lambda *given: seen.append(given))
    gpu_suite.run_child(tmp_path, "conv")
    monkeypatch.setattr(gpu_suite, "CudaDevice", lambda: argparse.Namespace(arch="sm_90"))
    monkeypatch.setattr(gpu_suite, "Models", lambda folder, arch, make: "models")
    monkeypatch.setattr(gpu_suite, "model_child", lambda *given: seen.append(given[1:]))
    gpu_suite.run_child(tmp_path, "bert 8x128 unit:0.5/linear")
    assert seen == [("device", "entries", "conv"), ("models", "bert 8x128 unit:0.5", "linear")]


@needs_compiler
def test_a_wrong_kernel_is_found(device: CudaDevice) -> None:
    for entry in ENTRIES:
        trial = make_trial(entry.rule)
        buffers = cuda_timing.Buffers(device, entry, trial.inputs, 1)
        buffers.call()
        found = buffers.outputs()
        buffers.free()
        assert trial.check(found) <= 1, entry.name
        for name, expected in trial.expected.items():
            spoilt = dict(found)
            spoilt[name] = found[name].copy()
            spoilt[name][expected.rows[0]] += np.asarray(1, found[name].dtype)
            assert trial.check(spoilt) > 1, (entry.name, name)
            spoilt[name].fill(np.nan)
            assert trial.check(spoilt) == np.inf


@needs_compiler
def test_without_time_nothing_is_begun(device: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "catalogue", lambda arch: ENTRIES)
    monkeypatch.setattr(cuda_timing, "COPY_BYTES", 1 << 12)
    record = gpu_suite.run_suite(lambda: (device, ENTRIES, {}), arguments(limit=0.0))
    for part in ("correctness", "times"):
        assert set(record[part].values()) == {"not measured: no time is left"}
    assert "not measured" in gpu_suite.table(record)


@needs_compiler
def test_energy_is_counted_of_whole_graphs(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counter:
        source = "test"
        value = 0.0

        def joules(self) -> float:
            self.value += 3.0
            return self.value

    def quick(arms: dict[str, Any], counter: Counter) -> dict[str, EnergyRecord]:
        for call in arms.values():
            call()
        return {name: EnergyRecord(counter.source, 200.0, None, 1.0, 0.0) for name in arms}

    monkeypatch.setattr(cuda_timing, "NvmlDevice", Counter)
    monkeypatch.setattr(cuda_timing, "measure_energy", quick)
    monkeypatch.setattr(cuda_timing, "CHOSEN", ("conv", "scan"))
    found = cuda_timing.count_joules(device, ENTRIES, cuda_timing.Clock(480.0))
    assert set(found) == {"conv", "scan"}
    assert found["scan"]["joules_per_call"] / found["scan"]["rules_per_call"] == 1.0
    with pytest.raises(MeasurementError, match="no time"):
        cuda_timing.count_joules(device, ENTRIES, cuda_timing.Clock(0.0))


def test_counters_are_read_in_both_cache_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[list[str]] = []

    def profile(line: list[str], timeout_s: float) -> list[Any]:
        lines.append(line)
        return []

    monkeypatch.setattr("icd_tvm.measure.ncu.profile", profile)
    clock = cuda_timing.Clock(480.0)
    found = suite_kernels.counters(Path("k"), clock)
    assert len(found) == 2 * len(cuda_timing.CHOSEN)
    modes = [line[line.index("--cache-control") + 1] for line in lines]
    assert modes == ["all", "none"] * len(cuda_timing.CHOSEN)
    assert all(line[-4:-1] == ["--kernels", "k", "--child"] for line in lines)
    with pytest.raises(MeasurementError, match="--kernels"):
        suite_kernels.counters(None, clock)


@needs_compiler
def test_a_device_has_the_kernels_of_all_its_architectures(
    device: CudaDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogues = {"sm_90": ENTRIES[-1:], "sm_90a": ENTRIES[-2:-1]}
    monkeypatch.setattr(suite_kernels, "catalogue", catalogues.__getitem__)
    with pytest.raises(MeasurementError, match=r"sm_90\.cubin is not there"):
        suite_kernels.open_device(tmp_path)
    kernels = suite_kernels.kernels_of(ENTRIES[-2:])
    code = str(Emulated(kernels, tmp_path).path).encode() + b"\0"
    (tmp_path / "sm_90.cubin").write_bytes(code)
    assert suite_kernels.open_device(tmp_path)[1] == ENTRIES[-1:]
    (tmp_path / "sm_90a.cubin").write_bytes(code)
    tried: list[list[str]] = []
    child = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(
        suite_kernels.subprocess, "run", lambda line, **_: tried.append(line) or child
    )
    opened, entries, left_out = suite_kernels.open_device(tmp_path)
    assert (opened.arch, entries, left_out) == ("sm_90", ENTRIES[-2:], {})
    assert [line[-2:] for line in tried] == [["--child", "sm_90a"]]
    suite_kernels.try_kernels(tmp_path, "sm_90a")


@needs_compiler
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("raise SystemExit('cuLaunchKernel: CUDA error 700')", "cuLaunchKernel: CUDA error 700"),
        ("raise SystemExit(3)", "status 3"),
        ("import time; time.sleep(60)", "its kernels did not come to their end in 1 s"),
    ],
)
def test_kernels_that_fail_or_hang_are_left_out(
    device: CudaDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    (tmp_path / "fails.py").write_text(script)
    monkeypatch.setattr(suite_kernels, "catalogue", lambda arch: ENTRIES[-1:])
    monkeypatch.setattr(suite_kernels, "SCRIPT", tmp_path / "fails.py")
    monkeypatch.setattr(suite_kernels, "TRIED_S", 1 if "sleep" in script else 60)
    code = str(Emulated(suite_kernels.kernels_of(ENTRIES[-1:]), tmp_path).path).encode() + b"\0"
    for arch in ("sm_90", "sm_90a"):
        (tmp_path / f"{arch}.cubin").write_bytes(code)
    _, entries, left_out = suite_kernels.open_device(tmp_path)
    assert (entries, left_out) == (ENTRIES[-1:], {"sm_90a": reason})


@needs_compiler
def test_child_starts_one_rule(device: CudaDevice) -> None:
    suite_kernels.child(device, ENTRIES, "gemm parts")


@needs_compiler
def test_profiler_is_stopped_after_an_error(device: CudaDevice) -> None:
    assert device.stream != 0
    with pytest.raises(ZeroDivisionError), device.profiled():
        raise ZeroDivisionError
    with device.profiled(), pytest.raises(MeasurementError, match="cuProfilerStart"):
        device.profiled().__enter__()


def test_a_failing_item_does_not_stop_the_part() -> None:
    def one(entry: Entry) -> dict[str, Any]:
        if entry.name == "gemm":
            raise MeasurementError("cuLaunchKernel: CUDA error 700")
        return {"fine": True}

    found = cuda_timing.each(ENTRIES[:2], cuda_timing.Clock(60), "times", one)
    assert found == {
        "gemm": "not measured: cuLaunchKernel: CUDA error 700",
        "gemm blocks": {"fine": True},
    }


def test_trial_counts_every_output() -> None:
    trial = make_trial(conv_step_rule(40, "float16"))
    assert isinstance(trial, Trial)
    assert set(trial.expected) == {"window_out", "out"}


def rehearse(before: str, out: Path) -> tuple[dict[str, Any], str]:
    """Run the suite in a process without TVM; return its record, and what it printed."""
    code = f"import sys, runpy\n{before}\nsys.modules['tvm'] = None\n"
    code += f"sys.argv = ['gpu_suite.py', '--out', {str(out)!r}]\n"
    code += f"runpy.run_path({str(ROOT / 'benchmarks/gpu_suite.py')!r}, run_name='__main__')\n"
    child = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    (file,) = out.glob("*.json")
    return json.loads(file.read_text()), child.stdout


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
def test_rehearsal_against_the_stub_reaches_the_end(tmp_path: Path) -> None:
    load = "from icd_tvm.measure.cuda_toolkit import load_driver; kind = load_driver()"
    record, printed = rehearse(f"{load}\nassert kind == 'stub', kind", tmp_path)
    check_nothing_is_measured(record, printed, "cuInit: CUDA error 100 no device")


def test_rehearsal_without_a_driver_reaches_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_driver, "LIBRARY", "libcuda.so.1")
    try:
        ctypes.CDLL("libcuda.so.1")
        pytest.skip("this machine has an NVIDIA driver")
    except OSError:
        pass
    with pytest.raises(MeasurementError, match="no NVIDIA driver"):
        CudaDevice()
    record, printed = rehearse("", tmp_path)
    check_nothing_is_measured(record, printed, "no NVIDIA driver")


def check_nothing_is_measured(record: dict[str, Any], printed: str, reason: str) -> None:
    assert record["device"] is None
    for part in ("copy_rate", *cuda_timing.PARTS):
        assert record[part].startswith("not measured")
        assert reason in record[part]
    rows = [
        line
        for line in printed.split("| kernel |")[1].splitlines()
        if line.startswith(("| bert", "| mamba", "| dec"))
    ]
    assert len(rows) == len(record["predicted"]) - 1
    assert {gate.verdict for gate in evaluate(record)} == {UNKNOWN}
    assert all(row.count("not measured") == 4 for row in rows)
    assert "no GPU: nothing was run" in printed
