"""Scaled dot-product attention from plain operators, shared by the attention converters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icd_tvm._tvm import GenericConst, relax
from icd_tvm.models.converters.heads import repeat_heads
from icd_tvm.models.converters.node import OnnxNode, cast, dtype_of, scalar, with_name

MINUS_INFINITY = float("-inf")


@dataclass(frozen=True)
class Attended:
    """The stages of one attention; the first has shape [B, N, S, H], the others [B, N, S, T]."""

    context: Any
    scores: Any
    capped: Any
    biased: Any
    probabilities: Any


def attend(
    node: OnnxNode,
    query: Any,
    key: Any,
    value: Any,
    *,
    scale: float,
    bias: Any = None,
    softcap: float = 0.0,
) -> Attended:
    """Emit ``softmax(cap(scale * Q K^T) + bias) V``.

    Parameters
    ----------
    node : OnnxNode
    query : relax.Expr
        [B, N, S, H].
    key, value : relax.Expr
        [B, Nkv, T, H]; Nkv divides N, and each is repeated in place.
    scale : float
    bias : relax.Expr, optional
        Broadcasts to [B, N, S, T].
    softcap : float, optional
        ``cap(x) = softcap * tanh(x / softcap)``; 0 means no cap.

    Returns
    -------
    Attended
        Scores and probabilities of 16-bit floats are float32.
    """
    heads = node.shape(query)[1]
    key, value = (repeat_heads(node, part, heads) for part in (key, value))
    turned = node.emit(relax.op.permute_dims(key, [0, 1, 3, 2]))
    wide = _wide(dtype_of(query))
    product = node.emit(relax.op.matmul(query, turned, out_dtype=wide))
    scores = node.emit(relax.op.multiply(product, scalar(scale, product)))
    capped = _cap(node, scores, softcap)
    biased = capped
    if bias is not None:
        biased = node.emit(relax.op.add(capped, node.emit(cast(bias, wide))))
    probabilities = node.emit(relax.op.nn.softmax(biased, axis=-1))
    weights = node.emit(cast(probabilities, dtype_of(value)))
    context = node.emit(relax.op.matmul(weights, value, out_dtype=_wide(dtype_of(value))))
    context = node.emit(cast(context, dtype_of(value)))
    return Attended(context, scores, capped, biased, probabilities)


def _wide(dtype: str) -> str:
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def _cap(node: OnnxNode, scores: Any, softcap: float) -> Any:
    if softcap == 0.0:
        return scores
    cap = scalar(softcap, scores)
    return node.emit(relax.op.multiply(relax.op.tanh(relax.op.divide(scores, cap)), cap))


def masked(node: OnnxNode, allowed: Any, dtype: str, value: float = MINUS_INFINITY) -> Any:
    """Return an additive mask: 0 where a boolean mask allows, ``value`` elsewhere."""
    zero, low = relax.const(0.0, dtype), relax.const(value, dtype)
    return node.emit(relax.op.where(allowed, zero, low))


def constant_mask(
    node: OnnxNode, allowed: NDArray[np.bool_], dtype: str, value: float = MINUS_INFINITY
) -> Any:
    """Return a constant additive mask; it has as many axes as ``allowed``."""
    array = np.where(allowed, np.float32(0), np.float32(value)).astype(dtype)
    return with_name(array, f"{node.name}.mask")


def causal(
    queries: int, keys: int, offset: int, left: int = -1, right: int = -1
) -> NDArray[np.bool_]:
    """Return which of [queries, keys] a causal or windowed attention sees.

    Query ``i`` stands at position ``i + offset`` and sees the keys from ``left`` before it to
    ``right`` after it; -1 sets no bound.
    """
    distance = np.arange(queries)[:, None] + offset - np.arange(keys)[None, :]
    seen = np.ones((queries, keys), dtype=np.bool_)
    if left >= 0:
        seen &= distance <= left
    if right >= 0:
        seen &= -distance <= right
    return seen


def add_bias(node: OnnxNode, first: Any, second: Any) -> Any:
    """Return the sum of two additive masks, of which either may be None."""
    if first is None or second is None:
        return second if first is None else first
    return node.emit(relax.op.add(first, second))


def zero_unseen(node: OnnxNode, result: Any, bias: Any, *, merged: bool) -> Any:
    """Replace by zero the rows of a result that see no key at all, which softmax makes NaN.

    Parameters
    ----------
    node : OnnxNode
    result : relax.Expr
        [B, N, S, H], or [B, S, N * H] if ``merged``, when the bias has one head.
    bias : relax.Expr or None
        Additive mask with -inf, broadcast to [B, N, S, T].
    merged : bool
    """
    if bias is None or _sees_all(bias):
        return result
    # TVM starts a maximum at the lowest finite number, so the bias itself cannot be reduced.
    open_ = relax.op.astype(relax.op.greater(bias, scalar(MINUS_INFINITY, bias)), "float32")
    count = node.emit(relax.op.max(open_, axis=[-1], keepdims=True))
    seen = node.emit(relax.op.greater(count, scalar(0.0, count)))
    if merged:
        batch, _, queries, _ = (*(1,) * (4 - len(node.shape(seen))), *node.shape(seen))
        seen = node.emit(relax.op.reshape(seen, (batch, queries, 1)))
    return node.emit(relax.op.where(seen, result, scalar(0.0, result)))


def _sees_all(bias: Any) -> bool:
    if not isinstance(bias, GenericConst):
        return False
    return bool((bias.value.numpy().max(axis=-1) > MINUS_INFINITY).all())
