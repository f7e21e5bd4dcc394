"""Find the KV cache of a decoder step: which states hold keys and values, along which slots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from icd_tvm._tvm import Call, Op, Var, relax
from icd_tvm.errors import ShapeError, TransformError
from icd_tvm.relax_passes.axis_groups import find_axis_groups
from icd_tvm.relax_passes.axis_model import AxisGroup, AxisGroups, ConstUse
from icd_tvm.relax_passes.relax_graph import Dataflow, static_shape

_SOFTMAX = "relax.nn.softmax"
_COMPARISONS = {
    f"relax.{name}"
    for name in ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal")
}
_SHAPE_ONLY = {"relax.reshape", "relax.expand_dims", "relax.squeeze", "relax.astype"}


@dataclass(frozen=True)
class KVStates:
    """The KV cache of a step.

    Attributes
    ----------
    layers : tuple of (str, str)
        Input names of each attention's keys and values, in program order.
    shape : (int, int, int)
        KV heads, slots and channels of the keys.
    groups : AxisGroups
        The analysis they were found by.
    slots : tuple of str
        Ids of the groups of the slot axes.
    length : str
        Input that slot numbers are compared with: how many are filled; empty if there is none.
    """

    layers: tuple[tuple[str, str], ...]
    shape: tuple[int, int, int]
    groups: AxisGroups
    slots: tuple[str, ...]
    length: str = ""


def find_kv_states(func: Any, opaque_states: Sequence[tuple[str, str]]) -> KVStates:
    """Find the keys and values that the attentions of a function read from its states.

    The slot axis is the one a softmax normalises and a state has; keys are the state before the
    softmax, values the state that its result is multiplied with. No name is interpreted.

    Parameters
    ----------
    func : relax.Function
    opaque_states : sequence of (input name, output name)

    Returns
    -------
    KVStates

    Raises
    ------
    TransformError
        No state, a name that is no input or output, no attention over a state, or an op that
        ties a slot to a position, so that tokens cannot be moved to other slots.
    ShapeError
        A state is not [1, heads, slots, channels], or attentions differ in theirs.
    """
    if not opaque_states:
        raise TransformError("no opaque state is given", "name the cache's inputs and outputs")
    groups = find_axis_groups(func, opaque_states=opaque_states)
    finder = _Finder(func, groups, {name for name, _ in opaque_states})
    layers = tuple(finder.layers())
    if not layers:
        raise TransformError(
            "no softmax normalises an axis of a state",
            f"states: {', '.join(name for name, _ in opaque_states)}",
        )
    finder.check_all_found(layers)
    shape = finder.shape(layers)
    for group in finder.slots:
        finder.check_constants(groups.get(group))
    length = next(iter(finder.lengths), "") if len(finder.lengths) == 1 else ""
    return KVStates(layers, shape, groups, tuple(finder.slots), length)


class _Finder:
    def __init__(self, func: Any, groups: AxisGroups, states: set[str]) -> None:
        self.flow = Dataflow(func)
        self.groups = groups
        self.states = {p.name: p for p in func.params if p.name in states}
        self.params = set(func.params)
        self.slots: dict[str, None] = {}
        self.lengths: set[str] = set()

    def layers(self) -> Iterator[tuple[str, str]]:
        """Yield the names of keys and values of every attention over a state."""
        for var, value in self.flow.values.items():
            if self.flow.call(var, _SOFTMAX) is None:
                continue
            axis = self.groups.value_axes[var][int(value.attrs.axis)]
            group = axis.group
            if not group or not any(self._has(p, group) for p in self.states.values()):
                continue
            _check_group(self.groups.get(group))
            self.slots[group] = None
            key = self._only(self._sources(var, group), var, "keys")
            product = self._contraction(var, group)
            found = self._sources(product, group) - {key}
            yield key, self._only(found, product, "values")

    def _has(self, var: Var, group: str) -> bool:
        return any(group in axis.groups() for axis in self.groups.value_axes.get(var, ()))

    def _sources(self, var: Var, group: str) -> set[str]:
        """Return the states that ``var`` is computed from along the slots."""
        found, stack, seen = set(), [var], {var}
        while stack:
            current = stack.pop()
            if current.name in self.states and self.states[current.name].same_as(current):
                found.add(str(current.name))
            for used in _operands(self.flow.values.get(current)):
                if used not in seen and self._has(used, group):
                    seen.add(used)
                    stack.append(used)
        return found

    def _contraction(self, var: Var, group: str) -> Var:
        """Follow the probabilities to the product that sums over the slots."""
        start = var
        while var is not None and self._has(var, group):
            var = self.flow.only_user(var)
        if var is None or self.flow.call(var, "relax.matmul") is None:
            raise TransformError(f"the softmax at {start.name!r} is not followed by one matmul")
        return var

    def _only(self, found: set[str], var: Var, what: str) -> str:
        if len(found) != 1:
            names = ", ".join(sorted(found)) or "none"
            raise TransformError(f"the {what} at {var.name!r} come from {names}, not one state")
        return found.pop()

    def check_all_found(self, layers: Sequence[tuple[str, str]]) -> None:
        """Refuse a state that has slots and is no attention's keys or values."""
        used = [name for pair in layers for name in pair]
        for name, param in self.states.items():
            if any(self._has(param, group) for group in self.slots) and used.count(name) != 1:
                raise TransformError(
                    f"state {name!r} is read by {used.count(name)} attentions, not one",
                    "each layer needs keys and values of its own",
                )

    def shape(self, layers: Sequence[tuple[str, str]]) -> tuple[int, int, int]:
        """Return KV heads, slots and channels, the same for all layers."""
        first = static_shape(self.states[layers[0][0]]) or ()
        for index, name in ((i, name) for pair in layers for i, name in enumerate(pair)):
            shape = static_shape(self.states[name]) or ()
            whole = self.groups.value_axes[self.states[name]]
            if len(shape) != 4 or shape[0] != 1 or whole[2].group not in self.slots:
                raise ShapeError(
                    f"state {name!r} has shape {list(shape)}, not [1, heads, slots, channels]"
                )
            if shape[1:3] != first[1:3] or (index == 0 and shape != first):
                raise ShapeError(f"state {name!r} has shape {list(shape)}, others {list(first)}")
        return first[1], first[2], first[3]

    def check_constants(self, group: AxisGroup) -> None:
        """Allow only constants for which it does not matter which token a slot holds."""
        ops = {use.node: use.op for use in group.ops}
        for use in group.consts:
            array = np.moveaxis(use.const.value.numpy(), use.axis, 0)
            if use.structure.is_leaf and (array == array[:1]).all():
                continue
            numbers = use.structure.is_leaf and array.size == len(array)
            numbers = numbers and bool((array.ravel() == np.arange(len(array))).all())
            if not numbers or ops.get(use.node) not in _COMPARISONS:
                raise _tied(use, ops.get(use.node, "?"), "holds a value for every slot")
            self._check_length(use, ops[use.node], group.id)

    def _check_length(self, use: ConstUse, op: str, group: str) -> None:
        """Slot numbers may be compared with an input that nothing else reads: the length."""
        for value in self.flow.values.values():
            if not isinstance(value, Call) or not any(use.const.same_as(a) for a in value.args):
                continue
            others = _operands(value)
            if not others:
                raise _tied(use, op, "is compared with a constant")
            for other in others:
                source = self._through_shapes(other)
                if source not in self.params:
                    raise _tied(use, op, "is compared with a computed slot")
                if not self._only_compared(source, group):
                    raise _tied(use, op, f"is compared with {source.name!r}, used elsewhere too")
                self.lengths.add(str(source.name))

    def _through_shapes(self, var: Any) -> Any:
        while True:
            value = self.flow.values.get(var)
            if value is None or _op_name(value) not in _SHAPE_ONLY:
                return var
            var = value.args[0]

    def _only_compared(self, var: Var, group: str) -> bool:
        for user in self.flow.users.get(var, []):
            if user is None:
                return False
            name = _op_name(self.flow.values[user])
            if name in _SHAPE_ONLY:
                if not self._only_compared(user, group):
                    return False
            elif name not in _COMPARISONS or not self._has(user, group):
                return False
        return True


def _check_group(group: AxisGroup) -> None:
    if group.pins:
        pin = group.pins[0]
        raise TransformError(f"the slots cannot move: {pin.reason} ({pin.op} at {pin.node!r})")
    for pin in group.counted:
        if pin.op != _SOFTMAX:
            raise TransformError(
                f"the slots cannot be fewer: {pin.reason} ({pin.op} at {pin.node!r})"
            )


def _tied(use: ConstUse, op: str, why: str) -> TransformError:
    name = use.name or "a constant"
    return TransformError(
        f"the slots cannot move: {name} {why} ({op} at {use.node!r})",
        "compaction gives tokens other slots; tie positions to an input instead",
    )


def _operands(value: Any) -> list[Var]:
    return [] if value is None else list(relax.analysis.free_vars(value))


def _op_name(value: Any) -> str:
    return str(value.op.name) if isinstance(value, Call) and isinstance(value.op, Op) else ""
