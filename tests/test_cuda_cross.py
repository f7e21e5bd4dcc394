"""Libraries for a CUDA device, made without one: machine code inside, nothing timed."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tvm
from tiny_model import tiny_onnx
from tvm import relax

import icd_tvm
from icd_tvm._tvm import apply_pass
from icd_tvm.cli import main
from icd_tvm.errors import ConfigError, IcdError, MissingDependencyError
from icd_tvm.models.importer import import_onnx
from icd_tvm.relax_passes.plain_names import PlainNames, plain_name
from icd_tvm.runtime.bundle import write_bundle
from icd_tvm.runtime.cross_compile import NOT_MEASURED, check_machine_code, cross_compile
from icd_tvm.runtime.fatbin import CodeEntry, fatbin_entries, machine_code
from icd_tvm.runtime.loaded import LoadedModel
from icd_tvm.runtime.progress import Progress
from icd_tvm.tir_schedules.target import cuda_arch, cuda_target

ROOT = Path(__file__).resolve().parents[1]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")


def entry(kind: int, arch: int, payload: bytes, flags: int = 0x11) -> bytes:
    head = struct.pack("<HHIQIIHHIIIQ", kind, 1, 64, len(payload), 0, 0, 0, 1, arch, 0, 0, flags)
    return head.ljust(64, b"\0") + payload


def fatbin(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    keys = {
        "model": {"path": str(tiny_onnx(folder / "tiny.onnx"))},
        "transform": {"sparsity": "unit:0.5; min-size=0"},
        "cache": {"enabled": False, "dir": str(folder)},
        "target": "cuda:sm_90:float16",
        "threads": 1,
    }
    return icd_tvm.run(keys, out=folder / "run", progress=Progress(quiet=True)).folder


def test_entries_of_all_fatbins_are_found() -> None:
    data = b"x" * 7 + fatbin(entry(1, 80, b"p" * 24), entry(2, 80, b"e" * 40)) + b"y" * 5
    data += fatbin(entry(2, 90, b"f" * 16), entry(2, 90, b"a" * 8, 0x100011))
    assert fatbin_entries(data) == [
        CodeEntry("ptx", "sm_80", 24),
        CodeEntry("elf", "sm_80", 40),
        CodeEntry("elf", "sm_90", 16),
        CodeEntry("elf", "sm_90a", 8),
    ]


@pytest.mark.parametrize("cut", range(0, 90, 7))
def test_truncated_fatbin_is_no_crash(cut: int) -> None:
    assert len(fatbin_entries(fatbin(entry(2, 90, b"e" * 16))[:cut])) <= 1


@pytest.mark.parametrize(
    "content",
    [
        b"__global__ void f() {}",
        fatbin(entry(1, 90, b"p")),
        fatbin(entry(2, 80, b"e")),
        fatbin(entry(2, 90, b"e", 1 << 20)),
    ],
)
def test_source_ptx_or_another_device_is_refused(tmp_path: Path, content: bytes) -> None:
    library = tmp_path / "a.so"
    library.write_bytes(content)
    with pytest.raises(IcdError, match="no machine code of sm_90"):
        check_machine_code(library, "sm_90")


@pytest.mark.parametrize("text", ["cuda", "cuda:", "cuda:sm_70", "cuda:sm_90:int8"])
def test_unknown_device_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="unknown CUDA target"):
        cuda_arch(text)


def test_target_says_what_it_is() -> None:
    assert cuda_arch("x86-64-v3") is None
    assert str(cuda_target(cuda_arch("cuda:sm_80") or "").attrs["arch"]) == "sm_80"


def test_missing_nvcc_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_onnx(tmp_path / "tiny.onnx")
    monkeypatch.setenv("PATH", str(tmp_path))
    out = tmp_path / "run"
    flags = ["--target", "cuda", "--arch", "sm_90", "--out", str(out)]
    assert main(["compile", str(model), *flags]) == 2
    assert "nvcc is not on the path" in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(MissingDependencyError, match="nvcc"):
        icd_tvm.run({"model": {"path": str(model)}, "target": "cuda:sm_90"}, out=out)


def test_arch_without_cuda_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "minilm", "--arch", "sm_90"]) == 2
    assert "--arch and --precision are for --target cuda" in capsys.readouterr().err


def test_names_are_plain_and_inputs_keep_theirs() -> None:
    def module(inner: str) -> tvm.IRModule:
        kind = relax.TensorType((2,), "float32")
        builder, x = relax.BlockBuilder(), relax.Var("in/put", kind)
        with builder.function("main", [x]):
            with builder.dataflow():
                y = relax.DataflowVar(inner, kind)
                builder.emit_normalized(relax.VarBinding(y, builder.normalize(relax.op.exp(x))))
                out = builder.emit_output(relax.op.negative(y))
            builder.emit_func_output(out)
        return builder.get()

    found = apply_pass(PlainNames(), module("/layer.0/exp"))
    tvm.ir.assert_structural_equal(found, module("_layer_0_exp"))
    names = [str(b.var.name) for block in found["main"].body.blocks for b in block.bindings]
    assert names[0] == "_layer_0_exp"
    assert str(found["main"].params[0].name) == "in/put"
    assert plain_name("0/é") == "v0_"


@needs_nvcc
def test_run_is_compiled_verified_and_not_measured(finished: Path) -> None:
    assert check_machine_code(finished / "module.so", "sm_90")
    record = json.loads((finished / "metrics.json").read_text("utf-8"))
    assert record["failure"] is None
    assert record["not_measured"]["lat_ms"] == NOT_MEASURED
    assert any("operands are float16" in flag["reason"] for flag in record["flags"])
    assert record["arms"] == {}
    assert record["ratios"] == {}
    assert record["decision"]["accepted"] is None
    assert record["decision"]["reason"].startswith("not measured")
    assert record["equivalence"]["max_rel"] <= 1e-4
    assert '"cuda"' in record["target"]


@needs_nvcc
def test_float32_library_is_machine_code_too(tmp_path: Path) -> None:
    mod = import_onnx(str(tiny_onnx(tmp_path / "tiny.onnx"))).mod
    assert cross_compile(mod, "sm_80", tmp_path / "a.so")
    assert {entry.arch for entry in machine_code(tmp_path / "a.so")} == {"sm_80"}


@needs_nvcc
def test_bundle_loads_with_the_small_runtime_and_asks_for_a_gpu(
    finished: Path, tmp_path: Path
) -> None:
    assert "libcudart.so.13" in write_bundle(finished, tmp_path / "b.tar.gz")
    shutil.unpack_archive(tmp_path / "b.tar.gz", tmp_path)
    code = (
        "from icd_tvm.measure.cuda_toolkit import load_driver\n"
        "print(load_driver())\n"
        "import runpy, tvm\n"
        "try: runpy.run_path('run.py', run_name='__main__')\n"
        "except RuntimeError as error: print('refused:', error)\n"
        "module = tvm.runtime.load_module('module.so')\n"
        "print(tvm.base._RUNTIME_ONLY, [m.kind for m in module.imports[0].imports])\n"
    )
    environment = {**os.environ, "TVM_USE_RUNTIME_LIB": "1", "PYTHONPATH": str(ROOT)}
    child = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "icd-bundle",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    kind, *rest = child.stdout.splitlines()
    if kind == "driver":
        pytest.skip("this machine has an NVIDIA driver")
    assert rest == [
        "refused: this model needs an NVIDIA GPU, and none is found",
        "True ['cuda']",
    ]


@needs_nvcc
def test_loading_a_run_without_a_gpu_says_so(finished: Path) -> None:
    with pytest.raises(icd_tvm.errors.ModelFileError, match="needs an NVIDIA"):
        icd_tvm.load(finished)({"x": np.zeros((4, 64), "float32")})


def test_inputs_of_a_gpu_keep_their_address() -> None:
    model = LoadedModel.__new__(LoadedModel)
    # Not the CPU that a library for a CPU runs on, yet one that every machine has.
    model._device, model._held = tvm.cpu(1), {}
    first = model._placed("state", np.zeros(4, np.float32))
    second = model._placed("state", np.ones(4, np.float32))
    assert second.data_ptr() == first.data_ptr()
    np.testing.assert_array_equal(first.numpy(), np.ones(4))
    assert model._placed("other", np.ones(4, np.float32)).data_ptr() != first.data_ptr()
    assert model._placed("state", np.ones(5, np.float32)).shape == (5,)
    model._device = tvm.cpu()
    fresh = [model._placed("state", np.zeros(4, np.float32)) for _ in range(2)]
    assert fresh[0].data_ptr() != fresh[1].data_ptr()
