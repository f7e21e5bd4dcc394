"""A KV cache, and the copy that makes its kept tokens contiguous."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from icd_tvm.adapters.arrays import Array, Bool, Index
from icd_tvm.adapters.kv_quant import KVDtype, dequantize_pages
from icd_tvm.errors import ShapeError, TransformError


@dataclass(frozen=True)
class KVScales:
    """How a cache is quantised.

    Attributes
    ----------
    dtype : {"int8", "fp8_e4m3"}
    block : int
        Tokens that share a scale.
    keys, values : float32 arrays, shape [(layers,) heads, pages, head_dim]
    """

    dtype: KVDtype
    block: int
    keys: Array
    values: Array


@dataclass(frozen=True)
class KVCache:
    """Keys and values of one sequence.

    Attributes
    ----------
    keys, values : arrays, shape [(layers,) heads, tokens, head_dim]
        The values may have another head_dim. Codes when ``scales`` is set.
    positions : int32 array, shape [(layers,) heads, tokens], optional
        The index map: the place every token had before tokens were dropped; None means
        0, 1, 2 ...
    scales : KVScales, optional
        Set when keys and values are stored in 8 bits.
    """

    keys: Array
    values: Array
    positions: Index | None = None
    scales: KVScales | None = None

    @property
    def tokens(self) -> int:
        """Tokens of every head."""
        return int(self.keys.shape[-2])

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and scales, without the index map."""
        extra = self.scales.keys.nbytes + self.scales.values.nbytes if self.scales else 0
        return int(self.keys.nbytes + self.values.nbytes + extra)

    def dequantized(self) -> KVCache:
        """Return the cache in float32, or itself if it is not quantised."""
        if self.scales is None:
            return self
        block, dtype = self.scales.block, self.scales.dtype
        keys = dequantize_pages(self.keys, self.scales.keys, block, dtype)
        values = dequantize_pages(self.values, self.scales.values, block, dtype)
        return KVCache(keys, values, self.positions)


def compact(cache: KVCache, kept: Bool) -> KVCache:
    """Copy the kept tokens of every head to the front, in order.

    Parameters
    ----------
    cache : KVCache
        ``positions`` may be None.
    kept : bool array, shape [(layers,) heads, tokens]
        The same number of marks in every head.

    Returns
    -------
    KVCache
        ``keys[..., i, :]`` is the old ``keys[..., j, :]`` of the i-th kept place j;
        ``positions`` holds j, or the old cache's position of it.

    Raises
    ------
    ShapeError
        The mask does not fit the keys, or heads keep different numbers.
    TransformError
        The cache is quantised.
    """
    if cache.scales is not None:
        raise TransformError("a quantised cache cannot be compacted", "call dequantized() first")
    if kept.shape != cache.keys.shape[:-1] or kept.dtype != np.bool_:
        raise ShapeError(
            f"mask is {kept.dtype} {list(kept.shape)}",
            f"expected bool {list(cache.keys.shape[:-1])} like the keys",
        )
    counts = kept.sum(axis=-1)
    if counts.min() != counts.max():
        raise ShapeError(
            f"heads keep between {counts.min()} and {counts.max()} tokens", "keep the same number"
        )
    count = int(counts.flat[0])
    places = np.nonzero(kept)[-1].reshape(*kept.shape[:-1], count)
    rows = places[..., None]
    positions = places
    if cache.positions is not None:
        positions = np.take_along_axis(np.asarray(cache.positions), places, axis=-1)
    return KVCache(
        np.take_along_axis(cache.keys, rows, axis=-2),
        np.take_along_axis(cache.values, rows, axis=-2),
        positions.astype(np.int32),
    )


def break_even_steps(keep: float, ratio: float = 1.0) -> float | None:
    """Return the decode steps after which the compacting copy has paid for itself: a model.

    The copy reads ``keep`` of the cache and writes ``keep * ratio``; every later step reads
    ``1 - keep * ratio`` less. With ratio 1 that is ``2 * keep / (1 - keep)``. Memory bandwidth
    is the only cost.

    Parameters
    ----------
    keep : float
        Kept share of the tokens.
    ratio : float
        Bytes of a stored element over bytes before.

    Returns
    -------
    float or None
        None when the new cache is not smaller.
    """
    saved = 1.0 - keep * ratio
    return keep * (1.0 + ratio) / saved if saved > 0 else None
