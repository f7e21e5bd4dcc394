"""Drop tokens between the layers of an encoder: the sequence shrinks for all later layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from icd_tvm.adapters.arrays import Array, Float64, Index, require_finite, require_real
from icd_tvm.adapters.masks import top_mask
from icd_tvm.adapters.units import kept_count
from icd_tvm.errors import ConfigError, ShapeError


@dataclass(frozen=True)
class ShortSequence:
    """What is left of a batch of sequences.

    Attributes
    ----------
    hidden : array, shape [batch, kept, width]
    mask : array, shape [batch, kept]
    positions : int32 array, shape [batch, kept]
        Place of every kept token before the drop, ascending.
    """

    hidden: Array
    mask: Array
    positions: Index


def drop_tokens(
    hidden: Array, mask: Array, scores: Array, keep: int | float, keep_first: int = 1
) -> tuple[ShortSequence, dict[str, Any]]:
    """Keep the best tokens of every sequence, in order and contiguous.

    Padding goes first; every sequence keeps the same number, so the result is rectangular.

    Parameters
    ----------
    hidden : float array, shape [batch, tokens, width]
        Not modified.
    mask : array, shape [batch, tokens]
        Non-zero for tokens, zero for padding.
    scores : float array, shape [batch, tokens]
        Higher is better, for example the attention that a token receives.
    keep : int or float
        Tokens to keep, or their share in (0, 1] when it is a float.
    keep_first : int
        Leading tokens that always stay (a classifier's [CLS]).

    Returns
    -------
    out : ShortSequence
    meta : dict
        JSON-serialisable; ``loss.score`` is the share of the tokens' scores that is dropped, None
        when scores are negative; ``loss.tokens`` counts real tokens that are dropped.

    Raises
    ------
    ShapeError
        Arrays that do not belong together.
    NonFiniteError
        NaN or infinity inside.
    ConfigError
        A number out of range.

    Notes
    -----
    Goyal et al., "PoWER-BERT", 2020.
    """
    hidden, mask, scores = np.asarray(hidden), np.asarray(mask), np.asarray(scores)
    _check(hidden, mask, scores)
    tokens = hidden.shape[1]
    count = _count(keep, tokens)
    if not 0 <= keep_first <= count:
        raise ConfigError(f"keep_first {keep_first!r} is outside 0..{count}", "the kept tokens")
    kept = top_mask(_ranked(mask, scores, keep_first), count, axis=1)
    places = np.nonzero(kept)[1].reshape(len(hidden), count)
    out = ShortSequence(
        np.take_along_axis(hidden, places[..., None], axis=1),
        np.take_along_axis(mask, places, axis=1),
        places.astype(np.int32),
    )
    return out, _meta(hidden, mask != 0, scores.astype(np.float64), kept, out, keep_first)


def _check(hidden: Array, mask: Array, scores: Array) -> None:
    if hidden.ndim != 3 or hidden.size == 0:
        raise ShapeError(
            f"hidden has shape {list(hidden.shape)}", "expected a non-empty [batch, tokens, width]"
        )
    for name, array in (("mask", mask), ("scores", scores)):
        if array.shape != hidden.shape[:2]:
            raise ShapeError(
                f"{name} has shape {list(array.shape)}", f"expected {list(hidden.shape[:2])}"
            )
    for name, array in (("hidden", hidden), ("scores", scores)):
        require_real(array, name)
        require_finite(array, name)


def _count(keep: int | float, tokens: int) -> int:
    if isinstance(keep, float) and 0 < keep <= 1:
        return kept_count(tokens, 1 - keep)
    if isinstance(keep, int | np.integer) and 1 <= keep <= tokens:
        return int(keep)
    raise ConfigError(
        f"keep {keep!r} is neither a count in 1..{tokens} nor a share in (0, 1]",
        "0.5 keeps one half",
    )


def _ranked(mask: Array, scores: Array, keep_first: int) -> Float64:
    ranked = np.where(mask != 0, scores.astype(np.float64), -np.inf)
    ranked[:, :keep_first] = np.inf
    return ranked


def _meta(
    hidden: Array, real: Array, scores: Float64, kept: Array, out: ShortSequence, keep_first: int
) -> dict[str, Any]:
    tokens, count = hidden.shape[1], out.hidden.shape[1]
    total = float(scores[real].sum())
    lost = float(scores[real & ~kept].sum())
    measured = total > 0 and not (scores[real] < 0).any()
    return {
        "kind": "token_drop",
        "type": "tokens",
        "rate": 1 - count / tokens,
        "shape": list(hidden.shape),
        "density": count / tokens,
        "params": {"keep": count, "keep_first": keep_first},
        "tokens": {"before": tokens, "after": count, "dropped": tokens - count},
        "loss": {
            "score": lost / total if measured else None,
            "tokens": int((real & ~kept).sum()),
        },
        "bytes_before": int(hidden.nbytes),
        "bytes_after": int(out.hidden.nbytes),
        "format": "dense",
        "groups": {},
        "delta_layout": count < tokens,
        "skipped": count == tokens,
        "why": "later layers see a shorter dense sequence" if count < tokens else "all are kept",
    }
