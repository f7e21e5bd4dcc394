"""FuseDecodeAttention: attention of one token over a KV cache becomes one kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import numpy as np

from icd_tvm._tvm import PyExprMutator, mutator, relax, tvm
from icd_tvm.relax_passes.attention_match import (
    match_scores,
    match_softmax,
    replace_attentions,
    require,
    strip_scale,
    user_of,
)
from icd_tvm.relax_passes.relax_graph import Dataflow, call_func, is_float32, static_shape
from icd_tvm.tir_schedules.cpu.decode_attention import DecodeShape, decode_attention, decode_lanes

_SWAP_LAST = (0, 1, 3, 2)
_HALVES = ("float16", "bfloat16")


@dataclass(frozen=True)
class DecodeMatch:
    """One attention: its result, its inputs, and its sizes."""

    result: Any
    query: Any
    key: Any
    value: Any
    mask: Any
    shape: DecodeShape
    scales: tuple[Any, ...] = ()


@tvm.transform.module_pass(opt_level=0, name="FuseDecodeAttention")
class FuseDecodeAttention:
    """Replace ``softmax(q K^T * scale + mask) V`` of one query by a call of the fused kernel.

    Codes of int8 with a scale for every row, and floats of 16 bits, are read as they are.

    Recognised: keys and values [batch, KV heads, slots, channels], widened to the query heads by
    expand and reshape or not at all, the keys then transposed; a scale by Mul or Div with a
    constant; an additive mask with an entry for every slot or none.

    Parameters
    ----------
    target : tvm.target.Target
        The kernel is built for it.

    Attributes
    ----------
    refusals : dict of str to str
        Name of each softmax that was left alone -> the reason.
    fused : list of str
        Names of the results that were replaced.
    """

    def __init__(self, target: Any) -> None:
        self.target = target
        self.refusals: dict[str, str] = {}
        self.fused: list[str] = []

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a clone of ``mod`` with every supported attention replaced."""
        mod, self.fused, self.refusals = replace_attentions(
            mod,
            lambda flow, var: match_decode(flow, var, self.target),
            lambda mod, found, flow: _Rewriter(mod, found, self.target, flow),
        )
        return mod


def match_decode(flow: Dataflow, probabilities: Any, target: Any) -> DecodeMatch:
    """Return the attention of one query around the softmax bound to ``probabilities``.

    Without a CPU target any number of channels will do.

    Raises
    ------
    Refused
        With the reason, if the surroundings are not a supported attention.
    """
    softmax, shape = match_softmax(flow, probabilities)
    batch, heads, queries, slots = shape
    require(queries == 1, f"it has {queries} queries, not 1")
    product, scale, mask = match_scores(flow, softmax.args[0])
    query, query_scale = strip_scale(flow, product.args[0])
    key, key_scale = strip_scale(flow, product.args[1])
    turned = flow.call(key, "relax.permute_dims")
    require(turned is not None and _axes(turned) == _SWAP_LAST, "the keys are not transposed")
    key = _narrow(flow, turned.args[0])
    result = user_of(flow, probabilities, "relax.matmul", "the probabilities")
    context = flow.call(result, "relax.matmul")
    require(context.args[0].same_as(probabilities), "the probabilities are not multiplied first")
    value = _narrow(flow, context.args[1])
    dim = (static_shape(query) or (0,))[-1]
    require(static_shape(query) == (batch, heads, 1, dim), "the query has another shape")
    cache = static_shape(key) or ()
    fits = len(cache) == 4 and heads % cache[1] == 0 and cache == (batch, cache[1], slots, dim)
    require(fits and static_shape(value) == cache, "keys and values have different shapes")
    vectors = target is None or decode_lanes(dim, target) is not None
    require(vectors, f"no vector divides {dim} channels")
    factor = scale * query_scale * key_scale
    require(isfinite(factor), "its scale is not finite")
    _check_mask(mask, slots)
    sizes = DecodeShape(batch, cache[1], heads // cache[1], slots, dim, factor)
    keys, values = _stored(flow, key), _stored(flow, value)
    dtypes = {str(rows[0].ty.dtype) for rows in (keys, values) if rows}
    if keys and values and len(dtypes) == 1:
        sizes, scales = replace(sizes, dtype=dtypes.pop()), (*keys[1:], *values[1:])
        return DecodeMatch(result, query, keys[0], values[0], mask, sizes, scales)
    return DecodeMatch(result, query, key, value, mask, sizes)


def _axes(call: Any) -> tuple[int, ...]:
    axes = call.attrs.axes
    return tuple(int(axis) for axis in axes) if axes is not None else (3, 2, 1, 0)


def _narrow(flow: Dataflow, expr: Any) -> Any:
    """Return the KV heads that ``expr`` repeats for the query heads, or ``expr`` itself."""
    calls, inner = [], expr
    for op in ("reshape", "broadcast_to", "expand_dims"):
        call = flow.call(inner, f"relax.{op}")
        if call is None:
            return expr
        calls.append(call)
        inner = call.args[0]
    flat, wide, lifted = calls
    before, after = static_shape(wide) or (), static_shape(flat) or ()
    merges = len(before) == 5 and after == (before[0], before[1] * before[2], *before[3:])
    return inner if merges and [int(axis) for axis in lifted.attrs.axis] == [2] else expr


def _stored(flow: Dataflow, rows: Any) -> tuple[Any, ...]:
    """Return what float32 rows are made of, or nothing if they are stored as such.

    Floats of 16 bits; or int8 codes and float32 scales [batch, KV heads, slots, 1].
    """
    widened = flow.call(rows, "relax.astype")
    if widened is not None and str(widened.args[0].ty.dtype) in _HALVES:
        return (widened.args[0],)
    product = flow.call(rows, "relax.multiply")
    cast = None if product is None else flow.call(product.args[0], "relax.astype")
    if product is None or cast is None or str(cast.args[0].ty.dtype) != "int8":
        return ()
    shape, scale = static_shape(rows), product.args[1]
    one = (*shape[:-1], 1) if shape else None
    if static_shape(cast) != shape or static_shape(scale) != one or not is_float32(scale):
        return ()
    return cast.args[0], scale


def _check_mask(mask: Any, slots: int) -> None:
    if mask is None:
        return
    shape = static_shape(mask) or ()
    one_row = bool(shape) and shape[-1] == slots and set(shape[:-1]) <= {1}
    require(one_row and is_float32(mask), f"the mask has shape {shape}, not [{slots}]")


@mutator
class _Rewriter(PyExprMutator):
    """Replaces the product with the values of each match by a call of the kernel."""

    def __init__(self, mod: Any, found: list[DecodeMatch], target: Any, flow: Dataflow) -> None:
        super().__init__(mod)
        self._found = {flow.values[match.result]: match for match in found}
        self._target = target

    def visit_call_(self, call: Any) -> Any:
        match = self._found.get(call)
        if match is None:
            return super().visit_call_(call)
        read = (match.query, match.key, match.value, *match.scales)
        args = [self.visit_expr(arg) for arg in read]
        func = decode_attention(match.shape, self._target)
        args.append(self._mask(match))
        return call_func(self.builder_, func, "decode_attention", args, call.ty)

    def _mask(self, match: DecodeMatch) -> Any:
        slots = match.shape.slots
        if match.mask is None:
            return relax.const(np.zeros(slots, np.float32))
        mask = self.visit_expr(match.mask)
        if static_shape(match.mask) == (slots,):
            return mask
        return self.builder_.emit(relax.op.reshape(mask, (slots,)))
