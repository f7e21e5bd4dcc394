"""FuseAttention: encoder attention as exporters write it becomes one kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from typing import Any

import numpy as np

from icd_tvm._tvm import PyExprMutator, mutator, named_const, relax, tvm
from icd_tvm.errors import ConfigError
from icd_tvm.relax_passes.attention_match import (
    Codes,
    Refused,
    match_scores,
    match_softmax,
    replace_attentions,
    require,
    strip_codes,
    strip_scale,
    user_of,
)
from icd_tvm.relax_passes.relax_graph import Dataflow, call_func, is_float32, static_shape
from icd_tvm.tir_schedules.cpu.attention_head import AttentionShape
from icd_tvm.tir_schedules.cpu.bf16_attention import HEAD_STEP, attention_kernel
from icd_tvm.tir_schedules.cpu.bf16_dot import require_bf16
from icd_tvm.tir_schedules.cpu.byte_attention import ByteScales, byte_attention
from icd_tvm.tir_schedules.cpu.dot_product import dot_product
from icd_tvm.tir_schedules.cpu.int8_matmul import MAX_DEPTH

_HEADS_FIRST = (0, 2, 1, 3)
_KEYS_LAST = (0, 2, 3, 1)
_SWAP_LAST = (0, 1, 3, 2)
# Queries, keys, values and probabilities as the byte kernel takes them.
_CODE_TYPES = ("uint8", "int8", "int8", "uint8")
_BF16_TYPES = ("bfloat16",) * 4


@dataclass(frozen=True)
class AttentionMatch:
    """One attention: its result, its inputs as [batch, length, width] rows, and its sizes.

    ``codes`` are those of queries, keys, values and probabilities where they are quantised.
    """

    result: Any
    query: Any
    key: Any
    value: Any
    mask: Any
    shape: AttentionShape
    codes: tuple[Codes, ...] = ()


@tvm.transform.module_pass(opt_level=0, name="FuseAttention")
class FuseAttention:
    """Replace ``softmax(Q K^T * scale + mask) V`` by a call of the fused kernel.

    Recognised: heads split by Reshape to [batch, length, heads, dim] and Transpose; a scale by
    Mul or Div with a constant before or after the product; an additive mask of shape
    [batch or 1, 1, 1, keys] or none; merged back by Transpose and Reshape. Where queries and
    probabilities pass through uint8 and keys and values through int8 (QuantizeLinear and
    DequantizeLinear around both products), the kernel multiplies those bytes; where all four
    pass through bfloat16 and the target has AVX512_BF16, it rounds them itself.

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
            partial(match_attention, target=self.target),
            lambda mod, found, flow: _Rewriter(mod, found, self.target, flow),
        )
        return mod


def match_attention(flow: Dataflow, probabilities: Any, target: Any) -> AttentionMatch:
    """Return the attention around the softmax bound to ``probabilities``.

    Without a CPU target nothing is said of what can multiply the codes that are found.

    Raises
    ------
    Refused
        With the reason, if the surroundings are not a supported attention.
    """
    softmax, shape = match_softmax(flow, probabilities)
    batch, heads, queries, keys = shape

    product, scale, mask = match_scores(flow, softmax.args[0])
    query, query_codes = strip_codes(flow, product.args[0])
    key, key_codes = strip_codes(flow, product.args[1])
    query, query_scale = strip_scale(flow, query)
    key, key_scale = strip_scale(flow, key)
    query = _split_heads(flow, query, _HEADS_FIRST, "query")
    key = _split_heads(flow, key, _KEYS_LAST, "key")
    weights, weight_codes = _through_codes(flow, probabilities)
    context = user_of(flow, weights, "relax.matmul", "the probabilities")
    value, value_codes = strip_codes(flow, flow.call(context, "relax.matmul").args[1])
    value = _split_heads(flow, value, _HEADS_FIRST, "value")
    found = (query_codes, key_codes, value_codes, weight_codes)
    narrow = _rounds_all(found, target)
    codes = () if narrow else _codes(found, target, keys)
    result, width = _merge_heads(flow, context)

    require(width % heads == 0, f"{heads} heads do not divide the width {width}")
    for rows, length in ((query, queries), (key, keys), (value, keys)):
        require(static_shape(rows) == (batch, length, width), "heads have different widths")
    mask_batch = _mask_batch(mask, batch, keys)
    factor = scale * query_scale * key_scale
    require(isfinite(factor), "its scale is not finite")
    if codes:
        require(width // heads % 4 == 0, f"byte products do not take heads of {width // heads}")
        # Codes of scaled heads are codes of the rows by another scale.
        rescaled = (query_scale, key_scale, 1.0, 1.0)
        require(min(rescaled) > 0.0, "a scale before its codes is negative")
        codes = tuple(code.divided(by) for code, by in zip(codes, rescaled, strict=True))
    sizes = AttentionShape(
        batch, queries, keys, heads, width // heads, factor, mask_batch, (width,) * 3
    )
    if narrow:
        require(sizes.head_dim % HEAD_STEP == 0, f"bf16 products of heads of {sizes.head_dim}")
        sizes = replace(sizes, products="bfloat16")
    return AttentionMatch(result, query, key, value, mask, sizes, codes)


def _through_codes(flow: Dataflow, probabilities: Any) -> tuple[Any, Codes | None]:
    """Return the variable that holds the probabilities after quantisation, and its codes."""
    user = flow.only_user(probabilities)
    if user is not None and flow.call(user, "relax.quantize") is not None:
        restored = user_of(flow, user, "relax.dequantize", "the codes of the probabilities")
    elif user is not None and flow.call(user, "relax.astype") is not None:
        restored = user_of(flow, user, "relax.astype", "the rounded probabilities")
    else:
        return probabilities, None
    return restored, strip_codes(flow, restored)[1]


def _rounds_all(found: tuple[Codes | None, ...], target: Any) -> bool:
    """Tell whether all four operands are rounded to bfloat16, which the target multiplies."""
    if tuple(code.dtype if code is not None else "" for code in found) != _BF16_TYPES:
        return False
    try:
        require_bf16(target)
    except ConfigError as error:
        raise Refused(str(error)) from None
    return True


def _codes(found: tuple[Codes | None, ...], target: Any, keys: int) -> tuple[Codes, ...]:
    """Return the codes of all four operands, or none where none is quantised."""
    codes = tuple(code for code in found if code is not None)
    if not codes:
        return ()
    require(len(codes) == len(found), "only some operands of its products are quantised")
    types = tuple(code.dtype for code in codes)
    require(types == _CODE_TYPES, f"its operands are {types}, not {_CODE_TYPES}")
    require(not any(code.zero for code in codes[1:]), "the zero point of its keys, values or "
            "probabilities is not 0")  # fmt: skip
    if target is None:
        return codes
    require(keys <= MAX_DEPTH, f"sums over {keys} keys may overflow")
    try:
        dot_product(target)
    except ConfigError as error:
        raise Refused(str(error)) from None
    return codes


def _split_heads(flow: Dataflow, expr: Any, order: tuple[int, ...], role: str) -> Any:
    """Return the rows [batch, length, width] whose heads ``expr`` has split off in ``order``."""
    axes = [0, 1, 2, 3]
    while (move := flow.call(expr, "relax.permute_dims")) is not None:
        step = [int(a) for a in move.attrs.axes] if move.attrs.axes is not None else [3, 2, 1, 0]
        axes = [step[a] for a in axes]
        expr = move.args[0]
    require(tuple(axes) == order, f"the {role} heads are transposed by {tuple(axes)}, not {order}")
    split = flow.call(expr, "relax.reshape")
    require(split is not None, f"the {role} heads are not split by a reshape")
    rows = split.args[0]
    before, after = static_shape(rows) or (), static_shape(split) or ()
    fits = len(before) == 3 and len(after) == 4 and before[:2] == after[:2]
    require(fits, f"the {role} reshape does not split the last axis")
    return rows


def _merge_heads(flow: Dataflow, context: Any) -> tuple[Any, int]:
    """Return the variable that holds the merged heads, and its width."""
    moved = user_of(flow, context, "relax.permute_dims", "the context")
    axes = flow.call(moved, "relax.permute_dims").attrs.axes
    order = tuple(int(axis) for axis in axes) if axes is not None else (3, 2, 1, 0)
    require(order == _HEADS_FIRST, f"the context is transposed by {order}, not {_HEADS_FIRST}")
    result = user_of(flow, moved, "relax.reshape", "the transposed context")
    before, after = static_shape(moved) or (), static_shape(result) or ()
    fits = len(after) == 3 and after[:2] == before[:2]
    require(fits, "the context reshape does not merge the heads")
    return result, after[2]


def _mask_batch(mask: Any, batch: int, keys: int) -> int:
    if mask is None:
        return 1
    shape = static_shape(mask)
    require(is_float32(mask), "the mask is not float32")
    require(
        shape in ((1, 1, 1, keys), (batch, 1, 1, keys)),
        f"the mask has shape {shape}, not [{batch} or 1, 1, 1, {keys}]",
    )
    return shape[0] if shape is not None else 1


@mutator
class _Rewriter(PyExprMutator):
    """Replaces the merging reshape of each match by a call of the kernel."""

    def __init__(self, mod: Any, found: list[AttentionMatch], target: Any, flow: Dataflow) -> None:
        super().__init__(mod)
        self._found = {flow.values[match.result]: match for match in found}
        self._target = target

    def visit_call_(self, call: Any) -> Any:
        match = self._found.get(call)
        if match is None:
            return super().visit_call_(call)
        mask = match.mask
        if mask is None:
            mask = relax.const(np.zeros((1, 1, 1, match.shape.keys), np.float32))
        rows = [self.visit_expr(arg) for arg in (match.query, match.key, match.value)]
        args = [*rows, self.visit_expr(mask)]
        if not match.codes:
            func = attention_kernel(match.shape, self._target)
            return call_func(self.builder_, func, "attention", args, call.ty)
        args[:3] = [
            self.builder_.emit(_quantised(row, code))
            for row, code in zip(rows, match.codes[:3], strict=True)
        ]
        query, key, value, weight = match.codes
        scales = ByteScales(query.scale, query.zero, key.scale, value.scale, weight.scale)
        args += [named_const(array, "") for array in scales.arrays()]
        func = byte_attention(match.shape, self._target)
        return call_func(self.builder_, func, "byte_attention", args, call.ty)


def _quantised(rows: Any, code: Codes) -> Any:
    scale = named_const(np.asarray(code.scale, np.float32), "")
    zero = named_const(np.asarray(code.zero, code.dtype), "")
    return relax.op.quantize(rows, scale, zero, axis=1, out_dtype=code.dtype)
