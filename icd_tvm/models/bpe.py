"""Byte-level BPE: text to token ids and back, with the vocabulary of a GGUF file.

Notes
-----
Sennrich et al., "Neural machine translation of rare words with subword units", 2016; on bytes:
Radford et al., "Language models are unsupervised multitask learners", 2019.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from icd_tvm.errors import ModelFileError, ShapeError

# Pieces that merges never cross, on one class a character: L letter, N digit, _ blank,
# S other space, O the rest. Spaces before a word leave their last one to it.
PIECE = re.compile(r"_?L+|N|_?O+|[_S]+(?=N)|[_S]+(?![LNO])|[_S]+")
CONTRACTION = re.compile(r"'(?:s|t|re|ve|m|ll|d)")
SUPPORTED = ("gpt2",)


def byte_alphabet() -> list[str]:
    """Return the printable character that stands for every byte in a vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    table = {byte: chr(byte) for byte in plain}
    table |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


BYTES = byte_alphabet()
BYTE_OF = {character: byte for byte, character in enumerate(BYTES)}


def split_pieces(text: str) -> Iterator[str]:
    """Cut text into words, single digits, signs and spaces; their concatenation is the text."""
    classes = "".join(map(_kind, text))
    place = 0
    while place < len(text):
        found = CONTRACTION.match(text, place) or PIECE.match(classes, place)
        assert found is not None  # every class starts a piece
        yield text[place : found.end()]
        place = found.end()


@lru_cache(maxsize=4096)
def _kind(character: str) -> str:
    if character == " ":
        return "_"
    if character.isspace() and not "\x1c" <= character <= "\x1f":
        return "S"
    group = unicodedata.category(character)[0]
    return group if group in "LN" else "O"


class BPETokenizer:
    """Byte-level BPE with single digits, as SmolLM2 uses it.

    Parameters
    ----------
    tokens : sequence of str
        Vocabulary by id, in the byte alphabet.
    merges : sequence of str
        ``"left right"``, the most important first.

    Raises
    ------
    ModelFileError
        A merge that is no pair.
    """

    def __init__(self, tokens: Sequence[str], merges: Sequence[str]) -> None:
        self.tokens = list(tokens)
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        self.ranks: dict[tuple[str, str], int] = {}
        for rank, merge in enumerate(merges):
            left, _, right = merge.partition(" ")
            if not left or not right:
                raise ModelFileError(f"merge {rank} of the tokenizer is {merge!r}, no pair")
            self.ranks[left, right] = rank
        self._pieces: dict[str, list[int]] = {}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> BPETokenizer:
        """Build from the metadata of a GGUF file.

        Raises
        ------
        ModelFileError
            No tokenizer inside, or one that is no byte-level BPE.
        """
        kind = metadata.get("tokenizer.ggml.model")
        if kind not in SUPPORTED:
            raise ModelFileError(f"tokenizer {kind!r} is no byte-level BPE", "expected gpt2")
        lists = [metadata.get(f"tokenizer.ggml.{part}") for part in ("tokens", "merges")]
        if not all(isinstance(part, list) and part for part in lists):
            raise ModelFileError("the tokenizer has no list of tokens or of merges")
        return cls(*lists)  # type: ignore[arg-type]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; special tokens in it are plain text.

        Raises
        ------
        ShapeError
            A byte that the vocabulary does not know.
        """
        return [token for piece in split_pieces(text) for token in self._piece(piece)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; bytes that are no UTF-8 become replacement characters.

        Raises
        ------
        ShapeError
            An id outside the vocabulary.
        """
        bad = next((i for i in ids if not 0 <= i < len(self.tokens)), None)
        if bad is not None:
            raise ShapeError(f"token {bad} is outside 0..{len(self.tokens) - 1}")
        raw = b"".join(_token_bytes(self.tokens[index]) for index in ids)
        return raw.decode(errors="replace")

    def _piece(self, piece: str) -> list[int]:
        known = self._pieces.get(piece)
        if known is None:
            symbols = self._merge([BYTES[byte] for byte in piece.encode()])
            unknown = next((s for s in symbols if s not in self.ids), None)
            if unknown is not None:
                raise ShapeError(f"the vocabulary has no token for {unknown!r} of {piece!r}")
            known = self._pieces[piece] = [self.ids[symbol] for symbol in symbols]
        return known

    def _merge(self, symbols: list[str]) -> list[str]:
        """Apply the most important merge until none is left."""
        while len(symbols) > 1:
            pairs = list(pairwise(symbols))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            symbols = _join(symbols, best)
        return symbols


def _join(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    place = 0
    while place < len(symbols):
        together = tuple(symbols[place : place + 2]) == pair
        joined.append(pair[0] + pair[1] if together else symbols[place])
        place += 2 if together else 1
    return joined


def _token_bytes(token: str) -> bytes:
    # Special tokens are plain text, which the byte alphabet may not cover.
    if all(character in BYTE_OF for character in token):
        return bytes(BYTE_OF[character] for character in token)
    return token.encode()
