"""Pictures of the weights' masks: the share of non-zero weights in each tile, arm by arm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from numpy.typing import NDArray

from icd_tvm.report.heat_map import show
from icd_tvm.report.svg import MUTED, inline_svg
from icd_tvm.report.values import text

_TITLES = {"identity": "as it comes", "linear": "first order", "iterative": "re-permuted"}
_SIDE, _GAP, _HEAD, _LEFT = 190, 16, 24, 6
# A picture is at most this many times as long as it is wide.
_LONGEST = 4.0

Images = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class TileMap:
    """The pictures of one weight.

    Attributes
    ----------
    weight : str
    svg : Markup
    counts : list of (str, str, int, int)
        Order, its tiles along K x N, how many of them hold a weight, and how many there are.
    """

    weight: str
    svg: Markup
    counts: list[tuple[str, str, int, int]]


def tile_maps(tiles: Mapping[str, Images]) -> list[TileMap]:
    """Draw every weight that is given; all arms of a weight to one scale."""
    return [_map(name, images, f"t{i}") for i, (name, images) in enumerate(tiles.items())]


def _map(weight: str, images: Images, name: str) -> TileMap:
    shown = {_TITLES.get(arm, text(arm)): np.asarray(image) for arm, image in images.items()}
    counts = [
        (title, f"{image.shape[0]} × {image.shape[1]}", int((image > 0).sum()), image.size)
        for title, image in shown.items()
    ]
    longest = max(max(image.shape) for image in shown.values())
    across = max(image.shape[1] for image in shown.values()) / longest
    down = max(image.shape[0] for image in shown.values()) / longest
    wide, high = (_SIDE * max(share, 1 / _LONGEST) for share in (max(across, 0.6), down))
    width = _LEFT + len(shown) * (wide + _GAP)

    def draw(figure: Figure) -> None:
        for column, (title, image) in enumerate(shown.items()):
            x = (_LEFT + column * (wide + _GAP)) / width
            # An arm that computes less is drawn smaller, at the top left.
            tall = high * image.shape[0] / (longest * down)
            broad = wide * image.shape[1] / (longest * across)
            y = 1 - (_HEAD + tall) / (_HEAD + high + _GAP)
            axes = figure.add_axes((x, y, broad / width, tall / (_HEAD + high + _GAP)))
            show(axes, image, 1.0)
            axes.set_title(title, fontsize=12, color=MUTED, loc="left")

    said = ", ".join(f"{title} {count} of {total}" for title, _, count, total in counts)
    alt = f"Mask of {text(weight)}, tiles that hold a weight: {said}"
    svg = inline_svg(draw, name, alt, width, _HEAD + high + _GAP, "map")
    return TileMap(text(weight), svg, counts)
