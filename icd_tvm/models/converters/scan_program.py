"""Read the body of an ONNX Scan as a recurrence that is elementwise in its state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from icd_tvm._tvm import GenericConst, tirx
from icd_tvm.models.onnx_file import to_array
from icd_tvm.tir_schedules.cpu.scan_program import Operand, ScanProgram, Term

# One entry an axis of a value: which axis of the state it runs along, None where its size is 1.
Index: TypeAlias = tuple["int | None", ...]


class NoRecurrence(Exception):
    """The body is no elementwise recurrence; the text says why."""


@dataclass(frozen=True)
class _Cell:
    """A value of the body: its shape and the scalar at an index."""

    shape: tuple[int, ...]
    at: Callable[[Index], Term]


ELEMENTWISE = frozenset(
    {
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Max",
        "Min",
        "Neg",
        "Exp",
        "Log",
        "Sqrt",
        "Abs",
        "Tanh",
        "Sigmoid",
        "Softplus",
        "Relu",
    }
)
_REGROUPING = frozenset({"Identity", "Unsqueeze", "Squeeze", "Reshape"})


def read_scan_body(
    body: onnx.GraphProto,
    state: tuple[int, ...],
    steps: Sequence[tuple[int, ...]],
    scope: Mapping[str, Any],
) -> ScanProgram:
    """Return the recurrence that a body computes.

    Parameters
    ----------
    body : onnx.GraphProto
        Inputs: one state, then the scanned ones. Outputs: the new state, then the scan outputs.
    state : tuple of int
        Shape of the state, at least two axes.
    steps : sequence of tuple of int
        Shape of one step of every scanned input.
    scope : mapping of str to relax.Expr
        Values of the enclosing graph.

    Raises
    ------
    NoRecurrence
        With the reason.
    """
    if len(body.input) != 1 + len(steps) or len(state) < 2:
        raise NoRecurrence("it has not one state of at least two axes")
    reader = _Reader(body, state, scope)
    reader.enter(body.input[0].name, state, "old")
    for i, shape in enumerate(steps):
        reader.enter_operand(body.input[1 + i].name, shape, i)
    return reader.run()


class _Reader:
    """Evaluates the body once, symbolically, for an arbitrary element of the state."""

    def __init__(
        self, body: onnx.GraphProto, state: tuple[int, ...], scope: Mapping[str, Any]
    ) -> None:
        self.body, self.state, self.scope = body, state, scope
        self.program = ScanProgram(state)
        self.cells: dict[str, _Cell] = {}
        self.arrays = {tensor.name: to_array(tensor) for tensor in body.initializer}
        self.known: dict[int, tuple[int, Index]] = {}

    def enter(self, name: str, shape: tuple[int, ...], leaf: str) -> None:
        """Bind a name to the state before or after the step."""

        def at(index: Index) -> Term:
            if index != self._own_index(shape):
                raise NoRecurrence("the state is read at another element")
            return Term(leaf)

        self.cells[name] = _Cell(shape, at)

    def enter_operand(self, name: str, shape: tuple[int, ...], source: Any) -> None:
        """Bind a name to what a step reads."""
        seen: dict[Index, int] = {}

        def at(index: Index) -> Term:
            if index not in seen:
                seen[index] = len(self.program.operands)
                self.program.operands.append(Operand(source, self._along(index)))
            return Term("operand", place=seen[index])

        self.cells[name] = _Cell(shape, at)

    def _own_index(self, shape: tuple[int, ...]) -> Index:
        return tuple(None if size == 1 else axis for axis, size in enumerate(shape))

    def _along(self, index: Index) -> tuple[bool, ...]:
        axes = [axis for axis in index if axis is not None]
        if axes != sorted(set(axes)):
            raise NoRecurrence("an operand is transposed or read along a diagonal")
        return tuple(axis in axes for axis in range(len(self.state)))

    def run(self) -> ScanProgram:
        """Return the program; the new state and what is computed from it stay apart."""
        final = self._behind_identities(self.body.output[0].name)
        for node in self.body.node:
            self._step(node)
            if final in node.output:
                self._cut(final)
        for value in self.body.output[1:]:
            self.program.outputs.append(self._output(value.name))
        return self.program

    def _behind_identities(self, name: str) -> str:
        makers = {out: node for node in self.body.node for out in node.output}
        while name in makers and makers[name].op_type == "Identity":
            name = makers[name].input[0]
        return name

    def _cut(self, name: str) -> None:
        cell = self.cells[name]
        if cell.shape != self.state:
            raise NoRecurrence(f"the state changes its shape to {cell.shape}")
        self.program.update = cell.at(self._own_index(self.state))
        self.enter(name, self.state, "new")

    def _output(self, name: str) -> tuple[Term, tuple[int, ...], bool]:
        cell = self._cell(name)
        channels = self.state[:-1]
        if cell.shape not in (channels, (*channels, 1), self.state):
            raise NoRecurrence(f"an output has shape {cell.shape}")
        term = cell.at(self._own_index(cell.shape))
        inner = cell.shape == self.state and self.state[-1] > 1
        if term.leaves() & ({"late"} if inner else {"old", "new"}):
            raise NoRecurrence("an output needs single states and sums over them")
        return term, cell.shape, inner

    # -- nodes

    def _step(self, node: onnx.NodeProto) -> None:
        if node.domain not in ("", "ai.onnx"):
            raise NoRecurrence(f"it holds {node.op_type} of domain {node.domain}")
        attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Constant" and "value" in attrs:
            self.arrays[node.output[0]] = to_array(attrs["value"])
            return
        self.cells[node.output[0]] = self._evaluate(node, attrs)

    def _evaluate(self, node: onnx.NodeProto, attrs: Mapping[str, Any]) -> _Cell:
        op = node.op_type
        if op in ELEMENTWISE:
            return _elementwise(op, [self._cell(name) for name in node.input])
        if op in _REGROUPING:
            return self._regrouped(node, attrs)
        if op == "ReduceSum":
            axes = self._integers(node, 1, attrs.get("axes", ()))
            return self._sum(self._cell(node.input[0]), axes, bool(attrs.get("keepdims", 1)))
        if op == "MatMul":
            return self._product(*(self._cell(name) for name in node.input))
        raise NoRecurrence(f"it holds {op}")

    def _cell(self, name: str) -> _Cell:
        if name not in self.cells:
            self._enter_outer(name)
        return self.cells[name]

    def _enter_outer(self, name: str) -> None:
        """Bind a constant of the body or a value of the enclosing graph."""
        array = self._array(name)
        if array is not None and array.size == 1 and array.dtype == np.float32:
            term = Term("number", number=float(array.reshape(())))
            self.cells[name] = _Cell(array.shape, lambda index: term)
        elif name in self.arrays:
            self.enter_operand(name, self.arrays[name].shape, self.arrays[name])
        elif name in self.scope:
            self.enter_operand(name, _shape(self.scope[name]), self.scope[name])
        else:
            raise NoRecurrence(f"{name!r} is not known")

    def _array(self, name: str) -> NDArray[Any] | None:
        if name in self.arrays:
            return self.arrays[name]
        value = self.scope.get(name)
        return np.asarray(value.value.numpy()) if isinstance(value, GenericConst) else None

    def _integers(self, node: onnx.NodeProto, position: int, default: Sequence[int]) -> list[int]:
        if len(node.input) <= position or not node.input[position]:
            return [int(value) for value in default]
        array = self._array(node.input[position])
        if array is None:
            raise NoRecurrence(f"{node.op_type} has computed axes")
        return [int(value) for value in array.ravel()]

    def _regrouped(self, node: onnx.NodeProto, attrs: Mapping[str, Any]) -> _Cell:
        cell = self._cell(node.input[0])
        old, numbers = cell.shape, self._integers(node, 1, attrs.get("axes", ()))
        if node.op_type == "Identity":
            return cell
        if node.op_type == "Squeeze":
            drop = {axis % len(old) for axis in numbers} or {i for i, s in enumerate(old) if s == 1}
            return _regroup(cell, tuple(s for i, s in enumerate(old) if i not in drop))
        if node.op_type == "Unsqueeze":
            new = list(old)
            for axis in sorted(axis % (len(old) + len(numbers)) for axis in numbers):
                new.insert(axis, 1)
            return _regroup(cell, tuple(new))
        sizes = [old[i] if size == 0 else size for i, size in enumerate(numbers)]
        known = prod(size for size in sizes if size != -1)
        return _regroup(cell, tuple(prod(old) // known if s == -1 else s for s in sizes))

    def _sum(self, cell: _Cell, axes: Sequence[int], keepdims: bool) -> _Cell:
        rank = len(cell.shape)
        if [axis % rank for axis in axes] != [rank - 1] or cell.shape[-1] != self.state[-1]:
            raise NoRecurrence("a sum does not run over the last axis of the state alone")
        last: int | None = len(self.state) - 1 if self.state[-1] > 1 else None

        def at(index: Index) -> Term:
            outer = index[:-1] if keepdims else index
            return self._summed(cell.at((*outer, last)))

        return _Cell(cell.shape[:-1] + (1,) * keepdims, at)

    def _summed(self, term: Term) -> Term:
        leaves = term.leaves()
        if "late" in leaves or ("early" in leaves and "new" not in leaves):
            raise NoRecurrence("it holds a sum of sums")
        kind = "late" if "new" in leaves else "early"
        sums = self.program.late if kind == "late" else self.program.early
        if term not in sums:
            sums.append(term)
        return Term(kind, place=sums.index(term))

    def _product(self, left: _Cell, right: _Cell) -> _Cell:
        """A product with one column is a sum over the last axis of the state."""
        if len(right.shape) == 1:
            row, keepdims = right, False
        elif right.shape[-1] == 1:
            row, keepdims = _regroup(right, (*right.shape[:-2], 1, right.shape[-2])), True
        else:
            raise NoRecurrence("it holds a product with more than one column")
        both = _elementwise("Mul", [left, row])
        return self._sum(both, [len(both.shape) - 1], keepdims)


def _shape(expr: Any) -> tuple[int, ...]:
    dims = getattr(getattr(expr.ty, "shape", None), "values", None)
    if dims is None or not all(isinstance(dim, tirx.IntImm) for dim in dims):
        raise NoRecurrence("an outer value has no static shape")
    return tuple(int(dim) for dim in dims)


def _elementwise(op: str, cells: Sequence[_Cell]) -> _Cell:
    try:
        shape = np.broadcast_shapes(*(cell.shape for cell in cells))
    except ValueError as error:
        raise NoRecurrence(f"the operands of {op} do not broadcast") from error

    def at(index: Index) -> Term:
        return Term(op, tuple(cell.at(_own_part(cell.shape, index)) for cell in cells))

    return _Cell(shape, at)


def _own_part(shape: tuple[int, ...], index: Index) -> Index:
    """Return the part of a broadcast index that an operand sees."""
    part = index[len(index) - len(shape) :]
    return tuple(None if size == 1 else axis for size, axis in zip(shape, part, strict=True))


def _regroup(cell: _Cell, shape: tuple[int, ...]) -> _Cell:
    """Add and remove axes of size 1."""
    if [size for size in cell.shape if size != 1] != [size for size in shape if size != 1]:
        raise NoRecurrence(f"a reshape of {cell.shape} to {shape}")

    def at(index: Index) -> Term:
        axes = iter([axis for size, axis in zip(shape, index, strict=True) if size != 1])
        return cell.at(tuple(None if size == 1 else next(axes) for size in cell.shape))

    return _Cell(shape, at)
