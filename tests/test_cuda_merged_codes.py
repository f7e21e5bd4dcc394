"""Products of codes that read one row become one product of codes, where they are of one form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cuda_cases import needs_compiler
from cuda_modules import EmulatedModule, launches, selected
from test_cuda_modules import SLOTS, decoder
from test_cuda_weight_only import constants, quantised, run, weight

from icd_tvm._tvm import apply_pass, named_const, relax, tvm
from icd_tvm.models.importer import import_onnx
from icd_tvm.relax_passes.attach_layout_tags import AttachLayoutTags
from icd_tvm.relax_passes.held_product import HeldProduct, held_product
from icd_tvm.relax_passes.hold_weight_only import HoldWeightOnly
from icd_tvm.relax_passes.lower_cuda import lower_cuda
from icd_tvm.relax_passes.merge_shared_input import MergeSharedInput
from icd_tvm.relax_passes.select_cuda_kernels import read_cuda_kernels
from icd_tvm.tir_schedules.target import cuda_target

K, WIDTHS = 192, (64, 128, 32)
SPECS = ("int8", "int4:group64")
TARGET = cuda_target("sm_90")


def products(spec: str) -> Any:
    """Return three products of one row with weights of a request; the last has a bias."""
    x = relax.Var("x", relax.TensorType((1, 1, K), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            parts = [
                builder.emit(relax.op.matmul(x, named_const(weight(K, n), f"w{n}")), f"product{n}")
                for n in WIDTHS
            ]
            bias = named_const(np.linspace(-1, 1, WIDTHS[-1], dtype=np.float32), "b")
            parts[-1] = builder.emit(relax.op.add(parts[-1], bias))
            out = builder.emit_output(relax.Tuple([builder.emit(relax.op.exp(p)) for p in parts]))
        builder.emit_func_output(out)
    return quantised(builder.get(), spec)


def held(mod: Any) -> list[HeldProduct]:
    values = [b.value for block in mod["main"].body.blocks for b in block.bindings]
    return [one for one in map(held_product, values) if one is not None]


def slices(apart: list[HeldProduct]) -> Any:
    """Return one product of the codes side by side, and slices of it."""
    x = relax.Var("x", relax.TensorType((1, 1, K), "float32"))
    weight, scale = (
        np.concatenate([one[part].value.numpy() for one in apart], axis)
        for part, axis in ((1, 1), (2, 0))
    )
    names = [f"w{n}" for n in WIDTHS]
    bias = np.zeros(sum(WIDTHS), np.float32)
    bias[-WIDTHS[-1] :] = np.linspace(-1, 1, WIDTHS[-1], dtype=np.float32)
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            scales = named_const(scale, "+".join(f"{name}.scale" for name in names))
            wide = builder.emit(HeldProduct(x, named_const(weight, "+".join(names)), scales).call())
            wide = builder.emit(relax.op.add(wide, named_const(bias, "b")))
            ends = np.cumsum(WIDTHS).tolist()
            parts = [
                builder.emit(relax.op.strided_slice(wide, [2], [end - n], [end]))
                for n, end in zip(WIDTHS, ends, strict=True)
            ]
            out = builder.emit_output(relax.Tuple([builder.emit(relax.op.exp(p)) for p in parts]))
        builder.emit_func_output(out)
    return builder.get()


@pytest.mark.parametrize("spec", SPECS)
def test_module_is_the_expected_one(spec: str) -> None:
    before = apply_pass(HoldWeightOnly(), products(spec))
    copy = tvm.ir.load_json(tvm.ir.save_json(before))
    merge = MergeSharedInput()
    after = apply_pass(merge, before)
    tvm.ir.assert_structural_equal(after["main"], slices(held(before))["main"])
    tvm.ir.assert_structural_equal(before, copy)
    assert (merge.merged, merge.refused) == (1, {})
    names = {name for name in constants(after) if name != "b"}
    assert names == {"w64+w128+w32", "w64.scale+w128.scale+w32.scale"}


@needs_compiler
@pytest.mark.parametrize("spec", SPECS)
def test_one_kernel_computes_all_of_them(spec: str, tmp_path: Path) -> None:
    mod = products(spec)
    made, chosen = selected(mod)
    assert list(chosen.choices) == ["w64+w128+w32"]
    feeds = {"x": np.random.default_rng(1).standard_normal((1, 1, K)).astype(np.float32) / 8}
    emulated = EmulatedModule(made, chosen, tmp_path)
    for found, right in zip(emulated(feeds), run(mod, feeds), strict=True):
        assert np.abs(found - right).max() <= 3e-3 * np.abs(right).max()
    assert len(emulated.calls) == 1


OTHERS = {
    "other bits": ("int8; w32=int4:channel", "int4 with a scale for a column"),
    "other groups": ("int8; w32=int8:group64", "int8 with a scale for 64 inputs"),
    "floats": ("int8; w32=none", "floats"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_weights_of_another_form_stay_apart_with_a_reason(name: str) -> None:
    spec, form = OTHERS[name]
    mod = products(spec)
    merge = MergeSharedInput()
    apply_pass(merge, apply_pass(HoldWeightOnly(), mod))
    assert (merge.merged, list(merge.refused)) == (1, ["product32"])
    after, chosen = selected(mod)
    assert set(chosen.choices) == {"w64+w128", "product32"}
    reason = read_cuda_kernels(after)["product32"].reason
    assert f"its weight is {form}" in reason
    assert "others of its row are int8 with a scale for a column" in reason
    assert {one.kind for one in chosen.choices.values()} == {"gemv"}


def test_products_of_several_forms_are_merged_by_form() -> None:
    mod = products("int8; w64=none; w32=none")
    merge = MergeSharedInput()
    apply_pass(merge, apply_pass(HoldWeightOnly(), mod))
    assert (merge.merged, list(merge.refused)) == (1, ["product128"])


def module(tmp_path: Path, layers: int, spec: str) -> tuple[Any, Any]:
    """Return a decoder's step with its states, quantised if a request is given."""
    model, states = decoder(layers)
    path = tmp_path / f"decoder{layers}.onnx"
    onnx.save(model, str(path))
    mod = apply_pass(AttachLayoutTags(opaque_states=states), import_onnx(str(path)).mod)
    return (quantised(mod, spec) if spec else mod), states


@pytest.mark.parametrize("spec", SPECS)
def test_a_decoder_of_codes_has_the_launches_of_floats(spec: str, tmp_path: Path) -> None:
    found = {}
    for name in ("", spec):
        lows = [lower_cuda(module(tmp_path, n, name)[0], TARGET, "float16") for n in (1, 2)]
        found[name] = [len(launches(low)) for low in lows]
        assert found[name][1] - found[name][0] == 10
    assert found[spec] == found[""]
    codes = [n for n, a in constants(lows[1]).items() if str(a.dtype) in ("int8", "uint8")]
    assert sorted(name.count("+") for name in codes) == [0, 0, 0, 0, 1, 1, 2, 2]


@needs_compiler
@pytest.mark.parametrize("spec", SPECS)
def test_a_decoder_of_codes_equals_the_dequantised_one(spec: str, tmp_path: Path) -> None:
    mod, states = module(tmp_path, 1, spec)
    made, chosen = selected(mod, "float16", states)
    assert not [one for one in chosen.choices.values() if one.kind == "tvm"]
    emulated = EmulatedModule(made, chosen, tmp_path)
    rng = np.random.default_rng(0)
    feeds = {}
    for param in mod["main"].params:
        shape = [int(n) for n in param.ty.shape]
        whole = "int" in str(param.ty.dtype)
        values = rng.integers(0, 30, shape) if whole else rng.standard_normal(shape)
        feeds[str(param.name)] = values.astype(str(param.ty.dtype))
    for length in (0, 7, SLOTS - 1):
        feeds["cache_length"][:] = length
        expected = run(mod, feeds)
        for found, right in zip(emulated(feeds), expected, strict=True):
            assert np.abs(found - right).max() <= 0.01 * np.abs(right).max(), length
        feeds |= {old: expected[1 + place] for place, (old, _) in enumerate(states)}
