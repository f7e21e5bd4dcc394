"""Products of int8 codes, and the codes of their inputs, for the CUDA kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import numpy as np

from icd_tvm._tvm import const_name, named_const, relax
from icd_tvm.relax_passes.cuda_plan import Operand, Planned, ProductKernels
from icd_tvm.relax_passes.cuda_products import (
    Chain,
    chain_after,
    matrix_kernels,
    planned_product,
    weight_operands,
)
from icd_tvm.relax_passes.cuda_sparse_products import paying_blocks
from icd_tvm.relax_passes.cuda_views import view_of
from icd_tvm.relax_passes.int8_product import Int8Product, codes_call, int8_product
from icd_tvm.relax_passes.relax_graph import Dataflow, static_shape
from icd_tvm.tir_schedules.cuda.gemm import RowScales
from icd_tvm.tir_schedules.cuda.quantize import quantize_rule
from icd_tvm.tir_schedules.cuda.row_codes import RowCodes
from icd_tvm.tir_schedules.cuda.source_kernel import Rule

# What codes of their own step for each row have beside them, as the kernels name it.
BY_ROW = ("row_scale", "row_zero")


def plan_codes(flow: Dataflow, var: Any, wanted: set[Any]) -> Planned | None:
    """Return the kernel that makes the codes bound to ``var``; None where it is bound to none.

    Codes are read in the precision of the pass where a kernel makes what they are of. ``wanted``
    are values that other kernels make.
    """
    value, states = flow.values.get(var), dict[str, Any]()
    call = codes_call(value)
    if call is None and isinstance(value, relax.TupleGetItem) and int(value.index) == len(BY_ROW):
        call = codes_call(flow.resolve(value.tuple_value))
        states = _by_row(flow, value.tuple_value)
    if call is None or (call.step is None) != bool(states):
        return None
    shape, codes = static_shape(call.source) or (), RowCodes(*call.values)
    view = view_of(flow, call.source, wanted)
    whole = not view.offset and prod(static_shape(view.root) or ()) == prod(shape)
    return Planned(
        result=var,
        operands={"x": Operand(view.root if whole else call.source, "asked")},
        rule=partial(_codes_rule, (prod(shape[:-1]), shape[-1]), codes),
        kind="codes",
        reason="each row by its range" if states else "one step for all",
        states=states,
        codes=codes,
    )


def _by_row(flow: Dataflow, made: Any) -> dict[str, Any]:
    """Return the variables of the scales and zero points that a call of codes also makes."""
    found = {}
    for user in flow.users.get(made, []):
        value = flow.values.get(user)
        if isinstance(value, relax.TupleGetItem) and int(value.index) < len(BY_ROW):
            found[BY_ROW[int(value.index)]] = user
    return {name: found[name] for name in BY_ROW} if len(found) == len(BY_ROW) else {}


def _codes_rule(sizes: tuple[int, int], codes: RowCodes, types: Mapping[str, str], _: str) -> Rule:
    return quantize_rule(*sizes, types["x"], codes)


def plan_int8_product(flow: Dataflow, var: Any, wanted: set[Any], arch: str) -> Planned | None:
    """Return the kernels of the product of codes bound to ``var``, and of what follows it.

    Parameters
    ----------
    flow : Dataflow
    var : relax.Var
    wanted : set of relax.Var
        Values that other kernels read, which must therefore exist.
    arch : str

    Returns
    -------
    Planned or None
        None where ``var`` is bound to no such product; `MarkInt8Products` left none that does not
        fit.
    """
    product = int8_product(flow.values.get(var))
    if product is None:
        return None
    shape, weight = static_shape(product.codes) or (), product.array
    rows: RowScales = "zero" if product.rows else "none"
    blocks = paying_blocks(weight)
    kernels = matrix_kernels(prod(shape[:-1]), weight, "int8", arch, blocks, rows=rows)
    chain = chain_after(flow, var, wanted)
    if not product.rows:
        chain = replace(chain, epilogue=replace(chain.epilogue, bias=True))
    return planned_product(chain, kernels, _operands(product, chain, kernels), "int8")


def _operands(product: Int8Product, chain: Chain, kernels: ProductKernels) -> dict[str, Operand]:
    found = weight_operands(const_name(product.weight), kernels)
    found["a"] = Operand(product.codes, "kept")
    found["column_scale"] = Operand(product.scale, "kept")
    if product.rows:
        found |= {a: Operand(b, "kept") for a, b in zip(BY_ROW, product.rows, strict=True)}
        found["column_sums"] = Operand(product.offset, "kept")
        bias = chain.bias
    else:
        # Zero points of one step add the same to a column of every row.
        bias = product.offset if chain.bias is None else _added(chain.bias, product.offset)
    if bias is not None:
        found["bias"] = Operand(bias, "kept")
    if chain.residual is not None:
        found["residual"] = Operand(chain.residual, "tied")
    return found


def _added(bias: Any, offset: Any) -> Any:
    total = bias.value.numpy().astype(np.float64) + offset.value.numpy()
    return named_const(total.astype(np.float32), const_name(bias))
