"""Remove indices of free axis groups: constants are sliced, every shape is inferred again.

Exact when the removed indices contribute nothing, for example hidden units whose outgoing
weights are all zero.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from icd_tvm._tvm import Call, GenericConst, Op, Var, const_name, named_const, relax
from icd_tvm.errors import PermutationError, TransformError
from icd_tvm.relax_passes.axis_model import AxisGroup, AxisGroups
from icd_tvm.relax_passes.axis_structure import AxisStructure, Index, axis_index, axis_size
from icd_tvm.relax_passes.index_ops import op_name, operand_exprs
from icd_tvm.relax_passes.state_order import record_states
from icd_tvm.tir_schedules.cpu.selective_scan import SCAN_PROGRAM, resized_scan


def compact_groups(
    mod: Any,
    groups: AxisGroups,
    keep: Mapping[str, ArrayLike],
    *,
    resizable: Collection[str] = (),
) -> Any:
    """Keep only some indices of free groups.

    Parameters
    ----------
    mod : tvm.IRModule
        ``main`` must be the function that was analysed. Left untouched.
    groups : AxisGroups
    keep : mapping of str to int array
        Atomic group id -> the indices to keep, each once, in their new order.
    resizable : collection of str
        Ops that may see fewer indices though their result depends on the number; the caller
        answers for what that means (a softmax over the tokens that are kept).

    Returns
    -------
    tvm.IRModule
        ``main`` with smaller constants and activations; bindings keep their names.

    Raises
    ------
    PermutationError
        If a group is unknown, composite or pinned, or its indices are invalid.
    TransformError
        If an op's result depends on the number of indices (a mean, a softmax, a literal
        size), so that removing some could not be exact.
    """
    kept = {
        group: _checked(groups.get(group), indices, resizable) for group, indices in keep.items()
    }
    func, mod = mod["main"], mod.clone()
    compactor = _Compactor(mod, groups, kept)
    mod["main"] = compactor.function(func)
    for name, kernel in compactor.kernels.items():
        mod[name] = kernel
    # Which indices of a resized axis stay is decided on the values of the state, outside.
    lasting = {
        group: index
        for group, index in kept.items()
        if not any(pin.op in resizable for pin in groups.get(group).counted)
    }
    return record_states(relax.transform.Normalize()(_used(mod)), func, groups, lasting)


def _used(mod: Any) -> Any:
    """Drop the kernels that ``main`` called before and calls no more."""
    called = {
        binding.value.args[0]
        for block in mod["main"].body.blocks
        for binding in block.bindings
        if op_name(binding.value) == "relax.call_tir"
    }
    for var, kernel in list(mod.functions_items()):
        if kernel.attrs is not None and SCAN_PROGRAM in kernel.attrs and var not in called:
            del mod[var]
    return mod


def _checked(group: AxisGroup, indices: ArrayLike, resizable: Collection[str]) -> Index:
    if group.composite or not group.free:
        why = group.pins[0].reason if group.pins else "it is made of several groups"
        raise PermutationError(f"group {group.id!r} cannot lose indices: {why}")
    counted = [pin for pin in group.counted if pin.op not in resizable]
    if counted:
        pin = counted[0]
        raise TransformError(
            f"group {group.id!r} cannot lose indices: {pin.reason} ({pin.op} at {pin.node!r})",
            "permute the group instead, or remove units of another group",
        )
    kept = np.asarray(indices)
    valid = kept.ndim == 1 and kept.size and np.issubdtype(kept.dtype, np.integer)
    if not valid or kept.min() < 0 or kept.max() >= group.size or np.unique(kept).size < kept.size:
        raise PermutationError(
            f"indices to keep of group {group.id!r} must be distinct, at least one, and in "
            f"[0, {group.size})"
        )
    return kept.astype(np.int64)


class _Compactor:
    """Rebuilds a function with smaller axes."""

    def __init__(self, mod: Any, groups: AxisGroups, kept: Mapping[str, Index]) -> None:
        self.kernels: dict[Any, Any] = {}
        self._mod, self._groups, self._kept = mod, groups, kept
        self._sizes = {group: int(indices.size) for group, indices in kept.items()}
        self._vars: dict[Var, Any] = {}
        self._made: dict[Any, GenericConst] = {}
        self._builder = relax.BlockBuilder(mod)

    def function(self, func: Any) -> Any:
        """Return the function with every binding rebuilt, in order."""
        params = [self._new_var(param, self._smaller_type(param)) for param in func.params]
        blocks = [self._block(block) for block in func.body.blocks]
        body = self._expr(func.body.body, None, ())
        seq = relax.SeqExpr(blocks, body)
        return relax.Function(params, seq, body.ty, func.is_pure, func.attrs, func.span)

    def _block(self, block: Any) -> Any:
        return type(block)([self._binding(binding) for binding in block.bindings], block.span)

    def _binding(self, binding: Any) -> Any:
        if not isinstance(binding, relax.VarBinding):
            raise TransformError(f"cannot compact past the match_cast at {binding.var.name!r}")
        value = self._expr(binding.value, binding.var, ())
        if isinstance(value, Call):
            value = self._resized(value, binding)
        value = self._inferred(value, binding.var)
        self._check(binding.var, value)
        return relax.VarBinding(self._new_var(binding.var, value.ty), value, binding.span)

    def _inferred(self, value: Any, var: Var) -> Any:
        try:
            return self._builder.normalize(value)
        except Exception as error:
            line = str(error).strip().splitlines()[-1]
            raise TransformError(f"cannot compact past {var.name!r}: {line}") from error

    def _new_var(self, old: Var, ty: Any) -> Any:
        new = self._vars[old] = type(old)(old.name, ty, old.span)
        return new

    def _smaller_type(self, param: Var) -> Any:
        axes = self._groups.value_axes.get(param)
        if axes is None or not any(self._shrinks(axis) for axis in axes):
            return param.ty
        return relax.TensorType(self._shape(axes), param.ty.dtype.dtype)

    # -- expressions

    def _expr(self, expr: Any, var: Var | None, path: tuple[int, ...]) -> Any:
        if isinstance(expr, Var):
            return self._vars.get(expr, expr)
        if isinstance(expr, GenericConst):
            return expr if var is None else self._constant(expr, var, path)
        if isinstance(expr, Call) and not path:
            args = [self._expr(arg, var, (i,)) for i, arg in enumerate(expr.args)]
            return Call(expr.op, args, expr.attrs, expr.ty_args, expr.span)
        if isinstance(expr, relax.Tuple):
            items = enumerate(expr.fields)
            return relax.Tuple([self._expr(item, var, (*path, i)) for i, item in items])
        if isinstance(expr, relax.TupleGetItem):
            return relax.TupleGetItem(self._expr(expr.tuple_value, None, ()), int(expr.index))
        return expr

    def _constant(self, const: GenericConst, var: Var, path: tuple[int, ...]) -> GenericConst:
        axes = self._groups.const_axes.get((var, path), ())
        points = self._groups.index_axes.get((var, path))
        if points is not None and not self._shrinks(points):
            points = None
        moved = tuple((i, axis) for i, axis in enumerate(axes) if self._shrinks(axis))
        if not moved and points is None:
            return const
        key = (const, moved, points)
        if key not in self._made:
            array = const.value.numpy()
            for axis, structure in moved:
                array = np.take(array, self._index(structure), axis=axis)
            if points is not None:
                array = self._renumbered(array, points, var)
            self._made[key] = named_const(np.asarray(array, order="C"), const_name(const))
        return self._made[key]

    def _renumbered(self, array: Any, points: AxisStructure, var: Var) -> Any:
        """Rewrite a constant index into the shortened axis."""
        place = np.full(points.size, -1, dtype=np.int64)
        kept = self._index(points)
        place[kept] = np.arange(kept.size)
        result = place[array]
        if (result < 0).any():
            raise TransformError(f"an index at {var.name!r} reads a position to be removed")
        return result.astype(array.dtype)

    # -- sizes

    def _index(self, structure: AxisStructure) -> Index:
        return axis_index(structure, self._kept)

    def _shrinks(self, structure: AxisStructure) -> bool:
        return any(group in self._kept for group in structure.groups())

    def _shape(self, axes: Sequence[AxisStructure]) -> list[int]:
        return [axis_size(axis, self._sizes) for axis in axes]

    def _check(self, var: Var, value: Any) -> None:
        """Compare the inferred shape with the one the groups promise."""
        axes = self._groups.value_axes.get(var)
        if axes is None or not any(self._shrinks(axis) for axis in axes):
            return
        shape = value.ty.shape
        found = [int(size) for size in shape.values] if shape is not None else []
        if found != self._shape(axes):
            raise TransformError(
                f"cannot compact past {var.name!r}: shape {found}, expected {self._shape(axes)}",
                "the op writes a size literally",
            )

    # -- ops that write sizes literally

    def _resized(self, call: Call, binding: Any) -> Any:
        name = call.op.name if isinstance(call.op, Op) else ""
        resize = _RESIZE.get(name)
        if resize is None or not self._touches(binding):
            return call
        return resize(self, call, binding)

    def _touches(self, binding: Any) -> bool:
        operands = [arg for arg in operand_exprs(binding.value) if isinstance(arg, Var)]
        axes = [self._groups.value_axes.get(var, ()) for var in (*operands, binding.var)]
        places = [own for place, own in self._groups.const_axes.items() if place[0] == binding.var]
        return any(self._shrinks(axis) for row in (*axes, *places) for axis in row)

    def _reshape(self, call: Call, binding: Any) -> Any:
        shape = relax.ShapeExpr(self._shape(self._groups.value_axes[binding.var]))
        return Call(call.op, [call.args[0], shape], call.attrs)

    def _split(self, call: Call, binding: Any) -> Any:
        axis = int(call.attrs.axis)
        kept = self._index(self._operand_axes(binding)[axis])
        sizes = [int(field.shape.values[axis]) for field in binding.var.ty.fields]
        cuts = np.cumsum(sizes)[:-1]
        return relax.op.split(call.args[0], [int((kept < cut).sum()) for cut in cuts], axis)

    def _slice(self, call: Call, binding: Any) -> Any:
        axes = self._operand_axes(binding)
        lists = [[int(value) for value in argument.fields] for argument in call.args[1:5]]
        if len(lists) < 4:
            lists.append([1] * len(lists[0]))
        for i, axis in enumerate(lists[0]):
            structure = axes[axis % len(axes)]
            if not self._shrinks(structure):
                continue
            kept = self._index(structure)
            if lists[3][i] != 1:
                # Every k-th index of a (rest x k) axis: the phase stays, only the end moves.
                lists[2][i] = int(kept.size)
                continue
            start, stop, _ = slice(lists[1][i], lists[2][i]).indices(structure.size)
            lists[1][i], lists[2][i] = int((kept < start).sum()), int((kept < stop).sum())
        return relax.op.strided_slice(call.args[0], *lists)

    def _conv(self, call: Call, binding: Any) -> Any:
        attrs = call.attrs
        channels = int(call.args[0].ty.shape.values[str(attrs.data_layout).index("C")])
        inner = int(call.args[1].ty.shape.values[str(attrs.kernel_layout).index("I")])
        make = getattr(relax.op.nn, call.op.name.removeprefix("relax.nn."))
        return make(
            *call.args,
            strides=list(attrs.strides),
            padding=list(attrs.padding),
            dilation=list(attrs.dilation),
            groups=channels // inner,
            data_layout=attrs.data_layout,
            kernel_layout=attrs.kernel_layout,
            out_layout=attrs.out_layout,
            out_dtype=attrs.out_dtype,
        )

    def _scan(self, call: Call, binding: Any) -> Any:
        start = call.args[1].fields[0]
        state = tuple(int(size) for size in start.ty.shape.values)[1:]
        func, types = resized_scan(self._mod[call.args[0]], state)
        kernel = self._builder.add_func(func, call.args[0].name_hint)
        self.kernels[kernel] = func
        return relax.call_tir(kernel, call.args[1], types if len(types) > 1 else types[0])

    def _operand_axes(self, binding: Any) -> Sequence[AxisStructure]:
        operand = binding.value.args[0]
        if isinstance(operand, Var):
            return self._groups.value_axes[operand]
        return self._groups.const_axes[binding.var, (0,)]


_RESIZE: dict[str, Callable[[_Compactor, Call, Any], Any]] = {
    "relax.reshape": _Compactor._reshape,
    "relax.broadcast_to": _Compactor._reshape,
    "relax.call_tir": _Compactor._scan,
    "relax.split": _Compactor._split,
    "relax.strided_slice": _Compactor._slice,
    "relax.nn.conv1d": _Compactor._conv,
    "relax.nn.conv2d": _Compactor._conv,
    "relax.nn.conv3d": _Compactor._conv,
}
