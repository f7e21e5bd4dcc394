"""The charts of a report: bars with intervals, ratios with intervals, a line over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icd_tvm.report.svg import ACCENT, INK, MUTED, NARROW, RULE, chart
from icd_tvm.report.values import clip

_ROW = 30
_AXIS = 34
_CHARACTER = 6.6
_CAP = 0.12


@dataclass(frozen=True)
class Item:
    """One row of a chart.

    Attributes
    ----------
    label : str
    value : float
    low, high : float or None
        Ends of its interval.
    note : str
        Written at the right; ``short`` on a phone.
    short : str
    strong : bool
        Drawn in the accent colour.
    """

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""
    short: str = ""
    strong: bool = False


def bars(items: Sequence[Item], name: str, title: str, axis: str) -> Markup:
    """Draw horizontal bars from zero, with an interval where there is one."""

    def draw(figure: Figure) -> None:
        axes = _rows(figure, items)
        for y, item in enumerate(items):
            axes.barh(y, item.value, height=0.5, color=ACCENT if item.strong else RULE)
            _whisker(axes, y, item)
        largest = max(max(item.value, item.high or 0.0) for item in items)
        axes.set_xlim(0, largest * 1.04 or 1.0)
        axes.set_xlabel(axis)

    return chart(draw, name, title, _height(items))


def ratios(items: Sequence[Item], name: str, title: str, axis: str) -> Markup:
    """Draw points with intervals beside the line at one; the accent marks those below it."""

    def draw(figure: Figure) -> None:
        axes = _rows(figure, items)
        axes.axvline(1, color=MUTED, linewidth=1)
        for y, item in enumerate(items):
            colour = ACCENT if item.strong else INK
            if item.low is not None and item.high is not None:
                axes.plot([item.low, item.high], [y, y], color=colour, linewidth=2)
            axes.plot([item.value], [y], "o", color=colour, markersize=6)
        ends = [1.0, *(v for i in items for v in (i.value, i.low, i.high) if v is not None)]
        room = 0.06 * (max(ends) - min(ends)) or 0.1
        axes.set_xlim(min(ends) - room, max(ends) + room)
        axes.set_xlabel(axis)

    return chart(draw, name, title, _height(items))


def line(
    x: Sequence[float], y: Sequence[float], name: str, title: str, labels: tuple[str, str]
) -> Markup:
    """Draw one line; ``labels`` are those of the axes."""

    def draw(figure: Figure) -> None:
        width, height = figure.get_size_inches() * 72
        left = 52
        axes = figure.add_axes(
            (left / width, 44 / height, 1 - (left + 12) / width, 1 - 56 / height)
        )
        axes.plot(x, y, color=ACCENT, linewidth=1.5)
        axes.set_ylim(bottom=0)
        axes.yaxis.label.set_color(MUTED)
        axes.tick_params(axis="y", labelcolor=MUTED, labelsize=11)
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.locator_params(axis="x", nbins=5)

    return chart(draw, name, title, 200)


def _height(items: Sequence[Item]) -> float:
    return _ROW * len(items) + _AXIS + 16


def _rows(figure: Figure, items: Sequence[Item]) -> Axes:
    """Return axes with one labelled row for each item, the first on top."""
    width, height = figure.get_size_inches() * 72
    narrow = width <= NARROW
    labels = [clip(item.label, 22 if narrow else 34) for item in items]
    notes = [item.short if narrow else item.note for item in items]
    left = _CHARACTER * max(map(len, labels)) + 14
    right = _CHARACTER * max(map(len, notes)) + 18
    axes = figure.add_axes(
        (left / width, _AXIS / height, 1 - (left + right) / width, 1 - (_AXIS + 6) / height)
    )
    axes.set_yticks(range(len(items)), labels)
    axes.set_ylim(len(items) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.locator_params(axis="x", nbins=4 if narrow else 7)
    for y, note in enumerate(notes):
        axes.text(1.0, y, f"  {note}", transform=axes.get_yaxis_transform(), va="center")
    return axes


def _whisker(axes: Axes, y: int, item: Item) -> None:
    if item.low is None or item.high is None:
        return
    axes.plot([item.low, item.high], [y, y], color=INK, linewidth=1.5)
    for end in (item.low, item.high):
        axes.plot([end, end], [y - _CAP, y + _CAP], color=INK, linewidth=1.5)
