"""Tiles of the weights that hold a non-zero, arm by arm: what an order does to a mask.

``tiles.npz`` of a run holds ``WEIGHT|ARM`` -> float16 [tiles along K, tiles along N], the share of
non-zero weights in each tile, for the weights whose tiles the orders empty most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icd_tvm._tvm import GenericConst, const_name
from icd_tvm.files import write_atomically
from icd_tvm.runtime.arms import IDENTITY, ITERATIVE, LINEAR, Arm

Image = NDArray[np.float16]
TILE = 16
# A report shows a few; a model has hundreds.
MAX_WEIGHTS = 6
MAX_TILES = 192
# With fewer zeros no tile is empty in any order.
MOST_DENSITY = 0.95
ORDERS = (IDENTITY, LINEAR, ITERATIVE)


def tile_occupancy(arms: Mapping[str, Arm]) -> dict[str, dict[str, Image]]:
    """Return weight -> arm -> share of non-zero weights in each tile.

    Parameters
    ----------
    arms : mapping of str to Arm
        Those of :data:`ORDERS` are looked at.

    Returns
    -------
    dict
        At most :data:`MAX_WEIGHTS` weights, those whose tiles the last order empties most first.
        A picture is of 16 x 16 tiles, or of larger ones where there would be too many.
    """
    found: dict[str, dict[str, Image]] = {}
    for name in ORDERS:
        if name in arms:
            for weight, array in _masked(arms[name].mod):
                if name == IDENTITY or weight in found:
                    found.setdefault(weight, {})[name] = occupancy(array != 0)
    moved = {weight: images for weight, images in found.items() if len(images) > 1}
    return dict(sorted(moved.items(), key=_left)[:MAX_WEIGHTS])


def occupancy(mask: NDArray[np.bool_]) -> Image:
    """Return the share of True in each tile of a matrix, float16 [k, n], edges included."""
    tile = TILE
    while max(mask.shape) > tile * MAX_TILES:
        tile *= 2
    edges = [np.arange(0, size, tile) for size in mask.shape]
    counts = np.add.reduceat(mask.astype(np.int32), edges[0], axis=0)
    counts = np.add.reduceat(counts, edges[1], axis=1)
    sizes = [np.diff([*edge, size]) for edge, size in zip(edges, mask.shape, strict=True)]
    return (counts / np.outer(*sizes)).astype(np.float16)


def save_tiles(path: Path, tiles: Mapping[str, Mapping[str, Image]]) -> None:
    """Write ``tiles.npz`` whole.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    arrays: dict[str, Any] = {
        f"{weight}|{arm}": image
        for weight, images in tiles.items()
        for arm, image in images.items()
    }

    def write(file: Path) -> None:
        with file.open("wb") as stream:
            np.savez_compressed(stream, **arrays)

    write_atomically(path, write)


def _masked(mod: Any) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the named matrices of ``main`` that have zeros."""
    bindings = (binding for block in mod["main"].body.blocks for binding in block.bindings)
    arguments = (a for binding in bindings for a in getattr(binding.value, "args", ()))
    constants = {const_name(a): a for a in arguments if isinstance(a, GenericConst)}
    for name, constant in constants.items():
        shape = tuple(map(int, constant.ty.shape.values))
        if not name or len(shape) != 2 or min(shape) < TILE:
            continue
        array = constant.value.numpy()
        if np.count_nonzero(array) <= MOST_DENSITY * array.size:
            yield name, array


def _left(item: tuple[str, Mapping[str, Image]]) -> float:
    """Return the tiles that hold something in the last order, as a share of those in the first."""
    shares = [np.count_nonzero(image) for image in item[1].values()]
    return float(shares[-1]) / max(float(shares[0]), 1.0)
