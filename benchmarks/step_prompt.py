"""SmolLM2's decode step on a real prompt: its inputs, and how far logits are from a reference.

The cache holds the keys and values of the first tokens of WikiText-2 (validation), computed in
float32. Logits are those of its last `TOKENS` tokens, each fed to the step behind all tokens
before it. Shared by cpu_decode.py and whatever else compares whole steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
TOKENS = 16
# Tokens that are run through the decoder at once: their attention takes memory.
CHUNK = 512


@dataclass(frozen=True)
class Prompt:
    """Tokens of a text, and what a decoder keeps of them.

    Attributes
    ----------
    ids : int64 array, shape [tokens]
    keys, values : float32 arrays, shape [layers, kv_heads, tokens, depth]
    """

    ids: Array
    keys: Array
    values: Array

    def first(self, tokens: int) -> Prompt:
        """Return the first tokens; no token sees those behind it, so their cache stays."""
        return Prompt(self.ids[:tokens], self.keys[:, :, :tokens], self.values[:, :, :tokens])

    def feeds(self) -> dict[str, Array]:
        """Return the inputs of a step that reads the last token, with a slot for each token."""
        cache = {
            f"past_{part}_{layer}": np.ascontiguousarray(rows[layer][None])
            for part, rows in (("key", self.keys), ("value", self.values))
            for layer in range(len(rows))
        }
        return {**self.token(len(self.ids) - 1), **cache}

    def own_cache_feeds(self) -> dict[str, Array]:
        """Return the inputs of a runtime that makes its cache itself, out of the tokens."""
        return {**self.token(len(self.ids) - 1), "prompt": self.ids}

    def token(self, place: int) -> dict[str, Array]:
        """Return the inputs that make a step read the token at a place; slots behind are empty."""
        return {
            "input_ids": self.ids[None, place : place + 1],
            "position_ids": np.array([[place]]),
            "cache_length": np.array([place]),
        }

    def last_tokens(self) -> list[dict[str, Array]]:
        """Return the inputs of `token` for the last tokens, in their order."""
        count = len(self.ids)
        return [self.token(place) for place in range(max(0, count - TOKENS), count)]


def read_prompt(tokens: int, file: Path) -> Prompt:
    """Return the first tokens of the text with their cache, which ``file`` (.npz) keeps."""
    if file.exists():
        with np.load(file) as archive:
            found = Prompt(*(archive[name] for name in ("ids", "keys", "values")))
        if len(found.ids) >= tokens:
            return found.first(tokens)
    found = make_prompt(tokens)
    np.savez(file, ids=found.ids, keys=found.keys, values=found.values)
    return found


def make_prompt(tokens: int) -> Prompt:
    """Run the first tokens of the text through SmolLM2."""
    from icd_tvm.measure.datasets import token_windows
    from icd_tvm.models.decoder import SMOLLM2
    from icd_tvm.models.decoder_reference import run_decoder
    from icd_tvm.models.smollm2 import decoder_weights, smollm2_file, smollm2_tokenizer

    weights = decoder_weights(smollm2_file(), SMOLLM2)
    ids = token_windows(smollm2_tokenizer(), 1, tokens)[0]
    past = None
    for start in range(0, tokens, CHUNK):
        run = run_decoder(SMOLLM2, weights, ids[start : start + CHUNK], past=past, start=start)
        past = (run.keys, run.values)
    return Prompt(ids, run.keys, run.values)


def arm_logits(arm: Any, prompt: Prompt) -> Array:
    """Return the logits [tokens, vocab] of one of our builds."""
    own = arm.own_feeds(prompt.feeds())
    return np.stack([arm.run_all({**own, **token})[0][0, 0] for token in prompt.last_tokens()])


def peer_logits(peer: Any, prompt: Prompt) -> Array:
    """Return the logits [tokens, vocab] of a running peer, which ends at the last token."""
    found = [peer.evaluate(token, ["logits"])["logits"] for token in prompt.last_tokens()]
    return np.stack([logits[0, 0] for logits in found])


def compared(
    sources: Mapping[str, Callable[[], Array]], reference: Array | None, why: str
) -> dict[str, Any]:
    """Compare logits with those of the reference.

    Parameters
    ----------
    sources : mapping of str to callable
        Name -> what returns logits [tokens, vocab].
    reference : array [tokens, vocab], or None
    why : str
        Why there is no reference.

    Returns
    -------
    dict
        By name: ``top1``, the share of tokens with the same largest logit, ``max_abs``, the
        largest difference, and ``max_rel``, the same over the largest logit of the reference;
        or ``not_compared`` with the reason.
    """
    from icd_tvm.errors import IcdError

    found: dict[str, Any] = {}
    for name, logits in sources.items():
        try:
            if reference is None:
                found[name] = {"not_compared": why}
            else:
                found[name] = gaps(logits(), reference)
        except IcdError as error:
            found[name] = {"not_compared": str(error)}
    return found


def gaps(logits: Array, reference: Array) -> dict[str, float]:
    """Return the figures of `compared` of one arm."""
    gap = float(np.abs(logits.astype(np.float64) - reference).max())
    return {
        "top1": float((logits.argmax(-1) == reference.argmax(-1)).mean()),
        "max_abs": gap,
        "max_rel": gap / float(np.abs(reference).max()),
    }
