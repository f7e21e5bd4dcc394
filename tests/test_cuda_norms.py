"""CUDA norms, appends and kernels on parts of arrays, executed on the CPU against float64."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from cuda_cases import EPS, ORDERS, close, needs_compiler
from cuda_emulation import Emulated, numpy_dtype

from icd_tvm.measure.cuda_inspect import inspect_kernels
from icd_tvm.tir_schedules.cuda.append import append_rule
from icd_tvm.tir_schedules.cuda.attention import attention_rule
from icd_tvm.tir_schedules.cuda.decode_attention import decode_attention_rule
from icd_tvm.tir_schedules.cuda.mamba_step import conv_step_rule, scan_step_rule
from icd_tvm.tir_schedules.cuda.norm import norm_rule
from icd_tvm.tir_schedules.cuda.placed import in_place, placed
from icd_tvm.tir_schedules.cuda.source_kernel import Rule, SourceKernel


@dataclass(frozen=True)
class Norm:
    rows: int
    width: int
    x: str
    out: str
    centre: bool
    residual: bool = False

    def rule(self) -> Rule:
        return norm_rule(
            self.rows, self.width, self.x, self.out, 1e-5,
            centre=self.centre, beta=self.centre, residual=self.residual,
        )  # fmt: skip


NORMS = {
    "few rows share warps": Norm(3, 1000, "float16", "float16", True),
    "a warp for a row": Norm(1030, 66, "float32", "float16", True, residual=True),
    "rms": Norm(1, 2560, "float32", "float32", False),
    "rms bf16": Norm(5, 48, "bfloat16", "bfloat16", False, residual=True),
}
# heads, key-value heads, slots, size, dtype, cache
APPENDS = {
    "fp16": (6, 2, 9, 64, "float16", "float16"),
    "fp32": (2, 2, 5, 32, "bfloat16", "float32"),
}


def kernel(rule: Rule) -> SourceKernel:
    (found,) = rule.kernels
    return found


PLACED = placed(kernel(conv_step_rule(40, "float16")), {"x": (1, 96)}, {"x": 48})
INSIDE = in_place(kernel(conv_step_rule(40, "float16")), {"window_out": "window"})
SCAN = kernel(scan_step_rule(24, 8, "float16", shared="float16"))
MERGED = kernel(attention_rule(2, 20, 20, 2, 32, "float16", merged=True))
DECODE = decode_attention_rule(1, 2, 3, 70, 64, "float16", cache="float32")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    kernels = [kernel(case.rule()) for case in NORMS.values()]
    kernels += [kernel(append_rule(*sizes, cache=cache)) for *sizes, cache in APPENDS.values()]
    kernels += [PLACED, INSIDE, SCAN, MERGED, *DECODE.kernels]
    return Emulated(kernels, tmp_path_factory.mktemp("emulated"))


def pointers(kernel: SourceKernel, arrays: dict[str, np.ndarray]) -> list[int]:
    return [arrays[a.name].ctypes.data for a in kernel.arguments]


@needs_compiler
@pytest.mark.parametrize("name", NORMS)
def test_norm_equals_float64(name: str, emulated: Emulated) -> None:
    case, rng = NORMS[name], np.random.default_rng(0)
    shape = (case.rows, case.width)
    # Far from zero: a variance by the mean of squares would cancel.
    given = {"x": (rng.standard_normal(shape) + 30).astype(numpy_dtype(case.x))}
    if case.residual:
        given["residual"] = rng.standard_normal(shape).astype(numpy_dtype(case.x))
    given["gamma"] = rng.standard_normal(case.width).astype(np.float32)
    if case.centre:
        given["beta"] = rng.standard_normal(case.width).astype(np.float32)
    h = given["x"].astype(float) + given.get("residual", np.zeros(1)).astype(float)
    h = h - h.mean(1, keepdims=True) if case.centre else h
    expected = h / np.sqrt((h**2).mean(1, keepdims=True) + 1e-5) * given["gamma"]
    expected = expected + given.get("beta", 0.0)
    for order in ORDERS:
        found = emulated.run(kernel(case.rule()), given, order)["out"]
        close(found, expected, case.out, case.width, 30)


def test_norm_without_a_kernel_says_why() -> None:
    assert "rows of 33" in norm_rule(4, 33, "float32", "float32", 1e-5, centre=True).reason
    assert "no norm of int8" in norm_rule(4, 32, "int8", "float32", 1e-5, centre=True).reason


@needs_compiler
@pytest.mark.parametrize("slot", [0, 4, 9, -1])
@pytest.mark.parametrize("name", APPENDS)
def test_append_writes_one_slot_and_rotates(name: str, slot: int, emulated: Emulated) -> None:
    heads, kv_heads, slots, size, dtype, cache = APPENDS[name]
    rng, kind = np.random.default_rng(slot + 1), numpy_dtype(dtype)
    arrays = {
        key: rng.standard_normal((count, size)).astype(kind)
        for key, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    }
    arrays |= {key: rng.standard_normal(size).astype(np.float32) for key in ("cos", "sin")}
    for key in ("keys", "values"):
        arrays[key] = rng.standard_normal((kv_heads, slots, size)).astype(numpy_dtype(cache))
    arrays |= {"length": np.array([slot]), "q_out": np.zeros((heads, size), kind)}
    before = {key: array.copy() for key, array in arrays.items()}

    def rotated(rows: np.ndarray) -> np.ndarray:
        first, second = np.split(rows.astype(float), 2, axis=1)
        return (
            rows.astype(float) * before["cos"] + np.concatenate([-second, first], 1) * before["sin"]
        )

    one = kernel(append_rule(heads, kv_heads, slots, size, dtype, cache=cache))
    emulated.launch(one, pointers(one, arrays), order=2)
    close(arrays["q_out"], rotated(before["q"]), dtype, 2, 8)
    for key, rows in (("keys", rotated(before["k"])), ("values", before["v"].astype(float))):
        kept = np.arange(slots) != slot
        np.testing.assert_array_equal(arrays[key][:, kept], before[key][:, kept])
        if not kept.all():
            close(arrays[key][:, slot], rows, cache, 2, 8)


def test_append_without_a_kernel_says_why() -> None:
    assert "int8" in append_rule(2, 2, 8, 64, "float16", cache="int8").reason
    assert "heads of 40" in append_rule(2, 2, 8, 40, "float16").reason


@needs_compiler
def test_kernels_read_from_an_element_on_and_write_states_in_place(emulated: Emulated) -> None:
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((1, 96)).astype(np.float16)
    arrays = {
        "x": wide[0, 48:88].copy(),
        "window": rng.standard_normal((40, 4)).astype(np.float32),
        "weight": rng.standard_normal((40, 4)).astype(np.float32),
        "bias": rng.standard_normal(40).astype(np.float32),
        "window_out": np.zeros((40, 4), np.float32),
        "out": np.zeros(40, np.float16),
    }
    first = {**arrays, "out": np.zeros(40, np.float16), "x": wide}
    emulated.launch(PLACED, pointers(PLACED, first))
    assert [a.name for a in INSIDE.arguments] == ["x", "window", "weight", "bias", "out"]
    moved = np.concatenate([arrays["window"][:, 1:], arrays["x"][:, None]], 1)
    emulated.launch(INSIDE, pointers(INSIDE, arrays), order=2)
    np.testing.assert_array_equal(arrays["window"], moved)
    np.testing.assert_array_equal(first["window_out"], moved)
    np.testing.assert_array_equal(first["out"], arrays["out"])
    sums = (moved.astype(float) * arrays["weight"]).sum(1) + arrays["bias"]
    close(arrays["out"], sums / (1 + np.exp(-sums)), "float16", 4, 16)


@needs_compiler
def test_scan_reads_narrow_b_and_c(emulated: Emulated) -> None:
    rng = np.random.default_rng(0)
    given = {key: rng.standard_normal(24).astype(np.float16) for key in ("x", "z", "dt")}
    given["state"] = rng.standard_normal((24, 8)).astype(np.float32)
    given["a"] = -rng.random((24, 8)).astype(np.float32)
    given |= {key: rng.standard_normal(8).astype(np.float16) for key in "bc"}
    given |= {key: rng.standard_normal(24).astype(np.float32) for key in ("d", "dt_bias")}
    f = {key: array.astype(float) for key, array in given.items()}
    step = np.logaddexp(0, f["dt"] + f["dt_bias"])
    state = f["state"] * np.exp(step[:, None] * f["a"]) + (step * f["x"])[:, None] * f["b"]
    y = (state @ f["c"] + f["d"] * f["x"]) * f["z"] / (1 + np.exp(-f["z"]))
    found = emulated.run(SCAN, given)
    np.testing.assert_allclose(found["state_out"], state, rtol=2e-5, atol=2e-5)
    close(found["out"], y, "float16", 8, 16 * np.abs(state).max())


@needs_compiler
def test_attention_reads_rows_of_one_product(emulated: Emulated) -> None:
    qkv = np.random.default_rng(0).standard_normal((2, 20, 3, 2, 32)).astype(np.float16)
    mask = np.where(np.arange(20) < [[20], [7]], 0, -3e38).astype(np.float32)
    q, k, v = (qkv[:, :, i].astype(float) for i in range(3))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(32) + mask[:, None, None]
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhqk,bkhd->bqhd", weights, v)
    found = emulated.run(MERGED, {"qkv": qkv, "mask": mask}, order=2)["out"]
    assert np.abs(found - expected).max() <= 4 * EPS["float16"] * np.abs(v).max()
    assert "same rows" in attention_rule(1, 4, 5, 1, 64, "float16", merged=True).reason


@needs_compiler
def test_decode_attention_reads_a_float32_cache(emulated: Emulated) -> None:
    rng = np.random.default_rng(0)
    given = {"q": rng.standard_normal((1, 2, 3, 64)).astype(np.float16)}
    given |= {key: rng.standard_normal((1, 2, 70, 64)).astype(np.float32) for key in "kv"}
    given["live"] = np.array([[70, 3]], np.int32)
    partial, combine = DECODE.kernels
    parts = emulated.run(partial, given, order=2)
    found = emulated.run(combine, parts)["out"]
    for head, live in enumerate((70, 3)):
        k, v = (given[key][0, head, :live].astype(float) for key in "kv")
        scores = given["q"][0, head].astype(float) @ k.T / 8
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected = weights / weights.sum(-1, keepdims=True) @ v
        assert np.abs(found[0, head] - expected).max() <= 2 * EPS["float16"] * np.abs(v).max()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
def test_kernels_compile_without_spills(tmp_path: Path) -> None:
    kernels = [kernel(case.rule()) for case in NORMS.values()] + [PLACED, INSIDE, SCAN]
    kernels += [kernel(append_rule(*sizes, cache=cache)) for *sizes, cache in APPENDS.values()]
    for one in inspect_kernels([*kernels, *DECODE.kernels], "sm_90", tmp_path).values():
        assert (one.spilled, one.stack) == (0, 0)
        assert one.registers <= 128
