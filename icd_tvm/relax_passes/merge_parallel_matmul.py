"""MergeParallelMatmul: the query, key and value projections of an attention become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from icd_tvm._tvm import PyExprMutator, Var, const_name, mutator, named_const, relax, tvm
from icd_tvm.relax_passes.byte_projection import ByteProjection, alike, byte_projection
from icd_tvm.relax_passes.byte_projection import emit_merged as emit_merged_bytes
from icd_tvm.relax_passes.relax_graph import (
    Dataflow,
    call_func,
    constant_array,
    constant_weight,
    is_call,
    operands,
    rewrite_functions,
)
from icd_tvm.tir_schedules.cpu.attention_head import AttentionShape, attention_shape
from icd_tvm.tir_schedules.cpu.bf16_attention import attention_kernel
from icd_tvm.tir_schedules.cpu.byte_attention import byte_attention, byte_form


@dataclass(frozen=True)
class _Projection:
    source: Any
    weight: npt.NDArray[Any]
    bias: npt.NDArray[Any]
    weight_name: str
    bias_name: str


_Part: TypeAlias = _Projection | ByteProjection


@tvm.transform.module_pass(opt_level=0, name="MergeParallelMatmul")
class MergeParallelMatmul:
    """Merge the three projections that feed a fused attention kernel into one matmul.

    Runs after `FuseAttention`. Applies where the three inputs of the kernel are
    ``x @ W + b`` (or ``x @ W``) of one x with constant W and b, used nowhere else; in bytes
    also with what follows the product column by column: zero points, scales, bias, and the
    quantisation for a kernel that takes bytes. The kernel is rebuilt to read its heads from the
    wide rows, so no slice is made. The merged constants are named after the three, joined by
    ``+``. Signed keys and values are then bytes that are 128 higher, like the queries.

    Parameters
    ----------
    target : tvm.target.Target
        The attention kernel is rebuilt for it.

    Attributes
    ----------
    refusals : list of str
        Why the projections of an attention were left alone, one line each.
    merged : int
        How many attentions now read from one merged projection.
    """

    def __init__(self, target: Any) -> None:
        self.target = target
        self.refusals: list[str] = []
        self.merged = 0

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a clone of ``mod`` with the projections merged."""
        self.refusals, self.merged = [], 0
        mod = rewrite_functions(mod, lambda new, func: _Merger(new, Dataflow(func), self))
        return relax.transform.DeadCodeElimination()(mod)


@mutator
class _Merger(PyExprMutator):
    def __init__(self, mod: Any, flow: Dataflow, owner: MergeParallelMatmul) -> None:
        super().__init__(mod)
        self._mod, self._flow, self._owner = mod, flow, owner

    def visit_call_(self, call: Any) -> Any:
        shape = (
            attention_shape(self._mod[call.args[0]]) if is_call(call, "relax.call_tir") else None
        )
        if shape is None:
            return super().visit_call_(call)
        query, key, value, *rest = call.args[1].fields
        found = self._projections([query, key, value])
        if isinstance(found, str):
            self._owner.refusals.append(f"{query.name}: {found}")
            return super().visit_call_(call)
        self._owner.merged += 1
        rows = self._emit_merged(found, query.name)
        args = [rows, rows, rows, *(self.visit_expr(arg) for arg in rest)]
        name, func = self._kernel(self._mod[call.args[0]], shape.merged())
        return call_func(self.builder_, func, name, args, call.ty)

    def _kernel(self, old: Any, shape: AttentionShape) -> tuple[str, Any]:
        form = byte_form(old)
        if form is None:
            return "attention", attention_kernel(shape, self._owner.target)
        func = byte_attention(shape, self._owner.target, replace(form, raised=True))
        return "byte_attention", func

    def _projections(self, rows: list[Any]) -> list[_Part] | str:
        for var in rows:
            if not isinstance(var, Var) or not self._flow.single_use(var):
                return f"{var} is used outside the attention"
        made = [byte_projection(self._mod, self._flow, var) for var in rows]
        found: list[_Part | None] = list(made)
        if None in made:
            found = [_projection(self._flow, var) for var in rows]
        parts = [part for part in found if part is not None]
        if len(parts) < len(rows):
            return f"{rows[found.index(None)].name} is no matmul with a constant weight"
        return _refused(parts) or parts

    def _emit_merged(self, found: list[_Part], name: str) -> Any:
        source = self.visit_expr(found[0].source)
        products = [part for part in found if isinstance(part, ByteProjection)]
        if products:
            return emit_merged_bytes(self.builder_, source, products, self._owner.target)
        parts = [part for part in found if isinstance(part, _Projection)]
        weight = np.concatenate([part.weight for part in parts], axis=1)
        bias = np.concatenate([part.bias for part in parts])
        weight_name = "+".join(part.weight_name for part in parts)
        bias_name = "+".join(part.bias_name for part in parts)
        product = relax.op.matmul(source, named_const(weight, weight_name))
        product = self.builder_.emit(product, name_hint=f"{name}_merged_MatMul")
        if not bias.any():
            return product
        total = relax.op.add(product, named_const(bias, bias_name))
        return self.builder_.emit(total, name_hint=f"{name}_merged")


def _refused(parts: Sequence[_Part]) -> str:
    """Return why projections have no common product, or an empty string."""
    if not all(part.source.same_as(parts[0].source) for part in parts):
        return "the projections have different inputs"
    if len({part.weight.shape for part in parts}) != 1:
        return "the projections have different shapes"
    if not alike([part for part in parts if isinstance(part, ByteProjection)]):
        return "the projections differ in the steps after their products"
    return ""


def _projection(flow: Dataflow, var: Any) -> _Projection | None:
    product, bias, bias_name = var, None, ""
    added = flow.call(var, "relax.add")
    if added is not None:
        product, constant = operands(added)
        bias = constant_array(constant, dims=1)
        if bias is None or not flow.single_use(product):
            return None
        bias_name = const_name(constant)
    matmul = flow.call(product, "relax.matmul")
    weight = constant_weight(matmul) if matmul is not None else None
    if weight is None:
        return None
    if bias is None:
        bias = np.zeros(weight.shape[1], np.float32)
    if bias.shape != (weight.shape[1],):
        return None
    return _Projection(matmul.args[0], weight, bias, const_name(matmul.args[1]), bias_name)
