"""Sparsity types: the promised pattern and rate, inputs untouched, errors for bad requests."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icd_tvm.adapters import grouping
from icd_tvm.adapters.grouping import assign_groups, assign_units, best_rows
from icd_tvm.adapters.sparsity import (
    SparsitySpec,
    apply_sparsity,
    parse_sparsity,
    select_units,
    unit_scores,
    zero_units,
)
from icd_tvm.adapters.units import kept_count, refit_consumer
from icd_tvm.errors import ConfigError, NonFiniteError, ShapeError

RATES = st.floats(0.05, 0.95)


def weight(k: int = 32, n: int = 48, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(k, n)).astype(np.float32)


def correlated(tokens: int, k: int, seed: int) -> np.ndarray:
    """Inputs in which some directions carry most of the energy, the same for every seed."""
    mix = np.random.default_rng(99).normal(size=(k, k)) * np.geomspace(1, 0.02, k)[:, None]
    return np.random.default_rng(seed).normal(size=(tokens, k)) @ mix


# Requests as text.


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("none", SparsitySpec("none")),
        ("unit:0.5", SparsitySpec("unit", 0.5)),
        (" VEC16:0.25 ", SparsitySpec("vec", 0.25, vector=16)),
        ("block16x8:0.5", SparsitySpec("block", 0.5, block=(16, 8))),
        ("2:4", SparsitySpec("n:m", 0.5, n_m=(2, 4))),
        ("unstructured:0.8", SparsitySpec("unstructured", 0.8)),
    ],
)
def test_parse(text: str, spec: SparsitySpec) -> None:
    assert parse_sparsity(text) == spec
    assert parse_sparsity(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("units:0.5", "'unit:0.5'"),
        ("vek16:0.5", "'vec16:0.5'"),
        ("blok16x16:0.5", "'block16x16:0.5'"),
        ("block16:0.5", "'block16x16:0.5'"),
        ("", "known: none"),
        ("vec16", "e.g. vec16:0.5"),
        ("unit:", "in \\[0, 1\\)"),
        ("unit:half", "in \\[0, 1\\)"),
        ("unit:1.0", "removes one half"),
        ("unit:-0.1", "removes one half"),
        ("unit:nan", "removes one half"),
        ("vec0:0.5", "e.g. vec16"),
        ("block4x0:0.5", "e.g. vec16"),
        ("4:4", "N < M"),
        ("0:4", "N < M"),
    ],
)
def test_bad_requests_point_at_a_valid_one(text: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_sparsity(text)
    assert re.search(hint, caught.value.hint)


# The promised patterns.


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.sampled_from([2, 4, 8]), RATES, st.integers(0, 99))
def test_vec_groups_are_closed_and_balanced(
    k: int, groups: int, size: int, rate: float, seed: int
) -> None:
    w = weight(k, groups * size, seed)
    out, meta = apply_sparsity(w, f"vec{size}", rate)
    kept = kept_count(k, rate)
    assert meta["skipped"] is False
    assert sorted(np.ravel(meta["groups"]["columns"])) == list(range(groups * size))
    for columns, rows in zip(meta["groups"]["columns"], meta["groups"]["rows"], strict=True):
        assert len(columns) == size
        assert len(rows) == kept
        support = np.zeros(k, dtype=bool)
        support[rows] = True
        assert (out[~support][:, columns] == 0).all()
        assert (out[support][:, columns] == w[support][:, columns]).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), RATES, st.integers(0, 99))
def test_unit_drops_the_weakest_columns(k: int, n: int, rate: float, seed: int) -> None:
    w = weight(k, n, seed)
    out, meta = apply_sparsity(w, "unit", rate)
    kept = np.isin(np.arange(n), meta["groups"]["kept"])
    assert kept.sum() == kept_count(n, rate)
    assert (out[:, ~kept] == 0).all()
    assert (out[:, kept] == w[:, kept]).all()
    norms = np.linalg.norm(w.astype(np.float64), axis=0)
    assert kept.all() or norms[kept].min() >= norms[~kept].max()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), RATES, st.integers(0, 99))
def test_blocks_are_whole_and_balanced(rows: int, cols: int, rate: float, seed: int) -> None:
    out, meta = apply_sparsity(weight(4 * rows, 2 * cols, seed), "block4x2", rate)
    counts = (out != 0).reshape(rows, 4, cols, 2).sum(axis=(1, 3))
    assert set(counts.ravel().tolist()) <= {0, 8}
    assert ((counts > 0).sum(axis=0) == kept_count(rows, rate)).all()
    assert meta["groups"]["count"] == (counts > 0).sum()


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([(2, 4), (1, 4), (4, 8), (1, 2)]), st.integers(1, 8), st.integers(1, 9))
def test_n_m_keeps_the_largest(n_m: tuple[int, int], runs: int, width: int) -> None:
    n, m = n_m
    w = weight(runs * m, width)
    out, _ = apply_sparsity(w, "n:m", n_m=n_m)
    cut = out.reshape(runs, m, width)
    assert ((cut != 0).sum(axis=1) == n).all()
    largest = np.sort(np.abs(w).reshape(runs, m, width), axis=1)[:, -n:].sum()
    assert np.abs(out).sum() == pytest.approx(largest, rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), RATES)
def test_unstructured_keeps_the_largest(k: int, n: int, rate: float) -> None:
    w = weight(k, n)
    out, _ = apply_sparsity(w, "unstructured", rate)
    kept = out != 0
    assert kept.sum() == kept_count(k * n, rate)
    assert kept.all() or np.abs(w[kept]).min() >= np.abs(w[~kept]).max()


def test_unstructured_wanda_has_a_budget_per_column() -> None:
    out, _ = apply_sparsity(
        weight(), "unstructured", 0.75, saliency="wanda", calibration=np.ones(32)
    )
    assert ((out != 0).sum(axis=0) == 8).all()


def test_wanda_follows_the_inputs() -> None:
    w = np.ones((8, 4), np.float32)
    norms = np.array([1, 9, 1, 9, 1, 9, 1, 9.0])
    out, _ = apply_sparsity(w, "vec4", 0.5, saliency="wanda", calibration=norms)
    np.testing.assert_array_equal(out[:, 0], norms > 1)


def test_given_groups_are_used() -> None:
    groups = np.random.default_rng(5).permutation(48).reshape(-1, 16)
    _, meta = apply_sparsity(weight(), "vec16", 0.5, groups=groups)
    assert meta["groups"]["columns"] == groups.tolist()


def test_assignment_recovers_planted_groups() -> None:
    rng = np.random.default_rng(0)
    truth = rng.permutation(128).reshape(8, 16)
    saliency = rng.random((96, 128)) * 0.2
    for g in range(8):
        saliency[np.ix_(rng.permutation(96)[:32], truth[g])] += 1
    found = assign_groups(saliency, 16, 32)
    assert {tuple(sorted(g)) for g in truth.tolist()} == {tuple(g) for g in found.tolist()}


def test_assignment_recovers_planted_groups_of_units() -> None:
    """Noise in one half is no reason to part what the other half holds together."""
    rng = np.random.default_rng(0)
    places = rng.permutation(256).reshape(128, 2)
    truth = rng.permutation(128).reshape(8, 16)
    saliency = rng.random((96, 256)) * 0.2
    for units in truth:
        for columns in places[units].T:
            saliency[np.ix_(rng.permutation(96)[:32], columns)] += 1
    found = assign_units(saliency, places, 16, 32, np.zeros(128, np.bool_))
    expected = {tuple(sorted(columns)) for units in truth for columns in places[units].T.tolist()}
    assert {tuple(sorted(columns)) for columns in found.tolist()} == expected


def test_swaps_beat_the_natural_and_the_principal_order(monkeypatch: pytest.MonkeyPatch) -> None:
    saliency = (
        weight(64, 128).astype(np.float64) ** 2 * np.random.default_rng(1).random((64, 128)) ** 3
    )

    def retained(columns: np.ndarray) -> float:
        kept = best_rows(saliency, columns, 24)
        return sum(saliency[kept[g]][:, columns[g]].sum() for g in range(len(columns)))

    natural = retained(np.arange(128).reshape(-1, 16))
    swapped = retained(assign_groups(saliency, 16, 24))
    monkeypatch.setattr(grouping, "SWEEPS", 0)
    started = retained(assign_groups(saliency, 16, 24))
    assert natural <= started
    assert swapped > 1.02 * started


# Coupled units.


def test_units_recover_a_planted_set() -> None:
    rng = np.random.default_rng(0)
    dead = rng.permutation(40)[:20]
    w1, w2 = weight(16, 40), weight(40, 16, 1)
    w1[:, dead] *= 0.01
    kept = select_units(unit_scores([w1], [w2]), 0.5)
    assert set(np.flatnonzero(~kept)) == set(dead)


def test_second_moment_decides_over_the_producer() -> None:
    w1, w2 = np.ones((4, 3)), np.ones((3, 2))
    np.testing.assert_allclose(unit_scores([w1], [w2], np.array([1, 2, 3])), [2, 4, 6])
    np.testing.assert_allclose(unit_scores([w1], [w2]), [8, 8, 8])


def test_redundant_unit_is_cheap_after_refit() -> None:
    h = np.random.default_rng(0).normal(size=(500, 3))
    h = np.column_stack([h, h[:, 0] + 0.01 * h[:, 1]])
    w2 = np.ones((4, 5))
    by_energy = unit_scores([], [w2], np.diag(h.T @ h))
    by_refit = unit_scores([], [w2], h.T @ h)
    assert by_energy[0] > 0.5 * by_energy[1]
    assert by_refit[0] < 0.1 * by_refit[1]


def test_refitted_consumer_on_held_out_activations() -> None:
    train, test, w2 = correlated(800, 40, 1), correlated(800, 40, 2), weight(40, 16)
    kept = select_units(unit_scores([], [w2], train.T @ train), 0.5)
    plain, refitted = zero_units(w2, kept, 0), refit_consumer(w2, train.T @ train, kept)
    assert (refitted[~kept] == 0).all()
    before, after = (np.linalg.norm(test @ (w - w2)) for w in (plain, refitted))
    assert after < 0.8 * before


@given(st.integers(1, 200), st.floats(0, 0.99), st.integers(1, 32))
def test_kept_units_round_up_to_the_multiple(units: int, rate: float, multiple: int) -> None:
    kept = int(select_units(np.arange(units), rate, multiple).sum())
    assert kept % multiple == 0 or kept == units
    assert kept >= min(units, units * (1 - rate) - 1e-6)
    assert kept - multiple < max(1.0, units * (1 - rate) + 1)


def test_ties_keep_the_lower_units() -> None:
    np.testing.assert_array_equal(select_units(np.ones(4), 0.5), [True, True, False, False])


def test_zero_units_on_any_axis() -> None:
    kept = np.array([True, False])
    np.testing.assert_array_equal(zero_units(np.ones(2), kept, 0), [1, 0])
    np.testing.assert_array_equal(zero_units(np.ones((2, 2)), kept, -1), [[1, 0], [1, 0]])
    with pytest.raises(ShapeError, match="does not hold 2 units"):
        zero_units(np.ones((2, 3)), kept, 1)
    with pytest.raises(ShapeError, match="axis 4"):
        zero_units(np.ones(2), kept, 4)


# Contracts.

EVERY_TYPE = [
    ("unit", 0.5),
    ("vec16", 0.5),
    ("block8x8", 0.5),
    ("2:4", None),
    ("unstructured", 0.5),
    ("none", None),
]


@pytest.mark.parametrize(("type_name", "rate"), EVERY_TYPE)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int8])
def test_copies_dtype_and_metadata(type_name: str, rate: float | None, dtype: type) -> None:
    w = (weight() * 40).astype(dtype)
    before = w.copy()
    out, meta = apply_sparsity(w, type_name, rate)
    np.testing.assert_array_equal(w, before)
    assert not np.shares_memory(out, w)
    assert out.dtype == w.dtype
    assert out.shape == w.shape
    assert json.loads(json.dumps(meta, allow_nan=False)) == meta
    assert meta["density"] == np.count_nonzero(out) / out.size
    assert meta["bytes_before"] == w.nbytes


def test_frobenius_loss() -> None:
    w = weight()
    out, meta = apply_sparsity(w, "unstructured", 0.5)
    expected = np.linalg.norm((out - w).astype(np.float64)) / np.linalg.norm(w.astype(np.float64))
    assert meta["loss"]["frobenius"] == pytest.approx(expected, rel=1e-5)
    assert meta["loss"]["output"] is None


def test_packed_bytes() -> None:
    sizes = {t: apply_sparsity(weight(), t, r)[1]["bytes_after"] for t, r in EVERY_TYPE}
    assert sizes["none"] == 32 * 48 * 4
    assert sizes["unit"] == 32 * 24 * 4
    assert sizes["vec16"] == 3 * 16 * (16 * 4 + 4)
    assert sizes["2:4"] == 32 * 24 * 4 + 32 * 24 * 2 // 8


def test_layout_changes_where_an_order_can_help() -> None:
    changed = {t: apply_sparsity(weight(), t, r)[1]["delta_layout"] for t, r in EVERY_TYPE}
    assert changed == {
        "unit": True,
        "vec16": True,
        "block8x8": True,
        "2:4": False,
        "unstructured": False,
        "none": False,
    }


@pytest.mark.parametrize(
    ("type_name", "why"),
    [
        ("vec7", "48 columns are not a multiple of 7"),
        ("block5x4", "not a multiple of 5 x 4"),
        ("3:7", "32 rows are not a multiple of 7"),
    ],
)
def test_a_type_that_does_not_fit_is_skipped_with_a_reason(type_name: str, why: str) -> None:
    rate = None if ":" in type_name else 0.5
    with pytest.warns(RuntimeWarning, match=why):
        out, meta = apply_sparsity(weight(), type_name, rate)
    np.testing.assert_array_equal(out, weight())
    assert meta["skipped"]
    assert why in meta["why"]
    assert not meta["delta_layout"]


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        (np.ones(3), ShapeError, r"shape \[3\]"),
        (np.ones((2, 2, 2)), ShapeError, r"shape \[2, 2, 2\]"),
        (np.ones((0, 3)), ShapeError, r"shape \[0, 3\]"),
        (np.array([["a"]]), ShapeError, "dtype"),
        (np.ones((2, 2), complex), ShapeError, "dtype complex"),
        (np.array([[1, np.nan]]), NonFiniteError, r"1 NaN or infinite values, the first at \[0, 1"),
        (np.array([[np.inf], [1]]), NonFiniteError, r"the first at \[0, 0\]"),
    ],
)
def test_bad_weights(tensor: np.ndarray, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        apply_sparsity(tensor, "unit", 0.5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"type": "unit"}, ConfigError, "needs a rate"),
        ({"type": "unit", "rate": 1.0}, ConfigError, "outside"),
        ({"type": "unti", "rate": 0.5}, ConfigError, "unknown sparsity"),
        ({"type": "n:m"}, ConfigError, "needs n_m"),
        ({"type": "2:4", "rate": 0.7}, ConfigError, "contradicts"),
        ({"type": "2:4", "n_m": (1, 4)}, ConfigError, "contradicts"),
        ({"type": "unit", "rate": 0.5, "saliency": "taylor"}, ConfigError, "'taylor'"),
        ({"type": "unit", "rate": 0.5, "saliency": "wanda"}, ConfigError, "needs calibration"),
        ({"type": "vec4", "rate": 0.5, "refit": True}, ConfigError, "Gram"),
        (
            {"type": "vec4", "rate": 0.5, "refit": True, "calibration": np.ones(32)},
            ConfigError,
            "Gram",
        ),
        ({"type": "unit", "rate": 0.5, "calibration": np.ones(31)}, ShapeError, "32 rows"),
        ({"type": "unit", "rate": 0.5, "calibration": np.ones((0, 32))}, ShapeError, "32 rows"),
        (
            {"type": "unit", "rate": 0.5, "calibration": np.full(32, np.nan)},
            NonFiniteError,
            "calibration holds 32",
        ),
        ({"type": "unit", "rate": 0.5, "groups": [[0]]}, ConfigError, "only vecV"),
        ({"type": "vec16", "rate": 0.5, "groups": [[0, 1], [2]]}, ShapeError, "rectangular"),
        ({"type": "vec16", "rate": 0.5, "groups": [[0, 1]]}, ShapeError, r"expected \[3, 16\]"),
        (
            {"type": "vec16", "rate": 0.5, "groups": np.zeros((3, 16), int)},
            ConfigError,
            "no partition",
        ),
    ],
)
def test_bad_options(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        apply_sparsity(weight(), **options)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: unit_scores([], []), ShapeError),
        (lambda: unit_scores([np.ones((2, 3))], [np.ones((4, 2))]), ShapeError),
        (lambda: unit_scores([np.ones((2, 3))], [], np.ones(4)), ShapeError),
        (lambda: unit_scores([np.ones((2, 3))], [], np.ones((3, 4))), ShapeError),
        (lambda: unit_scores([np.full((2, 3), np.nan)], []), NonFiniteError),
        (lambda: select_units(np.ones((2, 2)), 0.5), ShapeError),
        (lambda: select_units(np.array([]), 0.5), ShapeError),
        (lambda: select_units(np.array([np.nan]), 0.5), NonFiniteError),
        (lambda: select_units(np.ones(3), 1.0), ConfigError),
        (lambda: select_units(np.ones(3), 0.5, 0), ConfigError),
        (lambda: refit_consumer(np.ones((3, 2)), np.ones((2, 2)), np.ones(3, bool)), ShapeError),
    ],
)
def test_bad_units(call, error: type[Exception]) -> None:
    with pytest.raises(error):
        call()
