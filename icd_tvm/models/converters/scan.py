"""Scan: one kernel for elementwise recurrences, unrolled where it is short, else refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from icd_tvm._tvm import relax
from icd_tvm.models.converters.node import Converter, OnnxNode, dtype_of
from icd_tvm.models.converters.scan_call import call_scan
from icd_tvm.models.converters.scan_program import NoRecurrence, read_scan_body
from icd_tvm.tir_schedules.cpu.scan_program import ScanProgram

# A body of ten operators then makes a graph of several hundred.
MAX_UNROLLED_STEPS = 64
_MIN_OPSET = 9


@dataclass(frozen=True)
class _Scan:
    """The parts of a Scan node; scanned inputs have time first."""

    body: onnx.GraphProto
    states: list[Any]
    scanned: list[Any]
    length: int
    backwards: list[bool]
    flipped: list[bool]
    output_axes: list[int]


def scan(node: OnnxNode) -> Any:
    """Convert a Scan of a static number of steps.

    A body that is elementwise in one state becomes a call of `selective_scan`; any other is
    repeated for every step, up to ``MAX_UNROLLED_STEPS``.
    """
    parts = _parts(node)
    try:
        return tuple(_recurrence(node, parts))
    except NoRecurrence as reason:
        if parts.length > MAX_UNROLLED_STEPS:
            raise node.refuse(
                f"{parts.length} steps are too many to unroll (at most {MAX_UNROLLED_STEPS}), "
                f"and its body is no elementwise recurrence: {reason}"
            ) from reason
    return tuple(_unrolled(node, parts))


def _parts(node: OnnxNode) -> _Scan:
    if node.opset < _MIN_OPSET:
        raise node.refuse(f"opset {node.opset} batches it; at least {_MIN_OPSET} is needed")
    body, count = node.required("body"), int(node.required("num_scan_inputs"))
    states = [node.input(i) for i in range(len(node.inputs) - count)]
    inputs = [node.input(i) for i in range(len(states), len(node.inputs))]
    outputs = len(body.output) - len(states)
    axes = node.attr("scan_input_axes", None) or [0] * count
    scanned = [_time_first(node, value, axis) for value, axis in zip(inputs, axes, strict=True)]
    lengths = {node.shape(value)[0] for value in scanned}
    if len(lengths) != 1:
        raise node.refuse(f"scanned inputs have {sorted(lengths)} steps")
    return _Scan(
        body=body,
        states=states,
        scanned=scanned,
        length=lengths.pop(),
        backwards=[bool(d) for d in node.attr("scan_input_directions", None) or [0] * count],
        flipped=[bool(d) for d in node.attr("scan_output_directions", None) or [0] * outputs],
        output_axes=[int(a) for a in node.attr("scan_output_axes", None) or [0] * outputs],
    )


def _time_first(node: OnnxNode, value: Any, axis: int) -> Any:
    rank = len(node.shape(value))
    return value if axis % rank == 0 else _move_axis(node, value, axis % rank, 0)


def _move_axis(node: OnnxNode, value: Any, source: int, target: int) -> Any:
    order = [i for i in range(len(node.shape(value))) if i != source]
    order.insert(target, source)
    return node.emit(relax.op.permute_dims(value, order))


def _time_back(node: OnnxNode, value: Any, axis: int) -> Any:
    rank = len(node.shape(value))
    return value if axis % rank == 0 else _move_axis(node, value, 0, axis % rank)


# -- one kernel


def _recurrence(node: OnnxNode, parts: _Scan) -> list[Any]:
    if len(parts.states) != 1:
        raise NoRecurrence(f"it has {len(parts.states)} states")
    if any(dtype_of(value) != "float32" for value in (*parts.states, *parts.scanned)):
        raise NoRecurrence("it is not all float32")
    state = node.shape(parts.states[0])
    steps = [node.shape(value)[1:] for value in parts.scanned]
    program = read_scan_body(parts.body, state, steps, node.scope)
    return _call(node, parts, program)


def _call(node: OnnxNode, parts: _Scan, program: ScanProgram) -> list[Any]:
    sources = [operand.source for operand in program.operands]
    final, outputs = call_scan(
        node,
        program,
        parts.states[0],
        [_source(parts, source) for source in sources],
        parts.length,
        [isinstance(source, int) and parts.backwards[source] for source in sources],
        parts.flipped,
    )
    stacked = zip(outputs, parts.output_axes, strict=True)
    return [final, *(_time_back(node, value, axis) for value, axis in stacked)]


def _source(parts: _Scan, source: Any) -> Any:
    if isinstance(source, int):
        return parts.scanned[source]
    return relax.const(source) if isinstance(source, np.ndarray) else source


# -- one copy of the body a step


def _unrolled(node: OnnxNode, parts: _Scan) -> list[Any]:
    names = [value.name for value in parts.body.input]
    states = list(parts.states)
    stacks: list[list[Any]] = [[] for _ in parts.flipped]
    for step in range(parts.length):
        sliced = [_slice(node, parts, i, step) for i in range(len(parts.scanned))]
        values = dict(zip(names, [*states, *sliced], strict=True))
        results = node.inline(parts.body, values, f"{node.name}/{step}")
        states = results[: len(states)]
        for stack, value in zip(stacks, results[len(states) :], strict=True):
            stack.append(value)
    return [*states, *(_joined(node, parts, i, stack) for i, stack in enumerate(stacks))]


def _slice(node: OnnxNode, parts: _Scan, i: int, step: int) -> Any:
    time = parts.length - 1 - step if parts.backwards[i] else step
    value = parts.scanned[i]
    row = node.emit(relax.op.strided_slice(value, [0], [time], [time + 1]))
    return node.emit(relax.op.reshape(row, node.shape(value)[1:]))


def _joined(node: OnnxNode, parts: _Scan, i: int, steps: list[Any]) -> Any:
    ordered = steps[::-1] if parts.flipped[i] else steps
    rows = [node.emit(relax.op.expand_dims(value, 0)) for value in ordered]
    return _time_back(node, node.emit(relax.op.concat(rows, axis=0)), parts.output_axes[i])


CONVERTERS: dict[tuple[str, str], Converter] = {("", "Scan"): scan}
