"""Layer norms and RMS norms for the CUDA kernels, however an exporter wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any, NamedTuple

from icd_tvm._tvm import relax
from icd_tvm.relax_passes.cuda_plan import Operand, Planned
from icd_tvm.relax_passes.relax_graph import (
    Dataflow,
    constant_array,
    is_float32,
    static_shape,
)
from icd_tvm.relax_passes.rms_norm_match import match_rms_norm
from icd_tvm.tir_schedules.cuda.norm import norm_rule
from icd_tvm.tir_schedules.cuda.row_codes import RowCodes
from icd_tvm.tir_schedules.cuda.source_kernel import Rule


class _Norm(NamedTuple):
    rows: Any
    gamma: Any
    beta: Any
    eps: float


def plan_norm(flow: Dataflow, var: Any, wanted: set[Any]) -> Planned | str | None:
    """Return the kernel of the norm whose result is ``var``.

    Parameters
    ----------
    flow : Dataflow
    var : relax.Var
    wanted : set of relax.Var
        Values that kernels write or read; an addition that is one of them stays.

    Returns
    -------
    Planned, str or None
        The reason where there is no kernel; None where ``var`` is no norm.
    """
    layer = flow.bound(var, "relax.nn.layer_norm")
    if layer is not None:
        norm: _Norm | str | None = _layer_norm(layer)
    else:
        norm = _rms_norm(flow, var)
    if norm is None or isinstance(norm, str):
        return norm
    shape = static_shape(norm.rows)
    if shape is None or len(shape) < 2 or min(shape) < 1 or not is_float32(norm.rows):
        return f"it is {norm.rows.ty}, not float32 of a known shape"
    added = _added(flow, norm.rows, wanted)
    found = {"x": Operand(norm.rows if added is None else added[0], "either")}
    if added is not None:
        # The kernel reads both in one type; neither comes from a kernel that could choose.
        found = {"x": Operand(added[0], "float32"), "residual": Operand(added[1], "float32")}
    found["gamma"] = Operand(norm.gamma, "kept")
    if norm.beta is not None:
        found["beta"] = Operand(norm.beta, "kept")
    rule = partial(_rule, (prod(shape[:-1]), shape[-1]), norm.eps, layer is not None, tuple(found))
    refusal = rule({"x": "float32"}, "float32").reason
    if refusal:
        return refusal
    kind = "layer_norm" if layer is not None else "rms_norm"
    fused = ("residual",) if added is not None else ()
    return Planned(var, found, rule, kind, "one row kernel", fused, flexible=True)


def _rule(
    sizes: tuple[int, int],
    eps: float,
    centre: bool,
    names: tuple[str, ...],
    types: Mapping[str, str],
    out: str,
    codes: RowCodes | None = None,
) -> Rule:
    return norm_rule(
        *sizes,
        types["x"],
        out,
        eps,
        centre=centre,
        beta="beta" in names,
        residual="residual" in names,
        codes=codes,
    )


def _added(flow: Dataflow, rows: Any, wanted: set[Any]) -> tuple[Any, Any] | None:
    added = flow.call(rows, "relax.add") if isinstance(rows, relax.Var) else None
    if added is None or rows in wanted or not flow.single_use(rows):
        return None
    shape = static_shape(rows)
    fits = all(isinstance(a, relax.Var) and static_shape(a) == shape for a in added.args)
    return (added.args[0], added.args[1]) if fits else None


def _layer_norm(call: Any) -> _Norm | str:
    shape = static_shape(call) or ()
    axes = [int(axis) % max(1, len(shape)) for axis in call.attrs.axes]
    if axes != [len(shape) - 1] or not (call.attrs.center and call.attrs.scale):
        return f"its axes are {axes}, or it has no scale or no centre"
    if any(constant_array(arg, dims=1) is None for arg in call.args[1:]):
        return "its scale or bias is no constant"
    return _Norm(call.args[0], call.args[1], call.args[2], float(call.attrs.epsilon))


def _rms_norm(flow: Dataflow, var: Any) -> _Norm | None:
    """Return ``x / sqrt(mean(x^2) + eps) * gamma`` with its parts, or None."""
    found = match_rms_norm(flow, var)
    if found is None or constant_array(found.gamma, dims=1) is None:
        return None
    return _Norm(found.rows, found.gamma, None, found.eps)
