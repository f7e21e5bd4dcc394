"""Converters of state space models: Scan as one kernel, unrolled or refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
from converter_check import array_model, check, run_imported, run_ort, run_reference
from onnx import TensorProto, helper, numpy_helper

from icd_tvm._tvm import Call, Op, relax, tvm
from icd_tvm.errors import UnsupportedOpError
from icd_tvm.models.importer import import_onnx
from icd_tvm.relax_passes.axis_groups import find_axis_groups
from icd_tvm.relax_passes.lower_cpu import build_cpu
from icd_tvm.tir_schedules.target import host_target

RNG = np.random.default_rng(3)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def value(name: str, *shape: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def axis(name: str, *numbers: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(numbers, np.int64), name)


def mamba_body(channels: int, states: int) -> onnx.GraphProto:
    """``h = exp(dt A) h + dt B u``, ``y = C h + D u``, with A and D from outside."""
    n = helper.make_node
    nodes = [
        n("Unsqueeze", ["dt", "last"], ["dtc"]),
        n("Mul", ["dtc", "A"], ["rate"]),
        n("Exp", ["rate"], ["decay"]),
        n("Unsqueeze", ["u", "last"], ["uc"]),
        n("Unsqueeze", ["B", "first"], ["Br"]),
        n("Mul", ["dtc", "Br"], ["dtB"]),
        n("Mul", ["uc", "dtB"], ["input"]),
        n("Mul", ["decay", "h"], ["kept"]),
        n("Add", ["kept", "input"], ["h2"]),
        n("Unsqueeze", ["C", "first"], ["Cr"]),
        n("Mul", ["h2", "Cr"], ["hC"]),
        n("ReduceSum", ["hC", "last"], ["yh"], keepdims=0),
        n("Mul", ["u", "D"], ["skip"]),
        n("Add", ["yh", "skip"], ["y"]),
    ]
    inputs = [
        value("h", channels, states),
        value("dt", channels),
        value("u", channels),
        value("B", states),
        value("C", states),
    ]
    outputs = [value("h2", channels, states), value("y", channels)]
    return helper.make_graph(nodes, "body", inputs, outputs, [axis("first", 0), axis("last", 1)])


def mamba_feeds(time: int, channels: int, states: int) -> dict[str, np.ndarray]:
    return {
        "h0": normal(channels, states),
        "dts": np.abs(normal(time, channels)),
        "us": normal(time, channels),
        "Bs": normal(time, states),
        "Cs": normal(time, states),
    }


def mamba_weights(channels: int, states: int) -> dict[str, np.ndarray]:
    return {"A": -np.abs(normal(channels, states)), "D": normal(channels)}


def scan_node(body: onnx.GraphProto, inputs, outputs, scanned: int, **attrs) -> onnx.NodeProto:
    return helper.make_node(
        "Scan", inputs, outputs, name="scan", body=body, num_scan_inputs=scanned, **attrs
    )


def kernels(imported) -> list[str]:
    calls = [b.value for block in imported.mod["main"].body.blocks for b in block.bindings]
    tir = [c for c in calls if isinstance(c, Call) and isinstance(c.op, Op)]
    return [str(c.args[0].name_hint) for c in tir if c.op.name == "relax.call_tir"]


# -- one kernel


@pytest.mark.parametrize("backwards", [0, 1])
@pytest.mark.parametrize(
    ("time", "channels", "states"), [(100, 32, 16), (7, 24, 4), (5, 3, 1), (1, 16, 33)]
)
def test_selective_scan(time, channels, states, backwards):
    node = scan_node(
        mamba_body(channels, states),
        ["h0", "dts", "us", "Bs", "Cs"],
        ["h", "ys"],
        4,
        scan_input_directions=[backwards] * 4,
        scan_output_directions=[backwards],
    )
    feeds, weights = mamba_feeds(time, channels, states), mamba_weights(channels, states)
    imported = check(node, feeds, ["h", "ys"], weights)
    assert kernels(imported) == ["selective_scan"]


def test_the_optimised_kernel_equals_onnx_runtime():
    nodes = [
        scan_node(
            mamba_body(64, 16),
            ["h0", "dts", "us", "Bs", "Cs"],
            [f"h{i}_", f"y{i}"],
            4,
            scan_input_directions=[i] * 4,
            scan_output_directions=[i],
        )
        for i in (0, 1)
    ]
    nodes[1].name = "back"
    nodes.append(helper.make_node("Add", ["y0", "y1"], ["y"]))
    feeds = mamba_feeds(300, 64, 16)
    model = array_model(nodes, feeds, ["y"], mamba_weights(64, 16))
    imported = import_onnx(model)
    machine = relax.VirtualMachine(build_cpu(imported.mod, host_target(2)), tvm.cpu())
    found = machine["main"](*[tvm.runtime.tensor(feeds[s.name]) for s in imported.inputs])
    [wanted] = run_ort(model, feeds)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_mixed_directions():
    node = scan_node(
        mamba_body(16, 4),
        ["h0", "dts", "us", "Bs", "Cs"],
        ["h", "ys"],
        4,
        scan_input_directions=[0, 1, 0, 1],
        scan_output_directions=[1],
    )
    imported = check(node, mamba_feeds(70, 16, 4), ["h", "ys"], mamba_weights(16, 4))
    assert kernels(imported) == ["selective_scan"]


def test_precomputed_coefficients_and_a_product():
    n = helper.make_node
    body = helper.make_graph(
        [
            n("Mul", ["a", "h"], ["kept"]),
            n("Add", ["kept", "b"], ["next"]),
            n("Identity", ["next"], ["h2"]),
            n("Unsqueeze", ["c", "one"], ["column"]),
            n("MatMul", ["next", "column"], ["yc"]),
            n("Squeeze", ["yc", "one"], ["y"]),
        ],
        "body",
        [value("h", 8, 16), value("a", 8, 16), value("b", 8, 16), value("c", 16)],
        [value("h2", 8, 16), value("y", 8)],
        [axis("one", 1)],
    )
    node = scan_node(body, ["h0", "as", "bs", "cs"], ["h", "ys"], 3)
    decay = RNG.random((66, 8, 16)).astype(np.float32)
    feeds = {"h0": normal(8, 16), "as": decay, "bs": normal(66, 8, 16), "cs": normal(66, 16)}
    assert kernels(check(node, feeds, ["h", "ys"])) == ["selective_scan"]


def test_a_batch_with_time_on_the_second_axis():
    n = helper.make_node
    body = helper.make_graph(
        [
            n("Unsqueeze", ["x", "last"], ["column"]),
            n("Sigmoid", ["gate"], ["g"]),
            n("Mul", ["g", "h"], ["kept"]),
            n("Add", ["kept", "column"], ["h2"]),
            n("Unsqueeze", ["c", "middle"], ["row"]),
            n("Mul", ["h2", "row"], ["hc"]),
            n("ReduceSum", ["hc", "last"], ["y"], keepdims=1),
            n("Identity", ["h2"], ["copy"]),
        ],
        "body",
        [value("h", 2, 16, 4), value("x", 2, 16), value("c", 2, 4)],
        [value("h2", 2, 16, 4), value("y", 2, 16, 1), value("copy", 2, 16, 4)],
        [axis("last", -1), axis("middle", 1)],
    )
    node = scan_node(
        body,
        ["h0", "xs", "cs"],
        ["h", "ys", "hs"],
        2,
        scan_input_axes=[1, -2],
        scan_output_axes=[1, -1],
    )
    feeds = {"h0": normal(2, 16, 4), "xs": normal(2, 80, 16), "cs": normal(2, 80, 4)}
    imported = check(node, feeds, ["h", "ys", "hs"], {"gate": normal(16, 4)})
    assert kernels(imported) == ["selective_scan"]


def test_the_old_state_is_read_before_it_changes():
    n = helper.make_node
    body = helper.make_graph(
        [
            n("Add", ["h", "x"], ["h2"]),
            n("Mul", ["h", "h2"], ["both"]),
            n("ReduceSum", ["both", "last"], ["y"], keepdims=0),
        ],
        "body",
        [value("h", 4, 4), value("x", 4, 4)],
        [value("h2", 4, 4), value("y", 4)],
        [axis("last", 1)],
    )
    feeds = {"h0": normal(4, 4), "xs": normal(70, 4, 4)}
    check(scan_node(body, ["h0", "xs"], ["h", "ys"], 1), feeds, ["h", "ys"])


def test_the_new_state_may_read_a_sum_of_the_old_one():
    n = helper.make_node
    body = helper.make_graph(
        [
            n("Mul", ["h", "k"], ["hk"]),
            n("ReduceSum", ["hk", "last"], ["found"], keepdims=1),
            n("Sub", ["v", "found"], ["missing"]),
            n("Mul", ["missing", "k"], ["change"]),
            n("Add", ["h", "change"], ["h2"]),
            n("Mul", ["h2", "k"], ["read"]),
            n("ReduceSum", ["read", "last"], ["y"], keepdims=1),
        ],
        "body",
        [value("h", 16, 4), value("k", 1, 4), value("v", 16, 1)],
        [value("h2", 16, 4), value("y", 16, 1)],
        [axis("last", 1)],
    )
    keys = normal(70, 1, 4)
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    feeds = {"h0": normal(16, 4), "ks": keys, "vs": normal(70, 16, 1)}
    imported = check(scan_node(body, ["h0", "ks", "vs"], ["h", "ys"], 2), feeds, ["h", "ys"])
    assert kernels(imported) == ["selective_scan"]


def test_channels_and_states_are_free_and_time_is_pinned():
    n = helper.make_node
    nodes = [
        n("MatMul", ["x", "wd"], ["pre"], name="delta"),
        n("Softplus", ["pre"], ["dts"], name="positive"),
        n("MatMul", ["x", "wu"], ["us"], name="value"),
        n("MatMul", ["x", "wb"], ["Bs"], name="to_b"),
        n("MatMul", ["x", "wc"], ["Cs"], name="to_c"),
        scan_node(mamba_body(16, 4), ["h0", "dts", "us", "Bs", "Cs"], ["h", "ys"], 4),
        n("MatMul", ["ys", "wo"], ["y"], name="out"),
    ]
    weights = {
        **mamba_weights(16, 4),
        "h0": np.zeros((16, 4), np.float32),
        "wd": normal(6, 16),
        "wu": normal(6, 16),
        "wb": normal(6, 4),
        "wc": normal(6, 4),
        "wo": normal(16, 6),
    }
    imported = check(nodes, {"x": normal(65, 6)}, weights=weights)
    groups = find_axis_groups(imported.mod["main"])
    channels = next(g for g in groups.atomic if g.role == "channels of a scan")
    states = next(g for g in groups.atomic if g.role == "states of a scan")
    assert (channels.size, channels.free, states.size, states.free) == (16, True, 4, True)
    assert {use.name for use in channels.consts} == {"A", "D", "h0", "wd", "wu", "wo"}
    assert {use.name for use in states.consts} == {"A", "h0", "wb", "wc"}
    time = next(g for g in groups.atomic if g.size == 65)
    assert "time of a scan" in {pin.reason for pin in time.pins}
    names = [b.var.name for block in imported.mod["main"].body.blocks for b in block.bindings]
    assert {"delta", "positive", "value", "scan", "out"} <= set(names)


# -- unrolled and refused


def mixing_body() -> onnx.GraphProto:
    """A recurrent network: the state is multiplied by a matrix; two states."""
    n = helper.make_node
    return helper.make_graph(
        [
            n("MatMul", ["h", "R"], ["mixed"], name="mix"),
            n("Add", ["mixed", "x"], ["sum"]),
            n("Tanh", ["sum"], ["h2"]),
            n("Add", ["count", "one"], ["count2"]),
            n("Mul", ["h2", "count2"], ["y"]),
        ],
        "body",
        [value("h", 1, 8), value("count", 1), value("x", 1, 8)],
        [value("h2", 1, 8), value("count2", 1), value("y", 1, 8)],
        [numpy_helper.from_array(np.ones(1, np.float32), "one")],
    )


def mixing_node(**attrs) -> onnx.NodeProto:
    return scan_node(mixing_body(), ["h0", "c0", "xs"], ["h", "c", "ys"], 1, **attrs)


def mixing_feeds(time: int) -> dict[str, np.ndarray]:
    return {"h0": normal(1, 8), "c0": np.zeros(1, np.float32), "xs": normal(time, 1, 8)}


@pytest.mark.parametrize("backwards", [0, 1])
def test_a_short_scan_of_any_body_is_unrolled(backwards):
    node = mixing_node(scan_input_directions=[backwards], scan_output_directions=[backwards])
    weights = {"R": normal(8, 8) / 3}
    imported = check(node, mixing_feeds(5), ["h", "c", "ys"], weights)
    assert kernels(imported) == []
    names = [b.var.name for block in imported.mod["main"].body.blocks for b in block.bindings]
    assert {f"scan/{step}/mix" for step in range(5)} <= set(names)


def test_a_long_scan_of_another_body_is_refused():
    weights = {"R": normal(8, 8)}
    model = array_model([mixing_node()], mixing_feeds(65), ["h", "c", "ys"], weights)
    with pytest.raises(UnsupportedOpError, match=r"'scan'.*65 steps.*at most 64.*2 states"):
        import_onnx(model)


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([("MatMul", ["h", "x"], ["h2"])], "more than one column"),
        ([("Transpose", ["h"], ["t"]), ("Add", ["t", "x"], ["h2"])], "Transpose"),
        ([("ReduceSum", ["h"], ["s"]), ("Add", ["s", "x"], ["h2"])], "sum does not run over"),
        (
            [
                ("ReduceSum", ["h", "last"], ["s"]),
                ("Mul", ["s", "h"], ["sh"]),
                ("ReduceSum", ["sh", "last"], ["ss"]),
                ("Add", ["ss", "x"], ["h2"]),
            ],
            "sum of sums",
        ),
    ],
)
def test_why_a_body_is_no_recurrence(nodes, reason):
    body = helper.make_graph(
        [helper.make_node(*node) for node in nodes],
        "body",
        [value("h", 4, 4), value("x", 4, 4)],
        [value("h2", 4, 4)],
        [axis("last", 1)],
    )
    feeds = {"h0": normal(4, 4), "xs": normal(99, 4, 4)}
    model = array_model([scan_node(body, ["h0", "xs"], ["h"], 1)], feeds, ["h"])
    with pytest.raises(UnsupportedOpError, match=reason):
        import_onnx(model)


# -- the standard operators for state space models


@pytest.mark.parametrize("rule", ["linear", "gated", "delta", "gated_delta"])
@pytest.mark.parametrize(("heads", "own"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("past", [False, True])
def test_linear_attention(rule, heads, own, past):
    batch, time, keys, values = 2, 9, 8, 16
    key = normal(batch, time, own, keys)
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    feeds = {
        "q": normal(batch, time, heads * keys),
        "k": key.reshape(batch, time, own * keys),
        "v": normal(batch, time, own * values),
    }
    if past:
        feeds["s"] = normal(batch, own, keys, values)
    if "gated" in rule:
        feeds["g"] = -np.abs(normal(batch, time, own * keys if past else own))
    if "delta" in rule:
        feeds["b"] = RNG.random((batch, time, 1 if past else own)).astype(np.float32)
    names = [name if name in feeds else "" for name in "qkvsgb"]
    node = helper.make_node(
        "LinearAttention",
        names,
        ["y", "state"],
        q_num_heads=heads,
        kv_num_heads=own,
        update_rule=rule,
        scale=0.5 if past else 0.0,
    )
    imported = check(node, feeds, ["y", "state"], opset=27, run=run_reference)
    assert kernels(imported) == ["selective_scan"]


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("time", [1, 9])
def test_causal_conv_with_state(activation, past, time):
    weights = {"w": normal(6, 1, 4), "b": normal(6)}
    feeds = {"x": normal(2, 6, time)}
    if past:
        feeds["s"] = normal(2, 6, 3)
    names = ["x", "w", "b" if past else "", "s" if past else ""]
    node = helper.make_node("CausalConvWithState", names, ["y", "state"], activation=activation)
    weights = {name: array for name, array in weights.items() if name in names}
    check(node, feeds, ["y", "state"], weights, opset=27, run=run_reference)


# -- a trained model


def trained_mamba() -> Path | None:
    spec = importlib.util.find_spec("typeseg")
    return Path(spec.origin).parent / "data" / "mamba_al.onnx" if spec and spec.origin else None


@pytest.mark.skipif(trained_mamba() is None, reason="the package typeseg is not installed")
def test_a_trained_mamba_equals_onnx_runtime():
    model = onnx.load(trained_mamba())
    imported = import_onnx(model, {"ids": [512]})
    assert len(kernels(imported)) == 12
    feeds = {"ids": RNG.integers(0, 130, 512)}
    [found], [wanted] = run_imported(imported, feeds), run_ort(model, feeds)
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
