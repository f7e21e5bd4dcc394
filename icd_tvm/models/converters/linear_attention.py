"""LinearAttention: a recurrent state for every head, read by the queries (opset 27).

Linear, gated (Yang et al., 2024), delta rule and gated delta rule: all are recurrences of the
selective scan kernel, with the values as channels and the keys as states.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np

from icd_tvm._tvm import relax
from icd_tvm.models.converters.heads import pieces
from icd_tvm.models.converters.node import Converter, OnnxNode, cast, dtype_of, scalar
from icd_tvm.models.converters.scan_call import call_scan
from icd_tvm.tir_schedules.cpu.scan_program import Operand, ScanProgram, Term

_Q, _K, _V, _PAST, _DECAY, _BETA = range(6)
_RULES = ("linear", "gated", "delta", "gated_delta")
# Axes of the state [batch, heads, values, keys] that each kind of operand runs along.
_KEYS = (True, True, False, True)
_VALUES = (True, True, True, False)
_HEADS = (True, True, False, False)
_BATCH = (True, False, False, False)


def linear_attention(node: OnnxNode) -> Any:
    """Convert to one call of the scan kernel; the state is float32 throughout."""
    heads, own = int(node.required("q_num_heads")), int(node.required("kv_num_heads"))
    query, key, value = (_unpacked(node, i, n) for i, n in ((_Q, heads), (_K, own), (_V, own)))
    length, batch, _, width = node.shape(query)
    recurrence = _Recurrence((batch, own, node.shape(value)[-1], width))
    recurrence.update(node, key, value)
    for part in _query_parts(node, query, heads // own):
        recurrence.read(part)
    program, operands = recurrence.program, recurrence.operands
    final, outputs = call_scan(node, program, _start(node, program.state), operands, length)
    return _packed(node, outputs), _present(node, final)


class _Recurrence:
    """The program of the scan and the expressions behind its operands."""

    def __init__(self, state: tuple[int, ...]) -> None:
        self.program = ScanProgram(state)
        self.operands: list[Any] = []

    def update(self, node: OnnxNode, key: Any, value: Any) -> None:
        """Set the new state: what is kept of the old one, plus keys times values."""
        rule = str(node.attr("update_rule", "gated_delta"))
        if rule not in _RULES:
            raise node.refuse(f"attribute update_rule = {rule!r}")
        own = self.program.state[1]
        k, v, kept = self._operand(key, _KEYS), self._operand(value, _VALUES), Term("old")
        if "gated" in rule:
            kept = Term("Mul", (self._operand(*_decay(node, own)), kept))
        if "delta" in rule:
            self.program.early.append(Term("Mul", (kept, k)))
            missing = Term("Sub", (v, Term("early", place=0)))
            v = Term("Mul", (self._operand(*_beta(node, own)), missing))
        self.program.update = Term("Add", (kept, Term("Mul", (k, v))))

    def read(self, query: Any) -> None:
        """Add an output: the new state times queries, summed over keys."""
        place = len(self.program.outputs)
        self.program.late.append(Term("Mul", (Term("new"), self._operand(query, _KEYS))))
        self.program.outputs.append((Term("late", place=place), self.program.state[:-1], False))

    def _operand(self, expr: Any, axes: tuple[bool, ...]) -> Term:
        place = len(self.operands)
        self.operands.append(expr)
        self.program.operands.append(Operand(place, axes))
        return Term("operand", place=place)


def _unpacked(node: OnnxNode, position: int, heads: int) -> Any:
    """Return an input [B, T, N * d] as float32 [T, B, N, d]."""
    data = node.input(position)
    batch, length, width = node.shape(data)
    if heads < 1 or width % heads:
        raise node.refuse(f"{heads} heads do not divide the width {width}")
    split = node.emit(relax.op.reshape(data, (batch, length, heads, width // heads)))
    return node.emit(cast(node.emit(relax.op.permute_dims(split, [1, 0, 2, 3])), "float32"))


def _decay(node: OnnxNode, own: int) -> tuple[Any, tuple[bool, ...]]:
    """Return the factors on the state and the axes they run along."""
    rows = node.emit(relax.op.exp(_unpacked(node, _DECAY, own)))
    return rows, _HEADS if node.shape(rows)[-1] == 1 else _KEYS


def _beta(node: OnnxNode, own: int) -> tuple[Any, tuple[bool, ...]]:
    count = node.shape(node.input(_BETA))[-1]
    return _unpacked(node, _BETA, count), _HEADS if count == own else _BATCH


def _query_parts(node: OnnxNode, query: Any, group: int) -> list[Any]:
    """Return the scaled queries [T, B, Nkv, d] of each place in a group of heads."""
    length, batch, heads, width = node.shape(query)
    if group < 1 or heads % group:
        raise node.refuse(f"{heads} query heads are no multiple of the key heads")
    scale = float(node.attr("scale", 0.0)) or 1.0 / sqrt(width)
    query = node.emit(relax.op.multiply(query, scalar(scale, query)))
    if group == 1:
        return [query]
    grouped = relax.op.reshape(query, (length, batch, heads // group, group, width))
    parts = pieces(node, node.emit(grouped), group, axis=3)
    flat = (length, batch, heads // group, width)
    return [node.emit(relax.op.reshape(part, flat)) for part in parts]


def _start(node: OnnxNode, state: tuple[int, ...]) -> Any:
    if not node.has(_PAST):
        return relax.const(np.zeros(state, np.float32))
    turned = node.emit(relax.op.permute_dims(node.input(_PAST), [0, 1, 3, 2]))
    return node.emit(cast(turned, "float32"))


def _packed(node: OnnxNode, outputs: list[Any]) -> Any:
    """Return the heads of every group, [T, B, Nkv, d] each, as [B, T, N * d]."""
    length, batch, own, width = node.shape(outputs[0])
    parts = [node.emit(relax.op.expand_dims(value, 3)) for value in outputs]
    joined = parts[0] if len(parts) == 1 else node.emit(relax.op.concat(parts, axis=3))
    rows = node.emit(relax.op.permute_dims(joined, [1, 0, 2, 3, 4]))
    flat = node.emit(relax.op.reshape(rows, (batch, length, own * len(parts) * width)))
    return node.emit(cast(flat, dtype_of(node.input(_Q))))


def _present(node: OnnxNode, final: Any) -> Any:
    like = node.input(_PAST) if node.has(_PAST) else node.input(_Q)
    return node.emit(cast(node.emit(relax.op.permute_dims(final, [0, 1, 3, 2])), dtype_of(like)))


CONVERTERS: dict[tuple[str, str], Converter] = {("", "LinearAttention"): linear_attention}
