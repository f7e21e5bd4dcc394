"""Products of one float row with a quantised weight, for the CUDA kernels."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from icd_tvm._tvm import const_name
from icd_tvm.relax_passes.cuda_plan import Planned, ProductKernels
from icd_tvm.relax_passes.cuda_products import plan_with
from icd_tvm.relax_passes.cuda_sparse_products import paying_blocks
from icd_tvm.relax_passes.held_product import Codes, held_product
from icd_tvm.relax_passes.quantized_operands import Weight
from icd_tvm.relax_passes.relax_graph import Dataflow
from icd_tvm.tir_schedules.cuda.gemv import gemv_rule, pack_vectors
from icd_tvm.tir_schedules.cuda.source_kernel import PLAIN, Epilogue, Rule

Array = npt.NDArray[Any]


class _Form(NamedTuple):
    """How codes are stored, with which lists of live blocks; or why not."""

    stored: str
    blocks: npt.NDArray[np.int32] | None
    reason: str = ""


def codes_of(weight: Weight) -> Codes | str:
    """Return a quantised weight as codes without zero points, or why it is none.

    Parameters
    ----------
    weight : Weight
        As it stands in the model, values and zero points of bytes.
    """
    if weight.scale is None:
        return "the weight is bytes without scales"
    shifted = weight.values.astype(np.int16) - weight.zero.astype(np.int16)
    if shifted.min() < -128 or shifted.max() > 127:
        return "codes less their zero points are no int8: quantise symmetrically"
    k, n = shifted.shape
    # Zero points are gone: only scales make groups.
    block = replace(weight, zero=np.zeros((1, 1), np.int8)).block()
    rows = weight.scale if len(weight.scale) == 1 else weight.scale[::block]
    scales = np.broadcast_to(rows, (k // block, n)).T
    scales = scales[:, 0] if block == k else scales
    return Codes(shifted.astype(np.int8), np.asarray(scales, np.float32, order="C"))


def why_no_kernel(weight: Codes, dtype: str) -> str:
    """Return why no kernel multiplies a vector of ``dtype`` by the codes; empty if one does."""
    return _form(weight, dtype).reason


def _kernels(weight: Codes, dtype: str, form: _Form) -> ProductKernels:
    """Return the kernels of a vector times codes, as `product_kernels` does."""
    constants: dict[str, Array] = {"w": pack_vectors(weight.codes, form.stored, form.blocks)}
    constants["scales"] = weight.scales
    if form.blocks is not None:
        constants["blocks"] = form.blocks
    make = partial(_rule, weight, dtype, form.stored, form.blocks)
    return ProductKernels(make, constants, kind="gemv")


def plan_weight_only(flow: Dataflow, var: Any, wanted: set[Any], dtype: str) -> Planned | None:
    """Return the kernel of the held product bound to ``var`` and of what follows it.

    Parameters
    ----------
    flow : Dataflow
    var : relax.Var
    wanted : set of relax.Var
        Values that other kernels read, which must therefore exist.
    dtype : str
        Of the vector: ``float16`` or ``bfloat16``.

    Returns
    -------
    Planned or None
        None where ``var`` is no call that `HoldWeightOnly` made. It holds what has a kernel.
    """
    held = held_product(flow.values.get(var))
    if held is None:
        return None
    weight = held.codes
    form = _form(weight, dtype)
    words = f"{form.stored} times {dtype}, scales by row"
    if weight.group:
        words = f"{words} and {weight.group} inputs"
    kernels = _kernels(weight, dtype, form)
    return plan_with(flow, var, wanted, held.x, kernels, const_name(held.weight), words)


def _form(weight: Codes, dtype: str) -> _Form:
    """Return the narrowest storage that has a kernel, with live blocks before without."""
    blocks, reason = paying_blocks(weight.codes), "no codes"
    for stored, lists in product(weight.widths, [blocks, None] if blocks is not None else [None]):
        rule = _rule(weight, dtype, stored, lists, PLAIN, "float32")
        if rule.kernels:
            return _Form(stored, lists)
        reason = rule.reason
    return _Form("", None, reason)


def _rule(
    weight: Codes, dtype: str, stored: str, blocks: Array | None, epilogue: Epilogue, out: str
) -> Rule:
    k, n = weight.codes.shape
    live = None if blocks is None else (blocks.shape[0], blocks.shape[1])
    return gemv_rule(
        n, k, stored, x=dtype, out=out, epilogue=epilogue, group=weight.group, live=live
    )
