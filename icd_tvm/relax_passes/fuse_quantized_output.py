"""FuseQuantizedOutput: layer norms and byte attentions write the codes their reader takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm._tvm import PyExprMutator, mutator, named_const, relax, tvm
from icd_tvm.relax_passes.relax_graph import (
    Dataflow,
    call_func,
    column_constant,
    is_call,
    operands,
    rewrite_functions,
    scalar_constant,
    static_shape,
)
from icd_tvm.tir_schedules.cpu.attention_head import attention_shape
from icd_tvm.tir_schedules.cpu.byte_attention import byte_attention, byte_form
from icd_tvm.tir_schedules.cpu.layer_norm import NormForm, layer_norm, norm_form


@dataclass(frozen=True)
class _Quantisation:
    """``round(x * factor) + point`` of the result bound to ``source``."""

    source: Any
    factor: npt.NDArray[np.float32]
    point: float


@tvm.transform.module_pass(opt_level=0, name="FuseQuantizedOutput")
class FuseQuantizedOutput:
    """Let a kernel write uint8 where its result is quantised, instead of a pass over it.

    Runs after `MergeParallelMatmul` and `FuseResidualNorm`. Recognised is a quantisation to
    uint8 by one constant scale and zero point, with a product by a constant for every column
    before it (what SmoothQuant leaves at run time). The result of a byte attention must have no
    other reader. A layer norm keeps its floats beside the codes; if several quantisations read
    it, it writes the codes of the first.

    Parameters
    ----------
    target : tvm.target.Target
        The kernels are rebuilt for it.

    Attributes
    ----------
    fused : dict of str to int
        ``{"attention": ..., "norm": ...}``: how many kernels write codes.
    """

    def __init__(self, target: Any) -> None:
        self.target = target
        self.fused = {"attention": 0, "norm": 0}

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a clone of ``mod`` with the quantisations in the kernels."""
        self.fused = {"attention": 0, "norm": 0}
        mod = rewrite_functions(mod, lambda new, func: _Fuser(new, Dataflow(func), self))
        return relax.transform.DeadCodeElimination()(mod)


@mutator
class _Fuser(PyExprMutator):
    def __init__(self, mod: Any, flow: Dataflow, owner: FuseQuantizedOutput) -> None:
        super().__init__(mod)
        self._mod, self._flow, self._owner = mod, flow, owner
        # Kernel call -> its quantisation; call of that quantisation -> kernel call -> codes.
        self._found: dict[Any, _Quantisation] = {}
        self._kernels: dict[Any, Any] = {}
        self._codes: dict[Any, Any] = {}
        for call in flow.values.values():
            found = _quantisation(flow, call)
            kernel = flow.values.get(found.source) if found is not None else None
            if found is None or kernel in self._found or not self._takes(found.source, kernel):
                continue
            self._found[kernel], self._kernels[call] = found, kernel

    def _takes(self, var: Any, kernel: Any) -> bool:
        """Tell whether a kernel's result may be written as codes."""
        if not is_call(kernel, "relax.call_tir"):
            return False
        func = self._mod[kernel.args[0]]
        norm, attention = norm_form(func), byte_form(func)
        if attention is not None:
            return not attention.codes and self._flow.single_use(var)
        return norm is not None and not norm.codes

    def visit_call_(self, call: Any) -> Any:
        if call in self._kernels:
            return self._codes[self._kernels[call]]
        found = self._found.get(call)
        if found is None:
            return super().visit_call_(call)
        args = [self.visit_expr(arg) for arg in call.args[1].fields]
        args += [
            named_const(found.factor, ""),
            named_const(np.asarray([found.point], np.float32), ""),
        ]
        like, func = relax.TensorType(call.ty.shape, "uint8"), self._mod[call.args[0]]
        norm = norm_form(func)
        if norm is not None:
            return self._norm(call, norm, args, like)
        self._codes[call] = self._attention(func, args, like)
        # What reads the floats is replaced too, so this goes with the dead code.
        return super().visit_call_(call)

    def _attention(self, func: Any, args: list[Any], like: Any) -> Any:
        form, shape = byte_form(func), attention_shape(func)
        assert form is not None
        assert shape is not None
        self._owner.fused["attention"] += 1
        new = byte_attention(shape, self._owner.target, replace(form, codes=True))
        return self.builder_.emit(call_func(self.builder_, new, "byte_attention", args, like))

    def _norm(self, call: Any, form: NormForm, args: list[Any], like: Any) -> Any:
        self._owner.fused["norm"] += 1
        new = layer_norm(
            static_shape(call) or (),
            form.eps,
            self._owner.target,
            residual=form.residual,
            codes=True,
        )
        name = "residual_layer_norm" if form.residual else "layer_norm"
        both = self.builder_.emit(call_func(self.builder_, new, name, args, [call.ty, like]))
        self._codes[call] = self.builder_.emit(relax.TupleGetItem(both, 1))
        return relax.TupleGetItem(both, 0)


def _quantisation(flow: Dataflow, call: Any) -> _Quantisation | None:
    """Return what a call quantises to uint8 by constants, and by a product with one before it."""
    if not is_call(call, "relax.quantize") or str(call.ty.dtype) != "uint8":
        return None
    scale, zero = (scalar_constant(arg) for arg in call.args[1:3])
    if not scale or zero is None:
        return None
    shape = static_shape(call) or (0,)
    source = call.args[0]
    factor: npt.NDArray[Any] | None = np.ones(1, np.float32)
    product = flow.call(source, "relax.multiply")
    if product is not None and flow.single_use(source):
        source, constant = operands(product)
        factor = column_constant(constant, shape[-1])
    if factor is None or static_shape(source) != shape:
        return None
    with np.errstate(over="ignore"):
        columns = (np.broadcast_to(factor, shape[-1:]) / np.float32(scale)).astype(np.float32)
    return _Quantisation(source, columns, zero) if np.isfinite(columns).all() else None
