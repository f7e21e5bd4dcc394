"""Turn the tied dimensions of a trace into axis groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from icd_tvm._tvm import Var, const_name, relax
from icd_tvm.relax_passes.axis_model import (
    AxisGroup,
    AxisGroups,
    Constraint,
    ConstUse,
    Member,
    OpUse,
    Place,
    ValueUse,
    WeightUse,
)
from icd_tvm.relax_passes.axis_rules.dims import Dim, Pin
from icd_tvm.relax_passes.axis_rules.site import Tensor, Value, static_size
from icd_tvm.relax_passes.axis_rules.trace import Step, Trace, Use
from icd_tvm.relax_passes.axis_structure import AxisStructure
from icd_tvm.relax_passes.axis_weights import WeightPaths, WeightView


@dataclass
class _Draft:
    """A group while it is collected."""

    id: str
    structure: AxisStructure
    root: Dim | None = None
    members: dict[Member, None] = field(default_factory=dict)
    ops: dict[OpUse, None] = field(default_factory=dict)
    consts: list[ConstUse] = field(default_factory=list)
    weights: list[WeightUse] = field(default_factory=list)
    values: list[ValueUse] = field(default_factory=list)
    bytes_of: dict[Any, int] = field(default_factory=dict)
    blocks: dict[int, None] = field(default_factory=dict)


def collect_groups(found: Trace, opaque_states: tuple[tuple[str, str], ...]) -> AxisGroups:
    """Visit a trace in program order and describe its groups."""
    collector = _Collector()
    for param, kind, value in found.params:
        collector.add_value(param, kind, value)
    for var, value in _computed(found):
        collector.name_axes(var, value)
    for step in found.steps:
        collector.add_step(step)
    return collector.groups(opaque_states)


def _computed(found: Trace) -> Iterator[tuple[Var, Value]]:
    """Yield the results that depend on an input.

    They name their groups before constants do: quantising a weight puts operations on constants
    into a graph, and the groups keep their names.
    """
    computed = {param for param, _, _ in found.params}
    for step in found.steps:
        read = {operand for operand in step.operands if isinstance(operand, Var)}
        if read & computed or not step.op.startswith("relax."):
            computed.add(step.var)
            yield step.var, step.out


class _Collector:
    """State of one collection; ids are taken from the first name that meets a group."""

    def __init__(self) -> None:
        self.structures: dict[Dim, AxisStructure] = {}
        self.atomic: dict[str, _Draft] = {}
        self.composite: dict[AxisStructure, _Draft] = {}
        self.taken: dict[str, int] = {}
        self.weights = WeightPaths()
        self.const_axes: dict[Place, tuple[AxisStructure, ...]] = {}
        self.index_axes: dict[Place, AxisStructure] = {}
        self.value_axes: dict[Var, tuple[AxisStructure, ...]] = {}

    def add_step(self, step: Step) -> None:
        """Collect one binding: its result, its constants, and the op for all it touches."""
        self.add_value(step.var, "value", step.out)
        for use in step.uses:
            self._add_const(use)
        self._add_op(step)
        self._add_weights(step)
        self.weights.follow(step)

    def add_value(self, var: Var, kind: Literal["value", "param"], value: Value) -> None:
        """Collect a variable of known rank."""
        if not isinstance(value, Tensor):
            return
        shape = _shape(var.ty)
        axes = tuple(self._structure(dim, f"{var.name}:{i}") for i, dim in enumerate(value.axes))
        self.value_axes[var] = axes
        for i, structure in enumerate(axes):
            use = ValueUse(var, i, structure)
            for draft in self._drafts(structure):
                draft.members[Member(kind, var.name, i, shape, structure.text())] = None
                draft.values.append(use)
                draft.bytes_of[var] = tensor_bytes(var.ty)

    def name_axes(self, var: Var, value: Value) -> None:
        """Give the axes of a variable their groups, named after it if they are new."""
        if isinstance(value, Tensor):
            for i, dim in enumerate(value.axes):
                self._structure(dim, f"{var.name}:{i}")

    def _add_const(self, use: Use) -> None:
        place = (use.var, use.path)
        name = const_name(use.const)
        label = name or f"{use.var.name}.arg{'.'.join(map(str, use.path))}"
        shape = _shape(use.const.ty)
        axes = tuple(self._structure(dim, f"{label}:{i}") for i, dim in enumerate(use.axes))
        self.const_axes[place] = axes
        if use.points_to is not None:
            self.index_axes[place] = self._structure(use.points_to, f"{label}:values")
            self._note_blocks(use, axes)
        for i, structure in enumerate(axes):
            self._add_composite(structure, f"{label}:{i}")
            own = ConstUse(use.const, name, i, use.var.name, structure)
            for draft in self._drafts(structure):
                draft.members[Member("const", label, i, shape, structure.text())] = None
                draft.consts.append(own)
                draft.bytes_of[use.const] = tensor_bytes(use.const.ty)

    def _note_blocks(self, use: Use, axes: tuple[AxisStructure, ...]) -> None:
        """An index ``i // block`` reads one row of a table for every block of an axis."""
        values = use.const.value.numpy()
        if len(axes) != 1 or not axes[0].group or not axes[0].is_leaf:
            return
        block = int(np.count_nonzero(values == values[0]))
        if 1 < block < values.size and np.array_equal(values, np.arange(values.size) // block):
            self.atomic[axes[0].group].blocks[block] = None

    def _add_op(self, step: Step) -> None:
        if not step.op.startswith(("relax.", "call")):
            return
        use = OpUse(step.op, step.var.name)
        structures = {
            self.structures[dim.root()]
            for value in (*step.args, step.out)
            for dim in _known_axes(value)
            if dim.root() in self.structures
        }
        for structure in structures:
            for draft in self._drafts(structure):
                draft.ops[use] = None

    def _add_weights(self, step: Step) -> None:
        """Record a 2-D constant that is the right side of a matmul, also dequantised."""
        if step.op == "relax.matmul" and len(step.args) == 2:
            weight = self.weights.weight(step, 1)
            if weight is not None and len(weight.order) == 2:
                self._add_weight(step.var.name, weight, 0, "K")
                self._add_weight(step.var.name, weight, 1, "N")

    def _add_weight(
        self, node: str, weight: WeightView, view_axis: int, side: Literal["K", "N"]
    ) -> None:
        axis, const = weight.order[view_axis], weight.use.const
        structure = self.const_axes[weight.use.var, weight.use.path][axis]
        use = WeightUse(const, const_name(const), axis, side, node, _shape(const.ty), structure)
        for draft in self._drafts(structure):
            draft.weights.append(use)

    # -- structures and ids

    def _structure(self, dim: Dim, label: str) -> AxisStructure:
        """Return the tree of an axis; new leaves are named after the label."""
        root = dim.root()
        known = self.structures.get(root)
        if known is None:
            make = self._leaf if root.form == "leaf" else self._inner
            known = self.structures[root] = make(root, label)
        return known

    def _leaf(self, root: Dim, label: str) -> AxisStructure:
        if root.size in (0, 1):
            return AxisStructure("leaf", root.size)
        name = self._unique(label)
        structure = AxisStructure("leaf", root.size, name)
        self.atomic[name] = _Draft(name, structure, root)
        return structure

    def _inner(self, root: Dim, label: str) -> AxisStructure:
        parts: list[AxisStructure] = []
        for i, part in enumerate(root.parts):
            own = self._structure(part, f"{label}.{i}")
            if own.kind == root.form:
                parts.extend(own.parts)
            else:
                parts.append(own)
        return AxisStructure(root.form, root.size, "", tuple(parts))

    def _unique(self, label: str) -> str:
        count = self.taken[label] = self.taken.get(label, 0) + 1
        return label if count == 1 else f"{label}~{count}"

    def _add_composite(self, structure: AxisStructure, label: str) -> None:
        if not structure.is_leaf and structure not in self.composite:
            self.composite[structure] = _Draft(self._unique(label), structure)

    def _drafts(self, structure: AxisStructure) -> list[_Draft]:
        """Return the groups that an axis belongs to: its leaves, and itself if composite."""
        drafts = [self.atomic[group] for group in structure.groups()]
        own = self.composite.get(structure)
        return drafts if own is None else [*drafts, own]

    # -- results

    def groups(self, opaque_states: tuple[tuple[str, str], ...]) -> AxisGroups:
        """Return everything that was collected."""
        atomic = tuple(self._atomic_group(draft) for draft in self.atomic.values())
        by_id = {group.id: group for group in atomic}
        return AxisGroups(
            atomic=atomic,
            composites=tuple(_composite(d, by_id) for d in self.composite.values()),
            const_axes=self.const_axes,
            index_axes=self.index_axes,
            value_axes=self.value_axes,
            opaque_states=opaque_states,
        )

    @staticmethod
    def _atomic_group(draft: _Draft) -> AxisGroup:
        root = draft.root
        assert root is not None
        constraint = _constraint(draft.id, [use.structure for use in draft.consts])
        role = ", ".join(role for role in root.roles if role != "softmax")
        pins, counted = tuple(root.pins), tuple(root.counted)
        return _group(draft, constraint, (), role, pins=pins, counted=counted)


def _group(
    draft: _Draft, constraint: Constraint, factors: tuple[str, ...], role: str, **notes: Any
) -> AxisGroup:
    return AxisGroup(
        id=draft.id,
        size=draft.structure.size,
        constraint=constraint,
        structure=draft.structure,
        factors=factors,
        role=role,
        members=tuple(draft.members),
        ops=tuple(draft.ops),
        bytes_touched=sum(draft.bytes_of.values()),
        weights=tuple(draft.weights),
        consts=tuple(draft.consts),
        values=tuple(draft.values),
        blocks=tuple(draft.blocks),
        **notes,
    )


def _composite(draft: _Draft, atomic: dict[str, AxisGroup]) -> AxisGroup:
    """A composite is pinned if nothing on it can move."""
    if not draft.structure.groups():
        pin = Pin("segments", draft.consts[0].node, "cut into segments of one index")
        return _group(draft, "segments", (), "", pins=(pin,))
    factors = draft.structure.groups()
    parts = [atomic[factor] for factor in factors]
    pins = [] if any(part.free for part in parts) else [pin for p in parts for pin in p.pins]
    counted = dict.fromkeys(pin for part in parts for pin in part.counted)
    constraint = _composite_constraint(draft.structure)
    role = " x ".join(part.role for part in parts if part.role)
    notes = {"pins": tuple(dict.fromkeys(pins)), "counted": tuple(counted)}
    return _group(draft, constraint, factors, role, **notes)


def _composite_constraint(structure: AxisStructure) -> Constraint:
    if any(_repeats(structure, group) for group in structure.groups()):
        return "pairs"
    return "factored" if structure.kind == "product" else "segments"


def _constraint(group: str, structures: Sequence[AxisStructure]) -> Constraint:
    """How an atomic group lies in the stored axes that contain it."""
    if not structures or any(structure.is_leaf for structure in structures):
        return "free"
    if any(_repeats(structure, group) for structure in structures):
        return "pairs"
    if any(_below_product(structure, group) for structure in structures):
        return "factored"
    return "segments"


def _repeats(structure: AxisStructure, group: str) -> bool:
    return sum(leaf.group == group for leaf in structure.leaves()) > 1


def _below_product(structure: AxisStructure, group: str) -> bool:
    if group not in structure.groups():
        return False
    inside = (_below_product(part, group) for part in structure.parts)
    return structure.kind == "product" or any(inside)


def _known_axes(value: Value) -> list[Dim]:
    if isinstance(value, Tensor):
        return list(value.axes)
    return [axis for item in value or () for axis in _known_axes(item)]


def _shape(ty: Any) -> tuple[int, ...]:
    if not isinstance(ty.shape, relax.ShapeExpr):
        return (-1,) * max(ty.ndim, 0)
    return tuple(static_size(size) for size in ty.shape.values)


def tensor_bytes(ty: Any) -> int:
    """Size in bytes; symbolic dimensions count as 1."""
    width = _bits(ty.dtype) // 8
    return int(np.prod([max(size, 1) for size in _shape(ty)], dtype=np.int64)) * max(width, 1)


def _bits(dtype: Any) -> int:
    text = str(getattr(dtype, "dtype", dtype))
    digits = "".join(c for c in text.split("_")[0] if c.isdigit())
    return 8 if text.startswith("float8") or text == "bool" else int(digits or 32)
