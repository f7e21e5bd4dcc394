"""Strays: closed groups, and the best of the rest as a list."""

import json

import numpy as np
import pytest

from icd_tvm.adapters.sparsity import apply_sparsity, detect_sparsity
from icd_tvm.errors import ConfigError

K, N, V = 32, 48, 8


def weight(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(K, N)).astype(np.float32)


def listed(meta: dict) -> np.ndarray:
    found = meta["groups"]["strays"]
    out = np.zeros((K, N), np.float32)
    out[found["rows"], found["columns"]] = found["values"]
    return out


def test_planted_strays_are_found_and_the_groups_stay_closed() -> None:
    w, natural = weight(), np.arange(N).reshape(-1, V)
    plain, before = apply_sparsity(w, f"vec{V}", 0.5, groups=natural)
    rng = np.random.default_rng(1)
    rows, columns = np.nonzero(plain == 0)
    planted = rng.permutation(len(rows))[:15]
    rows, columns = rows[planted], columns[planted]
    # Large, but in rows that a group of eight still drops.
    w[rows, columns] = 3 + rng.random(15)
    closed, _ = apply_sparsity(w, f"vec{V}", 0.5, groups=natural)
    out, meta = apply_sparsity(w, f"vec{V}", 0.5, groups=natural, strays=15 / (K * N))
    assert json.loads(json.dumps(meta, allow_nan=False)) == meta
    np.testing.assert_array_equal(out, closed)
    assert detect_sparsity(out).findings[0].kind == "vec"
    lost = np.where(out == 0, np.abs(w), 0)
    best = np.sort(lost.ravel())[-15:]
    found = listed(meta)
    np.testing.assert_array_equal(np.sort(np.abs(found[found != 0])), best)
    assert not np.any((found != 0) & (out != 0))
    np.testing.assert_array_equal(found[found != 0], w[found != 0])
    error = np.linalg.norm(out + found - w) / np.linalg.norm(w)
    assert meta["loss"]["frobenius"] == pytest.approx(error)
    assert meta["bytes_after"] == before["bytes_after"] + 15 * (4 + 8)
    assert meta["params"]["strays"] == 15 / (K * N)
    assert meta["format"].endswith(", strays as COO")


def test_a_refit_leaves_the_strays_as_they_are_and_errs_less_than_without() -> None:
    w = weight()
    mix = np.random.default_rng(2).normal(size=(K, K)) * np.geomspace(1, 0.05, K)[:, None]
    x = np.random.default_rng(3).normal(size=(600, K)) @ mix
    errors = []
    for strays in (0.0, 0.02):
        out, meta = apply_sparsity(
            w, f"vec{V}", 0.5, saliency="wanda", calibration=x, refit=True, strays=strays
        )
        whole = out + (listed(meta) if strays else 0)
        errors.append(np.linalg.norm(x @ (whole - w)) / np.linalg.norm(x @ w))
        assert meta["loss"]["output"] == pytest.approx(errors[-1], rel=1e-3)
    found = listed(meta)
    np.testing.assert_array_equal(found[found != 0], w[found != 0])
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("name", "share", "message"),
    [
        ("vec8", 1.0, r"strays = 1.0 is outside"),
        ("vec8", -0.1, r"strays = -0.1 is outside"),
        ("unstructured", 0.1, "strays given for unstructured:0.5"),
        ("block8x8", 0.1, "only vecV"),
    ],
)
def test_bad_strays(name: str, share: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_sparsity(weight(), name, 0.5, strays=share)
