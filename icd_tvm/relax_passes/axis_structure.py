"""How an axis is built from freely permutable factors and segments, and the index maths on it.

An axis is a leaf, an ordered row-major product (384 = 12 heads x 32) or a row of segments
(1152 = 384 query + 384 key + 384 value). Permutations of the leaves compose to one
permutation of the axis; the inverse direction is only possible for a permutation that
respects the structure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from icd_tvm.errors import PermutationError

Index = NDArray[np.int64]
Kind = Literal["leaf", "product", "segments"]


@dataclass(frozen=True)
class AxisStructure:
    """One axis as a tree.

    Attributes
    ----------
    kind : {"leaf", "product", "segments"}
        Leaves hold one group; a product is row-major, segments lie one after the other.
    size : int
        Number of indices; -1 for a symbolic dimension (always a pinned leaf).
    group : str
        Id of the group of a leaf; empty for leaves of size 1 and for inner nodes.
    parts : tuple of AxisStructure
        Children of an inner node, at least two.
    """

    kind: Kind
    size: int
    group: str = ""
    parts: tuple[AxisStructure, ...] = ()

    @property
    def is_leaf(self) -> bool:
        """True for an axis without inner structure."""
        return self.kind == "leaf"

    def leaves(self) -> Iterator[AxisStructure]:
        """Yield the leaves from left to right, repeated ones repeatedly."""
        if self.is_leaf:
            yield self
        for part in self.parts:
            yield from part.leaves()

    def groups(self) -> tuple[str, ...]:
        """Return the ids of the groups on this axis, each once, in order."""
        return tuple(dict.fromkeys(leaf.group for leaf in self.leaves() if leaf.group))

    def text(self) -> str:
        """Return a short form such as ``12 x 32`` or ``[128 | 128]``."""
        if self.is_leaf:
            return str(self.size) if self.size >= 0 else "?"
        inner = [part.text() for part in self.parts]
        return " x ".join(inner) if self.kind == "product" else f"[{' | '.join(inner)}]"

    def to_json(self) -> dict[str, Any]:
        """Return the tree as plain JSON values."""
        if self.is_leaf:
            return {"size": self.size, "group": self.group}
        return {"kind": self.kind, "size": self.size, "parts": [p.to_json() for p in self.parts]}


def axis_index(structure: AxisStructure, perms: Mapping[str, ArrayLike]) -> Index:
    """Compose leaf permutations to the permutation of a whole axis.

    Parameters
    ----------
    structure : AxisStructure
        The axis, of size n.
    perms : mapping of str to int array
        Group id -> permutation of the leaf (``new[i] = old[perm[i]]``); a missing group keeps
        its order. Shorter arrays are allowed and select: the result is then the kept indices.

    Returns
    -------
    numpy.ndarray
        int64[n], ``new[i] = old[index[i]]``.
    """
    if structure.is_leaf:
        perm = perms.get(structure.group)
        return np.arange(structure.size) if perm is None else np.asarray(perm, dtype=np.int64)
    inner = [axis_index(part, perms) for part in structure.parts]
    if structure.kind == "segments":
        starts = np.cumsum([0, *(part.size for part in structure.parts[:-1])])
        return np.concatenate([start + i for start, i in zip(starts, inner, strict=True)])
    index = np.zeros(1, dtype=np.int64)
    for part, own in zip(structure.parts, inner, strict=True):
        index = (index[:, None] * part.size + own).ravel()
    return index


def axis_size(structure: AxisStructure, sizes: Mapping[str, int]) -> int:
    """Return the size of an axis after some leaves changed theirs."""
    if structure.is_leaf:
        return sizes.get(structure.group, structure.size)
    inner = [axis_size(part, sizes) for part in structure.parts]
    return int(sum(inner) if structure.kind == "segments" else np.prod(inner))


def positions(structure: AxisStructure, group: str) -> Index:
    """Return where each index of a leaf group lies on an axis.

    Returns
    -------
    numpy.ndarray
        int64[size of the group, m]: row i holds the m places that index i occupies, ascending.
    """
    owner = _owner(structure, group)
    places = np.flatnonzero(owner >= 0)
    if not places.size:
        return np.empty((0, 0), dtype=np.int64)
    order = np.argsort(owner[places], kind="stable")
    return places[order].reshape(int(owner.max()) + 1, -1).astype(np.int64)


def _owner(structure: AxisStructure, group: str) -> Index:
    """Index of the group that each place belongs to, -1 where it belongs to none."""
    if structure.is_leaf:
        mine = structure.group == group
        return np.arange(structure.size) if mine else np.full(structure.size, -1)
    inner = [_owner(part, group) for part in structure.parts]
    if structure.kind == "segments":
        return np.concatenate(inner)
    owner = np.full(1, -1, dtype=np.int64)
    for own in inner:
        owner = np.maximum(owner[:, None], own).ravel()
    return owner


def split_permutation(structure: AxisStructure, perm: Index) -> dict[str, Index]:
    """Take a permutation of a whole axis apart into permutations of its leaves.

    Parameters
    ----------
    structure : AxisStructure
        The axis, of size n.
    perm : int array, shape [n]
        A permutation; ``new[i] = old[perm[i]]``.

    Raises
    ------
    PermutationError
        With the first bad position, if it crosses a segment, breaks a product or orders two
        tied halves differently.
    """
    found: dict[str, Index] = {}
    _split(structure, np.asarray(perm, dtype=np.int64), np.arange(structure.size), found)
    return found


def _split(structure: AxisStructure, perm: Index, places: Index, found: dict[str, Index]) -> None:
    if structure.is_leaf:
        _put(structure, perm, places, found)
    elif structure.kind == "segments":
        _split_segments(structure, perm, places, found)
    else:
        _split_product(structure, perm, places, found)


def _put(structure: AxisStructure, perm: Index, places: Index, found: dict[str, Index]) -> None:
    if not structure.group:
        return
    known = found.setdefault(structure.group, perm)
    if not np.array_equal(known, perm):
        bad = int(places[np.flatnonzero(known != perm)[0]])
        raise PermutationError(
            f"position {bad} splits a pair: both halves of group {structure.group!r} "
            "must be ordered alike"
        )


def _split_segments(
    structure: AxisStructure, perm: Index, places: Index, found: dict[str, Index]
) -> None:
    start = 0
    for part in structure.parts:
        stop = start + part.size
        own = perm[start:stop]
        outside = np.flatnonzero((own < start) | (own >= stop))
        if outside.size:
            bad = start + int(outside[0])
            raise PermutationError(
                f"position {int(places[bad])} crosses a segment: it takes index "
                f"{int(perm[bad])} from outside [{start}, {stop})"
            )
        _split(part, own - start, places[start:stop], found)
        start = stop


def _split_product(
    structure: AxisStructure, perm: Index, places: Index, found: dict[str, Index]
) -> None:
    first, rest = structure.parts[0], structure.parts[1:]
    inner = structure.size // first.size
    outer_of, inner_of = np.divmod(perm.reshape(first.size, inner), inner)
    wrong = (outer_of != outer_of[:, :1]) | (inner_of != inner_of[:1])
    if wrong.any():
        bad = int(np.flatnonzero(wrong.ravel())[0])
        raise PermutationError(
            f"position {int(places[bad])} breaks the factor structure {structure.text()}: "
            f"it takes index {int(perm[bad])}"
        )
    _split(first, outer_of[:, 0], places[::inner], found)
    tail = rest[0] if len(rest) == 1 else AxisStructure("product", inner, "", rest)
    _split(tail, inner_of[0], places[:inner], found)
