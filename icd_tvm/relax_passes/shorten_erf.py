"""ShortenErf: error functions take a shorter polynomial where their results become bytes."""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import PyExprMutator, Var, mutator, tvm
from icd_tvm.relax_passes.relax_graph import (
    Dataflow,
    is_call,
    is_float32,
    map_elements,
    rewrite_functions,
)
from icd_tvm.tir_schedules.cpu import vector_math

_SHORT = {"relax.erf": vector_math.erf_short, "relax.nn.gelu": vector_math.gelu_short}
_ARITHMETIC = ("relax.add", "relax.subtract", "relax.multiply", "relax.divide")


@tvm.transform.module_pass(opt_level=0, name="ShortenErf")
class ShortenErf:
    """Give ``erf(x)`` and GELU 9 instead of 15 coefficients where only bytes are made of them.

    Applies where every use of the result, through additions, subtractions, products and
    quotients, ends in a quantisation. The error function is off by at most 2.3e-5: of a GELU,
    ``x (1 + erf(x / sqrt(2))) / 2``, whose code c counts steps s from zero point z, that is at
    most ``2.3e-5 (c - z)`` of a step where x is positive, under 0.006; where x is under
    ``-3 sqrt(2)`` the result is less than 1e-6.

    Attributes
    ----------
    shortened : list of str
        Names of the results that were replaced.
    """

    def __init__(self) -> None:
        self.shortened: list[str] = []

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a clone of ``mod`` with the calls replaced."""
        self.shortened = []
        return rewrite_functions(mod, lambda new, func: _Shortener(new, Dataflow(func), self))


@mutator
class _Shortener(PyExprMutator):
    def __init__(self, mod: Any, flow: Dataflow, owner: ShortenErf) -> None:
        super().__init__(mod)
        self._names = {call: var for var, call in flow.values.items()}
        self._flow, self._owner = flow, owner

    def visit_call_(self, call: Any) -> Any:
        var = self._names.get(call)
        short = next((short for op, short in _SHORT.items() if is_call(call, op)), None)
        if var is None or short is None or not is_float32(call):
            return super().visit_call_(call)
        if not _becomes_bytes(self._flow, var):
            return super().visit_call_(call)
        self._owner.shortened.append(str(var.name))
        return map_elements(self.builder_, self.visit_expr(call.args[0]), short, short.__name__)


def _becomes_bytes(flow: Dataflow, var: Any) -> bool:
    """Tell whether all that is computed from ``var`` by arithmetic is quantised."""
    users = flow.users.get(var, [])
    return bool(users) and all(_is_bytes(flow, user) for user in users)


def _is_bytes(flow: Dataflow, user: Any) -> bool:
    value = flow.values.get(user) if isinstance(user, Var) else None
    if is_call(value, "relax.quantize"):
        return True
    return any(is_call(value, op) for op in _ARITHMETIC) and _becomes_bytes(flow, user)
