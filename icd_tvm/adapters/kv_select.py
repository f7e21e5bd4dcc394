"""Which tokens of a KV cache stay: scores, and a mask that keeps the same number everywhere."""

from __future__ import annotations

from typing import Literal

import numpy as np

from icd_tvm.adapters.arrays import Array, Bool, Float64, require_finite, require_real
from icd_tvm.adapters.masks import top_mask
from icd_tvm.errors import ConfigError, ShapeError

Score = Literal["attention_mass", "key_norm", "recency"]
Scope = Literal["per_head", "shared"]
SCORES: tuple[Score, ...] = ("attention_mass", "key_norm", "recency")
SCOPES: tuple[Scope, ...] = ("per_head", "shared")


def token_scores(keys: Array, score: Score, mass: Float64 | None) -> Float64:
    """Return the score of every token, higher is better.

    Parameters
    ----------
    keys : float array, shape [layers, heads, tokens, head_dim]
    score : {"attention_mass", "key_norm", "recency"}
        Attention received (heavy hitters); minus the length of the key, because short keys
        attract attention; or the place in the cache.
    mass : float64 array, shape [layers, heads, tokens], optional
        Needed for ``attention_mass``.

    Returns
    -------
    float64 array, shape [layers, heads, tokens]

    Raises
    ------
    ConfigError
        ``attention_mass`` without a mass.

    Notes
    -----
    Zhang et al., "H2O", 2023 (mass); Devoto et al., "A simple and effective L2 norm-based
    strategy for KV cache compression", 2024 (norm); Xiao et al., "Efficient streaming language
    models with attention sinks", 2023 (recency and sinks).
    """
    if score == "recency":
        return np.broadcast_to(np.arange(keys.shape[2], dtype=np.float64), keys.shape[:3])
    if score == "key_norm":
        return -np.linalg.norm(keys.astype(np.float64), axis=-1)
    if mass is None:
        raise ConfigError(
            "score 'attention_mass' needs attention", "pass attention=, or use key_norm or recency"
        )
    return mass


def attention_mass(attention: Array, shape: tuple[int, ...]) -> Float64:
    """Sum attention over its queries, and over the query heads that share a KV head.

    Parameters
    ----------
    attention : float array, shape [layers, query heads, tokens] or [.., queries, tokens]
        Softmax output, or its sum over the queries.
    shape : (layers, heads, tokens)
        Of the keys; the query heads are a multiple of ``heads``.

    Returns
    -------
    float64 array, shape [layers, heads, tokens]

    Raises
    ------
    ShapeError
        Another shape or no numbers.
    NonFiniteError
        NaN or infinity inside.
    ConfigError
        A negative entry.
    """
    require_real(attention, "attention")
    layers, heads, tokens = shape
    fits = (
        attention.ndim in (3, 4)
        and (attention.shape[0], attention.shape[-1]) == (layers, tokens)
        and attention.shape[1] > 0
        and attention.shape[1] % heads == 0
    )
    if not fits:
        raise ShapeError(
            f"attention has shape {list(attention.shape)}",
            f"expected [{layers}, n * {heads}, (queries,) {tokens}] like the keys",
        )
    require_finite(attention, "attention")
    if (attention < 0).any():
        raise ConfigError("attention holds negative entries", "pass it after the softmax")
    mass = attention.astype(np.float64)
    if mass.ndim == 4:
        mass = mass.sum(axis=2)
    return mass.reshape(layers, heads, -1, tokens).sum(axis=2)


def kept_tokens(scores: Float64, count: int, sinks: int, recent: int, scope: Scope) -> Bool:
    """Mark the ``count`` best tokens of every head; sinks and recent ones always stay.

    Parameters
    ----------
    scores : float64 array, shape [layers, heads, tokens]
    count : int
        At least ``sinks + recent``, so that these fit.
    sinks, recent : int
        Tokens at the beginning and at the end that are never dropped.
    scope : {"per_head", "shared"}
        ``shared``: all heads of a layer keep the same tokens, by the sum of their scores.

    Returns
    -------
    bool array, shape [layers, heads, tokens], ``count`` marks in every row
    """
    tokens = scores.shape[-1]
    if scope == "shared":
        scores = np.broadcast_to(scores.sum(axis=1, keepdims=True), scores.shape)
    protected = np.zeros(tokens, dtype=np.bool_)
    protected[:sinks] = True
    protected[max(0, tokens - recent) :] = True
    return top_mask(np.where(protected, np.inf, scores), count, axis=-1)
