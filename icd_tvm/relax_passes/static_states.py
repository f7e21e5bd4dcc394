"""StaticStates: opaque states written in place keep their address from call to call."""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import tvm
from icd_tvm.relax_passes.attach_layout_tags import opaque_states
from icd_tvm.relax_passes.relax_graph import is_call

# TVM's attribute: parameters from this number on keep their address from call to call.
_NUM_INPUT = "num_input"


@tvm.transform.module_pass(opt_level=0, name="StaticStates")
class StaticStates:
    """Declare that opaque states written in place keep their address from call to call.

    Only then a graph may hold the kernels that read them. Applies to the opaque states that are
    the last parameters of ``main``; a caller must pass the same tensors in every call.

    Attributes
    ----------
    declared : list of str
        Parameters that keep their address.
    """

    def __init__(self) -> None:
        self.declared: list[str] = []

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a clone of ``mod`` with the attribute ``num_input`` of ``main`` set."""
        mod, self.declared = mod.clone(), []
        names = {name for name, _ in opaque_states(mod)}
        written = _written(mod["main"])
        params = [str(param.name) for param in mod["main"].params]
        while params and params[-1] in names & written:
            self.declared.insert(0, params.pop())
        if self.declared:
            mod["main"] = mod["main"].with_attr(_NUM_INPUT, len(params))
        return mod


def _written(func: Any) -> set[str]:
    """Return the parameters that a kernel writes in place."""
    found = set()
    for block in func.body.blocks:
        for binding in block.bindings:
            if is_call(binding.value, "relax.call_tir_inplace"):
                places = [int(i) for i in binding.value.attrs.inplace_indices]
                fields = binding.value.args[1].fields
                found |= {str(fields[i].name) for i in places if i >= 0}
    return found
