"""A step as one CUDA graph: whether and what TVM captures."""

from __future__ import annotations

from typing import Any, NamedTuple

from icd_tvm._tvm import relax, tirx, tvm
from icd_tvm.relax_passes.inputs_first import InputsFirst
from icd_tvm.relax_passes.relax_graph import static_shape
from icd_tvm.relax_passes.static_states import StaticStates

_CAPTURE = "relax.backend.use_cuda_graph"


class Captured(NamedTuple):
    """Kernels that a call of ``main`` launches: as parts of graphs, how many graphs, one by one."""

    inside: int
    graphs: int
    outside: int


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
