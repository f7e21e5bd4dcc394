"""MergeParallelMatmul: the query, key and value projections of an attention become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm._tvm import PyExprMutator, Var, const_name, mutator, named_const, relax, tvm
from icd_tvm.relax_passes.relax_graph import (
    Dataflow,
    call_func,
    constant_array,
    constant_weight,
    is_call,
    operands,
    rewrite_functions,
)
from icd_tvm.tir_schedules.cpu.attention import attention_shape
from icd_tvm.tir_schedules.cpu.bf16_attention import attention_kernel


@dataclass(frozen=True)
class _Projection:
    source: Any
    weight: npt.NDArray[Any]
    bias: npt.NDArray[Any]
    weight_name: str
    bias_name: str


@tvm.transform.module_pass(opt_level=0, name="MergeParallelMatmul")
class MergeParallelMatmul:
    """Merge the three projections that feed a fused attention kernel into one matmul.

    Runs after `FuseAttention`. Applies where the three inputs of the kernel are
    ``x @ W + b`` (or ``x @ W``) of one x with constant W and b, used nowhere else. The kernel
    is rebuilt to read its heads from the wide rows, so no slice is made. The merged constants
    are named after the three, joined by ``+``.

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
        query, key, value, mask = call.args[1].fields
        found = self._projections([query, key, value])
        if isinstance(found, str):
            self._owner.refusals.append(f"{query.name}: {found}")
            return super().visit_call_(call)
        self._owner.merged += 1
        rows = self._emit_merged(found, query.name)
        func = attention_kernel(shape.merged(), self._owner.target)
        args = [rows, rows, rows, self.visit_expr(mask)]
        return call_func(self.builder_, func, "attention", args, call.ty)

    def _projections(self, rows: list[Any]) -> list[_Projection] | str:
        found = []
        for var in rows:
            if not isinstance(var, Var) or not self._flow.single_use(var):
                return f"{var} is used outside the attention"
            part = _projection(self._flow, var)
            if part is None:
                return f"{var.name} is no matmul with a constant weight"
            found.append(part)
        if not all(part.source.same_as(found[0].source) for part in found):
            return "the projections have different inputs"
        if len({part.weight.shape for part in found}) != 1:
            return "the projections have different shapes"
        return found

    def _emit_merged(self, parts: list[_Projection], name: str) -> Any:
        weight = np.concatenate([part.weight for part in parts], axis=1)
        bias = np.concatenate([part.bias for part in parts])
        weight_name = "+".join(part.weight_name for part in parts)
        bias_name = "+".join(part.bias_name for part in parts)
        source = self.visit_expr(parts[0].source)
        product = relax.op.matmul(source, named_const(weight, weight_name))
        product = self.builder_.emit(product, name_hint=f"{name}_merged_MatMul")
        if not bias.any():
            return product
        total = relax.op.add(product, named_const(bias, bias_name))
        return self.builder_.emit(total, name_hint=f"{name}_merged")


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
