"""Two-level sparsity: both levels hold, the density is the promised one, bad requests fail."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icd_tvm.adapters.hierarchical import blocks_n_m, v_n_m, vectors_n_m
from icd_tvm.adapters.sparsity import SparsitySpec, apply_sparsity, parse_sparsity
from icd_tvm.errors import ConfigError, PermutationError


def weight(k: int = 32, n: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(k, n)).astype(np.float32)


def in_runs(mask: np.ndarray, m: int) -> np.ndarray:
    return mask.reshape(-1, m, mask.shape[1]).sum(axis=1)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("64:2:8", SparsitySpec("v:n:m", 0.75, vector=64, n_m=(2, 8))),
        ("vec16+2:4:0.75", SparsitySpec("hds", 0.75, vector=16, n_m=(2, 4))),
        (" Block16x8+1:4:0.9 ", SparsitySpec("hds", 0.9, block=(16, 8), n_m=(1, 4))),
    ],
)
def test_parse(text: str, spec: SparsitySpec) -> None:
    assert parse_sparsity(text) == spec
    assert parse_sparsity(str(spec)) == spec


def test_outer_rate_leaves_the_asked_rate_in_all() -> None:
    assert parse_sparsity("vec16+2:4:0.75").outer_rate == pytest.approx(0.5)
    assert parse_sparsity("vec16+2:4:0.5").outer_rate == 0.0
    assert parse_sparsity("vec16:0.3").outer_rate == 0.3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0:2:8", "V >= 1"),
        ("8:4:8", "N < 4"),
        ("8:2:3", "4 <= M"),
        ("unit+2:4:0.75", "outer level 'unit'"),
        ("vek16+2:4:0.75", "unknown sparsity 'vek16'"),
        ("vec16+2:4", "no rate"),
        ("vec16+2:4:x", "no readable rate"),
        ("vec16+2:4:0.4", "removes 0.5"),
        ("vec16+2:4:1.0", "outside"),
        ("vec16+4:4:0.75", "N < M"),
        ("vec0+2:4:0.75", "below 1"),
        ("vec16+junk", "unknown sparsity"),
        ("+2:4:0.75", "unknown sparsity"),
    ],
)
def test_bad_requests(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_sparsity(text)


@pytest.mark.parametrize(("name", "rate"), [("8:2:8", 0.5), ("vec8+2:4:0.75", 0.75)])
def test_contradicting_rates(name: str, rate: float) -> None:
    with pytest.raises(ConfigError, match="rate"):
        apply_sparsity(weight(), name, rate)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([(2, 8), (1, 8), (2, 10), (2, 4), (3, 5)]),
    st.sampled_from([1, 4, 8]),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_v_n_m_levels(n_m: tuple[int, int], vector: int, runs: int, groups: int, seed: int) -> None:
    n, m = n_m
    w = weight(runs * m, groups * vector, seed)
    out, meta = apply_sparsity(w, f"{vector}:{n}:{m}")
    mask = out != 0
    assert (in_runs(mask, m) == n).all()
    shared = mask.reshape(runs, m, groups, vector).any(axis=3).sum(axis=1)
    assert (shared <= 4).all()
    assert (out[mask] == w[mask]).all()
    assert meta["density"] == pytest.approx(n / m)
    assert not meta["delta_layout"]


def test_v_n_m_with_one_column_keeps_the_largest() -> None:
    scores = weight().astype(np.float64) ** 2
    expected, _ = apply_sparsity(weight(), "n:m", n_m=(2, 8))
    np.testing.assert_array_equal(v_n_m(scores, 1, 2, 8).mask, expected != 0)


def test_v_n_m_finds_planted_rows() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random((16, 8)) * 0.1
    rows = np.array([1, 2, 6, 7, 8, 10, 13, 15])
    scores[rows] += 1
    assert set(np.flatnonzero(v_n_m(scores, 8, 2, 8).mask.any(axis=1))) <= set(rows)


def test_v_n_m_never_keeps_a_dropped_row() -> None:
    # Zero saliency inside the kept rows: ties must not reach the dropped ones.
    scores = np.zeros((8, 2))
    scores[:4, 0] = 1.0
    mask = v_n_m(scores, 2, 2, 8).mask
    assert (mask.sum(axis=0) == 2).all()
    assert not mask[4:].any()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.floats(0.5, 0.95), st.integers(0, 99))
def test_vectors_n_m_levels(runs: int, groups: int, rate: float, seed: int) -> None:
    w = weight(4 * runs, 8 * groups, seed)
    out, meta = apply_sparsity(w, "vec8+2:4", rate)
    kept = meta["groups"]["rows_kept"]
    assert kept % 4 == 0
    assert sorted(np.ravel(meta["groups"]["columns"])) == list(range(8 * groups))
    for columns, rows in zip(meta["groups"]["columns"], meta["groups"]["rows"], strict=True):
        inside = out[np.ix_(rows, columns)]
        assert (in_runs(inside != 0, 4) == 2).all()
        assert np.count_nonzero(out[:, columns]) == np.count_nonzero(inside)
    assert meta["density"] >= 1 - rate - 1e-6
    assert meta["density"] - (1 - rate) <= 2 / w.shape[0] + 1e-6
    assert meta["delta_layout"]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.floats(0.5, 0.95), st.integers(0, 99))
def test_blocks_n_m_levels(rows: int, cols: int, rate: float, seed: int) -> None:
    out, meta = apply_sparsity(weight(8 * rows, 4 * cols, seed), "block8x4+2:4", rate)
    counts = (out != 0).reshape(rows, 8, cols, 4).sum(axis=(1, 3))
    assert set(counts.ravel().tolist()) <= {0, 16}
    assert (counts > 0).sum() == meta["groups"]["count"]
    assert set(in_runs(out != 0, 4).ravel().tolist()) <= {0, 2}


def test_blocks_are_ranked_by_what_is_left_of_them() -> None:
    scores = np.ones((8, 2))
    # The second block has the larger sum, the first keeps more after 1:4.
    scores[:4], scores[4:] = [[0.0], [4.0], [0.0], [0.0]], 1.5
    kept = blocks_n_m(scores, (4, 2), 0.5, 1, 4).mask
    assert kept[:4].any()
    assert not kept[4:].any()


def test_given_groups_are_used() -> None:
    groups = np.random.default_rng(5).permutation(32).reshape(-1, 8)
    _, meta = apply_sparsity(weight(), "vec8+2:4", 0.75, groups=groups)
    assert meta["groups"]["columns"] == groups.tolist()
    scores = weight().astype(np.float64) ** 2
    assert vectors_n_m(scores, 8, 0.5, 2, 4, groups).groups["columns"] == groups.tolist()
    with pytest.raises(ConfigError, match="only vecV"):
        apply_sparsity(weight(), "block8x8+2:4", 0.75, groups=groups)


@pytest.mark.parametrize(("name", "rate"), [("8:2:8", None), ("vec8+2:4", 0.75)])
def test_refit_keeps_the_pattern_and_lowers_the_error(name: str, rate: float | None) -> None:
    rng = np.random.default_rng(1)
    mix = rng.normal(size=(32, 32)) * np.geomspace(1, 0.02, 32)[:, None]
    train, test = rng.normal(size=(800, 32)) @ mix, rng.normal(size=(800, 32)) @ mix
    w = weight()
    plain, _ = apply_sparsity(w, name, rate, saliency="wanda", calibration=train)
    refit, _ = apply_sparsity(w, name, rate, saliency="wanda", calibration=train, refit=True)
    np.testing.assert_array_equal(plain != 0, refit != 0)
    assert np.linalg.norm(test @ (refit - w)) < 0.8 * np.linalg.norm(test @ (plain - w))


@pytest.mark.parametrize(
    ("name", "rate", "why"),
    [
        ("5:2:8", None, "32 columns are not a multiple of 5"),
        ("8:2:5", None, "32 rows are not a multiple of 5"),
        ("vec5+2:4", 0.75, "32 columns are not a multiple of 5"),
        ("vec8+2:5", 0.75, "32 rows are not a multiple of 5"),
        ("block5x4+2:4", 0.75, "not a multiple of 5 x 4"),
        ("block8x8+2:5", 0.75, "blocks of 8 rows are not a multiple of 5"),
    ],
)
def test_a_shape_that_does_not_fit_is_skipped(name: str, rate: float | None, why: str) -> None:
    with pytest.warns(RuntimeWarning, match=why):
        out, meta = apply_sparsity(weight(), name, rate)
    np.testing.assert_array_equal(out, weight())
    assert meta["skipped"]
    assert why in meta["why"]


@pytest.mark.parametrize(
    ("name", "rate"), [("8:2:8", None), ("vec8+2:4", 0.75), ("block8x8+2:4", 0.75)]
)
def test_packed_bytes_are_the_values_and_little_else(name: str, rate: float | None) -> None:
    out, meta = apply_sparsity(weight(), name, rate)
    values = np.count_nonzero(out) * 4
    assert values < meta["bytes_after"] < 0.5 * meta["bytes_before"]
    assert meta["type"] == parse_sparsity(f"{name}:{rate}" if rate else name).type_name


# A row order for the runs.


@pytest.mark.parametrize("name", ["2:4", "8:2:8"])
def test_runs_follow_the_order_and_rows_stay(name: str) -> None:
    w, order = weight(), np.random.default_rng(3).permutation(32)
    out, meta = apply_sparsity(w, name, order=order)
    moved, _ = apply_sparsity(w[order], name)
    np.testing.assert_array_equal(out[order], moved)
    assert meta["groups"]["order"] == order.tolist()
    assert meta["delta_layout"]
    assert json.loads(json.dumps(meta)) == meta


def test_refit_with_an_order_keeps_the_pattern() -> None:
    w, order = weight(), np.random.default_rng(3).permutation(32)
    x = np.random.default_rng(0).normal(size=(100, 32))
    plain, _ = apply_sparsity(w, "2:4", calibration=x, order=order)
    refit, _ = apply_sparsity(w, "2:4", calibration=x, order=order, refit=True)
    np.testing.assert_array_equal(plain != 0, refit != 0)


def test_bad_orders() -> None:
    with pytest.raises(ConfigError, match="order given for unit"):
        apply_sparsity(weight(), "unit", 0.5, order=np.arange(32))
    for order in (np.arange(31), np.zeros(32, int), np.arange(32).reshape(4, 8)):
        with pytest.raises(PermutationError, match="no permutation of 32 rows"):
            apply_sparsity(weight(), "2:4", order=order)
