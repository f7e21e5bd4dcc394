"""Evaluates the index expressions of a TIR access with numpy, over sets of loop points."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm_ffi
from numpy.typing import NDArray

from icd_tvm._tvm import Call, TensorLoad, Var, tirx
from icd_tvm.errors import ConfigError, ShapeError, UnsupportedOpError

Ints = NDArray[np.int64]
Constants = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Loop:
    """One loop around an access.

    Attributes
    ----------
    var : Var
    minimum, extent : Expr
        May depend on outer loops and on constant index arrays.
    tag : str
        serial, parallel, vectorized, unrolled, blockIdx.*, threadIdx.*, or intrinsic: an axis
        of the region that one tensor instruction handles.
    reduction : bool
        Does the loop run over a reduction?
    """

    var: Any
    minimum: Any
    extent: Any
    tag: str
    reduction: bool = False

    @property
    def name(self) -> str:
        """Name of the loop variable; not unique in a function."""
        return str(self.var.name)

    @property
    def constant_extent(self) -> int | None:
        """The extent, or None where it depends on other loops or on data."""
        constant = isinstance(self.extent, (int, tirx.IntImm))
        return int(self.extent) if constant else None


def variables(exprs: Iterable[Any]) -> set[Any]:
    """Return the variables of the expressions; buffers do not count."""
    found: set[Any] = set()
    for expr in exprs:
        if not isinstance(expr, int):
            tvm_ffi.structural_walk(expr, (Var, found.add))
    return {var for var in found if not isinstance(var.ty, tirx.BufferType)}


def op_name(call: Any) -> str:
    """Return the name of the operator of a call, without its namespace."""
    return str(getattr(call.op, "name", "")).rpartition(".")[2]


_BINARY: Mapping[type, Callable[[Any, Any], Any]] = {
    tirx.Add: np.add,
    tirx.Sub: np.subtract,
    tirx.Mul: np.multiply,
    tirx.FloorDiv: np.floor_divide,
    tirx.FloorMod: np.mod,
    tirx.Div: lambda a, b: np.trunc(np.divide(a, b)).astype(np.int64),
    tirx.Mod: np.fmod,
    tirx.Min: np.minimum,
    tirx.Max: np.maximum,
    tirx.LT: np.less,
    tirx.LE: np.less_equal,
    tirx.GT: np.greater,
    tirx.GE: np.greater_equal,
    tirx.EQ: np.equal,
    tirx.NE: np.not_equal,
    tirx.And: np.logical_and,
    tirx.Or: np.logical_or,
    tirx.LShift: np.left_shift,
    tirx.RShift: np.right_shift,
    tirx.BitwiseAnd: np.bitwise_and,
    tirx.BitwiseOr: np.bitwise_or,
    tirx.BitwiseXor: np.bitwise_xor,
}


@dataclass(eq=False)
class Points:
    """A set of loop points: one int64[N] array for each loop variable bound so far.

    Attributes
    ----------
    consts : mapping of str to ndarray
        Values of the buffers that expressions load from, by name.
    env : dict of Var to int64[size]
    size : int
    """

    consts: Constants
    env: dict[Any, Ints] = field(default_factory=dict)
    size: int = 1

    def expand(self, loop: Loop) -> None:
        """Bind one more loop; its extent may differ from point to point."""
        low = np.broadcast_to(self.value(loop.minimum), self.size)
        extent = np.maximum(np.broadcast_to(self.value(loop.extent), self.size), 0)
        source = np.repeat(np.arange(self.size), extent)
        first = np.cumsum(extent) - extent
        self.take(source)
        self.env[loop.var] = np.arange(source.size) - first[source] + low[source]

    def take(self, chosen: NDArray[Any]) -> None:
        """Keep the chosen points (a mask or positions)."""
        self.env = {var: values[chosen] for var, values in self.env.items()}
        self.size = int(chosen.sum()) if chosen.dtype == np.bool_ else chosen.size

    def expand_all(self, loops: Sequence[Loop], predicates: Sequence[Any]) -> None:
        """Bind loops, outermost first, and drop points as soon as a predicate refuses them."""
        pending = list(predicates)
        self.filter(pending)
        for loop in loops:
            self.expand(loop)
            self.filter(pending)

    def filter(self, pending: list[Any]) -> None:
        """Apply, and remove from the list, the predicates whose variables are all bound."""
        for predicate in list(pending):
            if variables([predicate]) <= self.env.keys():
                pending.remove(predicate)
                held = np.broadcast_to(self.value(predicate), self.size)
                self.take(held.astype(np.bool_))

    def chunks(self, size: int) -> Iterator[Points]:
        """Cut the points into runs of at most ``size``."""
        for first in range(0, self.size, size):
            last = min(first + size, self.size)
            env = {var: values[first:last] for var, values in self.env.items()}
            yield Points(self.consts, env, last - first)

    def value(self, expr: Any, guarded: bool = False) -> Any:
        """Evaluate an integer expression at every point; a scalar where it is constant."""
        if isinstance(expr, int):
            return expr
        if isinstance(expr, tirx.IntImm):
            return int(expr.value)
        if isinstance(expr, Var):
            return self._variable(expr)
        if (combine := _BINARY.get(type(expr))) is not None:
            return combine(self.value(expr.a, guarded), self.value(expr.b, guarded))
        if isinstance(expr, tirx.Not):
            return np.logical_not(self.value(expr.a, guarded))
        if isinstance(expr, tirx.Cast):
            return self.value(expr.value, guarded)
        if isinstance(expr, tirx.Select):
            return self._choose(expr.condition, expr.true_value, expr.false_value)
        if isinstance(expr, TensorLoad):
            return self._load(expr, guarded)
        if isinstance(expr, Call):
            return self._call(expr, guarded)
        raise UnsupportedOpError(f"cannot evaluate the index expression {expr}")

    def _variable(self, var: Any) -> Ints:
        if var not in self.env:
            raise UnsupportedOpError(
                f"index depends on {var.name}, which no loop binds", "specialise the function"
            )
        return self.env[var]

    def _choose(self, condition: Any, yes: Any, no: Any) -> Any:
        # Both sides are evaluated everywhere: the side not taken may index out of range.
        return np.where(self.value(condition, True), self.value(yes, True), self.value(no, True))

    def _call(self, expr: Any, guarded: bool) -> Any:
        name = op_name(expr)
        if name == "if_then_else":
            return self._choose(*expr.args)
        if name == "likely":
            return self.value(expr.args[0], guarded)
        raise UnsupportedOpError(f"cannot evaluate the call {name} in an index")

    def _load(self, expr: Any, guarded: bool) -> Any:
        name = str(expr.source.name)
        if name not in self.consts:
            raise ConfigError(
                f"index is loaded from {name!r}, whose values are unknown", f"pass consts[{name!r}]"
            )
        array = np.asarray(self.consts[name])
        index = [np.asarray(self.value(i, guarded)) for i in expr.indices]
        if len(index) != array.ndim:
            raise ShapeError(f"consts[{name!r}] has {array.ndim} dimensions, not {len(index)}")
        limits = zip(index, array.shape, strict=True)
        if guarded:
            index = [np.clip(i, 0, max(size - 1, 0)) for i, size in limits]
        elif any(i.size and (i.min() < 0 or i.max() >= size) for i, size in limits):
            raise ShapeError(f"consts[{name!r}] {array.shape} is indexed out of range")
        return array[tuple(index)].astype(np.int64)
