"""RewriteLayout: Before/Expected, equal outputs, and the incoming module untouched."""

import numpy as np
import pytest
from axis_models import MODELS
from axis_models import run as run_module
from relax_models import D, F, constants, example, mlp, mlp_weights, random_mlp, run

from icd_tvm._tvm import const_name, named_const, tvm
from icd_tvm.relax_passes.axis_groups import find_axis_groups
from icd_tvm.relax_passes.hidden_groups import hidden_groups
from icd_tvm.relax_passes.permute_constants import rewrite_constants
from icd_tvm.relax_passes.rewrite_layout import RewriteLayout, kept_units, live_tiles


def _hidden_id(mod: object) -> str:
    func = mod["main"]  # type: ignore[index]
    return hidden_groups(func, find_axis_groups(func))[0].id


def test_permutes_every_tied_constant() -> None:
    mod = random_mlp()
    perm = np.random.default_rng(0).permutation(F)
    w1, b1, w2 = mlp_weights()
    rewritten = RewriteLayout({_hidden_id(mod): perm}, compact=False)(mod)
    tvm.ir.assert_structural_equal(
        rewritten, mlp(w1[:, perm], b1[perm], w2[perm]), map_free_vars=True
    )
    np.testing.assert_array_equal(constants(mod)["w1"], w1)


def test_scattered_dead_units_are_sliced_off() -> None:
    w1, b1, w2 = mlp_weights()
    live = np.sort(np.random.default_rng(0).permutation(F)[:32])
    dead = np.setdiff1d(np.arange(F), live)
    w1[:, dead], b1[dead], w2[dead] = 0, 0, 0
    mod = mlp(w1, b1, w2)
    rewrite = RewriteLayout({})
    expected = mlp(w1[:, live], b1[live], w2[live])
    compacted = rewrite(mod)
    tvm.ir.assert_structural_equal(compacted, expected, map_free_vars=True)
    assert rewrite.removed == {_hidden_id(mod): 32}
    np.testing.assert_allclose(run(compacted, example()), run(mod, example()), rtol=1e-5, atol=1e-6)


def test_order_slice_and_private_output_order_together() -> None:
    w1, b1, w2 = mlp_weights()
    w2[::3] = 0
    mod = mlp(w1, b1, w2)
    rng = np.random.default_rng(1)
    perms = {_hidden_id(mod): rng.permutation(F), "out:fc2": rng.permutation(D)}
    rewritten = RewriteLayout(perms)(mod)
    assert constants(rewritten)["w2"].shape == (F, D)
    dead = ~constants(rewritten)["w2"].any(axis=1)
    assert dead.sum() == -(-F // 3)
    assert not constants(rewritten)["w1"][:, dead].any()
    np.testing.assert_allclose(run(rewritten, example()), run(mod, example()), rtol=1e-5, atol=1e-6)


def test_a_dense_module_stays_as_it_is() -> None:
    mod = random_mlp()
    tvm.ir.assert_structural_equal(RewriteLayout({})(mod), mod)


def test_only_whole_dead_tiles_leave_a_decided_order() -> None:
    dead = np.zeros(40, dtype=bool)
    dead[[3, 16, 17]] = True
    assert live_tiles(dead, 16).tolist() == list(range(40))
    dead[16:32] = True
    assert live_tiles(dead, 16).tolist() == [*range(16), *range(32, 40)]
    assert live_tiles(np.ones(40, dtype=bool), 16).tolist() == list(range(16))


@pytest.mark.parametrize(("live", "kept"), [(0, 16), (1, 16), (16, 16), (17, 32), (64, 64)])
def test_kept_units_fill_whole_vectors(live: int, kept: int) -> None:
    dead = np.ones(64, dtype=bool)
    dead[np.random.default_rng(0).permutation(64)[:live]] = False
    indices = kept_units(dead, 16)
    assert len(indices) == kept
    assert set(np.flatnonzero(~dead)) <= set(indices)


def test_a_private_output_order_follows_the_axis_beneath_it() -> None:
    """The halves of a fused projection are reordered and shortened under a decided order."""
    mini = MODELS["swiglu_fused"]()
    dead = np.array([1, 4, 5, 9, 10, 11, 12, 15])

    def silent(const: object, var: object, path: object) -> object:
        array = const.value.numpy()  # type: ignore[attr-defined]
        if const_name(const) == "down.w":
            array[dead] = 0
        return named_const(array, const_name(const))

    mod = mini.mod.clone()
    mod["main"] = rewrite_constants(mod["main"], silent)
    rng = np.random.default_rng(2)
    perms = {_hidden_id(mod): rng.permutation(16), "out:gate_up": rng.permutation(32)}
    rewrite = RewriteLayout(perms, lanes=1)
    rewritten = rewrite(mod)
    assert constants(rewritten)["gate_up.w"].shape == (8, 16)
    expected, found = (run_module(m, mini.inputs)[0] for m in (mod, rewritten))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
