"""A set-associative, sectored, multi-level LRU cache simulator.

Its inner loop is a TIR function, compiled once per process: the package has a compiler at hand.
What it says is a model of a cache and is labelled so wherever it is shown; `measure/cachegrind.py`
and, on a GPU, hardware counters are the sources it is checked against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.script import tirx as T

from icd_tvm._tvm import tvm
from icd_tvm.errors import ConfigError

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class CacheLevel:
    """One level of a cache hierarchy.

    Attributes
    ----------
    name : str
    size_bytes : int
        Capacity.
    ways : int
        Associativity.
    line_bytes : int
        What one tag covers.
    sector_bytes : int
        What one miss fetches; equals ``line_bytes`` on a CPU, 32 on NVIDIA GPUs.
    """

    name: str
    size_bytes: int
    ways: int
    line_bytes: int = 64
    sector_bytes: int = 64

    def __post_init__(self) -> None:
        values = (self.size_bytes, self.ways, self.line_bytes, self.sector_bytes)
        if min(values) < 1 or self.line_bytes % self.sector_bytes:
            raise ConfigError(f"cache {self.name}: sizes {values} do not make lines of sectors")
        if self.size_bytes % (self.ways * self.line_bytes):
            raise ConfigError(
                f"cache {self.name}: {self.size_bytes} bytes are not "
                f"{self.ways} ways of whole lines"
            )

    @property
    def sets(self) -> int:
        """Number of sets."""
        return self.size_bytes // (self.ways * self.line_bytes)


@dataclass
class LevelCount:
    """What one level saw: requests by sector, and those it had to fetch."""

    requests: int = 0
    misses: int = 0

    @property
    def hit_pct(self) -> float | None:
        """Hits per hundred requests; None where there were no requests."""
        return 100.0 * (1 - self.misses / self.requests) if self.requests else None


class CacheSimulator:
    """Caches with LRU replacement and write-allocate; state lives from call to call.

    A level is asked for what the level before it missed. Write-backs, prefetchers and the hashing
    of set numbers are not modelled.

    Parameters
    ----------
    levels : sequence of CacheLevel
        Nearest first; all with one sector size.

    Raises
    ------
    ConfigError
        If there is no level or sector sizes differ.
    """

    def __init__(self, levels: Sequence[CacheLevel]) -> None:
        if len({level.sector_bytes for level in levels}) != 1:
            raise ConfigError("a cache hierarchy needs levels with one sector size")
        self.levels = tuple(levels)
        self.clear()

    def clear(self) -> None:
        """Empty every level."""
        shapes = [(level.sets, level.ways) for level in self.levels]
        self._tags = [tvm.runtime.tensor(np.full(shape, -1, np.int64)) for shape in shapes]
        self._held = [tvm.runtime.tensor(np.zeros(shape, np.int64)) for shape in shapes]

    @property
    def sector_bytes(self) -> int:
        """Unit in which :meth:`access` counts."""
        return self.levels[0].sector_bytes

    def access(self, sectors: Ints) -> list[LevelCount]:
        """Touch sectors in order and return what each level counted.

        Parameters
        ----------
        sectors : int64[N]
            Address divided by ``sector_bytes``.
        """
        counts = []
        for level, tags, held in zip(self.levels, self._tags, self._held, strict=True):
            missed = _missed(level, sectors, tags, held)
            counts.append(LevelCount(sectors.size, int(np.count_nonzero(missed))))
            sectors = sectors[missed]
        return counts


def _missed(level: CacheLevel, sectors: Ints, tags: Any, held: Any) -> NDArray[np.bool_]:
    missed = tvm.runtime.tensor(np.empty(sectors.size, np.uint8))
    if sectors.size:
        per_line = level.line_bytes // level.sector_bytes
        lines, parts = _divided(sectors, per_line)
        columns = (lines, _divided(lines, level.sets)[1], np.int64(1) << parts)
        _compiled()(*map(tvm.runtime.tensor, columns), tags, held, missed)
    return missed.numpy().astype(np.bool_)


def _divided(values: Ints, by: int) -> tuple[Ints, Ints]:
    """Return quotients and remainders; a power of two takes no division."""
    if by & (by - 1):
        return np.divmod(values, by)
    return values >> (by.bit_length() - 1), values & (by - 1)


@cache
def _compiled() -> Any:
    return tvm.compile(_lru, target="llvm")["main"]


@T.prim_func(s_tir=True)
def _lru(
    lines: T.handle,
    sets_: T.handle,
    bits: T.handle,
    tags_: T.handle,
    held_: T.handle,
    missed_: T.handle,
) -> None:
    """Mark the sectors that miss; position 0 of a set is the line used last."""
    T.func_attr({"global_symbol": "main"})
    n, sets, ways = T.int64(), T.int64(), T.int64()
    line = T.match_buffer(lines, (n,), "int64")
    where = T.match_buffer(sets_, (n,), "int64")
    bit = T.match_buffer(bits, (n,), "int64")
    tags = T.match_buffer(tags_, (sets, ways), "int64")
    held = T.match_buffer(held_, (sets, ways), "int64")
    missed = T.match_buffer(missed_, (n,), "uint8")
    found = T.alloc_buffer((2,), "int64", scope="local")
    for i in range(n):
        found[0] = ways - T.int64(1)
        found[1] = T.int64(0)
        if tags[where[i], 0] == line[i]:
            found[0] = T.int64(0)
            found[1] = held[where[i], 0]
        else:
            for w in range(ways):
                if tags[where[i], w] == line[i]:
                    found[0] = w
                    found[1] = held[where[i], w]
            for back in range(found[0]):
                at = T.meta_var(found[0] - back)
                tags[where[i], at] = tags[where[i], at - T.int64(1)]
                held[where[i], at] = held[where[i], at - T.int64(1)]
            tags[where[i], 0] = line[i]
        missed[i] = T.if_then_else(
            T.bitwise_and(found[1], bit[i]) == T.int64(0), T.uint8(1), T.uint8(0)
        )
        held[where[i], 0] = T.bitwise_or(found[1], bit[i])
