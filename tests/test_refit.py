"""The refit of what survives: less error on inputs it has not seen, the pattern untouched."""

from __future__ import annotations

import numpy as np
import pytest

from icd_tvm.adapters.calibration import as_calibration, output_energy
from icd_tvm.adapters.refit import RIDGE, RIDGES, choose_ridge, refit_groups
from icd_tvm.adapters.sparsity import apply_sparsity


def weight(k: int = 32, n: int = 48, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(k, n)).astype(np.float32)


def correlated(tokens: int, k: int, seed: int) -> np.ndarray:
    """Inputs in which some directions carry most of the energy, the same for every seed."""
    mix = np.random.default_rng(99).normal(size=(k, k)) * np.geomspace(1, 0.02, k)[:, None]
    return np.random.default_rng(seed).normal(size=(tokens, k)) @ mix


@pytest.mark.parametrize("type_name", ["vec8", "block8x8", "2:4", "unstructured"])
def test_refit_lowers_the_error_on_held_out_inputs(type_name: str) -> None:
    w, train, test = weight(64, 32), correlated(1024, 64, 1), correlated(1024, 64, 2)
    rate = None if type_name == "2:4" else 0.5
    errors = []
    for refit in (False, True):
        out, meta = apply_sparsity(
            w, type_name, rate, saliency="wanda", calibration=train, refit=refit
        )
        errors.append(np.linalg.norm(test @ (out - w)) / np.linalg.norm(test @ w))
        assert meta["loss"]["output"] == pytest.approx(errors[-1], rel=0.2)
    assert errors[1] < 0.8 * errors[0]


def halves_of(tokens: int, seed: int, rank: int = 60) -> np.ndarray:
    """Gram matrices of two parts of inputs; a few tokens do not span them."""
    basis = np.random.default_rng(9).normal(size=(rank, 64))
    found = []
    for part in (0, 1):
        rng = np.random.default_rng([seed, part])
        x = rng.normal(size=(tokens, rank)) @ basis + 0.5 * rng.normal(size=(tokens, 64))
        found.append(x.T @ x)
    return np.stack(found)


@pytest.mark.parametrize(("tokens", "weak"), [(24, False), (4096, True)])
@pytest.mark.parametrize("type_name", ["vec8", "unstructured", "vec8+2:4"])
def test_the_ridge_is_the_one_that_serves_unseen_inputs(
    type_name: str, tokens: int, weak: bool
) -> None:
    w, data, unseen = weight(64, 96), halves_of(tokens, 1), halves_of(4096, 2)[0]
    rate = 0.75 if "+" in type_name else 0.5
    out, meta = apply_sparsity(w, type_name, rate, saliency="wanda", calibration=data, refit=True)
    chosen = meta["params"]["ridge"]
    assert (chosen <= RIDGES[1]) == weak
    # Groups of one column are refitted alike by hand.
    errors = {}
    for ridge in RIDGES:
        kept = (out != 0).T
        again = refit_groups(w, data.sum(axis=0), list(np.arange(96)[:, None]), kept, ridge)
        errors[ridge] = output_energy(unseen, (again - w).astype(float))
        if ridge == chosen:
            np.testing.assert_allclose(again, out, rtol=1e-4, atol=1e-5)
    # Half of the tokens want a little more pull than all of them.
    assert errors[chosen] <= 1.15 * min(errors.values())
    assert weak or errors[chosen] < 0.9 * errors[RIDGES[0]]


def test_activations_are_split_in_the_middle() -> None:
    x = correlated(101, 32, 3)
    found = as_calibration(x, 32)
    assert found is not None
    assert found.halves is not None
    np.testing.assert_allclose(found.halves[0], x[:51].T @ x[:51])
    np.testing.assert_allclose(found.halves[1], x[51:].T @ x[51:])
    np.testing.assert_allclose(found.gram, x.T @ x)
    one = as_calibration(x[:1], 32)
    assert one is not None
    # Nothing is left to judge on: the default it is.
    assert choose_ridge(weight(), one, [np.arange(48)], np.ones((1, 32), bool)) == RIDGE


def test_refit_keeps_the_pattern() -> None:
    w, x = weight(), correlated(256, 32, 0)
    plain, _ = apply_sparsity(w, "vec8", 0.5, saliency="wanda", calibration=x)
    refitted, _ = apply_sparsity(w, "vec8", 0.5, saliency="wanda", calibration=x, refit=True)
    np.testing.assert_array_equal(plain != 0, refitted != 0)


def test_refit_without_input_energy_keeps_the_weights() -> None:
    w = weight()
    plain, _ = apply_sparsity(w, "vec8", 0.5)
    refitted, meta = apply_sparsity(w, "vec8", 0.5, calibration=np.zeros((4, 32)), refit=True)
    np.testing.assert_allclose(plain, refitted, rtol=1e-6)
    assert meta["loss"]["output"] == 0.0


def test_activations_and_their_gram_matrix_are_the_same_calibration() -> None:
    x = correlated(200, 32, 3)
    grams = np.stack([part.T @ part for part in (x[:100], x[100:])]).astype(np.float32)
    gram = grams.sum(axis=0)
    gram[0, 1] *= 1 + 1e-6
    found = as_calibration(gram, 32)
    assert found is not None
    np.testing.assert_allclose(found.gram, x.T @ x, rtol=1e-3, atol=1e-2)
    a, b = (
        apply_sparsity(weight(), "vec8", 0.5, saliency="wanda", calibration=data, refit=True)[0]
        for data in (x, grams)
    )
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_square_activations_are_no_gram_matrix() -> None:
    x = np.abs(correlated(32, 32, 4))
    found = as_calibration(x, 32)
    assert found is not None
    np.testing.assert_allclose(found.gram, x.T @ x)
