"""Permuting and removing indices of free groups, checked by running the modules."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axis_models import EXAMPLES, MODELS, MiniModel, Net, nn, op, run, scan_over
from hypothesis import given, settings
from hypothesis import strategies as st

from icd_tvm._tvm import GenericConst, const_name, named_const, relax, tvm
from icd_tvm.errors import OutputError, PermutationError, TransformError
from icd_tvm.relax_passes.axis_groups import AxisGroup, AxisGroups, find_axis_groups
from icd_tvm.relax_passes.axis_structure import axis_index, axis_size, positions
from icd_tvm.relax_passes.permutation_file import (
    load_permutations,
    model_hash,
    save_permutations,
)
from icd_tvm.relax_passes.permute_constants import (
    PermuteConstants,
    compact_groups,
    compose_permutations,
    invert_permutations,
    leaf_permutations,
    permute_groups,
    rewrite_constants,
    validate_permutation,
)

Perms = dict[str, np.ndarray]


def moving(size: int, rng: np.random.Generator) -> np.ndarray:
    """A random permutation that is not the identity."""
    perm = rng.permutation(size)
    return perm if np.any(perm != np.arange(size)) else np.roll(perm, 1)


def all_moving(groups: AxisGroups, seed: int = 0) -> Perms:
    rng = np.random.default_rng(seed)
    return {group.id: moving(group.size, rng) for group in groups.free}


def output_axes(mod: Any, groups: AxisGroups) -> list[Any]:
    body = mod["main"].body
    values = {b.var: b.value for block in body.blocks for b in block.bindings}
    value = values.get(body.body, body.body)
    fields = list(value.fields) if isinstance(value, relax.Tuple) else [body.body]
    return [groups.value_axes[var] for var in fields]


def select(array: np.ndarray, axes: Any, indices: Mapping[str, np.ndarray]) -> np.ndarray:
    for i, structure in enumerate(axes):
        array = np.take(array, axis_index(structure, indices), axis=i)
    return array


def assert_same_function(mini: MiniModel, groups: AxisGroups, other: Any, index: Any) -> None:
    """Run both modules; states enter and leave the other one in its own order."""
    params = mini.mod["main"].params
    moved = [
        select(a, groups.value_axes[p], index) for a, p in zip(mini.inputs, params, strict=True)
    ]
    outputs = zip(
        run(mini.mod, mini.inputs),
        run(other, moved),
        output_axes(mini.mod, groups),
        strict=True,
    )
    for before, after, axes in outputs:
        expected = select(before, axes, index)
        # Sums in another order differ by the rounding of the largest terms, not of the result.
        scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
        np.testing.assert_allclose(after, expected, rtol=1e-4, atol=2e-5 * scale)


def constants(mod: Any) -> list[tuple[str, np.ndarray]]:
    return [
        (const_name(arg), arg.value.numpy())
        for block in mod["main"].body.blocks
        for binding in block.bindings
        for arg in operands(binding.value)
        if isinstance(arg, GenericConst)
    ]


def operands(value: Any) -> list[Any]:
    """Arguments of a call, those inside tuples included."""
    found = []
    for arg in getattr(value, "args", ()):
        found += list(arg.fields) if isinstance(arg, relax.Tuple) else [arg]
    return found


@pytest.mark.parametrize("name", MODELS)
def test_all_free_groups_together_keep_the_function(name: str) -> None:
    mini = MODELS[name]()
    groups = mini.groups()
    perms = all_moving(groups)
    digest = model_hash(mini.mod["main"])
    other = permute_groups(mini.mod, groups, perms)
    assert model_hash(mini.mod["main"]) == digest
    relax.analysis.well_formed(other)
    changed = 0
    for (old_name, old), (new_name, new) in zip(constants(mini.mod), constants(other), strict=True):
        assert new_name == old_name
        assert new.shape == old.shape
        assert new.dtype == old.dtype
        changed += not np.array_equal(old, new)
    assert changed == moved_constants(groups)
    assert_same_function(mini, groups, other, leaf_permutations(groups, perms))


def moved_constants(groups: AxisGroups) -> int:
    """How many constant operands have a free axis, or point into one."""
    free = {group.id for group in groups.free}
    moved = {place for place, own in groups.index_axes.items() if free & set(own.groups())}
    for place, axes in groups.const_axes.items():
        if any(free & set(structure.groups()) for structure in axes):
            moved.add(place)
    return len(moved)


def test_pass_runs_the_analysis_itself() -> None:
    mini = MODELS["heads"]()
    perms = all_moving(mini.groups())
    by_pass = tvm.transform.Sequential([PermuteConstants(perms)])(mini.mod)
    by_call = permute_groups(mini.mod, mini.groups(), perms)
    assert model_hash(by_pass["main"]) == model_hash(by_call["main"])
    assert model_hash(by_pass["main"]) != model_hash(mini.mod["main"])


def test_pass_takes_states() -> None:
    mini = MODELS["recurrent_state"]()
    perms = all_moving(mini.groups())
    PermuteConstants(perms, mini.opaque_states)(mini.mod)
    with pytest.raises(PermutationError, match="pinned by input"):
        PermuteConstants(perms)(mini.mod)


def test_before_and_after_of_an_mlp() -> None:
    before, groups = MODELS["mlp"]().mod, MODELS["mlp"]().groups()
    perm = np.roll(np.arange(16), 3)
    after = permute_groups(before, find_axis_groups(before["main"]), {groups.free[0].id: perm})
    arrays = dict(constants(before))

    def expected(const: GenericConst, var: Any, path: Any) -> GenericConst:
        name = const_name(const)
        axis = {"up.w": 1, "up.b": 0, "down.w": 0}.get(name)
        array = arrays[name]
        return named_const(array if axis is None else np.take(array, perm, axis), name)

    built = tvm.IRModule({"main": rewrite_constants(before["main"], expected)})
    tvm.ir.assert_structural_equal(after["main"], relax.transform.Normalize()(built)["main"])


def test_inverse_restores_every_constant() -> None:
    mini = MODELS["rope_halves"]()
    groups = mini.groups()
    perms = all_moving(groups)
    there = permute_groups(mini.mod, groups, perms)
    back = permute_groups(there, find_axis_groups(there["main"]), invert_permutations(perms))
    assert model_hash(back["main"]) == model_hash(mini.mod["main"])


def test_two_steps_equal_their_composition() -> None:
    mini = MODELS["heads"]()
    groups = mini.groups()
    first, second = all_moving(groups, 1), all_moving(groups, 2)
    steps = permute_groups(mini.mod, groups, first)
    steps = permute_groups(steps, find_axis_groups(steps["main"]), second)
    once = permute_groups(mini.mod, groups, compose_permutations(first, second))
    assert model_hash(steps["main"]) == model_hash(once["main"])


def test_a_shared_constant_is_split_only_where_orders_differ() -> None:
    mini = MODELS["shared_weight"]()
    groups = mini.groups()
    shared = [array for name, array in constants(mini.mod) if name == "shared"]
    other = permute_groups(mini.mod, groups, all_moving(groups))
    split = [array for name, array in constants(other) if name == "shared"]
    assert np.array_equal(*shared)
    assert not np.array_equal(*split)


def test_a_constant_used_twice_alike_stays_one_object() -> None:
    net = Net()
    x = net.input("x", (4, 8))
    scale = net.weight("scale", 16)
    h = net(op.multiply(net.linear(x, "up", 8, 16), scale))
    h = net(op.add(h, scale))
    mod = net.build(net.linear(h, "down", 16, 8))
    groups = find_axis_groups(mod["main"])
    other = permute_groups(mod, groups, all_moving(groups))
    uses = [
        arg
        for block in other["main"].body.blocks
        for binding in block.bindings
        for arg in getattr(binding.value, "args", ())
        if isinstance(arg, GenericConst) and const_name(arg) == "scale"
    ]
    assert len(uses) == 2
    assert uses[0].same_as(uses[1])


def test_no_permutation_changes_nothing() -> None:
    mini = MODELS["mlp"]()
    groups = mini.groups()
    identity = {groups.free[0].id: np.arange(16)}
    for perms in ({}, identity):
        other = permute_groups(mini.mod, groups, perms)
        assert model_hash(other["main"]) == model_hash(mini.mod["main"])


def composite(groups: AxisGroups, weight: str) -> AxisGroup:
    return next(g for g in groups.composites if any(use.name == weight for use in g.consts))


def test_a_structured_permutation_of_a_whole_axis_is_taken_apart() -> None:
    mini = MODELS["heads"]()
    groups = mini.groups()
    group = composite(groups, "q.w")
    head, inner = np.array([2, 0, 1]), np.array([1, 3, 0, 2])
    whole = (head[:, None] * 4 + inner).ravel()
    leaves = leaf_permutations(groups, {group.id: whole})
    assert {key: perm.tolist() for key, perm in leaves.items()} == {
        group.factors[0]: head.tolist(),
        group.factors[1]: inner.tolist(),
    }
    other = permute_groups(mini.mod, groups, {group.id: whole})
    assert_same_function(mini, groups, other, leaves)
    np.testing.assert_array_equal(
        dict(constants(other))["q.w"], dict(constants(mini.mod))["q.w"][:, whole]
    )


def mlp_group() -> AxisGroup:
    return MODELS["mlp"]().groups().free[0]


@pytest.mark.parametrize(
    ("perm", "message"),
    [
        (np.arange(15), r"has shape \(15,\), expected \(16,\)"),
        (np.arange(16).reshape(4, 4), r"has shape \(4, 4\), expected \(16,\)"),
        (np.array([0, 1, 1, *range(3, 16)]), "duplicate at position 2: index 1 again"),
        (np.array([0, 1, 16, *range(3, 16)]), r"out of range at position 2: 16 not in \[0, 16\)"),
        (np.array([0, -1, *range(2, 16)]), "out of range at position 1: -1"),
        (np.arange(16) + 0.0, "not integer at position 0: dtype float64"),
        (np.array([0, 1.5, *range(2, 16)]), "not integer at position 1"),
        (np.array(["a"] * 16), "not integer at position 0"),
        (np.arange(16) > 3, "not integer at position 0: dtype bool"),
    ],
)
def test_bad_permutations_name_group_position_and_reason(perm: Any, message: str) -> None:
    group = mlp_group()
    with pytest.raises(PermutationError, match=message) as caught:
        validate_permutation(group, perm)
    assert repr(group.id) in caught.value.message


def test_a_permutation_may_not_break_a_head() -> None:
    group = composite(MODELS["heads"]().groups(), "q.w")
    perm = np.arange(12)
    perm[[3, 4]] = perm[[4, 3]]
    with pytest.raises(PermutationError, match="position 3 breaks the factor structure 3 x 4"):
        validate_permutation(group, perm)


def test_a_permutation_may_not_split_a_pair() -> None:
    group = composite(MODELS["rope_halves"]().groups(), "cos")
    assert group.constraint == "pairs"
    validate_permutation(group, np.array([1, 0, 2, 3, 5, 4, 6, 7]))
    with pytest.raises(PermutationError, match="position 4 splits a pair"):
        validate_permutation(group, np.array([1, 0, 2, 3, 4, 5, 6, 7]))


def test_a_permutation_may_not_cross_a_segment() -> None:
    group = composite(MODELS["concat_branches"]().groups(), "down.w")
    assert group.structure.text() == "[6 | 10 | 8]"
    perm = np.arange(24)
    perm[[5, 6]] = perm[[6, 5]]
    with pytest.raises(PermutationError, match="position 5 crosses a segment: it takes index 6"):
        validate_permutation(group, perm)


def test_a_permutation_may_not_move_unit_segments() -> None:
    group = composite(MODELS["mamba_step"]().groups(), "conv_w")
    assert group.size == 4
    with pytest.raises(PermutationError, match="crosses a segment"):
        validate_permutation(group, np.array([1, 0, 2, 3]))


def test_a_composite_permutation_may_not_move_a_pinned_part() -> None:
    mini = MODELS["concat_branches"]()
    groups = mini.groups()
    perm = np.arange(24)
    perm[[22, 23]] = perm[[23, 22]]
    with pytest.raises(PermutationError, match="pinned by input at 'x'"):
        permute_groups(mini.mod, groups, {composite(groups, "down.w").id: perm})


def test_pinned_and_contradicting_groups_are_refused() -> None:
    mini = MODELS["heads"]()
    groups = mini.groups()
    pinned = next(group for group in groups.pinned if group.size == 5)
    with pytest.raises(PermutationError, match="pinned by input at 'x': graph input x axis 1"):
        permute_groups(mini.mod, groups, {pinned.id: np.array([1, 0, 2, 3, 4])})
    permute_groups(mini.mod, groups, {pinned.id: np.arange(5)})
    head = next(group for group in groups.free if group.role == "heads")
    whole = composite(groups, "q.w")
    with pytest.raises(PermutationError, match="ordered in two ways"):
        permute_groups(mini.mod, groups, {head.id: [1, 0, 2], whole.id: np.arange(12)})
    with pytest.raises(PermutationError, match="no axis group 'nothing'"):
        permute_groups(mini.mod, groups, {"nothing": [0]})


def test_unbound_parameters_are_refused() -> None:
    x = relax.Var("x", relax.TensorType((4, 8), "float32"))
    up = relax.Var("up", relax.TensorType((8, 16), "float32"))
    net = Net()
    builder = relax.BlockBuilder()
    with builder.function("main", [x, up], attrs={"num_input": 1}):
        with builder.dataflow():
            h = builder.emit(op.matmul(x, up))
            out = builder.emit_output(op.matmul(h, net.weight("down", 16, 8)))
        builder.emit_func_output(out)
    mod = builder.get()
    groups = find_axis_groups(mod["main"])
    with pytest.raises(PermutationError, match="holds parameter 'up'"):
        permute_groups(mod, groups, all_moving(groups))


def test_permutation_file_round_trip(tmp_path: Path) -> None:
    mini = MODELS["heads"]()
    groups, digest = mini.groups(), model_hash(mini.mod["main"])
    perms = all_moving(groups)
    save_permutations(tmp_path / "perm.json", perms, digest)
    loaded = load_permutations(tmp_path / "perm.json", groups, digest)
    assert loaded.keys() == perms.keys()
    for key, perm in perms.items():
        np.testing.assert_array_equal(loaded[key], perm)
    with pytest.raises(PermutationError, match="belongs to another model"):
        load_permutations(tmp_path / "perm.json", groups, "0" * 64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is no permutation file"),
        ('{"format": "other"}', "is no permutation file"),
        ({"perms": 3}, "is no permutation file"),
        ({"perms": {"nothing": [0]}}, "no axis group 'nothing'"),
        ({"perms": {"up:1": [0, 1]}}, r"has shape \(2,\)"),
        ({"perms": {"up:1": "text"}}, r"has shape \(\)"),
        ({"perms": {"up:1": [0] * 16}}, "duplicate at position 1"),
        ({"perms": {"up:1": [[0], [1, 2]]}}, "is no row of integers"),
    ],
)
def test_bad_permutation_files(tmp_path: Path, content: Any, message: str) -> None:
    if isinstance(content, dict):
        content = json.dumps({"format": "icd/group_perms/v1", "model_hash": "x", **content})
    (tmp_path / "perm.json").write_text(content)
    with pytest.raises(PermutationError, match=message):
        load_permutations(tmp_path / "perm.json", MODELS["mlp"]().groups(), "x")


def test_unreadable_and_unwritable_permutation_files(tmp_path: Path) -> None:
    with pytest.raises(PermutationError, match="cannot read"):
        load_permutations(tmp_path / "absent.json", MODELS["mlp"]().groups(), "x")
    with pytest.raises(OutputError, match="cannot write"):
        save_permutations(tmp_path / "absent" / "perm.json", {}, "x")


def test_model_hash_sees_values_shapes_and_ops_but_no_names() -> None:
    def build(name: str = "h", factor: float = 1.0, act: Any = nn.relu, rows: int = 4) -> str:
        net = Net()
        x = net.input("x", (rows, 8))
        w = net.const(f"{name}.w", np.full((8, 8), factor))
        return model_hash(net.build(net(act(net(op.matmul(x, w), name))))["main"])

    assert build() == build(name="other")
    assert len({build(), build(factor=2.0), build(act=nn.gelu), build(rows=5)}) == 4


# -- compaction

# Groups that an op's length, a mean or a literal count keeps from losing indices.
REFUSED = {
    "residual": {"mean is taken over the axis"},
    "conv_group_norm": {"mean is taken over the axis"},
    "embedding": {"mean is taken over the axis"},
    "reductions": {"variance over the axis"},
    "softmax_gate": {"softmax over the axis"},
    "attention_op": {"score scale follows the width"},
    "grouped_query": {"writes a size literally"},
    "slice_and_pad": {"writes a size literally"},
    "fused_qkv_reshape": {"reads a position to be removed"},
    "gather_constant": {"reads a position to be removed"},
}


def silenced(mini: MiniModel, groups: AxisGroups, dead: Perms) -> MiniModel:
    """Zero every constant at the dead indices, so that these contribute nothing."""

    def zeroed(const: GenericConst, var: Any, path: Any) -> GenericConst:
        array = const.value.numpy()
        for axis, structure in enumerate(groups.const_axes.get((var, path), ())):
            for group in set(structure.groups()) & dead.keys():
                places = positions(structure, group)[dead[group]].ravel()
                np.moveaxis(array, axis, 0)[places] = 0
        return named_const(array, const_name(const))

    func = rewrite_constants(mini.mod["main"], zeroed)
    mod = mini.mod.clone()
    mod["main"] = func
    mod = relax.transform.Normalize()(mod)
    return MiniModel(mod, mini.inputs, mini.expected, mini.opaque_states)


def halves(groups: AxisGroups, seed: int = 0) -> Perms:
    rng = np.random.default_rng(seed)
    return {g.id: rng.permutation(g.size)[: (g.size + 1) // 2] for g in groups.free}


@pytest.mark.parametrize("name", MODELS)
def test_compaction_of_silent_units_is_exact(name: str) -> None:
    """Remove half of every group that may be; every other one must be refused with a reason."""
    mini = MODELS[name]()
    keep: Perms = {}
    refusals: list[str] = []
    groups = mini.groups()
    for group_id, kept in halves(groups).items():
        try:
            compact_groups(mini.mod, groups, {group_id: kept})
            keep[group_id] = kept
        except TransformError as error:
            refusals.append(error.line())
    for text in REFUSED.get(name, ()):
        assert any(text in line for line in refusals)
    assert bool(refusals) == (name in REFUSED)
    sizes = {group.id: group.size for group in groups.free}
    dead = {key: np.setdiff1d(np.arange(sizes[key]), kept) for key, kept in keep.items()}
    quiet = silenced(mini, groups, dead)
    groups = quiet.groups()
    smaller = compact_groups(quiet.mod, groups, keep)
    relax.analysis.well_formed(smaller)
    assert_same_function(quiet, groups, smaller, keep)
    left = {key: len(kept) for key, kept in keep.items()}
    shapes = [array.shape for _, array in constants(smaller)]
    for axes in groups.const_axes.values():
        shape = tuple(axis_size(structure, left) for structure in axes)
        assert shape in shapes


def test_compaction_keeps_names_and_shrinks_shapes() -> None:
    mini = MODELS["mlp"]()
    groups = mini.groups()
    smaller = compact_groups(mini.mod, groups, {groups.free[0].id: np.array([9, 2, 5])})
    assert {name: array.shape for name, array in constants(smaller)} == {
        "up.w": (8, 3),
        "up.b": (3,),
        "down.w": (3, 8),
        "down.b": (8,),
    }
    bindings = smaller["main"].body.blocks[0].bindings
    assert [b.var.name for b in bindings] == [
        b.var.name for b in mini.mod["main"].body.blocks[0].bindings
    ]
    assert [int(n) for n in bindings[0].var.ty.shape.values] == [4, 3]
    np.testing.assert_array_equal(
        dict(constants(smaller))["up.w"], dict(constants(mini.mod))["up.w"][:, [9, 2, 5]]
    )


def test_compaction_of_heads_rewrites_the_reshapes() -> None:
    mini = MODELS["heads"]()
    groups = mini.groups()
    head = next(group for group in groups.free if group.role == "heads")
    smaller = compact_groups(mini.mod, groups, {head.id: np.array([0, 2])})
    shapes = {name: array.shape for name, array in constants(smaller)}
    assert shapes["q.w"] == (8, 8)
    assert shapes["o.w"] == (8, 8)
    assert run(smaller, mini.inputs)[0].shape == (1, 5, 8)


@pytest.mark.parametrize(
    "kept", [np.array([], int), np.array([0, 0]), np.array([16]), np.array([-1]), np.array([0.5])]
)
def test_bad_indices_to_keep_are_refused(kept: Any) -> None:
    mini = MODELS["mlp"]()
    groups = mini.groups()
    with pytest.raises(PermutationError, match="must be distinct, at least one"):
        compact_groups(mini.mod, groups, {groups.free[0].id: kept})


def test_pinned_and_composite_groups_cannot_lose_indices() -> None:
    mini = MODELS["heads"]()
    groups = mini.groups()
    with pytest.raises(PermutationError, match="made of several groups"):
        compact_groups(mini.mod, groups, {composite(groups, "q.w").id: np.arange(4)})
    pinned = next(group for group in groups.pinned if group.size == 5)
    with pytest.raises(PermutationError, match="graph input x axis 1"):
        compact_groups(mini.mod, groups, {pinned.id: np.arange(3)})


# -- random graphs


class Random:
    """A stream [4, width] that random pieces extend; remembers axes that must be free."""

    def __init__(self) -> None:
        self.net = Net()
        self.x = self.net.input("x", (4, 6))
        self.width = 6
        self.count = 0
        self.must_be_free: list[int] = []

    def linear(self, x: Any, k: int, n: int) -> Any:
        self.count += 1
        return self.net.linear(x, f"l{self.count}", k, n)

    def widen(self, n: int) -> None:
        self.x = self.net(nn.gelu(self.linear(self.x, self.width, 2 * n)))
        self.width = 2 * n

    def residual(self, n: int) -> None:
        h = self.net(nn.relu(self.linear(self.x, self.width, n)))
        self.x = self.net(op.add(self.x, self.linear(h, n, self.width)))
        self.must_be_free.append(n)

    def gated(self, n: int) -> None:
        gate = self.net(op.sigmoid(self.linear(self.x, self.width, n)))
        h = self.net(op.multiply(gate, self.linear(self.x, self.width, n)))
        self.x = self.linear(h, n, self.width)
        self.must_be_free.append(n)

    def norm(self, n: int) -> None:
        net, w = self.net, self.width
        scale = (net.weight(f"g{self.count}", w), net.weight(f"b{self.count}", w))
        self.x = net(nn.layer_norm(self.x, *scale, axes=[-1]))

    def branches(self, n: int) -> None:
        parts = [self.linear(self.x, self.width, k) for k in (n, n + 1)]
        self.x, self.width = self.net(op.concat(parts, 1)), 2 * n + 1

    def fused(self, n: int) -> None:
        parts = self.net(op.split(self.linear(self.x, self.width, 2 * n), 2, 1))
        a, b = (self.net(relax.TupleGetItem(parts, i)) for i in (0, 1))
        self.x = self.linear(self.net(op.multiply(a, self.net(op.tanh(b)))), n, self.width)
        self.must_be_free.append(n)

    def heads(self, n: int) -> None:
        net, w = self.net, self.width
        q, k, v = (net(op.reshape(self.linear(self.x, w, 3 * n), (1, 4, 3, n))) for _ in range(3))
        q, k, v = (
            net(op.permute_dims(t, o))
            for t, o in ((q, [0, 2, 1, 3]), (k, [0, 2, 3, 1]), (v, [0, 2, 1, 3]))
        )
        weights = net(nn.softmax(net(op.matmul(q, k)), -1))
        mixed = net(op.permute_dims(net(op.matmul(weights, v)), [0, 2, 1, 3]))
        self.x = net(op.add(self.x, self.linear(net(op.reshape(mixed, (4, 3 * n))), 3 * n, w)))
        self.must_be_free += [3, n, n]

    def shuffle(self, n: int) -> None:
        if self.width % 2 == 0:
            grid = self.net(op.reshape(self.x, (4, 2, self.width // 2)))
            turned = self.net(op.permute_dims(grid, [0, 2, 1]))
            self.x = self.net(op.reshape(turned, (4, self.width)))

    def cut(self, n: int) -> None:
        if self.width > n:
            self.x = self.net(op.strided_slice(self.x, [1], [self.width - n], [self.width]))
            self.width = n

    def gather(self, n: int) -> None:
        index = self.net.rng.integers(0, self.width, n)
        self.x = self.net(op.take(self.x, self.net.const("index", index, "int64"), 1, mode="wrap"))
        self.width = n

    def gate_by_rank(self, n: int) -> None:
        scores = self.net(nn.softmax(self.x, 1))
        best = self.net(op.max(scores, [1], keepdims=True))
        self.x = self.net(op.where(self.net(op.greater_equal(scores, best)), self.x, scores))

    def grouped_conv(self, n: int) -> None:
        net, w = self.net, self.width
        h = net(op.expand_dims(self.linear(self.x, w, 2 * n), 2))
        kernel = net.weight(f"k{self.count}", 2 * n, n, 3)
        h = net(nn.silu(net(nn.conv1d(h, kernel, padding=1, groups=2))))
        self.x = self.linear(net(op.squeeze(h, [2])), 2 * n, w)
        self.must_be_free += [2, n, n]

    def quantised(self, n: int) -> None:
        """A scale and a zero point for every channel, then a scale for each of two blocks."""
        net, w = self.net, self.width
        codes = [net.rng.integers(-99, 99, shape) for shape in ((w, 2 * n), (2 * n, w))]
        up, down = (net.const(f"q{self.count}.{i}", c, "int8") for i, c in enumerate(codes))
        scale = net.const("s", 0.01 * net.rng.random(2 * n))
        zero = net.const("z", net.rng.integers(-9, 9, 2 * n), "int8")
        h = net(op.matmul(self.x, net(op.dequantize(up, scale, zero, axis=1))))
        index = net.const("blocks", np.arange(2 * n) // n, "int32")
        table = net.const("t", 0.01 * net.rng.random((2, w)))
        scales = net(op.take(table, index, axis=0, mode="clip"))
        dense = net(op.multiply(net(op.astype(down, "float32")), scales))
        self.x = net(op.matmul(net(nn.relu(h)), dense))
        self.must_be_free += [2 * n, 2]

    def scan(self, n: int) -> None:
        self.count += 1
        self.x = scan_over(self.net, self.x, self.width, f"scan{self.count}", n, 3)
        self.must_be_free += [n, 3]

    def cumulate(self, n: int) -> None:
        h = self.net(op.cumsum(self.linear(self.x, self.width, n), 0))
        self.x = self.linear(h, n, self.width)
        self.must_be_free.append(n)

    def grouped_query(self, n: int) -> None:
        """Two query heads on each of three KV heads."""
        net, w = self.net, self.width
        q = net(op.reshape(self.linear(self.x, w, 6 * n), (1, 4, 6, n)))
        k, v = (net(op.reshape(self.linear(self.x, w, 3 * n), (1, 4, 3, n))) for _ in range(2))
        q = net(op.permute_dims(q, [0, 2, 1, 3]))
        k, v = (net(op.repeat(net(op.permute_dims(t, [0, 2, 1, 3])), 2, 1)) for t in (k, v))
        scores = net(nn.softmax(net(op.matmul(q, net(op.permute_dims(k, [0, 1, 3, 2])))), -1))
        mixed = net(op.permute_dims(net(op.matmul(scores, v)), [0, 2, 1, 3]))
        self.x = self.linear(net(op.reshape(mixed, (4, 6 * n))), 6 * n, w)
        self.must_be_free += [3, 2, n, n]


PIECES = [
    *("widen", "residual", "gated", "norm", "branches", "fused"),
    *("heads", "shuffle", "cut", "gather", "gate_by_rank"),
    *("grouped_conv", "quantised", "scan", "cumulate", "grouped_query"),
]


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(PIECES), st.integers(2, 9)), min_size=1, max_size=5),
    st.integers(0, 99),
)
def test_random_graphs_keep_their_function(pieces: list[tuple[str, int]], seed: int) -> None:
    graph = Random()
    graph.widen(4)
    for piece, n in pieces:
        getattr(graph, piece)(n)
    mod = graph.net.build(graph.linear(graph.x, graph.width, 3))
    mini = MiniModel(mod, graph.net.arrays, [])
    groups = mini.groups()
    assert not Counter(graph.must_be_free) - Counter(group.size for group in groups.free)
    if not groups.free:
        # A cut through shuffled channels pins them all; nothing else may.
        assert {"shuffle", "cut"} <= {piece for piece, _ in pieces}
        return
    perms = all_moving(groups, seed)
    other = permute_groups(mod, groups, perms)
    assert_same_function(mini, groups, other, perms)
