"""A step as one CUDA graph: which tensors stay where they are, and what is captured."""

from __future__ import annotations

from typing import Any, NamedTuple

from icd_tvm._tvm import relax, tirx, tvm
from icd_tvm.relax_passes.attach_layout_tags import opaque_states
from icd_tvm.relax_passes.relax_graph import is_call, static_shape

# TVM's attribute: parameters from this number on keep their address from call to call.
_NUM_INPUT = "num_input"
_CAPTURE = "relax.backend.use_cuda_graph"


class Captured(NamedTuple):
    """Kernels that a call of ``main`` launches: as parts of graphs, how many graphs, one by one."""

    inside: int
    graphs: int
    outside: int


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
    first, rest = [], []
    for binding in block.bindings:
        read = set(relax.analysis.free_vars(binding.value))
        pure = not is_call(binding.value, "relax.call_tir_inplace")
        (first if read and read <= params and pure else rest).append(binding)
    return relax.DataflowBlock(first + rest)


def graph_config(mod: Any, wanted: bool) -> dict[str, bool]:
    """Return TVM's configuration for a module: graphs need shapes that are known."""
    dims = [param for param in mod["main"].params if static_shape(param) is None]
    return {_CAPTURE: wanted and not dims}


def for_graph(lowered: Any) -> Any:
    """Return a lowered module whose step is one graph as far as inputs and outputs let it."""
    return tvm.transform.Sequential([InputsFirst(), StaticStates()])(lowered)


def captured(lowered: Any, target: Any) -> Captured:
    """Count what graphs hold of a lowered module, as TVM's pipeline would capture it.

    Parameters
    ----------
    lowered : tvm.IRModule
        From `icd_tvm.relax_passes.lower_cuda.lower_cuda`.
    target : tvm.target.Target
    """
    rx = relax.transform
    passes = [
        rx.RewriteDataflowReshape(),
        rx.ToNonDataflow(),
        rx.RemovePurityChecking(),
        rx.CallTIRRewrite(),
        rx.StaticPlanBlockMemory(),
        rx.RewriteCUDAGraph(),
    ]
    with target, tvm.transform.PassContext(config=graph_config(lowered, wanted=True)):
        mod = tvm.transform.Sequential(passes)(lowered)
    functions = {str(name.name_hint): func for name, func in mod.functions_items()}
    graphs = [func for name, func in functions.items() if "cuda_graph_capture" in name]
    inside = sum(len(_launched(mod, func)) for func in graphs)
    return Captured(inside, len(graphs), len(_launched(mod, functions["main"])))


def _launched(mod: Any, func: Any) -> list[str]:
    found: list[str] = []

    def visit(expr: Any) -> None:
        called = getattr(expr, "op", None)
        if isinstance(called, tvm.ir.GlobalVar) and isinstance(mod[called], tirx.PrimFunc):
            found.append(str(called.name_hint))

    relax.analysis.post_order_visit(func, visit)
    return found


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
