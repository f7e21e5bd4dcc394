"""Union-find over axes whose nodes may be split into factors and segments.

Tying two axes is unification: a leaf takes the structure of its partner; two structures are
refined until they agree, or both axes are pinned with the reason why they cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

Form = Literal["leaf", "product", "segments"]


@dataclass(frozen=True)
class Pin:
    """Why an axis cannot be permuted: the op and the binding that fix it, and the reason."""

    op: str
    node: str
    reason: str


class Dim:
    """One axis, factor or segment; a node of the union-find forest."""

    __slots__ = ("counted", "form", "parent", "parts", "pins", "roles", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.parent: Dim = self
        self.form: Form = "leaf"
        self.parts: tuple[Dim, ...] = ()
        self.pins: dict[Pin, None] = {}
        self.counted: dict[Pin, None] = {}
        self.roles: dict[str, None] = {}

    def root(self) -> Dim:
        """Return the representative of this dimension's class."""
        dim = self
        while dim.parent is not dim:
            dim.parent = dim.parent.parent
            dim = dim.parent
        return dim

    def leaves(self) -> Iterator[Dim]:
        """Yield the leaf classes beneath this dimension, shared ones repeatedly."""
        root = self.root()
        if root.form == "leaf":
            yield root
        for part in root.parts:
            yield from part.leaves()

    def take_notes(self, other: Dim) -> None:
        """Add the pins, counts and roles of another dimension to every leaf beneath."""
        for leaf in self.leaves():
            leaf.pins.update(other.pins)
            leaf.counted.update(other.counted)
            leaf.roles.update(other.roles)

    def divide(self, form: Form, parts: tuple[Dim, Dim]) -> None:
        """Give a leaf a structure; its notes move to the parts, for only leaves hold notes."""
        self.form, self.parts = form, parts
        self.take_notes(self)


class Mismatch(Exception):
    """Two structures of one axis have no common refinement."""


class DimTable:
    """Makes, ties and pins dimensions; ``op`` and ``node`` say on whose behalf."""

    def __init__(self) -> None:
        self.op = ""
        self.node = ""

    def fresh(self, size: int) -> Dim:
        """Return a new dimension; a symbolic one (size -1) is pinned at once."""
        dim = Dim(size)
        if size < 0:
            self.pin(dim, "dynamic size")
        return dim

    def pin(self, dim: Dim, reason: str) -> None:
        """Forbid any permutation of a dimension."""
        for leaf in dim.leaves():
            if leaf.size != 1:
                leaf.pins[Pin(self.op, self.node, reason)] = None

    def count(self, dim: Dim, reason: str) -> None:
        """Note that an op depends on how many indices a dimension has."""
        for leaf in dim.leaves():
            leaf.counted[Pin(self.op, self.node, reason)] = None

    def role(self, dim: Dim, name: str) -> None:
        """Describe what a dimension is, for people."""
        for leaf in dim.leaves():
            leaf.roles[name] = None

    def product(self, parts: Iterable[Dim]) -> Dim:
        """Return a dimension that is the row-major product of others."""
        roots = [part.root() for part in parts if part.root().size != 1]
        if not roots:
            return Dim(1)
        if len(roots) == 1:
            return roots[0]
        size = prod(root.size for root in roots)
        return self._made("product", roots, size)

    def segments(self, parts: Iterable[Dim]) -> Dim:
        """Return a dimension that is a row of others."""
        roots = [part.root() for part in parts if part.root().size != 0]
        if not roots:
            return Dim(0)
        if len(roots) == 1:
            return roots[0]
        return self._made("segments", roots, sum(root.size for root in roots))

    def _made(self, form: Form, parts: Sequence[Dim], size: int) -> Dim:
        if any(part.size < 0 for part in parts):
            for part in parts:
                self.pin(part, "dynamic size")
            return self.fresh(-1)
        dim = Dim(size)
        dim.form, dim.parts = form, tuple(parts)
        return dim

    def tie(self, left: Dim, right: Dim) -> None:
        """Make two dimensions permute together, or pin both. Size 1 has nothing to tie."""
        left, right = left.root(), right.root()
        if left is right or left.size == 1 or right.size == 1:
            return
        if left.size != right.size:
            self._pin_both(left, right, f"sizes {left.size} and {right.size} differ")
            return
        if left.form != "leaf" and right.form != "leaf":
            try:
                self._match(left, right)
            except Mismatch as mismatch:
                self._pin_both(left, right, str(mismatch))
                return
        self._link(left, right) if left.form == "leaf" else self._link(right, left)

    def _pin_both(self, left: Dim, right: Dim, reason: str) -> None:
        self.pin(left, reason)
        self.pin(right, reason)

    @staticmethod
    def _link(child: Dim, parent: Dim) -> None:
        child.parent = parent
        parent.take_notes(child)

    def _match(self, left: Dim, right: Dim) -> None:
        if left.form == right.form == "product":
            self.match_products(left.parts, right.parts)
        elif left.form == right.form == "segments":
            self._match_segments(left, right)
        elif left.form == "product":
            self._match_mixed(left, right)
        else:
            self._match_mixed(right, left)

    def match_products(self, left: Sequence[Dim], right: Sequence[Dim]) -> None:
        """Tie two row-major sequences of equal total size, splitting factors where needed.

        Raises
        ------
        Mismatch
            If the factor boundaries have no common refinement (12 x 32 against 32 x 12).
        """
        a = [dim.root() for dim in left if dim.root().size != 1]
        b = [dim.root() for dim in right if dim.root().size != 1]
        while a and b:
            if a[-1].size == b[-1].size:
                self.tie(a.pop(), b.pop())
                continue
            small, large = (a, b) if a[-1].size < b[-1].size else (b, a)
            big = large.pop().root()
            if big.form == "product":
                large.extend(part.root() for part in big.parts)
                continue
            inner = small.pop()
            outer, own = self._split_product(big, inner.size)
            self.tie(own, inner)
            large.append(outer.root())

    def _split_product(self, dim: Dim, inner: int) -> tuple[Dim, Dim]:
        outer, rest = divmod(dim.size, inner)
        if rest:
            raise Mismatch(f"factors {dim.size} and {inner} have no common split")
        if dim.form == "leaf":
            dim.divide("product", (Dim(outer), Dim(inner)))
        else:
            dim.form, dim.parts = "product", self._segments_as_product(dim, inner)
        return dim.parts[0], dim.parts[1]

    def _segments_as_product(self, dim: Dim, inner: int) -> tuple[Dim, Dim]:
        if any(part.root().size % inner for part in dim.parts):
            raise Mismatch(f"a segment of {dim.size} is no multiple of {inner}")
        shared = Dim(inner)
        outers = [Dim(part.root().size // inner) for part in dim.parts]
        for part, outer in zip(dim.parts, outers, strict=True):
            self.tie(part, self.product([outer, shared]))
        return self.segments(outers), shared

    def _match_segments(self, left: Dim, right: Dim) -> None:
        a = [dim.root() for dim in reversed(left.parts)]
        b = [dim.root() for dim in reversed(right.parts)]
        while a and b:
            if a[-1].size == b[-1].size:
                self.tie(a.pop(), b.pop())
                continue
            small, large = (a, b) if a[-1].size < b[-1].size else (b, a)
            big = large.pop().root()
            if big.form == "segments":
                large.extend(part.root() for part in reversed(big.parts))
                continue
            head = small.pop()
            first, second = self._split_segments(big, head.size)
            self.tie(first, head)
            large.append(second.root())

    def _split_segments(self, dim: Dim, at: int) -> tuple[Dim, Dim]:
        if dim.form == "leaf":
            dim.divide("segments", (Dim(at), Dim(dim.size - at)))
            return dim.parts[0], dim.parts[1]
        first, rest = dim.parts[0].root(), dim.parts[1:]
        inner = dim.size // first.size
        if at % inner:
            raise Mismatch(f"a segment ends inside a factor of {inner}")
        head, tail = Dim(at // inner), Dim(first.size - at // inner)
        self.tie(first, self.segments([head, tail]))
        return self.product([head, *rest]), self.product([tail, *rest])

    def _match_mixed(self, factors: Dim, row: Dim) -> None:
        """Tie a product to segments: the outermost factors become segments themselves."""
        parts = _flat_product(factors)
        sizes = [part.root().size for part in row.parts]
        for cut in range(1, len(parts)):
            inner = prod(part.size for part in parts[cut:])
            if all(size % inner == 0 for size in sizes):
                outers = [Dim(size // inner) for size in sizes]
                self.tie(self.product(parts[:cut]), self.segments(outers))
                for part, outer in zip(row.parts, outers, strict=True):
                    self.tie(part, self.product([outer, *parts[cut:]]))
                return
        raise Mismatch("segments and factors do not line up")


def _flat_product(dim: Dim) -> list[Dim]:
    root = dim.root()
    if root.form != "product":
        return [root]
    return [leaf for part in root.parts for leaf in _flat_product(part)]
