"""Transposes of small blocks in vector registers, as the shuffles x86 has instructions for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import tirx as T

from icd_tvm._tvm import tirx

_QUAD = 4


def emit_transpose(
    lanes: int, load: Callable[[int], Any], store: Callable[[int, Any], None]
) -> None:
    """Emit the transpose of a ``lanes`` x ``lanes`` block inside an open IR builder.

    Quads of rows are transposed within each 128-bit quarter, then whole quarters are exchanged:
    ``lanes * log2(lanes)`` shuffles of two registers.

    Parameters
    ----------
    lanes : int
        fp32 values of one vector register: 4, 8 or 16.
    load : callable
        Row number -> vector expression.
    store : callable
        Row number of the result and its vector -> None; emits the store.
    """
    rows = [T.bind(load(row)) for row in range(lanes)]
    quads = [_transpose_quarters(rows[at : at + _QUAD], lanes) for at in range(0, lanes, _QUAD)]
    for column in range(_QUAD):
        gathered = _gather_quarters([quad[column] for quad in quads], lanes)
        for quarter, vector in enumerate(gathered):
            store(_QUAD * quarter + column, vector)


def _transpose_quarters(rows: list[Any], lanes: int) -> list[Any]:
    """Transpose the 4 x 4 block in each 128-bit quarter of four rows."""
    low, high = (0, 1), (2, 3)
    first = [_unpack(rows[0], rows[1], lanes, low), _unpack(rows[0], rows[1], lanes, high)]
    second = [_unpack(rows[2], rows[3], lanes, low), _unpack(rows[2], rows[3], lanes, high)]
    return [
        _pairs(first[half], second[half], lanes, pair) for half in (0, 1) for pair in (low, high)
    ]


def _unpack(a: Any, b: Any, lanes: int, which: tuple[int, int]) -> Any:
    """Interleave two of the four values of each quarter: ``a0 b0 a1 b1``."""
    quarters = range(0, lanes, _QUAD)
    return shuffle(a, b, [q + i + side for q in quarters for i in which for side in (0, lanes)])


def _pairs(a: Any, b: Any, lanes: int, which: tuple[int, int]) -> Any:
    """Join a pair of values of each quarter of ``a`` with the same pair of ``b``."""
    quarters = range(0, lanes, _QUAD)
    return shuffle(a, b, [q + i + side for q in quarters for side in (0, lanes) for i in which])


def _gather_quarters(vectors: list[Any], lanes: int) -> list[Any]:
    """Return, for each quarter, the vector of that quarter of all ``vectors``."""
    if len(vectors) == 1:
        return vectors
    halves = []
    for parity in (0, 1):
        indices = [
            side + q + i
            for side in (0, lanes)
            for q in range(parity * _QUAD, lanes, 2 * _QUAD)
            for i in range(_QUAD)
        ]
        pairs = zip(vectors[0::2], vectors[1::2], strict=True)
        halves.append(_gather_quarters([shuffle(a, b, indices) for a, b in pairs], lanes))
    return [vector for pair in zip(*halves, strict=True) for vector in pair]


def shuffle(a: Any, b: Any, indices: list[int]) -> Any:
    """Return the elements of two vectors, one behind the other, at ``indices``."""
    return T.bind(tirx.Shuffle([a, b], [tirx.IntImm("int32", index) for index in indices]))
