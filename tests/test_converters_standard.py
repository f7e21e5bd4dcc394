"""Standard operators: outputs equal to ONNX Runtime, or to ONNX's definition where it has none."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from icd_tvm._tvm import relax, tvm
from icd_tvm.errors import ShapeError, UnsupportedOpError
from icd_tvm.models.importer import ImportedModel, import_onnx
from icd_tvm.models.onnx_unroll import MAX_TRIPS

RNG = np.random.default_rng(3)


def floats(*shape: int, dtype: str = "float32") -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def ints(*values: int, dtype: str = "int64") -> np.ndarray:
    return np.array(values, dtype)


def graph_model(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, np.ndarray],
    outputs: tuple[str, ...],
    constants: dict[str, np.ndarray] | None = None,
    opset: int = 17,
) -> onnx.ModelProto:
    element = helper.np_dtype_to_tensor_dtype
    graph = helper.make_graph(
        nodes,
        "case",
        [helper.make_tensor_value_info(n, element(a.dtype), a.shape) for n, a in inputs.items()],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(a, n) for n, a in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    typed = onnx.shape_inference.infer_shapes(model)
    for target, source in zip(model.graph.output, typed.graph.output, strict=True):
        target.type.CopyFrom(source.type)
    return model


def node_model(
    op: str,
    inputs: dict[str, np.ndarray],
    constants: dict[str, np.ndarray] | None = None,
    opset: int = 17,
    outputs: tuple[str, ...] = ("y",),
    order: tuple[str, ...] | None = None,
    **attrs: Any,
) -> onnx.ModelProto:
    names = order if order is not None else (*inputs, *(constants or {}))
    node = helper.make_node(op, list(names), list(outputs), name="node", **attrs)
    return graph_model([node], inputs, tuple(o for o in outputs if o), constants, opset)


def run_ort(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    providers = ["CPUExecutionProvider"]
    session = ort.InferenceSession(model.SerializeToString(), options, providers=providers)
    return session.run(None, feeds)


def run_definition(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return ReferenceEvaluator(model).run(None, feeds)


def run_tvm(imported: ImportedModel, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    machine = relax.VirtualMachine(tvm.compile(imported.mod, tvm.target.Target("llvm")), tvm.cpu())
    result = machine["main"](*[tvm.runtime.tensor(feeds[s.name]) for s in imported.inputs])
    return [r.numpy() for r in ([result] if len(imported.outputs) == 1 else result)]


def check(model: onnx.ModelProto, feeds: dict[str, np.ndarray], oracle=run_ort, **close) -> None:
    results = run_tvm(import_onnx(model), feeds)
    expected = oracle(model, feeds)
    assert len(results) == len(expected)
    for got, want in zip(results, expected, strict=True):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        wide = [a.astype(np.float64) if a.dtype.kind not in "iub" else a for a in (got, want)]
        np.testing.assert_allclose(*wide, **{"rtol": 2e-5, "atol": 2e-6, **close})


@pytest.mark.parametrize("op", ["Elu", "Celu", "Selu", "Softplus", "Mish"])
def test_activations(op: str):
    feeds = {"x": np.concatenate([floats(50) * 3, np.float32([-90, -20, -1e-6, 0, 20, 90])])}
    check(node_model(op, feeds, opset=18), feeds, atol=1e-12 if op == "Softplus" else 2e-6)


@pytest.mark.parametrize("op", ["Elu", "Celu", "Selu"])
def test_activation_attributes_and_half_floats(op: str):
    feeds = {"x": floats(40, dtype="float16")}
    model = node_model(op, feeds, opset=28 if op == "Celu" else 22, alpha=0.7)
    check(model, feeds, run_definition, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("slope", [(), (1,), (3, 1, 1), (2, 3, 4, 5)])
def test_prelu(slope: tuple[int, ...]):
    feeds = {"x": floats(2, 3, 4, 5)}
    check(node_model("PRelu", feeds, {"slope": floats(*slope)}), feeds)


@pytest.mark.parametrize(
    ("base", "exponent"),
    [("float32", "int64"), ("float32", "float32"), ("int32", "int32"), ("int64", "float32")],
)
def test_pow_mixes_types(base: str, exponent: str):
    feeds = {
        "x": np.array([1, 2, 3, 5, 7], base),
        "e": np.array([0, 1, 2, 3, 4], exponent),
    }
    check(node_model("Pow", feeds), feeds)


def test_integer_power_keeps_large_values():
    feeds = {"x": ints(3, -7, 10, 2), "e": ints(30, 15, 15, 52)}
    check(node_model("Pow", feeds), feeds, rtol=0, atol=0)


def test_float_modulo_takes_the_sign_of_the_divisor():
    values = np.array([-4.3, 7.2, 5.0, 4.3, -7.2, 8.0, 0.0, -0.0, np.inf, 1.0], np.float32)
    divisors = np.array([2.1, -3.4, 8.0, -2.1, 3.4, 5.0, -2.0, 3.0, 2.0, np.inf], np.float32)
    model = node_model("Mod", {"x": values, "m": divisors}, opset=17, fmod=1)
    check(model, {"x": values, "m": divisors})
    floor = node_model("Mod", {"x": values, "m": divisors}, opset=28)
    got = run_tvm(import_onnx(floor), {"x": values, "m": divisors})[0]
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(got, np.mod(values, divisors), rtol=1e-6)


@pytest.mark.parametrize(("positive", "negative"), [(1, 1), (1, 0), (0, 1), (0, 0)])
def test_isinf(positive: int, negative: int):
    feeds = {"x": np.array([1.0, np.inf, -np.inf, np.nan], np.float32)}
    check(
        node_model("IsInf", feeds, detect_positive=positive, detect_negative=negative),
        feeds,
    )


@pytest.mark.parametrize("direction", ["LEFT", "RIGHT"])
def test_bit_shift(direction: str):
    feeds = {
        "x": np.array([16, 4, 1, 255], np.uint8),
        "s": np.array([1, 2, 3, 0], np.uint8),
    }
    check(node_model("BitShift", feeds, direction=direction), feeds)


def test_bit_shift_beyond_the_width_leaves_the_sign():
    feeds = {"x": ints(-8, 8, -8, 8, dtype="int32"), "s": ints(40, 40, -1, 1, dtype="int32")}
    right = run_tvm(import_onnx(node_model("BitShift", feeds, opset=28, direction="RIGHT")), feeds)
    left = run_tvm(import_onnx(node_model("BitShift", feeds, opset=28, direction="LEFT")), feeds)
    np.testing.assert_array_equal(right[0], [-1, 0, -1, 4])
    np.testing.assert_array_equal(left[0], [0, 0, 0, 16])


@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
def test_cumulative_sum_and_product(exclusive: int, reverse: int):
    feeds = {"x": floats(3, 4)}
    attrs = {"exclusive": exclusive, "reverse": reverse}
    check(node_model("CumSum", feeds, {"axis": np.int64(-1)}, 14, **attrs), feeds)
    model = node_model("CumProd", feeds, {"axis": np.int64(0)}, 26, **attrs)
    check(model, feeds, run_definition)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_layer_normalization_returns_its_moments(axis: int):
    feeds = {"x": floats(2, 3, 4)}
    tail = feeds["x"].shape[axis:]
    weights = {"scale": floats(*tail), "bias": floats(*tail)}
    outputs = ("y", "mean", "inverse")
    check(node_model("LayerNormalization", feeds, weights, 17, outputs, axis=axis), feeds)


@pytest.mark.parametrize("axis", [0, -1])
def test_rms_normalization(axis: int):
    feeds = {"x": floats(3, 4)}
    weights = {"scale": floats(*feeds["x"].shape[axis:])}
    check(node_model("RMSNormalization", feeds, weights, 23, axis=axis), feeds, run_definition)


@pytest.mark.parametrize("p", [1, 2])
def test_lp_normalization_of_zeros_is_zero(p: int):
    feeds = {"x": floats(3, 4)}
    feeds["x"][1] = 0
    results = run_tvm(import_onnx(node_model("LpNormalization", feeds, opset=22, p=p)), feeds)
    norm = np.linalg.norm(feeds["x"], p, axis=-1, keepdims=True)
    expected = np.divide(feeds["x"], norm, out=np.zeros((3, 4), np.float32), where=norm != 0)
    np.testing.assert_allclose(results[0], expected, rtol=1e-5)


def test_batch_normalization_in_training_mode():
    feeds = {"x": floats(4, 3, 5)}
    weights = {n: floats(3) for n in ("scale", "bias", "mean")}
    weights["variance"] = np.abs(floats(3))
    model = node_model("BatchNormalization", feeds, weights, 15, ("y", "m", "v"), training_mode=1)
    check(model, feeds)


def test_dropout_gives_an_all_true_mask():
    feeds = {"x": floats(2, 3)}
    check(node_model("Dropout", feeds, opset=13, outputs=("y", "mask")), feeds)


def test_dropout_in_training_is_refused():
    feeds = {"x": floats(2, 3)}
    constants = {"ratio": np.float32(0.3), "training": np.bool_(True)}
    with pytest.raises(UnsupportedOpError, match=r"training mode with ratio 0\.3"):
        import_onnx(node_model("Dropout", feeds, constants, 13))


@pytest.mark.parametrize("target", ["FLOAT8E4M3FN", "FLOAT8E5M2"])
@pytest.mark.parametrize("saturate", [0, 1])
def test_eight_bit_floats_round_trip(target: str, saturate: int):
    edges = [0, -0.0, 1e-9, 3e-3, 447, 449, 480, 5e4, 6e4, 1e9, np.inf, -np.inf, np.nan]
    feeds = {"x": np.concatenate([floats(60) * 10, np.float32(edges)])}
    nodes = [
        helper.make_node("Cast", ["x"], ["c"], to=getattr(TensorProto, target), saturate=saturate),
        helper.make_node("Cast", ["c"], ["y"], to=TensorProto.FLOAT),
    ]
    check(graph_model(nodes, feeds, ("y",), opset=19), feeds, run_definition, rtol=0, atol=0)


@pytest.mark.parametrize("target", ["INT4", "FLOAT4E2M1"])
def test_types_without_tensors_are_refused(target: str):
    model = node_model("Cast", {"x": floats(4)}, opset=23, to=getattr(TensorProto, target))
    with pytest.raises(UnsupportedOpError, match="no tensors of"):
        import_onnx(model)


@pytest.mark.parametrize(
    ("source", "target"), [("float32", "int32"), ("int64", "double"), ("bool", "uint8")]
)
def test_bit_cast(source: str, target: str):
    feeds = {"x": RNG.integers(0, 2, 12).astype(source)}
    to = helper.np_dtype_to_tensor_dtype(np.dtype(target))
    got = run_tvm(import_onnx(node_model("BitCast", feeds, opset=26, to=to)), feeds)[0]
    np.testing.assert_array_equal(got, feeds["x"].view(target))


RESIZES: list[dict[str, Any]] = [
    {"mode": "nearest", "scales": (1, 1, 2, 3)},
    {"mode": "nearest", "scales": (1, 1, 0.6, 1.5), "nearest_mode": "ceil"},
    {"mode": "nearest", "sizes": (1, 2, 7, 3), "coordinate_transformation_mode": "asymmetric"},
    {"mode": "linear", "scales": (1, 1, 2.3, 0.7)},
    {"mode": "linear", "sizes": (1, 2, 9, 4), "coordinate_transformation_mode": "align_corners"},
    {"mode": "linear", "scales": (1, 1, 0.5, 0.5), "antialias": 1},
    {"mode": "cubic", "scales": (1, 1, 1.7, 2)},
    {"mode": "cubic", "sizes": (1, 2, 3, 9), "cubic_coeff_a": -0.5, "exclude_outside": 1},
    {
        "mode": "linear",
        "sizes": (1, 2, 3, 3),
        "coordinate_transformation_mode": "pytorch_half_pixel",
    },
]


@pytest.mark.parametrize("setting", RESIZES, ids=lambda s: "-".join(map(str, s.values())))
def test_resize(setting: dict[str, Any]):
    attrs = dict(setting)
    feeds = {"x": floats(1, 2, 5, 6)}
    if "sizes" in attrs:
        constants = {"sizes": ints(*attrs.pop("sizes"))}
        order = ("x", "", "", "sizes")
    else:
        constants = {"scales": np.array(attrs.pop("scales"), np.float32)}
        order = ("x", "", "scales")
    check(node_model("Resize", feeds, constants, 18, order=order, **attrs), feeds, atol=1e-5)


def test_resize_crops_a_region_and_extrapolates():
    feeds = {"x": floats(1, 1, 4, 4)}
    region = np.array([0, 0, 0.2, -0.3, 1, 1, 0.8, 1.4], np.float32)
    model = node_model(
        "Resize",
        feeds,
        {"roi": region, "sizes": ints(1, 1, 3, 5)},
        18,
        order=("x", "roi", "", "sizes"),
        mode="linear",
        coordinate_transformation_mode="tf_crop_and_resize",
        extrapolation_value=9.0,
    )
    check(model, feeds)


def test_upsample():
    feeds = {"x": floats(1, 2, 3, 4)}
    scales = {"scales": np.array([1, 1, 2, 3], np.float32)}
    check(node_model("Upsample", feeds, scales, 9, mode="nearest"), feeds)


def test_resize_with_computed_sizes_is_refused():
    feeds = {"x": floats(1, 1, 4, 4), "sizes": ints(1, 1, 8, 8)}
    model = node_model("Resize", feeds, opset=18, order=("x", "", "", "sizes"))
    with pytest.raises(UnsupportedOpError, match="sizes"):
        import_onnx(model)
    assert import_onnx(model, constants={"sizes": feeds["sizes"]}).inputs[0].name == "x"


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_one_hot(axis: int):
    feeds = {"i": ints(0, -1, 5, 3, 9)}
    constants = {"depth": np.int64(6), "values": np.array([2.0, 7.0], np.float32)}
    check(node_model("OneHot", feeds, constants, 11, axis=axis), feeds)


def test_eye_like():
    feeds = {"x": floats(3, 5)}
    check(node_model("EyeLike", feeds, k=1, dtype=TensorProto.INT64), feeds)


@pytest.mark.parametrize(("time", "batch"), [(0, 1), (1, 0)])
def test_reverse_sequence(time: int, batch: int):
    feeds = {"x": floats(4, 4, 2), "lengths": ints(1, 2, 3, 4)}
    check(node_model("ReverseSequence", feeds, time_axis=time, batch_axis=batch), feeds)


@pytest.mark.parametrize("mode", ["linear", "circular"])
def test_tensor_scatter(mode: str):
    feeds = {"cache": floats(2, 3, 5, 4), "update": floats(2, 3, 2, 4), "at": ints(1, 3)}
    check(node_model("TensorScatter", feeds, opset=24, mode=mode), feeds, run_definition)


def test_columns_to_image():
    feeds = {"x": floats(1, 2 * 3 * 2, 12)}
    constants = {"image": ints(6, 7), "block": ints(3, 2)}
    attrs = {"strides": [2, 2], "pads": [1, 1, 1, 0], "dilations": [1, 1]}
    check(node_model("Col2Im", feeds, constants, 18, **attrs), feeds)


def test_pad_with_a_computed_value():
    feeds = {"x": floats(2, 3), "value": np.float32([2.5])[0]}
    feeds["value"] = np.asarray(feeds["value"])
    model = node_model("Pad", feeds, {"pads": ints(0, 1, 2, 1)}, 13, order=("x", "pads", "value"))
    check(model, feeds)


@pytest.mark.parametrize("target", [(3,), (2, 3, 1), (2, 1, 4)])
def test_expand_keeps_larger_sizes_of_the_input(target: tuple[int, ...]):
    feeds = {"x": floats(1, 3, 1)}
    check(node_model("Expand", feeds, {"shape": ints(*target)}), feeds)


def test_slice_without_axes_before_opset_10():
    feeds = {"x": floats(4, 5)}
    check(node_model("Slice", feeds, opset=9, starts=[1, -3], ends=[100, -1]), feeds)


@pytest.mark.parametrize("axes", [ints(0), ints(-1, 1), np.int64(1)], ids=str)
def test_unsqueeze(axes: np.ndarray):
    feeds = {"x": floats(2, 3)}
    got = run_tvm(import_onnx(node_model("Unsqueeze", feeds, {"axes": np.asarray(axes)})), feeds)
    np.testing.assert_array_equal(got[0], np.expand_dims(feeds["x"], tuple(np.atleast_1d(axes))))


def test_space_to_depth():
    feeds = {"x": floats(1, 2, 4, 6)}
    check(node_model("SpaceToDepth", feeds, blocksize=2), feeds)


@pytest.mark.parametrize("op", ["ReduceMax", "ReduceMin"])
@pytest.mark.parametrize("keep", [0, 1])
def test_extremes_of_infinities(op: str, keep: int):
    feeds = {"x": floats(3, 4, 2)}
    feeds["x"][1] = -np.inf if op == "ReduceMax" else np.inf
    check(node_model(op, feeds, {"axes": ints(1)}, 18, keepdims=keep), feeds)
    check(node_model(op, feeds, opset=18, keepdims=keep), feeds)


def test_extremes_of_bool():
    feeds = {"x": RNG.integers(0, 2, (3, 4)).astype(bool)}
    check(node_model("ReduceMax", feeds, {"axes": ints(1)}, 20), feeds, run_definition)


@pytest.mark.parametrize("onesided", [0, 1])
def test_fourier_transform(onesided: int):
    feeds = {"x": floats(2, 10, 1)}
    check(node_model("DFT", feeds, opset=17, axis=1, onesided=onesided), feeds, atol=1e-5)


def test_short_time_fourier_transform():
    feeds = {"x": floats(1, 64, 1)}
    constants = {"step": np.int64(8), "window": np.hanning(16).astype(np.float32)}
    check(node_model("STFT", feeds, constants, 17, order=("x", "step", "window")), feeds, atol=1e-5)


def recurrent_weights(gates: int, size: int, hidden: int, sides: int) -> dict[str, np.ndarray]:
    return {
        "w": floats(sides, gates * hidden, size) / 3,
        "r": floats(sides, gates * hidden, hidden) / 3,
        "b": floats(sides, 2 * gates * hidden),
    }


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(("op", "gates"), [("RNN", 1), ("GRU", 3), ("LSTM", 4)])
def test_recurrent(op: str, gates: int, direction: str):
    sides = 2 if direction == "bidirectional" else 1
    feeds = {"x": floats(5, 2, 3), "lengths": ints(5, 3, dtype="int32"), "h": floats(sides, 2, 4)}
    constants = recurrent_weights(gates, 3, 4, sides)
    outputs = ("y", "last", "cell") if op == "LSTM" else ("y", "last")
    order = ("x", "w", "r", "b", "lengths", "h")
    attrs = {"hidden_size": 4, "direction": direction}
    check(node_model(op, feeds, constants, 14, outputs, order, **attrs), feeds, atol=1e-5)


def test_gru_resets_after_the_product():
    feeds = {"x": floats(4, 1, 3)}
    constants = recurrent_weights(3, 3, 4, 1)
    attrs = {"hidden_size": 4, "linear_before_reset": 1}
    check(node_model("GRU", feeds, constants, 14, ("y", "last"), **attrs), feeds, atol=1e-5)


def test_lstm_with_peepholes():
    feeds = {"x": floats(3, 2, 3)}
    constants = {**recurrent_weights(4, 3, 4, 1), "p": floats(1, 12)}
    order = ("x", "w", "r", "b", "", "", "", "p")
    check(node_model("LSTM", feeds, constants, 14, ("y",), order, hidden_size=4), feeds, atol=1e-5)


def test_a_long_recurrence_is_refused():
    feeds = {"x": floats(65, 1, 3)}
    with pytest.raises(UnsupportedOpError, match="65 steps"):
        import_onnx(node_model("GRU", feeds, recurrent_weights(3, 3, 4, 1), 14, hidden_size=4))


def test_transposed_convolution_with_an_output_shape():
    feeds = {"x": floats(1, 2, 3, 3)}
    weights = {"w": floats(2, 2, 3, 3)}
    attrs = {"strides": [3, 2], "output_shape": [8, 6], "auto_pad": "SAME_UPPER"}
    check(node_model("ConvTranspose", feeds, weights, 11, **attrs), feeds)


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_half_products_are_summed_in_float32(op: str):
    feeds = {"a": floats(4, 512, dtype="float16")}
    weights = {"b": floats(512, 8, dtype="float16")}
    exact = feeds["a"].astype(np.float64) @ weights["b"].astype(np.float64)
    got = run_tvm(import_onnx(node_model(op, feeds, weights)), feeds)[0]
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, exact, rtol=1e-3, atol=1e-3)


def test_convolution_of_half_floats():
    feeds = {"x": floats(1, 16, 6, 6, dtype="float16")}
    weights = {"w": floats(4, 16, 3, 3, dtype="float16")}
    model = node_model("Conv", feeds, weights)
    wide = node_model(
        "Conv",
        {"x": feeds["x"].astype(np.float32)},
        {"w": weights["w"].astype(np.float32)},
    )
    exact = run_ort(wide, {"x": feeds["x"].astype(np.float32)})[0]
    got = run_tvm(import_onnx(model), feeds)[0]
    np.testing.assert_allclose(got, exact, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("order", [0, 1])
def test_max_pool_returns_indices(order: int):
    feeds = {"x": floats(2, 3, 6, 5)}
    attrs = {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1]}
    model = node_model("MaxPool", feeds, opset=12, outputs=("y", "i"), storage_order=order, **attrs)
    oracle = run_ort if order == 0 else run_definition
    if order:
        got = run_tvm(import_onnx(model), feeds)
        flat = feeds["x"].transpose(0, 1, 3, 2).ravel()
        np.testing.assert_array_equal(flat[got[1]], got[0])
    else:
        check(model, feeds, oracle)


def test_non_max_suppression_keeps_boxes_at_the_threshold():
    boxes = np.array([[[0, 0, 1, 1], [0, 0.5, 1, 1.5], [0, 5, 1, 6]]], np.float32)
    feeds = {"boxes": boxes, "scores": np.array([[[0.9, 0.8, 0.7]]], np.float32)}
    third = np.float32([1 / 3])
    constants = {"most": ints(3), "overlap": third, "least": np.float32([0.1])}
    check(node_model("NonMaxSuppression", feeds, constants, 11), feeds)


def test_non_max_suppression_needs_constant_limits():
    feeds = {"b": floats(1, 3, 4), "s": floats(1, 1, 3), "most": ints(2)}
    with pytest.raises(UnsupportedOpError, match="not a constant"):
        import_onnx(node_model("NonMaxSuppression", feeds, opset=11))


def test_roi_align_by_maximum_is_refused():
    feeds = {
        "x": floats(1, 1, 6, 6),
        "rois": np.float32([[0, 0, 4, 4]]),
        "batch": ints(0),
    }
    with pytest.raises(UnsupportedOpError, match="mode = 'max'"):
        import_onnx(node_model("RoiAlign", feeds, opset=16, mode="max"))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_loss_is_expanded_to_its_definition(reduction: str):
    feeds = {"scores": floats(3, 5, 2), "labels": ints(1, 4, 0, 2, 3, 3).reshape(3, 2)}
    model = node_model("SoftmaxCrossEntropyLoss", feeds, opset=13, reduction=reduction)
    check(model, feeds)


def test_defaults_reach_an_expanded_definition():
    constants = {"size": np.int64(10)}
    feeds = {"x": floats(10)}
    nodes = [
        helper.make_node("HannWindow", ["size"], ["w"]),
        helper.make_node("Mul", ["x", "w"], ["y"]),
    ]
    check(graph_model(nodes, feeds, ("y",), constants), feeds)


def counted_loop(trips: int, going: str = "go") -> onnx.ModelProto:
    """``total += x[i]`` for each trip, with the running totals stacked."""
    body = helper.make_graph(
        [
            helper.make_node("Gather", ["x", "i"], ["row"], axis=0),
            helper.make_node("Add", ["total", "row"], ["next"]),
            helper.make_node("Identity", ["next"], ["shown"]),
            helper.make_node("Identity" if going == "go" else "Not", ["go"], ["on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, ()),
            helper.make_tensor_value_info("go", TensorProto.BOOL, ()),
            helper.make_tensor_value_info("total", TensorProto.FLOAT, (3,)),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, ()),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, (3,)),
            helper.make_tensor_value_info("shown", TensorProto.FLOAT, (3,)),
        ],
    )
    node = helper.make_node("Loop", ["trips", "", "start"], ["end", "all"], body=body)
    constants = {"trips": np.asarray(trips, np.int64), "start": np.zeros(3, np.float32)}
    return graph_model([node], {"x": floats(70, 3)}, ("end", "all"), constants)


def test_a_counted_loop_is_unrolled():
    check(counted_loop(5), {"x": floats(70, 3)}, atol=1e-5)


@pytest.mark.parametrize(
    ("trips", "going"), [(MAX_TRIPS + 1, "go"), (3, "toggle")], ids=["long", "conditional"]
)
def test_other_loops_are_refused(trips: int, going: str):
    with pytest.raises(UnsupportedOpError, match="Loop"):
        import_onnx(counted_loop(trips, going))


@pytest.mark.parametrize("taken", [True, False])
def test_a_constant_condition_leaves_one_branch(taken: bool):
    def branch(op: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info("t", TensorProto.FLOAT, (4,))
        nodes = [helper.make_node(op, ["x"], ["h"]), helper.make_node("Neg", ["h"], ["t"])]
        return helper.make_graph(nodes, op, [], [output])

    node = helper.make_node(
        "If", ["c"], ["y"], then_branch=branch("Abs"), else_branch=branch("Exp")
    )
    feeds = {"c": np.asarray(taken), "x": floats(4)}
    model = graph_model([node], feeds, ("y",))
    imported = import_onnx(model, constants={"c": feeds["c"]})
    assert [n.op_type for n in imported.model.graph.node if n.op_type != "Identity"] == [
        "Abs" if taken else "Exp",
        "Neg",
    ]
    np.testing.assert_allclose(run_tvm(imported, feeds)[0], run_ort(model, feeds)[0], rtol=1e-6)


def test_constants_bind_inputs_before_folding():
    feeds = {"x": floats(2, 6), "shape": ints(3, 4)}
    imported = import_onnx(node_model("Reshape", feeds), constants={"shape": feeds["shape"]})
    assert [spec.name for spec in imported.inputs] == ["x"]
    np.testing.assert_array_equal(run_tvm(imported, feeds)[0], feeds["x"].reshape(3, 4))


@pytest.mark.parametrize(
    ("constants", "text"),
    [
        ({"nosuch": ints(1)}, "unknown input 'nosuch'"),
        ({"shape": ints(3, 4, dtype="int32")}, "int32"),
        ({"shape": ints(3, 4, 1)}, "has shape 3"),
    ],
)
def test_a_constant_must_fit_its_input(constants: dict[str, np.ndarray], text: str):
    feeds = {"x": floats(2, 6), "shape": ints(3, 4)}
    with pytest.raises(ShapeError, match=text):
        import_onnx(node_model("Reshape", feeds), constants=constants)


def test_a_sequence_insert_counts_from_the_end():
    feeds = {name: floats(2, 3) for name in "abc"}
    nodes = [
        helper.make_node("SequenceConstruct", ["a", "b"], ["s"]),
        helper.make_node("SequenceInsert", ["s", "c", "back"], ["t"]),
        helper.make_node("SequenceAt", ["t", "back"], ["y"]),
    ]
    check(graph_model(nodes, feeds, ("y",), {"back": np.asarray(-1)}), feeds)


@pytest.mark.parametrize("split", [np.asarray(4), ints(2, 3, 5)], ids=["chunks", "sizes"])
def test_split_to_sequence(split: np.ndarray):
    feeds = {"x": floats(10, 2)}
    nodes = [
        helper.make_node("SplitToSequence", ["x", "split"], ["s"]),
        helper.make_node("SequenceAt", ["s", "last"], ["y"]),
    ]
    check(graph_model(nodes, feeds, ("y",), {"split": split, "last": np.asarray(2)}), feeds)


def test_cast_like():
    feeds = {"x": floats(5) * 9}
    check(node_model("CastLike", feeds, {"like": ints(0, dtype="int32")}, 15), feeds)
