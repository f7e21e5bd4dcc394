"""Pictures of W: the same matrix in the order it came in and in the orders decided for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from icd_tvm.core.cost import Csr
from icd_tvm.core.permutation import Perm
from icd_tvm.report.run_files import AxisGraph
from icd_tvm.report.svg import MUTED, inline_svg

MAX_PIXELS = 256
MAX_AXES = 6
TILE = 16
# Few levels, for a PNG of noise hardly compresses. One colour for a light and a dark page.
_LEVELS = 15
_COLOUR = (0x2F, 0x7D, 0xC4)
_SIDE, _GAP, _HEAD, _LEFT = 190, 16, 24, 22

Image = NDArray[np.float64]


@dataclass(frozen=True)
class HeatMap:
    """The pictures of one axis.

    Attributes
    ----------
    axis : str
    svg : Markup
    n : int
        Size of the axis.
    density : float
        Share of W's entries that are stored and not zero.
    occupied : dict of str to float
        Order -> share of W's tiles that hold a non-zero entry.
    tile : int
    source : str
    """

    axis: str
    svg: Markup
    n: int
    density: float
    occupied: dict[str, float]
    tile: int
    source: str


def heat_maps(graphs: Sequence[AxisGraph]) -> tuple[list[HeatMap], int]:
    """Draw the axes whose tiles the last order empties most; return how many are left out."""
    maps = [(graph, _occupancies(graph)) for graph in graphs]

    def emptied(pair: tuple[AxisGraph, dict[str, Image]]) -> float:
        shares = [float(np.mean(image > 0)) for image in pair[1].values()]
        return shares[-1] - shares[0]

    chosen = sorted(maps, key=emptied)[:MAX_AXES]
    pictures = [_picture(*pair, f"w{i}") for i, pair in enumerate(chosen)]
    return pictures, len(maps) - len(pictures)


def downsample(w: Csr, perm: Perm, pixels: int = MAX_PIXELS) -> Image:
    """Return the mean of ``w[perm][:, perm]`` under each pixel.

    Parameters
    ----------
    w : csr_matrix [n, n]
    perm : int32[n]
    pixels : int
        Upper bound of the picture's side.

    Returns
    -------
    ndarray, float64 [k, k]
        ``k = min(n, pixels)``.
    """
    n = w.shape[0]
    k = min(n, pixels)
    area = np.bincount(np.arange(n) * k // n, minlength=k)
    return _binned(w, perm, np.arange(n) * k // n, k, w.data) / np.outer(area, area)


def occupancy(w: Csr, perm: Perm, tile: int = TILE) -> Image:
    """Return the share of entries of ``w[perm][:, perm]`` that are not zero, tile by tile."""
    n = w.shape[0]
    k = -(-n // tile)
    extent = np.bincount(np.arange(n) // tile, minlength=k)
    present = (w.data != 0).astype(np.float64)
    return _binned(w, perm, np.arange(n) // tile, k, present) / np.outer(extent, extent)


def _binned(w: Csr, perm: Perm, bins: NDArray[np.int64], k: int, values: Image) -> Image:
    place = np.empty(perm.size, dtype=np.int64)
    place[perm] = bins
    rows = np.repeat(place, np.diff(w.indptr))
    flat = np.bincount(rows * k + place[w.indices], weights=values, minlength=k * k)
    return np.asarray(flat, dtype=np.float64).reshape(k, k)


def _tile(n: int) -> int:
    """Return the tile's side: that of the kernels, or more where the picture would be too big."""
    tile = TILE
    while -(-n // tile) > MAX_PIXELS:
        tile *= 2
    return tile


def _occupancies(graph: AxisGraph) -> dict[str, Image]:
    tile = _tile(graph.w.shape[0])
    return {title: occupancy(graph.w, perm, tile) for title, perm in graph.orders.items()}


def _picture(graph: AxisGraph, tiles: dict[str, Image], name: str) -> HeatMap:
    n = graph.w.shape[0]
    weights = {title: downsample(graph.w, perm) for title, perm in graph.orders.items()}
    shares = {title: float(np.mean(image > 0)) for title, image in tiles.items()}
    width = _LEFT + len(weights) * (_SIDE + _GAP)
    height = 2 * (_SIDE + _GAP) + _HEAD

    def draw(figure: Figure) -> None:
        for row, (label, images) in enumerate((("W", weights), ("tiles", tiles))):
            top = _scale(images)
            for column, (title, image) in enumerate(images.items()):
                x = (_LEFT + column * (_SIDE + _GAP)) / width
                y = 1 - (_HEAD + row * (_SIDE + _GAP) + _SIDE) / height
                axes = figure.add_axes((x, y, _SIDE / width, _SIDE / height))
                show(axes, image, top)
                axes.set_title(title if row == 0 else "", fontsize=12, color=MUTED)
                axes.set_ylabel(label if column == 0 else "")

    said = ", ".join(f"{title} {100 * share:.0f} %" for title, share in shares.items())
    alt = f"W of {graph.axis} as heat maps; tiles that hold an entry: {said}"
    svg = inline_svg(draw, name, alt, width, height, "map")
    return HeatMap(graph.axis, svg, n, graph.w.nnz / n**2, shares, _tile(n), graph.source)


def _scale(images: dict[str, Image]) -> float:
    """Return the value of full colour, the same for all orders."""
    present = np.concatenate([image[image > 0] for image in images.values()])
    return float(np.percentile(present, 99)) if present.size else 1.0


def show(axes: Axes, image: Image, top: float) -> None:
    """Draw a picture whose full colour is ``top``; zero is the paper."""
    levels = np.ceil(np.clip(image / top, 0, 1) * _LEVELS) / _LEVELS
    pixels = np.empty((*image.shape, 4), dtype=np.uint8)
    pixels[..., :3] = _COLOUR
    pixels[..., 3] = np.round(255 * levels)
    axes.imshow(pixels, interpolation="none", aspect="auto")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(True)
