"""Import: outputs equal to ONNX Runtime, names kept, every bad model refused with its reason."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from icd_tvm._tvm import GenericConst, const_name, relax, tvm
from icd_tvm.errors import (
    DynamicShapeError,
    IcdError,
    ModelFileError,
    NonFiniteError,
    ShapeError,
    UnsupportedOpError,
)
from icd_tvm.models.bert import BERT_MINI, build_bert, random_bert_weights
from icd_tvm.models.importer import ImportedModel, import_onnx
from icd_tvm.models.inputs import random_inputs
from icd_tvm.models.onnx_file import load_proto
from icd_tvm.models.onnx_fold import fold_constants
from icd_tvm.models.onnx_shapes import fix_input_shapes

WEIGHTS = random_bert_weights(BERT_MINI)
QUERY = "encoder.layer.0.attention.self.query"


def mini_bert(seq: int | str = 16, batch: int | str = 1) -> onnx.ModelProto:
    return build_bert(BERT_MINI, WEIGHTS, seq, batch)


def model_of(nodes, inputs, outputs, weights=None, opset=17, extra_domains=()) -> onnx.ModelProto:
    """A model from nodes, {input: (type, shape)}, output names and {name: array}."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()],
        [helper.make_empty_tensor_value_info(n) for n in outputs],
        [numpy_helper.from_array(a, n) for n, a in (weights or {}).items()],
    )
    for value in graph.output:
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    opsets = [helper.make_opsetid("", opset)] + [helper.make_opsetid(d, 1) for d in extra_domains]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def relu_model(shape=(2, 3), weights=None) -> onnx.ModelProto:
    weights = weights or {"w": np.ones((3, 4), np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="mm"),
        helper.make_node("Relu", ["h"], ["y"], name="act"),
    ]
    return model_of(nodes, {"x": (TensorProto.FLOAT, shape)}, ["y"], weights)


def run_ort(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def run_tvm(imported: ImportedModel, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    machine = relax.VirtualMachine(tvm.compile(imported.mod, tvm.target.Target("llvm")), tvm.cpu())
    result = machine["main"](*[tvm.runtime.tensor(feeds[s.name]) for s in imported.inputs])
    results = [result] if len(imported.outputs) == 1 else list(result)
    return [r.numpy() for r in results]


def assert_same(model: onnx.ModelProto, imported: ImportedModel, feeds=None, atol=1e-5) -> None:
    feeds = feeds or random_inputs(imported, seed=3)
    expected = run_ort(model, feeds)
    actual = run_tvm(imported, feeds)
    assert len(expected) == len(actual)
    for want, got in zip(expected, actual, strict=True):
        assert want.shape == got.shape
        assert want.dtype == got.dtype
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def bindings(imported: ImportedModel) -> list[Any]:
    return [b for block in imported.mod["main"].body.blocks for b in block.bindings]


def constants(imported: ImportedModel) -> dict[str, GenericConst]:
    found = {}
    for binding in bindings(imported):
        for argument in getattr(binding.value, "args", []):
            if isinstance(argument, GenericConst):
                found[const_name(argument)] = argument
    return found


# Outputs


def test_mini_bert_equals_onnxruntime():
    model = mini_bert()
    imported = import_onnx(model)
    assert [s.name for s in imported.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    assert imported.inputs[0].shape == (1, 16)
    assert imported.inputs[0].dtype == "int64"
    assert imported.outputs == ("last_hidden_state",)
    assert_same(model, imported)


def test_dynamic_bert_with_shapes_equals_onnxruntime():
    model = mini_bert("seq", "batch")
    imported = import_onnx(model, {"input_ids": (2, 12)})
    # The symbols batch and seq are shared, so one input's shape fixes all three.
    assert {s.shape for s in imported.inputs} == {(2, 12)}
    assert not {"Shape", "Slice"} & {n.op_type for n in imported.model.graph.node}
    assert_same(model, imported)


def test_outputs_keep_order_and_multi_output_is_a_tuple():
    nodes = [
        helper.make_node("Split", ["x"], ["a", "b"], name="cut", axis=1),
        helper.make_node("Neg", ["b"], ["c"], name="neg"),
    ]
    model = model_of(nodes, {"x": (TensorProto.FLOAT, (2, 6))}, ["c", "a"], opset=13)
    imported = import_onnx(model)
    assert imported.outputs == ("c", "a")
    assert [b.var.name for b in bindings(imported)][:3] == ["cut", "cut:1", "cut:2"]
    assert_same(model, imported)


def test_negative_gather_indices_equal_onnxruntime():
    table = np.arange(20, dtype=np.float32).reshape(5, 4)
    nodes = [
        helper.make_node("Gather", ["t", "i"], ["g"], name="rows", axis=0),
        helper.make_node("Gather", ["g", "last"], ["y"], name="cols", axis=-1),
    ]
    weights = {"t": table, "last": np.array(-1, np.int64)}
    model = model_of(nodes, {"i": (TensorProto.INT64, (6,))}, ["y"], weights)
    assert_same(model, import_onnx(model), {"i": np.array([0, -1, -5, 4, 2, -3])}, atol=0)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64, np.int32, np.uint8])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_constants_keep_their_dtype(dtype, shape):
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [helper.make_node("Add", ["x", "c"], ["y"], name="add")]
    model = model_of(nodes, {"x": (element, (2, 3))}, ["y"], {"c": np.full(shape, 3, dtype)})
    model.graph.output[0].type.tensor_type.elem_type = element
    feeds = {"x": np.arange(6).reshape(2, 3).astype(dtype)}
    assert_same(model, import_onnx(model), feeds, atol=0)


def test_if_branches_equal_onnxruntime():
    def branch(name, op):
        output = helper.make_tensor_value_info(name, TensorProto.FLOAT, (2, 3))
        node = helper.make_node(op, ["x"], [name], name=op)
        return helper.make_graph([node], name, [], [output])

    nodes = [
        helper.make_node(
            "If", ["c"], ["r"], name="if", then_branch=branch("t", "Abs"),
            else_branch=branch("e", "Neg"),
        ),
        helper.make_node("Exp", ["r"], ["y"], name="exp"),
    ]  # fmt: skip
    inputs = {"c": (TensorProto.BOOL, ()), "x": (TensorProto.FLOAT, (2, 3))}
    model = model_of(nodes, inputs, ["y"])
    imported = import_onnx(model)
    x = np.linspace(-2, 1, 6, dtype=np.float32).reshape(2, 3)
    for value in (True, False):
        assert_same(model, imported, {"c": np.array(value), "x": x})


def test_unused_input_and_constant_output_are_kept():
    nodes = [
        helper.make_node("Relu", ["x"], ["y"], name="act"),
        helper.make_node("Add", ["a", "a"], ["z"], name="twice"),
    ]
    inputs = {"unused": (TensorProto.FLOAT, (1,)), "x": (TensorProto.FLOAT, (2,))}
    model = model_of(nodes, inputs, ["y", "z"], {"a": np.ones(3, np.float32)})
    imported = import_onnx(model)
    assert [s.name for s in imported.inputs] == ["unused", "x"]
    assert_same(model, imported)


# Names


def test_every_constant_carries_its_initializer_name_and_value():
    imported = import_onnx(mini_bert())
    found = constants(imported)
    names = {t.name for t in imported.model.graph.initializer}
    assert "" not in found
    assert set(found) <= names
    missing = names - set(found)
    assert missing == {"/mask/axes", "/attention/split_shape", "/attention/merge_shape"}
    np.testing.assert_array_equal(
        found[f"{QUERY}.weight"].value.numpy(), WEIGHTS[f"{QUERY}.weight"].T
    )


def test_every_binding_is_named_after_its_node():
    imported = import_onnx(mini_bert())
    names = [b.var.name for b in bindings(imported)]
    assert len(names) == len(set(names))
    nodes = {n.name for n in imported.model.graph.node}
    assert nodes <= set(names)
    for name in set(names) - nodes - {"last_hidden_state"}:
        assert name.rsplit(":", 1)[0] in nodes
    by_name = {b.var.name: b.value for b in bindings(imported)}
    assert by_name["/encoder/layer.0/intermediate/dense/MatMul"].op.name == "relax.matmul"
    assert by_name["/embeddings/word_embeddings/Gather"].op.name == "relax.take"
    assert by_name["/embeddings/LayerNorm/LayerNormalization"].op.name == "relax.nn.layer_norm"


def test_unnamed_and_duplicate_nodes_get_unique_names():
    nodes = [
        helper.make_node("Neg", ["x"], ["a"]),
        helper.make_node("Abs", ["a"], ["b"], name="same"),
        helper.make_node("Exp", ["b"], ["y"], name="same"),
    ]
    model = model_of(nodes, {"x": (TensorProto.FLOAT, (2,))}, ["y"])
    imported = import_onnx(model)
    assert [n.name for n in imported.model.graph.node] == ["a", "same", "same_1"]
    assert [b.var.name for b in bindings(imported)] == ["a", "same", "same_1", "y"]


def test_names_survive_save_json():
    imported = import_onnx(relu_model())
    restored = tvm.ir.load_json(tvm.ir.save_json(imported.mod))
    call = restored["main"].body.blocks[0].bindings[0].value
    assert const_name(call.args[1]) == "w"


def test_import_is_silent(capfd, recwarn):
    nodes = [helper.make_node("Gather", ["t", "in.put"], ["y"], name="g")]
    inputs = {"in.put": (TensorProto.INT64, (2,))}
    model = model_of(nodes, inputs, ["y"], {"t": np.ones((5, 4), np.float32)})
    imported = import_onnx(model)
    tvm.compile(imported.mod, tvm.target.Target("llvm"))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert [w for w in recwarn if "Renaming" in str(w.message)] == []


# Folding


def test_source_proto_is_not_changed():
    model = mini_bert("seq", "batch")
    before = model.SerializeToString(deterministic=True)
    import_onnx(model, {"input_ids": (1, 8)})
    assert model.SerializeToString(deterministic=True) == before


@settings(max_examples=10, deadline=None)
@given(batch=st.integers(1, 4), seq=st.integers(1, 64))
def test_folding_preserves_the_function(batch, seq):
    model = mini_bert("seq", "batch")
    folded = load_proto(model)
    fix_input_shapes(folded, {"input_ids": (batch, seq)})
    fold_constants(folded)
    onnx.checker.check_model(folded, full_check=True)
    ids = np.random.default_rng(seq).integers(0, 100, (batch, seq))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": ids % 2}
    np.testing.assert_array_equal(run_ort(folded, feeds)[0], run_ort(model, feeds)[0])


def test_cast_and_scaled_int8_weight_becomes_one_named_constant():
    nodes = [
        helper.make_node("Cast", ["q"], ["f"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "s"], ["w"], name="scale"),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="mm"),
    ]
    weights = {
        "q": np.arange(-6, 6, dtype=np.int8).reshape(4, 3),
        "s": np.array([0.5, 0.25, 2], np.float32),
    }
    model = model_of(nodes, {"x": (TensorProto.FLOAT, (2, 4))}, ["y"], weights)
    imported = import_onnx(model)
    assert [t.name for t in imported.model.graph.initializer] == ["w"]
    np.testing.assert_array_equal(
        constants(imported)["w"].value.numpy(), weights["q"] * weights["s"]
    )
    assert_same(model, imported)


def test_quantised_weights_are_not_folded():
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], name="dq", axis=1),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="mm"),
    ]
    weights = {
        "q": np.arange(-6, 6, dtype=np.int8).reshape(4, 3),
        "s": np.array([0.5, 0.25, 2], np.float32),
    }
    model = model_of(nodes, {"x": (TensorProto.FLOAT, (2, 4))}, ["y"], weights)
    imported = import_onnx(model)
    assert [n.op_type for n in imported.model.graph.node] == ["DequantizeLinear", "MatMul"]
    assert constants(imported)["q"].value.numpy().dtype == np.int8
    assert_same(model, imported)


def test_a_small_node_that_makes_a_large_constant_is_not_folded():
    nodes = [
        helper.make_node("ConstantOfShape", ["n"], ["big"], name="fill"),
        helper.make_node("ReduceSum", ["big"], ["s"], name="sum", keepdims=0),
        helper.make_node("Add", ["x", "s"], ["y"], name="add"),
    ]
    weights = {"n": np.array([2048, 2048], np.int64)}
    model = model_of(nodes, {"x": (TensorProto.FLOAT, (2,))}, ["y"], weights)
    fix_input_shapes(model)
    fold_constants(model)
    assert "ConstantOfShape" in {n.op_type for n in model.graph.node}


def test_random_nodes_are_not_folded():
    nodes = [
        helper.make_node("RandomNormal", [], ["r"], name="r", shape=[2]),
        helper.make_node("Add", ["x", "r"], ["y"], name="add"),
    ]
    model = model_of(nodes, {"x": (TensorProto.FLOAT, (2,))}, ["y"])
    fix_input_shapes(model)
    fold_constants(model)
    assert [n.op_type for n in model.graph.node] == ["RandomNormal", "Add"]


def test_initializer_restated_as_input_is_not_an_input():
    model = relu_model()
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, (3, 4)))
    imported = import_onnx(model)
    assert [s.name for s in imported.inputs] == ["x"]


def test_local_functions_are_inlined():
    body = [helper.make_node("Add", ["a", "a"], ["t"]), helper.make_node("Relu", ["t"], ["b"])]
    opset = helper.make_opsetid("", 17)
    function = helper.make_function("local", "TwiceRelu", ["a"], ["b"], body, [opset])
    nodes = [helper.make_node("TwiceRelu", ["x"], ["y"], name="call", domain="local")]
    model = model_of(nodes, {"x": (TensorProto.FLOAT, (2,))}, ["y"], extra_domains=["local"])
    model.functions.append(function)
    assert_same(model, import_onnx(model))


# Shapes


def test_symbolic_dimension_without_shape_gives_the_flag():
    with pytest.raises(DynamicShapeError, match="batch, seq") as caught:
        import_onnx(mini_bert("seq", "batch"))
    assert caught.value.hint == "--shape input_ids=1x128"


def test_partly_symbolic_dimension_keeps_the_known_size_in_the_hint():
    with pytest.raises(DynamicShapeError) as caught:
        import_onnx(relu_model(("n", 3)))
    assert caught.value.hint == "--shape x=1x3"


def test_input_without_rank_needs_a_shape():
    model = relu_model()
    model.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(DynamicShapeError, match="'x' has no shape"):
        import_onnx(model)
    assert import_onnx(model, {"x": (2, 3)}).inputs[0].shape == (2, 3)


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        ({"input_id": (1, 8)}, "unknown input 'input_id'"),
        ({"input_ids": (1, 8, 2)}, "rank 3, the model says 2"),
        ({"input_ids": (1, 9)}, "axis 1 of input 'input_ids' is 16, not 9"),
        ({"input_ids": (0, 16)}, "size below 1"),
    ],
)
def test_wrong_shapes_are_refused(shapes, match):
    with pytest.raises(ShapeError, match=match):
        import_onnx(mini_bert(), shapes)


def test_unknown_input_names_the_nearest():
    with pytest.raises(ShapeError) as caught:
        import_onnx(mini_bert(), {"input_id": (1, 8)})
    assert caught.value.hint.startswith("did you mean input_ids?")


def test_contradicting_symbols_are_refused():
    shapes = {"input_ids": (1, 8), "attention_mask": (1, 9)}
    with pytest.raises(ShapeError, match=r"axis 1 \(seq\) of input 'attention_mask' is 8, not 9"):
        import_onnx(mini_bert("seq", "batch"), shapes)


# Files


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ModelFileError, match="does not exist"):
        import_onnx(tmp_path / "none.onnx")
    with pytest.raises(ModelFileError, match="is a folder"):
        import_onnx(tmp_path)


def test_unreadable_file(tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"x")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(onnx, "load_model", refuse)
    with pytest.raises(ModelFileError, match="Permission denied"):
        import_onnx(path)


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_file(tmp_path, kept):
    data = mini_bert().SerializeToString()
    path = tmp_path / "cut.onnx"
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ModelFileError):
        import_onnx(path)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=300))
def test_random_bytes(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("bytes") / "noise.onnx"
    path.write_bytes(data)
    with pytest.raises(ModelFileError):
        import_onnx(path)


@settings(max_examples=40, deadline=None)
@given(position=st.integers(0, 10**9), value=st.integers(0, 255))
@example(position=41588, value=29)
def test_a_flipped_byte_gives_a_model_or_one_clear_error(tmp_path_factory, position, value):
    data = bytearray(relu_model().SerializeToString())
    data[position % len(data)] = value
    path = tmp_path_factory.mktemp("flip") / "flipped.onnx"
    path.write_bytes(bytes(data))
    with contextlib.suppress(IcdError):
        import_onnx(path)


@pytest.mark.parametrize("field", ["name", "op_type", "domain"])
def test_names_with_line_breaks_do_not_break_the_error_line(field):
    model = relu_model()
    model.graph.node[0].op_type = "NoSuchOp"
    setattr(model.graph.node[0], field, "two\nlines")
    with pytest.raises(UnsupportedOpError) as caught:
        import_onnx(model)
    assert "\n" not in caught.value.line()


def test_name_that_is_not_utf8(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(relu_model().SerializeToString().replace(b"act", b"a\xfft"))
    with pytest.raises(ModelFileError, match="not UTF-8"):
        import_onnx(path)


@pytest.mark.parametrize(
    "element", [TensorProto.UNDEFINED, TensorProto.STRING], ids=["undefined", "string"]
)
def test_inputs_without_numbers_are_refused(element):
    nodes = [helper.make_node("Identity", ["s"], ["y"], name="n")]
    model = model_of(nodes, {"s": (TensorProto.STRING, (2,))}, ["y"])
    model.graph.input[0].type.tensor_type.elem_type = element
    with pytest.raises((UnsupportedOpError, ModelFileError)):
        import_onnx(model)


def test_sequence_input_is_refused():
    nodes = [helper.make_node("ConcatFromSequence", ["s"], ["y"], name="n", axis=0)]
    model = model_of(nodes, {}, ["y"])
    model.graph.input.append(helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, [2]))
    with pytest.raises(UnsupportedOpError, match="not a tensor but sequence_type"):
        import_onnx(model)


def test_path_source_takes_the_file_stem_as_name(tmp_path):
    path = tmp_path / "small.model.onnx"
    path.write_bytes(relu_model().SerializeToString())
    assert import_onnx(path).name == "small.model"
    assert import_onnx(str(path)).name == "small.model"


def test_checker_message_is_reported():
    model = relu_model()
    model.graph.node[0].input[0] = "nowhere"
    with pytest.raises(ModelFileError, match="checker") as caught:
        import_onnx(model)
    assert "\n" not in caught.value.line()


def test_initializer_with_too_few_bytes():
    model = relu_model()
    model.graph.initializer[0].raw_data = b"\0" * 8
    with pytest.raises(ModelFileError):
        import_onnx(model)


def test_large_initializer_with_too_few_bytes():
    model = relu_model((2, 64), {"w": np.ones((64, 64), np.float32)})
    model.graph.initializer[0].raw_data = b"\0" * 8
    with pytest.raises(ModelFileError, match="initializer 'w' is damaged"):
        import_onnx(model)


def external_model(tmp_path, weights="weights.bin"):
    path = tmp_path / "m.onnx"
    onnx.save_model(
        relu_model(), path, save_as_external_data=True, location=weights, size_threshold=0
    )
    return path


def test_external_data_in_the_same_folder(tmp_path):
    imported = import_onnx(external_model(tmp_path))
    np.testing.assert_array_equal(constants(imported)["w"].value.numpy(), np.ones((3, 4)))


def test_external_data_missing_or_short(tmp_path):
    path = external_model(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"\0" * 8)
    with pytest.raises(ModelFileError, match="'w'"):
        import_onnx(path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelFileError, match="'w'"):
        import_onnx(path)


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname", "..\\secret.bin", ""])
def test_external_data_outside_the_folder(tmp_path, location):
    (tmp_path / "secret.bin").write_bytes(b"\0" * 48)
    folder = tmp_path / "inner"
    folder.mkdir()
    path = external_model(folder)
    model = onnx.load_model(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelFileError, match="outside the model's folder"):
        import_onnx(path)


# Operators and values


def test_all_unsupported_operators_are_named_in_one_line():
    nodes = [
        helper.make_node("Det", ["x"], ["h"], name="determinant"),
        helper.make_node("Squeeze", ["h"], ["s"], name="squeeze"),
        helper.make_node("FooBar", ["s"], ["y"], name="foo", domain="com.example"),
    ]
    inputs = {"x": (TensorProto.FLOAT, (1, 2, 2))}
    model = model_of(nodes, inputs, ["y"], extra_domains=["com.example"])
    with pytest.raises(UnsupportedOpError) as caught:
        import_onnx(model)
    line = caught.value.line()
    assert "\n" not in line
    for part in ("Det", "'determinant'", "ai.onnx", "FooBar", "'foo'", "com.example"):
        assert part in line
    assert "Squeeze" not in line
    assert caught.value.hint


def test_unknown_standard_operator_is_unsupported_not_invalid():
    nodes = [helper.make_node("NoSuchOp", ["x"], ["y"], name="n")]
    with pytest.raises(UnsupportedOpError, match="NoSuchOp"):
        import_onnx(model_of(nodes, {"x": (TensorProto.FLOAT, (2,))}, ["y"]))


def test_unsupported_operator_inside_a_branch():
    output = helper.make_tensor_value_info("t", TensorProto.FLOAT, (1,))
    bad = helper.make_graph([helper.make_node("Det", ["x"], ["t"], name="in")], "b", [], [output])
    nodes = [helper.make_node("If", ["c"], ["y"], name="if", then_branch=bad, else_branch=bad)]
    inputs = {"c": (TensorProto.BOOL, ()), "x": (TensorProto.FLOAT, (1, 2, 2))}
    with pytest.raises(UnsupportedOpError, match="Det"):
        import_onnx(model_of(nodes, inputs, ["y"]))


def test_a_namesake_of_another_domain_is_refused():
    nodes = [helper.make_node("Relu", ["x"], ["y"], name="n", domain="com.example")]
    inputs = {"x": (TensorProto.FLOAT, (2,))}
    with pytest.raises(UnsupportedOpError, match=r"Relu \(domain com.example"):
        import_onnx(model_of(nodes, inputs, ["y"], extra_domains=["com.example"]))


def test_converter_refusal_names_the_node():
    nodes = [helper.make_node("ReduceSum", ["x", "axes"], ["y"], name="sum")]
    inputs = {"x": (TensorProto.FLOAT, (2, 3)), "axes": (TensorProto.INT64, (1,))}
    with pytest.raises(UnsupportedOpError, match="ReduceSum at node 'sum'") as caught:
        import_onnx(model_of(nodes, inputs, ["y"]))
    assert "\n" not in caught.value.line()


def test_sparse_initializer_is_refused():
    model = relu_model()
    values = numpy_helper.from_array(np.ones(1, np.float32), "w")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "w_idx")
    del model.graph.initializer[:]
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [3, 4]))
    with pytest.raises(UnsupportedOpError, match="'w' is stored sparse"):
        import_onnx(model)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_weight_is_named(value):
    weight = np.ones((3, 4), np.float32)
    weight[1, 2] = value
    with pytest.raises(NonFiniteError, match="'w' holds 1 NaN or infinite of 12"):
        import_onnx(relu_model(weights={"w": weight}))


def test_infinite_mask_and_fill_value_are_accepted():
    mask = np.triu(np.full((3, 3), -np.inf, np.float32), 1)
    nodes = [
        helper.make_node("Add", ["x", "mask"], ["a"], name="add"),
        helper.make_node("Max", ["a", "low"], ["m"], name="max"),
        helper.make_node("Softmax", ["m"], ["y"], name="soft", axis=-1),
    ]
    weights = {"mask": np.nan_to_num(mask, nan=0.0, neginf=-np.inf), "low": np.float32(-np.inf)}
    weights = {k: np.asarray(v) for k, v in weights.items()}
    model = model_of(nodes, {"x": (TensorProto.FLOAT, (3, 3))}, ["y"], weights)
    assert_same(model, import_onnx(model))
