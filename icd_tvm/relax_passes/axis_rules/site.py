"""What a rule sees of one Relax binding, and the registry of rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from icd_tvm._tvm import GenericConst, relax, tirx
from icd_tvm.relax_passes.axis_rules.dims import Dim, DimTable, Mismatch


@dataclass(frozen=True)
class Tensor:
    """A tensor operand or result: one `Dim` per axis; ``const`` if it is a constant."""

    axes: tuple[Dim, ...]
    const: GenericConst | None = None

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.axes)


Value: TypeAlias = "Tensor | tuple[Value, ...] | None"


class Unsupported(Exception):
    """Raised by a rule that cannot treat its op: everything the op touches is pinned."""


@dataclass
class Site:
    """One call of an op.

    Attributes
    ----------
    dims : DimTable
        Ties and pins on behalf of this call.
    call : relax.Call
    args : list of Value
        One per argument; None for shapes, scalars and other non-tensors.
    out : Value
    indexed : dict of int to Dim
        Argument position of a constant index tensor -> the axis its values point into.
    with_zero : bool
        Everything that reads the result takes its maximum, or its minimum, with zero.
    """

    dims: DimTable
    call: Any
    args: list[Value]
    out: Value
    indexed: dict[int, Dim] = field(default_factory=dict)
    with_zero: bool = False

    def tensor(self, position: int) -> Tensor:
        """Return a tensor argument of known rank."""
        value = self.args[position] if position < len(self.args) else None
        if not isinstance(value, Tensor):
            raise Unsupported(f"argument {position} is no tensor of known rank")
        return value

    def tensors(self, start: int = 0) -> list[Tensor]:
        """Return every tensor argument from a position on."""
        return [value for value in self.args[start:] if isinstance(value, Tensor)]

    def fields(self, position: int = 0) -> list[Tensor]:
        """Return the tensors of a tuple argument."""
        value = self.args[position]
        if not isinstance(value, tuple):
            raise Unsupported(f"argument {position} is no tuple")
        if not all(isinstance(item, Tensor) for item in value):
            raise Unsupported(f"argument {position} holds more than tensors of known rank")
        return [item for item in value if isinstance(item, Tensor)]

    def result(self) -> Tensor:
        """Return the single result."""
        if not isinstance(self.out, Tensor):
            raise Unsupported("the result is no tensor of known rank")
        return self.out

    def results(self) -> list[Tensor]:
        """Return the results of an op that returns a tuple."""
        if not isinstance(self.out, tuple):
            raise Unsupported("the result is no tuple")
        return [item for item in self.out if isinstance(item, Tensor)]

    def axis(self, rank: int, name: str = "axis") -> int:
        """Return an axis attribute as a non-negative number."""
        value = getattr(self.call.attrs, name)
        if value is None:
            raise Unsupported(f"attribute {name} is not set")
        return int(value) % rank

    def axes(self, rank: int, name: str = "axes") -> list[int]:
        """Return a list-of-axes attribute as non-negative numbers; all axes if it is not set."""
        value = getattr(self.call.attrs, name)
        return list(range(rank)) if value is None else [int(axis) % rank for axis in value]

    def tie(self, left: Dim, right: Dim) -> None:
        """Tie two axes."""
        self.dims.tie(left, right)

    def tie_axes(self, left: Sequence[Dim], right: Sequence[Dim]) -> None:
        """Tie two rows of axes one to one."""
        if len(left) != len(right):
            raise Unsupported(f"{len(left)} axes meet {len(right)}")
        for a, b in zip(left, right, strict=True):
            self.dims.tie(a, b)

    def tie_except(self, source: Tensor, result: Tensor, axes: Iterable[int]) -> None:
        """Tie all axes of two tensors of equal rank except some."""
        if source.rank != result.rank:
            raise Unsupported(f"rank {source.rank} meets rank {result.rank}")
        for i in set(range(source.rank)) - set(axes):
            self.dims.tie(source.axes[i], result.axes[i])

    def broadcast(self, source: Tensor, axes: Sequence[Dim]) -> None:
        """Tie the axes of an operand to the last axes of a result; size 1 ties nothing."""
        if source.rank > len(axes):
            raise Unsupported(f"rank {source.rank} does not broadcast to rank {len(axes)}")
        for own, target in zip(source.axes, axes[len(axes) - source.rank :], strict=True):
            self.dims.tie(own, target)

    def pin(self, reason: str, *axes: Dim) -> None:
        """Pin axes."""
        for axis in axes:
            self.dims.pin(axis, reason)

    def pin_all(self, reason: str) -> None:
        """Pin every axis of every operand and result."""
        for value in (*self.args, self.out):
            for axis in value_axes(value):
                self.dims.pin(axis, reason)

    def count(self, reason: str, *axes: Dim) -> None:
        """Note that the op's result depends on the number of indices of some axes."""
        for axis in axes:
            self.dims.count(axis, reason)

    def match(self, left: Sequence[Dim], right: Sequence[Dim], what: str) -> None:
        """Tie two row-major sequences of axes, or pin them all."""
        try:
            self.dims.match_products(left, right)
        except Mismatch as mismatch:
            self.pin(f"{what}: {mismatch}", *left, *right)

    def role(self, name: str, *axes: Dim) -> None:
        """Describe what axes are, for people."""
        for axis in axes:
            self.dims.role(axis, name)


Rule = Callable[[Site], None]
RULES: dict[str, Rule] = {}


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Register a rule for Relax ops; names are given without the ``relax.`` prefix."""

    def register(function: Rule) -> Rule:
        for op in ops:
            RULES[f"relax.{op}"] = function
        return function

    return register


def value_axes(value: Value) -> list[Dim]:
    """Return the axes of every tensor in a value."""
    if isinstance(value, Tensor):
        return list(value.axes)
    return [axis for item in value or () for axis in value_axes(item)]


def fresh_value(dims: DimTable, ty: Any, const: GenericConst | None = None) -> Value:
    """Return new dimensions for a Relax type; None for what is no tensor of known shape."""
    if isinstance(ty, relax.TupleType):
        return tuple(fresh_value(dims, item) for item in ty.fields)
    if not isinstance(ty, relax.TensorType):
        return None
    if isinstance(ty.shape, relax.ShapeExpr):
        return Tensor(tuple(dims.fresh(static_size(size)) for size in ty.shape.values), const)
    return Tensor(tuple(dims.fresh(-1) for _ in range(ty.ndim)), const) if ty.ndim >= 0 else None


def static_size(size: Any) -> int:
    """Return a dimension as int, -1 if it is symbolic."""
    return int(size) if isinstance(size, int | tirx.IntImm) else -1
