"""Pictures of the weights' masks: which tiles hold something, arm by arm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.figure import Figure

from icd_tvm.report.heat_map import show
from icd_tvm.report.run_files import TilePicture
from icd_tvm.report.svg import MUTED, inline_svg
from icd_tvm.report.values import text

_TITLES = {"identity": "as it comes", "linear": "first order", "iterative": "re-permuted"}
_SIDE, _GAP, _HEAD = 190, 16, 24


@dataclass(frozen=True)
class TileMap:
    """The pictures of one weight, and what each order leaves: title and phrase."""

    weight: str
    svg: Markup
    counts: dict[str, str]


def tile_maps(tiles: Mapping[str, Mapping[str, TilePicture]]) -> list[TileMap]:
    """Draw every weight that is given, all of its orders side by side."""
    return [_map(weight, found, f"t{i}") for i, (weight, found) in enumerate(tiles.items())]


def _map(weight: str, tiles: Mapping[str, TilePicture], name: str) -> TileMap:
    shown = {_TITLES.get(arm, text(arm)): picture for arm, picture in tiles.items()}
    width, height = len(shown) * (_SIDE + _GAP), _HEAD + _SIDE + _GAP

    def draw(figure: Figure) -> None:
        for column, (title, picture) in enumerate(shown.items()):
            x, y = column * (_SIDE + _GAP) / width, _GAP / height
            axes = figure.add_axes((x, y, _SIDE / width, _SIDE / height))
            show(axes, picture.image, 1.0)
            axes.set_title(title, fontsize=12, color=MUTED)

    counts = {
        title: f"{picture.held:,} of {picture.total:,} ({100 * picture.held / picture.total:.1f} %)"
        for title, picture in shown.items()
    }
    said = ", ".join(f"{title} {count}" for title, count in counts.items())
    alt = f"Mask of {text(weight)}, tiles that hold a weight: {said}"
    return TileMap(text(weight), inline_svg(draw, name, alt, width, height, "map"), counts)
