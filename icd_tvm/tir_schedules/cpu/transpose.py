"""Exchange the last two axes, in square blocks that fit the vector registers.

TVM's own loops gather one number from each of 16 rows, which takes twenty times as long.
"""

from __future__ import annotations

from math import prod
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from icd_tvm.errors import ShapeError
from icd_tvm.tir_schedules.cpu.register_transpose import emit_transpose
from icd_tvm.tir_schedules.cpu.row_reduce import OPAQUE
from icd_tvm.tir_schedules.target import vector_bits


def transpose(shape: tuple[int, ...], target: Any) -> Any:
    """Return the TIR function that exchanges the last two axes.

    Parameters
    ----------
    shape : tuple of int
        ``(*lead, rows, columns)``, of which the last two are multiples of a vector's length.
    target : tvm.target.Target
        Gives the vector width.

    Returns
    -------
    PrimFunc
        ``(X: f32[*lead, rows, columns], Y: f32[*lead, columns, rows])``, scheduled.

    Raises
    ------
    ShapeError
        There are fewer than two axes, or one of the last two does not fit.
    """
    lanes = vector_bits(target) // 32
    if len(shape) < 2 or shape[-2] % lanes or shape[-1] % lanes or min(shape) < 1:
        raise ShapeError(f"a transpose of {shape}", f"the last two must be multiples of {lanes}")
    *lead, rows, columns = shape
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_name("transpose")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": OPAQUE})
        x = T.arg("X", T.Buffer((*lead, rows, columns), "float32"))
        y = T.arg("Y", T.Buffer((*lead, columns, rows), "float32"))
        blocks = columns // lanes
        # A task writes whole rows of Y, so that threads share no cache line.
        with (
            T.parallel(prod(lead) * blocks) as task,
            T.serial(rows // lanes) as block,
            T.sblock("transpose"),
        ):
            place: list[Any] = []
            rest = task // blocks
            for extent in reversed(lead):
                place.insert(0, rest % extent)
                rest = rest // extent
            row, column = block * lanes, task % blocks * lanes

            def store(j: int, vector: Any, place: Any = place, row: Any = row) -> None:
                T.buffer_store(y, vector, [*place, column + j, T.ramp(row, 1, lanes)])

            emit_transpose(lanes, lambda j: x[(*place, row + j, T.ramp(column, 1, lanes))], store)
    return builder.get()
