"""Modules whose weights are 2:4 or have strays beside live blocks: their kernels, or why not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cuda_cases import needs_compiler, plant
from cuda_modules import EmulatedModule, launches, selected
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from relax_models import constants
from test_cuda_modules import bert, feeds_of, reference
from test_cuda_two_four import two_four
from test_cuda_weight_only import module as product

from benchmarks.gpu.build_models import Device
from icd_tvm._tvm import apply_pass, named_const, relax
from icd_tvm.adapters.sparsity import parse_sparsity
from icd_tvm.errors import MeasurementError
from icd_tvm.measure.cuda_inspect import inspect_kernels
from icd_tvm.models.importer import import_onnx
from icd_tvm.relax_passes.apply_sparsity import ApplySparsity
from icd_tvm.relax_passes.cuda_plan import ProductKernels
from icd_tvm.relax_passes.cuda_products import product_kernels
from icd_tvm.relax_passes.kernel_calls import kernel_calls, owners
from icd_tvm.relax_passes.layer_rules import parse_request
from icd_tvm.relax_passes.lower_cuda import lower_cuda
from icd_tvm.relax_passes.select_cuda_kernels import read_cuda_kernels
from icd_tvm.tir_schedules.cuda.archs import CUDA_ARCHS
from icd_tvm.tir_schedules.cuda.gemm import unpack_weight
from icd_tvm.tir_schedules.cuda.gemm_24 import TwoFour, unpack_two_four
from icd_tvm.tir_schedules.cuda.strays import Strays, unpack_strays
from icd_tvm.tir_schedules.target import cuda_target

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
REQUEST = "2:4; *attention*=2:4; min-size=0"
MMA = "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32."
# Rows, and the sizes of a weight whose blocks and strays pay.
M, K, N = 24, 256, 1024


def pruned(layers: int = 1, request: str = REQUEST) -> tuple[onnx.ModelProto, Any]:
    """Return an encoder with every matrix pruned, and its module."""
    model, _ = bert(layers)
    rules = parse_request(request, parse_sparsity)
    mod = apply_pass(ApplySparsity(rules), import_onnx(model).mod)
    known = constants(mod)
    for one in model.graph.initializer:
        if one.name in known:
            one.CopyFrom(numpy_helper.from_array(known[one.name], one.name))
    return model, mod


def blocks_and_strays(dtype: Any = np.float32) -> np.ndarray:
    """Return a weight with one of four blocks alive in each group, and single elements beside."""
    rng = np.random.default_rng(0)
    alive = np.arange(K // 16)[:, None] % 4 == np.arange(N // 64) % 4
    mask = np.kron(alive, np.ones((16, 64))) + (rng.random((K, N)) < 1e-3) > 0
    return np.where(mask, rng.standard_normal((K, N)), 0).astype(dtype)


def module(w: np.ndarray, rows: int = M) -> Any:
    """Return ``relu(x w + b) + r``."""
    return product(w, rows, relax.op.nn.relu)


def compare(w: np.ndarray, folder: Path, dtype: str, error: float) -> EmulatedModule:
    """Run a module in the emulator and hold it against float64."""
    rng, mod = np.random.default_rng(1), module(w)
    feeds = {"x": rng.standard_normal((M, len(w))), "r": rng.standard_normal((M, w.shape[1]))}
    feeds = {name: array.astype(np.float32) for name, array in feeds.items()}
    emulated = EmulatedModule(*selected(mod, dtype), folder)
    (found,) = emulated(feeds)
    sums = feeds["x"].astype(float) @ w + np.linspace(-1, 1, w.shape[1])
    expected = np.maximum(sums, 0) + feeds["r"]
    assert np.abs(found - expected).max() <= error * np.abs(expected).max()
    return emulated


@needs_compiler
@pytest.mark.parametrize(("dtype", "allowed"), [("float16", 0.01), ("bfloat16", 0.06)])
def test_a_two_four_encoder_equals_onnx_runtime(dtype: str, allowed: float, tmp_path: Path) -> None:
    model, mod = pruned()
    made, chosen = selected(mod, dtype)
    products = [one for one in chosen.choices.values() if one.kind.startswith("gemm")]
    assert {(one.kind, one.reason) for one in products} == {("gemm_24", f"{dtype}, 2:4")}
    assert sorted(one.fused for one in products) == [
        ("bias",), ("bias", "gelu"), ("bias", "residual"), ("bias", "residual"),
    ]  # fmt: skip
    session, emulated = reference(model), EmulatedModule(made, chosen, tmp_path)
    feeds = feeds_of(session, 0)
    (found,), (right,) = emulated(feeds), session.run(None, feeds)
    assert np.abs(found - right).max() <= allowed * np.abs(right).max()
    assert len([name for name in emulated.calls if "gemm_24" in name]) == 4


@needs_compiler
def test_places_of_other_rows_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "lane / 4 * 2 + lane % 2]", "lane / 4 + lane % 2]", "gemm_24")
    model, mod = pruned()
    session, emulated = reference(model), EmulatedModule(*selected(mod), tmp_path)
    feeds = feeds_of(session, 0)
    (found,), (right,) = emulated(feeds), session.run(None, feeds)
    assert np.abs(found - right).max() > 0.01 * np.abs(right).max()


def test_a_layer_has_as_many_launches_and_half_of_the_weight() -> None:
    low = [lower_cuda(pruned(layers)[1], cuda_target("sm_90"), "float16") for layers in (1, 2)]
    first, second = (launches(mod) for mod in low)
    assert len(second) - len(first) == 7, second
    _, mod = pruned()
    found = constants(selected(mod)[0])
    for name, array in constants(mod).items():
        if f"{name}.places" in found:
            packed = TwoFour(found[name], found[f"{name}.places"])
            rounded = array.astype(np.float16)
            np.testing.assert_array_equal(unpack_two_four(packed, *array.shape), rounded)
    # QKV is one weight of three.
    assert len([name for name in found if name.endswith(".places")]) == 4


def along_outputs(k: int, n: int) -> np.ndarray:
    return two_four(np.random.default_rng(2), n, k).T.astype(np.float32)


def along_inputs(k: int, n: int) -> np.ndarray:
    return two_four(np.random.default_rng(2), k, n).astype(np.float32)


def half_dead(k: int, n: int) -> np.ndarray:
    """Return a 2:4 weight with a quarter of its blocks alive."""
    alive = np.arange(k // 16)[:, None] % 4 == np.arange(n // 64) % 4
    return along_inputs(k, n) * np.kron(alive, np.ones((16, 64), np.float32))


@pytest.mark.parametrize(
    ("w", "rows", "kind", "reason"),
    [
        (along_inputs(128, 128), M, "gemm_24", "float16, 2:4"),
        (along_outputs(128, 128), M, "gemm", "not 2:4: "),
        (along_outputs(128, 128), M, "gemm", "prune with n:m 2:4 along the inputs"),
        (along_inputs(128, 128), 1, "gemv", "of which the kernels of one row make no use"),
        (along_inputs(1024, 128), 8, "gemm", "2:4, but 8 rows want parts of K"),
        (half_dead(256, 128), M, "gemm", "float16, live blocks"),
        (along_inputs(60, 64), M, "tvm", "16 bytes"),
        (np.ones((128, 128), np.float32), M, "gemm", "float16, dense"),
    ],
)
def test_what_is_not_two_four_says_why(w: np.ndarray, rows: int, kind: str, reason: str) -> None:
    (choice,) = read_cuda_kernels(selected(module(w, rows))[0]).values()
    assert choice.kind == kind
    assert reason in choice.reason
    assert ("not 2:4" in choice.reason) == ("2:4 along" in reason or "not 2:4" in reason)


@pytest.mark.parametrize(
    ("k", "rows", "words"), [(256, 1, "live blocks"), (200, 1, "dense"), (200, M, "live blocks")]
)
def test_a_vector_without_whole_blocks_has_dense_kernels(k: int, rows: int, words: str) -> None:
    w = np.where(np.arange(k)[:, None] < 64, along_inputs(k, 128), 0).astype(np.float32)
    (choice,) = read_cuda_kernels(selected(module(w, rows))[0]).values()
    assert choice.kind == ("gemv" if rows == 1 else "gemm")
    assert choice.reason.startswith(f"float16, {words}")


def test_a_product_without_rows_stays_with_a_reason() -> None:
    (choice,) = read_cuda_kernels(selected(module(along_inputs(64, 64), 0))[0]).values()
    assert (choice.kind, choice.reason) == ("tvm", "it has no rows")


def of_one_row(*weights: np.ndarray) -> Any:
    """Return products of one row, each named after its columns."""
    x = relax.Var("x", relax.TensorType((1, len(weights[0])), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            found = [(w.shape[1], named_const(w, f"w{w.shape[1]}")) for w in weights]
            parts = [builder.emit(relax.op.matmul(x, w), f"product{n}") for n, w in found]
            out = builder.emit_output(relax.Tuple([builder.emit(relax.op.exp(p)) for p in parts]))
        builder.emit_func_output(out)
    return builder.get()


def test_other_widths_do_not_move_the_columns_of_live_blocks() -> None:
    listed, others = half_dead(256, 128), [np.ones((256, n), np.float32) for n in (96, 72)]
    made, chosen = selected(of_one_row(others[0], listed, others[1]))
    assert {name: one.live for name, one in chosen.choices.items()} == {
        "product128": 4,
        "w96+w72": 0,
    }
    reason = read_cuda_kernels(made)["product128"].reason
    assert "its weight is floats, others of its row are floats in no groups of 64 columns" in reason
    _, chosen = selected(of_one_row(others[0], np.ones((256, 128), np.float32), others[1]))
    assert list(chosen.choices) == ["w96+w128+w72"]
    _, chosen = selected(of_one_row(np.roll(listed, 16, axis=0)[:, :64], listed))
    assert {name: one.live for name, one in chosen.choices.items()} == {"w64+w128": 4}


@needs_compiler
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_strays_are_added_to_live_blocks(dtype: str, tmp_path: Path) -> None:
    w = blocks_and_strays()
    mod, chosen = selected(module(w), dtype)
    (choice,) = chosen.choices.values()
    assert (choice.kind, choice.live) == ("gemm", 4)
    assert choice.reason == f"{dtype}, live blocks and strays"
    assert choice.fused == ("bias", "relu", "residual")
    found = constants(mod)
    kept = unpack_weight(found["w"], K, N, found["w.blocks"])
    rest = unpack_strays(Strays(found["w.starts"], found["w.strays"]), K, kept.dtype)
    np.testing.assert_array_equal(kept + rest, w.astype(kept.dtype))
    assert 100 < np.count_nonzero(rest) < 400
    emulated = compare(w, tmp_path, dtype, {"float16": 2e-3, "bfloat16": 2e-2}[dtype])
    assert [chosen.kernels[name].family for name in emulated.calls] == ["turn", "gemm"]


@pytest.mark.parametrize("w", [half_dead(256, 128), blocks_and_strays(), along_inputs(128, 128)])
def test_what_kernels_keep_beside_a_weight_is_no_weight(w: np.ndarray) -> None:
    lowered = lower_cuda(module(w), cuda_target("sm_90"), "float16")
    found = owners(kernel_calls(lowered), None)
    assert {name for one in found for name in one["weights"]} == {"w", "b"}


@pytest.mark.parametrize(
    ("w", "form"),
    [(blocks_and_strays(), "live blocks and strays"), (along_inputs(128, 128), "2:4")],
)
def test_the_suite_says_that_it_draws_no_such_weight(w: np.ndarray, form: str) -> None:
    with pytest.raises(MeasurementError, match=f"in the form of product: float16, {form}$"):
        Device("sm_90").lower(module(w), "float16")


@needs_compiler
def test_strays_that_are_left_out_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, "if (blockIdx.z == 0) add_strays", "if (blockIdx.z == 1) add_strays", "gemm")
    with pytest.raises(AssertionError):
        compare(blocks_and_strays(), tmp_path, "float16", 2e-3)


def test_strays_that_do_not_pay_stay_in_blocks() -> None:
    w = blocks_and_strays()
    many = np.where(np.random.default_rng(3).random((K, N)) < 0.03, 1, w).astype(np.float32)
    # Few outputs do not pay for turning A; many strays cost more than the blocks they are in.
    for weight, columns in ((w[:, :256], 256), (many, N)):
        kernels = product_kernels(M, weight, "float16", "sm_90")
        assert "strays" not in kernels.form, columns
    assert product_kernels(M, w, "float16", "sm_90").form == "live blocks and strays"
    assert "strays" not in product_kernels(1, w, "float16", "sm_90").form


def unpacked(kernels: ProductKernels, k: int, n: int) -> np.ndarray:
    """Return the weight that the constants of matrix kernels stand for."""
    found = kernels.constants
    if "meta" in found:
        return unpack_two_four(TwoFour(found["w"], found["meta"]), k, n)
    whole = unpack_weight(found["w"], k, n, found.get("slabs"))
    if "stray_list" not in found:
        return whole
    strays = Strays(found["stray_starts"], found["stray_list"])
    return np.asarray(whole + unpack_strays(strays, k, whole.dtype))


@given(
    form=st.sampled_from(["dense", "half", "2:4", "blocks", "wide blocks"]),
    k=st.integers(1, 24).map(lambda slabs: 16 * slabs),
    groups=st.integers(1, 20),
    strays=st.sampled_from([0.0, 0.001, 0.1]),
    seed=st.integers(0, 2**16),
)
def test_no_form_loses_an_element(form: str, k: int, groups: int, strays: float, seed: int) -> None:
    # Strays are looked for beside wide blocks.
    rng, n = np.random.default_rng(seed), 64 * (groups + 20 * (form == "wide blocks"))
    w = rng.standard_normal((k, n))
    if form == "2:4":
        w = two_four(rng, k, n)
    elif form != "dense":
        shape = (1, 1) if form == "half" else (16, 64)
        places = np.add.outer(np.arange(k // shape[0]), rng.permutation(n // shape[1]))
        w = w * np.kron(places % 4 == 0, np.ones(shape))
    w = np.where(rng.random(w.shape) < strays, 1, w).astype(np.float32)
    kernels = product_kernels(M, w, "float16", "sm_90")
    np.testing.assert_array_equal(unpacked(kernels, k, n), w.astype(np.float16))
    assert kernels.kind == ("gemm_24" if kernels.form == "2:4" else "gemm")


@needs_nvcc
@pytest.mark.parametrize("arch", CUDA_ARCHS)
def test_kernels_of_both_spill_nothing(arch: str, tmp_path: Path) -> None:
    kernels = []
    for dtype in ("float16", "bfloat16"):
        for w in (along_inputs(128, 128), blocks_and_strays()):
            kernels += selected(module(w), dtype, arch=arch)[1].kernels.values()
    found = inspect_kernels(kernels, arch, tmp_path)
    assert {kernel.family for kernel in kernels} == {"gemm_24", "gemm", "turn"}
    for kernel in kernels:
        item = found[kernel.name]
        assert (item.spilled, item.stack) == (0, 0)
        assert item.registers * kernel.threads <= 65536
        assert kernel.shared <= CUDA_ARCHS[arch][0]
        assert any(name.startswith(MMA) for name in item.ptx) == (kernel.family == "gemm_24")
