"""FuseGelu: GELU, however it is written, becomes one operator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from icd_tvm._tvm import Var, relax, tvm
from icd_tvm.relax_passes.relax_graph import Dataflow, is_call, is_float32
from icd_tvm.relax_passes.replace_function import replace_function


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
        mod, self.fused = replace_function(mod, "gelu", _sources, lambda _, x: relax.op.nn.gelu(x))
        return mod


def _sources(flow: Dataflow) -> Iterator[Any]:
    """Yield what the arguments of error functions are multiples of."""
    for value in flow.values.values():
        scaled: Any = flow.resolve(value.args[0]) if is_call(value, "relax.erf") else None
        if any(is_call(scaled, op) for op in ("relax.multiply", "relax.divide")):
            yield from (arg for arg in scaled.args if isinstance(arg, Var) and is_float32(arg))
