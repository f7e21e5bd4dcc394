"""What every S adapter promises: the same metadata, untouched inputs, clear errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from icd_tvm.adapters.calibration import Calibration
from icd_tvm.adapters.channel_permutation import permute_channels
from icd_tvm.adapters.refit import RIDGE
from icd_tvm.adapters.sparsity import apply_sparsity, detect_sparsity, make_spec, zero_units
from icd_tvm.adapters.units import refit_consumer, removal_costs, select_units, unit_scores
from icd_tvm.errors import ConfigError, NonFiniteError, ShapeError

K, N = 32, 48
TYPES: tuple[tuple[str, float | None], ...] = (
    ("none", None),
    ("unit", 0.5),
    ("vec16", 0.5),
    ("block8x8", 0.5),
    ("2:4", None),
    ("16:2:8", None),
    ("vec16+2:4", 0.75),
    ("block8x8+2:4", 0.75),
    ("unstructured", 0.75),
)
FIELDS = {
    "kind": str,
    "type": str,
    "rate": float,
    "shape": list,
    "density": float,
    "params": dict,
    "loss": dict,
    "bytes_before": int,
    "bytes_after": int,
    "format": str,
    "groups": dict,
    "delta_layout": bool,
    "skipped": bool,
    "why": str,
}


def frozen(*shape: int, seed: int = 0) -> np.ndarray:
    """Return random values that cannot be written to."""
    array = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    array.setflags(write=False)
    return array


def frozen_gram(k: int = K, seed: int = 1) -> np.ndarray:
    x = frozen(4 * k, k, seed=seed)
    gram = x.T @ x
    gram.setflags(write=False)
    return gram


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize(("name", "rate"), TYPES)
def test_metadata_of_every_type(name: str, rate: float | None, refit: bool) -> None:
    gram = frozen_gram()
    saliency = "wanda" if refit else "magnitude"
    (out, meta), (again, same) = (
        apply_sparsity(frozen(K, N), name, rate, saliency=saliency, calibration=gram, refit=refit)
        for _ in range(2)
    )
    np.testing.assert_array_equal(out, again)
    assert meta == same
    assert {key: type(value) for key, value in meta.items()} == FIELDS
    assert json.loads(json.dumps(meta, allow_nan=False)) == meta
    # A Gram matrix alone holds nothing to choose a ridge on; units have no refit of their own.
    ridge = {"ridge": RIDGE} if refit and name not in ("none", "unit") else {}
    assert meta["params"] == {"saliency": saliency, "refit": refit, "seed": 0, **ridge}
    assert meta["skipped"] == (name == "none")
    assert meta["why"]
    assert (out.dtype, out.flags.writeable) == (np.float32, True)
    if name != "none":
        # The output error is that of the Gram matrix: ||X (W' - W)|| / ||X W||.
        delta, dense = out.astype(float) - frozen(K, N), frozen(K, N).astype(float)
        lost, whole = (np.trace(w.T @ gram.astype(float) @ w) for w in (delta, dense))
        assert meta["loss"]["output"] == pytest.approx(np.sqrt(lost / whole), rel=1e-4)
        assert meta["bytes_after"] < meta["bytes_before"]
        assert make_spec(meta["type"], meta["rate"]).rate == meta["rate"]


CALLS: dict[str, Callable[[], Any]] = {
    "groups": lambda: apply_sparsity(
        frozen(K, N), "vec16", 0.5, groups=np.arange(N).reshape(3, 16), refit=False
    ),
    "order": lambda: apply_sparsity(frozen(K, N), "2:4", order=np.arange(K)[::-1]),
    "permute": lambda: permute_channels(frozen(K, N), energy=np.abs(frozen(K))),
    "detect": lambda: detect_sparsity(frozen(K, N)).to_json(),
    "scores": lambda: unit_scores([frozen(N, K)], [frozen(K, N)], frozen_gram()),
    "costs": lambda: removal_costs(frozen(K, N), frozen_gram(), np.arange(K).reshape(8, 4)),
    "select": lambda: select_units(frozen(K), 0.5),
    "zero": lambda: zero_units(frozen(K, N), np.arange(K) < 9, 0),
    "refit": lambda: refit_consumer(frozen(K, N), frozen_gram(), np.arange(K) < 9),
}


@pytest.mark.parametrize("name", CALLS)
def test_repeats_exactly_and_writes_to_no_input(name: str) -> None:
    # Frozen inputs raise on any write.
    first, second = CALLS[name](), CALLS[name]()
    if isinstance(first, tuple):
        np.testing.assert_array_equal(first[0], second[0])
        assert first[1] == second[1]
    else:
        np.testing.assert_array_equal(first, second)


def test_the_seed_is_recorded() -> None:
    assert apply_sparsity(frozen(K, N), "vec16", 0.5, seed=7)[1]["params"]["seed"] == 7


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        (Calibration(np.full(K, np.nan)), NonFiniteError, "calibration holds 32"),
        (Calibration(np.ones(K), np.full((K, K), np.inf)), NonFiniteError, "holds 1024"),
        (Calibration(np.ones(K), np.eye(3)), ShapeError, r"shape \[3, 3\]"),
        (Calibration(np.ones(3)), ShapeError, r"shape \[3\]"),
        (Calibration(np.ones(K), np.eye(K), (np.eye(K), np.eye(3))), ShapeError, r"\[3, 3\]"),
        (np.full((2, K, K), np.inf), NonFiniteError, "calibration holds 2048"),
        (np.ones((3, K, K)), ShapeError, r"shape \[3, 32, 32\]"),
        (np.full((K, K), np.nan), NonFiniteError, "calibration holds 1024"),
        (np.ones((4, 4, K)), ShapeError, r"shape \[4, 4, 32\]"),
        (np.array(["a"] * K), ShapeError, "dtype"),
    ],
)
def test_bad_calibration(calibration: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        apply_sparsity(frozen(K, N), "vec16", 0.5, saliency="wanda", calibration=calibration)


@pytest.mark.parametrize("name", ["vec16", "unstructured", "block8x8"])
def test_an_indefinite_gram_matrix_is_refused(name: str) -> None:
    gram = np.full((K, K), 5.0)
    np.fill_diagonal(gram, 1.0)
    with pytest.raises(ConfigError, match="not positive semidefinite"):
        apply_sparsity(frozen(K, N), name, 0.5, saliency="wanda", calibration=gram, refit=True)
    with pytest.raises(ConfigError, match="not positive semidefinite"):
        refit_consumer(frozen(K, N), gram, np.arange(K) < 9)
