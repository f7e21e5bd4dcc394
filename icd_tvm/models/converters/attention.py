"""Attention of the standard operator set (opset 23 and later)."""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np

from icd_tvm._tvm import relax
from icd_tvm.models.converters.attention_core import (
    MINUS_INFINITY,
    Attended,
    add_bias,
    attend,
    causal,
    constant_mask,
    masked,
    zero_unseen,
)
from icd_tvm.models.converters.heads import merge_heads, split_heads
from icd_tvm.models.converters.node import Converter, OnnxNode, cast, dtype_of, scalar, with_name

_Q, _K, _V, _MASK, _PAST_KEY, _PAST_VALUE, _LENGTHS = range(7)


def attention(node: OnnxNode) -> Any:
    """Convert to products and a softmax; a row that sees no key is zero."""
    rows = len(node.shape(node.input(_Q))) == 3
    query, key, value = (_heads(node, i, rows) for i in (_Q, _K, _V))
    past = 0
    if node.has(_PAST_KEY):
        past = node.shape(node.input(_PAST_KEY))[2]
        key = node.emit(relax.op.concat([node.input(_PAST_KEY), key], axis=2))
        value = node.emit(relax.op.concat([node.input(_PAST_VALUE), value], axis=2))
    bias = _bias(node, query, key, past)
    width = node.shape(query)[-1]
    scale = float(node.attr("scale", 1.0 / sqrt(width)))
    softcap = float(node.attr("softcap", 0.0))
    done = attend(node, query, key, value, scale=scale, bias=bias, softcap=softcap)
    shared = bias is None or len(node.shape(bias)) < 3 or node.shape(bias)[-3] == 1
    context = done.context
    if rows and shared:
        result = zero_unseen(node, merge_heads(node, context), bias, merged=True)
    else:
        result = zero_unseen(node, context, bias, merged=False)
        result = merge_heads(node, result) if rows else result
    return result, key, value, _stage(node, done, bias)


def _heads(node: OnnxNode, position: int, rows: bool) -> Any:
    value = node.input(position)
    count = "q_num_heads" if position == _Q else "kv_num_heads"
    return split_heads(node, value, int(node.required(count))) if rows else value


def _bias(node: OnnxNode, query: Any, key: Any, past: int) -> Any:
    """Return the sum of all masks, or None."""
    queries, keys = node.shape(query)[2], node.shape(key)[2]
    bias = _given_mask(node, keys, dtype_of(query))
    left, right = int(node.attr("left_window_size", -1)), int(node.attr("right_window_size", -1))
    if node.attr("is_causal", 0):
        right = 0
    if node.has(_LENGTHS):
        return add_bias(node, bias, _by_length(node, query, keys, left, right))
    if left < 0 and right < 0:
        return bias
    seen = causal(queries, keys, past, left, right)
    return add_bias(node, bias, constant_mask(node, seen, dtype_of(query)))


def _given_mask(node: OnnxNode, keys: int, dtype: str) -> Any:
    if not node.has(_MASK):
        return None
    mask = node.input(_MASK)
    if dtype_of(mask) == "bool":
        mask = masked(node, mask, dtype)
    shape = node.shape(mask)
    missing = keys - shape[-1]
    if missing > 0 and shape[-1] > 1:
        widths = [0] * (2 * len(shape) - 1) + [missing]
        mask = node.emit(relax.op.nn.pad(mask, widths, pad_value=MINUS_INFINITY))
    return mask


def _by_length(node: OnnxNode, query: Any, keys: int, left: int, right: int) -> Any:
    """Return the mask [B, 1, 1 or S, keys] of a cache with a number of keys in use a sequence."""
    queries, dtype = node.shape(query)[2], dtype_of(query)
    lengths = node.emit(relax.op.reshape(cast(node.input(_LENGTHS), "int64"), (-1, 1, 1, 1)))
    steps = with_name(np.arange(keys)[None, None, None, :], f"{node.name}.keys")
    bias = masked(node, node.emit(relax.op.less(steps, lengths)), dtype)
    if left < 0 and right < 0:
        return bias
    places = with_name(np.arange(queries)[None, None, :, None] - queries, f"{node.name}.queries")
    distance = node.emit(relax.op.subtract(node.emit(relax.op.add(lengths, places)), steps))
    if right >= 0:
        near = node.emit(relax.op.greater_equal(distance, scalar(-right, distance)))
        bias = add_bias(node, bias, masked(node, near, dtype))
    if left >= 0:
        near = node.emit(relax.op.less_equal(distance, scalar(left, distance)))
        bias = add_bias(node, bias, masked(node, near, dtype))
    return bias


def _stage(node: OnnxNode, done: Attended, bias: Any) -> Any:
    """Return the fourth output: scores, capped, biased, or probabilities."""
    if not node.wants(3):
        return None
    mode = int(node.attr("qk_matmul_output_mode", 0))
    stage = [done.scores, done.capped, done.biased, done.probabilities][mode]
    if mode == 3:
        stage = zero_unseen(node, stage, bias, merged=False)
    return node.emit(cast(stage, dtype_of(node.input(_Q))))


CONVERTERS: dict[tuple[str, str], Converter] = {("", "Attention"): attention}
