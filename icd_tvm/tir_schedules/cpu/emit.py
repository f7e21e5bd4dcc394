"""What kernels that are written with the IR builder share: immediates, scratch buffers, guards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import tirx as T

from icd_tvm._tvm import tirx

# Bytes of a cache line, and how far ahead of their use kernels that stream from memory fetch
# theirs: 90 % of the speed of memory on Zen 5, against 70 % without.
LINE, AHEAD = 64, 8192


def f32(value: float) -> Any:
    """Return a float32 immediate."""
    return tirx.FloatImm("float32", value)


def i32(value: int) -> Any:
    """Return an int32 immediate."""
    return tirx.IntImm("int32", value)


def splat(value: float, lanes: int) -> Any:
    """Return a vector of one number: int32 of an int, float32 of a float."""
    return T.broadcast(i32(value) if isinstance(value, int) else f32(value), lanes)


def zeros(dtype: str, lanes: int) -> Any:
    """Return a vector of zeros."""
    number = tirx.IntImm if dtype.startswith("int") else tirx.FloatImm
    return T.broadcast(number(dtype, 0), lanes)


def prefetch(element: Any, locality: int = 3, *, write: bool = False) -> Any:
    """Return the call that fetches the cache line of a buffer's element.

    One past the end of the buffer does no harm. A locality of 3 is level 1 of the caches, of 2
    level 2. Lines that will be written are fetched so that no other core keeps them.
    """
    # Read, locality, data: the arguments of llvm.prefetch.
    kind = (i32(value) for value in (int(write), locality, 1))
    return tirx.call_intrin("void", "tirx.prefetch", T.address_of(element), *kind)


def local(*shape: int, dtype: str = "float32") -> Any:
    """Return a buffer in registers or on the stack."""
    return T.sblock_alloc_buffer(shape, dtype, scope="local")


def emit_if(
    ever: bool, condition: Any, then: Callable[[], None], otherwise: Callable[[], None]
) -> None:
    """Emit ``then`` under a condition and ``otherwise`` elsewhere; that alone if it never holds."""
    if not ever:
        otherwise()
        return
    with T.If(condition):
        with T.Then():
            then()
        with T.Else():
            otherwise()


def enter_if(stack: contextlib.ExitStack, condition: Any) -> None:
    """Put what is emitted until the stack unwinds under a condition."""
    stack.enter_context(T.If(condition))
    stack.enter_context(T.Then())
