"""ApplyQuant: standard QDQ out, the incoming module untouched, a reason for all that stays."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
from converter_check import run_imported, run_ort
from quant_models import example, imported_twin, quantised_twin, run, two_layers
from relax_models import constants, mlp, mlp_weights, random_mlp
from relax_models import example as mlp_example

from icd_tvm._tvm import GenericConst, apply_pass, const_name, named_const, relax, tvm
from icd_tvm.adapters.activation_statistics import activation_statistics
from icd_tvm.adapters.quant import apply_quant, parse_quant
from icd_tvm.adapters.sparsity import parse_sparsity
from icd_tvm.errors import ConfigError, TransformError, VerificationError
from icd_tvm.models.bert import BERT_MINI, build_bert, random_bert_weights
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.inputs import random_inputs
from icd_tvm.models.registry import build
from icd_tvm.relax_passes.apply_quant import ApplyQuant, quant_requests
from icd_tvm.relax_passes.apply_sparsity import ApplySparsity
from icd_tvm.relax_passes.axis_groups import find_axis_groups
from icd_tvm.relax_passes.fuse_attention import FuseAttention
from icd_tvm.relax_passes.layer_rules import LayerRules, parse_layer_rules
from icd_tvm.relax_passes.permute_constants import PermuteConstants
from icd_tvm.relax_passes.quantize_attention import attention_products
from icd_tvm.relax_passes.replace_constants import replace_constants
from icd_tvm.relax_passes.verify_layout import FP32_TOLERANCE, VerifyLayout, order_tolerance
from icd_tvm.runtime.build import build as build_module
from icd_tvm.runtime.calibrate import calibrate
from icd_tvm.runtime.order_file import output_widths
from icd_tvm.tir_schedules.target import host_target

META = "icd.transform_meta"


def everything(text: str) -> LayerRules:
    """Rules that quantise every weight alike, also small ones and the last."""
    return parse_layer_rules([f"*={text}"], parse_quant(text), parse_quant)


def entry(pass_: ApplyQuant, name: str) -> dict:
    return next(e for e in pass_.meta["quant"]["entries"] if e["weight"] == name)


def mlp_statistics(x: np.ndarray) -> dict:
    """Statistics of both inputs of the MLP, without any compiled module."""
    w1, b1, _ = mlp_weights()
    hidden = np.maximum(x @ w1 + b1, 0)
    inputs = {"fc1": x, "fc2": hidden}
    return {node: activation_statistics(values, gram=True) for node, values in inputs.items()}


def relu_mlp() -> object:
    return random_mlp(activation="relu")


# -- the same IR as a model that arrives quantised


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("int8", "dequantize"),
        ("int8:tensor", "dequantize"),
        ("int8:asym", "dequantize"),
        ("int4:channel", "dequantize"),
        ("int8:w8a8", "static"),
        ("int8:w8a8-mse", "static"),
        ("int8:w8a8-dynamic", "dynamic"),
        ("int4:group32", "nbits"),
        ("int4:group32:asym", "nbits"),
        ("int4:group96", "nbits"),
    ],
)
def test_the_result_is_what_the_importer_makes_of_a_quantised_model(text: str, kind: str) -> None:
    model = two_layers()
    before = import_onnx(model).mod
    x = example()
    hidden = np.maximum(x @ constants(before)["w1"], 0)
    names = ("up", "down")
    statistics = dict(zip(names, map(activation_statistics, (x, hidden)), strict=True))
    quantised = ApplyQuant(everything(text), statistics)(before)
    expected = imported_twin(model, constants(quantised), kind)
    tvm.ir.assert_structural_equal(quantised.without_attr(META), expected, map_free_vars=True)


def test_float8_is_decoded_in_the_constants_and_called_simulated() -> None:
    model = two_layers()
    pass_ = ApplyQuant(everything("fp8_e4m3"))
    found = constants(pass_(import_onnx(model).mod))
    wanted, _ = apply_quant(constants(import_onnx(model).mod)["w1"], "fp8_e4m3")
    np.testing.assert_array_equal(found["w1"], wanted.codes.astype(np.float32))
    np.testing.assert_array_equal(found["w1"] * found["w1.scale"], wanted.dequantize())
    assert "float32" in entry(pass_, "w1")["simulated"]


# -- the same function as the numpy adapter


@pytest.mark.parametrize(
    "text",
    [
        "int8",
        "int8:ptq-mse",
        "int8:group16:asym",
        "int8:channel:asym:salient0.1",
        "int8:group16:asym:salient0.1",
        "int4:group16:act-order:compensate",
        "int4:group10:asym",
        "fp8_e4m3:group16",
        "fp8_e5m2:salient0.1",
    ],
)
def test_weights_equal_the_adapter(text: str) -> None:
    x = mlp_example()
    statistics = mlp_statistics(x)
    w1, b1, w2 = mlp_weights()
    moved = [
        apply_quant(w, text, calibration=statistics[node].moments)[0].dequantize()
        for w, node in ((w1, "fc1"), (w2, "fc2"))
    ]
    quantised = ApplyQuant(everything(text), statistics)(relu_mlp())
    wanted = mlp(moved[0], b1, moved[1], activation="relu")
    np.testing.assert_allclose(run(quantised, x), run(wanted, x), rtol=1e-5, atol=1e-5)


def test_static_inputs_equal_rounding_in_numpy() -> None:
    x = mlp_example()
    pass_ = ApplyQuant(everything("int8:w8a8"), mlp_statistics(x))
    found = run(pass_(relu_mlp()), x)
    w1, b1, w2 = (
        apply_quant(w, "int8")[0].dequantize() if w.ndim == 2 else w for w in mlp_weights()
    )

    def rounded(values: np.ndarray, node: str, name: str) -> np.ndarray:
        scale = entry(pass_, name)["activations"][node]
        step, zero = np.float32(scale["scale"]), scale["zero_point"]
        assert values.min() >= (0 - zero) * step - step / 2
        assert values.max() <= (255 - zero) * step + step / 2
        return (np.clip(np.rint(values / step) + zero, 0, 255) - zero).astype(np.float32) * step

    hidden = np.maximum(rounded(x, "fc1", "w1") @ w1 + b1, 0)
    wanted = rounded(hidden, "fc2", "w2") @ w2 + x
    # A value that falls on the other side of a tie moves by one step of 1 / 255 of its range.
    assert np.linalg.norm(found - wanted) <= 1e-3 * np.linalg.norm(wanted)


def test_dynamic_inputs_equal_rounding_in_numpy() -> None:
    x = mlp_example()
    found = run(ApplyQuant(everything("int8:w8a8-dynamic"))(relu_mlp()), x)
    w1, b1, w2 = (
        apply_quant(w, "int8")[0].dequantize() if w.ndim == 2 else w for w in mlp_weights()
    )

    def rounded(values: np.ndarray) -> np.ndarray:
        low, high = min(values.min(), 0), max(values.max(), 0)
        step = np.float32((high - low) / np.float32(255))
        zero = np.rint(-low / step)
        return (np.clip(np.rint(values / step) + zero, 0, 255) - zero).astype(np.float32) * step

    wanted = rounded(np.maximum(rounded(x) @ w1 + b1, 0)) @ w2 + x
    assert np.linalg.norm(found - wanted) <= 1e-3 * np.linalg.norm(wanted)


@pytest.fixture(scope="module")
def bert() -> tuple:
    model = build("bert-mini-random")
    imported = import_onnx(model)
    return model, imported, random_inputs(imported, 0)


@pytest.mark.parametrize(("text", "kind"), [("int8", "dequantize"), ("int4:group32", "nbits")])
def test_a_transformer_equals_onnx_runtime_on_its_twin(bert: tuple, text: str, kind: str) -> None:
    model, imported, feeds = bert
    pass_ = ApplyQuant(parse_quant(text))
    quantised = pass_(imported.mod)
    assert pass_.meta["quant"]["quantised"] == 12
    twin = quantised_twin(model, constants(quantised), kind)
    [wanted], [plain] = run_ort(twin, feeds), run_ort(model, feeds)
    [found] = run_imported(_Imported(quantised, imported), feeds)
    error = np.linalg.norm(found - wanted)
    assert error <= 1e-5 * np.linalg.norm(wanted)
    assert error <= 0.05 * np.linalg.norm(plain - wanted)


def test_a_transformer_with_integer_inputs_equals_onnx_runtime(bert: tuple) -> None:
    model, imported, feeds = bert
    spec = parse_quant("int8:w8a8-dynamic")
    quantised = ApplyQuant(spec)(imported.mod)
    [wanted] = run_ort(quantised_twin(model, constants(quantised), "dynamic"), feeds)
    [found] = run_imported(_Imported(quantised, imported), feeds)
    # Inputs on the edge between two codes may be rounded either way.
    assert np.linalg.norm(found - wanted) <= 1e-3 * np.linalg.norm(wanted)


class _Imported:
    """Another module under the inputs and outputs of an imported one."""

    def __init__(self, mod: object, like: object) -> None:
        self.mod, self.inputs, self.outputs = mod, like.inputs, like.outputs


def test_a_calibrated_transformer_equals_onnx_runtime(bert: tuple) -> None:
    model, imported, feeds = bert
    spec = parse_quant("int8:w8a8-mse")
    requests = quant_requests(imported.mod, spec)
    assert len(requests) == 12
    batches = [random_inputs(imported, seed) for seed in (1, 2)]
    target = tvm.target.Target({"kind": "llvm", "opt-level": 0})
    quantised = ApplyQuant(spec, calibrate(imported.mod, requests, batches, target))(imported.mod)
    [plain] = run_ort(model, feeds)
    [wanted] = run_ort(quantised_twin(model, constants(quantised), "static"), feeds)
    [found] = run_imported(_Imported(quantised, imported), feeds)
    assert np.linalg.norm(found - wanted) <= 1e-3 * np.linalg.norm(wanted)
    assert np.linalg.norm(found - plain) <= 0.02 * np.linalg.norm(plain)


def test_calibration_sees_every_token() -> None:
    mod, batches = relu_mlp(), [mlp_example(seed=seed) for seed in (1, 2)]
    target = tvm.target.Target({"kind": "llvm", "opt-level": 0})
    requests = {"fc1": "activation+gram", "fc2": "gram"}
    found = calibrate(mod, requests, [{"x": x} for x in batches], target)
    wanted = mlp_statistics(np.concatenate(batches))
    for name in ("low", "high"):
        np.testing.assert_array_equal(getattr(found["fc1"], name), getattr(wanted["fc1"], name))
    np.testing.assert_array_equal(found["fc1"].histogram.counts, wanted["fc1"].histogram.counts)
    np.testing.assert_allclose(found["fc1"].moments.gram, wanted["fc1"].moments.gram)
    np.testing.assert_allclose(found["fc2"], wanted["fc2"].moments.gram / 2, rtol=1e-4, atol=1e-4)


# -- what is asked for, what is left


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("none", None),
        ("int8", None),
        ("int8:w8a8-dynamic", None),
        ("int8:ptq-mse", "moment"),
        ("int4:act-order", "moment"),
        ("int4:salient0.1", "moment"),
        ("int4:act-order:compensate", "gram"),
        ("int8:w8a8", "activation"),
        ("int8:w8a8:compensate", "activation+gram"),
        ("int8:w8a8-dynamic:smooth0.5", "activation"),
    ],
)
def test_requests_are_the_least_that_will_do(text: str, kind: str | None) -> None:
    wanted = {} if kind is None else {"fc1": kind, "fc2": kind}
    assert quant_requests(random_mlp(), everything(text)) == wanted


def test_rules_choose_per_weight() -> None:
    rules = parse_layer_rules(["w2=int4:group16", "zzz=none"], parse_quant("int8"), parse_quant)
    pass_ = ApplyQuant(rules)
    quantised = pass_(random_mlp())
    assert entry(pass_, "w1")["why"].endswith("below the least size of 4096")
    assert entry(pass_, "w2")["spec"] == "int4:group16"
    assert constants(quantised)["w1"].dtype == np.float32
    record = pass_.meta["quant"]
    assert record["unmatched_rules"] == ["zzz"]
    assert record["rules"] == {"w2": "int4:group16", "zzz": "none"}
    assert (record["spec"], record["quantised"]) == ("int8:channel", 1)


def test_tables_and_the_head_stay_unless_named() -> None:
    mod = import_onnx(build("decoder-mini-random")).mod
    pass_ = ApplyQuant(parse_layer_rules([], parse_quant("int8"), parse_quant, min_size=0))
    pass_(mod)
    left = {e["weight"]: e["why"] for e in pass_.meta["quant"]["entries"] if e["skipped"]}
    assert left.keys() == {"model.embed_tokens.weight", "/lm_head/Transpose_output_0"}
    assert left["/lm_head/Transpose_output_0"].startswith("head")
    named = ApplyQuant(everything("int8"))
    named(mod)
    assert not entry(named, "/lm_head/Transpose_output_0")["skipped"]
    assert "only weights of matmuls" in entry(named, "model.embed_tokens.weight")["why"]


def test_the_last_product_is_the_head_whatever_its_name() -> None:
    pass_ = ApplyQuant(parse_layer_rules([], parse_quant("int8"), parse_quant, min_size=0))
    pass_(import_onnx(two_layers()).mod)
    assert entry(pass_, "w2")["why"].startswith("head")
    assert not entry(pass_, "w1")["skipped"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [("int8", "dequantize"), ("int8:w8a8-dynamic", "dynamic"), ("int4:group32", "nbits")],
)
def test_nothing_is_quantised_twice(text: str, kind: str) -> None:
    model = two_layers()
    once = ApplyQuant(everything(text))(import_onnx(model).mod)
    arrived = imported_twin(model, constants(once), kind)
    for mod in (once.without_attr(META), arrived):
        pass_ = ApplyQuant(everything("int8"))
        again = pass_(mod)
        tvm.ir.assert_structural_equal(again["main"], mod["main"])
        entries = pass_.meta["quant"]["entries"]
        assert len(entries) == 2
        assert all(e["why"].startswith("already quantised") for e in entries)
        assert pass_.meta["quant"]["delta_layout"] is False


def test_one_bad_weight_does_not_stop_the_others() -> None:
    w1, b1, w2 = mlp_weights()
    w1[3, 4] = np.nan
    pass_ = ApplyQuant(everything("int8"))
    with pytest.warns(RuntimeWarning, match=r"w1 is not quantised: .*NaN"):
        quantised = constants(pass_(mlp(w1, b1, w2)))
    assert (quantised["w1"].dtype, quantised["w2"].dtype) == (np.float32, np.int8)
    assert "NaN" in entry(pass_, "w1")["why"]


@pytest.mark.parametrize(
    ("text", "statistics", "message"),
    [
        ("int8:w8a8", {}, "needs statistics of the input of 'fc1'"),
        ("int8:w8a8", {"fc1": np.ones(32)}, "needs statistics of the input of 'fc1'"),
        ("int4:compensate", {}, "needs statistics of the input of 'fc1'"),
        ("int4:compensate", {"fc1": np.ones(32)}, "compensation needs a Gram matrix"),
        ("int4:act-order", {"fc1": np.ones(31)}, "31 channels for 32 rows"),
    ],
)
def test_a_weight_without_fitting_statistics_stays(
    text: str, statistics: dict, message: str
) -> None:
    pass_ = ApplyQuant(everything(text), statistics)
    with pytest.warns(RuntimeWarning, match="is not quantised"):
        same = pass_(random_mlp())
    tvm.ir.assert_structural_equal(same["main"], random_mlp()["main"], map_free_vars=True)
    assert message in entry(pass_, "w1")["why"]


def test_a_request_must_be_parsed() -> None:
    with pytest.raises(TransformError, match=r"'int8' of type str .*parse_quant"):
        ApplyQuant("int8")


def test_none_changes_nothing() -> None:
    mod = random_mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = ApplyQuant(parse_quant("none"))(mod)
    tvm.ir.assert_structural_equal(same["main"], mod["main"])


def test_half_precision_weights_stay_with_a_reason() -> None:
    x = relax.Var("x", relax.TensorType((2, 64), "float16"))
    weight = named_const(np.ones((64, 64), np.float16), "w")
    pass_ = ApplyQuant(everything("int8"))
    pass_(_module(x, lambda builder: relax.op.matmul(x, weight)))
    assert "only float32" in entry(pass_, "w")["why"]


def test_stacked_weights_stay_with_a_reason() -> None:
    x = relax.Var("x", relax.TensorType((2, 4, 8), "float32"))
    weight = named_const(np.ones((2, 8, 8), np.float32), "w")
    pass_ = ApplyQuant(everything("int8"))
    pass_(_module(x, lambda builder: relax.op.matmul(x, weight)))
    assert "3 axes" in entry(pass_, "w")["why"]


def test_a_weight_that_is_computed_stays_with_a_reason() -> None:
    x = relax.Var("x", relax.TensorType((2, 64), "float32"))
    weight = named_const(np.ones((64, 64), np.float16), "w")

    def product(builder: object) -> object:
        return relax.op.matmul(x, builder.emit(relax.op.astype(weight, "float32")))

    pass_ = ApplyQuant(everything("int8"))
    pass_(_module(x, product))
    assert "fold constants first" in entry(pass_, "w")["why"]


def _module(x: object, make: object) -> object:
    builder = relax.BlockBuilder()
    with builder.function("main", [x], attrs={"num_input": 1}):
        with builder.dataflow():
            out = builder.emit_output(make(builder))
        builder.emit_func_output(out)
    return builder.get()


def test_a_weight_behind_a_transpose_is_quantised_as_the_matmul_sees_it() -> None:
    w1 = mlp_weights()[0]
    x = relax.Var("x", relax.TensorType((4, 32), "float32"))
    stored = named_const(np.ascontiguousarray(w1.T), "w")

    def product(builder: object) -> object:
        return relax.op.matmul(x, builder.emit(relax.op.permute_dims(stored)))

    found = constants(ApplyQuant(everything("int8"))(_module(x, product)))
    np.testing.assert_array_equal(found["w"], apply_quant(w1, "int8")[0].codes)


def test_a_weight_that_two_matmuls_share_is_coded_once() -> None:
    rng = np.random.default_rng(3)
    weight = named_const(rng.standard_normal((16, 16)).astype(np.float32), "w")
    x = relax.Var("x", relax.TensorType((5, 16), "float32"))

    def twice(builder: object) -> object:
        first = builder.emit(relax.op.matmul(x, weight), "first")
        return builder.emit(relax.op.matmul(first, weight), "second")

    mod = _module(x, twice)
    data = rng.standard_normal((5, 16)).astype(np.float32)
    inputs = {"first": data, "second": data @ weight.value.numpy()}
    statistics = {node: activation_statistics(x, gram=True) for node, x in inputs.items()}
    pass_ = ApplyQuant(everything("int8:w8a8:compensate"), statistics)
    quantised = pass_(mod)
    together = np.concatenate(list(inputs.values()))
    wanted, _ = apply_quant(weight.value.numpy(), "int8:compensate", calibration=together)
    np.testing.assert_array_equal(constants(quantised)["w"], wanted.codes)
    [only] = pass_.meta["quant"]["entries"]
    assert only["activations"].keys() == {"kind", "first", "second"}


# -- metadata, and the transforms before and after


def test_metadata_travels_with_the_module() -> None:
    x = mlp_example()
    pass_ = ApplyQuant(everything("int4:group8:act-order:compensate"), mlp_statistics(x), seed=5)
    quantised = tvm.ir.load_json(tvm.ir.save_json(pass_(relu_mlp())))
    assert json.loads(quantised.attrs[META]) == pass_.meta
    record = pass_.meta["quant"]
    assert record["delta_layout"] is True
    assert record["seed"] == 5
    assert record["bytes_after"] < record["bytes_before"] / 3
    order = entry(pass_, "w1")["groups"]["order"]
    g_idx = constants(quantised)["w1.g_idx"]
    assert np.all(np.diff(g_idx[order]) >= 0)
    assert np.any(np.diff(g_idx) < 0)
    np.testing.assert_allclose(run(quantised, x), run(pass_(relu_mlp()), x))


def test_two_runs_are_equal() -> None:
    x, text = mlp_example(), "int4:group8:ptq-mse:act-order:salient0.1:compensate"
    passes = [ApplyQuant(everything(text), mlp_statistics(x)) for _ in range(2)]
    first, second = (p(relu_mlp()) for p in passes)
    tvm.ir.assert_structural_equal(first, second, map_free_vars=True)
    assert passes[0].meta == passes[1].meta


def test_the_incoming_module_and_statistics_stay() -> None:
    mod, statistics = random_mlp(), mlp_statistics(mlp_example())
    before = statistics["fc1"].moments.gram.copy()
    ApplyQuant(everything("int8:w8a8:compensate"), statistics)(mod)
    tvm.ir.assert_structural_equal(mod, random_mlp(), map_free_vars=True)
    np.testing.assert_array_equal(statistics["fc1"].moments.gram, before)


@pytest.mark.parametrize("text", ["int8", "int8:asym:compensate", "int4:group16:compensate"])
def test_zeros_of_the_sparsity_before_stay_zero(text: str) -> None:
    x = mlp_example()
    rules = LayerRules(parse_sparsity("vec16:0.5"), min_size=0)
    sparse = ApplySparsity(rules)(relu_mlp())
    quantised = ApplyQuant(everything(text), mlp_statistics(x))(sparse)
    assert set(json.loads(quantised.attrs[META])) == {"sparsity", "quant"}
    zeros = constants(sparse)["w1"] == 0
    w, _ = apply_quant(constants(sparse)["w1"], text, calibration=mlp_statistics(x)["fc1"].moments)
    assert zeros.mean() == 0.5
    assert not w.dequantize()[zeros].any()
    if text == "int8":
        assert not constants(quantised)["w1"][zeros].any()
    else:
        half = {"w1": constants(quantised)["w1"], "zero": w.zero_points[w.g_idx]}
        offset = 8 if text.startswith("int4") else 0
        np.testing.assert_array_equal(half["w1"][zeros], half["zero"][zeros] + offset)


@pytest.mark.parametrize(
    "text", ["int8:asym", "int8:w8a8", "int8:w8a8-dynamic", "int4:group8:act-order:salient0.1"]
)
def test_the_hidden_axis_can_still_be_permuted(text: str) -> None:
    x = mlp_example()
    quantised = ApplyQuant(everything(text), mlp_statistics(x))(relu_mlp())
    groups = [g for g in find_axis_groups(quantised["main"]).free if g.size == 64]
    assert len(groups) == 1
    order = np.random.default_rng(0).permutation(64)
    permuted = apply_pass(PermuteConstants({groups[0].id: order}), quantised)
    np.testing.assert_allclose(run(permuted, x), run(quantised, x), rtol=1e-4, atol=1e-4)
    assert not np.array_equal(constants(permuted)["w1"], constants(quantised)["w1"])


@pytest.mark.parametrize("text", ["int8", "int8:w8a8", "int8:w8a8-dynamic", "int8:salient0.1"])
def test_axis_groups_and_matmuls_keep_their_names(text: str) -> None:
    """An order that was decided before finds its axes by them."""
    dense = import_onnx(two_layers()).mod
    spec, batches = everything(text), [{"x": example(seed)} for seed in range(2)]
    statistics = calibrate(dense, quant_requests(dense, spec), batches, host_target())
    quantised = ApplyQuant(spec, statistics)(dense)
    before, after = (find_axis_groups(mod["main"]) for mod in (dense, quantised))
    assert before.free
    assert {group.id for group in before.free} <= {group.id for group in after.free}
    assert output_widths(dense["main"]).items() <= output_widths(quantised["main"]).items()


@pytest.mark.parametrize(
    ("text", "tensors"),
    [("int8", 0), ("int4:group8", 0), ("int8:w8a8", 2), ("int8:w8a8-dynamic", 2)],
)
def test_rounded_activations_widen_what_passes_as_equal(text: str, tensors: int) -> None:
    """Behind a sum in another order a tie may round the other way, by one step of 1/255."""
    quantised = ApplyQuant(everything(text), mlp_statistics(mlp_example()))(relu_mlp())
    found = order_tolerance(quantised)
    assert found.value == pytest.approx(FP32_TOLERANCE + np.sqrt(tensors) / 255)
    assert ("8-bit" in found.reason) == (tensors > 0)


def test_a_wrong_order_of_rounded_activations_is_refused() -> None:
    mod = ApplyQuant(everything("int8:w8a8"), mlp_statistics(mlp_example()))(relu_mlp())
    apply_pass(VerifyLayout(mod), mod)
    wrong = {c: np.roll(c.value.numpy(), 1, axis=0) for c in _codes(mod) if const_name(c) == "w2"}
    assert wrong
    with pytest.raises(VerificationError, match="outputs differ"):
        apply_pass(VerifyLayout(mod), replace_constants(mod, wrong))


def _codes(mod: object) -> list:
    found: list = []
    relax.analysis.post_order_visit(
        mod["main"], lambda e: found.append(e) if isinstance(e, GenericConst) else None
    )
    return found


# -- attentions


ATTENTION = "int8:w8a8:attention"


def _attention_quantised(imported: object) -> tuple:
    spec = parse_quant(ATTENTION)
    requests = quant_requests(imported.mod, spec)
    batches = [random_inputs(imported, seed) for seed in (1, 2)]
    target = tvm.target.Target({"kind": "llvm", "opt-level": 0})
    pass_ = ApplyQuant(spec, calibrate(imported.mod, requests, batches, target))
    return pass_, requests, pass_(imported.mod)


def test_attentions_multiply_bytes_and_stay_close(bert: tuple) -> None:
    model, imported, feeds = bert
    pass_, requests, quantised = _attention_quantised(imported)
    entries = pass_.meta["quant"]["attention"]
    assert len(requests) == 12 + 3 * len(entries) > 12
    assert not any(entry["skipped"] for entry in entries)
    for entry in entries:
        assert entry["scales"]["key"][1] == entry["scales"]["value"][1] == 0
    fuse = FuseAttention(host_target())
    fuse(quantised)
    assert (len(fuse.fused), fuse.refusals) == (len(entries), {})
    [plain] = run_ort(model, feeds)
    [found] = run_imported(_Imported(quantised, imported), feeds)
    [fused] = build_module(quantised, host_target()).run_all(feeds)
    # A value on the edge between two codes may be rounded either way.
    assert np.linalg.norm(fused - found) <= 5e-3 * np.linalg.norm(found)
    assert 1e-4 * np.linalg.norm(plain) < np.linalg.norm(found - plain)
    assert np.linalg.norm(found - plain) <= 0.03 * np.linalg.norm(plain)


def test_attentions_without_statistics_stay_with_a_reason(bert: tuple) -> None:
    imported = bert[1]
    pass_ = ApplyQuant(parse_quant(ATTENTION))
    with pytest.warns(RuntimeWarning, match="needs statistics"):
        pass_(imported.mod)
    entries = pass_.meta["quant"]["attention"]
    assert entries
    assert all(e["skipped"] and "needs statistics" in e["why"] for e in entries)


def test_heads_that_are_no_fours_stay_with_a_reason() -> None:
    config = replace(BERT_MINI, hidden=36, heads=6, ffn=64)
    mod = import_onnx(build_bert(config, random_bert_weights(config, 0), 8, 1)).mod
    products, refusals = attention_products(mod["main"])
    assert products == []
    assert all("columns in fours" in why for why in refusals.values())
    assert len(refusals) == config.layers


@pytest.mark.parametrize("text", ["int8:attention", "int8:w8a8-dynamic:attention"])
def test_attention_needs_static_scales(text: str) -> None:
    with pytest.raises(ConfigError, match="no static scales for attention"):
        parse_quant(text)
