"""MigrateScales: the same function, other ranges, or a reason."""

import numpy as np
import pytest
from quant_models import run
from relax_models import constants

from icd_tvm._tvm import apply_pass, named_const, relax, tvm
from icd_tvm.adapters.activation_statistics import activation_statistics
from icd_tvm.adapters.quant import parse_quant
from icd_tvm.relax_passes.apply_quant import ApplyQuant, quant_requests
from icd_tvm.relax_passes.layer_rules import parse_layer_rules
from icd_tvm.relax_passes.migrate_scales import MigrateScales

K, N = 32, 48
OUTLIER = 5


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    scale = np.ones(K, np.float32)
    # One channel far wider than the rest: what makes a scale for all of them coarse.
    scale[OUTLIER] = 60
    return {
        "norm.weight": scale,
        "norm.bias": rng.standard_normal(K).astype(np.float32) / 8,
        "w1": rng.standard_normal((K, N)).astype(np.float32) / 8,
        "w2": rng.standard_normal((K, N)).astype(np.float32) / 8,
    }


def block(norm: str = "layer", *, residual: bool = False, output: bool = False) -> object:
    """Return main(x [6, K]): a norm, two matmuls that read it, and their product."""
    arrays = {name: named_const(array, name) for name, array in weights().items()}
    x = relax.Var("x", relax.TensorType((6, K), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x], attrs={"num_input": 1}):
        with builder.dataflow():
            if norm == "layer":
                rows = relax.op.nn.layer_norm(x, arrays["norm.weight"], arrays["norm.bias"], [-1])
            elif norm == "rms":
                rows = relax.op.nn.rms_norm(x, arrays["norm.weight"], [-1])
            elif norm == "relu":
                rows = relax.op.nn.relu(x)
            else:
                rows = relax.op.multiply(arrays["norm.weight"], builder.emit(relax.op.tanh(x)))
            if norm == "shifted":
                rows = relax.op.add(builder.emit(rows), arrays["norm.bias"])
            rows = builder.emit(rows, "norm")
            first = builder.emit(relax.op.matmul(rows, arrays["w1"]), "fc1")
            second = builder.emit(relax.op.matmul(rows, arrays["w2"]), "fc2")
            out = builder.emit(relax.op.multiply(first, second), "product")
            if residual:
                out = builder.emit(relax.op.add(relax.op.sum(rows), out), "residual")
            result = builder.emit_output(relax.Tuple([out, rows]) if output else out)
        builder.emit_func_output(result)
    return builder.get()


def data() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((6, K)).astype(np.float32)


def norm_of(x: np.ndarray, norm: str = "layer") -> np.ndarray:
    scale, bias = weights()["norm.weight"], weights()["norm.bias"]
    if norm in ("scaled", "shifted"):
        return np.tanh(x) * scale + (bias if norm == "shifted" else 0)
    if norm == "rms":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias


def activations(x: np.ndarray) -> dict:
    seen = activation_statistics(x)
    return {"fc1": seen, "fc2": seen}


def statistics(norm: str = "layer") -> dict:
    return activations(norm_of(data(), norm))


ALPHAS = {"fc1": 0.5, "fc2": 0.5}


@pytest.mark.parametrize("norm", ["layer", "rms", "scaled", "shifted"])
def test_only_constants_move_and_the_function_stays(norm: str) -> None:
    mod = block(norm)
    pass_ = MigrateScales(ALPHAS, statistics(norm))
    moved = apply_pass(pass_, mod)
    assert pass_.refusals == {}
    np.testing.assert_allclose(run(moved, data()), run(mod, data()), rtol=1e-4, atol=1e-4)
    scales = pass_.scales["fc1"]
    np.testing.assert_array_equal(scales, pass_.scales["fc2"])
    found = constants(moved)
    for name in ("w1", "w2"):
        np.testing.assert_allclose(found[name], weights()[name] * scales[:, None], rtol=1e-6)
    np.testing.assert_allclose(found["norm.weight"] * scales, weights()["norm.weight"], rtol=1e-6)
    tvm.ir.assert_structural_equal(mod, block(norm), map_free_vars=True)


def test_the_ranges_of_input_and_weights_meet() -> None:
    pass_ = MigrateScales(ALPHAS, statistics())
    apply_pass(pass_, block())
    top = np.abs(norm_of(data())).max(0)
    rows = np.maximum(*(np.abs(weights()[name]).max(1) for name in ("w1", "w2")))
    np.testing.assert_allclose(pass_.scales["fc1"] ** 2, top / rows, rtol=1e-5)


@pytest.mark.parametrize("text", ["int8:w8a8:smooth0.5", "int8:w8a8-dynamic:smooth0.5"])
def test_an_outlier_channel_costs_less_after_the_migration(text: str) -> None:
    mod, x = block(), data()
    plain = text.removesuffix(":smooth0.5")
    rules = parse_layer_rules([f"*={text}"], parse_quant(text), parse_quant)
    without = parse_layer_rules([f"*={plain}"], parse_quant(plain), parse_quant)
    assert set(quant_requests(mod, rules).values()) == {"activation"}
    wanted = run(mod, x)
    smooth = ApplyQuant(rules, statistics())
    errors = [
        np.linalg.norm(run(apply_pass(p, mod), x) - wanted)
        for p in (smooth, ApplyQuant(without, statistics()))
    ]
    assert errors[0] < 0.5 * errors[1]
    entries = smooth.meta["quant"]["entries"]
    assert all(entry["smooth"] == {"divided": "norm", "why": ""} for entry in entries)


@pytest.mark.parametrize(
    ("mod", "reason"),
    [
        (block("relu"), "its input is not the result of a norm"),
        (block(residual=True), "the norm before is also read by"),
        (block(output=True), "the norm before is also read by"),
    ],
)
def test_what_cannot_move_says_why(mod: object, reason: str) -> None:
    pass_ = MigrateScales(ALPHAS, statistics())
    tvm.ir.assert_structural_equal(apply_pass(pass_, mod), mod)
    assert pass_.scales == {}
    assert set(pass_.refusals) == {"fc1", "fc2"}
    assert all(why.startswith(reason) for why in pass_.refusals.values())


@pytest.mark.parametrize("norm", ["relu", "residual"])
def test_a_division_is_inserted_once_where_no_norm_takes_it(norm: str) -> None:
    residual = norm == "residual"
    mod = block("layer" if residual else norm, residual=residual)
    seen = statistics() if residual else activations(np.maximum(data(), 0))
    pass_ = MigrateScales(ALPHAS, seen, insert=True)
    moved = apply_pass(pass_, mod)
    np.testing.assert_allclose(run(moved, data()), run(mod, data()), rtol=1e-4, atol=1e-4)
    assert set(pass_.refusals) == set(pass_.scales) == {"fc1", "fc2"}
    found = constants(moved)
    [factor] = [array for name, array in found.items() if name.endswith(".smooth")]
    np.testing.assert_allclose(factor * pass_.scales["fc1"], 1, rtol=1e-6)
    if residual:
        np.testing.assert_array_equal(found["norm.weight"], weights()["norm.weight"])
    text = "int8:w8a8:smooth0.5"
    rules = parse_layer_rules([f"*={text}"], parse_quant(text), parse_quant)
    quantise = ApplyQuant(rules, seen)
    quantised = apply_pass(quantise, mod)
    for entry in quantise.meta["quant"]["entries"]:
        assert entry["smooth"]["divided"] == "run time"
        assert entry["smooth"]["why"] == pass_.refusals[entry["node"]]
    plain = ApplyQuant(parse_layer_rules(["*=int8:w8a8"], rules.default, parse_quant), seen)
    wanted = run(mod, data())
    errors = [np.linalg.norm(run(m, data()) - wanted) for m in (quantised, apply_pass(plain, mod))]
    if residual:
        assert errors[0] < 0.5 * errors[1]


def test_without_statistics_nothing_moves() -> None:
    pass_ = MigrateScales(ALPHAS, {})
    apply_pass(pass_, block())
    assert pass_.refusals["fc1"] == "no statistics of the input of 'fc1'"


def test_statistics_of_other_channels_move_nothing() -> None:
    other = activation_statistics(np.ones((4, K + 1)))
    pass_ = MigrateScales(ALPHAS, {"fc1": other, "fc2": other})
    tvm.ir.assert_structural_equal(apply_pass(pass_, block()), block(), map_free_vars=True)
    assert f"{K + 1}" in pass_.refusals["fc1"]


def test_a_norm_whose_scale_is_computed_stays() -> None:
    x, scale = (
        relax.Var(name, relax.TensorType(shape, "float32"))
        for name, shape in (("x", (6, K)), ("s", (K,)))
    )
    builder = relax.BlockBuilder()
    with builder.function("main", [x, scale], attrs={"num_input": 2}):
        with builder.dataflow():
            rows = builder.emit(relax.op.nn.rms_norm(x, scale, [-1]), "norm")
            product = relax.op.matmul(rows, named_const(weights()["w1"], "w1"))
            out = builder.emit_output(product, "fc1")
        builder.emit_func_output(out)
    pass_ = MigrateScales({"fc1": 0.5}, statistics())
    apply_pass(pass_, builder.get())
    assert (
        pass_.refusals["fc1"] == "the scale or shift of the norm before is no constant of one axis"
    )
