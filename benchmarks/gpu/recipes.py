"""Weights of an arm, made on the GPU host: drawn from a seed, put in the arm's order, packed.

Libraries of the suite take their weights as parameters, because random weights cannot be compressed
and a slot on a GPU host takes files of a few MiB. A recipe holds what random numbers do not: which
rows and columns of the drawn weight lie where, what is pruned, and how the kernel wants it packed.
All arms of a case draw the same numbers, so they compute the same function. int8 weights are
quantised here, by column, as `ApplyQuant` does. Needs numpy only.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm.adapters.quant_scales import FORMATS, block_scales, encode
from icd_tvm.tir_schedules.cuda.gemm import LIVE_COLUMNS, live_blocks, pack_weight
from icd_tvm.tir_schedules.cuda.gemv import pack_vectors
from icd_tvm.tir_schedules.cuda.source_kernel import numpy_dtype

Array = npt.NDArray[Any]
PACKINGS = ("plain", "transposed", "gemm", "gemm live", "gemv", "gemv live")
# What products of codes keep beside a weight: a number for each of its columns.
COLUMNS = ("scale", "sums")
_INT8 = FORMATS["int8"]
# Columns that are quantised at once, in float64.
_TOGETHER = 512


@dataclass(frozen=True)
class Source:
    """Part of a drawn weight: ``drawn[rows][:, columns]``, zero where ``alive`` is false.

    Attributes
    ----------
    name : str
        The weight's ONNX name.
    rows, columns : int32 arrays
        Positions in the drawn weight, seen as a matrix of its last axis.
    alive : bool [rows, columns] or None
        None: nothing is pruned.
    """

    name: str
    rows: Array
    columns: Array
    alive: Array | None = None


@dataclass(frozen=True)
class Recipe:
    """How one parameter is made: sources side by side, then packed."""

    shape: tuple[int, ...]
    dtype: str
    packing: str
    sources: tuple[Source, ...]


@dataclass
class Draws:
    """Weights by name, drawn when they are first asked for.

    Attributes
    ----------
    about : mapping of str to (shape, mean, deviation, least, most)
        Beyond the last two nothing is drawn: rates of decay must stay negative, else states that
        are written in place grow from call to call.
    seed : int
    """

    about: Mapping[str, tuple[tuple[int, ...], float, float, float, float]]
    seed: int = 0
    _known: dict[str, Array] = field(default_factory=dict)

    def matrix(self, name: str) -> Array:
        """Return the weight, float32, as a matrix of its last axis."""
        if name not in self._known:
            shape, mean, deviation, least, most = self.about[name]
            rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
            values = rng.standard_normal(shape, dtype=np.float32)
            values *= np.float32(deviation)
            values += np.float32(mean)
            np.clip(values, np.float32(least), np.float32(most), out=values)
            self._known[name] = values.reshape(-1, shape[-1])
        return self._known[name]


def realise(recipe: Recipe, draws: Draws) -> Array:
    """Return the parameter that a recipe describes."""
    parts = [_taken(source, draws.matrix(source.name)) for source in recipe.sources]
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    if recipe.packing in COLUMNS:
        return by_column(whole, recipe.packing).astype(recipe.dtype).reshape(recipe.shape)
    return pack(rounded(whole, recipe.dtype), recipe.packing, recipe.shape)


def _taken(source: Source, drawn: Array) -> Array:
    taken = drawn
    for axis, index in enumerate((source.rows, source.columns)):
        if not np.array_equal(index, np.arange(drawn.shape[axis])):
            taken = np.take(taken, index, axis=axis)
    return taken if source.alive is None else taken * source.alive


def rounded(whole: Array, dtype: str) -> Array:
    """Return a float32 matrix [K, N] in a parameter's dtype; int8 are codes."""
    if dtype == "int8":
        return quantised(whole)[0]
    return np.asarray(whole.astype(numpy_dtype(dtype), copy=False))


def by_column(whole: Array, part: str) -> Array:
    """Return the scales [N] of a float32 matrix's int8 codes, or the ``sums`` of the codes."""
    codes, scales = quantised(whole)
    return scales if part == "scale" else codes.sum(axis=0, dtype=np.int64)


def quantised(whole: Array) -> tuple[Array, Array]:
    """Return int8 codes [K, N] and float32 scales [N]: what `ApplyQuant` makes of ``int8``.

    A column's scale depends on its largest element alone. Orders of rows and columns, and removed
    units, which are zero, thus leave both as they are.
    """
    codes, scales = np.empty(whole.shape, np.int8), np.empty(whole.shape[1], np.float32)
    for first in range(0, whole.shape[1], _TOGETHER):
        part = slice(first, first + _TOGETHER)
        values = whole[:, part].astype(np.float64)
        scales[part], zero = block_scales(values, _INT8, "ptq-minmax", True)
        codes[:, part] = encode(values, scales[part], zero, _INT8)
    return codes, scales


def pack(rounded: Array, packing: str, shape: tuple[int, ...]) -> Array:
    """Return a matrix [K, N] as the parameter's kernel wants it.

    Parameters
    ----------
    rounded : [K, N]
        In the parameter's dtype.
    packing : str
        One of :data:`PACKINGS`; ``live``: blocks of zeros are left out.
    shape : tuple of int
        Of the parameter; the third size of a ``gemm`` packing is the columns of its blocks.

    Raises
    ------
    ValueError
        If the matrix does not fit the shape.
    """
    if packing == "transposed":
        rounded = rounded.T
    elif packing.startswith("gemm"):
        blocks = live_blocks(rounded, shape[2]) if packing.endswith("live") else None
        rounded = pack_weight(rounded, shape[2], blocks)
    elif packing.startswith("gemv"):
        blocks = live_blocks(rounded, LIVE_COLUMNS) if packing.endswith("live") else None
        rounded = pack_vectors(rounded, str(rounded.dtype), blocks)
    return np.asarray(rounded.reshape(shape), order="C")


class Pool:
    """Arrays by their content: what several arms and shapes share is kept once."""

    def __init__(self, arrays: Mapping[str, Array] | None = None) -> None:
        self.arrays: dict[str, Array] = dict(arrays or {})

    def put(self, array: Array) -> str:
        """Keep an array; return its key."""
        data = np.asarray(array, order="C")
        digest = hashlib.sha256(f"{data.dtype.str}{data.shape}".encode() + data.tobytes())
        key = digest.hexdigest()[:24]
        self.arrays[key] = data
        return key

    def save(self, path: Path) -> None:
        """Write all arrays, compressed."""
        arrays: dict[str, Any] = self.arrays
        np.savez_compressed(path, **arrays)


def as_json(recipe: Recipe, pool: Pool) -> dict[str, Any]:
    """Return a recipe as plain JSON, its arrays in the pool."""
    sources = [
        {
            "name": source.name,
            "rows": pool.put(source.rows),
            "columns": pool.put(source.columns),
            "alive": None if source.alive is None else pool.put(np.packbits(source.alive, axis=1)),
        }
        for source in recipe.sources
    ]
    about = {"shape": list(recipe.shape), "dtype": recipe.dtype, "packing": recipe.packing}
    return about | {"sources": sources}


def from_json(about: Mapping[str, Any], pool: Pool) -> Recipe:
    """Return what `as_json` stored."""
    sources = []
    for item in about["sources"]:
        rows, columns = (pool.arrays[item[part]] for part in ("rows", "columns"))
        alive = None
        if item["alive"] is not None:
            bits = pool.arrays[item["alive"]]
            alive = np.unpackbits(bits, axis=1, count=len(columns)).astype(bool)
        sources.append(Source(item["name"], rows, columns, alive))
    return Recipe(tuple(about["shape"]), about["dtype"], about["packing"], tuple(sources))
