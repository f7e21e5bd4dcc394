"""The data model of axis groups.

A group is a set of (tensor, axis) pairs, or factors of such axes, that one permutation must
reorder together for the function to stay the same. Atomic groups accept every permutation of
their size; composite groups describe whole axes of constants that are made of several atomic
ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from icd_tvm._tvm import GenericConst, Var
from icd_tvm.errors import PermutationError
from icd_tvm.relax_passes.axis_rules.dims import Pin
from icd_tvm.relax_passes.axis_structure import AxisStructure, Index, positions

Place = tuple[Var, tuple[int, ...]]
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

    def segments(self, group: str) -> list[slice]:
        """Return the runs of the axis that are an atomic group in its order; none if it is apart.

        A leaf is one run, gate and value of one matmul are two.
        """
        places = self.positions(group)
        starts = places[0]
        if not np.array_equal(places, np.add.outer(np.arange(len(places)), starts)):
            return []
        return [slice(int(start), int(start) + len(places)) for start in starts]


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
    blocks : tuple of int
        Block lengths of scales that are read block-wise along the group (`axis_blocks`): other
        orders than of whole blocks, and inside blocks, need a scale index for every row.
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
    blocks: tuple[int, ...] = ()
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
        return not self.structure.is_leaf

    @property
    def gathers(self) -> tuple[ValueUse, ...]:
        """Graph inputs and outputs at which a run-time gather would free a pinned group.

        Empty if the group is free, or if anything else pins it. The tokens of a pooled encoder
        are such a group: gathering ids and mask once lets every layer run in another order.
        """
        if not self.pins or any(pin.op not in ("input", "output") for pin in self.pins):
            return ()
        names = {pin.node for pin in self.pins}
        return tuple(use for use in self.values if use.var.name in names)

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
            "blocks": list(self.blocks),
            "gathers": [{"name": use.var.name, "axis": use.axis} for use in self.gathers],
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
    const_axes: Mapping[Place, tuple[AxisStructure, ...]] = field(repr=False)
    index_axes: Mapping[Place, AxisStructure] = field(repr=False)
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
        """Groups that must keep their order, each with its reasons."""
        fixed = [group for group in self.composites if not group.factors]
        return (*(group for group in self.atomic if group.pins), *fixed)

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
