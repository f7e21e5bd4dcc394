"""What a smaller KV cache loses: relative errors of keys, values and the attention output."""

from __future__ import annotations

import numpy as np

from icd_tvm.adapters.arrays import Array, Bool
from icd_tvm.adapters.kv_pages import KVCache


def cache_loss(
    whole: tuple[Array, Array],
    kept: Bool,
    small: KVCache,
    stored: KVCache,
    attention: Array | None,
) -> dict[str, float | None]:
    """Return relative Frobenius errors of keys and values (the larger one), and of the output.

    Parameters
    ----------
    whole : (keys, values)
        Before, each float [layers, heads, tokens, head_dim].
    kept : bool array, shape [layers, heads, tokens]
    small, stored : KVCache
        The kept tokens, before and after they were quantised.
    attention : float array, shape [layers, query heads, queries, tokens], optional

    Returns
    -------
    dict
        ``frobenius``: dropped rows count as zeros; ``quant``: of storage alone; ``output``: of
        ``attention @ values``, None without attention of single queries.
    """
    back = stored.dequantized()
    parts = ((small.keys, back.keys), (small.values, back.values))
    everything = [
        _relative(array, np.where(kept[..., None], array, 0), _norm(after - before))
        for array, (before, after) in zip(whole, parts, strict=True)
    ]
    return {
        "frobenius": max(everything),
        "quant": max(_relative(before, after) for before, after in parts),
        "output": _output_error(whole[1], kept, back.values, attention),
    }


def _output_error(
    values: Array, kept: Bool, stored: Array, attention: Array | None
) -> float | None:
    """Compare ``attention @ values`` with the same over the kept tokens, head by head."""
    if attention is None or attention.ndim != 4:
        return None
    error = total = 0.0
    share = attention.shape[1] // values.shape[1]
    for layer in range(values.shape[0]):
        for head in range(attention.shape[1]):
            source = head // share
            weights = attention[layer, head].astype(np.float64)
            whole = weights @ values[layer, source].astype(np.float64)
            left = weights[:, kept[layer, source]]
            mass = np.maximum(left.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
            scale = weights.sum(axis=1, keepdims=True) / mass
            part = (left * scale) @ stored[layer, source].astype(np.float64)
            error += float(((part - whole) ** 2).sum())
            total += float((whole**2).sum())
    return float(np.sqrt(error / total)) if total else 0.0


def _relative(before: Array, after: Array, more: float = 0.0) -> float:
    """Relative Frobenius distance; ``more`` is a distance in rows that do not differ here."""
    norm = _norm(before)
    return float(np.hypot(_norm(after.astype(np.float64) - before), more)) / norm if norm else 0.0


def _norm(array: Array) -> float:
    return float(np.linalg.norm(array.astype(np.float64)))
