"""Find the hidden units, or the attention heads, of a group that contribute nothing.

A unit is dead if every contraction that consumes it meets a zero: a zero row of the weight, or
an activation that is zero for every input. Zero activations are followed from the producing
weights through bias and activation function, so a model whose exporter pruned only one side of
a layer is recognised as well. Dequantised weights count with the values they stand for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icd_tvm._tvm import GenericConst, Var, relax
from icd_tvm.relax_passes.axis_model import AxisGroup, ConstUse, ValueUse
from icd_tvm.relax_passes.axis_structure import positions
from icd_tvm.relax_passes.constant_values import ConstantValues
from icd_tvm.relax_passes.index_ops import (
    ZERO_IF_BOTH,
    ZERO_TO_ZERO,
    is_depthwise,
    is_indexwise,
    is_scan,
    op_name,
    operand_exprs,
)

Units = NDArray[np.bool_]
_REDUCED = ("relax.sum", "relax.max", "relax.min")


def dead_units(func: Any, group: AxisGroup) -> Units:
    """Return which indices of a hidden group cannot influence the function.

    Parameters
    ----------
    func : relax.Function
        The function that holds the group.
    group : AxisGroup

    Returns
    -------
    numpy.ndarray
        bool [group.size]; all False if anything but a matmul or a sum mixes the units, or if a
        value has the group on two axes.
    """
    return _Search(func, group).dead()


def dead_heads(func: Any, group: AxisGroup) -> Units:
    """Return which heads of an attention cannot influence the function.

    Parameters
    ----------
    func : relax.Function
    group : AxisGroup
        Any free group.

    Returns
    -------
    numpy.ndarray
        bool [group.size]; never all True, so that the axis does not become empty. All False if
        the group is no head axis, or if anything depends on the number of heads.
    """
    if "heads" not in group.role or not any(use.side == "K" for use in group.weights):
        return np.zeros(group.size, dtype=bool)
    dead = _Search(func, group, apart=True).dead()
    dead[0] &= not dead.all()
    return dead


class _Search:
    """Walks a function once; `zero` says at which units each value is always zero.

    With ``apart`` only contractions mix the indices, whatever the ops: of heads the analysis of
    the axes has made sure.
    """

    def __init__(self, func: Any, group: AxisGroup, apart: bool = False) -> None:
        self.func, self.group, self.apart = func, group, apart
        self.values = ConstantValues(func)
        self.zero: dict[Any, Units] = {}
        self.axes: dict[Any, list[ValueUse]] = {}
        self.consts: dict[tuple[Any, str], list[ConstUse]] = {}
        for value in group.values:
            self.axes.setdefault(value.var, []).append(value)
        for const in group.consts:
            self.consts.setdefault((const.const, const.node), []).append(const)

    def dead(self) -> Units:
        twice = any(len(uses) > 1 and var not in self.values for var, uses in self.axes.items())
        if twice or self.group.counted:
            return self._none()
        dead, consumed = np.ones(self.group.size, dtype=bool), False
        for block in self.func.body.blocks:
            for binding in block.bindings:
                if binding.var in self.values:
                    continue
                for silent in self._contracted(binding):
                    consumed, dead = True, dead & silent
                if binding.var in self.axes or isinstance(binding.var.ty, relax.TupleType):
                    self.zero[binding.var] = self._zero_units(binding)
        return dead if consumed else self._none()

    def _none(self) -> Units:
        return np.zeros(self.group.size, dtype=bool)

    def _axis(self, expr: Any) -> int | None:
        """Return the axis of an activation that holds the group."""
        if not isinstance(expr, Var) or expr in self.values or expr not in self.axes:
            return None
        return self.axes[expr][0].axis - len(expr.ty.shape.values)

    # -- what consumes the units

    def _contracted(self, binding: Any) -> Iterator[Units]:
        """Yield, for every contraction over the units, those that contribute nothing to it."""
        var, value = binding.var, getattr(binding, "value", None)
        if value is None:
            yield self._none()
            return
        read = [expr for expr in operand_exprs(value) if self._axis(expr) is not None]
        if not read:
            return
        if op_name(value) == "relax.matmul":
            yield from self._product(var, value)
        elif op_name(value) in _REDUCED and var not in self.axes:
            # Of a range too: in a group without ``counted`` it always holds zero.
            yield self._zero(value.args[0], var.name)
        elif op_name(value) == "relax.take" and var not in self.axes:
            yield self._unread(value)
        elif not (self.apart or self._kept_apart(var, value, read)):
            yield self._none()

    def _product(self, var: Any, call: Any) -> Iterator[Units]:
        left, right = call.args
        rank = len(right.ty.shape.values)
        if self._axis(left) == -1 or (rank > 1 and self._axis(right) == -2):
            yield self._zero(left, var.name, -1) | self._zero(right, var.name, -min(rank, 2))
        elif var not in self.axes:
            yield self._none()

    def _unread(self, call: Any) -> Units:
        """Say which units a constant index does not read."""
        index = self.values.array(call.args[1])
        if index is None or call.args[0] not in self.axes:
            return self._none()
        places = positions(self.axes[call.args[0]][0].structure, self.group.id)
        return np.asarray(~np.isin(places, index).any(axis=1))

    def _kept_apart(self, var: Any, value: Any, read: Sequence[Any]) -> bool:
        """Whether an op treats the units one by one; a scan sums over its last axis."""
        if is_scan(value) and any(self._axis(expr) == -1 for expr in read):
            return False
        known = var in self.axes or isinstance(var.ty, relax.TupleType)
        return known and is_indexwise(value)

    # -- where values are zero

    def _zero_units(self, binding: Any) -> Units:
        var, value = binding.var, getattr(binding, "value", None)
        if isinstance(value, Var):
            return self._zero(value, var.name)
        if isinstance(value, relax.TupleGetItem):
            return self._zero(value.tuple_value, var.name)
        name = op_name(value)
        if name == "relax.matmul":
            return self._zero_product(value, var.name)
        zeros = [self._zero(arg, var.name) for arg in self._tensors(value, name)]
        if name in ZERO_TO_ZERO or name == "relax.divide":
            return zeros[0]
        if name in ZERO_IF_BOTH:
            return np.logical_and.reduce(zeros)
        if name == "relax.multiply" or is_depthwise(value):
            return np.logical_or.reduce(zeros)
        return self._none()

    @staticmethod
    def _tensors(value: Any, name: str) -> list[Any]:
        if name == "relax.concat":
            return operand_exprs(value)
        return list(value.args) if name else []

    def _zero_product(self, call: Any, node: str) -> Units:
        """Zero where an operand is along an axis that is not summed over."""
        result = self._none()
        for operand, summed in zip(call.args, (-1, -2), strict=True):
            axis = self._axis(operand)
            if axis is not None and axis != summed:
                result |= self._zero(operand, node)
            elif axis is None and operand in self.values:
                result |= self._zero(operand, node, -1 if summed == -2 else -2)
        return result

    def _zero(self, operand: Any, node: str, axis: int | None = None) -> Units:
        """Return the units at which an operand is zero, along its axis of the group."""
        if operand in self.values:
            return self._zero_constant(operand, node, axis)
        return self.zero.get(operand, self._none())

    def _zero_constant(self, operand: Any, node: str, axis: int | None) -> Units:
        array = self.values.array(operand)
        assert array is not None
        uses: Sequence[Any] = (
            self.consts.get((operand, node), ())
            if isinstance(operand, GenericConst)
            else self.axes.get(operand, ())
        )
        uses = [use for use in uses if axis is None or use.axis == array.ndim + axis]
        if len(uses) != 1:
            return np.full(self.group.size, not uses and not array.any())
        places = positions(uses[0].structure, self.group.id)
        rows = np.moveaxis(array, uses[0].axis, 0).reshape(array.shape[uses[0].axis], -1)
        used = np.asarray(rows.any(axis=1))
        return np.asarray(~used[places].any(axis=1))
