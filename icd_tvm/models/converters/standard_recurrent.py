"""RNN, GRU and LSTM with a static, short sequence, one set of bindings a time step.

Equations, gate order and layouts follow the ONNX operators of these names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from icd_tvm._tvm import relax
from icd_tvm.models.converters.node import Converter, OnnxNode, cast, dtype_of, scalar, with_name
from icd_tvm.models.converters.products import matmul

# Every step is its own chain of kernels; a longer sequence needs a loop in the module.
MAX_STEPS = 64
_X, _W, _R, _B, _LENGTHS, _H, _C, _P = range(8)

Activation: TypeAlias = Callable[[Any], Any]
_ACTIVATIONS: dict[str, Activation] = {
    "sigmoid": relax.op.sigmoid,
    "tanh": relax.op.tanh,
    "relu": relax.op.nn.relu,
    "softsign": lambda x: relax.op.divide(x, relax.op.add(relax.op.abs(x), scalar(1.0, x))),
}


@dataclass(frozen=True)
class _Direction:
    """Weights and settings of one direction.

    Attributes
    ----------
    inputs : expr, shape (steps, batch, gates * hidden)
        ``X @ W.T + Wb`` for all steps at once.
    recurrent : expr, shape (hidden, gates * hidden)
    bias : expr or None, shape (gates * hidden,)
        Recurrent bias.
    peepholes : tuple of expr
        LSTM's ``Pi, Po, Pf``, or nothing.
    """

    node: OnnxNode
    hidden: int
    inputs: Any
    recurrent: Any
    bias: Any
    functions: tuple[Activation, ...]
    peepholes: tuple[Any, ...]

    def gate(self, value: Any, position: int) -> Any:
        """Return one gate of ``(batch, gates * hidden)``."""
        low = position * self.hidden
        return self.node.emit(relax.op.strided_slice(value, [1], [low], [low + self.hidden]))

    def apply(self, function: int, value: Any) -> Any:
        """Clip and activate."""
        limit = float(self.node.attr("clip", 0.0))
        if limit:
            value = self.node.emit(relax.op.clip(value, -limit, limit))
        return self.node.emit(self.functions[function](value))

    def recur(self, state: Any) -> Any:
        """Return ``H @ R.T + Rb``."""
        product = matmul(self.node, state, self.recurrent)
        return self.add(product, self.bias) if self.bias is not None else product

    def add(self, left: Any, right: Any) -> Any:
        return self.node.emit(relax.op.add(left, right))

    def multiply(self, left: Any, right: Any) -> Any:
        return self.node.emit(relax.op.multiply(left, right))


# (direction, gates of this step from the input, states) -> new states, the first being H
Cell: TypeAlias = Callable[[_Direction, Any, tuple[Any, ...]], tuple[Any, ...]]


def _rnn_cell(d: _Direction, gates: Any, states: tuple[Any, ...]) -> tuple[Any, ...]:
    return (d.apply(0, d.add(gates, d.recur(states[0]))),)


def _gru_cell(d: _Direction, gates: Any, states: tuple[Any, ...]) -> tuple[Any, ...]:
    (state,) = states
    recurrent = d.recur(state)
    update = d.apply(0, d.add(d.gate(gates, 0), d.gate(recurrent, 0)))
    reset = d.apply(0, d.add(d.gate(gates, 1), d.gate(recurrent, 1)))
    if d.node.attr("linear_before_reset", 0):
        inner = d.multiply(reset, d.gate(recurrent, 2))
    else:
        inner = d.gate(d.recur(d.multiply(reset, state)), 2)
    candidate = d.apply(1, d.add(d.gate(gates, 2), inner))
    change = d.node.emit(relax.op.subtract(state, candidate))
    return (d.add(candidate, d.multiply(update, change)),)


def _lstm_cell(d: _Direction, gates: Any, states: tuple[Any, ...]) -> tuple[Any, ...]:
    state, memory = states
    total = d.add(gates, d.recur(state))
    into, out, forget, fresh = (d.gate(total, i) for i in range(4))
    if d.peepholes:
        into = d.add(into, d.multiply(d.peepholes[0], memory))
        forget = d.add(forget, d.multiply(d.peepholes[2], memory))
    kept = d.multiply(d.apply(0, forget), memory)
    memory = d.add(kept, d.multiply(d.apply(0, into), d.apply(1, fresh)))
    if d.peepholes:
        out = d.add(out, d.multiply(d.peepholes[1], memory))
    shown = d.node.emit(d.functions[2](memory))
    return d.multiply(d.apply(0, out), shown), memory


def recurrent(cell: Cell, gates: int, defaults: tuple[str, ...], states: int) -> Converter:
    """Return the converter of a recurrent operator.

    Parameters
    ----------
    cell : callable
    gates : int
        Gates a cell has; the rows of W are ``gates * hidden``.
    defaults : tuple of str
        Names of the default activations of one direction.
    states : int
        Number of states: 1, or 2 with a memory cell.
    """

    def convert(node: OnnxNode) -> Any:
        node.allow({"input_forget": (0,), "layout": (0, 1)})
        batch_first = bool(node.attr("layout", 0))
        data = node.input(_X)
        if batch_first:
            data = node.emit(relax.op.permute_dims(data, [1, 0, 2]))
        steps, batch, _ = node.shape(data)
        if steps > MAX_STEPS:
            raise node.refuse(f"a sequence of {steps} steps (at most {MAX_STEPS})")
        masks = _masks(node, steps, batch)
        outputs, finals = [], []
        for index, backward in enumerate(_directions(node)):
            direction = _direction(node, data, index, gates, defaults)
            start = _start(node, index, batch, direction.hidden, states)
            shown, final = _run(direction, cell, start, steps, backward, masks)
            outputs.append(shown)
            finals.append(final)
        return _gathered(node, outputs, finals, batch_first)

    return convert


def _directions(node: OnnxNode) -> tuple[bool, ...]:
    """Tell for each direction whether it runs backward."""
    names = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}
    name = str(node.attr("direction", "forward"))
    if name not in names:
        raise node.refuse(f"attribute direction = {name!r} is not supported")
    return names[name]


def _direction(
    node: OnnxNode, data: Any, index: int, gates: int, defaults: tuple[str, ...]
) -> _Direction:
    weights = _row(node, _W, index, transpose=True)
    hidden = node.shape(node.input(_R))[2]
    inputs = matmul(node, data, weights)
    bias = None
    if node.has(_B):
        both = _row(node, _B, index)
        size = gates * hidden
        first = node.emit(relax.op.strided_slice(both, [0], [0], [size]))
        bias = node.emit(relax.op.strided_slice(both, [0], [size], [2 * size]))
        inputs = node.emit(relax.op.add(inputs, first))
    peepholes: tuple[Any, ...] = ()
    if node.has(_P):
        row = _row(node, _P, index)
        peepholes = tuple(
            node.emit(relax.op.strided_slice(row, [0], [i * hidden], [(i + 1) * hidden]))
            for i in range(3)
        )
    functions = _functions(node, index, defaults)
    recurrent_weights = _row(node, _R, index, transpose=True)
    return _Direction(node, hidden, inputs, recurrent_weights, bias, functions, peepholes)


def _functions(node: OnnxNode, index: int, defaults: tuple[str, ...]) -> tuple[Activation, ...]:
    count = len(defaults)
    given = [str(name) for name in node.attr("activations", [])]
    names = given[index * count : (index + 1) * count] or list(defaults)
    unknown = [name for name in names if name.lower() not in _ACTIVATIONS]
    if unknown:
        raise node.refuse(f"activation {unknown[0]!r} is not supported")
    return tuple(_ACTIVATIONS[name.lower()] for name in names)


def _row(node: OnnxNode, position: int, index: int, transpose: bool = False) -> Any:
    """Return one direction of a weight, transposed at compile time if it is a constant."""
    array = node.array(position)
    if array is not None:
        row = array[index].T if transpose else array[index]
        suffix = f"[{index}]" if array.shape[0] > 1 else ""
        return with_name(row, node.label(position) + suffix)
    row = node.emit(relax.op.take(node.input(position), relax.const(index, "int64"), 0))
    return node.emit(relax.op.permute_dims(row)) if transpose else row


def _start(node: OnnxNode, index: int, batch: int, hidden: int, states: int) -> tuple[Any, ...]:
    """Return the states before the first step, each of shape (batch, hidden)."""
    axis = 1 if node.attr("layout", 0) else 0
    found = []
    for position in (_H, _C)[:states]:
        if node.has(position):
            value = relax.op.take(node.input(position), relax.const(index, "int64"), axis)
            found.append(node.emit(value))
        else:
            zeros = np.zeros((batch, hidden), np.float32)
            found.append(cast(with_name(zeros, ""), dtype_of(node.input(_X))))
    return tuple(found)


def _masks(node: OnnxNode, steps: int, batch: int) -> list[Any]:
    """Return for each step which rows of the batch still run, or None if all do."""
    lengths = node.array(_LENGTHS)
    if not node.has(_LENGTHS) or (lengths is not None and (lengths >= steps).all()):
        return [None] * steps
    column = node.emit(relax.op.reshape(node.input(_LENGTHS), [batch, 1]))
    return [
        node.emit(relax.op.greater(column, relax.const(step, dtype_of(column))))
        for step in range(steps)
    ]


def _run(
    direction: _Direction,
    cell: Cell,
    states: tuple[Any, ...],
    steps: int,
    backward: bool,
    masks: list[Any],
) -> tuple[list[Any], tuple[Any, ...]]:
    """Run the cell over the sequence; return H of each step and the final states."""
    node = direction.node
    shown: list[Any] = [None] * steps
    for step in reversed(range(steps)) if backward else range(steps):
        at = relax.const(step, "int64")
        gates = node.emit(relax.op.take(direction.inputs, at, 0))
        new = cell(direction, gates, states)
        shown[step] = new[0]
        if masks[step] is not None:
            zero = scalar(0.0, new[0])
            shown[step] = node.emit(relax.op.where(masks[step], new[0], zero))
            pairs = zip(new, states, strict=True)
            new = tuple(node.emit(relax.op.where(masks[step], a, b)) for a, b in pairs)
        states = new
    return shown, states


def _gathered(
    node: OnnxNode, outputs: list[list[Any]], finals: list[tuple[Any, ...]], batch_first: bool
) -> tuple[Any, ...]:
    """Return Y and the final states in the layout asked for."""
    whole = None
    if node.wants(0):
        sides = [node.emit(relax.op.stack(shown, 0)) for shown in outputs]
        whole = node.emit(relax.op.stack(sides, 1))
        if batch_first:
            whole = node.emit(relax.op.permute_dims(whole, [2, 0, 1, 3]))
    axis = 1 if batch_first else 0
    last = [node.emit(relax.op.stack(list(values), axis)) for values in zip(*finals, strict=True)]
    return tuple([last[0] if whole is None else whole, *last][: len(node.outputs)])


CONVERTERS: dict[tuple[str, str], Converter] = {
    ("", "RNN"): recurrent(_rnn_cell, 1, ("Tanh",), 1),
    ("", "GRU"): recurrent(_gru_cell, 3, ("Sigmoid", "Tanh"), 1),
    ("", "LSTM"): recurrent(_lstm_cell, 4, ("Sigmoid", "Tanh", "Tanh"), 2),
}
