"""Converters of quantised operators, against ONNX Runtime or the ONNX reference."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from converter_check import MS, array_model, check, run_reference
from onnx import TensorProto, helper

from icd_tvm.errors import UnsupportedOpError
from icd_tvm.models.converters.quantize_linear import NARROW
from icd_tvm.models.importer import import_onnx
from icd_tvm.relax_passes.axis_groups import find_axis_groups

RNG = np.random.default_rng(11)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def whole(dtype: str, *shape: int) -> np.ndarray:
    """Integers over the whole range of a dtype."""
    info = np.iinfo(dtype)
    return RNG.integers(info.min, info.max, shape, endpoint=True).astype(dtype)


# -- MatMulNBits


def nbits_weights(k: int, n: int, bits: int, block: int, zero: str) -> dict[str, np.ndarray]:
    blocks = -(-k // block)
    weights = {
        "b": whole("uint8", n, blocks, block * bits // 8),
        "s": (0.01 + RNG.random((n, blocks))).astype(np.float32),
    }
    if zero == "packed":
        weights["z"] = whole("uint8", n, -(-blocks * bits // 8))
    if zero == "float":
        weights["z"] = (RNG.random((n, blocks)) * (1 << bits)).astype(np.float32)
    return weights


def nbits_node(names: list[str], k: int, n: int, bits: int, block: int):
    return helper.make_node(
        "MatMulNBits", names, ["y"], name="mm", domain=MS, K=k, N=n, bits=bits, block_size=block
    )


@pytest.mark.parametrize(
    ("bits", "zero"),
    [(2, "none"), (4, "none"), (4, "packed"), (4, "float"), (8, "none"), (8, "packed")],
)
@pytest.mark.parametrize(("k", "n", "block"), [(64, 24, 32), (72, 10, 16), (16, 8, 16)])
def test_matmul_nbits(bits, zero, k, n, block):
    weights = nbits_weights(k, n, bits, block, zero)
    names = ["x", "b", "s", *(["z"] if zero != "none" else [])]
    feeds = {"x": normal(2, 3, k)}
    check(nbits_node(names, k, n, bits, block), feeds, weights=weights)


def test_matmul_nbits_with_bias_and_group_index():
    k, n, block = 64, 12, 16
    weights = nbits_weights(k, n, 4, block, "none")
    weights["g"] = RNG.permutation(np.arange(k, dtype=np.int32) // block).astype(np.int32)
    weights["c"] = normal(n)
    node = nbits_node(["x", "b", "s", "", "g", "c"], k, n, 4, block)
    check(node, {"x": normal(3, k)}, weights=weights)


def test_the_quantised_axis_stays_free():
    k, n, block = 64, 32, 16
    weights = {**nbits_weights(k, n, 4, block, "packed"), "w": normal(8, k)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="up"),
        helper.make_node("Relu", ["h"], ["r"], name="act"),
        nbits_node(["r", "b", "s", "z"], k, n, 4, block),
    ]
    imported = check(nodes, {"x": normal(2, 8)}, weights=weights)
    groups = find_axis_groups(imported.mod["main"])
    [hidden] = [g for g in groups.atomic if g.size == k]
    assert hidden.free
    assert hidden.constraint == "free"
    assert {use.name for use in hidden.consts} == {"w", "b", "b.g_idx"}


def test_a_computed_weight_is_refused():
    node = nbits_node(["x", "b", "s"], 32, 4, 4, 32)
    feeds = {"x": normal(2, 32), "b": whole("uint8", 4, 1, 16)}
    model = array_model([node], feeds, ["y"], {"s": np.ones((4, 1), np.float32)})
    with pytest.raises(UnsupportedOpError, match=r"'mm'.*weight.*not a constant"):
        import_onnx(model)


# -- QuantizeLinear and DequantizeLinear


def linear(op: str, names, outputs=("y",), **attrs):
    return helper.make_node(op, names, list(outputs), name="q", **attrs)


def scales(*shape: int) -> np.ndarray:
    return (0.01 + RNG.random(shape)).astype(np.float32)


@pytest.mark.parametrize(("axis", "blocks"), [(0, (3, 8)), (1, (6, 4)), (-1, (6, 4))])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("zero", [False, True])
def test_blocked_dequantize_and_quantize(axis, blocks, dtype, zero):
    weights = {"s": scales(*blocks), "z": whole(dtype, *blocks)}
    names = ["x", "s", *(["z"] if zero else [])]
    weights = {name: weights[name] for name in names[1:]}
    node = linear("DequantizeLinear", names, axis=axis, block_size=2)
    check(node, {"x": whole(dtype, 6, 8)}, weights=weights, opset=21)
    attrs = {} if zero else {"output_dtype": getattr(TensorProto, dtype.upper())}
    node = linear("QuantizeLinear", names, axis=axis, block_size=2, **attrs)
    feeds = {"x": 20 * normal(6, 8)}
    check(node, feeds, weights=weights, opset=21, dtypes={"y": dtype})


def test_the_blocks_of_a_weight_move_with_its_axis():
    nodes = [
        helper.make_node("MatMul", ["x", "u"], ["h"], name="up"),
        linear("DequantizeLinear", ["w", "s"], ["d"], axis=0, block_size=4),
        helper.make_node("MatMul", ["h", "d"], ["y"], name="down"),
    ]
    weights = {"u": normal(6, 16), "w": whole("int8", 16, 6), "s": scales(4, 6)}
    imported = check(nodes, {"x": normal(3, 6)}, weights=weights, opset=21)
    groups = find_axis_groups(imported.mod["main"])
    [hidden] = [g for g in groups.atomic if g.size == 16]
    assert hidden.free
    assert {use.name for use in hidden.consts} == {"u", "w", "s.blocks"}


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int2", "uint2"])
@pytest.mark.parametrize("layout", ["tensor", "channel", "blocks"])
def test_narrow_weights_are_unpacked(dtype, layout):
    shape, attrs = {
        "tensor": ((), {}),
        "channel": ((5,), {"axis": 1}),
        "blocks": ((2, 5), {"axis": 0, "block_size": 4}),
    }[layout]
    low, high = NARROW[dtype]
    kind = getattr(ml_dtypes, dtype)
    values = RNG.integers(low, high + 1, (7, 5)).astype(kind)
    zero = RNG.integers(low, high + 1, shape).astype(kind)
    weights = {"w": values, "s": scales(*shape), "z": np.asarray(zero)}
    nodes = [
        linear("DequantizeLinear", ["w", "s", "z"], ["d"], **attrs),
        helper.make_node("Add", ["x", "d"], ["y"]),
    ]
    opset = 21 if dtype.endswith("4") else 25
    check(nodes, {"x": normal(7, 5)}, weights=weights, opset=opset, run=run_reference)


@pytest.mark.parametrize("dtype", ["int4", "uint4"])
@pytest.mark.parametrize("shape", [(), (8,)])
def test_quantize_to_four_bits_and_back(dtype, shape):
    zero = np.full(shape, 3).astype(getattr(ml_dtypes, dtype))
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["i"]),
        helper.make_node("DequantizeLinear", ["i", "s", "z"], ["y"]),
    ]
    weights = {"s": scales(*shape), "z": zero}
    check(nodes, {"x": 4 * normal(6, 8)}, weights=weights, opset=21)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("shape", [(), (5,)])
def test_float8_weights_are_decoded(dtype, zero, shape):
    kind = getattr(ml_dtypes, dtype)
    weights = {"w": (0.01 * normal(7, 5)).astype(kind), "s": scales(*shape)}
    if zero:
        weights["z"] = np.zeros(shape, kind)
    nodes = [
        linear("DequantizeLinear", ["w", "s", *(["z"] if zero else [])], ["d"], axis=1),
        helper.make_node("Add", ["x", "d"], ["y"]),
    ]
    check(nodes, {"x": normal(7, 5)}, weights=weights, opset=21)


@pytest.mark.parametrize("data", ["normal", "positive", "negative", "zeros"])
def test_dynamic_quantize_linear(data):
    x = {
        "normal": normal(4, 9),
        "positive": 3 + np.abs(normal(4, 9)),
        "negative": -3 - np.abs(normal(4, 9)),
        "zeros": np.zeros((4, 9), np.float32),
    }[data]
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"])
    check(node, {"x": x}, ["y", "s", "z"], dtypes={"y": "uint8", "z": "uint8"})


# -- integer products


@pytest.mark.parametrize(("a", "b"), [("uint8", "uint8"), ("uint8", "int8"), ("int8", "int8")])
@pytest.mark.parametrize("per_column", [False, True])
def test_qlinear_matmul(a, b, per_column):
    columns = (6,) if per_column else ()
    weights = {
        "as": scales(),
        "az": whole(a),
        "b": whole(b, 16, 6),
        "bs": scales(*columns) / 10,
        "bz": whole(b, *columns),
        "ys": np.float32(7.3),
        "yz": whole(a),
    }
    node = helper.make_node("QLinearMatMul", ["x", "as", "az", "b", "bs", "bz", "ys", "yz"], ["y"])
    check(node, {"x": whole(a, 2, 5, 16)}, weights=weights, opset=21, dtypes={"y": a})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("per_column", [False, True])
def test_matmul_integer_to_float(bias, zero, per_column):
    columns = (6,) if per_column else (1,)
    weights = {
        "b": whole("int8", 16, 6),
        "as": scales(1),
        "bs": scales(*columns),
        "az": whole("uint8", 1),
        "bz": whole("int8", *columns),
        "c": normal(6),
    }
    names = ["x", "b", "as", "bs", *(["az", "bz"] if zero else ["", ""]), "c" if bias else ""]
    weights = {name: array for name, array in weights.items() if name in names}
    node = helper.make_node("MatMulIntegerToFloat", names, ["y"], domain=MS)
    check(node, {"x": whole("uint8", 2, 5, 16)}, weights=weights)


@pytest.mark.parametrize("b", ["uint8", "int8"])
@pytest.mark.parametrize("extras", [False, True])
def test_dynamic_quantize_matmul(b, extras):
    weights = {"b": whole(b, 16, 6), "bs": scales(1), "bz": whole(b, 1), "c": normal(6)}
    names = ["x", "b", "bs", *(["bz", "c"] if extras else [])]
    weights = {name: array for name, array in weights.items() if name in names}
    node = helper.make_node("DynamicQuantizeMatMul", names, ["y"], domain=MS)
    check(node, {"x": normal(2, 5, 16)}, weights=weights)


@pytest.mark.parametrize("mask", [False, True])
def test_q_attention(mask):
    weights = {
        "w": whole("int8", 16, 96),
        "b": normal(96),
        "xs": np.float32(0.02),
        "ws": np.float32(0.01),
        "xz": np.uint8(120),
        "wz": np.int8(0),
    }
    feeds = {"x": whole("uint8", 2, 5, 16)}
    if mask:
        feeds["m"] = np.array([5, 3], np.int32)
    names = ["x", "w", "b", "xs", "ws", "m" if mask else "", "xz", "wz"]
    node = helper.make_node("QAttention", names, ["y"], domain=MS, num_heads=4)
    check(node, feeds, weights={n: np.asarray(a) for n, a in weights.items()})


# -- integer convolutions

CONVOLUTIONS = [
    ((2, 4, 9), (6, 4, 3), {}),
    ((1, 4, 8, 9), (6, 2, 3, 3), {"group": 2, "strides": [2, 1], "pads": [1, 0, 2, 1]}),
    ((1, 4, 8, 9), (4, 1, 3, 2), {"group": 4, "dilations": [2, 1]}),
    ((1, 4, 8, 9), (6, 4, 3, 2), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ((1, 4, 8, 9), (6, 4, 3, 2), {"auto_pad": "SAME_LOWER"}),
    ((1, 4, 8, 9), (6, 4, 3, 2), {"auto_pad": "VALID"}),
]


@pytest.mark.parametrize(("data", "kernel", "attrs"), CONVOLUTIONS)
@pytest.mark.parametrize("zero", [False, True])
def test_conv_integer(data, kernel, attrs, zero):
    weights = {"w": whole("uint8", *kernel), "xz": whole("uint8"), "wz": whole("uint8")}
    names = ["x", "w", *(["xz", "wz"] if zero else [])]
    weights = {name: weights[name] for name in names if name in weights}
    node = helper.make_node("ConvInteger", names, ["y"], **attrs)
    check(node, {"x": whole("uint8", *data)}, weights=weights, dtypes={"y": "int32"})


@pytest.mark.parametrize(("data", "kernel", "attrs"), CONVOLUTIONS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_qlinear_conv(data, kernel, attrs, per_channel):
    channels = kernel[:1] if per_channel else ()
    weights = {
        "xs": scales(),
        "xz": whole("uint8"),
        "w": whole("int8", *kernel),
        "ws": scales(*channels) / 10,
        "wz": np.zeros(channels, np.int8),
        "ys": np.float32(5.7),
        "yz": whole("uint8"),
        "c": RNG.integers(-999, 999, kernel[0]).astype(np.int32),
    }
    names = ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz", "c"]
    node = helper.make_node("QLinearConv", names, ["y"], **attrs)
    check(node, {"x": whole("uint8", *data)}, weights=weights, dtypes={"y": "uint8"})


def test_half_precision_matmul_nbits():
    weights = nbits_weights(64, 12, 4, 16, "packed")
    weights["s"] = weights["s"].astype(np.float16)
    node = nbits_node(["x", "b", "s", "z"], 64, 12, 4, 16)
    feeds = {"x": normal(3, 64).astype(np.float16)}
    check(node, feeds, weights=weights, dtypes={"y": "float16"}, rel=2e-3)


def test_float8_computed_at_run_time_is_refused():
    node = linear("QuantizeLinear", ["x", "s"], output_dtype=TensorProto.FLOAT8E4M3FN)
    model = array_model([node], {"x": normal(3)}, ["y"], {"s": np.float32(1)}, opset=21)
    with pytest.raises(UnsupportedOpError, match="float8_e4m3fn"):
        import_onnx(model)
