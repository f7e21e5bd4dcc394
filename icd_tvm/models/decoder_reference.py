"""A Llama-style decoder in plain numpy, with its attention and KV cache in the open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from icd_tvm.errors import ShapeError
from icd_tvm.models.decoder import DecoderConfig, rotary_tables
from icd_tvm.models.weights import Float32, Weights

Stored = Callable[[Float32], Float32]


@dataclass(frozen=True)
class DecoderRun:
    """What a forward pass leaves behind.

    Attributes
    ----------
    logits : float32 array, shape [tokens, vocab]
    keys, values : float32 arrays, shape [layers, kv_heads, past + tokens, depth]
        Rotated keys, and values; the past comes first.
    attention : float32 array, shape [layers, heads, tokens, past + tokens]; None if not asked for
    """

    logits: Float32
    keys: Float32
    values: Float32
    attention: Float32 | None


def run_decoder(
    config: DecoderConfig,
    weights: Weights,
    ids: NDArray[np.integer],
    past: tuple[Float32, Float32] | None = None,
    start: int = 0,
    with_attention: bool = False,
    stored: Stored = lambda rows: rows,
) -> DecoderRun:
    """Run tokens through a decoder.

    Parameters
    ----------
    config : DecoderConfig
    weights : mapping of str to ndarray of float32
        See `icd_tvm.models.decoder.decoder_shapes`.
    ids : int array, shape [tokens]
    past : (keys, values), optional
        Each [layers, kv_heads, past, depth]; every new token sees all of it. A compacted cache
        is fine, because keys carry their rotation.
    start : int
        Position of the first token.
    with_attention : bool
        Keep the attention weights.
    stored : callable, optional
        New rows of keys or values [kv_heads, tokens, depth] -> the same as the cache gives them
        back, of a cache that loses something. Attention reads what is stored.

    Returns
    -------
    DecoderRun

    Raises
    ------
    ShapeError
        No tokens, ids outside the vocabulary, or a past of another shape.
    """
    ids = np.asarray(ids)
    if ids.ndim != 1 or ids.size == 0 or ids.min() < 0 or ids.max() >= config.vocab:
        raise ShapeError(f"ids {list(ids.shape)} must be tokens in 0..{config.vocab - 1}")
    if past is None:
        empty = np.zeros((config.layers, config.kv_heads, 0, config.depth), np.float32)
        past = (empty, empty)
    wanted = (config.layers, config.kv_heads, past[0].shape[-2], config.depth)
    if past[0].shape != wanted or past[1].shape != wanted:
        raise ShapeError(f"past has shapes {past[0].shape} and {past[1].shape}, not {wanted}")
    rotary = rotary_tables(config, np.arange(start, start + len(ids)))
    hidden = weights["model.embed_tokens.weight"][ids]
    layers = []
    for index in range(config.layers):
        state = (past[0][index], past[1][index])
        hidden, *rest = _layer(config, weights, index, hidden, state, rotary, stored)
        layers.append(rest if with_attention else rest[:2])
    hidden = _rms_norm(hidden, weights["model.norm.weight"], config.eps)
    parts = [np.stack(part) for part in zip(*layers, strict=True)]
    logits = hidden @ weights["model.embed_tokens.weight"].T
    return DecoderRun(logits, parts[0], parts[1], parts[2] if with_attention else None)


def _rms_norm(value: Float32, weight: Float32, eps: float) -> Float32:
    mean = np.mean(value**2, axis=-1, keepdims=True)
    return np.asarray(value / np.sqrt(mean + np.float32(eps)) * weight, dtype=np.float32)


def _layer(
    config: DecoderConfig,
    weights: Weights,
    index: int,
    hidden: Float32,
    past: tuple[Float32, Float32],
    rotary: tuple[Float32, Float32],
    stored: Stored,
) -> tuple[Float32, Float32, Float32, Float32]:
    def dense(part: str, value: Float32) -> Float32:
        return np.asarray(value @ weights[f"model.layers.{index}.{part}.weight"].T)

    def norm(part: str, value: Float32) -> Float32:
        return _rms_norm(value, weights[f"model.layers.{index}.{part}.weight"], config.eps)

    inner = norm("input_layernorm", hidden)
    query = _rotate(_heads(dense("self_attn.q_proj", inner), config.depth), *rotary)
    key = _rotate(_heads(dense("self_attn.k_proj", inner), config.depth), *rotary)
    key = np.concatenate([past[0], stored(key)], axis=1)
    value = _heads(dense("self_attn.v_proj", inner), config.depth)
    value = np.concatenate([past[1], stored(value)], axis=1)
    attention = _attention(query, key)
    share = config.heads // config.kv_heads
    mixed = attention @ np.repeat(value, share, axis=0)
    mixed = mixed.transpose(1, 0, 2).reshape(hidden.shape)
    hidden = hidden + dense("self_attn.o_proj", mixed)
    inner = norm("post_attention_layernorm", hidden)
    gate = dense("mlp.gate_proj", inner)
    gate = gate / (1 + np.exp(-gate.clip(-80, 80)))
    hidden = hidden + dense("mlp.down_proj", gate * dense("mlp.up_proj", inner))
    return hidden, key, value, attention


def _heads(value: Float32, depth: int) -> Float32:
    return value.reshape(len(value), -1, depth).transpose(1, 0, 2)


def _rotate(value: Float32, cos: Float32, sin: Float32) -> Float32:
    half = value.shape[-1] // 2
    turned = np.concatenate([-value[..., half:], value[..., :half]], axis=-1)
    return np.asarray(value * cos + turned * sin)


def _attention(query: Float32, key: Float32) -> Float32:
    """Softmax of the scores, with every token blind for later ones."""
    tokens, total = query.shape[1], key.shape[1]
    wide = np.repeat(key, len(query) // len(key), axis=0)
    scores = query @ wide.transpose(0, 2, 1) / np.float32(np.sqrt(query.shape[-1]))
    future = np.arange(total) > np.arange(total - tokens, total)[:, None]
    scores = np.where(future, np.float32(-np.inf), scores)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(scores / scores.sum(axis=-1, keepdims=True), dtype=np.float32)
