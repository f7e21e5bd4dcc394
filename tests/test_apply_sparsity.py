"""ApplySparsity: zeros where the spec says, order untouched, the incoming module untouched."""

import json

import numpy as np
import pytest
from relax_models import D, F, constants, example, gated_mlp, mlp, mlp_weights, random_mlp, run

from icd_tvm._tvm import relax, tvm
from icd_tvm.adapters.sparsity import parse_sparsity
from icd_tvm.errors import TransformError
from icd_tvm.relax_passes.apply_sparsity import ApplySparsity, calibration_requests
from icd_tvm.relax_passes.axis_groups import find_axis_groups
from icd_tvm.relax_passes.collect_activation_stats import CollectActivationStats
from icd_tvm.relax_passes.hidden_groups import hidden_groups
from icd_tvm.relax_passes.layer_rules import LayerRule, LayerRules
from icd_tvm.runtime.calibrate import calibrate

UNIT, VEC = (LayerRules(parse_sparsity(text), min_size=0) for text in ("unit:0.5", "vec16:0.5"))


def test_the_hidden_axis_is_the_only_hidden_group() -> None:
    func = random_mlp()["main"]
    groups = hidden_groups(func, find_axis_groups(func))
    assert [(group.size, len(group.weights)) for group in groups] == [(F, 2)]


def test_unit_equals_the_mlp_with_zeroed_units() -> None:
    mod = random_mlp()
    sparse = ApplySparsity(UNIT)(mod)
    w1, b1, w2 = mlp_weights()
    saliency = (w1.astype(float) ** 2).sum(0) * (w2.astype(float) ** 2).sum(1)
    dropped = np.argsort(-saliency, kind="stable")[F // 2 :]
    w1[:, dropped] = 0
    b1[dropped] = 0
    w2[dropped] = 0
    tvm.ir.assert_structural_equal(
        sparse.without_attr("icd.transform_meta"), mlp(w1, b1, w2), map_free_vars=True
    )
    np.testing.assert_array_equal(constants(mod)["w1"], mlp_weights()[0])


def test_vec_halves_every_weight_and_keeps_biases() -> None:
    sparse = constants(ApplySparsity(VEC)(random_mlp()))
    assert [np.mean(sparse[name] != 0) for name in ("w1", "w2")] == [0.5, 0.5]
    np.testing.assert_array_equal(sparse["b1"], mlp_weights()[1])


def test_refit_on_activations_lowers_the_error() -> None:
    mod, x = random_mlp(), example(rows=8)
    statistics = {}
    for node, kind in calibration_requests(mod, UNIT).items():
        statistics[node] = _statistics(CollectActivationStats({node: kind})(mod), x)
    plain, refitted = ApplySparsity(UNIT)(mod), ApplySparsity(UNIT, statistics)(mod)
    errors = [np.linalg.norm(run(m, x) - run(mod, x)) for m in (plain, refitted)]
    assert errors[1] < 0.9 * errors[0]


def test_statistics_are_the_gram_matrix_of_the_activations() -> None:
    mod, x = random_mlp(), example()
    gram = _statistics(CollectActivationStats({"fc1": "gram"})(mod), x)
    moment = _statistics(CollectActivationStats({"fc1": "moment"})(mod), x)
    rows = x.reshape(-1, x.shape[-1])
    np.testing.assert_allclose(gram, rows.T @ rows, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(moment, np.diag(gram), rtol=1e-4)


def test_halves_are_the_even_and_the_odd_batches() -> None:
    mod, batches = random_mlp(), [example(seed=seed) for seed in range(3)]
    target = tvm.target.Target({"kind": "llvm", "opt-level": 0})
    grams = [x[0].T @ x[0] / 3 for x in batches]
    found = calibrate(mod, {"fc1": "gram-halves"}, [{"x": x} for x in batches], target)
    np.testing.assert_allclose(found["fc1"][0], grams[0] + grams[2], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["fc1"][1], grams[1], rtol=1e-4, atol=1e-4)


def test_meta_travels_with_the_module() -> None:
    pass_ = ApplySparsity(UNIT)
    sparse = tvm.ir.load_json(tvm.ir.save_json(pass_(random_mlp())))
    assert json.loads(sparse.attrs["icd.transform_meta"]) == pass_.meta
    assert pass_.meta["sparsity"]["entries"][0]["kept"] == F // 2


def test_none_changes_nothing() -> None:
    mod = random_mlp()
    same = ApplySparsity(parse_sparsity("none"))(mod)
    tvm.ir.assert_structural_equal(same["main"], mod["main"])


def test_unknown_matmul_is_refused() -> None:
    with pytest.raises(TransformError, match="no matmul named 'fc9'"):
        CollectActivationStats({"fc9": "gram"})(random_mlp())


def _statistics(mod: object, x: np.ndarray) -> np.ndarray:
    executable = tvm.compile(mod, tvm.target.Target("llvm"))
    outputs = relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x))
    return outputs[1].numpy()


def gated(unread: int = 0) -> tuple[object, np.ndarray]:
    """Return a gated MLP of 96 units, the last ``unread`` of a permutation not read, and them."""
    rng = np.random.default_rng(5)
    w1, w2 = (rng.standard_normal(s).astype(np.float32) for s in ((D, 192), (96, D)))
    gone = rng.permutation(96)[96 - unread :]
    w2[gone] = 0
    return gated_mlp(w1, w2), gone


def supports(array: np.ndarray) -> list[bytes]:
    return [column.tobytes() for column in (array != 0).T]


def partition(keys: list[bytes]) -> set[frozenset[int]]:
    return {frozenset(i for i, key in enumerate(keys) if key == own) for own in set(keys)}


def test_the_columns_of_a_unit_go_into_groups_together() -> None:
    mod, _ = gated()
    found = supports(constants(ApplySparsity(VEC)(mod))["w1"])
    first, second = partition(found[:96]), partition(found[96:])
    assert first == second
    assert {len(group) for group in first} == {16}
    assert not set(found[:96]) & set(found[96:])


def shares_of(unread: int) -> list[int]:
    """Return how many of some units of 96 lie in each group of 16 if they fill groups."""
    live = 96 - unread
    return sorted([0] * (live // 16) + [16 - live % 16] * (live % 16 > 0) + [16] * (unread // 16))


@pytest.mark.parametrize("unread", [40, 48, 5, 96])
def test_units_that_nothing_reads_fill_groups_of_their_own(unread: int) -> None:
    mod, gone = gated(unread)
    rules = LayerRules(parse_sparsity("none"), (LayerRule("w1", parse_sparsity("vec16:0.5")),))
    sparse = constants(ApplySparsity(rules)(mod))["w1"]
    assert (sparse != 0).sum(axis=0).tolist() == [D // 2] * 192
    found = partition(supports(sparse)[:96])
    assert sorted(len(group & set(gone.tolist())) for group in found) == shares_of(unread)


def test_what_reads_the_units_is_pruned_first() -> None:
    mod, _ = gated()
    pass_ = ApplySparsity(VEC)
    found = constants(pass_(mod))
    assert [entry["node"] for entry in pass_.meta["sparsity"]["entries"]] == ["fc2", "fc1"]
    unread = set(np.flatnonzero(~found["w2"].any(axis=1)).tolist())
    groups = partition(supports(found["w1"])[:96])
    assert len(unread) > 8
    assert sorted(len(group & unread) for group in groups) == shares_of(len(unread))


def test_units_that_do_not_fill_groups_leave_the_columns_free() -> None:
    rng = np.random.default_rng(7)
    w1, w2 = (rng.standard_normal(s).astype(np.float32) for s in ((D, 176), (88, D)))
    found = partition(supports(constants(ApplySparsity(VEC)(gated_mlp(w1, w2)))["w1"]))
    assert {len(group) for group in found} == {16}
    assert len(found) == 11
