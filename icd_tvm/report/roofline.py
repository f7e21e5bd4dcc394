"""The roofline of the arms: only from figures that the record holds.

Source: Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from icd_tvm.report.svg import ACCENT, INK, MUTED, RULE, chart
from icd_tvm.report.values import as_list, as_mapping, as_number, clip, dig, si, text

# Least distance of two names, as a share of the axes' height.
_LINE = 0.07


@dataclass(frozen=True)
class Point:
    """One arm or kernel: flop and DRAM bytes of a call, and its seconds."""

    name: str
    flop: float
    bytes: float
    seconds: float
    source: str

    @property
    def intensity(self) -> float:
        """Flop for each byte."""
        return self.flop / self.bytes

    @property
    def rate(self) -> float:
        """Flop in a second."""
        return self.flop / self.seconds


@dataclass(frozen=True)
class Roof:
    """What the machine can do: flop / s and bytes / s, and where that is from."""

    peak_flops: float
    dram_bandwidth: float
    source: str


def points(record: Mapping[str, Any]) -> tuple[list[Point], dict[str, list[str]]]:
    """Return what can be drawn, and what is lacking for which other arms.

    An arm needs ``flop`` (of a call), ``lat_ms`` and ``dram_bytes``, measured or from its cache
    model, or ``least_bytes``; ``roofline.points`` adds kernels as ``{name, flop, bytes, seconds,
    source}``.
    """
    found = list(_given(record))
    missing: dict[str, list[str]] = {}
    for name, arm in as_mapping(record.get("arms")).items():
        flop, ms = as_number(dig(arm, "flop")), as_number(dig(arm, "lat_ms", "median"))
        moved, source = _traffic(arm)
        needs = {"flop of a call": flop, "latency": ms, "bytes from memory": moved}
        lacks = [what for what, value in needs.items() if not value or value <= 0]
        if lacks or not (flop and ms and moved):
            missing.setdefault(f"no {' and no '.join(lacks)}", []).append(text(name))
        else:
            found.append(Point(text(name), flop, moved, ms * 1e-3, source))
    return found, missing


def roof(record: Mapping[str, Any]) -> Roof | None:
    """Return the machine's limits, where ``roofline`` has them."""
    peak, bandwidth = (
        as_number(dig(record, "roofline", key)) for key in ("peak_flops", "dram_bandwidth")
    )
    if not peak or not bandwidth or min(peak, bandwidth) <= 0:
        return None
    return Roof(peak, bandwidth, text(dig(record, "roofline", "source")))


def draw_roofline(found: list[Point], limits: Roof | None) -> Markup:
    """Draw points, filled where measured and hollow where modelled, under the roof if known."""

    def draw(figure: Figure) -> None:
        width, height = figure.get_size_inches() * 72
        axes = figure.add_axes((66 / width, 48 / height, 1 - 186 / width, 1 - 60 / height))
        axes.set(xscale="log", yscale="log", xlabel="flop / byte", ylabel="flop / s")
        _limit(axes, found, limits)
        axes.grid(True, color=RULE, linewidth=0.5)
        axes.tick_params(axis="y", labelcolor=MUTED, labelsize=11)
        for scale in (axes.xaxis, axes.yaxis):
            scale.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
            scale.set_major_formatter(FuncFormatter(lambda value, _: si(value)))
            scale.set_minor_formatter(NullFormatter())
        if limits is not None:
            _draw_roof(axes, limits)
        _draw_points(axes, found)

    names = ", ".join(f"{p.name} {p.intensity:.3g} flop/byte {p.rate:.3g} flop/s" for p in found)
    return chart(draw, "roofline", f"Roofline: {names}", 320)


def _limit(axes: Axes, found: list[Point], limits: Roof | None) -> None:
    xs, ys = [p.intensity for p in found], [p.rate for p in found]
    if limits is not None:
        xs.append(limits.peak_flops / limits.dram_bandwidth)
        ys.append(limits.peak_flops)
    axes.set_xlim(min(xs) / 3, max(xs) * 3)
    axes.set_ylim(min(ys) / 3, max(ys) * 3)


def _draw_roof(axes: Axes, limits: Roof) -> None:
    low, high = axes.get_xlim()
    xs = [low, limits.peak_flops / limits.dram_bandwidth, high]
    ys = [min(limits.peak_flops, limits.dram_bandwidth * x) for x in xs]
    axes.plot(xs, ys, color=INK, linewidth=1.5)


def _draw_points(axes: Axes, found: list[Point]) -> None:
    """Draw points, and their names in a column at the right, never closer than one line."""
    last = float("inf")
    for point in sorted(found, key=lambda p: -p.rate):
        fill = "none" if point.source == "model" else ACCENT
        axes.plot([point.intensity], [point.rate], "o", mfc=fill, mec=ACCENT)
        _, y = axes.transAxes.inverted().transform(
            axes.transData.transform((point.intensity, point.rate))
        )
        last = min(y, last - _LINE)
        axes.annotate(
            clip(point.name, 16),
            (point.intensity, point.rate),
            (1.03, last),
            textcoords=axes.transAxes,
            va="center",
            arrowprops={"arrowstyle": "-", "color": RULE, "shrinkB": 4},
        )


def _given(record: Mapping[str, Any]) -> Iterator[Point]:
    for item in as_list(dig(record, "roofline", "points")):
        values = [as_number(dig(item, key)) for key in ("flop", "bytes", "seconds")]
        if all(value and value > 0 for value in values):
            flop, moved, seconds = (value or 0.0 for value in values)
            source = text(dig(item, "source"))
            yield Point(text(dig(item, "name")), flop, moved, seconds, source)


def _traffic(arm: Any) -> tuple[float | None, str]:
    measured = as_number(dig(arm, "dram_bytes"))
    if measured is not None:
        return measured, text(dig(arm, "source", "dram_bytes"))
    modelled = as_number(dig(arm, "cache_model", "dram_bytes"))
    return modelled if modelled is not None else as_number(dig(arm, "least_bytes")), "model"
