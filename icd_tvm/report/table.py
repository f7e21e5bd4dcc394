"""A table of a report; the template turns it into HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from icd_tvm.report.values import ABSENT, as_number, fixed, flat, si, text

# A text of more characters may take several lines.
LONG = 24


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and the value that it sorts by where that is another."""

    shown: str
    value: float | None = None


@dataclass
class Table:
    """A table; the first column heads its rows.

    Attributes
    ----------
    caption : str
    columns : list of str
    rows : list of list of Cell
        Each as long as ``columns``.
    """

    caption: str
    columns: list[str]
    rows: list[list[Cell]] = field(default_factory=list)

    def add(self, *cells: Any) -> None:
        """Append a row; what is no cell is shown as text."""
        self.rows.append([c if isinstance(c, Cell) else Cell(text(c)) for c in cells])

    def is_number(self, column: int) -> bool:
        """Say whether all that is known in a column are numbers."""
        known = [row[column] for row in self.rows if row[column].shown != ABSENT]
        return bool(known) and all(cell.value is not None for cell in known)

    def style(self, column: int, cell: Cell) -> str:
        """Return the classes of a cell below the head."""
        kind = "number" if self.is_number(column) else "long" if len(cell.shown) > LONG else "word"
        return f"{kind} absent" if cell.shown == ABSENT else kind

    def without_empty_columns(self) -> Table:
        """Return the table without the columns in which nothing is known."""
        known = [any(row[i].shown != ABSENT for row in self.rows) for i in range(len(self.columns))]
        kept = [i for i, keep in enumerate(known) if keep or i == 0]
        rows = [[row[i] for i in kept] for row in self.rows]
        return Table(self.caption, [self.columns[i] for i in kept], rows)


def numeric(value: Any, digits: int) -> Cell:
    """Return a number with so many decimals."""
    return Cell(fixed(value, digits), as_number(value))


def scaled(value: Any, unit: str = "") -> Cell:
    """Return a number with a decimal prefix."""
    return Cell(si(value, unit), as_number(value))


def pairs(caption: str, values: Any, columns: Sequence[str] = ("key", "value")) -> Table:
    """Lay out nested mappings as dotted keys and values."""
    table = Table(caption, list(columns))
    for key, value in flat(values):
        number = as_number(value)
        table.add(key, Cell(text(value), number))
    return table
