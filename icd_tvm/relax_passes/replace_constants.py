"""Replace constants of a function, all uses of one at once or one use at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from icd_tvm._tvm import Call, GenericConst, Var, const_name, named_const, relax

Rewrite = Callable[[GenericConst, Var, tuple[int, ...]], GenericConst]


def replace_constants(mod: Any, arrays: Mapping[Any, np.ndarray]) -> Any:
    """Return a clone of ``mod`` whose ``main`` uses new values for some constants.

    Parameters
    ----------
    mod : tvm.IRModule
        Left untouched.
    arrays : Mapping[GenericConst, numpy.ndarray]
        Constant object -> its new value, of the same shape and dtype; its name is kept.
    """
    new = {const: named_const(array, const_name(const)) for const, array in arrays.items()}
    mod = mod.clone()
    mod["main"] = rewrite_constants(mod["main"], lambda const, var, path: new.get(const, const))
    return relax.transform.Normalize()(mod)


def rewrite_constants(func: Any, rewrite: Rewrite) -> Any:
    """Return a function whose constant operands are replaced one use at a time.

    Parameters
    ----------
    func : relax.Function
    rewrite : callable
        (constant, binding that reads it, argument path) -> constant of the same shape and
        dtype; the same object keeps it.

    Returns
    -------
    relax.Function
        With the same variables; `relax.transform.Normalize` fills in the body's type.
    """
    blocks = []
    for block in func.body.blocks:
        bindings = [_rewrite_binding(binding, rewrite) for binding in block.bindings]
        blocks.append(type(block)(bindings, block.span))
    body = relax.SeqExpr(blocks, func.body.body, func.body.span)
    return relax.Function(func.params, body, func.ret_ty, func.is_pure, func.attrs, func.span)


def _rewrite_binding(binding: Any, rewrite: Rewrite) -> Any:
    old = binding.value
    new = _rewrite_value(old, binding.var, (), rewrite)
    if new is old or not isinstance(binding, relax.VarBinding):
        return binding
    return relax.VarBinding(binding.var, new, binding.span)


def _rewrite_value(value: Any, var: Var, path: tuple[int, ...], rewrite: Rewrite) -> Any:
    if isinstance(value, GenericConst):
        return rewrite(value, var, path)
    if isinstance(value, Call) and not path:
        args = _rewrite_all(value.args, var, path, rewrite)
        return value if args is None else _with_args(value, args)
    if isinstance(value, relax.Tuple):
        fields = _rewrite_all(value.fields, var, path, rewrite)
        return value if fields is None else relax.Tuple(fields, value.span)
    return value


def _rewrite_all(
    items: Iterable[Any], var: Var, path: tuple[int, ...], rewrite: Rewrite
) -> list[Any] | None:
    old = list(items)
    new = [_rewrite_value(item, var, (*path, i), rewrite) for i, item in enumerate(old)]
    return new if any(a is not b for a, b in zip(new, old, strict=True)) else None


def _with_args(call: Call, args: Sequence[Any]) -> Call:
    return Call(call.op, args, call.attrs, call.ty_args, call.span, ret_ty=call.ty)
