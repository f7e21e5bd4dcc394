"""int8 codes of rows: what kernels that write them have in common."""

from __future__ import annotations

from dataclasses import dataclass

from icd_tvm.tir_schedules.cuda.source_kernel import Argument

THREADS, PAIRS = 128, 16
# Rows from which a warp for each of them fills a device.
_MANY = 1024
LONGEST = 1024 * 2 * PAIRS


@dataclass(frozen=True)
class RowCodes:
    """How float32 becomes int8: ``bound(round(x / step) + point)``.

    Attributes
    ----------
    step : float
        What one code is worth; 0 asks for the range of each row, with 0 in it, as ONNX's
        DynamicQuantizeLinear takes it of a whole tensor.
    point : int
        The code of 0.0, in [-128, 127]; found with the step where that is 0.
    """

    step: float = 0.0
    point: int = 0

    @property
    def mode(self) -> int:
        """``CODES`` of the sources."""
        return 1 if self.step else 2

    @property
    def pair(self) -> tuple[float, float]:
        """Step and code of 0.0."""
        return self.step, float(self.point)

    @property
    def values(self) -> str:
        """``Codes`` of the sources."""
        return f"icd::Codes{{{self.step!r}f, {float(self.point)!r}f}}"

    @property
    def place(self) -> str:
        """``RowCodes`` of the sources."""
        rows = "nullptr, nullptr" if self.step else "(float*)row_scale, (float*)row_zero"
        return f"icd::RowCodes{{codes, {rows}, {self.values}}}"

    def arguments(self, rows: int, width: int) -> list[Argument]:
        """Return what is written: ``row_scale`` and ``row_zero`` by row if need be, ``codes``."""
        found = [Argument("codes", (rows, width), "int8")]
        if self.step:
            return found
        return [Argument(name, (rows,), "float32") for name in ("row_scale", "row_zero")] + found


@dataclass(frozen=True)
class RowTile:
    """Warps that share a row, rows of a block, pairs of elements for each lane."""

    warps: int
    rows: int
    pairs: int

    @property
    def sizes(self) -> str:
        """The template arguments."""
        return f"{self.warps}, {self.rows}, {self.pairs}"

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.rows * self.warps * 32

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        return 4 * self.rows * self.warps


def row_tile(rows: int, width: int) -> RowTile:
    """Return how rows are cut: more warps for each where there are few, as registers last."""
    most = 4 if rows < _MANY else PAIRS
    warps = 1
    while width > 64 * warps * most and warps < 32:
        warps *= 2
    return RowTile(warps, max(1, THREADS // (32 * warps)), -(-width // (64 * warps)))
