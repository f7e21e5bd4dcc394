"""The selective scan kernel: channels in parallel and in vectors, time serial."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from math import prod
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from icd_tvm._tvm import relax, te, tirx
from icd_tvm.tir_schedules.cpu import vector_math
from icd_tvm.tir_schedules.cpu.emit import f32, local
from icd_tvm.tir_schedules.cpu.row_reduce import OPAQUE
from icd_tvm.tir_schedules.cpu.scan_program import Operand, ScanProgram, Term
from icd_tvm.tir_schedules.cpu.scan_terms import POWER, SCALED, is_held, spare_states, terms

# Attribute of the PrimFunc: what it was made from, as JSON.
SCAN_PROGRAM = "icd.scan_program"
_MAX_LANES = 16
MAX_UNROLLED = 32
_STATE = -1

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": lambda a, b: a / b,
    "Max": lambda *args: reduce(tirx.max, args),
    "Min": lambda *args: reduce(tirx.min, args),
    "Neg": lambda a: -a,
    "Exp": vector_math.exp,
    POWER: vector_math.exp2,
    "Log": vector_math.log,
    "Sqrt": te.sqrt,
    "Abs": te.abs,
    "Tanh": vector_math.tanh,
    "Sigmoid": vector_math.sigmoid,
    "Softplus": vector_math.softplus,
    "Relu": lambda a: tirx.max(a, f32(0.0)),
}


def selective_scan(
    program: ScanProgram, length: int, backwards: tuple[bool, ...], flipped: tuple[bool, ...]
) -> Any:
    """Return the TIR function of a recurrence over ``length`` steps.

    A task owns up to 16 neighbouring channels, one a vector lane, with all their states in
    registers; no sum crosses lanes. Each argument has one axis for time and one for every
    axis of the state ``[..., channels, states]``, of size 1 where it does not run along it.

    Parameters
    ----------
    program : ScanProgram
        The state has at least two axes.
    length : int
        Number of steps.
    backwards : tuple of bool
        For every operand, whether step 0 reads its last time.
    flipped : tuple of bool
        For every output, whether step 0 writes its last time.

    Returns
    -------
    PrimFunc
        ``(start: f32[1, *state], operands ..., outputs: f32[length, ...] ...,
        final: f32[1, *state])``, scheduled.
    """
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_name("selective_scan")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": OPAQUE})
        scan = ScanEmitter(program, length, backwards, flipped)
        scan.declare()
        with T.parallel(scan.tasks) as task, T.sblock("scan"):
            scan.emit(task)
    content = [program.to_json(), length, list(backwards), list(flipped)]
    return builder.get().with_attr(SCAN_PROGRAM, json.dumps(content))


def resized_scan(func: Any, state: tuple[int, ...]) -> tuple[Any, list[Any]]:
    """Return the kernel of the same recurrence for a state of another shape.

    Parameters
    ----------
    func : PrimFunc
        Made by `selective_scan`.
    state : tuple of int

    Returns
    -------
    (PrimFunc, list of relax.TensorType)
        And the types of its results, the final state last.
    """
    content, length, backwards, flipped = json.loads(str(func.attrs[SCAN_PROGRAM]))
    program = replace(ScanProgram.from_json(content), state=state)
    shapes = [output_shape(program, i, length) for i in range(len(program.outputs))]
    types = [relax.TensorType(shape, "float32") for shape in (*shapes, (1, *state))]
    return selective_scan(program, length, tuple(backwards), tuple(flipped)), types


def operand_shape(program: ScanProgram, operand: Operand, length: int) -> tuple[int, ...]:
    """Return the shape of an operand as an argument of the kernel."""
    time = length if isinstance(operand.source, int) else 1
    sizes = zip(program.state, operand.axes, strict=True)
    return (time, *(size if along else 1 for size, along in sizes))


def output_shape(program: ScanProgram, output: int, length: int) -> tuple[int, ...]:
    """Return the shape of a scan output as an argument of the kernel."""
    inner = program.outputs[output][2]
    return (length, *program.state[:-1], program.state[-1] if inner else 1)


class ScanEmitter:
    """Emits the statements of a kernel; those of `selective_scan` if no method is replaced."""

    def __init__(
        self,
        program: ScanProgram,
        length: int,
        backwards: tuple[bool, ...],
        flipped: tuple[bool, ...],
    ) -> None:
        self.program, self.length = spare_states(program), length
        self.backwards, self.flipped = backwards, flipped
        *self.outer, self.channels, self.states = program.state
        self.lanes = _lanes(self.channels)
        self.tasks = prod(self.outer) * (self.channels // self.lanes)

    def declare(self) -> None:
        """Declare the arguments."""
        program, length = self.program, self.length
        whole = (1, *program.state)
        self.start = argument("start", whole)
        self.operands = [
            argument(f"operand{i}", operand_shape(program, operand, length))
            for i, operand in enumerate(program.operands)
        ]
        self.outputs = [
            argument(f"output{i}", output_shape(program, i, length))
            for i in range(len(program.outputs))
        ]
        self.final = argument("final", whole)

    def emit(self, task: Any) -> None:
        """Emit one task: the whole time of one vector of channels."""
        self.scratch(task)
        self.load(self.start)
        with T.serial(self.length) as t:
            self.step(t)
        with T.serial(self.states) as n, T.vectorized(self.lanes) as x:
            T.buffer_store(self.final, self.state[n, x], self._index(0, n, x))

    def scratch(self, task: Any) -> None:
        """Make the buffers of a task, and fill those that stay as they are."""
        program, states, lanes = self.program, self.states, self.lanes
        self.place = self._task_place(task)
        self.state = local(states, lanes)
        self.new = local(lanes)
        self.early = local(max(1, len(program.early)), lanes)
        self.late = local(max(1, len(program.late)), lanes)
        self.held = {key: local(states, lanes) for key in self._held()}
        for (i, factor), buffer in self.held.items():
            with T.serial(states) as n, T.vectorized(lanes) as x:
                value = self.operands[i][self._operand_index(i, 0, n, x)]
                T.buffer_store(buffer, value if factor == 1.0 else value * f32(factor), [n, x])

    def load(self, start: Any) -> None:
        """Fill the state."""
        with T.serial(self.states) as n, T.vectorized(self.lanes) as x:
            T.buffer_store(self.state, start[self._index(0, n, x)], [n, x])

    def time(self, turned: bool, t: Any) -> Any:
        """Return the time at which step ``t`` reads or writes what is turned or not."""
        return self.length - 1 - t if turned else t

    def store(self, i: int, value: Any, index: list[Any]) -> None:
        """Emit the store of one value of an output."""
        T.buffer_store(self.outputs[i], value, index)

    def _task_place(self, task: Any) -> list[Any]:
        """Return the index of the task's first channel, one number an axis but the last."""
        blocks = self.channels // self.lanes
        place = [task % blocks * self.lanes]
        rest = task // blocks
        for size in reversed(self.outer):
            place.insert(0, rest % size)
            rest = rest // size
        return place

    def _index(self, time: Any, n: Any, x: Any) -> list[Any]:
        return [time, *self.place[:-1], self.place[-1] + x, n]

    def _operand_index(self, i: int, t: Any, n: Any, x: Any) -> list[Any]:
        time = self.time(self.backwards[i], t)
        full = self._index(time, n, x)
        scanned = isinstance(self.program.operands[i].source, int)
        along = (scanned, *self.program.operands[i].axes)
        return [own if use else 0 for own, use in zip(full, along, strict=True)]

    def _held(self) -> list[tuple[int, float]]:
        """Return the operands that are copied into scratch memory, each with its factor."""
        found = [self._key(term) for term in terms(self.program)]
        return sorted({key for key in found if key is not None})

    def _key(self, term: Term) -> tuple[int, float] | None:
        """Return which copy in scratch memory a leaf reads, if any."""
        if term.op == SCALED:
            return term.place, term.number
        held = term.op == "operand" and is_held(self.program.operands[term.place])
        return (term.place, 1.0) if held else None

    def step(self, t: Any) -> None:
        """Emit one step."""
        program, lanes = self.program, self.lanes
        loop = T.unroll if self.states <= MAX_UNROLLED else T.serial
        self._clear(self.early, len(program.early))
        self._clear(self.late, len(program.late))
        if program.early:
            with loop(self.states) as n:
                self._accumulate(self.early, program.early, t, n)
        with loop(self.states) as n:
            with T.vectorized(lanes) as x:
                T.buffer_store(self.new, self.value(program.update, t, n, x), [x])
            self._accumulate(self.late, program.late, t, n)
            self._write(t, n, inner=True)
            with T.vectorized(lanes) as x:
                T.buffer_store(self.state, self.new[x], [n, x])
        self._write(t, 0, inner=False)

    def _clear(self, sums: Any, count: int) -> None:
        for j in range(count):
            with T.vectorized(self.lanes) as x:
                T.buffer_store(sums, f32(0.0), [j, x])

    def _accumulate(self, sums: Any, terms: list[Term], t: Any, n: Any) -> None:
        for j, term in enumerate(terms):
            with T.vectorized(self.lanes) as x:
                T.buffer_store(sums, sums[j, x] + self.value(term, t, n, x), [j, x])

    def _write(self, t: Any, n: Any, *, inner: bool) -> None:
        for i, (term, _, own) in enumerate(self.program.outputs):
            if own != inner:
                continue
            time = self.time(self.flipped[i], t)
            with T.vectorized(self.lanes) as x:
                self.store(i, self.value(term, t, n, x), self._index(time, n, x))

    def value(self, term: Term, t: Any, n: Any, x: Any) -> Any:
        """Return a term of state ``n`` of lane ``x`` in step ``t``."""
        if term.op in _FUNCTIONS:
            return _FUNCTIONS[term.op](*(self.value(arg, t, n, x) for arg in term.args))
        if term.op == "number":
            return f32(term.number)
        if term.op == "old":
            return self.state[n, x]
        if term.op == "new":
            return self.new[x]
        if term.op in ("early", "late"):
            return (self.early if term.op == "early" else self.late)[term.place, x]
        key = self._key(term)
        if key is not None:
            return self.held[key][n, x]
        return self.operands[term.place][self._operand_index(term.place, t, n, x)]


def _lanes(channels: int) -> int:
    lanes = _MAX_LANES
    while channels % lanes:
        lanes //= 2
    return lanes


def argument(name: str, shape: tuple[int, ...]) -> Any:
    """Declare an argument of the kernel that is being built."""
    return T.arg(name, T.Buffer(shape, "float32"))
