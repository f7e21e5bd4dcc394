"""Move between rows [B, S, N * H] and heads [B, N, S, H], and cut tensors."""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import relax
from icd_tvm.models.converters.node import OnnxNode

_SWAP = [0, 2, 1, 3]


def split_heads(node: OnnxNode, rows: Any, heads: int) -> Any:
    """Return [B, S, N * H] as [B, N, S, H]."""
    batch, length, width = node.shape(rows)
    if heads < 1 or width % heads:
        raise node.refuse(f"{heads} heads do not divide the width {width}")
    split = node.emit(relax.op.reshape(rows, (batch, length, heads, width // heads)))
    return node.emit(relax.op.permute_dims(split, _SWAP))


def merge_heads(node: OnnxNode, heads: Any) -> Any:
    """Return [B, N, S, H] as [B, S, N * H]."""
    batch, count, length, width = node.shape(heads)
    moved = node.emit(relax.op.permute_dims(heads, _SWAP))
    return node.emit(relax.op.reshape(moved, (batch, length, count * width)))


def repeat_heads(node: OnnxNode, heads: Any, count: int) -> Any:
    """Return [B, Nkv, S, H] with every head repeated in place until there are ``count``."""
    own = node.shape(heads)[1]
    if own == count:
        return heads
    if own < 1 or count % own:
        raise node.refuse(f"{own} key heads do not divide {count} query heads")
    return node.emit(relax.op.repeat(heads, count // own, axis=1))


def pieces(node: OnnxNode, value: Any, at: int | list[int], axis: int) -> list[Any]:
    """Split a tensor and return the parts."""
    parts = node.emit(relax.op.split(value, at, axis=axis))
    return [node.emit(relax.TupleGetItem(parts, i)) for i in range(len(parts.ty.fields))]
