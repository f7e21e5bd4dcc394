"""Ranges of activations that always hold zero, as DynamicQuantizeLinear takes them."""

from __future__ import annotations

from typing import Any

import numpy as np

from icd_tvm._tvm import GenericConst, Var, relax
from icd_tvm.relax_passes.index_ops import op_name

_CLAMPED_BY = {"relax.max": "relax.maximum", "relax.min": "relax.minimum"}


def ranges_with_zero(func: Any) -> set[Var]:
    """Return the results of max (min) that are only read by a maximum (minimum) with zero.

    For those it makes no difference whether a zero is among the reduced values, so indices at
    which the data is always zero may go.
    """
    calls = [
        (binding.var, binding.value)
        for block in func.body.blocks
        for binding in block.bindings
        if getattr(binding, "value", None) is not None
    ]
    ranges = {
        var: _CLAMPED_BY[op_name(call)] for var, call in calls if op_name(call) in _CLAMPED_BY
    }
    if not ranges:
        return set()
    clamped: set[Var] = set()
    others = set(relax.analysis.free_vars(func.body.body))
    for _, value in calls:
        for var in relax.analysis.free_vars(value):
            kept = ranges.get(var) == op_name(value) and _zero(value.args[1])
            (clamped if kept else others).add(var)
    return (ranges.keys() & clamped) - others


def _zero(expr: Any) -> bool:
    return isinstance(expr, GenericConst) and not np.any(expr.value.numpy())
