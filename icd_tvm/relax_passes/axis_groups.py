"""Which axes of a Relax function may be permuted, which are tied, and why the rest is pinned.

A group is a set of (tensor, axis) pairs, or factors of such axes, that one permutation must
reorder together for the function to stay the same. Atomic groups accept every permutation of
their size; composite groups describe whole axes of constants that are made of several atomic
ones. The coupling rules follow the dependency groups of structured pruning (Fang et al.,
DepGraph, CVPR 2023), with axes split into factors so that reshapes keep their freedom.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from icd_tvm._tvm import Call, GenericConst, Op, Var, const_name, relax
from icd_tvm.errors import PermutationError
from icd_tvm.relax_passes.axis_rules import trace as tracing
from icd_tvm.relax_passes.axis_rules.dims import Dim, Pin
from icd_tvm.relax_passes.axis_rules.site import Tensor, Value
from icd_tvm.relax_passes.axis_structure import AxisStructure, Index, positions

__all__ = [
    "AxisGroup",
    "AxisGroups",
    "ConstUse",
    "Member",
    "OpUse",
    "Pin",
    "ValueUse",
    "WeightUse",
    "find_axis_groups",
]

Constraint = Literal["free", "factored", "segments", "pairs"]


@dataclass(frozen=True)
class Member:
    """One axis of a group, for people: what it belongs to, its name and how it is built."""

    kind: Literal["const", "value", "param"]
    name: str
    axis: int
    shape: tuple[int, ...]
    layout: str


@dataclass(frozen=True)
class OpUse:
    """An op that a group passes through, and the binding that calls it."""

    op: str
    node: str


@dataclass(frozen=True)
class ConstUse:
    """One constant operand with one axis in a group.

    Attributes
    ----------
    const : GenericConst
    name : str
        ONNX name, empty if the constant has none.
    axis : int
    node : str
        Binding that reads the constant.
    structure : AxisStructure
        How the axis is built; a bare leaf if the group is the whole axis.
    """

    const: GenericConst
    name: str
    axis: int
    node: str
    structure: AxisStructure

    def positions(self, group: str) -> Index:
        """Return int64[group size, m]: the m places of each index of an atomic group."""
        return positions(self.structure, group)


@dataclass(frozen=True)
class WeightUse:
    """One 2-D constant matmul weight with an axis in a group.

    Attributes
    ----------
    const : GenericConst
    name : str
        ONNX name, empty if the constant has none.
    axis : int
        Axis of the constant, also when a transpose stands between it and the matmul.
    side : {"K", "N"}
        Whether the matmul sums over the axis or produces it.
    node : str
        Binding of the matmul.
    shape : tuple of int
        Shape of the constant.
    structure : AxisStructure
        How the axis is built; a bare leaf if the group is the whole axis.
    """

    const: GenericConst
    name: str
    axis: int
    side: Literal["K", "N"]
    node: str
    shape: tuple[int, ...]
    structure: AxisStructure

    def positions(self, group: str) -> Index:
        """Return int64[group size, m]: the m places of each index of an atomic group."""
        return positions(self.structure, group)


@dataclass(frozen=True)
class ValueUse:
    """One axis of an activation or parameter in a group."""

    var: Var
    axis: int
    structure: AxisStructure


@dataclass(frozen=True)
class AxisGroup:
    """Axes that one permutation reorders together.

    Attributes
    ----------
    id : str
        Stable when the analysis is repeated on an equal graph with other constant values.
    size : int
        Length of a permutation of the group; -1 for a symbolic size (always pinned).
    constraint : {"free", "factored", "segments", "pairs"}
        ``free``: the group is the whole axis of a constant. Otherwise it exists only as a
        factor of an axis, as one segment of it, or as two tied halves of it. An atomic group
        accepts every permutation of its size in any case; a composite one only those that
        respect `structure`.
    structure : AxisStructure
        A leaf for an atomic group.
    factors : tuple of str
        Ids of the atomic groups of a composite group; empty for an atomic one.
    role : str
        What the axis is, as far as the ops tell ("heads", "inside a head: q k").
    members : tuple of Member
    ops : tuple of OpUse
    bytes_touched : int
        Bytes of all constants, values and parameters that have an axis in the group.
    pins : tuple of Pin
        Why the group cannot be permuted; empty if it can.
    counted : tuple of Pin
        Ops that see the number of indices, which forbid to remove some.
    weights : tuple of WeightUse
    consts : tuple of ConstUse
    values : tuple of ValueUse
    """

    id: str
    size: int
    constraint: Constraint
    structure: AxisStructure
    factors: tuple[str, ...] = ()
    role: str = ""
    members: tuple[Member, ...] = ()
    ops: tuple[OpUse, ...] = ()
    bytes_touched: int = 0
    pins: tuple[Pin, ...] = ()
    counted: tuple[Pin, ...] = ()
    weights: tuple[WeightUse, ...] = ()
    consts: tuple[ConstUse, ...] = ()
    values: tuple[ValueUse, ...] = ()

    @property
    def free(self) -> bool:
        """True if at least one permutation other than the identity is allowed."""
        return not self.pins and self.size > 1

    @property
    def composite(self) -> bool:
        """True for a whole axis that is made of several atomic groups."""
        return bool(self.factors)

    def to_json(self) -> dict[str, Any]:
        """Return a description of plain JSON values, without arrays."""
        return {
            "id": self.id,
            "size": self.size,
            "constraint": self.constraint,
            "structure": self.structure.to_json(),
            "factors": list(self.factors),
            "role": self.role,
            "free": self.free,
            "members": [
                {"kind": m.kind, "name": m.name, "axis": m.axis, "shape": list(m.shape)}
                for m in self.members
            ],
            "ops": [{"op": use.op, "node": use.node} for use in self.ops],
            "bytes_touched": self.bytes_touched,
            "pins": [_pin_json(pin) for pin in self.pins],
            "counted": [_pin_json(pin) for pin in self.counted],
        }


def _pin_json(pin: Pin) -> dict[str, str]:
    return {"op": pin.op, "node": pin.node, "reason": pin.reason}


@dataclass(frozen=True)
class AxisGroups:
    """Result of the analysis.

    Attributes
    ----------
    atomic : tuple of AxisGroup
        Every group that is no combination of others, in program order.
    composites : tuple of AxisGroup
        Whole axes of constants that are products or rows of atomic groups.
    const_axes : mapping
        (binding, argument path) of every constant operand -> its axes.
    index_axes : mapping
        (binding, argument path) of a constant index -> the axis that its values point into.
    value_axes : mapping
        Variable -> its axes, for tensors of known rank.
    opaque_states : tuple of (str, str)
        As given to the analysis.
    """

    atomic: tuple[AxisGroup, ...]
    composites: tuple[AxisGroup, ...]
    const_axes: Mapping[tuple[Var, tuple[int, ...]], tuple[AxisStructure, ...]] = field(repr=False)
    index_axes: Mapping[tuple[Var, tuple[int, ...]], AxisStructure] = field(repr=False)
    value_axes: Mapping[Var, tuple[AxisStructure, ...]] = field(repr=False)
    opaque_states: tuple[tuple[str, str], ...] = ()

    @cached_property
    def free(self) -> tuple[AxisGroup, ...]:
        """Atomic groups that may be permuted and that have constants or parameters."""
        return tuple(group for group in self.atomic if group.free and _is_stored(group))

    @cached_property
    def idle(self) -> tuple[AxisGroup, ...]:
        """Unpinned atomic groups that no stored tensor has: nothing could be rewritten."""
        return tuple(group for group in self.atomic if group.free and not _is_stored(group))

    @cached_property
    def pinned(self) -> tuple[AxisGroup, ...]:
        """Atomic groups that must keep their order, each with its reasons."""
        return tuple(group for group in self.atomic if group.pins)

    @cached_property
    def by_id(self) -> Mapping[str, AxisGroup]:
        """Every atomic and composite group by its id."""
        return {group.id: group for group in (*self.atomic, *self.composites)}

    def get(self, group_id: str) -> AxisGroup:
        """Return a group.

        Raises
        ------
        PermutationError
            If there is none of that id.
        """
        group = self.by_id.get(group_id)
        if group is None:
            free = ", ".join(g.id for g in self.free[:4])
            raise PermutationError(f"no axis group {group_id!r}", f"free groups: {free}, ...")
        return group

    def to_json(self) -> dict[str, Any]:
        """Return a description of plain JSON values."""
        return {
            "format": "icd/axis_groups/v1",
            "free": [group.to_json() for group in self.free],
            "composites": [group.to_json() for group in self.composites],
            "pinned": [group.to_json() for group in self.pinned],
            "opaque_states": [list(pair) for pair in self.opaque_states],
        }


def _is_stored(group: AxisGroup) -> bool:
    return bool(group.consts) or any(member.kind == "param" for member in group.members)


def find_axis_groups(
    func: relax.Function,
    *,
    opaque_states: Sequence[tuple[str, str]] = (),
    keep_outputs: bool = True,
) -> AxisGroups:
    """Find every function-preserving index permutation of a Relax function.

    Constants are seen once per use, so two uses of one constant may be permuted differently.
    No constant is read except small index tensors.

    Parameters
    ----------
    func : relax.Function
        In A-normal form, as the ONNX importer makes it. Parameters beyond the attribute
        ``num_input`` count as weights.
    opaque_states : sequence of (input name, output name)
        States that only this function reads: their input and output axes are tied to each
        other instead of pinned. An output is named by its variable or by its number ("1").
    keep_outputs : bool
        False lets outputs be permuted; the caller then owns the inverse.

    Returns
    -------
    AxisGroups

    Raises
    ------
    TransformError
        If a state names no input or output, or changes its shape.
    """
    found = tracing.trace(func, opaque_states, keep_outputs)
    return _Collector(found, tuple(opaque_states)).collect()


@dataclass
class _Draft:
    """An atomic group while it is collected."""

    root: Dim
    id: str = ""
    pins: dict[Pin, None] = field(default_factory=dict)
    counted: dict[Pin, None] = field(default_factory=dict)
    roles: dict[str, None] = field(default_factory=dict)
    members: dict[Member, None] = field(default_factory=dict)
    ops: dict[OpUse, None] = field(default_factory=dict)
    consts: list[ConstUse] = field(default_factory=list)
    weights: list[WeightUse] = field(default_factory=list)
    values: list[ValueUse] = field(default_factory=list)
    bytes_of: dict[Any, int] = field(default_factory=dict)

    def build(self) -> AxisGroup:
        structure = AxisStructure("leaf", self.root.size, self.id)
        return AxisGroup(
            id=self.id,
            size=self.root.size,
            constraint=_constraint(self.id, [use.structure for use in self.consts]),
            structure=structure,
            role=", ".join(role for role in self.roles if role != "softmax"),
            members=tuple(self.members),
            ops=tuple(self.ops),
            bytes_touched=sum(self.bytes_of.values()),
            pins=tuple(self.pins),
            counted=tuple(self.counted),
            weights=tuple(self.weights),
            consts=tuple(self.consts),
            values=tuple(self.values),
        )


def _constraint(group: str, structures: Sequence[AxisStructure]) -> Constraint:
    """How an atomic group lies in the stored axes that contain it."""
    if not structures or any(structure.is_leaf for structure in structures):
        return "free"
    if any(_repeats(structure, group) for structure in structures):
        return "pairs"
    if any(_inside(structure, group, "product") for structure in structures):
        return "factored"
    return "segments"


def _repeats(structure: AxisStructure, group: str) -> bool:
    return sum(leaf.group == group for leaf in structure.leaves()) > 1


def _inside(structure: AxisStructure, group: str, kind: str) -> bool:
    """True if some node of a kind stands above the group."""
    if group not in structure.groups():
        return False
    return structure.kind == kind or any(_inside(p, group, kind) for p in structure.parts)


def _composite_constraint(structure: AxisStructure) -> Constraint:
    if any(_repeats(structure, group) for group in structure.groups()):
        return "pairs"
    return "factored" if structure.kind == "product" else "segments"


class _Collector:
    """Turn the tied dimensions of a trace into groups."""

    def __init__(self, found: tracing.Trace, opaque_states: tuple[tuple[str, str], ...]) -> None:
        self.found = found
        self.opaque_states = opaque_states
        self.drafts: dict[Dim, _Draft] = {}
        self.taken: dict[str, int] = {}
        self.structures: dict[Dim, AxisStructure] = {}
        self.seen_above: set[Dim] = set()
        self.const_axes: dict[tuple[Var, tuple[int, ...]], tuple[AxisStructure, ...]] = {}
        self.index_axes: dict[tuple[Var, tuple[int, ...]], AxisStructure] = {}
        self.value_axes: dict[Var, tuple[AxisStructure, ...]] = {}
        self.composites: dict[AxisStructure, list[ConstUse]] = {}
        self.composite_ids: dict[AxisStructure, str] = {}

    def collect(self) -> AxisGroups:
        """Visit everything in program order, so that ids do not depend on the data."""
        for param, kind, value in self.found.params:
            self._add_value(param, kind, value)
        for step in self.found.steps:
            self._add_value(step.var, "value", step.out)
            for use in step.uses:
                self._add_const(use)
            self._add_op(step)
        self._add_weights()
        self._inherit()
        by_id = {draft.id: draft.build() for draft in self.drafts.values()}
        return AxisGroups(
            atomic=tuple(by_id.values()),
            composites=tuple(self._composite(s, by_id) for s in self.composites),
            const_axes=self.const_axes,
            index_axes=self.index_axes,
            value_axes=self.value_axes,
            opaque_states=self.opaque_states,
        )

    # -- structures and ids

    def structure(self, dim: Dim, label: str) -> AxisStructure:
        """Return the tree of an axis; new leaves are named after the label."""
        root = dim.root()
        known = self.structures.get(root)
        if known is None:
            known = self.structures[root] = self._make_structure(root, label)
        return known

    def _make_structure(self, root: Dim, label: str) -> AxisStructure:
        if root.form == "leaf":
            return self._make_leaf(root, label)
        mark = "/" if label.count(":") else ":"
        parts: list[AxisStructure] = []
        for i, part in enumerate(root.parts):
            own = self.structure(part, f"{label}{mark}{i}")
            if own.kind == root.form:
                parts.extend(own.parts)
            elif own.size != 1 or root.form == "segments":
                parts.append(own)
        return AxisStructure(root.form, root.size, "", tuple(parts))

    def _make_leaf(self, root: Dim, label: str) -> AxisStructure:
        if root.size in (0, 1):
            return AxisStructure("leaf", root.size)
        count = self.taken[label] = self.taken.get(label, 0) + 1
        name = label if count == 1 else f"{label}~{count}"
        self.drafts[root] = _Draft(root, name)
        return AxisStructure("leaf", root.size, name)

    def _drafts_of(self, structure: AxisStructure) -> Iterator[_Draft]:
        for group in structure.groups():
            yield self._by_name[group]

    @property
    def _by_name(self) -> dict[str, _Draft]:
        if len(self._names) != len(self.drafts):
            self._names = {draft.id: draft for draft in self.drafts.values()}
        return self._names

    _names: dict[str, _Draft] = {}  # noqa: RUF012
