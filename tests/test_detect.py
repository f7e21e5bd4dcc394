"""Detection: planted structures are recovered, random masks are not reported as structure."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icd_tvm.adapters.sparsity import apply_sparsity, detect_sparsity
from icd_tvm.errors import NonFiniteError, ShapeError


def weight(k: int = 128, n: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(k, n)).astype(np.float32)


def scattered_vec(k: int, groups: int, size: int, kept: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mask = np.zeros((k, groups * size), dtype=bool)
    for columns in rng.permutation(groups * size).reshape(groups, size):
        mask[np.ix_(rng.permutation(k)[:kept], columns)] = True
    return weight(k, groups * size, seed) * mask


def sorted_groups(groups: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(sorted(group)) for group in groups}


def test_dense() -> None:
    found = detect_sparsity(weight())
    assert (found.kind, found.structured, found.density) == ("dense", False, 1.0)
    assert found.summary == "dense: no structure"


@settings(max_examples=30, deadline=None)
@given(
    st.integers(8, 160),
    st.integers(8, 160),
    st.floats(0.03, 0.97),
    st.integers(0, 10**6),
)
def test_random_masks_have_no_structure(k: int, n: int, density: float, seed: int) -> None:
    mask = np.random.default_rng(seed).random((k, n)) < density
    mask[0, 0] = True
    found = detect_sparsity(np.where(mask, 1.5, 0.0))
    assert not found.structured, found.summary


def test_few_rows_repeat_their_patterns_by_chance() -> None:
    mask = np.random.default_rng(0).random((6, 4000)) < 0.5
    assert detect_sparsity(np.where(mask, 1.0, 0.0)).kind != "vec"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rate", [0.3, 0.5, 0.7])
def test_pruned_by_magnitude_has_no_structure(rate: float, seed: int) -> None:
    # Rows of very different scale, like the outlier channels of trained weights.
    scale = np.random.default_rng(seed).lognormal(0, 0.3, (128, 1))
    out, _ = apply_sparsity(weight(seed=seed) * scale, "unstructured", rate)
    found = detect_sparsity(out)
    assert found.kind == "unstructured", found.summary
    assert "no structure" in found.summary


@pytest.mark.parametrize("axis", [0, 1])
def test_scattered_units(axis: int) -> None:
    w = weight(96, 64)
    dead = np.sort(np.random.default_rng(1).permutation(w.shape[axis])[:20])
    if axis == 0:
        w[dead] = 0
    else:
        w[:, dead] = 0
    finding = detect_sparsity(w).findings[0]
    assert finding.kind == "unit"
    assert finding.params == {("zero_rows", "zero_columns")[axis]: dead.tolist()}
    assert finding.confidence == 1.0


@pytest.mark.parametrize("rate", [0.5, 0.99])
def test_units_of_the_adapter(rate: float) -> None:
    out, meta = apply_sparsity(weight(), "unit", rate)
    finding = detect_sparsity(out).findings[0]
    zero = np.setdiff1d(np.arange(256), meta["groups"]["kept"])
    assert finding.params == {"zero_columns": zero.tolist()}


def test_a_single_dead_unit() -> None:
    w = weight()
    w[:, 17] = 0
    assert detect_sparsity(w).findings[0].params == {"zero_columns": [17]}


@settings(max_examples=20, deadline=None)
@given(
    st.integers(64, 128),
    st.integers(3, 8),
    st.sampled_from([4, 8, 16]),
    st.floats(0.2, 0.8),
    st.integers(0, 999),
)
def test_scattered_vec_groups(k: int, groups: int, size: int, share: float, seed: int) -> None:
    w = scattered_vec(k, groups, size, int(share * k), seed)
    finding = next(f for f in detect_sparsity(w).findings if f.kind == "vec")
    assert (finding.params["axis"], finding.params["size"]) == (1, size)
    assert finding.params["count"] == groups
    assert finding.params["contiguous"] is False
    for columns, rows in zip(finding.params["groups"], finding.params["supports"], strict=True):
        outside = np.setdiff1d(np.arange(k), rows)
        assert (w[np.ix_(rows, columns)] != 0).all()
        assert (w[np.ix_(outside, columns)] == 0).all()


def test_groups_of_the_adapter_are_recovered_exactly() -> None:
    out, meta = apply_sparsity(weight(), "vec16", 0.5)
    finding = detect_sparsity(out).findings[0]
    assert sorted_groups(finding.params["groups"]) == sorted_groups(meta["groups"]["columns"])
    assert finding.params["kept"] == [64]
    assert "16 closed scattered groups of 16 columns with 64 of 128 rows kept" in finding.reason


def test_contiguous_groups_are_told_from_scattered_ones() -> None:
    natural = np.arange(256).reshape(-1, 16)
    out, _ = apply_sparsity(weight(), "vec16", 0.5, groups=natural)
    assert detect_sparsity(out).findings[0].params["contiguous"] is True


def test_groups_of_rows() -> None:
    finding = detect_sparsity(scattered_vec(128, 24, 16, 50, 0).T).findings[0]
    assert (finding.kind, finding.params["axis"], finding.params["size"]) == ("vec", 0, 16)
    assert "groups of 16 rows with 50 of 128 columns" in finding.reason


def test_groups_beside_dead_units() -> None:
    w = scattered_vec(128, 24, 16, 60, 3)
    w[:, [5, 40]] = 0
    assert [f.kind for f in detect_sparsity(w).findings] == ["vec", "unit"]
    w[:, : w.shape[1] * 3 // 4] = 0
    assert detect_sparsity(w).kind == "unit"


@pytest.mark.parametrize("strays", [0.002, 0.02])
def test_strays_are_counted(strays: float) -> None:
    w = scattered_vec(256, 16, 16, 100, 4)
    extra = (np.random.default_rng(5).random(w.shape) < strays) & (w == 0)
    finding = detect_sparsity(np.where(extra, 0.1, w)).findings[0]
    assert finding.kind == "vec-strays"
    assert finding.params["count"] == 16
    planted = extra.sum() / (extra.sum() + np.count_nonzero(w))
    assert finding.params["strays"] == pytest.approx(planted)
    assert finding.params["holes"] == 0
    assert finding.confidence == pytest.approx(1 - planted)


def test_holes_are_counted() -> None:
    w = scattered_vec(256, 32, 16, 100, 6)
    gone = (np.random.default_rng(7).random(w.shape) < 0.01) & (w != 0)
    (finding,) = detect_sparsity(np.where(gone, 0, w)).findings
    assert finding.params["holes"] == pytest.approx(gone.sum() / (np.count_nonzero(w) - gone.sum()))


@pytest.mark.parametrize("block", [(16, 16), (8, 32), (4, 4), (64, 16)])
def test_aligned_blocks(block: tuple[int, int]) -> None:
    rng = np.random.default_rng(8)
    rows, cols = block
    grid = rng.random((256 // rows, 256 // cols)) < 0.5
    finding = detect_sparsity(weight(256, 256) * np.kron(grid, np.ones(block))).findings[0]
    assert finding.kind == "block"
    assert (finding.params["rows"], finding.params["cols"]) == block
    assert finding.params["aligned"]
    assert finding.params["count"] == grid.sum()


def test_scattered_blocks() -> None:
    rng = np.random.default_rng(9)
    w = weight(256, 256) * np.kron(rng.random((16, 16)) < 0.5, np.ones((16, 16)))
    w = w[rng.permutation(256)][:, rng.permutation(256)]
    finding = detect_sparsity(w).findings[0]
    assert finding.kind == "block"
    assert finding.params == {"rows": 16, "cols": 16, "aligned": False}


@pytest.mark.parametrize("n_m", [(2, 4), (1, 4), (4, 8), (1, 2)])
@pytest.mark.parametrize("axis", [0, 1])
def test_n_m(n_m: tuple[int, int], axis: int) -> None:
    out, _ = apply_sparsity(weight(128, 96), "n:m", n_m=n_m)
    (finding,) = detect_sparsity(out if axis == 0 else out.T).findings
    assert finding.kind == "n:m"
    assert (finding.params["n"], finding.params["m"], finding.params["axis"]) == (*n_m, axis)
    assert finding.confidence == 1.0


def test_n_m_with_exceptions_is_less_certain() -> None:
    out, _ = apply_sparsity(weight(), "2:4")
    out[np.random.default_rng(0).random(out.shape) < 0.01] = 0
    finding = detect_sparsity(out).findings[0]
    assert finding.kind == "n:m"
    assert 0.9 < finding.confidence < 1


def test_all_zero() -> None:
    found = detect_sparsity(np.zeros((4, 6)))
    assert (found.kind, found.density) == ("unit", 0.0)
    assert found.findings[0].params["zero_columns"] == list(range(6))


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (3, 2)])
def test_tiny_weights(shape: tuple[int, int]) -> None:
    assert detect_sparsity(np.ones(shape)).kind == "dense"
    w = np.ones(shape)
    w[0, 0] = 0
    detect_sparsity(w)


@pytest.mark.parametrize("type_name", ["unit", "vec16", "block16x16", "2:4", "unstructured"])
def test_json_round_trip(type_name: str) -> None:
    out, _ = apply_sparsity(weight(), type_name, 0.5)
    plain = detect_sparsity(out).to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_bad_weights() -> None:
    with pytest.raises(ShapeError):
        detect_sparsity(np.ones(4))
    with pytest.raises(NonFiniteError):
        detect_sparsity(np.array([[np.nan, 1.0]]))
