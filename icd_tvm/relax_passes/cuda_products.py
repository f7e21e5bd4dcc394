"""Products with a constant weight, and what follows them, for the CUDA kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm._tvm import GenericConst, const_name, named_const, relax
from icd_tvm.relax_passes.cuda_plan import Operand, Planned, ProductKernels
from icd_tvm.relax_passes.cuda_sparse_products import (
    paying_blocks,
    paying_strays,
    two_four_kernels,
)
from icd_tvm.relax_passes.cuda_views import View, view_of
from icd_tvm.relax_passes.elementwise_function import function_after
from icd_tvm.relax_passes.relax_graph import (
    Dataflow,
    constant_array,
    constant_weight,
    is_float32,
    operands,
    static_shape,
)
from icd_tvm.tir_schedules.cuda.gemm import (
    LIVE_COLUMNS,
    SLAB,
    RowScales,
    gemm_rule,
    pack_weight,
)
from icd_tvm.tir_schedules.cuda.gemm_tile import ROW, choose_tile
from icd_tvm.tir_schedules.cuda.gemv import gemv_rule, pack_vectors
from icd_tvm.tir_schedules.cuda.row_codes import RowCodes
from icd_tvm.tir_schedules.cuda.source_kernel import (
    PLAIN,
    WIDTHS,
    Epilogue,
    Rule,
    numpy_dtype,
    refused,
)
from icd_tvm.tir_schedules.cuda.strays import Strays

Array = npt.NDArray[Any]
_ACTIVATIONS = ("gelu", "relu", "silu")
# What follows the name of a weight in that of a constant beside it.
_ENDS = {
    "w": "",
    "scales": ".scale",
    "slabs": ".blocks",
    "blocks": ".blocks",
    "meta": ".places",
    "stray_starts": ".starts",
    "stray_list": ".strays",
}


def product_kernels(m: int, weight: Array, dtype: str, arch: str) -> ProductKernels:
    """Return the kernels for ``X[m, K] @ weight`` with operands rounded to ``dtype``."""
    with np.errstate(over="ignore"):
        rounded = weight.astype(numpy_dtype(dtype))
    if not np.isfinite(rounded).all():
        reason = f"weights beyond the range of {dtype}"
        return ProductKernels(lambda *_: refused(reason), {}, reason)
    blocks = paying_blocks(rounded)
    sparse = two_four_kernels(m, rounded, dtype, arch, blocks)
    if isinstance(sparse, ProductKernels):
        return sparse
    if m == 1:
        return replace(_vector(rounded, dtype, blocks), left=sparse)
    split = paying_strays(rounded, blocks)
    if split is not None:
        return matrix_kernels(m, split.weight, dtype, arch, split.blocks, strays=split.strays)
    return replace(matrix_kernels(m, rounded, dtype, arch, blocks), left=sparse)


def matrix_kernels(
    m: int,
    weight: Array,
    dtype: str,
    arch: str,
    blocks: npt.NDArray[np.int32] | None,
    rows: RowScales = "scale",
    strays: Strays | None = None,
) -> ProductKernels:
    """Return the kernels for ``A[m, K] @ weight``; ``rows`` as for `gemm_rule`.

    ``strays`` are elements outside of the blocks, which ``weight`` does not hold.
    """
    k, n = weight.shape
    live = tile = None
    if blocks is not None:
        live = blocks.shape[1]
        k_tiles = int(live * SLAB * WIDTHS[dtype]) // ROW
        tile = choose_tile(m, n, k_tiles, arch, columns=LIVE_COLUMNS)

    def make(epilogue: Epilogue, out: str, codes: RowCodes | None = None) -> Rule:
        options: dict[str, Any] = {"live": live, "tile": tile, "rows": rows, "codes": codes}
        options["strays"] = None if strays is None else len(strays.list)
        return gemm_rule(m, n, k, dtype, out=out, epilogue=epilogue, arch=arch, **options)

    plain = make(PLAIN, "float32")
    if not plain.kernels:
        return ProductKernels(make, {}, plain.reason)
    # Another kernel may turn A before.
    main = next(kernel for kernel in plain.kernels if kernel.family != "turn")
    constants: dict[str, Array] = {"w": pack_weight(weight, main.arguments[1].shape[2], blocks)}
    constants |= {} if blocks is None else {"slabs": blocks}
    if strays is not None:
        constants |= {"stray_starts": strays.starts, "stray_list": strays.list}
    return ProductKernels(make, constants)


def _vector(weight: Array, dtype: str, blocks: Array | None) -> ProductKernels:
    k, n = weight.shape
    # A vector is read by whole blocks.
    blocks = None if k % SLAB else blocks
    live = None if blocks is None else (blocks.shape[0], blocks.shape[1])

    def make(epilogue: Epilogue, out: str) -> Rule:
        return gemv_rule(n, k, dtype, x=dtype, out=out, epilogue=epilogue, live=live)

    plain = make(PLAIN, "float32")
    if not plain.kernels:
        return ProductKernels(make, {}, plain.reason)
    constants: dict[str, Array] = {"w": pack_vectors(weight, dtype, blocks)}
    constants |= {} if blocks is None else {"blocks": blocks}
    return ProductKernels(make, constants, kind="gemv")


@dataclass(frozen=True)
class Chain:
    """A product and what was found behind it so far."""

    result: Any
    epilogue: Epilogue = PLAIN
    bias: Any = None
    residual: Any = None
    left: str = ""


def plan_product(
    flow: Dataflow, var: Any, wanted: set[Any], dtype: str, arch: str
) -> Planned | str | None:
    """Return the kernels of the matmul bound to ``var`` and of what follows it.

    Parameters
    ----------
    flow : Dataflow
    var : relax.Var
    wanted : set of relax.Var
        Values that other kernels read, which must therefore exist.
    dtype, arch : str

    Returns
    -------
    Planned, str or None
        The reason where there is no kernel; None where ``var`` is no such matmul.
    """
    matmul: Any = flow.values.get(var)
    weight = constant_weight(matmul)
    if weight is None:
        return None
    rows = prod((static_shape(matmul.args[0]) or ())[:-1])
    if not rows:
        return "it has no rows"
    kernels = product_kernels(rows, weight, dtype, arch)
    if kernels.reason:
        return kernels.reason
    return plan_with(flow, var, wanted, matmul.args[0], kernels, const_name(matmul.args[1]), dtype)


def plan_with(
    flow: Dataflow,
    var: Any,
    wanted: set[Any],
    x: Any,
    kernels: ProductKernels,
    label: str,
    words: str,
) -> Planned:
    """Return given kernels of the product bound to ``var``, and of what follows it.

    Parameters
    ----------
    flow, var, wanted
        As for `plan_product`.
    x : relax.Expr
        Its input.
    kernels : ProductKernels
        Without a refusal.
    label : str
        Name of the weight.
    words : str
        Types, for people.
    """
    chain = chain_after(flow, var, wanted)
    shape, source = static_shape(x) or (), view_of(flow, x, wanted)
    vector = prod(shape[:-1]) == 1
    # A kernel for matrices reads whole rows.
    if not vector and (source.offset or _size(source.root) != prod(shape)):
        source = View(x)
    found = weight_operands(label, kernels)
    found["x" if vector else "a"] = Operand(source.root, offset=source.offset)
    if chain.bias is not None:
        found["bias"] = Operand(chain.bias, "kept")
    if chain.residual is not None:
        found["residual"] = Operand(chain.residual, "tied")
    return planned_product(chain, kernels, found, words)


def planned_product(
    chain: Chain, kernels: ProductKernels, found: Mapping[str, Operand], words: str
) -> Planned:
    """Return the plan of a product with these operands; ``words`` are its types, for people."""
    lists = kernels.constants.get("slabs", kernels.constants.get("blocks"))
    reason = f"{words}, {kernels.form}"
    return Planned(
        result=chain.result,
        operands=found,
        rule=partial(_rule, kernels.make, chain.epilogue),
        kind=kernels.kind,
        reason="; ".join(filter(None, (reason, kernels.left, chain.left))),
        fused=_fused(chain.epilogue),
        flexible=True,
        live=0 if lists is None else int(lists.shape[1]),
    )


def weight_operands(label: str, kernels: ProductKernels) -> dict[str, Operand]:
    """Return the constants of kernels, named after their weight."""
    return {
        name: Operand(named_const(array, f"{label}{_ENDS[name]}"), "kept")
        for name, array in kernels.constants.items()
    }


def _rule(
    make: Callable[..., Rule],
    epilogue: Epilogue,
    _: Mapping[str, str],
    out: str,
    codes: RowCodes | None = None,
) -> Rule:
    """Return the kernels of a plan; ``codes`` where it writes those alone."""
    return make(epilogue, out) if codes is None else make(epilogue, out, codes)


def _size(expr: Any) -> int:
    return prod(static_shape(expr) or (0,))


def _fused(epilogue: Epilogue) -> tuple[str, ...]:
    """Return what an epilogue computes, in words."""
    activation = epilogue.activation if epilogue.activation != "none" else ""
    found = ("bias" * epilogue.bias, activation, "residual" * epilogue.residual)
    return tuple(filter(None, found))


def chain_after(flow: Dataflow, var: Any, wanted: set[Any]) -> Chain:
    """Return what follows the product bound to ``var`` and fits its epilogue.

    ``wanted`` are values that other kernels read, which must therefore exist.
    """
    chain = _with_activation(flow, _with_bias(flow, var, wanted), wanted)
    return _with_residual(flow, chain, wanted)


def _with_bias(flow: Dataflow, var: Any, wanted: set[Any]) -> Chain:
    chain = Chain(var)
    if var in wanted:
        return replace(chain, left="nothing more: another kernel reads the product")
    users = flow.users.get(var, [])
    if len(users) != 1:
        return replace(chain, left=f"nothing more: the product is read {len(users)} times")
    added = flow.bound(users[0], "relax.add")
    if added is None:
        return chain
    _, bias = operands(added)
    array = constant_array(flow.resolve(bias), dims=1)
    columns = (static_shape(var) or (0,))[-1]
    fits = array is not None and array.dtype == np.float32 and array.shape == (columns,)
    if not fits or static_shape(users[0]) != static_shape(var):
        return chain
    return replace(chain, result=users[0], bias=flow.resolve(bias), epilogue=Epilogue(bias=True))


def _with_activation(flow: Dataflow, chain: Chain, wanted: set[Any]) -> Chain:
    found = None if chain.result in wanted else function_after(flow, chain.result, _ACTIVATIONS)
    if found is None:
        return chain
    name, result = found
    return replace(chain, result=result, epilogue=replace(chain.epilogue, activation=name))


def _with_residual(flow: Dataflow, chain: Chain, wanted: set[Any]) -> Chain:
    users = flow.users.get(chain.result, [])
    if chain.result in wanted or chain.left or not users:
        return chain
    if len(users) != 1:
        return replace(chain, left=f"no residual: the result is read {len(users)} times")
    user = users[0]
    added = flow.bound(user, "relax.add")
    if added is None:
        return chain
    other = next((arg for arg in added.args if not arg.same_as(chain.result)), None)
    if other is None or isinstance(other, GenericConst) or not is_float32(other):
        return chain
    if not isinstance(other, relax.Var) or static_shape(other) != static_shape(chain.result):
        return replace(chain, left="no residual: what is added has another shape")
    epilogue = replace(chain.epilogue, residual=True)
    return replace(chain, result=user, residual=other, epilogue=epilogue)
