"""Which groups the analysis finds, how it names them, and why it pins the rest."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import pytest
from axis_models import MODELS, Net, nn, op
from onnx import TensorProto, helper, numpy_helper

from icd_tvm._tvm import const_name, relax
from icd_tvm.errors import PermutationError, TransformError
from icd_tvm.models.bert import BERT_MINI, BertConfig, build_bert, random_bert_weights
from icd_tvm.models.importer import import_onnx
from icd_tvm.relax_passes.axis_groups import AxisGroup, AxisGroups, find_axis_groups
from icd_tvm.relax_passes.explain import explain_dot, explain_json, explain_text
from icd_tvm.relax_passes.permute_constants import rewrite_constants


def bert_function(config: BertConfig = BERT_MINI) -> Any:
    return import_onnx(build_bert(config, random_bert_weights(config), seq=8)).mod["main"]


def only(groups: AxisGroups, size: int) -> AxisGroup:
    found = [group for group in groups.free if group.size == size]
    assert len(found) == 1
    return found[0]


def reasons(groups: AxisGroups) -> set[tuple[str, str, str]]:
    return {(pin.op, pin.node, pin.reason) for group in groups.pinned for pin in group.pins}


@pytest.mark.parametrize("name", MODELS)
def test_exactly_the_expected_groups_are_free(name: str) -> None:
    mini = MODELS[name]()
    found = sorted((group.size, group.constraint) for group in mini.groups().free)
    assert found == sorted(mini.expected)


@pytest.mark.parametrize("name", MODELS)
def test_every_axis_of_every_constant_is_explained(name: str) -> None:
    groups = MODELS[name]().groups()
    assert groups.const_axes
    for axes in groups.const_axes.values():
        for leaf in (leaf for structure in axes for leaf in structure.leaves()):
            if leaf.size > 1:
                group = groups.by_id[leaf.group]
                assert group.size == leaf.size
                assert group.free != bool(group.pins)


@pytest.mark.parametrize("name", MODELS)
def test_ids_are_unique_and_do_not_depend_on_values(name: str) -> None:
    mini = MODELS[name]()
    groups = mini.groups()
    ids = [group.id for group in (*groups.atomic, *groups.composites)]
    assert len(set(ids)) == len(ids)

    def halved(const: Any, var: Any, path: tuple[int, ...]) -> Any:
        if "float" not in str(const.ty.dtype):
            return const
        return relax.const(const.value.numpy() / 2)

    other = find_axis_groups(
        rewrite_constants(mini.mod["main"], halved), opaque_states=mini.opaque_states
    )
    assert [g.id for g in other.free] == [g.id for g in groups.free]


def test_weight_uses_of_a_hidden_axis() -> None:
    group = only(MODELS["mlp"]().groups(), 16)
    uses = [(u.name, u.axis, u.side, u.node, u.shape) for u in group.weights]
    assert uses == [("up.w", 1, "N", "up", (8, 16)), ("down.w", 0, "K", "down", (16, 8))]
    assert [(u.name, u.axis) for u in group.consts] == [("up.w", 1), ("up.b", 0), ("down.w", 0)]
    assert [(u.var.name, u.axis) for u in group.values] == [("up", 1), ("up_bias", 1), ("act", 1)]
    assert const_name(group.weights[0].const) == "up.w"
    assert {use.op for use in group.ops} == {"relax.matmul", "relax.add", "relax.nn.relu"}
    assert group.bytes_touched == 4 * (8 * 16 + 16 + 16 * 8 + 3 * 4 * 16)
    np.testing.assert_array_equal(group.weights[0].positions(group.id), np.arange(16)[:, None])


def test_weights_behind_a_transpose_and_a_dequantise() -> None:
    transposed = only(MODELS["gemm_transposed"]().groups(), 16)
    assert [(u.name, u.axis, u.side) for u in transposed.weights] == [
        ("up.w", 0, "N"),
        ("down.w", 1, "K"),
    ]
    quantised = only(MODELS["quantised_linear"]().groups(), 16)
    assert [(u.name, u.axis, u.side, u.node) for u in quantised.weights] == [
        ("up.q", 1, "N", "up"),
        ("down.w", 0, "K", "down"),
    ]
    names = {use.name for use in quantised.consts}
    assert names == {"up.q", "up.s", "up.z", "down.w"}


def test_heads_are_one_group_and_the_channels_inside_are_two() -> None:
    groups = MODELS["heads"]().groups()
    by_role = {group.role: group for group in groups.free}
    assert set(by_role) == {"heads", "inside a head: q k", "inside a head: v"}
    sides = {
        role: [(use.name, use.side) for use in group.weights] for role, group in by_role.items()
    }
    assert sides["heads"] == [("q.w", "N"), ("k.w", "N"), ("v.w", "N"), ("o.w", "K")]
    assert sides["inside a head: q k"] == [("q.w", "N"), ("k.w", "N")]
    assert sides["inside a head: v"] == [("v.w", "N"), ("o.w", "K")]
    composite = next(g for g in groups.composites if g.weights[0].name == "q.w")
    assert composite.size == 12
    assert composite.structure.text() == "3 x 4"
    assert composite.factors == (by_role["heads"].id, by_role["inside a head: q k"].id)
    places = by_role["heads"].weights[0].positions(by_role["heads"].id)
    np.testing.assert_array_equal(places, np.arange(12).reshape(3, 4))
    inner = by_role["inside a head: q k"]
    np.testing.assert_array_equal(
        inner.weights[0].positions(inner.id), np.arange(12).reshape(3, 4).T
    )


def test_rotary_halves_are_a_pair() -> None:
    groups = MODELS["rope_halves"]().groups()
    pair = next(group for group in groups.free if group.constraint == "pairs")
    table = next(use for use in pair.consts if use.name == "cos")
    assert table.structure.text() == "[4 | 4]"
    np.testing.assert_array_equal(table.positions(pair.id), [[0, 4], [1, 5], [2, 6], [3, 7]])


@pytest.mark.parametrize(
    ("name", "pin"),
    [
        ("mlp", ("input", "x", "graph input x axis 1")),
        ("mlp", ("output", "out", "graph output out axis 1")),
        ("residual_to_output", ("output", "out", "graph output out axis 1")),
        ("embedding", ("relax.take", "embed", "indexed by data")),
        ("cumsum", ("relax.cumsum", "over_hidden", "cumsum along the axis")),
        ("unknown_op", ("relax.collapse_sum_to", "odd", "no rule for this op")),
        ("conv_depthwise", ("relax.nn.conv1d", "depth", "convolved over")),
        ("conv_to_classifier", ("relax.nn.max_pool2d", "pool", "pooled over")),
    ],
)
def test_pins_name_op_node_and_reason(name: str, pin: tuple[str, str, str]) -> None:
    assert pin in reasons(MODELS[name]().groups())


def test_outputs_can_be_left_unpinned() -> None:
    mini = MODELS["residual_to_output"]()
    func = mini.mod["main"]
    assert not [g for g in find_axis_groups(func).free if g.size == 12]
    net = Net()
    x = net.input("x", (4, 8))
    func = net.build(net.linear(x, "up", 8, 16))["main"]
    assert not find_axis_groups(func).free
    assert [g.size for g in find_axis_groups(func, keep_outputs=False).free] == [16]


def test_parameters_beyond_the_inputs_are_weights() -> None:
    x, up, down = (
        relax.Var(n, relax.TensorType(s, "float32"))
        for n, s in (("x", (4, 8)), ("up", (8, 16)), ("down", (16, 8)))
    )
    builder = relax.BlockBuilder()
    with builder.function("main", [x, up, down], attrs={"num_input": 1}):
        with builder.dataflow():
            h = builder.emit(nn.relu(builder.emit(op.matmul(x, up))))
            out = builder.emit_output(op.matmul(h, down))
        builder.emit_func_output(out)
    group = only(find_axis_groups(builder.get()["main"]), 16)
    params = [(m.name, m.axis) for m in group.members if m.kind == "param"]
    assert params == [("up", 1), ("down", 0)]


def test_states_are_tied_only_if_declared() -> None:
    mini = MODELS["recurrent_state"]()
    assert not find_axis_groups(mini.mod["main"]).free
    group = only(mini.groups(), 16)
    assert {m.name for m in group.members} >= {"h", "h_new", "in.w", "back.w"}


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ([("nothing", "1")], "no input named 'nothing'"),
        ([("h", "nothing")], "no output named 'nothing'"),
        ([("h", "0")], "changes its shape"),
    ],
)
def test_wrong_states_are_refused(states: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(TransformError, match=message):
        find_axis_groups(MODELS["recurrent_state"]().mod["main"], opaque_states=states)


def test_state_outputs_answer_to_their_variable_and_number() -> None:
    func = MODELS["recurrent_state"]().mod["main"]
    by_number = find_axis_groups(func, opaque_states=[("h", "1")])
    by_name = find_axis_groups(func, opaque_states=[("h", "h_new")])
    assert [g.id for g in by_name.free] == [g.id for g in by_number.free]


def test_unknown_group_is_refused() -> None:
    with pytest.raises(PermutationError, match="no axis group 'x'"):
        MODELS["mlp"]().groups().get("x")


def test_branches_and_packed_calls_pin_what_they_read() -> None:
    x = relax.Var("x", relax.TensorType((4, 8), "float32"))
    net = Net()
    up, down = net.weight("up", 8, 16), net.weight("down", 16, 8)
    builder = relax.BlockBuilder()
    with builder.function("main", [x], attrs={"num_input": 1}):
        h = builder.emit(op.matmul(x, up), "hidden")
        call = relax.Call(
            relax.ExternFunc("custom"), [h], ty_args=[relax.TensorType((4, 16), "float32")]
        )
        y = builder.emit(call, "packed")
        builder.emit_func_output(builder.emit(op.matmul(y, down), "down"))
    groups = find_axis_groups(builder.get()["main"])
    assert not groups.free
    assert ("call", "packed", "no rule for this op") in reasons(groups)


def test_control_flow_pins_what_its_branches_capture() -> None:
    rng = np.random.default_rng(0)
    weights = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in (("w1", (8, 16)), ("w2", (16, 12)), ("w3", (12, 8)))
    }

    def branch(op_type: str, name: str) -> onnx.GraphProto:
        node = helper.make_node(op_type, ["b"], [name], name=name)
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 12])
        return helper.make_graph([node], name, [], [out])

    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], name="a"),
        helper.make_node("MatMul", ["a", "w2"], ["b"], name="b"),
        helper.make_node(
            "If",
            ["cond"],
            ["c"],
            name="choice",
            then_branch=branch("Relu", "yes"),
            else_branch=branch("Neg", "no"),
        ),
        helper.make_node("MatMul", ["c", "w3"], ["y"], name="y"),
    ]
    graph = helper.make_graph(
        nodes,
        "choice",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 8]),
            helper.make_tensor_value_info("cond", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 8])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    groups = find_axis_groups(import_onnx(proto).mod["main"])
    assert [group.size for group in groups.free] == [16]
    assert ("If", "inside If") in {(op, reason) for op, _, reason in reasons(groups)}


@pytest.fixture(scope="module")
def bert() -> AxisGroups:
    return find_axis_groups(bert_function())


def test_bert_has_four_groups_a_layer(bert: AxisGroups) -> None:
    assert [(g.size, g.constraint, g.role) for g in bert.free] == 2 * [
        (4, "factored", "heads"),
        (16, "factored", "inside a head: q k"),
        (16, "factored", "inside a head: v"),
        (256, "free", ""),
    ]
    assert [(g.size, g.structure.text()) for g in bert.composites] == 4 * [(64, "4 x 16")]


def test_bert_ffn_group_names_its_onnx_weights(bert: AxisGroups) -> None:
    group = next(g for g in bert.free if g.size == 256)
    names = [(use.name, use.side) for use in group.weights]
    assert names == [
        ("encoder.layer.0.intermediate.dense.weight", "N"),
        ("encoder.layer.0.output.dense.weight", "K"),
    ]
    assert group.id == "/encoder/layer.0/intermediate/dense/MatMul:2"


def test_bert_model_width_is_one_group_pinned_by_the_output_alone(bert: AxisGroups) -> None:
    width = [group for group in bert.pinned if group.size == 64]
    assert len(width) == 1
    assert [(p.op, p.reason) for p in width[0].pins] == [
        ("output", "graph output last_hidden_state axis 2")
    ]
    free = find_axis_groups(bert_function(), keep_outputs=False).free
    assert [group.size for group in free if group.id == width[0].id] == [64]


def test_bert_of_another_size_has_the_same_ids() -> None:
    config = BertConfig(2, 48, 4, 80, vocab=30, max_position=16)
    ids = [[g.id for g in find_axis_groups(bert_function(c)).free] for c in (config, BERT_MINI)]
    assert ids[0] == ids[1]


def test_text_names_groups_weights_and_pins(bert: AxisGroups) -> None:
    text = explain_text(bert)
    assert text.startswith("8 free axis groups, 4 composite axes, 4 pinned groups\n")
    assert "free /encoder/layer.1/intermediate/dense/MatMul:2  size 256  free" in text
    assert "encoder.layer.0.output.dense.weight[256x64] axis 0" in text
    assert "encoder.layer.0.attention.self.query.weight[64x64] axis 1 as 4x16" in text
    assert "pinned by: output last_hidden_state: graph output last_hidden_state axis 2" in text
    assert "indexed by data" in text
    assert max(map(len, text.splitlines())) <= 100
    assert len(text.strip().split("\n\n")) == 1 + 8 + 4 + 4


def test_the_tokens_of_an_encoder_are_free_behind_a_gather(bert: AxisGroups) -> None:
    """Positions are constants that follow; only ids, mask and output know the order."""
    tokens = [group for group in bert.pinned if group.size == 8 and group.gathers]
    assert len(tokens) == 1
    places = {(use.var.name, use.axis) for use in tokens[0].gathers}
    assert places == {
        ("input_ids", 1),
        ("attention_mask", 1),
        ("token_type_ids", 1),
        ("last_hidden_state", 1),
    }
    assert any(use.name.startswith("/embeddings/position") for use in tokens[0].consts)
    flat = " ".join(explain_text(bert).split())
    assert "behind a gather: would be free between run-time gathers of input_ids axis 1" in flat
    vocabulary = next(group for group in bert.pinned if group.size == 100)
    assert not vocabulary.gathers


def test_a_group_that_an_op_pins_is_not_free_behind_a_gather() -> None:
    groups = MODELS["cumsum"]().groups()
    assert all(not group.gathers for group in groups.pinned if group.size in (4, 12))


def test_json_is_complete(bert: AxisGroups) -> None:
    content = json.loads(explain_json(bert))
    assert content == json.loads(json.dumps(bert.to_json()))
    assert content["format"] == "icd/axis_groups/v1"
    assert [group["size"] for group in content["free"]] == [g.size for g in bert.free]
    assert all(group["pins"] for group in content["pinned"])
    assert content["composites"][0]["structure"]["kind"] == "product"


def test_dot_has_a_node_a_group_and_an_edge_an_axis(bert: AxisGroups) -> None:
    dot = explain_dot(bert)
    assert dot.startswith("graph axis_groups {")
    assert dot.count("shape=ellipse") == 8
    assert dot.count("shape=octagon") == 4
    edge = (
        '"group /encoder/layer.0/intermediate/dense/MatMul:2" -- '
        '"encoder.layer.0.output.dense.weight" [label="axis 0"];'
    )
    assert edge in dot
