"""Warpgroup products: emulated against float64, as nvcc compiles them, and when they are chosen."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cuda_cases import EVERY_TILE, FULL, Gemm, check_gemm, needs_compiler, plant
from cuda_emulation import Emulated

from benchmarks.gpu.cases import INDEX, POOL
from benchmarks.gpu.gates import UNKNOWN, evaluate
from benchmarks.gpu.kernels import archs_of
from benchmarks.gpu.models import Models
from benchmarks.gpu.recipes import Pool
from icd_tvm.errors import MeasurementError
from icd_tvm.measure.cuda_inspect import Inspection, find_disassembler, inspect_kernels
from icd_tvm.measure.cuda_reference import make_trial, run_rule
from icd_tvm.measure.cuda_timing import PARTS
from icd_tvm.tir_schedules.cuda.archs import CUDA_ARCHS, HOPPER, runs_on
from icd_tvm.tir_schedules.cuda.catalogue import Entry, catalogue
from icd_tvm.tir_schedules.cuda.gemm import gemm_rule
from icd_tvm.tir_schedules.cuda.gemm_tile import TILES, WGMMA_TILES
from icd_tvm.tir_schedules.cuda.row_codes import RowCodes
from icd_tvm.tir_schedules.cuda.source_kernel import FP8, Epilogue

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
WIDE, MIDDLE, SMALL = (len(TILES) + i for i in range(3))
CASES = {
    "fp16": Gemm(70, 136, 200, epilogue=FULL, tile=SMALL),
    "fp16 one tile": Gemm(64, 128, 16, tile=SMALL, out="float32"),
    "fp16 128x128": Gemm(130, 136, 328, tile=MIDDLE, epilogue=Epilogue("relu", bias=True)),
    "bf16 128x256": Gemm(
        150, 264, 520, "bfloat16", "bfloat16", Epilogue("silu", residual=True), tile=WIDE
    ),
    "int8": Gemm(70, 136, 464, "int8", epilogue=FULL, tile=SMALL),
    "int8 128x256": Gemm(20, 256, 144, "int8", "float32", tile=WIDE),
    "fp16 blocks": Gemm(40, 256, 400, epilogue=FULL, tile=SMALL, sparse=True),
    "int8 blocks": Gemm(70, 128, 208, "int8", tile=MIDDLE, sparse=True),
    "fp16 strays": Gemm(70, 128, 216, epilogue=FULL, tile=SMALL, sparse=True, strays=0.02),
    # 13 tiles of K, and 12.
    "fp16 parts": Gemm(20, 128, 800, epilogue=FULL, tile=SMALL, splits=2),
}
# Epilogues of codes, by the suite's reference.
RULES = {
    "zero points": gemm_rule(
        70, 136, 208, "int8", arch=HOPPER, epilogue=FULL, rows="zero", tile=WGMMA_TILES[2]
    ),
    "int8 to int8": gemm_rule(
        70,
        136,
        208,
        "int8",
        out="int8",
        arch=HOPPER,
        epilogue=Epilogue("gelu", bias=True),
        rows="none",
        codes=RowCodes(8.0, -120),
        tile=WGMMA_TILES[2],
    ),
}
# What the kernel may get wrong, and what the emulator makes of it.
MISTAKES = {
    "no proxy fence": ("    fence_async_proxy();\n", "", "no proxy fence follows"),
    "no barrier": (
        "    sync_block();\n    const u32 stage",
        "    const u32 stage",
        "still reads|changes",
    ),
    "no fence of registers": ("    wgmma_fence();\n#pragma", "#pragma", "no wgmma.fence"),
    "no wait between": ("    wgmma_wait<1>();\n", "", "still reads"),
    "no wait at the end": ("  wgmma_wait<0>();\n", "", "never waited for"),
    "no group": ("    wgmma_commit();\n", "", "still reads|never waited for"),
    "a stage too far": ("ahead = t + G::STAGES - 2", "ahead = t + G::STAGES - 1", "still reads"),
    "copies not waited for": ("copy_wait<G::STAGES - 3>", "copy_wait<G::STAGES - 2>", "changes"),
    "lines begin anywhere": ("(begin + 1023) & ~1023u", "begin", "1024 bytes"),
    "a plain layout": ("(chunk ^ (row & 7))", "chunk", "worst"),
    "another swizzle": ("1ull << 62", "2ull << 62", "other swizzle"),
    "eight rows lie apart": ("64ull << 32", "32ull << 32", "worst"),
    "the step of K": ("matrix_descriptor(a + step * 32)", "matrix_descriptor(a)", "worst"),
    "rows of one warpgroup": ("stage + group * 64 * 128", "stage", "worst"),
    "halves of a stage": ("half * 4 + (c & 3)", "(c & 3)", "worst|changes"),
    "words that are not exchanged": ("  turn_four(more.w);\n      if", "  if", "worst"),
    "words for the wrong lane": ("else words[i + by] = other", "else words[i] = other", "worst"),
    "another operand for some": (
        "group = warpgroup()",
        "group = threadIdx.x / 64",
        "threads differ",
    ),
    "sums touched on their way": (
        "    wgmma_commit();\n",
        "    wgmma_commit();\n    acc[0][0][0] = 1;\n",
        "registers change",
    ),
    "a tile of the next part": ("last - at < 2 ? 1 : 2", "2", "worst"),
}
# Not of a warpgroup alone.
_OF_TWO = ("rows of one warpgroup", "no barrier")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    rules = [*(case.rule() for case in CASES.values()), *RULES.values()]
    kernels = [kernel for rule in rules for kernel in rule.kernels]
    return Emulated(kernels, tmp_path_factory.mktemp("emulated"))


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_product_equals_float64(name: str, emulated: Emulated) -> None:
    assert EVERY_TILE[CASES[name].tile].wgmma
    check_gemm(CASES[name], emulated)


@needs_compiler
@pytest.mark.parametrize("name", RULES)
def test_codes_are_those_of_the_reference(name: str, emulated: Emulated) -> None:
    trial = make_trial(RULES[name])
    assert trial.check(run_rule(RULES[name], trial.inputs, emulated.run)) <= 1


@needs_compiler
@pytest.mark.parametrize("mistake", MISTAKES)
def test_emulator_notices_a_planted_mistake(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong, noticed = MISTAKES[mistake]
    tile = MIDDLE if mistake in _OF_TWO else SMALL
    case = Gemm(100, 128, 400, tile=tile) if "part" not in mistake else CASES["fp16 parts"]
    plant(monkeypatch, right, wrong, "gemm", "gemm_wgmma")
    with pytest.raises(AssertionError, match=noticed):
        check_gemm(case, Emulated(case.rule().kernels, tmp_path))


def products() -> list[Entry]:
    return catalogue(HOPPER, quick=True)


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Inspection]:
    kernels = [kernel for entry in products() for kernel in entry.rule.kernels]
    return inspect_kernels(kernels, HOPPER, tmp_path_factory.mktemp("sm_90a"))


@needs_nvcc
@pytest.mark.parametrize("entry", products(), ids=lambda entry: entry.name)
def test_machine_code_is_what_it_is_meant_to_be(
    entry: Entry, inspected: dict[str, Inspection]
) -> None:
    (kernel,) = entry.rule.kernels
    found = inspected[kernel.name]
    assert (found.spilled, found.stack, found.serialized) == (0, 0, "")
    assert found.registers * kernel.threads <= 65536
    assert kernel.shared <= CUDA_ARCHS[HOPPER][0]
    kind = next(word for word in ("bf16", "int8", "fp16") if word in entry.name)
    columns = kernel.arguments[1].shape[2]
    ptx, sass = {
        "bf16": ("k16.f32.bf16.bf16", f"HGMMA.64x{columns}x16.F32.BF16"),
        "fp16": ("k16.f32.f16.f16", f"HGMMA.64x{columns}x16.F32"),
        "int8": ("k32.s32.s8.s8", f"IGMMA.64x{columns}x32.S8.S8"),
    }[kind]
    assert found.count(f"wgmma.mma_async.sync.aligned.m64n{columns}{ptx}") == 4
    assert found.count("st.global.v4.u32"), "C goes out by 16 bytes"
    for word in ("fence.proxy.async", "cp.async.cg.shared.global", "wgmma.fence.sync.aligned"):
        assert found.count(word), word
    assert bool(found.sass) == (find_disassembler() is not None)
    if found.sass:
        assert found.count(sass) == 4
        assert not found.count("HMMA") + found.count("LDSM")
        assert found.count("LDGSTS.E.BYPASS.128")
        assert found.count("STG.E.128")


@needs_nvcc
def test_two_blocks_of_the_middle_tile_fit_a_multiprocessor(
    inspected: dict[str, Inspection],
) -> None:
    name = "bert ffn1 4096 rows fp16, wgmma 128 x 128, 3 stages"
    (kernel,) = next(entry.rule.kernels for entry in products() if entry.name == name)
    assert inspected[kernel.name].registers * kernel.threads * 2 <= 65536
    # A block also takes 1 KiB for the system.
    assert (kernel.shared + 1024) * 2 <= 228 * 1024


@needs_nvcc
def test_products_that_wait_for_one_another_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, "    wgmma_commit();\n", "    acc[0][0][0] += 1;\n", "gemm_wgmma")
    kernels = gemm_rule(256, 256, 256, "float16", arch=HOPPER).kernels
    (found,) = inspect_kernels(kernels, HOPPER, tmp_path).values()
    assert found.serialized


def test_many_rows_have_warpgroups_where_the_target_has() -> None:
    def family(m: int, arch: str, dtype: str = "float16", **options: object) -> str:
        rule = gemm_rule(m, 768, 768, dtype, arch=arch, **options)  # type: ignore[arg-type]
        return rule.kernels[-1].family

    assert family(1024, HOPPER) == family(1024, HOPPER, "int8") == "gemm_wgmma"
    assert family(1024, "sm_90") == family(128, HOPPER) == family(1024, HOPPER, FP8) == "gemm"
    few, many = (gemm_rule(m, 768, 768, "float16", arch=HOPPER).kernels[0] for m in (1024, 16384))
    assert (few.arguments[1].shape[2], many.arguments[1].shape[2]) == (128, 256)


@pytest.mark.parametrize(
    ("dtype", "arch"), [(FP8, HOPPER), ("float16", "sm_90"), ("float16", "sm_80")]
)
def test_what_has_no_warpgroup_product_says_so(dtype: str, arch: str) -> None:
    rule = gemm_rule(256, 256, 256, dtype, arch=arch, tile=WGMMA_TILES[0])
    assert rule.kernels == ()
    assert f"no warpgroup product of {dtype} for {arch}" in rule.reason


def test_a_tile_knows_its_shared_memory() -> None:
    assert WGMMA_TILES[0].shared == 4 * (128 + 256) * 128 + 1024
    assert replace(WGMMA_TILES[0], wgmma=False).shared == 4 * (128 + 256) * 64


def test_code_of_compute_capability_nine_runs_there_alone() -> None:
    assert archs_of("sm_90") == ["sm_90", "sm_90a"]
    assert archs_of("sm_80") == ["sm_80"]
    assert not runs_on("sm_90a", "sm_100")


def unused(folder: Path) -> Any:
    """Stand for a machine that runs nothing."""


def test_a_folder_of_models_for_it_is_for_the_same_device(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"arch": HOPPER, "notes": {}, "cases": {}}))
    Pool().save(tmp_path / POOL)
    assert Models(tmp_path, "sm_90", unused).cases == {}
    with pytest.raises(MeasurementError, match="compiled for sm_90a, this is sm_80"):
        Models(tmp_path, "sm_80", unused)


def test_suite_holds_warpgroups_against_cublas() -> None:
    rows = [(layer, m) for layer in ("qkv", "out", "ffn1", "ffn2") for m in (1024, 4096, 16384)]
    names = [f"bert {layer} {m} rows fp16" for layer, m in rows]
    assert {f"{name}, wgmma" for name in names} <= {entry.name for entry in catalogue(HOPPER)}
    record = dict.fromkeys(("copy_rate", *PARTS), "not measured: late") | {"predicted": {}}
    record["times"] = {f"{name}, wgmma": {"cold": {"us": 10.0}} for name in names}
    record["peers"] = {name: {"us": 9.0} for name in names}
    plain, bar = (gate for gate in evaluate(record) if gate.what.startswith("GEMM fp16"))
    assert (bar.verdict, bar.value) == ("met", "90 %")
    assert "wgmma" in bar.what
    assert plain.verdict == UNKNOWN
