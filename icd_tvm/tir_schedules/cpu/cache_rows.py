"""Keys and values as a decode attention reads them: rows of 32, 16 or 8 bits, widened."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from icd_tvm.tir_schedules.cpu.emit import AHEAD, LINE, prefetch, splat

# Bytes of a number of each type that a cache may have.
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


class CacheRows:
    """Keys or values inside an open function: numbers, or codes with a scale for every row.

    Parameters
    ----------
    name : str
        Of the argument that is made.
    shape : tuple of int
        [batch, KV heads, slots, channels].
    dtype : str
        One of `BYTES`.

    Attributes
    ----------
    scale : tvm.tirx.Buffer or None
        float32 [batch, KV heads, slots, 1] of codes; set by who makes the argument.
    """

    def __init__(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = shape, dtype
        self.data = T.arg(name, T.Buffer(shape, dtype))
        self.scale: Any = None

    def declare(self) -> None:
        """Read bfloat16 as its bits; to be called behind the last argument.

        TVM 0.27 makes float32 of a bfloat16 wherever it is an operand, even where its address is
        taken.
        """
        if self.dtype == "bfloat16":
            self.data = T.decl_buffer(self.shape, "uint16", data=self.data.data)

    def at(self, *index: Any) -> Any:
        """Return the numbers or codes at an index, as float32."""
        found = self.data[index]
        lanes = found.ty.dtype.lanes
        if self.dtype == "float32":
            return found
        if self.dtype == "bfloat16":
            return _upper_half(found, lanes)
        return found.astype(_vector("float32", lanes))

    @property
    def lines(self) -> int:
        """Cache lines that a row touches."""
        return -(-self._bytes // LINE)

    @property
    def _bytes(self) -> int:
        return self.shape[-1] * BYTES[self.dtype]

    def fetch_ahead(self, batch: Any, head: Any, slot: Any, first: Any, count: int) -> None:
        """Fetch ``count`` lines from ``first`` on, `AHEAD` bytes behind a slot.

        Heads follow each other, so that what is past the end of one is the next. Into level 2
        of the caches: many fetches into level 1 make the loads wait (measured on Zen 5).
        """
        for line in range(count):
            channel = (first + line) * (LINE // BYTES[self.dtype])
            element = self.data[batch, head, slot + AHEAD // self._bytes, channel]
            T.evaluate(prefetch(element, locality=2))


def _upper_half(bits: Any, lanes: int) -> Any:
    """Return the float32 whose upper half are the bits (uint16), the lower one zero."""
    wide = bits.astype(_vector("int32", lanes))
    by = splat(16, lanes) if lanes > 1 else 16
    return T.reinterpret(_vector("float32", lanes), T.shift_left(wide, by))


def _vector(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"
