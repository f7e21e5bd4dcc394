"""A recurrence that is elementwise in its state, as the selective scan kernel runs it.

The selective scan of state space models (Gu and Dao, Mamba, 2023) is one: ``h = a * h + b`` for
every channel and state, and ``y = sum over states of h * c``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Term:
    """A scalar expression of one step.

    ``op`` is an ONNX operator on ``args``, or one of ``old`` and ``new`` (the state before and
    after the step), ``operand``, ``early`` and ``late`` (the sum number ``place`` of that kind)
    and ``number``.
    """

    op: str
    args: tuple[Term, ...] = ()
    place: int = 0
    number: float = 0.0

    def leaves(self) -> set[str]:
        """Return the kinds of leaves in the expression."""
        if not self.args:
            return {self.op}
        return set().union(*(arg.leaves() for arg in self.args))


@dataclass(frozen=True)
class Operand:
    """A value that a step reads: a scanned input or one from outside.

    Attributes
    ----------
    source : int or relax.Expr
        Number of the scanned input, or the expression itself.
    axes : tuple of bool
        For every axis of the state, whether the operand runs along it.
    """

    source: Any
    axes: tuple[bool, ...]


@dataclass
class ScanProgram:
    """What one step computes for one element of the state.

    Attributes
    ----------
    state : tuple of int
        Shape of the state; sums run over its last axis.
    operands : list of Operand
    update : Term
        The new state.
    early, late : list of Term
        Summed over the last axis of the state: what the update may read, and what needs the
        new state.
    outputs : list of (Term, tuple of int, bool)
        Value of each scan output, its shape a step, and whether it has one for every state.
    """

    state: tuple[int, ...]
    operands: list[Operand] = field(default_factory=list)
    update: Term = field(default_factory=lambda: Term("old"))
    early: list[Term] = field(default_factory=list)
    late: list[Term] = field(default_factory=list)
    outputs: list[tuple[Term, tuple[int, ...], bool]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the program as plain JSON values; of an operand only whether it is scanned."""
        return {
            "state": list(self.state),
            "operands": [[isinstance(o.source, int), list(o.axes)] for o in self.operands],
            "update": _to_json(self.update),
            "early": [_to_json(term) for term in self.early],
            "late": [_to_json(term) for term in self.late],
            "outputs": [[_to_json(t), list(shape), own] for t, shape, own in self.outputs],
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> ScanProgram:
        """Return the program that `to_json` described."""
        operands = [
            Operand(i if scanned else None, tuple(axes))
            for i, (scanned, axes) in enumerate(content["operands"])
        ]
        return cls(
            tuple(content["state"]),
            operands,
            _from_json(content["update"]),
            [_from_json(term) for term in content["early"]],
            [_from_json(term) for term in content["late"]],
            [(_from_json(t), tuple(shape), own) for t, shape, own in content["outputs"]],
        )


def _to_json(term: Term) -> list[Any]:
    return [term.op, [_to_json(arg) for arg in term.args], term.place, term.number]


def _from_json(content: list[Any]) -> Term:
    op, args, place, number = content
    return Term(op, tuple(_from_json(arg) for arg in args), place, number)
