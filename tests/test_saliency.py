"""Saliency: what each kind ranks by, against the definition."""

from typing import Any

import numpy as np
import pytest
from budget_models import two_mlps
from relax_models import D, F, constants, mlp_weights, random_mlp

from icd_tvm._tvm import tvm
from icd_tvm.adapters.calibration import as_calibration
from icd_tvm.adapters.saliency import RIDGE, energy_after_refit, weight_saliency
from icd_tvm.adapters.sparsity import SparsitySpec, apply_sparsity, parse_sparsity
from icd_tvm.errors import ConfigError
from icd_tvm.models.importer import import_onnx
from icd_tvm.relax_passes.apply_sparsity import ApplySparsity, calibration_requests
from icd_tvm.relax_passes.layer_rules import LayerRules
from icd_tvm.runtime.strengths import Strengths
from icd_tvm.runtime.transforms import _strongest

K, N = 16, 8
W = np.random.default_rng(0).normal(size=(K, N)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(300, K)) * np.geomspace(3, 0.1, K)


def test_definitions() -> None:
    data = as_calibration(X, K)
    squares = W.astype(float) ** 2
    np.testing.assert_allclose(weight_saliency(W, "magnitude", None), squares)
    energies = (X**2).sum(axis=0)
    np.testing.assert_allclose(weight_saliency(W, "wanda", data), squares * energies[:, None])


def test_obs_is_the_energy_lost_after_the_others_were_refitted() -> None:
    x = X.copy()
    # Input 3 is almost a copy of input 0: wanda would keep it, it costs next to nothing.
    x[:, 3] = x[:, 0] + 0.01 * x[:, 3]
    found = weight_saliency(W, "obs", as_calibration(x, K))
    ridge = np.sqrt(RIDGE * (x**2).sum() / K) * np.eye(K)
    rows, target = np.concatenate([x, ridge]), np.concatenate([x, ridge]) @ W
    for k in range(K):
        others = np.delete(np.arange(K), k)
        for n in (0, N - 1):
            # Only the element goes; its column is refitted.
            fit = np.linalg.lstsq(rows[:, others], target[:, n], rcond=None)[0]
            lost = np.linalg.norm(rows[:, others] @ fit - target[:, n]) ** 2
            assert found[k, n] == pytest.approx(lost, rel=1e-6)
    wanda = weight_saliency(W, "wanda", as_calibration(x, K))
    assert found[3].sum() < 0.2 * wanda[3].sum()


def test_energy_after_refit_of_independent_inputs_is_their_own() -> None:
    gram = np.diag(np.arange(1.0, 5.0))
    np.testing.assert_allclose(energy_after_refit(gram), np.diagonal(gram) + RIDGE * 2.5)


@pytest.mark.parametrize("name", ["unit", "vec4", "block4x4", "2:4", "unstructured"])
def test_every_type_takes_obs(name: str) -> None:
    rate = None if name == "2:4" else 0.5
    out, meta = apply_sparsity(W, name, rate, saliency="obs", calibration=X)
    assert meta["params"]["saliency"] == "obs"
    assert np.count_nonzero(out) == W.size // 2
    if name == "unstructured":
        assert ((out != 0).sum(axis=0) == K // 2).all()
    # The ranking is by the cost: a greater cost of a kept element would be in the other set.
    scores = weight_saliency(W, "obs", as_calibration(X, K))
    assert scores[out != 0].mean() > scores[out == 0].mean()


@pytest.mark.parametrize(
    ("calibration", "message"), [(None, "needs calibration"), (np.ones(K), "needs a Gram matrix")]
)
def test_obs_needs_a_gram_matrix(calibration: np.ndarray | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_sparsity(W, "vec4", 0.5, saliency="obs", calibration=calibration)


# Requests.


@pytest.mark.parametrize(
    ("text", "saliency"),
    [
        ("2:4:obs", "obs"),
        ("vec16:0.5", ""),
        (" VEC16:0.5:OBS ", "obs"),
        ("64:2:8:wanda", "wanda"),
        ("vec16+2:4:0.75:obs", "obs"),
        ("block16x16:0.5:wanda", "wanda"),
        ("unstructured:0.7:magnitude", "magnitude"),
    ],
)
def test_a_request_may_name_the_saliency(text: str, saliency: str) -> None:
    spec = parse_sparsity(text)
    assert spec.saliency == saliency
    assert parse_sparsity(str(spec)) == spec
    rest = text.strip().lower().removesuffix(f":{saliency}")
    assert spec.type_name == parse_sparsity(rest).type_name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unit:0.5:obs", "a unit costs what its readers lose"),
        ("none:wanda", "it removes nothing"),
        ("vec16:obs", "has no rate"),
        ("vec16:0.5:fisher", "no readable rate"),
        (":obs", "unknown sparsity"),
        ("vec16:0.5:strays0.002", "no pass can keep"),
    ],
)
def test_requests_that_name_none(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_sparsity(text)


def rules(text: str) -> LayerRules[SparsitySpec]:
    return LayerRules(parse_sparsity(text), min_size=0)


def correlated() -> dict[str, np.ndarray]:
    """Gram matrices of two halves of inputs whose channels come in pairs, nearly equal."""
    grams = {}
    for node, width in (("fc1", D), ("fc2", F)):
        rng = np.random.default_rng(width)
        x = rng.standard_normal((2, 8 * width, width)) * np.geomspace(3, 0.1, width)
        x[:, :, 1::2] = x[:, :, ::2] + 0.1 * x[:, :, 1::2]
        grams[node] = np.stack([half.T @ half for half in x])
    return grams


@pytest.mark.parametrize("saliency", ["magnitude", "wanda", "obs"])
@pytest.mark.parametrize("kind", ["2:4", "vec16:0.5"])
def test_the_pass_ranks_as_the_adapter_does(kind: str, saliency: Any) -> None:
    pass_, grams = ApplySparsity(rules(f"{kind}:{saliency}"), correlated()), correlated()
    found = constants(pass_(random_mlp()))
    w1, _, w2 = mlp_weights()
    spec = parse_sparsity(kind)
    for name, node, weight in (("w1", "fc1", w1), ("w2", "fc2", w2)):
        expected, _ = apply_sparsity(
            weight,
            spec.type_name,
            spec.rate,
            saliency=saliency,
            calibration=grams[node],
            refit=True,
        )
        np.testing.assert_array_equal(found[name], expected)
    entries = pass_.meta["sparsity"]["entries"]
    assert [entry["params"]["saliency"] for entry in entries] == [saliency] * 2
    assert pass_.meta["sparsity"]["spec"] == str(parse_sparsity(f"{kind}:{saliency}"))


def test_obs_and_wanda_keep_other_weights_of_correlated_inputs() -> None:
    obs, wanda, default = (
        constants(ApplySparsity(rules(f"unstructured:0.5{s}"), correlated())(random_mlp()))
        for s in (":obs", ":wanda", "")
    )
    assert ((obs["w1"] != 0) != (wanda["w1"] != 0)).any()
    np.testing.assert_array_equal(default["w1"], wanda["w1"])


@pytest.mark.filterwarnings("ignore:fc2 stays dense")
def test_obs_asks_for_calibration_and_stays_dense_without() -> None:
    mod = random_mlp()
    wanted = {"fc1": "gram-halves", "fc2": "gram-halves"}
    assert calibration_requests(mod, rules("2:4:obs")) == wanted
    pass_ = ApplySparsity(rules("2:4:obs"))
    with pytest.warns(RuntimeWarning, match="fc1 stays dense: saliency 'obs' needs calibration"):
        same = pass_(mod)
    tvm.ir.assert_structural_equal(same["main"], mod["main"])
    assert pass_.meta["sparsity"]["entries"] == []


def test_a_search_keeps_the_saliency() -> None:
    mod = import_onnx(two_mlps()).mod
    strengths = Strengths(mod, rules("vec16:0.5:obs"), {}, (0.1, 0.5))
    tried = [str(spec) for spec in strengths.ladder["a/up"]]
    assert tried == ["vec16:0.1:obs", "vec16:0.5:obs"]


@pytest.mark.parametrize("text", ["vec16:obs", "vec16:0.5:obs"])
def test_the_strongest_rate_of_a_request_with_a_saliency(text: str) -> None:
    assert str(_strongest(text)) == "vec16:0.5:obs"
