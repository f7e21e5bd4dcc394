"""Matmuls of a module become CUDA kernels whose packed constants compute the same."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from cuda_emulation import Emulated
from tvm import relax

from icd_tvm._tvm import apply_pass, const_name, named_const
from icd_tvm.cli import main
from icd_tvm.errors import TransformError
from icd_tvm.measure.cuda_reference import run_rule
from icd_tvm.relax_passes import select_cuda_kernels
from icd_tvm.relax_passes.cuda_products import product_kernels
from icd_tvm.relax_passes.int8_product import CodesCall
from icd_tvm.relax_passes.select_cuda_kernels import (
    CudaChoice,
    SelectCudaKernels,
    read_cuda_kernels,
)
from icd_tvm.tir_schedules.cuda.gemm import unpack_weight
from icd_tvm.tir_schedules.cuda.source_kernel import Epilogue

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on the path")
M, K, N = 8, 192, 128


def weight(k: int = K, n: int = N, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((k, n)).astype(np.float32)


def half_dead(k: int = K, n: int = N) -> np.ndarray:
    """Return a weight with half of its blocks of 16 rows dead, others in each 64 columns."""
    w = weight(k, n)
    for group in range(n // 64):
        for block in range(group % 2, k // 16, 2):
            w[block * 16 : block * 16 + 16, group * 64 : group * 64 + 64] = 0
    return w


def module(w: np.ndarray, lead: tuple[int, ...] = (2, 4), *, twice: bool = False) -> tvm.IRModule:
    """Return ``x w + bias``; the product is also an output if ``twice``."""
    bias = weight(1, w.shape[1], 1)[0]
    builder, x = relax.BlockBuilder(), relax.Var("x", relax.TensorType((*lead, len(w)), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            product = builder.emit(relax.op.matmul(x, named_const(w, "w")))
            total = builder.emit(relax.op.add(product, named_const(bias, "b")))
            result = builder.emit_output(relax.Tuple([product, total]) if twice else total)
        builder.emit_func_output(result)
    return builder.get()


def lowered(mod: tvm.IRModule, dtype: str = "float16") -> tvm.IRModule:
    return relax.transform.DeadCodeElimination()(apply_pass(SelectCudaKernels("sm_90", dtype), mod))


def bound(mod: tvm.IRModule) -> list[Any]:
    return [b.value for block in mod["main"].body.blocks for b in block.bindings]


def constants(mod: tvm.IRModule) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}

    def visit(expr: Any) -> None:
        if isinstance(expr, tvm.ir.GenericConst):
            found[const_name(expr)] = expr.value.numpy()

    relax.analysis.post_order_visit(mod["main"], visit)
    return found


def operators(mod: tvm.IRModule) -> list[str]:
    return [str(value.op.name) for value in bound(mod) if isinstance(value, tvm.ir.Call)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_matmul_and_bias_become_one_kernel(dtype: str) -> None:
    before = module(weight())
    copy = tvm.ir.load_json(tvm.ir.save_json(before))
    after = lowered(before, dtype)
    tvm.ir.assert_structural_equal(before, copy)
    relax.analysis.well_formed(after)  # raises where it is not
    names = operators(after)
    assert names[0] == "relax.astype"
    assert set(names[1:]) == {"relax.call_tir"}
    (choice,) = read_cuda_kernels(after).values()
    assert choice == CudaChoice("gemm", 0, f"{dtype}, dense", ("bias",))
    found = constants(after)
    assert set(found) == {"w", "b"}
    expected = weight().astype(found["w"].dtype)
    np.testing.assert_array_equal(unpack_weight(found["w"], K, N), expected)


def test_product_that_is_used_twice_keeps_its_bias_apart() -> None:
    after = lowered(module(weight(), twice=True))
    names = operators(after)
    assert names[-1] == "relax.add"
    assert "relax.matmul" not in names
    (choice,) = read_cuda_kernels(after).values()
    assert choice.fused == ()
    assert "read 2 times" in choice.reason


@pytest.mark.parametrize(("lead", "kind"), [((2, 4), "gemm"), ((1, 1), "gemv")])
def test_dead_blocks_are_left_out(lead: tuple[int, ...], kind: str) -> None:
    after = lowered(module(half_dead(), lead))
    (choice,) = read_cuda_kernels(after).values()
    assert (choice.kind, choice.live) == (kind, 8)
    found = constants(after)
    assert set(found) == {"w", "w.blocks", "b"}
    # Six live blocks of twelve, to whole tiles.
    assert found["w"].size == N * 8 * 16
    np.testing.assert_array_equal(found["w.blocks"][0][:6], np.arange(1, 12, 2))


@pytest.mark.parametrize(
    ("w", "reason"), [(weight(60), "16 bytes"), (weight() * 1e6, "beyond the range of float16")]
)
def test_what_does_not_fit_stays_with_a_reason(w: np.ndarray, reason: str) -> None:
    before = module(w)
    after = apply_pass(SelectCudaKernels("sm_90"), before)
    assert "relax.matmul" in operators(after)
    (choice,) = read_cuda_kernels(after).values()
    assert choice.kind == "tvm"
    assert reason in choice.reason


def codes_by_row() -> tvm.IRModule:
    """Return the codes of rows with their steps and zero points."""
    builder, x = relax.BlockBuilder(), relax.Var("x", relax.TensorType((M, K), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            made = builder.emit(CodesCall(x).call())
            parts = [builder.emit(relax.TupleGetItem(made, i)) for i in range(3)]
            result = builder.emit_output(relax.Tuple(parts))
        builder.emit_func_output(result)
    return builder.get()


def test_outputs_in_another_order_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    before, find = codes_by_row(), select_cuda_kernels.find_kernels
    (choice,) = read_cuda_kernels(lowered(before)).values()
    assert choice.kind == "codes"

    def turned(*args: Any) -> Any:
        found = find(*args)
        for name, plan in found.plans.items():
            found.plans[name] = replace(plan, states=dict(reversed(plan.states.items())))
        return found

    monkeypatch.setattr(select_cuda_kernels, "find_kernels", turned)
    with pytest.raises(TransformError, match="codes makes row_zero, row_scale, a result"):
        lowered(before)


@needs_compiler
@pytest.mark.parametrize("dead", [False, True])
def test_chosen_kernels_compute_the_product(dead: bool, tmp_path: Path) -> None:
    w = half_dead() if dead else weight()
    rng = np.random.default_rng(2)
    cases = []
    for m in (1, M):
        kernels = product_kernels(m, w, "float16", "sm_90")
        rule, packed = kernels.make(Epilogue(bias=True), "float32"), kernels.constants
        x = rng.standard_normal((m, K)).astype(np.float16)
        given = {**packed, "bias": weight(1, N, 1)[0], "a" if m > 1 else "x": x}
        cases.append((rule, given, x))
    emulated = Emulated([kernel for rule, _, _ in cases for kernel in rule.kernels], tmp_path)
    for rule, given, x in cases:
        found = run_rule(rule, given, emulated.run)[rule.kernels[-1].arguments[-1].name]
        expected = x.astype(float) @ w.astype(np.float16).astype(float) + given["bias"]
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_precision_without_cuda_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "minilm", "--precision", "float16"]) == 2
    assert "are for --target cuda" in capsys.readouterr().err
