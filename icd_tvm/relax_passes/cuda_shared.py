"""Small tensors that kernels of several layers read: made once for each function."""

from __future__ import annotations

from typing import Any

import numpy as np

from icd_tvm._tvm import named_const, relax
from icd_tvm.relax_passes.attention_match import need, require
from icd_tvm.relax_passes.relax_graph import (
    Dataflow,
    constant_array,
    scalar_constant,
    static_shape,
)

_RESHAPES = ("reshape", "expand_dims", "squeeze", "broadcast_to")
# A score that no softmax sees beside others.
_LOWEST = -1e4


class SharedValues:
    """Expressions of a function's variables; the same request gives the same object."""

    def __init__(self, flow: Dataflow) -> None:
        self._flow = flow
        self._made: dict[Any, Any] = {}

    def mask_rows(self, mask: Any, batch: int) -> Any:
        """Return an additive mask [1 or batch, ..., keys] with a row for each sequence."""
        shape = need(static_shape(mask), "the mask has no known shape")
        if shape[0] == batch:
            return mask
        return self._once(("mask", mask), relax.op.broadcast_to(mask, (batch, *shape[1:])))

    def slot(self, length: Any) -> Any:
        """Return int32[1] of a length: an input may lie elsewhere in every call, this does not."""
        flat = relax.op.astype(relax.op.reshape(length, (1,)), "int32")
        return self._once(("slot", length), flat)

    def live_slots(self, mask: Any, shape: tuple[int, int], slots: int) -> Any:
        """Return int32[shape], how many slots of a cache a mask leaves, from the first.

        Parameters
        ----------
        mask : relax.Expr or None
            ``where(slot > length, lowest, 0)``; None leaves all.
        shape : (batch, key-value heads)
        slots : int
            Of the cache.

        Raises
        ------
        Refused
            If the mask is another.
        """
        if mask is None:
            return self._once(("all", shape, slots), relax.const(np.full(shape, slots, np.int32)))
        length = _length(self._flow, mask, slots)
        dtype = str(length.ty.dtype)
        one, most = (named_const(np.asarray(n, dtype), "") for n in (1, slots))
        flat = relax.op.reshape(length, (1,))
        count = relax.op.minimum(relax.op.add(flat, one), most)
        wide = relax.op.broadcast_to(relax.op.astype(count, "int32"), shape)
        return self._once(("live", length, shape, slots), wide)

    def _once(self, key: Any, expr: Any) -> Any:
        return self._made.setdefault(key, expr)


def _length(flow: Dataflow, mask: Any, slots: int) -> Any:
    where = need(flow.call(_through(flow, mask), "relax.where"), "its mask is not made by a where")
    low, zero = (scalar_constant(flow.resolve(arg)) for arg in where.args[1:])
    hides = low is not None and low <= _LOWEST and zero == 0.0
    require(hides, "its mask has other values than 0 and one that hides")
    after = flow.call(_through(flow, where.args[0]), "relax.greater")
    require(after is not None, "its mask does not hide the slots after a length")
    numbers, length = after.args
    array = need(constant_array(flow.resolve(numbers)), "its mask compares no slot numbers")
    numbered = array.size == slots and bool((array.ravel() == np.arange(slots)).all())
    require(numbered, "the slots of its mask are not numbered 0, 1, 2 ...")
    length = _through(flow, length)
    require(set(static_shape(length) or (0,)) <= {1}, "its mask has several lengths")
    require(str(length.ty.dtype) in ("int64", "int32"), "its length is no integer")
    return length


def _through(flow: Dataflow, expr: Any) -> Any:
    while True:
        call = next(filter(None, (flow.call(expr, f"relax.{op}") for op in _RESHAPES)), None)
        if call is None:
            return expr
        expr = call.args[0]
