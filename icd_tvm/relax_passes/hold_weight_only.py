"""HoldWeightOnly: one float row times a quantised weight becomes a call that keeps its codes."""

from __future__ import annotations

from math import prod
from typing import Any

from icd_tvm._tvm import PyExprMutator, mutator, named_const, relax, tvm
from icd_tvm.relax_passes.cuda_weight_only import codes_of, why_no_kernel
from icd_tvm.relax_passes.held_product import Codes, HeldProduct
from icd_tvm.relax_passes.quantized_operands import find_activation, find_weight, reads_bytes
from icd_tvm.relax_passes.relax_graph import (
    Dataflow,
    is_call,
    is_float32,
    rewrite_functions,
    static_shape,
)
from icd_tvm.relax_passes.select_cuda_kernels import with_refusals


@tvm.transform.module_pass(opt_level=0, name="HoldWeightOnly")
class HoldWeightOnly:
    """Replace matmuls of one float row and a quantised weight by calls of a name.

    Folding constants would turn the weight into floats; `SelectCudaKernels` turns the call into a
    kernel that reads the codes. Only what has such a kernel is replaced. The other weights become
    floats, and the reasons travel with the module (`read_cuda_kernels`). Zero points are
    subtracted where the codes stay bytes.

    Parameters
    ----------
    dtype : str
        Of the vector in the kernel: ``float16`` or ``bfloat16``.

    Attributes
    ----------
    held : list of str
        Bindings of the matmuls that were replaced.
    refused : dict of str to str
        Binding of each other product of floats with a quantised weight -> the reason.
    """

    def __init__(self, dtype: str = "float16") -> None:
        self.dtype = dtype
        self.held: list[str] = []
        self.refused: dict[str, str] = {}

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a clone of ``mod`` with the products held."""
        self.held, self.refused = [], {}
        mod = rewrite_functions(mod, lambda new, func: _Holder(new, Dataflow(func), self))
        mod = relax.transform.DeadCodeElimination()(mod)
        refused = {name: f"its codes are not read: {why}" for name, why in self.refused.items()}
        return with_refusals(mod, refused)


@mutator
class _Holder(PyExprMutator):
    def __init__(self, mod: Any, flow: Dataflow, owner: HoldWeightOnly) -> None:
        super().__init__(mod)
        self._flow, self._owner = flow, owner
        self._names = {call: str(var.name) for var, call in flow.values.items() if _may(flow, call)}

    def visit_call_(self, call: Any) -> Any:
        if call not in self._names:
            return super().visit_call_(call)
        name = self._names[call]
        found = _codes(self._flow, call, self._owner.dtype)
        if isinstance(found, str):
            if find_activation(self._flow, call.args[0]) is None:
                self._owner.refused[name] = found
            return super().visit_call_(call)
        self._owner.held.append(name)
        label, weight = found
        constants = [named_const(weight.codes, label), named_const(weight.scales, f"{label}.scale")]
        return HeldProduct(self.visit_expr(call.args[0]), *constants).call()


def _may(flow: Dataflow, call: Any) -> bool:
    """Tell whether a value is a product of floats with a weight that is made of bytes."""
    floats = is_call(call, "relax.matmul") and is_float32(call) and is_float32(call.args[0])
    return floats and reads_bytes(flow, call.args[1])


def _codes(flow: Dataflow, call: Any, dtype: str) -> tuple[str, Codes] | str:
    """Return the name and the codes of the weight of a product, or why there is no kernel."""
    shape = static_shape(call.args[0])
    if shape is None or prod(shape[:-1]) != 1:
        rows = "no known shape" if shape is None else f"{prod(shape[:-1])} rows"
        return f"its input has {rows}: the kernel multiplies one vector"
    weight = find_weight(flow, call.args[1])
    if weight is None:
        return "its weight is no matrix of bytes with constant float32 scales and whole zero points"
    codes = codes_of(weight)
    if isinstance(codes, str):
        return codes
    return why_no_kernel(codes, dtype) or (weight.name, codes)
