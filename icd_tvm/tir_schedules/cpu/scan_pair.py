"""A recurrence over time plus the same one back: what costs most is computed once for both."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from icd_tvm.tir_schedules.cpu.row_reduce import OPAQUE
from icd_tvm.tir_schedules.cpu.scan_program import ScanProgram, Term
from icd_tvm.tir_schedules.cpu.scan_terms import POWER, by_state, terms
from icd_tvm.tir_schedules.cpu.selective_scan import (
    MAX_UNROLLED,
    ScanEmitter,
    argument,
    operand_shape,
    output_shape,
)

_COSTLY = (POWER, "Exp", "Log", "Tanh", "Sigmoid", "Softplus")
_OF_STATE = {"old", "new", "early", "late"}


def scan_pair(program: ScanProgram, length: int, backwards: tuple[bool, ...]) -> Any:
    """Return the TIR function of the output of a recurrence, in both directions, added.

    Decays do not depend on the state. The first direction leaves them in memory, which stays in
    the second level of cache where `kept_bytes` are few, and the other direction reads them.

    Parameters
    ----------
    program : ScanProgram
        It has one output, without a value for every state.
    length : int
        Number of steps.
    backwards : tuple of bool
        For every operand, whether step 0 of the direction that writes the first time first
        reads its last time; the other direction reads and writes everything in the other order.

    Returns
    -------
    PrimFunc
        ``(start: f32[1, *state], start of the other direction, operands ..., output:
        f32[length, *state[:-1], 1])``, scheduled.
    """
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_name("scan_pair")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": OPAQUE})
        pair = _Pair(program, length, backwards, (False,))
        pair.declare()
        with T.parallel(pair.tasks) as task, T.sblock("scan"):
            pair.emit(task)
    return builder.get()


def kept_bytes(program: ScanProgram, length: int) -> int:
    """Return the bytes that a task of `scan_pair` keeps from one direction for the other."""
    pair = _Pair(program, length, (False,) * len(program.operands), (False,))
    return len(pair.costly()) * length * pair.states * pair.lanes * 4


class _Pair(ScanEmitter):
    """Emits both directions, one after the other."""

    second = False

    def declare(self) -> None:
        program, length = self.program, self.length
        self.starts = [argument(name, (1, *program.state)) for name in ("start", "back")]
        self.operands = [
            argument(f"operand{i}", operand_shape(program, operand, length))
            for i, operand in enumerate(program.operands)
        ]
        self.outputs = [argument("output", output_shape(program, 0, length))]

    def costly(self) -> list[Term]:
        """Return what is computed alike in both directions, for every state."""
        found = dict.fromkeys(term for term in terms(self.program) if term.op in _COSTLY)
        alike = [term for term in found if not term.leaves() & _OF_STATE]
        return [term for term in alike if by_state(term, self.program)]

    def emit(self, task: Any) -> None:
        self.scratch(task)
        size = (self.length, self.states, self.lanes)
        self.kept = {term: T.sblock_alloc_buffer(size, "float32") for term in self.costly()}
        for self.second in (False, True):
            self.load(self.starts[self.second])
            with T.serial(self.length) as t:
                self.step(t)

    def step(self, t: Any) -> None:
        loop = T.unroll if self.states <= MAX_UNROLLED else T.serial
        if not self.second:
            for term, buffer in self.kept.items():
                with loop(self.states) as n, T.vectorized(self.lanes) as x:
                    T.buffer_store(buffer, super().value(term, t, n, x), [t, n, x])
        super().step(t)

    def value(self, term: Term, t: Any, n: Any, x: Any) -> Any:
        if term in self.kept:
            return self.kept[term][self.time(False, t), n, x]
        return super().value(term, t, n, x)

    def time(self, turned: bool, t: Any) -> Any:
        return super().time(turned != self.second, t)

    def store(self, i: int, value: Any, index: list[Any]) -> None:
        super().store(i, self.outputs[i][tuple(index)] + value if self.second else value, index)
