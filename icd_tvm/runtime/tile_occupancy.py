"""Tiles of the weights that hold a non-zero, arm by arm: what an order does to a mask.

A tile is what a V-row kernel reads in one step: one row of the weight by 16 columns. ``tiles.npz``
of a run holds, for the weights whose tiles the orders empty most, ``WEIGHT|ARM|picture`` (float16,
the share of tiles under each pixel that hold something; rows along K) and ``WEIGHT|ARM|tiles``
(int64[2]: tiles that hold something, and all).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icd_tvm._tvm import GenericConst, const_name
from icd_tvm.files import write_atomically
from icd_tvm.runtime.arms import IDENTITY, ITERATIVE, LINEAR, Arm

COLUMNS = 16
# A report shows a few; a model has hundreds.
MAX_WEIGHTS = 6
MAX_PIXELS = 192
# With fewer zeros hardly a tile is empty in any order.
MOST_DENSITY = 0.95
ORDERS = (IDENTITY, LINEAR, ITERATIVE)


@dataclass(frozen=True)
class Tiles:
    """Tiles of one weight: a picture of those that hold something, their number, and of all."""

    picture: NDArray[np.float16]
    held: int
    total: int


def tile_occupancy(arms: Mapping[str, Arm]) -> dict[str, dict[str, Tiles]]:
    """Return weight -> arm -> its tiles.

    Parameters
    ----------
    arms : mapping of str to Arm
        Those of :data:`ORDERS` are looked at.

    Returns
    -------
    dict
        At most :data:`MAX_WEIGHTS` weights, those whose tiles the last order empties most first.
    """
    found: dict[str, dict[str, Tiles]] = {}
    for name in ORDERS:
        if name in arms:
            for weight, array in _masked(arms[name].mod):
                if name == IDENTITY or weight in found:
                    found.setdefault(weight, {})[name] = occupancy(array != 0)
    moved = {weight: images for weight, images in found.items() if len(images) > 1}
    return dict(sorted(moved.items(), key=_left)[:MAX_WEIGHTS])


def occupancy(mask: NDArray[np.bool_]) -> Tiles:
    """Return the tiles of a matrix [K, N] that hold a True; those at the edge are narrower."""
    starts = np.arange(0, mask.shape[1], COLUMNS)
    held = np.logical_or.reduceat(mask, starts, axis=1)
    # Neighbours share a pixel where there are too many.
    rows, columns = (-(-size // MAX_PIXELS) for size in held.shape)
    sums = np.add.reduceat(held.astype(np.int64), np.arange(0, held.shape[0], rows), axis=0)
    sums = np.add.reduceat(sums, np.arange(0, held.shape[1], columns), axis=1)
    under = np.outer(_bins(held.shape[0], rows), _bins(held.shape[1], columns))
    return Tiles((sums / under).astype(np.float16), int(held.sum()), held.size)


def _bins(size: int, step: int) -> NDArray[np.int64]:
    return np.diff(np.append(np.arange(0, size, step), size))


def save_tiles(path: Path, tiles: Mapping[str, Mapping[str, Tiles]]) -> None:
    """Write ``tiles.npz`` whole.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    arrays: dict[str, Any] = {
        f"{weight}|{arm}|{part}": value
        for weight, found in tiles.items()
        for arm, one in found.items()
        for part, value in (("picture", one.picture), ("tiles", np.array([one.held, one.total])))
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
        if not name or len(shape) != 2 or min(shape) < COLUMNS:
            continue
        array = constant.value.numpy()
        if np.count_nonzero(array) <= MOST_DENSITY * array.size:
            yield name, array


def _left(item: tuple[str, Mapping[str, Tiles]]) -> float:
    """Return the tiles that hold something in the last order, as a share of those in the first."""
    held = [tiles.held for tiles in item[1].values()]
    return held[-1] / max(held[0], 1)
