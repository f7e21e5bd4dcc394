"""ApplySparsity layer by layer: rules, heads, channels, and what is left as it is and why."""

from __future__ import annotations

import json
from typing import Any

import axis_models
import numpy as np
import pytest
from relax_models import D, F, constants, example, mlp, mlp_weights, random_mlp, run

from icd_tvm._tvm import GenericConst, apply_pass, const_name, named_const, relax, tvm
from icd_tvm.adapters.sparsity import SparsitySpec, parse_sparsity, unit_scores
from icd_tvm.adapters.units import refit_consumer, removal_costs
from icd_tvm.errors import NonFiniteError, ShapeError
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.registry import build
from icd_tvm.relax_passes.apply_sparsity import ApplySparsity, calibration_requests
from icd_tvm.relax_passes.attach_layout_tags import AttachLayoutTags
from icd_tvm.relax_passes.axis_groups import find_axis_groups
from icd_tvm.relax_passes.layer_rules import LayerRules, parse_layer_rules
from icd_tvm.relax_passes.replace_constants import replace_constants
from icd_tvm.relax_passes.rewrite_layout import RewriteLayout
from icd_tvm.relax_passes.sparsity_targets import sparsity_targets

UNIT, VEC = parse_sparsity("unit:0.5"), parse_sparsity("vec16:0.5")


def rules(*texts: str, default: str = "none") -> LayerRules[SparsitySpec]:
    return parse_layer_rules(texts, parse_sparsity(default), parse_sparsity, min_size=0)


def skipped(pass_: ApplySparsity) -> dict[str, str]:
    return {entry["target"]: entry["why"] for entry in pass_.meta["sparsity"]["skipped"]}


def pruned(pass_: ApplySparsity) -> list[str]:
    return [entry.get("node") or entry["group"] for entry in pass_.meta["sparsity"]["entries"]]


def with_constants(mod: Any, arrays: dict[str, np.ndarray]) -> Any:
    named: dict[Any, np.ndarray] = {}

    def visit(expr: Any) -> None:
        if isinstance(expr, GenericConst) and const_name(expr) in arrays:
            named[expr] = arrays[const_name(expr)]

    relax.analysis.post_order_visit(mod["main"], visit)
    return replace_constants(mod, named)


def classifier() -> Any:
    """Return x -> relu(x @ w1) @ w2 + b2, whose last product is a head."""
    w1, _, w2 = mlp_weights()
    x = relax.Var("x", relax.TensorType((1, 8, D), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x], attrs={"num_input": 1}):
        with builder.dataflow():
            up = builder.emit(relax.op.matmul(x, named_const(w1, "w1")), "fc1")
            hidden = builder.emit(relax.op.nn.relu(up), "act")
            logits = builder.emit(relax.op.matmul(hidden, named_const(w2, "w2")), "fc2")
            bias = named_const(np.ones(D, np.float32), "b2")
            out = builder.emit_output(relax.op.add(logits, bias), "out")
        builder.emit_func_output(out)
    return builder.get()


# Rules.


def test_a_rule_chooses_the_layer_and_its_spec() -> None:
    pass_ = ApplySparsity(rules("w2=vec16:0.25"))
    found = constants(pass_(random_mlp()))
    assert [np.mean(found[name] != 0) for name in ("w1", "w2")] == [1.0, 0.75]
    assert pruned(pass_) == ["fc2"]
    assert skipped(pass_) == {"fc1": "none removes nothing"}


def test_the_first_rule_that_fits_any_weight_of_a_group_wins() -> None:
    pass_ = ApplySparsity(rules("w2=unit:0.25", "w1=unit:0.75"))
    pass_(random_mlp())
    assert pass_.meta["sparsity"]["entries"][0]["kept"] == F * 3 // 4
    assert pass_.meta["sparsity"]["rules"] == {"w2": "unit:0.25", "w1": "unit:0.75"}


@pytest.mark.parametrize("spec", [UNIT, VEC])
def test_tiny_layers_stay_dense_by_default(spec: SparsitySpec) -> None:
    mod, pass_ = random_mlp(), ApplySparsity(spec)
    tvm.ir.assert_structural_equal(pass_(mod)["main"], mod["main"])
    assert skipped(pass_)
    assert all("below the least size of 4096" in why for why in skipped(pass_).values())


def test_a_head_stays_dense_unless_it_is_named() -> None:
    by_default = ApplySparsity(LayerRules(VEC, min_size=0))
    by_default(classifier())
    assert skipped(by_default) == {"fc2": "head: left out unless a rule names it"}
    named = ApplySparsity(rules("w2=vec16:0.5"))
    assert np.mean(constants(named(classifier()))["w2"] != 0) == 0.5


def test_a_rule_that_fits_nothing_is_said() -> None:
    pass_ = ApplySparsity(rules("*attention*=unit:0.5"))
    with pytest.warns(RuntimeWarning, match=r"'\*attention\*' fits no layer"):
        pass_(random_mlp())
    assert pass_.meta["sparsity"]["unmatched"] == ["*attention*"]


def test_a_transposed_weight_is_grouped_by_its_outputs() -> None:
    w1, b1, w2 = mlp_weights()
    x = relax.Var("x", relax.TensorType((1, 8, D), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x], attrs={"num_input": 1}):
        with builder.dataflow():
            turned = builder.emit(relax.op.permute_dims(named_const(w1.T.copy(), "w1")))
            up = builder.emit(relax.op.matmul(x, turned), "fc1")
            hidden = builder.emit(relax.op.nn.relu(up), "act")
            down = builder.emit(relax.op.matmul(hidden, named_const(w2, "w2")), "fc2")
            out = builder.emit_output(relax.op.add(down, x), "out")
        builder.emit_func_output(out)
    direct = ApplySparsity(rules("fc1=vec16:0.5"))(mlp(w1, b1, w2))
    turned_mod = ApplySparsity(rules("fc1=vec16:0.5"))(builder.get())
    np.testing.assert_array_equal(constants(turned_mod)["w1"].T, constants(direct)["w1"])


# Heads and channels.


@pytest.mark.filterwarnings("ignore:q.2.0.1 stays dense")
@pytest.mark.parametrize("name", ["heads", "fused_qkv_split", "grouped_query", "attention_op"])
def test_dead_heads_are_zero_on_every_side_and_cut_off_exactly(name: str) -> None:
    model = axis_models.MODELS[name]()
    pass_ = ApplySparsity(rules("*=unit:0.5"))
    sparse = apply_pass(pass_, model.mod)
    (entry,) = [e for e in pass_.meta["sparsity"]["entries"] if e["kind"] == "heads"]
    before, after = constants(model.mod), constants(sparse)
    changed = {name for name in after if not np.array_equal(before[name], after[name])}
    assert changed == set(after) - {"o.b"}
    expected = axis_models.run(with_constants(model.mod, {"o.w": after["o.w"]}), model.inputs)[0]
    rewrite = RewriteLayout({})
    compact = apply_pass(rewrite, sparse)
    assert rewrite.removed == {entry["group"]: entry["units"] - entry["kept"]}
    assert constants(compact)["o.w"].shape[0] < after["o.w"].shape[0]
    found = axis_models.run(compact, model.inputs)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_cheapest_head_goes() -> None:
    model = axis_models.MODELS["heads"]()
    scaled = constants(model.mod)["o.w"].copy()
    scaled[4:8] *= 0.01
    mod = with_constants(model.mod, {"o.w": scaled})
    gram = np.eye(12)
    for statistics in ({}, {"o": gram}):
        sparse = ApplySparsity(rules("*=unit:0.34"), statistics)(mod)
        assert np.flatnonzero(~constants(sparse)["o.w"].any(axis=1)).tolist() == [4, 5, 6, 7]


def test_a_rate_below_one_head_is_said() -> None:
    pass_ = ApplySparsity(rules("*=unit:0.3"))
    with pytest.warns(RuntimeWarning, match="unit:0.3 removes no whole one of 3 heads"):
        pass_(axis_models.MODELS["heads"]().mod)
    assert pruned(pass_) == []


def test_one_head_is_always_kept() -> None:
    model = axis_models.MODELS["heads"]()
    zero = with_constants(model.mod, {"o.w": np.zeros((12, 8), np.float32)})
    rewrite = RewriteLayout({})
    assert constants(apply_pass(rewrite, zero))["o.w"].shape == (4, 8)


def test_heads_are_left_out_by_default() -> None:
    imported = import_onnx(build("bert-mini-random"))
    pass_ = ApplySparsity(LayerRules(UNIT, min_size=0))
    apply_pass(pass_, imported.mod)
    assert {entry["kind"] for entry in pass_.meta["sparsity"]["entries"]} == {"units"}
    assert "attention heads are left out unless a rule names them" in skipped(pass_).values()


def test_scan_channels_are_zero_on_every_side() -> None:
    model = axis_models.MODELS["mamba_step"]()
    pass_ = ApplySparsity(rules(default="unit:0.5"))
    sparse = apply_pass(pass_, apply_pass(AttachLayoutTags(model.opaque_states), model.mod))
    kinds = [(e["kind"], e["units"], e["kept"]) for e in pass_.meta["sparsity"]["entries"]]
    assert kinds == [("units", 12, 6)]
    after = constants(sparse)
    dead = ~after["out.w"].any(axis=1)
    assert dead.sum() == 6
    assert not after["conv_w"][dead].any()
    assert not after["x_proj.w"][dead].any()
    assert not after["in.w"].reshape(-1, 2, 12)[:, :, dead].any()
    read = {name: after[name] for name in ("x_proj.w", "out.w")}
    expected = axis_models.run(with_constants(model.mod, read), model.inputs)[0]
    found = axis_models.run(sparse, model.inputs)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_states_that_are_not_opaque_hold_their_channels() -> None:
    model = axis_models.MODELS["mamba_step"]()
    pass_ = ApplySparsity(rules(default="unit:0.5"))
    apply_pass(pass_, model.mod)
    assert pruned(pass_) == []


def test_kinds_of_targets() -> None:
    func = import_onnx(build("decoder-mini-random")).mod["main"]
    kinds = [target.kind for target in sparsity_targets(func, find_axis_groups(func))]
    assert kinds.count("units") == 2
    assert kinds.count("heads") == 4


def test_a_second_target_on_the_same_weights_is_skipped() -> None:
    imported = import_onnx(build("decoder-mini-random"))
    pass_ = ApplySparsity(rules("*self_attn*=unit:0.5"))
    with pytest.warns(RuntimeWarning, match="pruned with another target"):
        apply_pass(pass_, imported.mod)
    assert [entry["units"] for entry in pass_.meta["sparsity"]["entries"]] == [2, 2]


def test_a_unit_that_relu_kills_goes_first() -> None:
    w1, b1, w2 = mlp_weights()
    dead = np.array([3, 17, 40])
    b1[dead] = -100
    x = example()
    hidden = np.maximum(np.random.default_rng(2).normal(size=(512, D)) @ w1 + b1, 0)
    pass_ = ApplySparsity(rules(f"w1=unit:{3 / F}"), {"fc2": hidden.T @ hidden})
    mod = mlp(w1, b1, w2, "relu")
    sparse = pass_(mod)
    assert np.flatnonzero(~constants(sparse)["w1"].any(axis=0)).tolist() == dead.tolist()
    np.testing.assert_allclose(run(sparse, x), run(mod, x), rtol=1e-3, atol=1e-3)


# Failures.


def test_one_failing_weight_leaves_the_others_pruned() -> None:
    w1, b1, w2 = mlp_weights()
    w1[0, 0] = np.nan
    pass_ = ApplySparsity(LayerRules(VEC, min_size=0))
    with pytest.warns(RuntimeWarning, match="fc1 stays dense: tensor holds 1 NaN"):
        found = constants(pass_(mlp(w1, b1, w2)))
    assert pruned(pass_) == ["fc2"]
    assert "NaN" in skipped(pass_)["fc1"]
    np.testing.assert_array_equal(found["w1"], w1)


@pytest.mark.parametrize(
    ("spec", "gram", "reason"),
    [
        (VEC, np.eye(7), "calibration has shape"),
        (UNIT, np.eye(7), "shape [7, 7] for a weight with 64 rows"),
        (UNIT, np.full((F, F), np.inf), "calibration holds 4096 NaN"),
        (parse_sparsity("block7x7:0.5"), np.eye(F), "not a multiple of 7 x 7"),
    ],
)
def test_what_does_not_fit_is_skipped_with_a_reason(
    spec: SparsitySpec, gram: np.ndarray, reason: str
) -> None:
    pass_ = ApplySparsity(LayerRules(spec, min_size=0), {"fc2": gram})
    with pytest.warns(RuntimeWarning, match="stays dense"):
        pass_(random_mlp())
    assert any(reason in why for why in skipped(pass_).values())


def test_a_divisor_of_a_dropped_unit_is_not_zeroed() -> None:
    w1, b1, w2 = mlp_weights()
    x = relax.Var("x", relax.TensorType((1, 8, D), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x], attrs={"num_input": 1}):
        with builder.dataflow():
            up = builder.emit(relax.op.matmul(x, named_const(w1, "w1")), "fc1")
            scaled = relax.op.divide(up, named_const(np.abs(b1) + 1, "scale"))
            hidden = builder.emit(scaled, "scaled")
            down = builder.emit(relax.op.matmul(hidden, named_const(w2, "w2")), "fc2")
            out = builder.emit_output(relax.op.add(down, x), "out")
        builder.emit_func_output(out)
    sparse = ApplySparsity(LayerRules(UNIT, min_size=0))(builder.get())
    assert constants(sparse)["scale"].all()
    assert np.isfinite(run(sparse, example())).all()


@pytest.mark.parametrize("spec", [UNIT, VEC])
def test_deterministic_and_json(spec: SparsitySpec) -> None:
    wanted, x = LayerRules(spec, min_size=0), example().reshape(-1, D)
    hidden = np.random.default_rng(0).normal(size=(100, F))
    grams = {"fc1": x.T @ x, "fc2": hidden.T @ hidden}
    passes = [ApplySparsity(wanted, grams, seed=3) for _ in range(2)]
    mods = [pass_(random_mlp()) for pass_ in passes]
    tvm.ir.assert_structural_equal(*mods)
    assert json.loads(json.dumps(passes[0].meta, allow_nan=False)) == passes[1].meta
    for entry in passes[0].meta["sparsity"]["entries"]:
        assert entry["loss"]["output"] > 0
        assert entry["bytes_after"] < entry["bytes_before"]
        assert entry["delta_layout"]


def test_requests_follow_the_rules() -> None:
    assert calibration_requests(random_mlp(), rules("w2=vec16:0.5")) == {"fc2": "gram-halves"}
    assert calibration_requests(random_mlp(), LayerRules(UNIT, min_size=0)) == {
        "fc2": "gram-halves"
    }
    assert calibration_requests(random_mlp(), UNIT) == {}
    imported = import_onnx(build("bert-mini-random"))
    wanted = calibration_requests(imported.mod, rules("*attention*=unit:0.5"))
    assert all(node.endswith("attention/output/dense/MatMul") for node in wanted)


# The cost of several rows.


def test_removal_cost_is_the_energy_lost_after_a_refit() -> None:
    rng = np.random.default_rng(0)
    h = rng.normal(size=(400, 12)) + 0.5 * rng.normal(size=(400, 1))
    weight, gram = rng.normal(size=(12, 5)), h.T @ h
    places = np.arange(12).reshape(3, 4)
    costs = removal_costs(weight, gram, places)
    for unit, rows in enumerate(places):
        kept = np.ones(12, dtype=bool)
        kept[rows] = False
        # The cost has a ridge of one percent.
        refitted = refit_consumer(weight, gram, kept, ridge=1e-9)
        lost = np.linalg.norm(h @ (refitted - weight)) ** 2 / np.linalg.norm(h @ weight) ** 2
        assert costs[unit] == pytest.approx(lost, rel=0.03)


def test_single_rows_cost_what_units_cost() -> None:
    rng = np.random.default_rng(1)
    h, weight = rng.normal(size=(50, 8)), rng.normal(size=(8, 3))
    gram = h.T @ h
    ratio = removal_costs(weight, gram, np.arange(8)[:, None]) / unit_scores([], [weight], gram)
    np.testing.assert_allclose(ratio, ratio[0])


def test_bad_moments_are_refused() -> None:
    with pytest.raises(ShapeError, match="does not fit 3 rows"):
        removal_costs(np.ones((3, 2)), np.eye(2), np.zeros((1, 1), int))
    with pytest.raises(NonFiniteError, match="gram holds"):
        removal_costs(np.ones((2, 2)), np.full((2, 2), np.nan), np.zeros((1, 1), int))
