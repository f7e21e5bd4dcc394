"""One token of a Mamba layer for the CUDA kernels: its convolution and its scan."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from icd_tvm._tvm import GenericConst, relax
from icd_tvm.relax_passes.attention_match import Refused, need, require
from icd_tvm.relax_passes.cuda_plan import Operand, Planned
from icd_tvm.relax_passes.cuda_views import View, view_of
from icd_tvm.relax_passes.elementwise_function import function_after, function_of
from icd_tvm.relax_passes.relax_graph import Dataflow, constant_array, operands, static_shape
from icd_tvm.tir_schedules.cuda.mamba_step import TAPS, conv_step_rule, scan_step_rule
from icd_tvm.tir_schedules.cuda.source_kernel import Rule


def plan_conv(flow: Dataflow, var: Any, dtype: str) -> Planned | str | None:
    """Return the kernel of the convolution whose sum over the window is ``var``.

    Parameters
    ----------
    flow : Dataflow
    var : relax.Var
    dtype : str
        ``float16`` or ``bfloat16``.

    Returns
    -------
    Planned, str or None
        The reason where there is no kernel; None where ``var`` is no sum over a moved window.
    """
    total = flow.bound(var, "relax.sum")
    product = None if total is None else flow.call(total.args[0], "relax.multiply")
    if product is None:
        return None
    window, weight = operands(product)
    joined = flow.call(window, "relax.concat")
    if joined is None or constant_array(weight) is None:
        return None
    try:
        return _conv(flow, var, window, joined, weight, dtype)
    except Refused as refusal:
        return str(refusal)


def _conv(flow: Dataflow, var: Any, window: Any, joined: Any, weight: Any, dtype: str) -> Planned:
    shape = static_shape(window) or ()
    require(len(shape) == 3 and shape[0] == 1, f"its window has shape {shape}, not batch 1")
    _, channels, taps = shape
    require(static_shape(weight) in ((channels, taps), shape), "a weight for each tap is missing")
    require(static_shape(var) == (1, channels), "it is not summed over the window alone")
    state, new = _moved_window(flow, joined, shape)
    biased, bias = channel_bias(flow, var, (channels,))
    result = need(function_after(flow, biased, ("silu",)), "no SiLU follows it")[1]
    made = conv_step_rule(channels, dtype, taps=taps)
    require(made.kernels, made.reason)
    source = view_of(flow, new)
    values = {"x": Operand(source.root, offset=source.offset)}
    kept = {"window": state, "weight": weight, "bias": bias}
    return Planned(
        result=result,
        operands=values | {name: Operand(value, "kept") for name, value in kept.items()},
        rule=lambda *_: made,
        kind="conv_step",
        reason=f"{dtype}, {TAPS} taps",
        fused=("bias", "silu"),
        states={"window_out": window},
        in_place={"window_out": "window"},
    )


def _moved_window(flow: Dataflow, joined: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Return (state, new input) of a window that drops its oldest token for a new one."""
    kept, new = flow.resolve(joined.args[0]).fields
    moved = need(flow.call(kept, "relax.strided_slice"), "its window is not moved by a slice")
    state = moved.args[0]
    require(static_shape(state) == shape, "the state is no window of its own")
    require(static_shape(kept) == (*shape[:2], shape[2] - 1), "it is moved by more than one token")
    require(int(moved.args[2].fields[0].value) == 1, "it does not drop the oldest token")
    return state, new


def channel_bias(flow: Dataflow, var: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Return (biased, bias) of a convolution whose only reader adds a constant of that shape.

    Raises
    ------
    Refused
        If it does not.
    """
    biased = flow.only_user(var)
    added = need(flow.bound(biased, "relax.add"), "no bias follows it")
    _, bias = operands(added)
    fits = constant_array(bias) is not None and static_shape(bias) == shape
    require(fits, "its bias is no constant for each channel")
    return biased, bias


def plan_scan(flow: Dataflow, var: Any, dtype: str) -> Planned | str | None:
    """Return the kernel of the scan whose product of states and C is ``var``.

    Parameters
    ----------
    flow : Dataflow
    var : relax.Var
    dtype : str
        ``float16`` or ``bfloat16``.

    Returns
    -------
    Planned, str or None
        The reason where there is no kernel; None where ``var`` is no such product.
    """
    product = flow.bound(var, "relax.matmul")
    added = None if product is None else flow.call(product.args[0], "relax.add")
    if product is None or added is None:
        return None
    terms = [flow.call(arg, "relax.multiply") for arg in added.args]
    if any(term is None for term in terms):
        return None
    for decay, drive in (terms, terms[::-1]):
        state = _decayed(flow, decay)
        if state is not None:
            try:
                return _scan(flow, var, product, state, drive, dtype)
            except Refused as refusal:
                return str(refusal)
    return None


def _decayed(flow: Dataflow, call: Any) -> tuple[Any, Any, Any] | None:
    """Return (old state, step, A) of ``state * exp(step * A)``."""
    for state, factor in (tuple(call.args), tuple(call.args)[::-1]):
        raised = flow.call(factor, "relax.exp")
        inner = None if raised is None else flow.call(raised.args[0], "relax.multiply")
        if inner is not None:
            step, rates = operands(inner)
            if isinstance(rates, GenericConst):
                return state, step, rates
    return None


def _scan(
    flow: Dataflow,
    var: Any,
    product: Any,
    decayed: tuple[Any, Any, Any],
    drive: Any,
    dtype: str,
) -> Planned:
    state, step, rates = decayed
    new_state = product.args[0]
    shape = static_shape(new_state) or ()
    require(len(shape) == 3 and shape[0] == 1, f"its state has shape {shape}, not batch 1")
    _, channels, states = shape
    require(static_shape(state) == shape, "it has no state of its own")
    require(static_shape(rates) in ((channels, states), shape), "A has another shape")
    softplus, (dt, dt_bias) = step_before(flow, step, (1, channels))
    x, b = _drive(flow, drive, softplus, channels, states)
    c = _row(flow, product.args[1], states, "C")
    out, z, d = skip_and_gate(flow, var, x, (1, channels))
    made = partial(_scan_rule, channels, states, dtype)
    refusal = made({"b": dtype}, dtype).reason
    require(not refusal, refusal)
    reads = {"x": view_of(flow, x), "z": z, "dt": dt, "b": b, "c": c}
    found = {name: Operand(view.root, offset=view.offset) for name, view in reads.items()}
    kept = {"state": state, "a": rates, "d": d, "dt_bias": dt_bias}
    return Planned(
        result=out,
        operands=found | {name: Operand(value, "kept") for name, value in kept.items()},
        rule=made,
        kind="scan_step",
        reason=f"{dtype}, {states} states",
        fused=("softplus", "skip", "gate"),
        states={"state_out": new_state},
        in_place={"state_out": "state"},
    )


def _scan_rule(channels: int, states: int, dtype: str, types: Mapping[str, str], _: str) -> Rule:
    return scan_step_rule(channels, states, dtype, shared=types["b"])


def step_before(flow: Dataflow, step: Any, shape: tuple[int, int]) -> tuple[Any, tuple[View, Any]]:
    """Return the step [tokens, channels] after its softplus, and what it is of: (product, bias).

    Raises
    ------
    Refused
        With the reason; `skip_and_gate` too.
    """
    channels, softplus = shape[1], view_of(flow, step).root
    require(static_shape(softplus) == shape, "its step has another shape")
    todo, seen = [softplus], set[Any]()
    while todo:
        var = todo.pop()
        added = flow.call(var, "relax.add")
        bias = None if added is None else operands(added)[1]
        is_bias = bias is not None and constant_array(bias, dims=1) is not None
        if is_bias and static_shape(bias) == (channels,):
            require(function_of(flow, softplus, var, ("softplus",)), "its step is no softplus")
            return softplus, (view_of(flow, operands(added)[0]), bias)
        for arg in getattr(flow.values.get(var), "args", []):
            if isinstance(arg, relax.Var) and arg not in seen:
                seen.add(arg)
                todo.append(arg)
        require(len(seen) < 40, "its step is no softplus of a product and a bias")
    raise Refused("its step is no softplus of a product and a bias")


def _drive(flow: Dataflow, drive: Any, step: Any, channels: int, states: int) -> tuple[Any, View]:
    """Return (x, B) of ``(step * x) * B``."""
    for first, second in (tuple(drive.args), tuple(drive.args)[::-1]):
        scaled = view_of(flow, first).root
        times = flow.call(scaled, "relax.multiply")
        if times is None or static_shape(scaled) != (1, channels):
            continue
        others = [arg for arg in times.args if not arg.same_as(step)]
        if len(others) == 1:
            return others[0], _row(flow, second, states, "B")
    raise Refused("its input is not the step times x times B")


def _row(flow: Dataflow, expr: Any, states: int, what: str) -> View:
    require(int(np.prod(static_shape(expr) or (0,))) == states, f"{what} has another shape")
    return view_of(flow, expr)


def skip_and_gate(
    flow: Dataflow, var: Any, x: Any, shape: tuple[int, int]
) -> tuple[Any, View, Any]:
    """Return (result, z, D) of ``(y + D x) silu(z)``, y and x [tokens, channels]."""
    flat, channels = var, shape[1]
    while (user := flow.only_user(flat)) is not None and _reshaped(flow, user):
        flat = user
    require(static_shape(flat) == shape, "its output is no row of channels")
    total = need(flow.only_user(flat), "its output is read more than once")
    added = need(flow.bound(total, "relax.add"), "no skip connection follows it")
    skip = next(arg for arg in added.args if not arg.same_as(flat))
    times = need(flow.call(skip, "relax.multiply"), "the skip connection has no D")
    one, d = operands(times)
    is_d = constant_array(d) is not None and static_shape(d) == (channels,)
    source, own = view_of(flow, one), view_of(flow, x)
    same = source.root.same_as(own.root) and source.offset == own.offset
    require(is_d and same, "the skip connection is not D x")
    result = need(flow.only_user(total), "the sum is read more than once")
    gated = need(flow.bound(result, "relax.multiply"), "no gate follows it")
    gate = next(arg for arg in gated.args if not arg.same_as(total))
    return result, _gate(flow, gate), d


def _reshaped(flow: Dataflow, var: Any) -> bool:
    return any(flow.bound(var, f"relax.{op}") is not None for op in ("squeeze", "reshape"))


def _gate(flow: Dataflow, gate: Any) -> View:
    call = flow.resolve(gate)
    for arg in getattr(call, "args", []):
        if isinstance(arg, relax.Var) and function_of(flow, gate, arg, ("silu",)):
            return view_of(flow, arg)
    raise Refused("its gate is no SiLU")
