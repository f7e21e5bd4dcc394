"""Attention of a decoding step and the append before it, for the CUDA kernels."""

from __future__ import annotations

from collections.abc import Mapping
from math import isclose
from typing import Any

from icd_tvm._tvm import relax
from icd_tvm.relax_passes.attention_match import Refused, need, require
from icd_tvm.relax_passes.cache_append import CacheAppend
from icd_tvm.relax_passes.cuda_plan import Operand, Planned
from icd_tvm.relax_passes.cuda_shared import SharedValues
from icd_tvm.relax_passes.cuda_views import view_of
from icd_tvm.relax_passes.fuse_decode_attention import DecodeMatch, match_decode
from icd_tvm.relax_passes.relax_graph import Dataflow, static_shape
from icd_tvm.tir_schedules.cuda.append import append_rule
from icd_tvm.tir_schedules.cuda.decode_attention import decode_attention_rule


def plan_decode(
    flow: Dataflow,
    probabilities: Any,
    appends: Mapping[Any, CacheAppend],
    shared: SharedValues,
    dtype: str,
    arch: str,
) -> tuple[list[Planned], str]:
    """Return the kernels of the attention around a softmax, and why one is missing.

    Parameters
    ----------
    flow : Dataflow
    probabilities : relax.Var
        Bound to the softmax.
    appends : mapping of relax.Var to CacheAppend
        By what they make; only states that may be written in place.
    shared : SharedValues
    dtype, arch : str

    Returns
    -------
    list of Planned
        The attention, and before it the append where queries and keys are rotated.
    str
        Reason; empty if there are both.
    """
    try:
        match = match_decode(flow, probabilities, None)
        found = [_attention(flow, match, shared, dtype, arch)]
    except Refused as refusal:
        return [], str(refusal)
    try:
        return [_append(flow, match, appends, shared, dtype), *found], ""
    except Refused as refusal:
        return found, f"its append is not fused: {refusal}"


def _attention(
    flow: Dataflow, match: DecodeMatch, shared: SharedValues, dtype: str, arch: str
) -> Planned:
    size = match.shape
    scale = size.head_dim**-0.5
    require(isclose(size.scale, scale, rel_tol=1e-5), f"its scale is {size.scale}, not {scale}")
    cache = str(match.key.ty.dtype)
    rule = decode_attention_rule(
        size.batch,
        size.kv_heads,
        size.share,
        size.slots,
        size.head_dim,
        dtype,
        cache=cache,
        arch=arch,
    )
    require(rule.kernels, rule.reason)
    query = view_of(flow, match.query)
    found = {
        "q": Operand(query.root, offset=query.offset),
        "k": Operand(match.key, "kept"),
        "v": Operand(match.value, "kept"),
        "live": Operand(
            shared.live_slots(match.mask, (size.batch, size.kv_heads), size.slots), "kept"
        ),
    }
    for name, expr in zip(("k_scale", "v_scale"), match.scales, strict=False):
        found[name] = Operand(expr, "kept")
    reason = f"{dtype}, {size.share} query heads share a {cache} cache"
    return Planned(match.result, found, lambda *_: rule, "decode_attention", reason)


def _append(
    flow: Dataflow,
    match: DecodeMatch,
    appends: Mapping[Any, CacheAppend],
    shared: SharedValues,
    dtype: str,
) -> Planned:
    keys = need(appends.get(match.key), "its keys are no state that is written in place")
    values = need(appends.get(match.value), "its values are no state that is written in place")
    require(keys.length.same_as(values.length), "keys and values have lengths of their own")
    size, cache = match.shape, str(keys.past.ty.dtype)
    require(size.batch == 1, f"it has {size.batch} sequences, not 1")
    heads = size.kv_heads * size.share
    sizes = (heads, size.kv_heads, size.slots, size.head_dim, dtype)
    rule = append_rule(*sizes, cache=cache, length="int32")
    require(rule.kernels, rule.reason)
    kept = {"length": shared.slot(keys.length), "keys": keys.past, "values": values.past}
    found = _rotated(flow, match, keys, values)
    return Planned(
        result=match.query,
        operands=found | {name: Operand(value, "kept") for name, value in kept.items()},
        rule=lambda *_: rule,
        kind="append",
        reason=f"{dtype} rows into {cache} caches",
        fused=("rotary positions",),
        states={"keys": keys.result, "values": values.result},
        in_place={"keys": "keys", "values": "values"},
    )


def _rotated(
    flow: Dataflow, match: DecodeMatch, keys: CacheAppend, values: CacheAppend
) -> dict[str, Operand]:
    """Return the rows before they are rotated, and the angles."""
    query, cos, sin = _rotation(flow, match.query)
    key, key_cos, key_sin = _rotation(flow, keys.row)
    same = cos.same_as(key_cos) and sin.same_as(key_sin)
    require(same, "queries and keys are rotated differently")
    size = match.shape.head_dim
    require(static_shape(cos) in ((1, 1, size), (1, size)), "an angle for a head is missing")
    rows = {"q": view_of(flow, query), "k": view_of(flow, key), "v": view_of(flow, values.row)}
    found = {name: Operand(view.root, offset=view.offset) for name, view in rows.items()}
    return found | {"cos": Operand(cos, "kept"), "sin": Operand(sin, "kept")}


def _rotation(flow: Dataflow, var: Any) -> tuple[Any, Any, Any]:
    """Return (x, cos, sin) of ``x * cos + (-second half, first half) * sin``."""
    added = need(flow.call(var, "relax.add"), "no rotary positions")
    for straight, turned in (tuple(added.args), tuple(added.args)[::-1]):
        by_cos, by_sin = (flow.call(arg, "relax.multiply") for arg in (straight, turned))
        joined = None if by_sin is None else flow.call(by_sin.args[0], "relax.concat")
        if by_cos is None or by_sin is None or joined is None:
            continue
        rows, cos = by_cos.args
        if _is_turned(flow, joined, rows):
            return rows, cos, by_sin.args[1]
    raise Refused("its positions are not rotated by halves")


def _is_turned(flow: Dataflow, joined: Any, rows: Any) -> bool:
    shape = static_shape(rows) or ()
    fields = flow.resolve(joined.args[0])
    if len(shape) != 4 or not isinstance(fields, relax.Tuple) or len(fields.fields) != 2:
        return False
    negated = flow.call(fields.fields[0], "relax.negative")
    if negated is None or int(joined.attrs.axis) % 4 != 3:
        return False
    half = shape[3] // 2
    second, first = negated.args[0], fields.fields[1]
    return _is_half(flow, first, rows, 0, half) and _is_half(flow, second, rows, half, 2 * half)


def _is_half(flow: Dataflow, expr: Any, rows: Any, begin: int, end: int) -> bool:
    call = flow.call(expr, "relax.strided_slice")
    if call is None or not call.args[0].same_as(rows):
        return False
    axes, begins, ends = ([int(f.value) for f in arg.fields] for arg in call.args[1:4])
    return axes in ([3], [-1]) and begins == [begin] and ends == [end]
