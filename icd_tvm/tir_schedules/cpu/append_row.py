"""Write one new row into a cache that lies [..., slot, channel], and touch nothing else of it."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from icd_tvm._tvm import tirx
from icd_tvm.errors import ShapeError
from icd_tvm.tir_schedules.cpu.row_reduce import OPAQUE

# Threads that a block of a GPU can have.
_MAX_THREADS = 1024


def append_row(
    cache: tuple[int, ...], dtype: str, length: tuple[int, ...], index: str, *, gpu: bool = False
) -> Any:
    """Return the TIR function that stores a row at slot ``length`` of a cache, in place.

    A length outside the cache stores nothing, as no slot number equals it.

    Parameters
    ----------
    cache : tuple of int
        Shape [batch, heads, slots, channels].
    dtype : str
        Of cache and row.
    length : tuple of int
        Shape of the input that says how many slots are filled; one element.
    index : str
        Its dtype.
    gpu : bool
        For a GPU: a block for each row, a thread for each channel.

    Returns
    -------
    PrimFunc
        ``(C: [batch, heads, slots, channels], R: [batch, heads, 1, channels], L: index)``; for
        ``call_tir_inplace`` with C as its result. Scheduled.

    Raises
    ------
    ShapeError
        The cache has not four axes, the length more than one element, or a GPU too few threads.
    """
    if len(cache) != 4 or any(size != 1 for size in length):
        raise ShapeError(
            f"a row of a cache {list(cache)} at a length {list(length)}", "four axes, one length"
        )
    if gpu and cache[-1] > _MAX_THREADS:
        raise ShapeError(f"a row of {cache[-1]} channels", f"a block has {_MAX_THREADS} threads")
    batch, heads, slots, channels = cache
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_name("append_row")
        # The cache is result and argument at once, so nothing may be said about aliases.
        T.func_attr({"op_pattern": OPAQUE, "tirx.is_scheduled": True})
        c = T.arg("C", T.Buffer(cache, dtype))
        r = T.arg("R", T.Buffer((batch, heads, 1, channels), dtype))
        n = T.arg("L", T.Buffer(length, index))
        slot = n[tuple(0 for _ in length)]
        block, lane = ("blockIdx.x", "threadIdx.x") if gpu else ("", "")
        with _loop(batch * heads, block) as row, _loop(channels, lane) as x, T.sblock("append"):
            b, h = row // heads, row % heads
            with T.If(tirx.all(slot >= 0, slot < slots)), T.Then():
                T.buffer_store(c, r[b, h, 0, x], [b, h, slot, x])
    return builder.get()


def _loop(extent: int, thread: str) -> Any:
    return T.thread_binding(extent, thread=thread) if thread else T.serial(extent)
