"""Quantised weights times one row: held while constants are folded, read as codes by kernels."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cuda_cases import ARCHS, needs_compiler
from cuda_modules import EmulatedModule, launches, selected

from icd_tvm._tvm import apply_pass, const_name, named_const, relax, tvm
from icd_tvm.adapters.quant import parse_quant
from icd_tvm.measure.cuda_inspect import inspect_kernels
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.mamba import (
    MambaConfig,
    build_mamba_step,
    mamba_states,
    random_mamba_weights,
)
from icd_tvm.relax_passes.apply_quant import ApplyQuant
from icd_tvm.relax_passes.attach_layout_tags import AttachLayoutTags
from icd_tvm.relax_passes.cuda_weight_only import codes_of
from icd_tvm.relax_passes.held_product import Codes, held_product
from icd_tvm.relax_passes.hold_weight_only import HoldWeightOnly
from icd_tvm.relax_passes.layer_rules import parse_request
from icd_tvm.relax_passes.lower_cuda import lower_cuda
from icd_tvm.relax_passes.quantized_operands import Weight
from icd_tvm.relax_passes.select_cuda_kernels import SelectCudaKernels, read_cuda_kernels
from icd_tvm.tir_schedules.target import cuda_target

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
K, N = 192, 128
MAMBA = MambaConfig(2, hidden=64, vocab=96, state=8, dt_rank=16)


def weight(k: int = K, n: int = N, *, dead: bool = False) -> np.ndarray:
    w = np.random.default_rng(k + n).standard_normal((k, n)).astype(np.float32)
    for group in range(n // 64 if dead else 0):
        for block in range(group % 2, k // 16, 2):
            w[block * 16 : block * 16 + 16, group * 64 : group * 64 + 64] = 0
    return w


def module(w: np.ndarray, rows: int = 1, activation: Any = relax.op.nn.silu) -> Any:
    """Return ``activation(x w + bias) + r``."""
    bias = np.linspace(-1, 1, w.shape[1], dtype=np.float32)
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((rows, len(w)), "float32"))
    r = relax.Var("r", relax.TensorType((rows, w.shape[1]), "float32"))
    with builder.function("main", [x, r]):
        with builder.dataflow():
            total = builder.emit(relax.op.matmul(x, named_const(w, "w")), "product")
            total = builder.emit(relax.op.add(total, named_const(bias, "b")))
            out = builder.emit_output(relax.op.add(builder.emit(activation(total)), r))
        builder.emit_func_output(out)
    return builder.get()


def quantised(mod: Any, spec: str) -> Any:
    return apply_pass(ApplyQuant(parse_request(f"{spec}; min-size=0", parse_quant)), mod)


def constants(mod: Any) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}

    def visit(expr: Any) -> None:
        if isinstance(expr, tvm.ir.GenericConst):
            found[const_name(expr)] = expr.value.numpy()

    relax.analysis.post_order_visit(mod["main"], visit)
    return found


def run(mod: Any, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Return the outputs of a Relax module on the CPU, its weights dequantised."""
    executable = tvm.compile(mod, tvm.target.Target({"kind": "llvm", "opt-level": 0}))
    names = [str(param.name) for param in mod["main"].params]
    machine = relax.VirtualMachine(executable, tvm.cpu())
    found = machine["main"](*(tvm.runtime.tensor(feeds[name]) for name in names))
    outputs = [found] if isinstance(found, tvm.runtime.Tensor) else list(found)
    return [output.numpy() for output in outputs]


@pytest.mark.parametrize(
    ("spec", "dead", "words", "dtype", "shape", "scales"),
    [
        ("int8", False, "int8 times float16, scales by row, dense", "int8", (N, K), (N,)),
        ("int8", True, "int8 times float16, scales by row, live blocks", "int8", (N, 128), (N,)),
        ("int8:group64", False, "and 64 inputs, dense", "int8", (N, K), (N, 3)),
        ("int4:group64", False, "int4 times float16, scales by row", "uint8", (N, 96), (N, 3)),
        ("int4:channel:asym", False, "int8 times float16", "int8", (N, K), (N,)),
    ],
)  # fmt: skip
def test_codes_become_the_operand_of_one_kernel(
    spec: str, dead: bool, words: str, dtype: str, shape: Any, scales: Any
) -> None:
    before = quantised(module(weight(dead=dead)), spec)
    copy = tvm.ir.load_json(tvm.ir.save_json(before))
    after, chosen = selected(before)
    tvm.ir.assert_structural_equal(before, copy)
    relax.analysis.well_formed(after)  # raises where it is not
    (choice,) = read_cuda_kernels(after).values()
    assert choice.kind == "gemv"
    assert words in choice.reason
    assert choice.fused == ("bias", "silu", "residual")
    assert choice.live == (8 if dead else 0)
    found = constants(after)
    assert (found["w"].dtype, found["w"].shape) == (dtype, shape)
    assert found["w.scale"].shape == scales
    assert ("w.blocks" in found) is dead
    assert len(chosen.kernels) == 1


@needs_compiler
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_kernels_compute_the_quantised_product(dtype: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    feeds = {"x": rng.standard_normal((1, K)).astype(np.float32)}
    feeds["r"] = rng.standard_normal((1, N)).astype(np.float32)
    cases = [("int8", False), ("int8", True), ("int8:group64", True), ("int4:group64", False)]
    for number, (spec, dead) in enumerate(cases):
        mod = quantised(module(weight(dead=dead)), spec)
        made, chosen = selected(mod, dtype)
        folder = tmp_path / str(number)
        folder.mkdir()
        (found,), (right,) = EmulatedModule(made, chosen, folder)(feeds), run(mod, feeds)
        # The input is rounded; sums and the rest are float32.
        allowed = {"float16": 2e-3, "bfloat16": 2e-2}[dtype] * np.abs(right).max()
        assert np.abs(found - right).max() <= allowed, spec
        scaled = chosen.kernels
        assert [kernel.family for kernel in scaled.values()] == ["gemv"]


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_spill_nothing_and_read_16_bytes(arch: str, tmp_path: Path) -> None:
    kernels = []
    for spec, dead in (("int8", False), ("int8:group64", True), ("int4:group64", False)):
        mod = quantised(module(weight(dead=dead)), spec)
        kernels += selected(mod, "float16", arch=arch)[1].kernels.values()
    for item in inspect_kernels(kernels, arch, tmp_path).values():
        assert (item.spilled, item.stack) == (0, 0)
        assert any(name.startswith("ld.global.nc.L1::no_allocate.v4.u32") for name in item.ptx)


@needs_compiler
def test_a_scale_of_another_row_is_noticed(tmp_path: Path) -> None:
    mod = quantised(module(weight() * np.linspace(0.1, 2, N, dtype=np.float32)), "int8")
    feeds = {"x": np.ones((1, K), np.float32), "r": np.zeros((1, N), np.float32)}
    right = run(mod, feeds)[0]
    held = apply_pass(HoldWeightOnly(), mod)
    values = [b.value for b in held["main"].body.blocks[0].bindings]
    (call,) = [value for value in values if held_product(value) is not None]
    parts = held_product(call)
    assert parts is not None
    wrong = named_const(np.roll(parts.codes.scales, 1), "w.scale")
    swapped = parts._replace(scale=wrong).call()
    text = held["main"]
    block = text.body.blocks[0]
    bindings = [
        relax.VarBinding(b.var, swapped) if b.value.same_as(call) else b for b in block.bindings
    ]
    body = relax.SeqExpr([relax.DataflowBlock(bindings)], text.body.body)
    held["main"] = relax.Function(text.params, body, text.ret_ty, text.is_pure, text.attrs)
    made, chosen = selected(held)
    found = EmulatedModule(made, chosen, tmp_path)(feeds)[0]
    assert np.abs(found - right).max() > 0.01 * np.abs(right).max()


@pytest.mark.parametrize(
    ("k", "rows", "spec", "reason"),
    [
        (K, 8, "int8", "its input has 8 rows: the kernel multiplies one vector"),
        (120, 1, "int8", "no whole 16 bytes"),
        (K, 1, "int8:group24", "no whole 16 bytes"),
        (K, 1, "int8:asym", "quantise symmetrically"),
    ],
)
def test_what_does_not_fit_says_why_and_is_read_as_floats(
    k: int, rows: int, spec: str, reason: str
) -> None:
    # All codes are in use on one side of the zero point.
    w = np.abs(weight(k)) + 0.5 if "asym" in spec else weight(k)
    mod = quantised(module(w, rows), spec)
    hold = HoldWeightOnly()
    held = apply_pass(hold, mod)
    assert list(hold.refused) == ["product"]
    assert hold.held == []
    tvm.ir.assert_structural_equal(held["main"], mod["main"])
    after, _ = selected(mod)
    (choice,) = read_cuda_kernels(after).values()
    assert choice.kind == ("gemm" if rows > 1 else "gemv")
    assert "float16" in choice.reason
    assert reason in choice.reason
    assert constants(after)["w"].dtype == np.float16 if "w" in constants(after) else True


def test_codes_of_other_weights() -> None:
    values = np.arange(-8, 8, dtype=np.int8).repeat(2).reshape(16, 2)
    zero, one = np.zeros((1, 1), np.int8), np.ones((1, 1), np.float32)
    assert "without scales" in str(codes_of(Weight(values, zero, None, "w")))
    found = codes_of(Weight(values, zero, one, "w"))
    assert isinstance(found, Codes)
    assert found.group == 0
    assert found.scales.tolist() == [1, 1]
    assert found.widths == ["int4", "int8"]
    raised = codes_of(Weight((values + 100).astype(np.uint8), zero + 100, one, "w"))
    assert isinstance(raised, Codes)
    np.testing.assert_array_equal(raised.codes, values)
    # Zero points by row do not make groups where scales do not.
    rows = codes_of(Weight(values, np.arange(16, dtype=np.int8)[:, None] % 2, one, "w"))
    assert isinstance(rows, Codes)
    assert rows.group == 0
    by_group = np.repeat(np.float32([[1, 2], [3, 4]]), 8, axis=0)
    grouped = codes_of(Weight(values, zero, by_group, "w"))
    assert isinstance(grouped, Codes)
    assert grouped.group == 8
    assert grouped.scales.tolist() == [[1, 3], [2, 4]]


def mamba(tmp_path: Path) -> Any:
    path = tmp_path / "mamba.onnx"
    onnx.save(build_mamba_step(MAMBA, random_mamba_weights(MAMBA)), str(path))
    mod = apply_pass(AttachLayoutTags(opaque_states=mamba_states(MAMBA)), import_onnx(path).mod)
    return quantised(mod, "int8")


@needs_compiler
def test_a_mamba_step_of_codes_equals_the_dequantised_one(tmp_path: Path) -> None:
    mod = mamba(tmp_path)
    made, chosen = selected(mod, "float16", mamba_states(MAMBA))
    kinds = [one.reason.split(",")[0] for one in chosen.choices.values() if one.kind == "gemv"]
    assert sorted(kinds) == ["float16", *["int8 times float16"] * 8]  # the head, and four a layer
    assert not [one for one in chosen.choices.values() if one.kind == "tvm"]
    emulated = EmulatedModule(made, chosen, tmp_path)
    rng = np.random.default_rng(0)
    params = [(str(p.name), [int(n) for n in p.ty.shape]) for p in mod["main"].params]
    feeds = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in params[1:]}
    for step in range(3):
        feeds[params[0][0]] = np.array([step * 7 + 1])
        expected = run(mod, feeds)
        for found, right in zip(emulated(feeds), expected, strict=True):
            assert np.abs(found - right).max() <= 0.01 * np.abs(right).max(), step
        assert len(emulated.calls) >= 14
        states = mamba_states(MAMBA)
        feeds |= {old: expected[1 + place] for place, (old, _) in enumerate(states)}


def test_a_layer_of_codes_has_as_many_launches(tmp_path: Path) -> None:
    low = lower_cuda(mamba(tmp_path), cuda_target("sm_90"), "float16")
    names = launches(low)
    assert len(names) == 2 * 7 + 3, names
    found = constants(low)
    codes = [name for name, array in found.items() if array.dtype == np.int8]
    assert len(codes) == 8
    assert "R.dequantize" not in str(low["main"])


def test_without_a_precision_weights_become_floats(tmp_path: Path) -> None:
    low = lower_cuda(mamba(tmp_path), cuda_target("sm_90"))
    assert not [a for a in constants(low).values() if a.dtype == np.int8]
    assert SelectCudaKernels("sm_90").choices == {}
