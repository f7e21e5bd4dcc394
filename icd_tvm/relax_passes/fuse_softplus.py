"""FuseSoftplus: softplus, however it is written, becomes one vector function."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from icd_tvm._tvm import Var, tvm
from icd_tvm.relax_passes.relax_graph import Dataflow, is_call, is_float32, map_elements
from icd_tvm.relax_passes.replace_function import replace_function
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
        mod, self.fused = replace_function(mod, "softplus", _sources, _softplus)
        return mod


def _softplus(builder: Any, x: Any) -> Any:
    return map_elements(builder, x, vector_math.softplus, "softplus")


def _sources(flow: Dataflow) -> Iterator[Any]:
    """Yield what a spelling may begin with."""
    for var, users in flow.users.items():
        values = [flow.values.get(user) for user in users if isinstance(user, Var)]
        if is_float32(var) and any(is_call(value, op) for value in values for op in _FIRST):
            yield var
