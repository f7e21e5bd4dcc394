"""Models that arrive quantised: groups, permutations and compaction against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from converter_check import MS, array_model, run_imported, run_ort
from onnx import helper

from icd_tvm._tvm import apply_pass, const_name
from icd_tvm.adapters.sparsity import parse_sparsity
from icd_tvm.errors import PermutationError
from icd_tvm.models.importer import ImportedModel, import_onnx
from icd_tvm.relax_passes.apply_sparsity import ApplySparsity
from icd_tvm.relax_passes.axis_blocks import check_blocks, with_tables
from icd_tvm.relax_passes.axis_groups import AxisGroup, AxisGroups, find_axis_groups
from icd_tvm.relax_passes.build_access_graph import BuildAccessGraph
from icd_tvm.relax_passes.coaccess_attr import read_accesses, read_dead_units
from icd_tvm.relax_passes.constant_values import ConstantValues
from icd_tvm.relax_passes.dead_units import dead_units
from icd_tvm.relax_passes.explain import explain_text
from icd_tvm.relax_passes.hidden_groups import hidden_groups
from icd_tvm.relax_passes.permute_constants import permute_groups
from icd_tvm.relax_passes.rewrite_layout import RewriteLayout

D, F, BLOCK = 16, 64, 16
DROPPED = np.array([1, 2, 5, 17, 33, 34, 40, 41, 50, 51, 52, 53, 60, 61, 62, 63])
Weights = dict[str, np.ndarray]


def codes(rng: np.random.Generator, dtype: str, *shape: int) -> np.ndarray:
    return rng.integers(0, 120, shape).astype(dtype)


def scales(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (0.002 + 0.01 * rng.random(shape)).astype(np.float32)


def pack4(values: np.ndarray) -> np.ndarray:
    """[N, K] of 4 bits -> uint8 [N, K / block, block / 2], low nibble first."""
    low, high = values[:, ::2], values[:, 1::2]
    packed = (low | (high << 4)).astype(np.uint8)
    return packed.reshape(values.shape[0], -1, BLOCK // 2)


def silence(weight: np.ndarray, zero: np.ndarray, dropped: np.ndarray) -> None:
    """Make rows of codes [K, N] stand for zero; ``zero`` broadcasts to them."""
    weight[dropped] = np.broadcast_to(zero, weight.shape)[dropped]


def qdq(rng: np.random.Generator, dropped: np.ndarray) -> tuple[list[Any], Weights]:
    """Per-channel int8 weights behind DequantizeLinear, activations through QDQ."""
    weights = {
        "up": codes(rng, "int8", D, F),
        "up.s": scales(rng, F),
        "up.z": codes(rng, "int8", F) // 8,
        "bias": rng.standard_normal(F).astype(np.float32),
        "down": codes(rng, "int8", F, D),
        "down.s": scales(rng, D),
        "down.z": codes(rng, "int8", D),
        "act.s": np.float32(0.05),
        "act.z": np.uint8(7),
    }
    weights["up"][:, dropped] = weights["up.z"][dropped]
    silence(weights["down"], weights["down.z"], dropped)
    nodes = [
        helper.make_node("DequantizeLinear", ["up", "up.s", "up.z"], ["wu"], axis=1),
        helper.make_node("DequantizeLinear", ["down", "down.s", "down.z"], ["wd"], axis=1),
        helper.make_node("MatMul", ["x", "wu"], ["h"], name="first"),
        helper.make_node("Add", ["h", "bias"], ["hb"]),
        helper.make_node("Relu", ["hb"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "act.s", "act.z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "act.s", "act.z"], ["d"]),
        helper.make_node("MatMul", ["d", "wd"], ["y"], name="second"),
    ]
    return nodes, weights


def nbits(rng: np.random.Generator, dropped: np.ndarray) -> tuple[list[Any], Weights]:
    """int4 weights with a scale and a zero point for every block of K."""
    up, down = (rng.integers(0, 16, s).astype(np.uint8) for s in ((F, D), (D, F)))
    points = {name: rng.integers(0, 16, s).astype(np.uint8) for name, s in
              (("up", (F, D // BLOCK)), ("down", (D, F // BLOCK)))}  # fmt: skip
    down[:, dropped] = np.repeat(points["down"], BLOCK, axis=1)[:, dropped]
    weights = {
        "up": pack4(up),
        "up.s": scales(rng, F, D // BLOCK),
        "up.z": points["up"],  # one block: a nibble in a byte of its own
        "down": pack4(down),
        "down.s": scales(rng, D, F // BLOCK),
        "down.z": (points["down"][:, ::2] | (points["down"][:, 1::2] << 4)).astype(np.uint8),
    }

    def product(name: str, x: str, y: str, k: int, n: int) -> Any:
        names = [x, name, f"{name}.s", f"{name}.z"]
        sizes = {"K": k, "N": n, "bits": 4, "block_size": BLOCK}
        return helper.make_node("MatMulNBits", names, [y], name=f"mm.{name}", domain=MS, **sizes)

    nodes = [
        product("up", "x", "h", D, F),
        helper.make_node("Gelu", ["h"], ["g"], domain=MS),
        product("down", "g", "y", F, D),
    ]
    return nodes, weights


def qlinear(rng: np.random.Generator, dropped: np.ndarray) -> tuple[list[Any], Weights]:
    """Integer products with requantisation between them."""
    weights = {
        "x.s": np.float32(0.02),
        "x.z": np.uint8(100),
        "up": codes(rng, "int8", D, F),
        "up.s": scales(rng, F),
        "up.z": np.zeros(F, np.int8),
        "h.s": np.float32(0.03),
        "h.z": np.uint8(90),
        "down": codes(rng, "int8", F, D),
        "down.s": scales(rng, D),
        "down.z": codes(rng, "int8", D),
        "y.s": np.float32(0.05),
        "y.z": np.uint8(120),
    }
    silence(weights["down"], weights["down.z"], dropped)
    first = ["q", "x.s", "x.z", "up", "up.s", "up.z", "h.s", "h.z"]
    second = ["h", "h.s", "h.z", "down", "down.s", "down.z", "y.s", "y.z"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x.s", "x.z"], ["q"]),
        helper.make_node("QLinearMatMul", first, ["h"], name="first"),
        helper.make_node("QLinearMatMul", second, ["o"], name="second"),
        helper.make_node("DequantizeLinear", ["o", "y.s", "y.z"], ["y"]),
    ]
    return nodes, weights


MODELS: dict[str, Callable[..., tuple[list[Any], Weights]]] = {
    "qdq": qdq,
    "nbits": nbits,
    "qlinear": qlinear,
}


def load(name: str, dropped: np.ndarray = DROPPED[:0]) -> tuple[ImportedModel, Any, Weights]:
    """Return the import, what ONNX Runtime computes, and the inputs."""
    rng = np.random.default_rng(5)
    nodes, weights = MODELS[name](rng, dropped)
    feeds = {"x": rng.standard_normal((6, D)).astype(np.float32)}
    model = array_model(nodes, feeds, ["y"], weights, opset=21)
    return import_onnx(model), run_ort(model, feeds)[0], feeds


def hidden(imported: ImportedModel) -> tuple[AxisGroups, AxisGroup]:
    groups = find_axis_groups(imported.mod["main"])
    (group,) = hidden_groups(imported.mod["main"], groups)
    return groups, group


def assert_matches(mod: Any, imported: ImportedModel, expected: np.ndarray, feeds: Any) -> None:
    other = ImportedModel(mod, imported.model, imported.inputs, imported.outputs, imported.name)
    found = run_imported(other, feeds)[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", MODELS)
def test_quantised_weights_are_weights_of_a_hidden_group(name: str) -> None:
    imported, _, _ = load(name)
    _, group = hidden(imported)
    assert group.size == F
    assert [(use.name, use.axis, use.side) for use in group.weights] == [
        ("up", 1, "N"),
        ("down", 0, "K"),
    ]
    codes_of = {str(use.const.ty.dtype.dtype) for use in group.weights}
    assert codes_of <= {"int8", "uint8"}


@pytest.mark.parametrize("name", MODELS)
def test_every_free_group_permuted_equals_onnxruntime(name: str) -> None:
    imported, expected, feeds = load(name)
    groups = find_axis_groups(imported.mod["main"])
    rng = np.random.default_rng(2)
    perms = {group.id: rng.permutation(group.size) for group in groups.free}
    assert sum(len(perm) for perm in perms.values()) >= F
    assert_matches(permute_groups(imported.mod, groups, perms), imported, expected, feeds)


@pytest.mark.parametrize("name", MODELS)
def test_units_that_stand_for_zero_are_sliced_off(name: str) -> None:
    """The codes of a dead unit are its zero points, not zeros."""
    imported, expected, feeds = load(name, DROPPED)
    _, group = hidden(imported)
    np.testing.assert_array_equal(np.flatnonzero(dead_units(imported.mod["main"], group)), DROPPED)
    rewrite = RewriteLayout({})
    smaller = apply_pass(rewrite, imported.mod)
    assert rewrite.removed == {group.id: len(DROPPED)}
    assert_matches(smaller, imported, expected, feeds)
    whole, _, _ = load(name)
    kept = RewriteLayout({})
    apply_pass(kept, whole.mod)
    assert not kept.removed


def test_the_access_graph_reads_values_and_not_codes() -> None:
    imported, _, _ = load("qdq", DROPPED)
    graphed = apply_pass(BuildAccessGraph(), imported.mod)
    (dead,) = read_dead_units(graphed).values()
    np.testing.assert_array_equal(dead, DROPPED)
    ((access,),) = read_accesses(graphed).values()
    touched = np.asarray(access.incidence.sum(axis=0)).ravel() > 0
    np.testing.assert_array_equal(np.flatnonzero(~touched), DROPPED)


def test_sparsity_leaves_quantised_weights_alone() -> None:
    imported, _, _ = load("nbits")
    sparsify = ApplySparsity(parse_sparsity("unit:0.5"))
    apply_pass(sparsify, imported.mod)
    assert sparsify.meta["sparsity"]["entries"] == []


def blocked_order(rng: np.random.Generator, size: int) -> np.ndarray:
    """Whole blocks in a random order, and a random order inside each."""
    blocks = [start + rng.permutation(BLOCK) for start in range(0, size, BLOCK)]
    return np.concatenate([blocks[i] for i in rng.permutation(len(blocks))])


def test_blocks_may_move_and_the_scale_index_stays_regular() -> None:
    imported, expected, feeds = load("nbits")
    groups, group = hidden(imported)
    assert group.blocks == (BLOCK,)
    assert f"blocks of {BLOCK}" in explain_text(groups)
    order = blocked_order(np.random.default_rng(4), F)
    assert np.any(order != np.arange(F))
    perms = with_tables(groups, {group.id: order})
    moved = permute_groups(imported.mod, groups, perms)
    assert_matches(moved, imported, expected, feeds)
    indices = [
        arg.value.numpy()
        for block in moved["main"].body.blocks
        for binding in block.bindings
        for arg in getattr(binding.value, "args", ())
        if hasattr(arg, "value") and const_name(arg) == "down.g_idx"
    ]
    assert len(indices) == 2  # scales and zero points
    for index in indices:
        np.testing.assert_array_equal(index, np.arange(F) // BLOCK)


def test_an_order_that_breaks_a_block_is_refused() -> None:
    imported, _, _ = load("nbits")
    groups, group = hidden(imported)
    order = np.arange(F)
    order[[3, 20]] = order[[20, 3]]
    with pytest.raises(
        PermutationError, match="position 3 breaks a block of 16: it takes index 20"
    ):
        with_tables(groups, {group.id: order})
    check_blocks(group, blocked_order(np.random.default_rng(0), F))


def test_values_of_dequantised_weights_are_the_floats_they_stand_for() -> None:
    imported, _, _ = load("qdq")
    func = imported.mod["main"]
    values = ConstantValues(func)
    found = [
        values.array(binding.value.args[1])
        for block in func.body.blocks
        for binding in block.bindings
        if binding.var.name in ("first", "second")
    ]
    _, weights = qdq(np.random.default_rng(5), DROPPED[:0])
    for array, name in zip(found, ("up", "down"), strict=True):
        wide = weights[name].astype(np.float32) - weights[f"{name}.z"]
        np.testing.assert_allclose(array, wide * weights[f"{name}.s"], rtol=1e-6)
    assert values.array(func.params[0]) is None
