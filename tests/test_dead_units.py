"""Dead hidden units, from either side of a layer."""

from typing import Any

import numpy as np
import pytest
from relax_models import F, mlp, mlp_weights

from icd_tvm.relax_passes.axis_groups import find_axis_groups
from icd_tvm.relax_passes.dead_units import dead_units

DROPPED = np.array([1, 5, 40, 63])


def _dead(mod: Any) -> list[int]:
    (group,) = (g for g in find_axis_groups(mod["main"]).free if g.size == F)
    return np.flatnonzero(dead_units(mod["main"], group)).tolist()


def test_zero_rows_of_the_consumer() -> None:
    w1, b1, w2 = mlp_weights()
    w2[DROPPED] = 0
    assert _dead(mlp(w1, b1, w2)) == DROPPED.tolist()


def test_zero_columns_and_bias_of_the_producer() -> None:
    w1, b1, w2 = mlp_weights()
    w1[:, DROPPED] = 0
    b1[DROPPED] = 0
    assert _dead(mlp(w1, b1, w2)) == DROPPED.tolist()


def test_a_bias_keeps_the_unit_alive() -> None:
    w1, b1, w2 = mlp_weights()
    w1[:, DROPPED] = 0
    assert _dead(mlp(w1, b1, w2)) == []


@pytest.mark.parametrize(("activation", "dead"), [("relu", DROPPED.tolist()), ("sigmoid", [])])
def test_the_activation_must_map_zero_to_zero(activation: str, dead: list[int]) -> None:
    w1, b1, w2 = mlp_weights()
    w1[:, DROPPED] = 0
    b1[DROPPED] = 0
    assert _dead(mlp(w1, b1, w2, activation)) == dead


def test_dense_has_no_dead_unit() -> None:
    assert _dead(mlp(*mlp_weights())) == []
