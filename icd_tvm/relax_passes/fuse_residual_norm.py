"""FuseResidualNorm: layer norms, with the addition before them, become one row kernel."""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import PyExprMutator, Var, mutator, relax, tvm
from icd_tvm.relax_passes.relax_graph import (
    Dataflow,
    call_func,
    is_call,
    is_float32,
    rewrite_functions,
    static_shape,
)
from icd_tvm.tir_schedules.cpu.layer_norm import layer_norm


@tvm.transform.module_pass(opt_level=0, name="FuseResidualNorm")
class FuseResidualNorm:
    """Replace ``layer_norm(a + b)`` and plain ``layer_norm(a)`` by calls of our kernel.

    The addition joins if both operands have the shape of the result and nothing else reads the
    sum. Layer norms over other axes than the last, or of other types, are left alone.

    Parameters
    ----------
    target : tvm.target.Target
        The kernel is built for it.

    Attributes
    ----------
    refusals : dict of str to str
        Name of each input whose norm was left alone -> the reason.
    fused : dict of str to int
        ``{"residual": norms with an addition, "plain": norms without}``.
    """

    def __init__(self, target: Any) -> None:
        self.target = target
        self.refusals: dict[str, str] = {}
        self.fused = {"residual": 0, "plain": 0}

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a clone of ``mod`` with the layer norms replaced."""
        self.refusals, self.fused = {}, {"residual": 0, "plain": 0}
        mod = rewrite_functions(mod, lambda new, func: _Fuser(new, Dataflow(func), self))
        return relax.transform.DeadCodeElimination()(mod)


@mutator
class _Fuser(PyExprMutator):
    def __init__(self, mod: Any, flow: Dataflow, owner: FuseResidualNorm) -> None:
        super().__init__(mod)
        self._flow, self._owner = flow, owner

    def visit_call_(self, call: Any) -> Any:
        if not is_call(call, "relax.nn.layer_norm"):
            return super().visit_call_(call)
        reason = _unsupported(call)
        if reason:
            self._owner.refusals[str(getattr(call.args[0], "name", call.args[0]))] = reason
            return super().visit_call_(call)
        added = _residual(self._flow, call.args[0])
        residual = added is not None
        self._owner.fused["residual" if residual else "plain"] += 1
        rows = list(added.args) if residual else [call.args[0]]
        func = layer_norm(
            static_shape(call) or (),
            float(call.attrs.epsilon),
            self._owner.target,
            residual=residual,
        )
        args = [self.visit_expr(arg) for arg in (*rows, call.args[1], call.args[2])]
        name = "residual_layer_norm" if residual else "layer_norm"
        return call_func(self.builder_, func, name, args, call.ty)


def _unsupported(call: Any) -> str:
    """Return why a layer norm has no kernel here, or an empty string."""
    shape = static_shape(call)
    if shape is None or len(shape) < 2 or min(shape) < 1:
        return f"its shape is {call.ty}, not static with at least two axes"
    if not all(is_float32(arg) for arg in call.args):
        return "it is not float32"
    if [int(axis) % len(shape) for axis in call.attrs.axes] != [len(shape) - 1]:
        return f"it runs over axes {list(call.attrs.axes)}, not the last one"
    if not (call.attrs.center and call.attrs.scale):
        return "it has no scale or no centre"
    return ""


def _residual(flow: Dataflow, rows: Any) -> Any:
    added = flow.call(rows, "relax.add")
    if added is None or not isinstance(rows, Var) or not flow.single_use(rows):
        return None
    shape = static_shape(added)
    return added if all(static_shape(arg) == shape for arg in added.args) else None
