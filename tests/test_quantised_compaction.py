"""Dead units and dead heads are cut off in every number format, and only where that is exact."""

from __future__ import annotations

import json
from typing import Any

import axis_models
import numpy as np
import onnx
import pytest
from converter_check import run_ort
from onnx import numpy_helper
from quant_models import H, K, N, example, quantised_twin, run, two_layers
from relax_models import constants

from icd_tvm._tvm import apply_pass, relax
from icd_tvm.adapters.activation_statistics import activation_statistics
from icd_tvm.adapters.quant import parse_quant
from icd_tvm.adapters.sparsity import parse_sparsity
from icd_tvm.models.importer import import_onnx
from icd_tvm.relax_passes.apply_quant import ApplyQuant
from icd_tvm.relax_passes.apply_sparsity import ApplySparsity
from icd_tvm.relax_passes.attach_layout_tags import tagged_groups
from icd_tvm.relax_passes.held_units import WHY
from icd_tvm.relax_passes.layer_rules import parse_layer_rules
from icd_tvm.relax_passes.replace_constants import replace_constants
from icd_tvm.relax_passes.rewrite_layout import RewriteLayout
from icd_tvm.relax_passes.zero_ranges import ranges_with_zero

# Every third unit is dead; 64 live ones fill whole vectors.
DEAD = np.arange(0, H, 3)
FORMATS = (
    ("int8", "dequantize"),
    ("int8:asym", "dequantize"),
    ("int4:group32", "nbits"),
    ("int8:w8a8", "static"),
    ("int8:w8a8-dynamic", "dynamic"),
)
OTHERS = ("fp8_e4m3", "int8:w8a8:smooth0.5", "int8:w8a8-dynamic:smooth0.5", "int8:salient0.1")


def planted(producer: bool = True) -> onnx.ModelProto:
    model = two_layers()
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor).copy()
        if tensor.name == "w2":
            array[DEAD] = 0
        elif producer:
            array[:, DEAD] = 0
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return model


def quantised(mod: Any, text: str, inputs: dict[str, np.ndarray]) -> Any:
    rules = parse_layer_rules([f"*={text}"], parse_quant(text), parse_quant)
    known = {node: activation_statistics(x, gram=True) for node, x in inputs.items()}
    return apply_pass(ApplyQuant(rules, known), mod)


def quantised_layers(model: onnx.ModelProto, text: str) -> Any:
    x, mod = example(), import_onnx(model).mod
    hidden = np.maximum(x @ constants(mod)["w1"], 0)
    return quantised(mod, text, {"up": x, "down": hidden})


@pytest.mark.parametrize(("text", "kind"), FORMATS)
def test_dead_units_are_cut_off_and_the_rest_equals_onnx_runtime(text: str, kind: str) -> None:
    model = planted()
    mod = quantised_layers(model, text)
    [expected] = run_ort(quantised_twin(model, constants(mod), kind), {"x": example()})
    rewrite = RewriteLayout({})
    small = apply_pass(rewrite, mod)
    assert list(rewrite.removed.values()) == [len(DEAD)]
    shapes = {name: array.shape for name, array in constants(small).items()}
    assert (shapes["w1"], shapes["w2"]) == ((K, H - len(DEAD)), (H - len(DEAD), N))
    found = run(small, example())
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("text", OTHERS)
def test_dead_units_of_other_formats_are_cut_off_exactly(text: str) -> None:
    mod = quantised_layers(planted(), text)
    rewrite = RewriteLayout({})
    small = apply_pass(rewrite, mod)
    assert list(rewrite.removed.values()) == [len(DEAD)]
    np.testing.assert_allclose(run(small, example()), run(mod, example()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "removed"),
    [
        ("int8:w8a8", [len(DEAD)]),
        ("int8:w8a8-dynamic", []),
        ("int8:w8a8-dynamic:smooth0.5", []),
    ],
)
def test_a_unit_that_widens_the_range_of_its_input_stays(text: str, removed: list[int]) -> None:
    """Its row is zero, but the scale of all the others is read from it; the record says so."""
    rewrite = RewriteLayout({})
    mod = quantised_layers(planted(producer=False), text)
    apply_pass(rewrite, mod)
    assert list(rewrite.removed.values()) == removed
    held = held_of(mod)
    assert [item["count"] for item in held] == ([] if removed else [len(DEAD)])
    for item in held:
        assert (item["kind"], item["readers"], item["why"]) == ("units", ["down"], WHY)


def held_of(mod: Any) -> list[dict[str, Any]]:
    return list(json.loads(mod.attrs["icd.transform_meta"])["quant"]["held"])


def test_what_is_dead_on_both_sides_or_alive_is_not_held() -> None:
    for model in (planted(), two_layers()):
        assert held_of(quantised_layers(model, "int8:w8a8-dynamic")) == []


def test_a_dynamic_input_of_another_layer_holds_nothing() -> None:
    x, mod = example(), import_onnx(planted(producer=False)).mod
    rules = parse_layer_rules(["up=int8:w8a8-dynamic"], parse_quant("none"), parse_quant)
    made = apply_pass(ApplyQuant(rules, {"up": activation_statistics(x, gram=True)}), mod)
    assert held_of(made) == []
    rewrite = RewriteLayout({})
    apply_pass(rewrite, made)
    assert list(rewrite.removed.values()) == [len(DEAD)]


def test_heads_that_only_their_reader_drops_are_held() -> None:
    model = axis_models.MODELS["heads"]()
    consts = {c.name: c for group in tagged_groups(model.mod).free for c in group.consts}
    output = consts["o.w"].const
    array = output.value.numpy().copy()
    array[4:8] = 0
    mod = replace_constants(model.mod, {output: array})
    rng = np.random.default_rng(0)
    inputs = {node: rng.normal(size=(20, 8)) for node in ("q", "k", "v")}
    made = quantised(mod, "int8:w8a8-dynamic", {**inputs, "o": rng.normal(size=(20, 12))})
    [item] = held_of(made)
    assert (item["kind"], item["count"], item["readers"]) == ("heads", 1, ["o"])
    rewrite = RewriteLayout({})
    apply_pass(rewrite, made)
    assert rewrite.removed == {}
    apply_pass(rewrite, quantised(mod, "int8", inputs | {"o": rng.normal(size=(20, 12))}))
    assert list(rewrite.removed.values()) == [1]


# Heads.


@pytest.mark.filterwarnings("ignore:q.2.0.1 stays dense")
@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("heads", text) for text, _ in FORMATS),
        ("heads", "int8:salient0.1"),
        ("fused_qkv_split", "int8:w8a8-dynamic"),
        ("grouped_query", "int4:group32"),
        ("grouped_query", "int8:w8a8-dynamic"),
    ],
)
def test_dead_heads_are_cut_off_exactly(name: str, text: str) -> None:
    model = axis_models.MODELS[name]()
    rules = parse_layer_rules(["*=unit:0.5"], parse_sparsity("none"), parse_sparsity, min_size=0)
    pass_ = ApplySparsity(rules)
    sparse = apply_pass(pass_, model.mod)
    (entry,) = [e for e in pass_.meta["sparsity"]["entries"] if e["kind"] == "heads"]
    width = constants(sparse)["o.w"].shape[0]
    rng = np.random.default_rng(0)
    inputs = {node: rng.normal(size=(20, 8)) for node in ("q", "k", "v", "qkv")}
    mod = quantised(sparse, text, {**inputs, "o": rng.normal(size=(20, width))})
    rewrite = RewriteLayout({})
    small = apply_pass(rewrite, mod)
    assert rewrite.removed == {entry["group"]: entry["units"] - entry["kept"]}
    assert constants(small)["o.w"].shape[0] == width * entry["kept"] // entry["units"]
    expected, found = (run(m, model.inputs[0]) for m in (mod, small))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_head_whose_rows_are_all_in_floating_point_stays() -> None:
    """Its codes are zero; a second product reads the rows."""
    model = axis_models.MODELS["heads"]()
    energy = np.ones(12)
    energy[4:8] = 100
    rules = parse_layer_rules(["o=int8:salient0.33"], parse_quant("none"), parse_quant, min_size=0)
    mod = apply_pass(ApplyQuant(rules, {"o": np.sqrt(energy)}), model.mod)
    assert not constants(mod)["o.w"][4:8].any()
    rewrite = RewriteLayout({})
    apply_pass(rewrite, mod)
    assert rewrite.removed == {}


# Ranges that hold zero.


def clamped(clamp: Any, value: float, twice: bool = False) -> Any:
    """max(x) read by a clamp with a value, and perhaps once more."""
    x = relax.Var("x", relax.TensorType((4, 8), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x], attrs={"num_input": 1}):
        with builder.dataflow():
            top = builder.emit(relax.op.max(x), "top")
            out = builder.emit(clamp(top, relax.const(value, "float32")), "out")
            out = builder.emit_output(relax.op.add(out, top) if twice else out)
        builder.emit_func_output(out)
    return builder.get()["main"]


@pytest.mark.parametrize(
    ("clamp", "value", "twice", "found"),
    [
        (relax.op.maximum, 0.0, False, {"top"}),
        (relax.op.maximum, 1.0, False, set()),
        (relax.op.minimum, 0.0, False, set()),
        (relax.op.add, 0.0, False, set()),
        (relax.op.maximum, 0.0, True, set()),
    ],
)
def test_a_range_holds_zero_if_nothing_reads_it_without(
    clamp: Any, value: float, twice: bool, found: set[str]
) -> None:
    assert {var.name for var in ranges_with_zero(clamped(clamp, value, twice))} == found


def test_only_a_range_without_zero_counts_its_units() -> None:
    mod = quantised_layers(two_layers(), "int8:w8a8-dynamic")
    (group,) = (group for group in tagged_groups(mod).free if group.size == H)
    assert group.counted == ()
