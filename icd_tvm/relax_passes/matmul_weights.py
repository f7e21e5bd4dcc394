"""The constant weights of the matmuls of a function, and the tables read by index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm._tvm import GenericConst, const_name
from icd_tvm.relax_passes.head_matmuls import head_matmuls
from icd_tvm.relax_passes.layer_rules import Layer, Role
from icd_tvm.relax_passes.relax_graph import (
    Dataflow,
    is_call,
    is_float32,
    static_shape,
    swaps_axes,
)

# What turns stored integers into the weight that a matmul reads.
_DECODING = frozenset(
    f"relax.{name}" for name in ("astype", "dequantize", "multiply", "permute_dims", "subtract")
)
_CODES = ("int", "uint", "float8")


@dataclass(frozen=True, eq=False)
class MatmulWeight:
    """A constant that matmuls multiply by.

    Parameters
    ----------
    layer : Layer
        Its name, shape [K, N] as the matmul sees it, role and first matmul.
    const : GenericConst
    uses : tuple of (str, relax.Call)
        Binding and call of every matmul that reads it.
    transposed : bool
        Whether the matmul reads it through ``permute_dims``.
    why_not : str
        Why its values cannot be replaced by a quantised matrix; empty if they can.
    """

    layer: Layer
    const: GenericConst
    uses: tuple[tuple[str, Any], ...]
    transposed: bool
    why_not: str

    def array(self) -> npt.NDArray[Any]:
        """Return the values, shape [K, N]."""
        values = np.asarray(self.const.value.numpy())
        return values.T if self.transposed else values


def matmul_weights(func: Any) -> list[MatmulWeight]:
    """Return every weight of ``func`` once, in program order.

    Parameters
    ----------
    func : relax.Function
        In A-normal form, constants bound.
    """
    flow, heads = Dataflow(func), head_matmuls(func)
    found: dict[tuple[Any, bool], list[tuple[str, Any]]] = {}
    for var, value in flow.values.items():
        if is_call(value, "relax.matmul"):
            const, transposed = _constant_behind(flow, value.args[1])
            if const is not None:
                found.setdefault((const, transposed), []).append((var.name, value))
    return [_weight(flow, const, uses, turned, heads) for (const, turned), uses in found.items()]


def embedding_layers(func: Any) -> list[Layer]:
    """Return the tables of floats that ``func`` reads by index."""
    tables: dict[Any, Layer] = {}
    for var, value in Dataflow(func).values.items():
        if is_call(value, "relax.take") and isinstance(value.args[0], GenericConst):
            table = value.args[0]
            if is_float32(table) and not isinstance(value.args[1], GenericConst):
                shape = static_shape(table) or ()
                tables.setdefault(table, Layer(const_name(table), var.name, shape, "embedding"))
    return list(tables.values())


def _constant_behind(flow: Dataflow, expr: Any) -> tuple[Any, bool]:
    """Follow a weight through what converts it; tell whether a transpose is all there was."""
    value = flow.resolve(expr)
    if is_call(value, "relax.permute_dims"):
        inner = flow.resolve(value.args[0])
        if isinstance(inner, GenericConst) and len(inner.value.shape) == 2:
            return inner, swaps_axes(value)
    while any(is_call(value, name) for name in _DECODING):
        value = flow.resolve(value.args[0])
    return (value, False) if isinstance(value, GenericConst) else (None, False)


def _weight(
    flow: Dataflow, const: Any, uses: list[tuple[str, Any]], turned: bool, heads: set[str]
) -> MatmulWeight:
    node, call = uses[0]
    role: Role = "head" if node in heads else "inner"
    shape = static_shape(call.args[1]) or ()
    layer = Layer(const_name(const), node, shape, role)
    direct = turned or all(flow.resolve(use.args[1]).same_as(const) for _, use in uses)
    return MatmulWeight(layer, const, tuple(uses), turned, _why_not(const, uses, direct))


def _why_not(const: Any, uses: list[tuple[str, Any]], direct: bool) -> str:
    dtype = str(const.value.dtype)
    if dtype.startswith(_CODES):
        return f"already quantised: its values are {dtype}"
    if not direct:
        return "the matmul reads it through other operations: fold constants first"
    if dtype != "float32":
        return f"it is {dtype}: only float32 weights are quantised"
    if len(const.value.shape) != 2:
        return f"it has {len(const.value.shape)} axes, not two"
    if not all(is_float32(call.args[0]) for _, call in uses):
        return "its input is no float32 tensor"
    return ""
