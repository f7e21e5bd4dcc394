"""Attention of an encoder for the CUDA kernel, found as `FuseAttention` finds it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import isclose
from typing import Any

from icd_tvm.relax_passes.attention_match import Refused, require
from icd_tvm.relax_passes.cuda_plan import Operand, Planned
from icd_tvm.relax_passes.cuda_shared import SharedValues
from icd_tvm.relax_passes.fuse_attention import AttentionMatch, match_attention
from icd_tvm.relax_passes.relax_graph import Dataflow, static_shape
from icd_tvm.tir_schedules.cuda.attention import attention_rule
from icd_tvm.tir_schedules.cuda.row_codes import RowCodes
from icd_tvm.tir_schedules.cuda.source_kernel import Rule


def plan_attention(
    flow: Dataflow, probabilities: Any, shared: SharedValues, dtype: str
) -> Planned | str:
    """Return the kernel of the attention around a softmax, or why there is none.

    Parameters
    ----------
    flow : Dataflow
    probabilities : relax.Var
        Bound to the softmax.
    shared : SharedValues
        Of the function.
    dtype : str
        ``float16`` or ``bfloat16``.
    """
    try:
        match = match_attention(flow, probabilities, None)
        return _planned(flow, match, shared, dtype)
    except Refused as refusal:
        return str(refusal)


def _planned(flow: Dataflow, match: AttentionMatch, shared: SharedValues, dtype: str) -> Planned:
    shape = match.shape
    scale = shape.head_dim**-0.5
    require(isclose(shape.scale, scale, rel_tol=1e-5), f"its scale is {shape.scale}, not {scale}")
    require(
        match.mask is None or shape.mask_batch == shape.batch or shape.mask_batch == 1,
        "its mask has another batch",
    )
    rows = _merged(flow, match)
    found = {name: Operand(value) for name, value in rows.items()}
    if match.mask is not None:
        found["mask"] = Operand(shared.mask_rows(match.mask, shape.batch), "float32")
    rule = partial(
        _rule,
        (shape.batch, shape.queries, shape.keys, shape.heads, shape.head_dim, dtype),
        match.mask is not None,
        "qkv" in rows,
    )
    made = rule({}, dtype)
    require(made.kernels, made.reason)
    reason = "one product made queries, keys and values" if "qkv" in rows else "three products"
    # No kernel here multiplies codes; float16 is finer than they are.
    reason += "; its codes are left out" if match.codes else ""
    return Planned(match.result, found, rule, "attention", f"{dtype}, {reason}")


def _rule(
    sizes: tuple[int, int, int, int, int, str],
    mask: bool,
    merged: bool,
    *_: Any,
    codes: RowCodes | None = None,
) -> Rule:
    return attention_rule(*sizes, mask=mask, merged=merged, codes=codes)


def _merged(flow: Dataflow, match: AttentionMatch) -> Mapping[str, Any]:
    """Return the rows of all three as one where they are its thirds, or three."""
    width, roots = match.shape.width, []
    for third, rows in enumerate((match.query, match.key, match.value)):
        call = flow.call(rows, "relax.strided_slice")
        wide = None if call is None else static_shape(call.args[0])
        if call is None or wide is None or wide[-1] != 3 * width or len(wide) != 3:
            break
        begin = [int(field.value) for field in call.args[2].fields]
        axes = [int(field.value) for field in call.args[1].fields]
        if (axes, begin) != ([2], [third * width]):
            break
        roots.append(call.args[0])
    if len(roots) == 3 and all(root.same_as(roots[0]) for root in roots):
        return {"qkv": roots[0]}
    return {"q": match.query, "k": match.key, "v": match.value}
