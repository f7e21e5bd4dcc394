"""What nvcc makes of every CUDA kernel, and what is predicted of it; nothing runs."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import pytest
from cuda_cases import ARCHS

from icd_tvm.cli import main
from icd_tvm.errors import IcdError
from icd_tvm.measure.cuda_inspect import Inspection, find_disassembler, inspect_kernels
from icd_tvm.measure.cuda_roofline import DEVICES, predict
from icd_tvm.tir_schedules.cuda.archs import CUDA_ARCHS
from icd_tvm.tir_schedules.cuda.catalogue import Entry, catalogue
from icd_tvm.tir_schedules.cuda.source_kernel import Argument, SourceKernel

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
ENTRIES = {arch: catalogue(arch, quick=True) for arch in ARCHS}
NAMES = [entry.name for entry in ENTRIES["sm_90"]]
# Word in a kernel's name -> instructions it must have: in PTX, in SASS.
PRODUCTS = {
    "2:4": (
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32",
        "HMMA.SP.16832.F32",
    ),
    "bf16": ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "HMMA.16816.F32.BF16"),
    "int8": ("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", "IMMA.16832.S8.S8"),
    # No fp8 product of a warp on sm_90: ptxas widens both operands.
    "fp8": ("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32", "HMMA.16816.F32"),
    "fp16": ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "HMMA.16816.F32"),
}
COPIES = (("cp.async.cg.shared.global", "LDGSTS.E.BYPASS.128"), ("ldmatrix.sync", "LDSM.16.M"))
WIDE = ("ld.global.nc.L1::no_allocate.v4.u32", "LDG.E.NA.128.CONSTANT")
WIDEN = ("cvt.rn.f16x2.e4m3x2", "F2FP.F16.E4M3.UNPACK_B")
EXP2 = ("ex2.approx.ftz.f32", "MUFU.EX2")
STATE = ("ld.global.v4.f32", "LDG.E.128")
# Neighbours at once; and a root that is no approximation.
NORM = (("ld.global.v2.f32", "LDG.E.64"), ("sqrt.rn.f32", "MUFU.RSQ"))
# A quotient that is no approximation, rounded to a whole number.
CODES = [("div.rn.f32", "MUFU.RCP"), ("cvt.rni.f32.f32", "FRND")]


def main_kernel(entry: Entry) -> SourceKernel:
    """Return the kernel that does the work; another may turn a matrix before it."""
    return next(kernel for kernel in entry.rule.kernels if kernel.family != "turn")


def wanted(entry: Entry, arch: str) -> list[tuple[str, str]]:
    """Return the pairs that the main kernel of a rule must have."""
    if main_kernel(entry).family in ("gemm", "gemm_24", "attention"):
        return [next(pair for word, pair in PRODUCTS.items() if word in entry.name), *COPIES]
    if main_kernel(entry).family == "quantize":
        return CODES
    if "prefill" in entry.name:
        return [COPIES[0], EXP2] if "scan" in entry.name else [STATE]
    if "step" in entry.name:
        return [STATE]
    if "norm" in entry.name:
        return [*NORM]
    if "append" in entry.name:
        # Rows are stored in the type of the cache; the rotation alone multiplies.
        store = "st.global.f32" if "float32" in entry.name else "st.global.u16"
        return [(store, "STG.E"), ("fma.rn.f32", "FFMA")]
    return [WIDE, WIDEN] if "fp8" in entry.name and arch != "sm_80" else [WIDE]


@pytest.fixture(scope="module", params=ARCHS)
def inspected(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Inspection]]:
    arch = str(request.param)
    kernels = [kernel for entry in ENTRIES[arch] for kernel in entry.rule.kernels]
    return arch, inspect_kernels(kernels, arch, tmp_path_factory.mktemp(arch))


@needs_nvcc
@pytest.mark.parametrize("name", NAMES)
def test_kernel_is_what_it_is_meant_to_be(
    name: str, inspected: tuple[str, dict[str, Inspection]]
) -> None:
    arch, found = inspected
    entry = next((entry for entry in ENTRIES[arch] if entry.name == name), None)
    if entry is None:
        assert (arch, "fp8" in name) == ("sm_80", True)
        return
    for kernel in entry.rule.kernels:
        item = found[kernel.name]
        assert item.spilled == 0
        assert item.stack == 0
        assert item.registers * kernel.threads <= 65536
        assert kernel.shared <= CUDA_ARCHS[arch][0]
        assert kernel.threads % 32 == 0
    first = found[main_kernel(entry).name]
    for ptx, sass in wanted(entry, arch):
        assert any(name.startswith(ptx) for name in first.ptx), ptx
        assert not first.sass or any(name.startswith(sass) for name in first.sass), sass
    assert bool(first.sass) == (find_disassembler() is not None)


@needs_nvcc
def test_two_blocks_of_the_main_tile_fit_a_multiprocessor(
    inspected: tuple[str, dict[str, Inspection]],
) -> None:
    arch, found = inspected
    entry = next(entry for entry in ENTRIES[arch] if entry.name == "bert ffn1 1024 rows fp16")
    kernel = entry.rule.kernels[0]
    assert found[kernel.name].registers * kernel.threads * 2 <= 65536
    # A block also takes 1 KiB for the system.
    assert (kernel.shared + 1024) * 2 <= {"sm_80": 164, "sm_90": 228}[arch] * 1024


@needs_nvcc
def test_a_kernel_that_does_not_compile_says_why(tmp_path: object) -> None:
    broken = SourceKernel(
        "gemv", "int", "nonsense(x)", (Argument("x", (1,), "float32"),), (1, 1, 1), 32, 0, 1, 1, ""
    )
    with pytest.raises(IcdError, match="nonsense"):
        inspect_kernels([broken], "sm_90", tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", CUDA_ARCHS)
def test_every_entry_of_the_catalogue_fits(arch: str) -> None:
    entries = catalogue(arch)
    assert {entry.name for entry in entries if not entry.rule.kernels} == set()
    assert len({entry.name for entry in entries}) == len(entries)
    assert {entry.dense for entry in entries} <= {entry.name for entry in entries} | {""}


def test_prediction_is_the_larger_bound() -> None:
    found = {item.name: item for item in predict(catalogue("sm_90"), "sm_90")}
    device = DEVICES["sm_90"]
    dense = found["bert ffn1 16384 rows fp16"]
    assert dense.bound == "operations"
    assert dense.microseconds == pytest.approx(
        2e6 * 16384 * 3072 * 768 / device.peaks["fp16"], rel=1e-6
    )
    vector = found["mamba in_proj fp16"]
    assert vector.bound == "bytes"
    expected = 2e6 * (10240 * 2560 + 10240 + 2560) / device.bandwidth
    assert vector.microseconds == pytest.approx(expected, rel=1e-6)
    half = found["bert ffn1 16384 rows fp16, half of the blocks"]
    assert half.against_dense == pytest.approx(0.5, rel=0.01)


def test_roofline_prints_what_is_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["roofline"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("predicted, not measured")
    assert "mamba out_proj int4 g128" in text
    assert main(["roofline", "--arch", "sm_80", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["label"] == "predicted"
    assert all(row["microseconds"] > 0 for row in record["kernels"])


def test_counts_are_by_prefix() -> None:
    item = Inspection(1, 0, 0, Counter({"mma.sync": 2}), Counter({"HMMA.16816.F32": 3, "LDG.E": 1}))
    assert item.count("HMMA") == 3
    assert item.count("mma") == 2
