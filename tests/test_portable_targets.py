"""Code for other CPUs: portable levels compute what the host does, aarch64 compiles untested."""

from __future__ import annotations

import json
import re
import shutil
import struct
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cpu_lowering import LEGALISED, module
from tiny_model import tiny_onnx

from icd_tvm import cli
from icd_tvm._tvm import apply_pass, relax, te, tvm
from icd_tvm.adapters.quant import parse_quant
from icd_tvm.errors import MissingDependencyError
from icd_tvm.models.bert import BertConfig, build_bert, random_bert_weights
from icd_tvm.models.decoder import DECODER_MINI, build_decoder_step, random_decoder_weights
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.inputs import random_inputs
from icd_tvm.models.mamba import MAMBA_MINI, build_mamba_step, random_mamba_weights
from icd_tvm.models.mamba_prefill import build_mamba_prefill
from icd_tvm.relax_passes.apply_quant import ApplyQuant
from icd_tvm.relax_passes.lower_cpu import build_cpu
from icd_tvm.runtime.foreign_cpu import ARM_LINKER, export_foreign
from icd_tvm.tir_schedules import target as targets
from icd_tvm.tir_schedules.cpu import select
from icd_tvm.tir_schedules.cpu.stack import compile_kernel
from icd_tvm.tir_schedules.target import host_target, is_aarch64, parse_target, runs_here

CONFIG = BertConfig(layers=2, hidden=64, heads=4, ffn=160, vocab=50, max_position=32)
ARM = parse_target("aarch64", 2)
# What every kernel calls: TVM's runtime, and copies.
OWN = re.compile("_*(TVM|tvm_ffi)|memcpy|memset")
EM_AARCH64 = 183


@lru_cache(maxsize=1)
def encoder() -> Any:
    return import_onnx(build_bert(CONFIG, random_bert_weights(CONFIG, 0), seq=24))


def run(target: Any) -> np.ndarray:
    feeds = random_inputs(encoder(), seed=1)
    arguments = [tvm.runtime.tensor(feeds[spec.name]) for spec in encoder().inputs]
    machine = relax.VirtualMachine(build_cpu(encoder().mod, target), tvm.cpu())
    return np.asarray(machine["main"](*arguments).numpy())


def assembly(module: Any) -> str:
    own = module.inspect_source("asm") if module.kind == "llvm" else ""
    return own + "".join(assembly(imported) for imported in module.imports)


@pytest.mark.parametrize("level", ["x86-64-v3", "x86-64-v4"])
def test_portable_levels_compute_what_the_host_does(level: str) -> None:
    target = parse_target(level, 1)
    if not runs_here(target):
        pytest.skip(f"this CPU is below {level}")
    expected = run(host_target(1))
    np.testing.assert_allclose(run(target), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_what_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs_here(host_target(1))
    assert is_aarch64(ARM)
    assert not runs_here(tvm.target.Target({"kind": "cuda", "arch": "sm_90"}))
    old = parse_target("x86-64-v3", 1)
    monkeypatch.setattr(targets, "host_target", lambda threads: old)
    assert runs_here(parse_target("x86-64", 1))
    assert not runs_here(parse_target("x86-64-v4", 1))
    assert not runs_here(ARM)
    # The same kernels, but LLVM permutes bytes by an instruction that the host has not.
    older = parse_target("cascadelake", 1)
    monkeypatch.setattr(targets, "host_target", lambda threads: older)
    assert runs_here(parse_target("x86-64-v4", 1))
    assert not runs_here(parse_target("icelake-server", 1))


def test_kernels_for_another_cpu_are_not_timed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "timed_kernels", None)
    weight = np.ones((64, 48), np.float32)
    weight[::2] = 0
    choice = select.choose_matmul_kernel(32, 64, 48, weight, ARM)
    assert (choice.kind, choice.reason.split(":")[0]) == ("rowlist", "model")


def test_aarch64_compiles_to_neon_objects(tmp_path: Path) -> None:
    export_foreign(encoder().mod, ARM, tmp_path / "model.tar")
    with tarfile.open(tmp_path / "model.tar") as archive:
        heads = [archive.extractfile(member).read(20) for member in archive]  # type: ignore[union-attr]
    assert {struct.unpack_from("<H", head, 18)[0] for head in heads} == {EM_AARCH64}
    text = assembly(build_cpu(encoder().mod, ARM, tune=False).mod)
    assert re.search(r"fmla\s+v\d+\.4s", text)


@pytest.mark.skipif(shutil.which(ARM_LINKER) is not None, reason="the linker is installed")
def test_a_library_without_a_linker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match=r"model\.tar"):
        export_foreign(encoder().mod, ARM, tmp_path / "model.so")


def test_the_command_line_says_that_aarch64_is_untested(tmp_path: Path) -> None:
    model, library, out = tiny_onnx(tmp_path / "m.onnx"), tmp_path / "m.tar", tmp_path / "run"
    arguments = ["--target", "aarch64", "-o", str(library), "--out", str(out), "--quiet"]
    assert cli.main(["compile", str(model), *arguments]) == 0
    record = json.loads((out / "metrics.json").read_text())
    assert "untested here" in record["not_measured"]["lat_ms"]
    assert "aarch64" in record["target"]
    assert record["decision"]["accepted"] is not True
    assert tarfile.is_tarfile(library)


def library_calls(module: Any) -> set[str]:
    """Return the functions of other libraries that code calls."""
    return set(re.findall(r"\b(?:call|jmp)q?\s+\*?(\w+)@(?:PLT|GOTPCREL)", assembly(module)))


def quantised(request: str) -> Any:
    return apply_pass(ApplyQuant(parse_quant(request)), encoder().mod)


def models() -> dict[str, Any]:
    decoder = build_decoder_step(DECODER_MINI, dict(random_decoder_weights(DECODER_MINI)), 8)
    mamba = dict(random_mamba_weights(MAMBA_MINI))
    return {
        "encoder": encoder().mod,
        "encoder in bytes": quantised("int8:w8a8-dynamic"),
        "encoder in bf16": quantised("bf16"),
        "decoder": import_onnx(decoder).mod,
        "mamba step": import_onnx(build_mamba_step(MAMBA_MINI, mamba)).mod,
        "mamba": import_onnx(build_mamba_prefill(MAMBA_MINI, mamba, 16)).mod,
    }


def test_no_kernel_calls_the_c_library_for_mathematics() -> None:
    found = {
        name: library_calls(build_cpu(mod, host_target(1), tune=False).mod)
        for name, mod in models().items()
    }
    own = {c for calls in found.values() for c in calls if OWN.match(c)}
    assert found == {name: found[name] & own for name in found}


@pytest.mark.parametrize("name", LEGALISED)
def test_no_operator_calls_the_c_library_for_mathematics(name: str) -> None:
    mod = module(lambda emit, x: emit(LEGALISED[name][0](x)), x=(5, 64))
    found = library_calls(build_cpu(mod, host_target(1)).mod)
    assert not {call for call in found if not OWN.match(call)}


def test_a_call_of_the_c_library_would_be_seen() -> None:
    x = te.placeholder((64,), "float32", "x")
    func = te.create_prim_func([x, te.compute((64,), lambda i: te.erf(te.exp(x[i])), "y")])
    calls = library_calls(compile_kernel(func, host_target(1)).mod)
    assert {"expf", "erff"} <= calls
