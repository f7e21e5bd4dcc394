"""Rotary position embedding (Su et al., RoFormer, 2021), of both domains."""

from __future__ import annotations

from typing import Any

import numpy as np

from icd_tvm._tvm import relax
from icd_tvm.models.converters.heads import merge_heads, pieces, split_heads
from icd_tvm.models.converters.node import Converter, OnnxNode, cast, with_name


def rotary_embedding(node: OnnxNode) -> Any:
    """Convert the standard operator: caches [positions, half] or, unindexed, [B, S, half]."""
    cos, sin = node.input(1), node.input(2)
    if node.has(3):
        cos, sin = (look_up(node, table, node.input(3)) for table in (cos, sin))
    return _rotate_input(node, cos, sin)


def contrib_rotary_embedding(node: OnnxNode) -> Any:
    """Convert the com.microsoft operator: inputs X, position ids, cos and sin cache.

    Position ids are [B, S], or one offset that the positions count from.
    """
    node.allow({"is_packed_batching": (0,), "scale": (1.0,)})
    positions = node.input(1)
    if len(node.shape(positions)) < 2:
        positions = _count_from(node, positions)
    cos, sin = (look_up(node, node.input(i), positions) for i in (2, 3))
    return _rotate_input(node, cos, sin)


def _count_from(node: OnnxNode, offset: Any) -> Any:
    length = node.shape(node.input(0))[-2]
    steps = with_name(np.arange(length, dtype=np.int64)[None, :], f"{node.name}.positions")
    offset = relax.op.reshape(cast(offset, "int64"), (1, 1))
    return node.emit(relax.op.add(offset, steps))


def look_up(node: OnnxNode, table: Any, positions: Any) -> Any:
    """Return the rows [B, S, half] of a cache [max positions, half]."""
    return node.emit(relax.op.take(table, positions, axis=0, mode="clip"))


def _rotate_input(node: OnnxNode, cos: Any, sin: Any) -> Any:
    """Rotate X of shape [B, S, N * H] or [B, N, S, H]."""
    data = node.input(0)
    shape = node.shape(data)
    interleaved = bool(node.attr("interleaved", 0))
    width = int(node.attr("rotary_embedding_dim", 0))
    if len(shape) == 4:
        return rotate(node, data, cos, sin, interleaved=interleaved, width=width)
    heads = int(node.attr("num_heads", 0)) or _count_heads(node, shape[-1], cos)
    split = split_heads(node, data, heads)
    return merge_heads(node, rotate(node, split, cos, sin, interleaved=interleaved, width=width))


def _count_heads(node: OnnxNode, hidden: int, cos: Any) -> int:
    if node.attr("rotary_embedding_dim", 0):
        raise node.refuse("attribute num_heads is missing")
    return hidden // (2 * node.shape(cos)[-1])


def rotate(
    node: OnnxNode, heads: Any, cos: Any, sin: Any, *, interleaved: bool, width: int = 0
) -> Any:
    """Rotate pairs of channels by the angle of their position.

    Parameters
    ----------
    node : OnnxNode
    heads : relax.Expr
        [B, N, S, H].
    cos, sin : relax.Expr
        [B or 1, S, width / 2].
    interleaved : bool
        Pairs are neighbours (2i, 2i + 1) if true, else (i, i + width / 2).
    width : int, optional
        Only the first ``width`` channels are rotated; 0 means all.

    Returns
    -------
    relax.Expr
        [B, N, S, H].
    """
    size = node.shape(heads)[-1]
    width = width or 2 * node.shape(cos)[-1]
    if width > size or 2 * node.shape(cos)[-1] != width:
        raise node.refuse(f"a cache of {node.shape(cos)[-1]} angles for heads of {size} channels")
    kept = None
    if width < size:
        heads, kept = pieces(node, heads, [width], axis=-1)
    cos, sin = (node.emit(relax.op.expand_dims(angle, 1)) for angle in (cos, sin))
    turn = _turn_neighbours if interleaved else _turn_halves
    turned = turn(node, heads, cos, sin)
    return turned if kept is None else node.emit(relax.op.concat([turned, kept], axis=-1))


def _turn_halves(node: OnnxNode, heads: Any, cos: Any, sin: Any) -> Any:
    first, second = pieces(node, heads, 2, axis=-1)
    return node.emit(relax.op.concat(_turn(node, first, second, cos, sin), axis=-1))


def _turn_neighbours(node: OnnxNode, heads: Any, cos: Any, sin: Any) -> Any:
    *lead, width = node.shape(heads)
    pairs = node.emit(relax.op.reshape(heads, (*lead, width // 2, 2)))
    cos, sin = (node.emit(relax.op.expand_dims(angle, -1)) for angle in (cos, sin))
    first, second = pieces(node, pairs, 2, axis=-1)
    turned = node.emit(relax.op.concat(_turn(node, first, second, cos, sin), axis=-1))
    return node.emit(relax.op.reshape(turned, (*lead, width)))


def _turn(node: OnnxNode, first: Any, second: Any, cos: Any, sin: Any) -> list[Any]:
    op = relax.op
    real = op.subtract(op.multiply(first, cos), op.multiply(second, sin))
    imaginary = op.add(op.multiply(first, sin), op.multiply(second, cos))
    return [node.emit(real), node.emit(imaginary)]


CONVERTERS: dict[tuple[str, str], Converter] = {
    ("", "RotaryEmbedding"): rotary_embedding,
    ("com.microsoft", "RotaryEmbedding"): contrib_rotary_embedding,
}
