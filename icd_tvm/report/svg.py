"""Figures as SVG inside the page: live text, and colours that follow the page's theme."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import Any

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.figure import Figure

# What is drawn in these colours takes the page's.
INK, MUTED, ACCENT, RULE = "#010101", "#020202", "#030303", "#040404"
_PAGE_COLOURS = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    ACCENT: "var(--accent)",
    RULE: "var(--rule)",
}
WIDE, NARROW = 680, 340
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "icd",
    "figure.dpi": 72,
    "font.size": 12,
    "text.color": INK,
    # Names come from model files: a dollar sign is no formula.
    "text.parse_math": False,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 1,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 11,
    "savefig.transparent": True,
}

Draw = Callable[[Figure], None]


def chart(draw: Draw, name: str, title: str, height: float) -> Markup:
    """Draw a chart twice, for a screen and for a phone; the page shows one of them.

    Parameters
    ----------
    draw : callable
        Draws into the figure it is given, whose size in pixels is 72 times that in inches.
    name : str
        Unique in the page.
    title : str
        What the chart says, for those who do not see it.
    height : float
        Pixels.
    """
    parts = [
        inline_svg(draw, f"{name}-{kind}", title, width, height, kind)
        for kind, width in (("wide", WIDE), ("narrow", NARROW))
    ]
    return Markup("").join(parts)


def inline_svg(
    draw: Draw, name: str, title: str, width: float, height: float, kind: str = ""
) -> Markup:
    """Draw a figure and return its SVG element; see :func:`chart`."""
    stream = io.StringIO()
    with rc_context(_STYLE), warnings.catch_warnings():
        # The reader's fonts draw the text, not matplotlib's.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure = Figure(figsize=(width / 72, height / 72))
        draw(figure)
        figure.savefig(stream, format="svg", metadata={"Date": None})
    body = stream.getvalue()
    body = body[body.index("<svg") :]
    body = body[body.index(">") + 1 :]
    head = Markup(
        '<svg class="chart {kind}" viewBox="0 0 {width:g} {height:g}" role="img" '
        'aria-labelledby="{name}-title"><title id="{name}-title">{title}</title>'
    ).format(kind=kind, width=width, height=height, name=name, title=title)
    return head + Markup(_themed(body, str(escape(name))))


def _themed(body: str, name: str) -> str:
    """Drop what the page does not need, and adapt the tags; text between them stays as it is."""
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r"<[^>]+>", lambda tag: _tag(tag[0], name), body)
    return re.sub(r"\n\s*", "\n", body).strip()


def _tag(tag: str, name: str) -> str:
    tag = re.sub(r'<g id="[^"]*"', "<g", tag)
    # An id must be the only one of its name in the whole page.
    tag = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", tag)
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag)
    for colour, variable in _PAGE_COLOURS.items():
        tag = tag.replace(colour, variable)
    return tag
