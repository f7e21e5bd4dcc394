"""Permutations of an axis and the constraints they must obey.

A permutation ``pi`` is an ``int32[n]`` array with ``new[i] = old[pi[i]]``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from icd_tvm.errors import ConfigError, PermutationError
from icd_tvm.files import write_atomically

Perm = NDArray[np.int32]
Inside = Literal["fixed", "equal", "separate"]

_FORMAT = "icd/perm/v1"


def identity(n: int) -> Perm:
    """Return the permutation of ``n`` indices that changes nothing, int32[n]."""
    return np.arange(n, dtype=np.int32)


def as_permutation(perm: ArrayLike, n: int | None = None) -> Perm:
    """Return ``perm`` as int32[n] after checking that it is a permutation.

    Parameters
    ----------
    perm : array_like of int, shape [n]
        ``new[i] = old[perm[i]]``.
    n : int, optional
        The length it must have.

    Raises
    ------
    PermutationError
        If the shape, the dtype, the length or the set of values is wrong.
    """
    array = np.asarray(perm)
    if array.ndim != 1:
        raise PermutationError(f"permutation has {array.ndim} dimensions, expected 1")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise PermutationError(f"permutation has dtype {array.dtype}, expected an integer dtype")
    if n is not None and array.size != n:
        raise PermutationError(f"permutation has length {array.size}, expected {n}")
    if array.size and (array.min() < 0 or array.max() >= array.size):
        raise PermutationError(f"permutation has a value outside 0..{array.size - 1}")
    counts = np.bincount(array.astype(np.int64), minlength=array.size)
    if np.any(counts != 1):
        missing = int(np.flatnonzero(counts == 0)[0])
        raise PermutationError(f"permutation never names index {missing}", "every index once")
    return array.astype(np.int32)


def invert(perm: ArrayLike) -> Perm:
    """Return the inverse: ``inverse[perm[i]] == i``; it maps an old index to its new place."""
    order = as_permutation(perm)
    inverse = np.empty_like(order)
    inverse[order] = np.arange(order.size, dtype=np.int32)
    return inverse


def compose(first: ArrayLike, second: ArrayLike) -> Perm:
    """Return the permutation that applies ``first`` and then ``second``: ``first[second]``."""
    before = as_permutation(first)
    return before[as_permutation(second, before.size)]


@dataclass(frozen=True)
class Constraint:
    """What a permutation of one axis may do.

    Build it with one of the class methods ``free``, ``segments``, ``factored`` and ``pairs``.

    Attributes
    ----------
    kind : {"free", "segments", "factored", "pairs"}
    lengths : tuple of int
        The segment lengths of ``segments``; ``(outer, inner)`` of ``factored``.
    blocks : bool
        ``factored``: may the outer blocks change places?
    inside : {"fixed", "equal", "separate"}
        ``factored``: the order inside the blocks is untouched, permuted by one permutation
        common to all blocks, or permuted by one permutation for each block.
    """

    kind: Literal["free", "segments", "factored", "pairs"] = "free"
    lengths: tuple[int, ...] = ()
    blocks: bool = True
    inside: Inside = "fixed"

    @classmethod
    def free(cls) -> Constraint:
        """Any permutation."""
        return cls()

    @classmethod
    def segments(cls, lengths: Sequence[int]) -> Constraint:
        """Indices stay inside their segment; ``lengths`` sum to the length of the axis."""
        values = tuple(int(length) for length in lengths)
        if not values or min(values) < 1:
            raise ConfigError(f"segment lengths {values} must be positive and not empty")
        return cls("segments", values)

    @classmethod
    def factored(
        cls, outer: int, inner: int, *, blocks: bool = True, inside: Inside = "separate"
    ) -> Constraint:
        """The axis is ``outer`` blocks of ``inner`` indices, as attention heads are."""
        if outer < 1 or inner < 1:
            raise ConfigError(f"factored constraint {outer} x {inner} must be positive")
        if inside not in ("fixed", "equal", "separate"):
            raise ConfigError(f"inside={inside!r} is unknown", "fixed, equal or separate")
        return cls("factored", (outer, inner), blocks, inside)

    @classmethod
    def pairs(cls) -> Constraint:
        """``i`` and ``i + n/2`` move together, as the halves of a rotary embedding do."""
        return cls("pairs")

    def check_length(self, n: int) -> None:
        """Raise PermutationError unless an axis of ``n`` indices can obey this constraint."""
        if self.kind == "segments" and sum(self.lengths) != n:
            raise PermutationError(f"segments {self.lengths} sum to {sum(self.lengths)}, not {n}")
        if self.kind == "factored" and self.lengths[0] * self.lengths[1] != n:
            raise PermutationError(f"{self.lengths[0]} x {self.lengths[1]} blocks are not {n}")
        if self.kind == "pairs" and n % 2:
            raise PermutationError(f"pairs need an even length, got {n}")

    def check(self, perm: ArrayLike) -> Perm:
        """Return ``perm`` as int32[n], or raise PermutationError if it breaks the constraint."""
        order = as_permutation(perm)
        self.check_length(order.size)
        if not self._holds(order):
            raise PermutationError(f"permutation breaks the {self.kind} constraint")
        return order

    def _holds(self, order: Perm) -> bool:
        n = order.size
        if self.kind == "segments":
            owner = np.repeat(np.arange(len(self.lengths)), self.lengths)
            return bool(np.array_equal(owner[order], owner))
        if self.kind == "pairs":
            half = n // 2
            return bool(np.array_equal((order[:half] + half) % n, order[half:]))
        if self.kind == "factored":
            return self._holds_factored(order)
        return True

    def _holds_factored(self, order: Perm) -> bool:
        outer, inner = self.lengths
        block, within = np.divmod(order.reshape(outer, inner), inner)
        if np.any(block != block[:, :1]):
            return False
        if not self.blocks and np.any(block[:, 0] != np.arange(outer)):
            return False
        if self.inside == "fixed":
            return bool(np.all(within == np.arange(inner)))
        return self.inside == "separate" or bool(np.all(within == within[0]))

    def random(self, n: int, seed: int) -> Perm:
        """Return a random permutation of ``n`` indices that obeys the constraint.

        Parameters
        ----------
        n : int
            Length of the axis.
        seed : int
            The same seed gives the same permutation.

        Raises
        ------
        PermutationError
            If ``n`` does not fit the constraint.
        """
        self.check_length(n)
        rng = np.random.default_rng(seed)
        if self.kind == "segments":
            starts = np.cumsum((0, *self.lengths[:-1]))
            parts = [
                s + rng.permutation(length) for s, length in zip(starts, self.lengths, strict=True)
            ]
            return np.concatenate(parts).astype(np.int32)
        if self.kind == "pairs":
            half = rng.permutation(n // 2)
            return np.concatenate([half, half + n // 2]).astype(np.int32)
        if self.kind == "factored":
            return self._random_factored(rng)
        return rng.permutation(n).astype(np.int32)

    def _random_factored(self, rng: np.random.Generator) -> Perm:
        outer, inner = self.lengths
        block = rng.permutation(outer) if self.blocks else np.arange(outer)
        within = np.tile(np.arange(inner), (outer, 1))
        if self.inside == "equal":
            within[:] = rng.permutation(inner)
        elif self.inside == "separate":
            within = rng.permuted(within, axis=1)
        return (block[:, None] * inner + within).reshape(-1).astype(np.int32)


def save_permutation(path: str | Path, perm: ArrayLike, meta: dict[str, Any]) -> None:
    """Write ``perm.json``: ``{"format", "n", "perm", "meta"}``.

    Raises
    ------
    PermutationError
        If ``perm`` is no permutation.
    OutputError
        If the file cannot be written.
    """
    order = as_permutation(perm)
    record = {"format": _FORMAT, "n": order.size, "perm": order.tolist(), "meta": meta}
    text = json.dumps(record)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def load_permutation(path: str | Path) -> tuple[Perm, dict[str, Any]]:
    """Read a file of :func:`save_permutation`: the permutation int32[n] and its meta data.

    Raises
    ------
    PermutationError
        If the file is missing, is not such a record, or holds no valid permutation.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PermutationError(f"cannot read a permutation from {path}: {error}") from error
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise PermutationError(f"{path} is no {_FORMAT} record")
    if not isinstance(record.get("meta"), dict) or not isinstance(record.get("n"), int):
        raise PermutationError(f"{path} lacks a valid n or meta")
    try:
        return as_permutation(record.get("perm", []), record["n"]), record["meta"]
    except ValueError as error:  # numpy's, of rows of unequal length
        raise PermutationError(f"{path} holds no row of integers") from error
