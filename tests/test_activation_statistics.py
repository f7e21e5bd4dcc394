"""Statistics of a layer's input: parts merge to the whole, a division is followed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from relax_models import example, random_mlp, run

from icd_tvm._tvm import apply_pass, relax, tvm
from icd_tvm.adapters.activation_statistics import (
    activation_statistics,
    merge_moments,
)
from icd_tvm.adapters.calibration import Calibration
from icd_tvm.errors import NonFiniteError, ShapeError
from icd_tvm.relax_passes.collect_activation_stats import CollectActivationStats


def values(tokens: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, tokens, 5)) * [1, 2, 4, 8, 0]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(-9, 9), st.integers(0, 99))
def test_parts_merge_to_the_whole(first: int, second: int, power: float, seed: int) -> None:
    parts = [values(first, seed), values(second, seed + 1) * 2.0**power]
    whole = activation_statistics(np.concatenate(parts, axis=1), gram=True)
    seen = [activation_statistics(part, gram=True) for part in parts]
    for merged in (seen[0].merged(seen[1]), seen[1].merged(seen[0])):
        np.testing.assert_array_equal(merged.low, whole.low)
        np.testing.assert_array_equal(merged.high, whole.high)
        np.testing.assert_array_equal(merged.histogram.counts, whole.histogram.counts)
        assert merged.histogram.limit == whole.histogram.limit
        np.testing.assert_allclose(merged.moments.gram, whole.moments.gram, rtol=1e-9)
        np.testing.assert_allclose(merged.moments.energy, np.diag(whole.moments.gram), rtol=1e-9)


def test_what_is_seen() -> None:
    x = values(20, 0)
    seen, rows = activation_statistics(x, gram=True), x.reshape(-1, 5)
    assert activation_statistics(x).moments.gram is None
    np.testing.assert_array_equal(seen.absmax, np.abs(rows).max(axis=0))
    np.testing.assert_allclose(seen.moments.gram, rows.T @ rows)
    assert seen.histogram.counts.sum() == x.size


def test_a_division_is_followed_and_forgets_the_histogram() -> None:
    x, scales = values(20, 0), np.array([0.5, 1, 2, 4, 3])
    found = activation_statistics(x, gram=True).divided(scales)
    wanted = activation_statistics(x / scales, gram=True)
    assert found.histogram is None
    np.testing.assert_allclose(found.absmax, wanted.absmax)
    np.testing.assert_allclose(found.moments.gram, wanted.moments.gram, atol=1e-12)
    np.testing.assert_allclose(found.moments.energy, wanted.moments.energy)
    assert found.merged(wanted).histogram is None
    assert activation_statistics(x).divided(scales).moments.gram is None


def test_a_gram_matrix_is_lost_where_one_side_has_none() -> None:
    moments = activation_statistics(values(3, 0), gram=True).moments
    merged = merge_moments(moments, Calibration(moments.energy))
    assert merged.gram is None
    np.testing.assert_array_equal(merged.energy, 2 * moments.energy)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: activation_statistics(np.float32(1)), ShapeError),
        (lambda: activation_statistics(np.zeros((0, 4))), ShapeError),
        (lambda: activation_statistics(np.array(["a"])), ShapeError),
        (lambda: activation_statistics(np.array([1.0, np.inf])), NonFiniteError),
        (lambda: activation_statistics(np.ones((2, 3))).divided(np.ones(2)), ShapeError),
        (
            lambda: activation_statistics(np.ones((2, 3))).merged(
                activation_statistics(np.ones((2, 4)))
            ),
            ShapeError,
        ),
    ],
)
def test_bad_input(call, error: type[Exception]) -> None:
    with pytest.raises(error):
        call()


def test_the_module_returns_the_inputs_that_are_asked_for() -> None:
    x = example()
    mod = apply_pass(CollectActivationStats({"fc1": "activation"}), random_mlp())
    executable = tvm.compile(mod, tvm.target.Target("llvm"))
    outputs = relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x))
    np.testing.assert_array_equal(outputs[1].numpy(), x.reshape(-1, x.shape[-1]))
    np.testing.assert_allclose(outputs[0].numpy(), run(random_mlp(), x), rtol=1e-5, atol=1e-5)
