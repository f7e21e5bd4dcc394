"""The order in which a rewritten module keeps its opaque states: module attribute and conversions.

A caller that starts from zeros need not know it. A saved state must be converted, and so must
a state that is compared with another module's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from icd_tvm._tvm import tvm
from icd_tvm.errors import ShapeError
from icd_tvm.relax_passes.axis_model import AxisGroups
from icd_tvm.relax_passes.axis_rules.trace import state_places
from icd_tvm.relax_passes.axis_structure import Index, axis_index

STATE_ORDER = "icd.state_order"


@dataclass(frozen=True)
class StateAxis:
    """One axis of one state that a module keeps in an order of its own.

    Attributes
    ----------
    name : str
        Parameter of ``main`` that takes the state.
    output : int
        Number of the output that returns it.
    axis : int
    size : int
        Indices before any were removed.
    order : numpy.ndarray
        int64, ``own[i] = original[order[i]]``; shorter than ``size`` where indices were removed.
    """

    name: str
    output: int
    axis: int
    size: int
    order: Index

    def to_own(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return a state in the module's order."""
        if array.ndim <= self.axis or array.shape[self.axis] != self.size:
            raise ShapeError(
                f"state {self.name!r} has shape {array.shape}, expected {self.size} on axis "
                f"{self.axis}",
                "pass the state as the original model has it",
            )
        return np.take(array, self.order, axis=self.axis)

    def to_original(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return a state in the original order; removed indices, which play no part, are zero."""
        shape = list(array.shape)
        shape[self.axis] = self.size
        result = np.zeros(shape, array.dtype)
        np.moveaxis(result, self.axis, 0)[self.order] = np.moveaxis(array, self.axis, 0)
        return result


@dataclass(frozen=True)
class StateOrder:
    """Every state axis of a module whose order is not the original one."""

    axes: tuple[StateAxis, ...] = ()

    @classmethod
    def read(cls, mod: Any) -> StateOrder:
        """Return what ``icd.state_order`` of ``mod`` says; absent reads as the original order."""
        if mod.attrs is None or STATE_ORDER not in mod.attrs:
            return cls()
        return cls(tuple(_decode(entry) for entry in mod.attrs[STATE_ORDER]))

    def inputs_to_own(self, inputs: Mapping[str, ArrayLike]) -> dict[str, NDArray[Any]]:
        """Convert original inputs by parameter name; what is no state passes.

        Raises
        ------
        ShapeError
            If a state has not the original size.
        """
        arrays = {name: np.asarray(array) for name, array in inputs.items()}
        for own in self.axes:
            if own.name in arrays:
                arrays[own.name] = own.to_own(arrays[own.name])
        return arrays

    def inputs_to_original(self, inputs: Mapping[str, ArrayLike]) -> dict[str, NDArray[Any]]:
        """Convert the module's inputs back to the original order."""
        arrays = {name: np.asarray(array) for name, array in inputs.items()}
        for own in self.axes:
            if own.name in arrays:
                arrays[own.name] = own.to_original(arrays[own.name])
        return arrays

    def outputs_to_own(self, outputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Convert original outputs, in the order of ``main``'s results."""
        arrays = list(outputs)
        for own in self.axes:
            arrays[own.output] = own.to_own(arrays[own.output])
        return arrays

    def outputs_to_original(self, outputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Convert the module's outputs back to the original order."""
        arrays = list(outputs)
        for own in self.axes:
            arrays[own.output] = own.to_original(arrays[own.output])
        return arrays


def record_states(mod: Any, func: Any, groups: AxisGroups, moved: Mapping[str, Index]) -> Any:
    """Note on a rewritten module which state axes it has reordered or shortened.

    Parameters
    ----------
    mod : tvm.IRModule
        The rewritten module, with the attribute of the one it was made from.
    func : relax.Function
        ``main`` as it was analysed.
    groups : AxisGroups
    moved : mapping of str to numpy.ndarray
        Atomic group id -> new order, or the indices that are kept.
    """
    params = {param.name: param for param in func.params}
    known = {(own.name, own.axis): own for own in StateOrder.read(mod).axes}
    for name, output in state_places(func, groups.opaque_states):
        for axis, structure in enumerate(groups.value_axes[params[name]]):
            if not set(structure.groups()) & moved.keys():
                continue
            index = axis_index(structure, moved)
            old = known.get((name, axis))
            size, order = (structure.size, index) if old is None else (old.size, old.order[index])
            known[name, axis] = StateAxis(name, output, axis, size, order)
    if not known:
        return mod
    return mod.with_attr(STATE_ORDER, [_encode(own) for own in known.values()])


def _encode(own: StateAxis) -> dict[str, Any]:
    order = tvm.runtime.tensor(own.order)
    return {**vars(own), "order": order}


def _decode(entry: Mapping[str, Any]) -> StateAxis:
    output, axis, size = (int(entry[key]) for key in ("output", "axis", "size"))
    return StateAxis(str(entry["name"]), output, axis, size, entry["order"].numpy())
