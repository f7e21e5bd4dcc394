"""ReorderOutputs: give one matmul's outputs an order of their own, undone by a gather.

This is for a weight whose output axis is pinned or shared with weights that want other orders:
the residual stream of a transformer. The permuted weight lets a block-sparse kernel see
contiguous groups; the gather is the price and is part of what is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from icd_tvm._tvm import (
    Call,
    GenericConst,
    Op,
    PyExprMutator,
    const_name,
    mutator,
    named_const,
    relax,
    te,
    tvm,
)
from icd_tvm.core.permutation import as_permutation, invert
from icd_tvm.errors import PermutationError
from icd_tvm.relax_passes.plain_names import plain_name


@tvm.transform.module_pass(opt_level=0, name="ReorderOutputs")
class ReorderOutputs:
    """Rewrite ``matmul(x, W)`` to ``matmul(x, W[:, perm])[..., inverse]``.

    Parameters
    ----------
    orders : Mapping[str, numpy.ndarray]
        Name of a matmul binding with a constant 2-D weight [K, N] -> permutation int32[N].

    Raises
    ------
    PermutationError
        If a binding is no such matmul or the permutation does not fit it.
    """

    def __init__(self, orders: Mapping[str, np.ndarray]) -> None:
        self.orders = {node: np.asarray(order) for node, order in orders.items()}

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a rewritten clone."""
        mod = mod.clone()
        reorderer = _OutputReorderer(mod, self.orders)
        main = reorderer.visit_expr(mod["main"])
        mod = reorderer.builder_.get()
        mod["main"] = main
        missing = sorted(set(self.orders) - reorderer.done)
        if missing:
            raise PermutationError(f"cannot reorder {missing[0]!r}: no matmul of that name")
        return mod


@mutator
class _OutputReorderer(PyExprMutator):
    def __init__(self, mod: Any, orders: Mapping[str, np.ndarray]) -> None:
        super().__init__(mod)
        self._orders = orders
        self.done: set[str] = set()

    def visit_var_binding_(self, binding: Any) -> None:
        name = binding.var.name
        if name not in self._orders or not _is_weight_matmul(binding.value):
            super().visit_var_binding_(binding)
            return
        source, weight = (self.visit_expr(a) for a in binding.value.args)
        array = weight.value.numpy()
        order = as_permutation(self._orders[name], array.shape[1])
        permuted = named_const(np.ascontiguousarray(array[:, order]), const_name(weight))
        # The kernel's buffer is named after it.
        product = self.builder_.emit(
            relax.op.matmul(source, permuted, binding.value.attrs.out_dtype),
            plain_name(f"{name}_ordered"),
        )
        restored = self.builder_.emit_te(
            _gather_columns,
            product,
            relax.const(invert(order)),
            primfunc_name_hint="gather_columns",
        )
        self.set_var_remap(binding.var, restored)
        self.done.add(name)


def _gather_columns(source: Any, index: Any) -> Any:
    """Return ``source[..., index]``; relax.take would warn about bounds that cannot be left."""
    return te.compute(
        source.shape, lambda *at: source[(*at[:-1], index[at[-1]])], name="gather_columns"
    )


def _is_weight_matmul(value: Any) -> bool:
    return (
        isinstance(value, Call)
        and isinstance(value.op, Op)
        and value.op.name == "relax.matmul"
        and isinstance(value.args[1], GenericConst)
        and len(value.args[1].value.shape) == 2
    )
