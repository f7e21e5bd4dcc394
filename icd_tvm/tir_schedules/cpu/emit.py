"""What kernels that are written with the IR builder share: immediates, scratch buffers, guards."""

from __future__ import annotations

import contextlib
from typing import Any

from tvm.script.ir_builder import tirx as T

from icd_tvm._tvm import tirx


def f32(value: float) -> Any:
    """Return a float32 immediate."""
    return tirx.FloatImm("float32", value)


def i32(value: int) -> Any:
    """Return an int32 immediate."""
    return tirx.IntImm("int32", value)


def local(*shape: int, dtype: str = "float32") -> Any:
    """Return a buffer in registers or on the stack."""
    return T.sblock_alloc_buffer(shape, dtype, scope="local")


def enter_if(stack: contextlib.ExitStack, condition: Any) -> None:
    """Put what is emitted until the stack unwinds under a condition."""
    stack.enter_context(T.If(condition))
    stack.enter_context(T.Then())
