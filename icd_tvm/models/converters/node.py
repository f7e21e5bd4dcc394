"""What a converter sees of one ONNX node, and the type of a converter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from icd_tvm._tvm import GenericConst, Var, const_name, named_const, relax, tirx
from icd_tvm.errors import UnsupportedOpError

# Converts a body graph in place: (graph, {input name: expression}, scope) -> its outputs.
Inline: TypeAlias = Callable[[onnx.GraphProto, Mapping[str, Any], str], list[Any]]


@dataclass(frozen=True)
class OnnxNode:
    """One ONNX node with its operands in Relax.

    Attributes
    ----------
    bb : relax.BlockBuilder
    op, domain : str
        The standard domain is the empty string.
    name : str
        Unique in the graph.
    opset : int
        Version of the standard operator set.
    inputs : tuple of relax.Expr or None
        None stands for an omitted input.
    outputs : tuple of str
        Names; an unused output has an empty one.
    attrs : mapping of str to value
        Python values; strings are decoded.
    stored : mapping of int to str
        Position of an initializer of fewer than eight bits -> its ONNX type; the input itself
        holds bytes.
    inline : callable
        Converts a body graph where this node stands, with its inputs bound to expressions;
        bindings are named ``scope/node``. The names of enclosing graphs are visible to it.
    scope : mapping of str to relax.Expr
        Every value in scope by its ONNX name.
    """

    bb: Any
    op: str
    domain: str
    name: str
    opset: int
    inputs: tuple[Any, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any]
    stored: Mapping[int, str]
    inline: Inline
    scope: Mapping[str, Any]

    def has(self, position: int) -> bool:
        """Tell whether an input is given."""
        return position < len(self.inputs) and self.inputs[position] is not None

    def input(self, position: int) -> Any:
        """Return a required input."""
        if not self.has(position):
            raise self.refuse(f"input {position} is missing")
        return self.inputs[position]

    def optional(self, position: int) -> Any:
        """Return an input, or None if it is omitted."""
        return self.inputs[position] if self.has(position) else None

    def wants(self, position: int) -> bool:
        """Tell whether an output is used."""
        return position < len(self.outputs) and bool(self.outputs[position])

    def shape(self, expr: Any) -> tuple[int, ...]:
        """Return the static shape of an expression."""
        dims = getattr(getattr(expr.ty, "shape", None), "values", None)
        if dims is None or not all(isinstance(dim, tirx.IntImm) for dim in dims):
            raise self.refuse("the shape of an operand is not static")
        return tuple(int(dim) for dim in dims)

    def array(self, position: int) -> NDArray[Any] | None:
        """Return the value of a constant input, or None if it is omitted or computed."""
        expr = self.optional(position)
        return np.asarray(expr.value.numpy()) if isinstance(expr, GenericConst) else None

    def constant(self, position: int, what: str) -> NDArray[Any]:
        """Return the value of an input that must be a constant."""
        array = self.array(position)
        if array is None:
            raise self.refuse(f"{what} (input {position}) is not a constant")
        return array

    def label(self, position: int) -> str:
        """Return the ONNX name of a constant input, or an empty string."""
        expr = self.optional(position)
        return const_name(expr) if isinstance(expr, GenericConst) else ""

    def attr(self, name: str, default: Any) -> Any:
        """Return an attribute, or the default if it is not set."""
        return self.attrs.get(name, default)

    def required(self, name: str) -> Any:
        """Return an attribute that must be set."""
        if name not in self.attrs:
            raise self.refuse(f"attribute {name} is missing")
        return self.attrs[name]

    def emit(self, expr: Any) -> Any:
        """Bind an intermediate expression, so that its type is known and it is computed once."""
        return expr if isinstance(expr, Var | GenericConst) else self.bb.emit(expr)

    def refuse(self, reason: str) -> UnsupportedOpError:
        """Return the error that says why this node cannot be converted."""
        where = f"{self.domain or 'ai.onnx'} {self.op} at node {self.name!r}"
        return UnsupportedOpError(f"cannot convert {where}: {reason}")

    def allow(self, allowed: Mapping[str, Sequence[Any]]) -> None:
        """Refuse attributes with other values than those listed; the first is the default."""
        for name, values in allowed.items():
            value = self.attr(name, values[0])
            if value not in values:
                raise self.refuse(f"attribute {name} = {value!r} is not supported")


# None leaves the node to TVM's converter; a tuple holds one value an output, None where unused.
Converted: TypeAlias = Any
Converter: TypeAlias = Callable[[OnnxNode], Converted]


def is_float(expr: Any) -> bool:
    """Tell whether an expression is a tensor of floating-point numbers."""
    return "float" in dtype_of(expr)


def dtype_of(expr: Any) -> str:
    """Return the dtype name of a tensor expression."""
    return str(expr.ty.dtype)


def scalar(value: float, like: Any) -> Any:
    """Return a constant without axes, of the dtype of an expression."""
    return relax.const(value, dtype_of(like))


def with_name(array: NDArray[Any], name: str) -> Any:
    """Return a constant that carries an ONNX name, if there is one."""
    return named_const(np.ascontiguousarray(array), name)


def cast(expr: Any, dtype: str) -> Any:
    """Return an expression in a dtype, unchanged if it has it already."""
    return expr if dtype_of(expr) == dtype else relax.op.astype(expr, dtype)
