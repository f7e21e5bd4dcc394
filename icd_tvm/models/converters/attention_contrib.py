"""Attention and MultiHeadAttention of com.microsoft."""

from __future__ import annotations

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
from icd_tvm.models.converters.node import Converter, OnnxNode, dtype_of, scalar, with_name
from icd_tvm.models.converters.products import matmul

_MASK_VALUE = -10000.0


def attention(node: OnnxNode) -> Any:
    """Convert Attention: one product makes queries, keys and values."""
    node.allow({"do_rotary": (0,), "past_present_share_buffer": (0,)})
    if node.has(6):
        raise node.refuse("past_sequence_length (input 6) is given")
    product = matmul(node, node.input(0), node.input(1))
    if node.has(2):
        product = node.emit(relax.op.add(product, node.input(2)))
    return attend_rows(
        node, product, mask=node.optional(3), past=node.optional(4), bias=node.optional(5)
    )


def attend_rows(node: OnnxNode, product: Any, *, mask: Any, past: Any, bias: Any) -> Any:
    """Return the outputs of Attention from rows that hold queries, keys and values.

    Parameters
    ----------
    node : OnnxNode
    product : relax.Expr
        [B, S, Dq + Dk + Dv].
    mask : relax.Expr or None
    past : relax.Expr or None
        [2, B, N, P, H].
    bias : relax.Expr or None
        Added to the scores.
    """
    width = node.shape(product)[-1]
    sizes = node.attr("qkv_hidden_sizes", None) or [width // 3] * 3
    cuts = [int(cut) for cut in np.cumsum(sizes)[:2]]
    heads = int(node.required("num_heads"))
    query, key, value = (
        split_heads(node, part, heads) for part in pieces(node, product, cuts, axis=-1)
    )
    if past is not None:
        old = [_first(node, part) for part in pieces(node, past, 2, axis=0)]
        key = node.emit(relax.op.concat([old[0], key], axis=2))
        value = node.emit(relax.op.concat([old[1], value], axis=2))
    context = _context(node, query, key, value, mask=mask, bias=bias)
    present = None
    if node.wants(1):
        present = relax.op.concat([relax.op.expand_dims(x, 0) for x in (key, value)], axis=0)
    return context, present


def _first(node: OnnxNode, part: Any) -> Any:
    return node.emit(relax.op.reshape(part, node.shape(part)[1:]))


def multi_head_attention(node: OnnxNode) -> Any:
    """Convert MultiHeadAttention: separate, or packed, queries, keys and values.

    Past keys and values, where given, come before the new ones.
    """
    for position, name in ((8, "past_sequence_length"), (9, "cache_indirection")):
        if node.has(position):
            raise node.refuse(f"{name} (input {position}) is given")
    if node.wants(3):
        raise node.refuse("its output qk is used")
    query, key, value = _operands(node)
    if node.has(6):
        key = node.emit(relax.op.concat([node.input(6), key], axis=2))
        value = node.emit(relax.op.concat([node.input(7), value], axis=2))
    context = _context(node, query, key, value, mask=node.optional(4), bias=node.optional(5))
    return context, key, value


def _operands(node: OnnxNode) -> tuple[Any, Any, Any]:
    """Return queries, keys and values as heads, with their biases."""
    heads = int(node.required("num_heads"))
    rows = _rows(node)
    if node.has(3):
        biases = _biases(node, rows)
        rows = [row if b is None else node.emit(relax.op.add(row, b)) for row, b in biases]
    query, key, value = (
        row if len(node.shape(row)) == 4 else split_heads(node, row, heads) for row in rows
    )
    return query, key, value


def _rows(node: OnnxNode) -> list[Any]:
    """Return [B, S, N * H] queries, keys and values; cached keys and values as heads."""
    query = node.input(0)
    if len(node.shape(query)) == 5:
        return [_unpacked(node, part) for part in pieces(node, query, 3, axis=3)]
    key = node.input(1)
    if len(node.shape(key)) == 5:
        return [query, *(_unpacked(node, part) for part in pieces(node, key, 2, axis=3))]
    return [query, key, node.input(2)]


def _unpacked(node: OnnxNode, part: Any) -> Any:
    batch, length, heads, _, size = node.shape(part)
    return node.emit(relax.op.reshape(part, (batch, length, heads * size)))


def _biases(node: OnnxNode, rows: list[Any]) -> list[tuple[Any, Any]]:
    """Pair the rows with their parts of the bias; cached keys and values have theirs already."""
    width = node.shape(rows[0])[-1]
    parts = pieces(node, node.input(3), [width, 2 * width], axis=0)
    cached = len(node.shape(rows[1])) == 4
    return [
        (rows[0], parts[0]),
        *((r, None if cached else p) for r, p in zip(rows[1:], parts[1:], strict=True)),
    ]


def _context(node: OnnxNode, query: Any, key: Any, value: Any, *, mask: Any, bias: Any) -> Any:
    """Return the merged heads of the attention."""
    queries, size = node.shape(query)[2:]
    keys, dtype = node.shape(key)[2], dtype_of(query)
    low = float(node.attr("mask_filter_value", _MASK_VALUE))
    total = None if mask is None else _padding(node, mask, keys, dtype, low)
    if node.attr("unidirectional", 0):
        seen = causal(queries, keys, keys - queries, right=0)
        total = add_bias(node, total, constant_mask(node, seen, dtype))
    total = add_bias(node, total, bias)
    scale = float(node.attr("scale", 0.0)) or 1.0 / sqrt(size)
    return merge_heads(node, attend(node, query, key, value, scale=scale, bias=total).context)


def _padding(node: OnnxNode, mask: Any, keys: int, dtype: str, low: float) -> Any:
    """Return the additive form [B, 1, 1 or S, keys] of a mask [B, keys], [B, S, keys] or [B]."""
    shape = node.shape(mask)
    if len(shape) == 1:
        batch = node.shape(node.input(0))[0]
        if shape[0] != batch:
            raise node.refuse(f"a mask of {shape[0]} lengths for a batch of {batch}")
        steps = with_name(np.arange(keys, dtype=dtype_of(mask))[None, :], f"{node.name}.keys")
        lengths = node.emit(relax.op.expand_dims(mask, 1))
        allowed = node.emit(relax.op.less(steps, lengths))
    elif len(shape) in (2, 3) and shape[-1] == keys:
        allowed = node.emit(relax.op.greater(mask, scalar(0, mask)))
    else:
        raise node.refuse(f"a mask of shape {shape} for {keys} keys")
    axes = [1] if len(shape) == 3 else [1, 2]
    return masked(node, node.emit(relax.op.expand_dims(allowed, axes)), dtype, low)


CONVERTERS: dict[tuple[str, str], Converter] = {
    ("com.microsoft", "Attention"): attention,
    ("com.microsoft", "MultiHeadAttention"): multi_head_attention,
}
