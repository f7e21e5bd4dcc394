"""Call the selective scan kernel from Relax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from icd_tvm._tvm import relax
from icd_tvm.models.converters.node import OnnxNode
from icd_tvm.tir_schedules.cpu.scan_program import ScanProgram
from icd_tvm.tir_schedules.cpu.selective_scan import (
    operand_shape,
    output_shape,
    selective_scan,
)


def call_scan(
    node: OnnxNode,
    program: ScanProgram,
    start: Any,
    operands: Sequence[Any],
    length: int,
    backwards: Sequence[bool] | None = None,
    flipped: Sequence[bool] | None = None,
) -> tuple[Any, list[Any]]:
    """Run a recurrence.

    Parameters
    ----------
    node : OnnxNode
    program : ScanProgram
    start : relax.Expr
        float32, the state before the first step.
    operands : sequence of relax.Expr
        float32, one for each of the program: [length, ...] if scanned, each in the order of the
        axes of the state.
    length : int
    backwards, flipped : sequence of bool, optional
        For every operand and output, whether time runs backwards; none does if omitted.

    Returns
    -------
    final : relax.Expr
        The last state.
    outputs : list of relax.Expr
        [length, *shape of a step].
    """
    turned = tuple(backwards or [False] * len(operands))
    mirrored = tuple(flipped or [False] * len(program.outputs))
    func = selective_scan(program, length, turned, mirrored)
    whole = (1, *program.state)
    args = [_reshaped(node, start, whole)]
    for expr, operand in zip(operands, program.operands, strict=True):
        args.append(_reshaped(node, expr, operand_shape(program, operand, length)))
    shapes = [*(output_shape(program, i, length) for i in range(len(program.outputs))), whole]
    types = [relax.TensorType(shape, "float32") for shape in shapes]
    kernel = node.bb.add_func(func, "selective_scan")
    result = node.emit(
        relax.call_tir(kernel, relax.Tuple(args), types if len(types) > 1 else types[0])
    )
    if len(types) == 1:
        return _reshaped(node, result, program.state), []
    *outputs, final = (node.emit(relax.TupleGetItem(result, i)) for i in range(len(types)))
    stacked = [
        _reshaped(node, value, (length, *shape))
        for value, (_, shape, _) in zip(outputs, program.outputs, strict=True)
    ]
    return _reshaped(node, final, program.state), stacked


def _reshaped(node: OnnxNode, value: Any, shape: tuple[int, ...]) -> Any:
    return node.emit(relax.op.reshape(value, shape))
