"""InputsFirst: what reads inputs comes before what a CUDA graph can hold."""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import relax, tvm
from icd_tvm.relax_passes.relax_graph import is_call


@tvm.transform.module_pass(opt_level=0, name="InputsFirst")
class InputsFirst:
    """Move kernels that read nothing but inputs and constants to the beginning of ``main``.

    An input may lie elsewhere in every call, so no graph holds its readers; in the middle they
    would cut it in two.
    """

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a clone of ``mod`` with the bindings of ``main`` moved."""
        mod = mod.clone()
        func = mod["main"]
        known = set(func.params)
        blocks = [_inputs_first(block, known) for block in func.body.blocks]
        body = relax.SeqExpr(blocks, func.body.body)
        mod["main"] = relax.Function(func.params, body, func.ret_ty, func.is_pure, func.attrs)
        return mod


def _inputs_first(block: Any, params: set[Any]) -> Any:
    if not isinstance(block, relax.DataflowBlock):
        return block
    first: list[Any] = []
    rest: list[Any] = []
    for binding in block.bindings:
        read = set(relax.analysis.free_vars(binding.value))
        pure = not is_call(binding.value, "relax.call_tir_inplace")
        (first if read and read <= params and pure else rest).append(binding)
    return relax.DataflowBlock(first + rest)
