"""FoldScales: constant factors before a quantisation become one, with its scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm._tvm import PyExprMutator, Var, mutator, named_const, relax, tvm
from icd_tvm.relax_passes.relax_graph import (
    Dataflow,
    column_constant,
    is_call,
    is_float32,
    operands,
    rewrite_functions,
    scalar_constant,
    static_shape,
)

Array = npt.NDArray[Any]


@tvm.transform.module_pass(opt_level=0, name="FoldScales")
class FoldScales:
    """Replace ``quantize(x * a / b * c, scale)`` by ``quantize(x * (a / b * c / scale), 1)``.

    The factors are constants of one element, or of one for every column (the last axis), and
    nothing else reads what is between them. The result differs by roundings of the factors.

    Attributes
    ----------
    folded : dict of str to int
        Name of each quantisation -> how many factors it lost.
    """

    def __init__(self) -> None:
        self.folded: dict[str, int] = {}

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a clone of ``mod`` with the factors folded."""
        self.folded = {}
        mod = rewrite_functions(mod, lambda new, func: _Folder(new, Dataflow(func), self))
        return relax.transform.DeadCodeElimination()(mod)


@mutator
class _Folder(PyExprMutator):
    def __init__(self, mod: Any, flow: Dataflow, owner: FoldScales) -> None:
        super().__init__(mod)
        self._names = {call: var for var, call in flow.values.items()}
        self._flow, self._owner = flow, owner

    def visit_call_(self, call: Any) -> Any:
        scale = scalar_constant(call.args[1]) if is_call(call, "relax.quantize") else None
        shape = static_shape(call)
        if not scale or not shape or not is_float32(call.args[0]):
            return super().visit_call_(call)
        source, factors = _factors(self._flow, call.args[0], shape)
        total = _product(factors, scale)
        if not factors or not np.isfinite(total).all():
            return super().visit_call_(call)
        self._owner.folded[str(self._names[call].name)] = len(factors)
        factor = named_const(total, "")
        product = self.builder_.emit(relax.op.multiply(self.visit_expr(source), factor))
        one, dtype = relax.const(1.0, "float32"), str(call.ty.dtype)
        axis = int(call.attrs.axis)
        return relax.op.quantize(product, one, call.args[2], axis=axis, out_dtype=dtype)


def _product(factors: list[Array], scale: float) -> Array:
    """Return one factor for all, steps per unit; infinite where float32 does not hold it."""
    with np.errstate(over="ignore"):
        total = (np.prod(np.broadcast_arrays(1.0, *factors), axis=0) / scale).astype(np.float32)
    # A number is an immediate of the kernel; a vector has to be read.
    return np.asarray(total.flat[0]) if (total == total.flat[0]).all() else total


def _factors(flow: Dataflow, expr: Any, shape: tuple[int, ...]) -> tuple[Any, list[Array]]:
    """Return what constant factors are applied to, and the factors as vectors in float64."""
    found: list[Array] = []
    while isinstance(expr, Var) and flow.single_use(expr):
        call: Any = flow.values.get(expr)
        if is_call(call, "relax.multiply"):
            source, constant = operands(call)
        elif is_call(call, "relax.divide"):
            source, constant = call.args
        else:
            break
        factor = column_constant(constant, shape[-1])
        if factor is None or static_shape(source) != shape or not factor.all():
            break
        vector = factor.astype(np.float64)
        found.append(1.0 / vector if is_call(call, "relax.divide") else vector)
        expr = source
    return expr, found
