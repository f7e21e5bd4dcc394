"""Byte products side by side: what computes on their sums, found and merged column by column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm._tvm import Var, const_name, named_const, relax
from icd_tvm.relax_passes.relax_graph import (
    Dataflow,
    call_func,
    column_constant,
    constant_array,
    is_call,
    is_float32,
    operands,
    static_shape,
)
from icd_tvm.tir_schedules.cpu.int8_matmul import (
    int8_matmul,
    int8_tile,
    is_int8_matmul,
    pack_int8,
    unpack_int8,
)
from icd_tvm.tir_schedules.cpu.tile import flat_rows

_PAIRS = {
    "relax.add": relax.op.add,
    "relax.subtract": relax.op.subtract,
    "relax.multiply": relax.op.multiply,
}
_RAISED = 128


@dataclass(frozen=True)
class Step:
    """One operation on every column: its name, and its constants [columns] with their names."""

    op: str
    tables: tuple[npt.NDArray[Any], ...] = ()
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class ByteProjection:
    """``x @ weight`` in bytes and the steps that follow it, first to last."""

    source: Any
    weight: npt.NDArray[np.int8]
    name: str
    steps: tuple[Step, ...]


def byte_projection(mod: Any, flow: Dataflow, var: Any) -> ByteProjection | None:
    """Return the byte product behind ``var``, or None.

    Between the two stand sums, differences and products with constants of one element or one a
    column, casts to float32, and a quantisation; nothing else reads what they make.
    """
    steps: list[Step] = []
    while True:
        if not isinstance(var, Var) or not flow.single_use(var):
            return None
        call = flow.values.get(var)
        if is_call(call, "relax.call_tir"):
            return _product(mod, call, tuple(reversed(steps)))
        columns = (static_shape(var) or (0,))[-1]
        found = _step(call, columns)
        if found is None:
            return None
        step, var = found
        steps.append(step)


def _product(mod: Any, call: Any, steps: tuple[Step, ...]) -> ByteProjection | None:
    if not is_int8_matmul(mod[call.args[0]]):
        return None
    source, packed = call.args[1].fields
    values = constant_array(packed, dims=3)
    shape, result = static_shape(source), static_shape(call)
    if values is None or shape is None or result is None:
        return None
    weight = unpack_int8(values, shape[-1], result[-1])
    return ByteProjection(source, weight, const_name(packed), steps)


def _step(call: Any, columns: int) -> tuple[Step, Any] | None:
    """Return the step a call makes and its input, or None."""
    if is_call(call, "relax.astype") and is_float32(call):
        return Step("relax.astype"), call.args[0]
    if is_call(call, "relax.quantize") and str(call.ty.dtype) in ("int8", "uint8"):
        return _quantised(call, columns)
    name = next((op for op in _PAIRS if is_call(call, op)), "")
    if not name:
        return None
    data, constant = call.args if name == "relax.subtract" else operands(call)
    table = _along_columns(constant, columns)
    if table is None or static_shape(data) != static_shape(call):
        return None
    return Step(name, (table,), (const_name(constant),)), data


def _quantised(call: Any, columns: int) -> tuple[Step, Any] | None:
    """Return a quantisation to uint8: codes of int8 are raised by 128."""
    scale, zero = (_along_columns(arg, columns) for arg in call.args[1:3])
    if scale is None or zero is None:
        return None
    raised = _RAISED if str(call.ty.dtype) == "int8" else 0
    point = (zero.astype(np.int16) + raised).astype(np.uint8)
    return Step("relax.quantize", (scale, point), ("", "")), call.args[0]


def _along_columns(constant: Any, columns: int) -> npt.NDArray[Any] | None:
    """Return a constant of one element, or of one a column, as a vector [columns], or None."""
    vector = column_constant(constant, columns)
    return None if vector is None else np.broadcast_to(vector, (columns,))


def alike(parts: Sequence[ByteProjection]) -> bool:
    """Tell whether the same steps follow all products."""
    return len({tuple(step.op for step in part.steps) for part in parts}) <= 1


def emit_merged(builder: Any, source: Any, parts: Sequence[ByteProjection], target: Any) -> Any:
    """Emit one product for all parts and the steps that follow it; return its rows.

    Parameters
    ----------
    builder : relax.BlockBuilder
    source : relax.Expr
        uint8 [*lead, m, k].
    parts : sequence of ByteProjection
        Of that source, `alike`.
    target : tvm.target.Target

    Returns
    -------
    relax.Var
        [*lead, m, columns of all parts]; uint8 if they are quantised.
    """
    weight = np.concatenate([part.weight for part in parts], axis=1)
    *lead, m, k = static_shape(source) or ()
    n = weight.shape[1]
    tile = int8_tile(flat_rows(tuple(lead), m)[1], k, n, target)
    packed = named_const(pack_int8(weight, tile.columns), _joined([part.name for part in parts]))
    func = int8_matmul(m, k, n, target, lead=tuple(lead), tile=tile)
    like = relax.TensorType((*lead, m, n), "int32")
    rows = builder.emit(call_func(builder, func, "int8_matmul", [source, packed], like))
    for steps in zip(*(part.steps for part in parts), strict=True):
        rows = builder.emit(_applied(rows, steps))
    return rows


def _applied(rows: Any, steps: Sequence[Step]) -> Any:
    tables = [
        named_const(np.concatenate(tables), _joined(names))
        for tables, names in zip(
            zip(*(step.tables for step in steps), strict=True),
            zip(*(step.names for step in steps), strict=True),
            strict=True,
        )
    ]
    op = steps[0].op
    if op == "relax.astype":
        return relax.op.astype(rows, "float32")
    if op == "relax.quantize":
        return relax.op.quantize(rows, *tables, axis=int(rows.ty.ndim) - 1, out_dtype="uint8")
    return _PAIRS[op](rows, *tables)


def _joined(names: Sequence[str]) -> str:
    return "+".join(names) if all(names) else ""
