"""What the products of narrow numbers have in common: a run of rows for each 32-bit lane."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LaneDot:
    """How a target multiplies the numbers that share a lane, and adds them to its sum.

    Attributes
    ----------
    lanes : int
        32-bit sums of a vector register.
    native : bool
        Whether one instruction takes the numbers as they are; otherwise they are widened first.
    """

    lanes: int
    native: bool

    @property
    def registers(self) -> int:
        """Vector registers of the target."""
        return 32 if self.lanes == 16 else 16

    def needs(self, rows: int, vectors: int) -> int:
        """Return the registers a tile takes: sums, weights, and the row that is multiplied."""
        return rows * vectors + (vectors + 2 if self.native else 2 * vectors + 3)

    def imported(self) -> AbstractContextManager[Any]:
        """Return the scope in which `add` may be emitted."""
        return nullcontext()

    def add(self, total: Any, word: Any, weight: Any) -> Any:
        """Return the sums after one run: ``word`` of a row of X with every column of W."""
        raise NotImplementedError
