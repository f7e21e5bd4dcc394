"""GroupQueryAttention of com.microsoft: prompt and decoding with a key-value cache."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

from icd_tvm._tvm import relax
from icd_tvm.models.converters.attention_core import (
    add_bias,
    attend,
    causal,
    constant_mask,
    masked,
)
from icd_tvm.models.converters.heads import merge_heads, pieces, split_heads
from icd_tvm.models.converters.node import Converter, OnnxNode, cast, dtype_of, scalar, with_name
from icd_tvm.models.converters.rotary import look_up, rotate

_Q, _K, _V, _PAST_KEY, _PAST_VALUE, _LENGTHS, _TOTAL, _COS, _SIN, _POSITIONS, _BIAS = range(11)


@dataclass(frozen=True)
class _Cache:
    """Where the new tokens stand: ``used`` keys of every sequence come before them.

    ``used`` is int64[B, 1, 1, 1], or None in a prompt, where it is zero.
    """

    length: int
    used: Any


def group_query_attention(node: OnnxNode) -> Any:
    """Convert to products, a softmax and a cache that is rewritten as a whole.

    The total sequence length must be a constant, for it decides shapes; the lengths of the
    sequences may be known at run time only.
    """
    _check(node)
    query, key, value = _heads(node)
    cache = _cache(node, query)
    if node.attr("do_rotary", 0):
        query, key = _rotated(node, query, key, cache)
    key = _updated(node, node.optional(_PAST_KEY), key, cache)
    value = _updated(node, node.optional(_PAST_VALUE), value, cache)
    bias = _visible(node, query, cache)
    if node.has(_BIAS):
        bias = add_bias(node, bias, _fitted(node, node.input(_BIAS), cache.length))
    scale = float(node.attr("scale", 0.0)) or 1.0 / sqrt(node.shape(query)[-1])
    softcap = float(node.attr("softcap", 0.0))
    done = attend(node, query, key, value, scale=scale, bias=bias, softcap=softcap)
    return merge_heads(node, done.context), key, value


def _check(node: OnnxNode) -> None:
    node.allow(
        {
            "smooth_softmax": (0, -1),
            "qk_output": (0,),
            "k_quant_type": ("NONE",),
            "v_quant_type": ("NONE",),
        }
    )
    if any(node.has(i) for i in range(_BIAS + 1, len(node.inputs))):
        raise node.refuse("a head sink or a quantised cache is given")


def _heads(node: OnnxNode) -> tuple[Any, Any, Any]:
    heads, own = int(node.required("num_heads")), int(node.required("kv_num_heads"))
    rows = [node.input(_Q), node.optional(_K), node.optional(_V)]
    if rows[1] is None:
        size = node.shape(rows[0])[-1] // (heads + 2 * own)
        rows = pieces(node, rows[0], [heads * size, (heads + own) * size], axis=-1)
    query, key, value = (
        split_heads(node, row, count) for row, count in zip(rows, (heads, own, own), strict=True)
    )
    return query, key, value


def _cache(node: OnnxNode, query: Any) -> _Cache:
    total = int(node.constant(_TOTAL, "the total sequence length").reshape(()))
    past = node.shape(node.input(_PAST_KEY))[2] if node.has(_PAST_KEY) else 0
    batch, _, queries, _ = node.shape(query)
    if queries > total:
        raise node.refuse(f"{queries} new tokens in a total of {total}")
    if queries == total:
        return _Cache(max(past, total), None)
    lengths = cast(node.input(_LENGTHS), "int64")
    used = relax.op.add(lengths, relax.const(1 - queries, "int64"))
    return _Cache(max(past, total), node.emit(relax.op.reshape(used, (batch, 1, 1, 1))))


def _rotated(node: OnnxNode, query: Any, key: Any, cache: _Cache) -> tuple[Any, Any]:
    positions = node.input(_POSITIONS) if node.has(_POSITIONS) else _positions(node, query, cache)
    cos, sin = (look_up(node, node.input(i), positions) for i in (_COS, _SIN))
    style = bool(node.attr("rotary_interleaved", 0))
    turned = [rotate(node, part, cos, sin, interleaved=style) for part in (query, key)]
    return turned[0], turned[1]


def _positions(node: OnnxNode, query: Any, cache: _Cache) -> Any:
    batch, _, queries, _ = node.shape(query)
    steps = with_name(np.arange(queries, dtype=np.int64)[None, :], f"{node.name}.positions")
    if cache.used is None:
        return steps
    used = node.emit(relax.op.reshape(cache.used, (batch, 1)))
    return node.emit(relax.op.add(used, steps))


def _updated(node: OnnxNode, past: Any, new: Any, cache: _Cache) -> Any:
    """Return the cache [B, Nkv, length, H] with the new rows behind the used ones."""
    if cache.used is None:
        return _grown(node, new, cache.length)
    places = _arange(node, "places", cache.length, (1, 1, cache.length, 1))
    placed = _placed(node, new, places, cache)
    if past is None:
        return placed
    old = node.emit(relax.op.less(places, cache.used))
    return node.emit(relax.op.where(old, _grown(node, past, cache.length), placed))


def _placed(node: OnnxNode, new: Any, places: Any, cache: _Cache) -> Any:
    """Return the new rows at their places and zeros elsewhere."""
    queries = node.shape(new)[2]
    if queries == 1:
        here = node.emit(relax.op.equal(places, cache.used))
        return node.emit(relax.op.where(here, new, scalar(0.0, new)))
    # A product with a matrix of zeros and ones moves whole rows.
    steps = _arange(node, "steps", queries, (1, 1, 1, queries))
    here = node.emit(relax.op.equal(places, node.emit(relax.op.add(cache.used, steps))))
    move = node.emit(cast(here, dtype_of(new)))
    return node.emit(relax.op.matmul(move, new))


def _grown(node: OnnxNode, value: Any, length: int) -> Any:
    missing = length - node.shape(value)[2]
    if not missing:
        return value
    return node.emit(relax.op.nn.pad(value, [0, 0, 0, 0, 0, missing, 0, 0]))


def _visible(node: OnnxNode, query: Any, cache: _Cache) -> Any:
    """Return the causal mask, also of a sliding window."""
    queries, dtype = node.shape(query)[2], dtype_of(query)
    window = int(node.attr("local_window_size", -1))
    left = window - 1 if window > 0 else -1
    if cache.used is None:
        return constant_mask(node, causal(queries, cache.length, 0, left, 0), dtype)
    keys = _arange(node, "keys", cache.length, (1, 1, 1, cache.length))
    steps = _arange(node, "queries", queries, (1, 1, queries, 1))
    at = node.emit(relax.op.add(cache.used, steps))
    bias = masked(node, node.emit(relax.op.less_equal(keys, at)), dtype)
    if left < 0:
        return bias
    first = node.emit(relax.op.subtract(at, relax.const(left, "int64")))
    return add_bias(node, bias, masked(node, node.emit(relax.op.greater_equal(keys, first)), dtype))


def _fitted(node: OnnxNode, bias: Any, length: int) -> Any:
    missing = length - node.shape(bias)[-1]
    if missing <= 0:
        return bias
    return node.emit(relax.op.nn.pad(bias, [0] * 7 + [missing]))


def _arange(node: OnnxNode, name: str, count: int, shape: tuple[int, ...]) -> Any:
    return with_name(np.arange(count, dtype=np.int64).reshape(shape), f"{node.name}.{name}")


CONVERTERS: dict[tuple[str, str], Converter] = {
    ("com.microsoft", "GroupQueryAttention"): group_query_attention
}
