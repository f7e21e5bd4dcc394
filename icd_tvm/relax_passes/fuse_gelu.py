"""FuseGelu: GELU, however it is written, becomes one operator."""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import PyExprMutator, Var, mutator, relax, tvm
from icd_tvm.relax_passes.elementwise_function import function_after
from icd_tvm.relax_passes.relax_graph import Dataflow, is_call, is_float32, rewrite_functions


@tvm.transform.module_pass(opt_level=0, name="FuseGelu")
class FuseGelu:
    """Replace the operators that compute ``x (1 + erf(x / sqrt(2))) / 2`` by ``relax.nn.gelu``.

    Its kernel holds the constants in its polynomial: 20 instead of 24 operations a vector. Source:
    Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.

    Attributes
    ----------
    fused : list of str
        Names of the results that were replaced.
    """

    def __init__(self) -> None:
        self.fused: list[str] = []

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a clone of ``mod`` with the operators replaced."""
        self.fused = []
        mod = rewrite_functions(mod, lambda new, func: _Fuser(new, Dataflow(func), self))
        return relax.transform.DeadCodeElimination()(mod)


@mutator
class _Fuser(PyExprMutator):
    def __init__(self, mod: Any, flow: Dataflow, owner: FuseGelu) -> None:
        super().__init__(mod)
        # The last operator of each GELU -> its argument.
        self._found: dict[Any, Any] = {}
        for value in flow.values.values():
            source = _source(flow, value)
            found = None if source is None else function_after(flow, source, ("gelu",))
            if found is not None:
                self._found[flow.values[found[1]]] = source
                owner.fused.append(str(found[1].name))

    def visit_call_(self, call: Any) -> Any:
        source = self._found.get(call)
        if source is None:
            return super().visit_call_(call)
        return relax.op.nn.gelu(self.visit_expr(source))


def _source(flow: Dataflow, value: Any) -> Any:
    """Return what an error function's argument is a multiple of, or None."""
    scaled: Any = flow.resolve(value.args[0]) if is_call(value, "relax.erf") else None
    if not any(is_call(scaled, op) for op in ("relax.multiply", "relax.divide")):
        return None
    return next((arg for arg in scaled.args if isinstance(arg, Var) and is_float32(arg)), None)
