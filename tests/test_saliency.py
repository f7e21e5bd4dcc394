"""Saliency: what each kind ranks by, against the definition."""

import numpy as np
import pytest

from icd_tvm.adapters.calibration import as_calibration
from icd_tvm.adapters.saliency import RIDGE, energy_after_refit, weight_saliency
from icd_tvm.adapters.sparsity import apply_sparsity
from icd_tvm.errors import ConfigError

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
