"""int8 codes and their products on CUDA, executed on the CPU: integers exact, codes to the last."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from cuda_cases import ARCHS, EPS, ORDERS, close, needs, needs_compiler, plant
from cuda_emulation import Emulated, numpy_dtype

from icd_tvm.measure.cuda_inspect import inspect_kernels
from icd_tvm.measure.cuda_reference import run_rule
from icd_tvm.tir_schedules.cuda.attention import attention_rule
from icd_tvm.tir_schedules.cuda.gemm import RowScales, gemm_rule, live_blocks, pack_weight
from icd_tvm.tir_schedules.cuda.gemm_tile import TILES
from icd_tvm.tir_schedules.cuda.norm import norm_rule
from icd_tvm.tir_schedules.cuda.quantize import quantize_rule
from icd_tvm.tir_schedules.cuda.row_codes import RowCodes
from icd_tvm.tir_schedules.cuda.source_kernel import PLAIN, Epilogue, Rule, SourceKernel

BY_ROW = RowCodes()
# A power of two: quotients are exact, and halves are ties.
TIES = RowCodes(0.25, -7)


@dataclass(frozen=True)
class Gemm:
    """A product of codes whose float32 is exact: scales are powers of two."""

    m: int
    n: int
    k: int
    rows: RowScales
    tile: int = 3
    splits: int = 1
    sparse: bool = False
    epilogue: Epilogue = PLAIN
    codes: RowCodes | None = None

    def given(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(self.m + self.n)
        w = rng.integers(-127, 128, (self.k, self.n)).astype(np.int8)
        if self.sparse:
            alive = rng.random((-(-self.k // 16), self.n // 64)) < 0.5
            w *= np.kron(alive, np.ones((16, 64)))[: self.k].astype(np.int8)
        found = {"a": rng.integers(-128, 128, (self.m, self.k)).astype(np.int8), "plain": w}
        blocks = live_blocks(w, 64) if self.sparse else None
        found |= {"w": pack_weight(w, TILES[self.tile].n, blocks), "slabs": blocks}
        found["row_scale"] = (2.0 ** rng.integers(-8, -3, self.m)).astype(np.float32)
        found["column_scale"] = (2.0 ** rng.integers(-8, -3, self.n)).astype(np.float32)
        found["row_zero"] = rng.integers(-128, 128, self.m).astype(np.float32)
        found["column_sums"] = w.sum(0, dtype=np.int64).astype(np.float32)
        found["bias"] = rng.integers(-99, 100, self.n).astype(np.float32)
        return found

    def rule(self) -> Rule:
        live = live_blocks(self.given()["plain"], 64).shape[1] if self.sparse else None
        return gemm_rule(
            self.m, self.n, self.k, "int8", out="int8" if self.codes else "float32",
            epilogue=self.epilogue, live=live, rows=self.rows, codes=self.codes,
            tile=replace(TILES[self.tile], splits=self.splits),
        )  # fmt: skip

    def expected(self, given: dict[str, np.ndarray]) -> np.ndarray:
        a = given["a"].astype(np.int64)
        if self.rows == "zero":
            a = a - given["row_zero"].astype(np.int64)[:, None]
        y = (a @ given["plain"].astype(np.int64)) * given["column_scale"].astype(float)
        y = y * (given["row_scale"].astype(float)[:, None] if self.rows != "none" else 1.0)
        y = y + (given["bias"] if self.epilogue.bias else 0.0)
        y = np.maximum(y, 0.0) if self.epilogue.activation == "relu" else y
        return y if self.codes is None else coded(y, self.codes)


def coded(y: np.ndarray, codes: RowCodes) -> np.ndarray:
    """Return the codes of float32 values by float32 division, as QuantizeLinear divides."""
    steps = np.rint(y.astype(np.float32) / np.float32(codes.step))
    return np.clip(steps + codes.point, -128, 127).astype(np.int8)


def coded_rows(y: np.ndarray) -> dict[str, np.ndarray]:
    """Return what DynamicQuantizeLinear makes of each row, 128 lower."""
    y = y.astype(np.float32)
    low, high = np.minimum(y.min(1), 0), np.maximum(y.max(1), 0)
    step = (high - low) / np.float32(255)
    step = np.where(step == 0, np.float32(1), step)
    zero = np.rint(-low / step) - 128
    steps = np.rint(y / step[:, None]) + zero[:, None]
    codes = np.clip(steps, -128, 127).astype(np.int8)
    return {"row_scale": step, "row_zero": zero.astype(np.float32), "codes": codes}


BIASED = Epilogue("relu", bias=True)
GEMMS = {
    "one step": Gemm(70, 72, 208, "none"),
    "a step for each row": Gemm(33, 136, 96, "scale", tile=2, epilogue=BIASED),
    "zero points": Gemm(70, 136, 208, "zero", tile=0, epilogue=BIASED),
    "zero points, parts": Gemm(16, 64, 528, "zero", tile=5, splits=2),
    "zero points, blocks": Gemm(40, 128, 400, "zero", sparse=True, epilogue=BIASED),
    "one step, blocks": Gemm(20, 64, 256, "none", sparse=True),
    "codes": Gemm(40, 72, 64, "none", epilogue=BIASED, codes=RowCodes(16.0, -101)),
    "codes, parts": Gemm(
        16, 64, 528, "zero", tile=5, splits=2, epilogue=BIASED, codes=RowCodes(1.0, 3)
    ),
}
# rows, width, type, what the codes stand for
CODES = {
    "fp16": (5, 48, "float16", TIES),
    "bf16, warps share a row": (3, 1000, "bfloat16", RowCodes(0.013, 4)),
    "fp32, a warp for a row": (1030, 66, "float32", RowCodes(0.031, -128)),
    "rows, fp16": (6, 48, "float16", BY_ROW),
    "rows, bf16, warps share a row": (5, 1000, "bfloat16", BY_ROW),
    "rows, fp32, a warp for a row": (1030, 66, "float32", BY_ROW),
}
# rows, width, type of x, of out, layer norm, residual, codes
NORMS = {
    "layer norm": (5, 1000, "float16", "float32", True, False, TIES),
    "layer norm by row": (6, 48, "float32", "float32", True, True, BY_ROW),
    "rms norm by row": (3, 1000, "bfloat16", "float32", False, True, BY_ROW),
}


def one(rule: Rule) -> SourceKernel:
    (found,) = rule.kernels
    return found


ATTENTION = one(attention_rule(2, 20, 20, 2, 32, "float16", mask=False, codes=TIES))


def norm(name: str, *, alone: bool = False) -> SourceKernel:
    rows, width, x, out, centre, residual, codes = NORMS[name]
    return one(
        norm_rule(
            rows, width, x, "int8" if alone else out, 1e-5,
            centre=centre, beta=centre, residual=residual, codes=codes,
        )
    )  # fmt: skip


def every_kernel() -> list[SourceKernel]:
    kernels = [kernel for case in GEMMS.values() for kernel in case.rule().kernels]
    kernels += [one(quantize_rule(*sizes)) for sizes in CODES.values()]
    kernels += [norm(name, alone=alone) for name in NORMS for alone in (False, True)]
    return [*kernels, ATTENTION]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    return Emulated(every_kernel(), tmp_path_factory.mktemp("emulated"))


@needs_compiler
@pytest.mark.parametrize("name", GEMMS)
def test_product_of_codes_is_exact(name: str, emulated: Emulated) -> None:
    check_gemm(GEMMS[name], emulated)


def check_gemm(case: Gemm, emulated: Emulated) -> None:
    given, rule = case.given(), case.rule()
    expected = case.expected(given)
    np.testing.assert_array_equal(expected.astype(np.float32), expected)
    assert len(rule.kernels) == 1 + (case.splits > 1)
    for order in ORDERS:
        run = partial(emulated.run, order=order)
        found = run_rule(rule, given, run)["c"]
        np.testing.assert_array_equal(found, expected)
    if case.codes:
        assert len(np.unique(found)) > 20


def rows_of(rows: int, width: int, dtype: str) -> np.ndarray:
    """Return rows of several ranges: ties of `TIES`, no zero inside, all zero, far outside."""
    rng = np.random.default_rng(rows)
    x = rng.integers(-40, 41, (rows, width)) / 8.0
    x[1 % rows] = rng.random(width) + 3
    x[2 % rows] = 0
    x[-1] = -rng.random(width) * 200
    return x.astype(numpy_dtype(dtype))


@needs_compiler
@pytest.mark.parametrize("name", CODES)
def test_codes_of_rows_are_those_of_onnx(name: str, emulated: Emulated) -> None:
    check_codes(name, emulated)


def check_codes(name: str, emulated: Emulated) -> None:
    rows, width, dtype, codes = CODES[name]
    x = rows_of(rows, width, dtype)
    expected = coded_rows(x) if codes == BY_ROW else {"codes": coded(x, codes)}
    for order in ORDERS:
        found = emulated.run(one(quantize_rule(rows, width, dtype, codes)), {"x": x}, order)
        assert set(found) == set(expected)
        for part, array in expected.items():
            np.testing.assert_array_equal(found[part], array, err_msg=part)


@needs_compiler
@pytest.mark.parametrize("name", NORMS)
def test_norm_writes_the_codes_of_its_result(name: str, emulated: Emulated) -> None:
    check_norm(name, emulated)


def check_norm(name: str, emulated: Emulated) -> None:
    rows, width, dtype, _, centre, residual, codes = NORMS[name]
    rng, kernel = np.random.default_rng(0), norm(name)
    given = {"x": (rng.standard_normal((rows, width)) + 3).astype(numpy_dtype(dtype))}
    given["residual"] = rng.standard_normal((rows, width)).astype(numpy_dtype(dtype))
    given |= {part: rng.standard_normal(width).astype(np.float32) for part in ("gamma", "beta")}
    found = emulated.run(kernel, needs(kernel, given), order=2)
    h = given["x"].astype(float) + (given["residual"].astype(float) if residual else 0.0)
    h = h - h.mean(1, keepdims=True) if centre else h
    y = h / np.sqrt((h**2).mean(1, keepdims=True) + 1e-5) * given["gamma"]
    close(found["out"], y + (given["beta"] if centre else 0.0), "float32", width, 16)
    out = found.pop("out")
    expected = coded_rows(out) if codes == BY_ROW else {"codes": coded(out, codes)}
    alone = emulated.run(norm(name, alone=True), needs(kernel, given), order=1)
    assert set(found) == set(alone) == set(expected)
    for part, array in expected.items():
        np.testing.assert_array_equal(found[part], array, err_msg=part)
        np.testing.assert_array_equal(alone[part], array, err_msg=part)


@needs_compiler
def test_attention_writes_codes_of_its_result(emulated: Emulated) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 20, 2, 32)).astype(np.float16) for _ in range(3))
    scores = np.einsum("bqhd,bkhd->bhqk", q.astype(float), k.astype(float)) / np.sqrt(32)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhqk,bkhd->bqhd", weights, v.astype(float)) / TIES.step + TIES.point
    found = emulated.run(ATTENTION, {"q": q, "k": k, "v": v}, order=2)["out"]
    # Weights are rounded to float16 before the second product.
    doubt = 4 * EPS["float16"] * np.abs(v).max() / TIES.step
    assert doubt < 0.1
    assert np.abs(found - np.clip(expected, -128, 127)).max() <= 0.5 + doubt


# Right, wrong, and the case that must notice it.
MISTAKES = {
    "ties after the zero point": (
        "rintf(x / by.step) + by.point", "rintf(x / by.step + by.point)", "fp16"),
    "codes that wrap": ("fminf(fmaxf(rintf(x), -128.0f), 127.0f)", "rintf(x)", "fp16"),
    "a range without zero": (
        "float low = 0, high = 0;", "float low = 1e9f, high = -1e9f;", "rows, fp16"),
    "a part of a row": ("x = fmaxf(x, kept[row * G::WARPS + w]);", "", "rows, bf16"),
    "no step for zeros": ("if (by.step == 0) by.step = 1.0f;", "", "rows, fp16"),
    "codes of another row": ("(long)row * width + column, coded", "column, coded", "rows, fp16"),
    "a zero point for all": ("end.row_zero[row]", "end.row_zero[0]", "zero points"),
    "sums of other columns": (
        "load_two(F32(), end.column_sums, column)", "load_two(F32(), end.column_sums, 0)",
        "zero points"),
    "a result that is not coded": (
        "out, first + column, kept[i].x, kept[i].y)", "out, first + column, kept[i].x, kept[i].x)",
        "layer norm"),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistake_is_noticed(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong, name = MISTAKES[mistake]
    plant(monkeypatch, right, wrong, "common", "gemm", "norm")
    if name in NORMS:
        kernels = [norm(name), norm(name, alone=True)]
    elif name in GEMMS:
        kernels = list(GEMMS[name].rule().kernels)
    else:
        name = next(full for full in CODES if full.startswith(name))
        kernels = [one(quantize_rule(*CODES[name]))]
    broken = Emulated(kernels, tmp_path)
    check = check_norm if name in NORMS else check_codes
    with pytest.raises(AssertionError):
        check_gemm(GEMMS[name], broken) if name in GEMMS else check(name, broken)


def test_what_is_not_made_says_why() -> None:
    assert "no codes of int8" in quantize_rule(4, 32, "int8", TIES).reason
    assert "rows of 33" in quantize_rule(4, 33, "float16", TIES).reason
    reason = norm_rule(4, 32, "float32", "int8", 1e-5, centre=True).reason
    assert "what the codes stand for" in reason
    sizes = (8, 64, 64, "int8")
    assert "int8 has codes" in gemm_rule(*sizes, out="int8").reason
    assert "int8 has codes" in gemm_rule(*sizes, out="float16", codes=TIES).reason
    residual = Epilogue(residual=True)
    assert "no residual" in gemm_rule(*sizes, out="int8", epilogue=residual, codes=TIES).reason
    assert "one step" in gemm_rule(*sizes, out="int8", codes=BY_ROW).reason
    attention = attention_rule(1, 4, 4, 1, 64, "float16", codes=BY_ROW)
    assert "one step, not one for each row" in attention.reason


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_compile_without_spills(arch: str, tmp_path: Path) -> None:
    kernels = {kernel.name: kernel for kernel in every_kernel()}
    for name, found in inspect_kernels(list(kernels.values()), arch, tmp_path).items():
        assert (found.spilled, found.stack) == (0, 0), name
        assert found.registers * kernels[name].threads <= 65536
        if "gemm<G>" in kernels[name].call:
            assert found.count("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32")
            assert not found.sass or found.count("IMMA.16832.S8.S8")
