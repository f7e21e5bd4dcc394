"""Dead hidden units, from either side of a layer."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from axis_models import MODELS, MiniModel, run
from relax_models import F, mlp, mlp_weights

from icd_tvm._tvm import const_name, named_const
from icd_tvm.relax_passes.axis_groups import find_axis_groups
from icd_tvm.relax_passes.dead_units import dead_units
from icd_tvm.relax_passes.hidden_groups import hidden_groups
from icd_tvm.relax_passes.replace_constants import rewrite_constants
from icd_tvm.relax_passes.rewrite_layout import RewriteLayout

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


def _silenced(mini: MiniModel, rows: Mapping[str, Any]) -> MiniModel:
    """Zero some rows of weights by name."""

    def silent(const: Any, var: Any, path: Any) -> Any:
        array = const.value.numpy()
        array[rows.get(const_name(const), [])] = 0
        return named_const(array, const_name(const)) if const_name(const) in rows else const

    mod = mini.mod.clone()
    mod["main"] = rewrite_constants(mod["main"], silent)
    return MiniModel(mod, mini.inputs, mini.expected, mini.opaque_states)


def test_channels_of_a_scan_are_units_and_its_states_are_not() -> None:
    mini = _silenced(MODELS["selective_scan_kernel"](), {"scan.out.w": [1, 4]})
    (group,) = hidden_groups(mini.mod["main"], mini.groups())
    assert group.size == 6
    assert np.flatnonzero(dead_units(mini.mod["main"], group)).tolist() == [1, 4]
    states = next(other for other in mini.groups().free if other.size == 5)
    assert not dead_units(mini.mod["main"], states).any()
    rewrite = RewriteLayout({}, lanes=1)
    smaller = rewrite(mini.mod)
    assert rewrite.removed == {group.id: 2}
    expected, found = (run(mod, mini.inputs)[0] for mod in (mini.mod, smaller))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "dead"),
    [({"out.w": [3, 7]}, []), ({"out.w": [3, 7], "back.w": [3, 9]}, [3])],
)
def test_a_unit_that_the_recurrence_reads_is_alive(
    rows: dict[str, list[int]], dead: list[int]
) -> None:
    mini = _silenced(MODELS["recurrent_state"](), rows)
    (group,) = hidden_groups(mini.mod["main"], mini.groups())
    assert np.flatnonzero(dead_units(mini.mod["main"], group)).tolist() == dead
