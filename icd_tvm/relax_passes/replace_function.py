"""Replace the operators that compute one function of a tensor, however it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from icd_tvm._tvm import PyExprMutator, mutator, relax
from icd_tvm.relax_passes.elementwise_function import function_after
from icd_tvm.relax_passes.relax_graph import Dataflow, rewrite_functions

Sources = Callable[[Dataflow], Iterable[Any]]
Emit = Callable[[Any, Any], Any]


def replace_function(mod: Any, name: str, sources: Sources, emit: Emit) -> tuple[Any, list[str]]:
    """Return a clone of a module with a function in one piece, and the results replaced.

    Parameters
    ----------
    mod : tvm.IRModule
        Left untouched.
    name : str
        Key of `icd_tvm.relax_passes.elementwise_function.FUNCTIONS`.
    sources : callable
        Dataflow -> the variables that may be its argument; a cheap choice, as each is tried.
    emit : callable
        (BlockBuilder, argument) -> the expression that takes the operators' place.
    """
    replaced: list[str] = []

    def replacer(new: Any, func: Any) -> Any:
        flow = Dataflow(func)
        return _Replacer(new, _found(flow, name, sources), emit, replaced)

    mod = rewrite_functions(mod, replacer)
    return relax.transform.DeadCodeElimination()(mod), replaced


def _found(flow: Dataflow, name: str, sources: Sources) -> dict[Any, tuple[str, Any]]:
    """Return the last operator of each such function -> (its name, its argument)."""
    found = {}
    for source in sources(flow):
        after = function_after(flow, source, (name,))
        if after is not None:
            result = after[1]
            found[flow.values[result]] = (str(result.name), source)
    return found


@mutator
class _Replacer(PyExprMutator):
    def __init__(
        self, mod: Any, found: dict[Any, tuple[str, Any]], emit: Emit, replaced: list[str]
    ) -> None:
        super().__init__(mod)
        self._found, self._emit, self._replaced = found, emit, replaced

    def visit_call_(self, call: Any) -> Any:
        found = self._found.get(call)
        if found is None:
            return super().visit_call_(call)
        name, source = found
        self._replaced.append(name)
        return self._emit(self.builder_, self.visit_expr(source))
