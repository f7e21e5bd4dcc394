"""Read-only questions about Relax dataflow that the lowering passes share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm._tvm import Call, GenericConst, Op, Var, relax, te, tirx

Rewriter = Callable[[Any], Any]


class Dataflow:
    """Values and users of the variables of one Relax function."""

    def __init__(self, func: Any) -> None:
        self.values: dict[Any, Any] = {}
        self.users: dict[Any, list[Any]] = {}
        for block in func.body.blocks:
            for binding in block.bindings:
                self.values[binding.var] = binding.value
                for used in relax.analysis.free_vars(binding.value):
                    self.users.setdefault(used, []).append(binding.var)
        for used in relax.analysis.free_vars(func.body.body):
            self.users.setdefault(used, []).append(None)

    def call(self, expr: Any, op: str) -> Any:
        """Return the call of ``op`` that ``expr`` is or is bound to, or None."""
        value = self.resolve(expr)
        return value if is_call(value, op) else None

    def bound(self, var: Any, op: str) -> Any:
        """Return the call of ``op`` that ``var`` itself is bound to, not another name of it."""
        value = self.values.get(var)
        return value if is_call(value, op) else None

    def resolve(self, expr: Any) -> Any:
        """Follow variables to the expression they are bound to."""
        while isinstance(expr, Var) and expr in self.values:
            expr = self.values[expr]
        return expr

    def single_use(self, var: Any) -> bool:
        """Tell whether ``var`` is read exactly once."""
        return len(self.users.get(var, [])) == 1

    def only_user(self, var: Any) -> Any:
        """Return the one variable computed from ``var``, or None if there are more or none."""
        users = self.users.get(var, [])
        return users[0] if len(users) == 1 else None


def rewrite_functions(mod: Any, mutator: Callable[[Any, Any], Any]) -> Any:
    """Return a clone of ``mod`` whose Relax functions went through a mutator each.

    Parameters
    ----------
    mod : tvm.IRModule
        Left untouched.
    mutator : callable
        (module so far, function) -> a mutator for it, which may add kernels to the module.
    """
    mod = mod.clone()
    for name, func in mod.functions_items():
        if isinstance(func, relax.Function):
            rewriter = mutator(mod, func)
            new = rewriter.visit_expr(func)
            mod = rewriter.builder_.get()
            mod[name] = new
    return mod


def is_call(expr: Any, op: str) -> bool:
    """Tell whether ``expr`` is a call of the operator named ``op``."""
    return isinstance(expr, Call) and isinstance(expr.op, Op) and expr.op.name == op


def swaps_axes(call: Any) -> bool:
    """Tell whether a ``relax.permute_dims`` of a matrix swaps its axes; it may leave them."""
    return call.attrs.axes is None or int(call.attrs.axes[0]) % 2 == 1


def packed_fields(expr: Any, name: str) -> list[Any] | None:
    """Return the arguments of a ``call_dps_packed`` of that name, or None."""
    if not is_call(expr, "relax.call_dps_packed") or str(expr.args[0].global_symbol) != name:
        return None
    return list(expr.args[1].fields)


def op_names(func: Any) -> dict[str, str]:
    """Return the operator that each binding of a function calls, by the binding's name."""
    return {
        binding.var.name: binding.value.op.name
        for block in func.body.blocks
        for binding in block.bindings
        if isinstance(binding, relax.VarBinding)
        and isinstance(binding.value, Call)
        and isinstance(binding.value.op, Op)
    }


def static_shape(expr: Any) -> tuple[int, ...] | None:
    """Return the shape of a tensor expression, or None if it is not fully known."""
    if not isinstance(expr.ty, relax.TensorType) or expr.ty.shape is None:
        return None
    dims = getattr(expr.ty.shape, "values", None)
    if dims is None or not all(isinstance(dim, tirx.IntImm) for dim in dims):
        return None
    return tuple(int(dim) for dim in dims)


def is_float32(expr: Any) -> bool:
    """Tell whether ``expr`` is a tensor of float32."""
    return isinstance(expr.ty, relax.TensorType) and str(expr.ty.dtype) == "float32"


def constant_array(expr: Any, dims: int | None = None) -> npt.NDArray[Any] | None:
    """Return the value of a constant, or None if it is none or has other than ``dims`` axes."""
    if not isinstance(expr, GenericConst):
        return None
    if dims is not None and len(expr.value.shape) != dims:
        return None
    return np.asarray(expr.value.numpy())


def scalar_constant(expr: Any) -> float | None:
    """Return the value of a constant of one element, or None."""
    array = constant_array(expr)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def column_constant(expr: Any, columns: int) -> npt.NDArray[Any] | None:
    """Return a constant of one element, or of one for each of the last axis, as a vector.

    None for any other expression, and for constants of another shape.
    """
    array = constant_array(expr)
    if array is None or array.size == 1:
        return array if array is None else array.reshape(1)
    return array.reshape(-1) if array.size == columns == array.shape[-1] else None


def constant_weight(call: Any) -> npt.NDArray[Any] | None:
    """Return the constant float32 weight [K, N] of a ``relax.matmul``, or None.

    None also if the input is no float32 tensor of at least two axes with a known shape.
    """
    if not is_call(call, "relax.matmul") or not is_float32(call.args[0]):
        return None
    shape = static_shape(call.args[0])
    weight = constant_array(call.args[1], dims=2)
    if shape is None or len(shape) < 2 or weight is None or not is_float32(call):
        return None
    return weight if weight.dtype == np.float32 and min(weight.shape) > 0 else None


def rounded_to_bf16(flow: Dataflow, expr: Any) -> Any:
    """Return the float32 behind ``astype(astype(x, bfloat16), float32)``, or None."""
    wide = flow.call(expr, "relax.astype")
    narrow = flow.call(wide.args[0], "relax.astype") if wide is not None else None
    if narrow is None or not is_float32(wide) or str(narrow.ty.dtype) != "bfloat16":
        return None
    return narrow.args[0] if is_float32(narrow.args[0]) else None


def operands(call: Any) -> tuple[Any, Any]:
    """Return the two operands of a commutative call, a constant second."""
    left, right = call.args
    return (right, left) if isinstance(left, GenericConst) else (left, right)


def call_func(builder: Any, func: Any, name: str, args: list[Any], like: Any) -> Any:
    """Return ``call_tir`` of a new function with the type of ``like`` as its result."""
    return relax.call_tir(builder.add_func(func, name), relax.Tuple(args), like)


def map_elements(builder: Any, x: Any, function: Callable[[Any], Any], name: str) -> Any:
    """Return the call of a new kernel that applies ``function`` to every element of ``x``."""

    def compute(tensor: Any) -> Any:
        return te.compute(tensor.shape, lambda *at: function(tensor[at]), name="compute")

    return builder.call_te(compute, x, primfunc_name_hint=name)
