"""Reduce a row of vectors to one number inside an open IR builder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import tirx as T

Combine = Callable[[Any, Any], Any]


def emit_reduce(
    partial: Any, lanes: int, width: int, combine: Combine, value: Callable[[Any], Any]
) -> Any:
    """Emit the reduction of ``value(0) .. value(width - 1)`` and return the result.

    Parameters
    ----------
    partial : tirx.Buffer
        Scratch of ``lanes`` elements; holds the result until it is used again.
    lanes : int
        A power of two.
    width : int
        A multiple of ``lanes``.
    combine : callable
        Of two expressions, associative.
    value : callable
        Index -> expression.
    """
    with T.vectorized(lanes) as x:
        T.buffer_store(partial, value(x), [x])
    if width > lanes:
        with T.serial(width // lanes - 1) as c, T.vectorized(lanes) as x:
            other = value((c + 1) * lanes + x)
            T.buffer_store(partial, combine(partial[x], other), [x])
    half = lanes // 2
    while half:
        with T.vectorized(half) as x:
            T.buffer_store(partial, combine(partial[x], partial[x + half]), [x])
        half //= 2
    return partial[0]
