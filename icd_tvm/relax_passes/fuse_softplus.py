"""FuseSoftplus: softplus, however it is written, becomes one vector function."""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import PyExprMutator, Var, mutator, relax, te, tvm
from icd_tvm.relax_passes.elementwise_function import function_after
from icd_tvm.relax_passes.relax_graph import Dataflow, is_call, is_float32, rewrite_functions
from icd_tvm.tir_schedules.cpu import vector_math

# What a spelling applies to its argument first.
_FIRST = ("relax.abs", "relax.exp")


@tvm.transform.module_pass(opt_level=0, name="FuseSoftplus")
class FuseSoftplus:
    """Replace the operators that compute ``log(1 + exp(x))`` by one.

    Spelled out with a care for large and small x it takes an exponential, a logarithm and a
    division; `vector_math.softplus` takes one exponential and a polynomial, and is as exact.

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
    def __init__(self, mod: Any, flow: Dataflow, owner: FuseSoftplus) -> None:
        super().__init__(mod)
        self._owner = owner
        # The last operator of each softplus -> (its name, its argument).
        self._found: dict[Any, tuple[str, Any]] = {}
        for var in flow.users:
            result = _softplus_of(flow, var)
            if result is not None:
                self._found[flow.values[result]] = (str(result.name), var)

    def visit_call_(self, call: Any) -> Any:
        found = self._found.get(call)
        if found is None:
            return super().visit_call_(call)
        name, source = found
        self._owner.fused.append(name)
        return self.builder_.call_te(
            lambda x: te.compute(
                x.shape, lambda *index: vector_math.softplus(x[index]), name="compute"
            ),
            self.visit_expr(source),
            primfunc_name_hint="softplus",
        )


def _softplus_of(flow: Dataflow, var: Any) -> Any:
    """Return the variable that is the softplus of ``var``, or None."""
    if not is_float32(var):
        return None
    users = [flow.values.get(user) for user in flow.users[var] if isinstance(user, Var)]
    if not any(is_call(user, op) for user in users for op in _FIRST):
        return None
    found = function_after(flow, var, ("softplus",))
    return None if found is None else found[1]
