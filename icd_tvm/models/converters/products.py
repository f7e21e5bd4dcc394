"""Matrix products with a safe accumulator."""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import relax
from icd_tvm.models.converters.node import OnnxNode, cast, dtype_of

_NARROW = ("float16", "bfloat16")


def matmul(node: OnnxNode, left: Any, right: Any) -> Any:
    """Return ``left @ right``; 16-bit floats are summed in float32."""
    dtype = dtype_of(left)
    if dtype not in _NARROW:
        return node.emit(relax.op.matmul(left, right))
    wide = node.emit(relax.op.matmul(left, right, out_dtype="float32"))
    return node.emit(cast(wide, dtype))


def integer_matmul(node: OnnxNode, left: Any, right: Any) -> Any:
    """Return the int32 product of two integer matrices."""
    left, right = (node.emit(cast(value, "int32")) for value in (left, right))
    return node.emit(relax.op.matmul(left, right))
