"""A scan in both directions at once: the kernel, and when the pass takes it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import pytest
from converter_check import array_model, run_ort
from onnx import helper, numpy_helper
from test_converters_ssm import kernels, mamba_body, mamba_feeds, mamba_weights, scan_node, value
from test_cpu_lowering import calls, execute
from test_state_space_lowering import few, mamba, random_operands, reference, scans

from icd_tvm._tvm import tvm
from icd_tvm.models.importer import import_onnx
from icd_tvm.relax_passes.fuse_scan_pair import FuseScanPair
from icd_tvm.tir_schedules.cpu.scan_pair import kept_bytes, scan_pair
from icd_tvm.tir_schedules.cpu.stack import compile_kernel
from icd_tvm.tir_schedules.target import parse_target

CHANNELS, STATES = 32, 4


@few
@scans
def test_both_directions_equal_float64(
    length: int, channels: int, states: int, turned: bool, target: Any
) -> None:
    program, rng = mamba(channels, states), np.random.default_rng(length * 100 + states)
    given = random_operands(program, length, rng)
    starts = [rng.standard_normal((1, channels, states)).astype(np.float32) for _ in range(2)]
    # Only the second operand is read from its end by the direction that writes from the start.
    read = [array[::-1].copy() if i == 1 and turned else array for i, array in enumerate(given)]
    output = tvm.runtime.tensor(np.full((length, channels, 1), np.nan, np.float32))
    func = scan_pair(program, length, (False, turned) + (False,) * 4)
    tensors = [tvm.runtime.tensor(array) for array in (*starts, *read)]
    compile_kernel(func, target)["main"](*tensors, output)
    exact = reference(starts[0], given, False)[0] + reference(starts[1], given, True)[0]
    bound = 4e-6 * max(1.0, np.abs(exact).max())
    np.testing.assert_allclose(output.numpy(), exact, rtol=0, atol=bound)


def body(decay: str, states: bool) -> onnx.GraphProto:
    """The body of `mamba_body` with another decay, or with the new state as its output."""
    graph = mamba_body(CHANNELS, STATES)
    next(node for node in graph.node if node.output[0] == "decay").op_type = decay
    if states:
        graph.node.append(helper.make_node("Identity", ["h2"], ["copy"]))
        graph.output[1].CopyFrom(value("copy", CHANNELS, STATES))
    return graph


def both(time: int = 20, outputs: tuple[str, ...] = ("y",), **change: Any) -> onnx.ModelProto:
    """Two scans that are added; ``change`` replaces attributes or inputs of the second one."""
    nodes = []
    for i in (0, 1):
        inputs = ["h0", "dts", "us", "Bs", "Cs"]
        turned = {"inputs": [i] * 4, "outputs": [i]}
        if i:
            inputs = change.get("read", inputs)
            turned |= change.get("turned", {})
        nodes.append(
            scan_node(
                body(change.get("decays", ("Exp", "Exp"))[i], change.get("states", False)),
                inputs,
                [f"h{i}_", f"y{i}"],
                4,
                scan_input_directions=turned["inputs"],
                scan_output_directions=turned["outputs"],
            )
        )
    nodes[1].name = "back"
    nodes.append(helper.make_node("Add", ["y1", "y0"], ["y"], name="sum"))
    feeds = mamba_feeds(time, CHANNELS, STATES)
    return array_model(nodes, feeds, outputs, mamba_weights(CHANNELS, STATES))


def test_a_pair_becomes_one_kernel_and_equals_onnx_runtime() -> None:
    model, feeds = both(), mamba_feeds(20, CHANNELS, STATES)
    imported = import_onnx(model)
    fuse = FuseScanPair()
    assert len(kernels(imported)) == 2
    scans = [name for name in calls(fuse(imported.mod)) if "scan" in name]
    assert scans == ["scan_pair"]
    assert (fuse.fused, fuse.refusals) == (1, {})
    found = execute(imported.mod, *[feeds[spec.name] for spec in imported.inputs])
    [wanted] = run_ort(model, feeds)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (both(read=["h0", "us", "us", "Bs", "Cs"]), "different operands"),
        (both(turned={"inputs": [1, 1, 0, 1]}), "same order"),
        (both(decays=("Exp", "Sigmoid")), "different recurrences"),
        (both(states=True), "a value for every state"),
        (both(time=5000), "5000 steps keep .* use fewer"),
        (both(decays=("Neg", "Neg")), "nothing .* alike"),
        (both(turned={"inputs": [0] * 4, "outputs": [0]}), None),
        (both(outputs=("y", "h1_")), None),
        (both(outputs=("y", "y0")), None),
    ],
)
def test_other_pairs_stay(model: onnx.ModelProto, reason: str | None) -> None:
    mod = import_onnx(model).mod
    fuse = FuseScanPair()
    fuse(mod)
    assert fuse.fused == 0
    assert [*fuse.refusals] == (["sum"] if reason else [])
    assert all(re.search(reason, text) for text in fuse.refusals.values())


def test_outputs_that_are_broadcast_stay() -> None:
    model = both()
    last = model.graph.node.pop()
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "middle"))
    model.graph.node.append(helper.make_node("Unsqueeze", ["y0", "middle"], ["tall"]))
    model.graph.node.append(helper.make_node("Add", ["y1", "tall"], ["y"], name=last.name))
    fuse = FuseScanPair()
    fuse(import_onnx(model).mod)
    assert (fuse.fused, fuse.refusals) == (0, {})


def test_a_pair_compiles_for_aarch64() -> None:
    func = scan_pair(mamba(32, 4), 5, (False,) * 6)
    text = compile_kernel(func, parse_target("aarch64", 1)).mod.inspect_source("asm")
    assert "fmla" in text


def test_what_is_kept() -> None:
    assert kept_bytes(mamba(32, 4), 100) == 100 * 4 * 16 * 4
