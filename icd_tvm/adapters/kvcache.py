"""Drop tokens of a KV cache, compact what is left into whole pages, store it in 8 bits."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from icd_tvm.adapters.arrays import Array, Bool, Index, require_finite, require_real
from icd_tvm.adapters.kv_loss import cache_loss
from icd_tvm.adapters.kv_pages import KVCache, KVScales, break_even_steps, compact
from icd_tvm.adapters.kv_quant import DTYPES, KVDtype, quantize_pages
from icd_tvm.adapters.kv_select import (
    SCOPES,
    SCORES,
    Scope,
    Score,
    attention_mass,
    kept_tokens,
    token_scores,
)
from icd_tvm.adapters.units import kept_count
from icd_tvm.errors import ConfigError, ShapeError, TransformError

__all__ = ["KVCache", "KVScales", "apply_kvcache", "break_even_steps", "compact"]


@dataclass(frozen=True)
class _Request:
    block: int
    drop: float
    score: Score
    scope: Scope
    keep_sinks: int
    keep_recent: int
    dtype: KVDtype | None


def apply_kvcache(
    cache: KVCache,
    block: int = 128,
    drop: float = 0.1,
    score: Score | None = None,
    scope: Scope = "per_head",
    keep_sinks: int = 4,
    keep_recent: int = 16,
    dtype: KVDtype | None = None,
    attention: Array | None = None,
) -> tuple[KVCache, dict[str, Any]]:
    """Drop tokens, compact the rest, and quantise it if asked.

    Kept tokens stay in order and become contiguous, so that the pages behind them are free:
    without the copy nearly every page still holds a kept token and nothing is freed.

    Parameters
    ----------
    cache : KVCache
        Not modified. A compacted cache may be compacted again; its index map is composed.
    block : int
        Tokens of a page.
    drop : float
        Share of the tokens of every head to drop, in [0, 1).
    score : {"attention_mass", "key_norm", "recency"}, optional
        What makes a token worth keeping; ``attention_mass`` when attention is given, else
        ``key_norm``. See :func:`icd_tvm.adapters.kv_select.token_scores`.
    scope : {"per_head", "shared"}
        Each head keeps tokens of its own, or all heads of a layer keep the same.
    keep_sinks, keep_recent : int
        First and last tokens that are never dropped.
    dtype : {"int8", "fp8_e4m3"}, optional
        Storage of the result, with one float32 scale for every channel of every page.
    attention : float array, optional
        Shape [(layers,) query heads, queries, tokens], or without ``queries`` its sum over
        them; the query heads are a multiple of the KV heads. With queries the loss of the
        attention output is measured too.

    Returns
    -------
    cache : KVCache
        Copies, ``positions`` set.
    meta : dict
        JSON-serialisable: ``kind, type, rate, shape, density, params, tokens, pages, copy, loss,
        bytes_before, bytes_after, format, groups, delta_layout, skipped, why``. ``bytes_*``
        count whole pages (and scales). ``copy`` holds the bytes that compaction moves and the
        decode steps after which it has paid, a model: see :func:`break_even_steps`.
        ``loss.frobenius`` counts dropped rows as zeros, ``loss.quant`` sees storage alone,
        ``loss.output`` is the relative error of ``attention @ values``, renormalised over the
        kept tokens, and does not see quantised keys. A request that cannot change the cache
        leaves it as it is, warns unless nothing was asked for, and says ``why``.

    Raises
    ------
    ConfigError
        Unknown name, a number out of range, or ``attention_mass`` without attention.
    ShapeError
        Keys, values, positions or attention that do not belong together.
    NonFiniteError
        NaN or infinity inside.
    TransformError
        The cache is quantised already.
    """
    if score is None:
        score = "key_norm" if attention is None else "attention_mass"
    request = _Request(block, drop, score, scope, keep_sinks, keep_recent, dtype)
    _check_request(request)
    _check_cache(cache)
    keys, values = _with_layers(cache.keys), _with_layers(cache.values)
    flat = cache.keys.ndim == 3
    weights = None
    if attention is not None:
        weights = np.asarray(attention)[None] if flat else np.asarray(attention)
    mass = None if weights is None else attention_mass(weights, keys.shape[:3])
    scores = token_scores(keys, score, mass)
    count = max(kept_count(keys.shape[2], drop), min(keys.shape[2], keep_sinks + keep_recent))
    why = _why_not(request, keys.shape[2], count)
    if why:
        if drop > 0:
            warnings.warn(f"kvcache drop {drop} skipped: {why}", RuntimeWarning, stacklevel=2)
        if dtype is None:
            return _copy(cache), _skipped(request, keys, values, why)
    kept = kept_tokens(scores, count, keep_sinks, keep_recent, scope)
    small = compact(KVCache(keys, values, _positions(cache, keys.shape[:3])), kept)
    stored = _quantized(small, request)
    meta = _meta(request, keys, values, kept, stored)
    meta["loss"] = cache_loss((keys, values), kept, small, stored, weights)
    return (_first_layer(stored) if flat else stored), meta


def _check_request(request: _Request) -> None:
    for name, value, known in (
        ("score", request.score, SCORES),
        ("scope", request.scope, SCOPES),
        ("dtype", request.dtype, (None, *DTYPES)),
    ):
        if value not in known:
            raise ConfigError(
                f"unknown kvcache {name} {value!r}", f"known: {', '.join(map(str, known))}"
            )
    if not 0.0 <= request.drop < 1.0:
        raise ConfigError(f"drop {request.drop!r} is outside [0, 1)", "0.1 drops one token in ten")
    for name, size, least in (
        ("block", request.block, 1),
        ("keep_sinks", request.keep_sinks, 0),
        ("keep_recent", request.keep_recent, 0),
    ):
        if not isinstance(size, int | np.integer) or size < least:
            raise ConfigError(f"{name} {size!r} is not an integer of at least {least}")


def _check_cache(cache: KVCache) -> None:
    if not isinstance(cache, KVCache):
        raise ConfigError(f"cache is a {type(cache).__name__}", "pass KVCache(keys, values)")
    if cache.scales is not None:
        raise TransformError("the cache is quantised already", "call dequantized() first")
    for name, array in (("keys", cache.keys), ("values", cache.values)):
        if array.ndim not in (3, 4) or array.size == 0:
            raise ShapeError(
                f"{name} has shape {list(array.shape)}",
                "expected a non-empty [(layers,) heads, tokens, head_dim]",
            )
        require_real(array, name)
        require_finite(array, name)
    if cache.keys.shape[:-1] != cache.values.shape[:-1]:
        raise ShapeError(
            f"keys {list(cache.keys.shape)} and values {list(cache.values.shape)} differ",
            "same layers, heads and tokens",
        )
    if cache.positions is not None and cache.positions.shape != cache.keys.shape[:-1]:
        raise ShapeError(
            f"positions has shape {list(cache.positions.shape)}",
            f"expected {list(cache.keys.shape[:-1])}",
        )


def _with_layers(array: Array) -> Array:
    return array[None] if array.ndim == 3 else array


def _positions(cache: KVCache, shape: tuple[int, ...]) -> Index | None:
    return None if cache.positions is None else cache.positions.reshape(shape)


def _why_not(request: _Request, tokens: int, count: int) -> str:
    if request.drop == 0:
        return "drop 0 removes nothing"
    if count < tokens:
        return ""
    protected = request.keep_sinks + request.keep_recent
    if protected >= tokens:
        return f"all {tokens} tokens are sinks or recent (keep_sinks + keep_recent = {protected})"
    return f"{request.drop} of {tokens} tokens is less than one"


def _quantized(cache: KVCache, request: _Request) -> KVCache:
    if request.dtype is None:
        return cache
    keys, key_scales = quantize_pages(cache.keys, request.block, request.dtype)
    values, value_scales = quantize_pages(cache.values, request.block, request.dtype)
    scales = KVScales(request.dtype, request.block, key_scales, value_scales)
    return KVCache(keys, values, cache.positions, scales)


def _first_layer(cache: KVCache) -> KVCache:
    scales = cache.scales
    if scales is not None:
        scales = KVScales(scales.dtype, scales.block, scales.keys[0], scales.values[0])
    return KVCache(cache.keys[0], cache.values[0], cast(Index, cache.positions)[0], scales)


def _copy(cache: KVCache) -> KVCache:
    positions = cache.positions
    if positions is None:
        positions = np.broadcast_to(np.arange(cache.tokens), cache.keys.shape[:-1])
    return KVCache(cache.keys.copy(), cache.values.copy(), positions.astype(np.int32))


def _pages(tokens: int, block: int) -> int:
    return -(-tokens // block)


def _page_bytes(keys: Array, values: Array, block: int, extra: int = 0) -> int:
    """Bytes of one page of one head: keys, values, and ``extra`` bytes a channel for scales."""
    width = keys.shape[-1] * keys.itemsize + values.shape[-1] * values.itemsize
    return block * width + extra * (keys.shape[-1] + values.shape[-1])


def _common(request: _Request, keys: Array, values: Array) -> dict[str, Any]:
    rows = keys.shape[0] * keys.shape[1]
    pages = _pages(keys.shape[2], request.block)
    return {
        "kind": "kvcache",
        "type": "drop" if request.dtype is None else f"drop+{request.dtype}",
        "rate": float(request.drop),
        "shape": list(keys.shape),
        "params": {
            "block": int(request.block),
            "score": request.score,
            "scope": request.scope,
            "keep_sinks": int(request.keep_sinks),
            "keep_recent": int(request.keep_recent),
            "dtype": request.dtype,
        },
        "bytes_before": rows * pages * _page_bytes(keys, values, request.block),
    }


def _meta(
    request: _Request, keys: Array, values: Array, kept: Bool, stored: KVCache
) -> dict[str, Any]:
    rows, tokens, count = kept.shape[0] * kept.shape[1], kept.shape[2], stored.tokens
    before, after = _pages(tokens, request.block), _pages(count, request.block)
    starts = np.arange(0, tokens, request.block)
    touched = int(np.logical_or.reduceat(kept, starts, axis=-1).sum())
    scale_bytes = 4 if stored.scales is not None else 0
    page = _page_bytes(stored.keys, stored.values, request.block, scale_bytes)
    ratio = (stored.keys.nbytes + stored.values.nbytes) / (
        (keys.nbytes + values.nbytes) * count / tokens
    )
    read = (keys.nbytes + values.nbytes) * count // tokens
    meta = _common(request, keys, values)
    meta.update(
        {
            "density": count / tokens,
            "tokens": {"before": tokens, "after": count, "dropped": tokens - count},
            "pages": {
                "before": rows * before,
                "after": rows * after,
                "freed": rows * (before - after),
                "freed_without_compaction": rows * before - touched,
            },
            "copy": {
                "bytes_read": int(read),
                "bytes_written": stored.nbytes,
                "break_even_steps": break_even_steps(count / tokens, ratio),
                "source": "model",
            },
            "bytes_after": rows * after * page,
            "format": f"{stored.keys.dtype if stored.scales is None else request.dtype} pages "
            f"of {request.block} tokens, compacted",
            "groups": {"heads": kept.shape[1], "layers": kept.shape[0], "kept": count},
            "delta_layout": True,
            "skipped": False,
            "why": _reason(request, tokens - count, before - after),
        }
    )
    return meta


def _reason(request: _Request, dropped: int, freed: int) -> str:
    if not dropped:
        return "no token dropped; pages hold 8-bit codes"
    if freed:
        return "kept tokens are contiguous, whole pages behind them are free"
    return f"kept tokens are contiguous; fewer than {request.block} were dropped: no page is free"


def _skipped(request: _Request, keys: Array, values: Array, why: str) -> dict[str, Any]:
    meta = _common(request, keys, values)
    tokens = keys.shape[2]
    pages = keys.shape[0] * keys.shape[1] * _pages(tokens, request.block)
    meta.update(
        {
            "density": 1.0,
            "tokens": {"before": tokens, "after": tokens, "dropped": 0},
            "pages": {
                "before": pages,
                "after": pages,
                "freed": 0,
                "freed_without_compaction": 0,
            },
            "copy": {
                "bytes_read": 0,
                "bytes_written": 0,
                "break_even_steps": None,
                "source": "model",
            },
            "loss": {"frobenius": 0.0, "quant": 0.0, "output": 0.0},
            "bytes_after": meta["bytes_before"],
            "format": f"{keys.dtype} pages of {request.block} tokens",
            "groups": {},
            "delta_layout": False,
            "skipped": True,
            "why": why,
        }
    )
    return meta
