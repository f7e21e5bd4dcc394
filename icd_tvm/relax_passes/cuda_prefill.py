"""A prompt through a Mamba layer for the CUDA kernels: its convolution and its scan."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm._tvm import relax
from icd_tvm.relax_passes.attention_match import Refused, need, require
from icd_tvm.relax_passes.cuda_mamba import channel_bias, skip_and_gate, step_before
from icd_tvm.relax_passes.cuda_plan import Operand, Planned
from icd_tvm.relax_passes.cuda_views import view_of
from icd_tvm.relax_passes.elementwise_function import function_after
from icd_tvm.relax_passes.relax_graph import Dataflow, static_shape
from icd_tvm.tir_schedules.cpu.scan_program import ScanProgram, Term
from icd_tvm.tir_schedules.cpu.selective_scan import SCAN_PROGRAM
from icd_tvm.tir_schedules.cuda.prefill_scan import TAPS, prefill_conv_rule, prefill_scan_rule

Array = npt.NDArray[np.float64]
_RESHAPES = ("squeeze", "reshape", "expand_dims")
_OPERATORS: Mapping[str, Callable[..., Any]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Neg": np.negative, "Exp": np.exp,
}  # fmt: skip


def plan_prefill_conv(flow: Dataflow, var: Any, dtype: str) -> Planned | str | None:
    """Return the kernel of the causal convolution of a prompt that is bound to ``var``.

    Parameters
    ----------
    flow : Dataflow
    var : relax.Var
    dtype : str
        ``float16`` or ``bfloat16``.

    Returns
    -------
    Planned, str or None
        The reason where there is no kernel; None where ``var`` is no convolution in one dimension.
    """
    call = flow.bound(var, "relax.nn.conv1d")
    if call is None:
        return None
    try:
        return _conv(flow, var, call, dtype)
    except Refused as refusal:
        return str(refusal)


def _conv(flow: Dataflow, var: Any, call: Any, dtype: str) -> Planned:
    batch, channels, length = static_shape(var) or (0, 0, 0)
    taps = need(static_shape(call.args[1]), "its weight has no known shape")[-1]
    plain = [int(n) for n in (*call.attrs.strides, *call.attrs.padding, *call.attrs.dilation)]
    require(plain == [1, 0, 0, 1], "it has strides, padding or dilation")
    own = int(call.attrs.groups) == channels and batch == 1
    require(own, "it is no convolution of each channel of one sequence")
    window, state, x = _window(flow, call.args[0], (channels, length, taps))
    bias, result = _biased_silu(flow, var, (length, channels))
    made = prefill_conv_rule(batch, length, channels, dtype, taps=taps)
    require(made.kernels, made.reason)
    source = view_of(flow, x)
    kept = {"window": window, "weight": call.args[1], "bias": bias}
    return Planned(
        result=result,
        operands={"x": Operand(source.root, offset=source.offset)}
        | {name: Operand(value, "kept") for name, value in kept.items()},
        rule=lambda *_: made,
        kind="prefill_conv",
        reason=f"{dtype}, {TAPS} taps, {length} steps",
        fused=("bias", "silu"),
        states={"window_out": state},
    )


def _window(flow: Dataflow, expr: Any, sizes: tuple[int, int, int]) -> tuple[Any, Any, Any]:
    """Return (old window, new window, x [steps, channels]) of what a convolution reads."""
    channels, length, taps = sizes
    read = need(flow.call(expr, "relax.strided_slice"), "it does not read a window with a prompt")
    joined = need(flow.call(read.args[0], "relax.concat"), "no window is before the prompt")
    window, prompt = flow.resolve(joined.args[0]).fields
    require(static_shape(window) == (1, channels, taps), "the window is of another length")
    require(_begin(read) == 1 and static_shape(read) == (1, channels, length + taps - 1),
            "it does not read the window but its oldest input, and the prompt")  # fmt: skip
    root = next(one for one in flow.values if flow.values[one].same_as(joined))
    slices = [
        u for u in flow.users[root] if u is not None and static_shape(u) == (1, channels, taps)
    ]
    require(len(slices) == 1, "the window after the prompt is not kept once")
    after = need(flow.bound(slices[0], "relax.strided_slice"), "the window after it is no slice")
    require(_begin(after) == length, "the window after the prompt is not its end")
    while any(flow.bound(prompt, f"relax.{op}") is not None for op in _RESHAPES):
        prompt = flow.values[prompt].args[0]
    turned = need(flow.bound(prompt, "relax.permute_dims"), "channels of the prompt are not last")
    require(static_shape(turned.args[0]) == (length, channels), "the prompt has another shape")
    return window, slices[0], turned.args[0]


def _begin(call: Any) -> int:
    return int(call.args[2].fields[0].value)


def _biased_silu(flow: Dataflow, var: Any, shape: tuple[int, int]) -> tuple[Any, Any]:
    """Return (bias, result [steps, channels]) of what follows a convolution."""
    flat, bias = channel_bias(flow, var, (1, shape[1], 1))
    while static_shape(flat) != shape:
        flat = need(flow.only_user(flat), "its output is read in several shapes")
        moved = any(
            flow.bound(flat, f"relax.{op}") is not None for op in (*_RESHAPES, "permute_dims")
        )
        require(moved, "its output is not turned to rows of channels")
    return bias, need(function_after(flow, flat, ("silu",)), "no SiLU follows it")[1]


def plan_prefill_scan(
    mod: Any, flow: Dataflow, var: Any, dtype: str, arch: str
) -> Planned | str | None:
    """Return the kernels of the scan over a prompt that is bound to ``var``.

    Parameters
    ----------
    mod : tvm.IRModule
        Holds the function of `selective_scan`.
    flow : Dataflow
    var : relax.Var
    dtype, arch : str

    Returns
    -------
    Planned, str or None
        The reason where there is no kernel; None where ``var`` is no call of `selective_scan`.
    """
    call = flow.bound(var, "relax.call_tir")
    func = None if call is None else mod[call.args[0]]
    if func is None or not func.attrs or SCAN_PROGRAM not in func.attrs:
        return None
    try:
        return _scan(flow, var, call, json.loads(str(func.attrs[SCAN_PROGRAM])), (dtype, arch))
    except Refused as refusal:
        return str(refusal)


def _scan(flow: Dataflow, var: Any, call: Any, made: Any, device: tuple[str, str]) -> Planned:
    content, length, backwards, flipped = made
    program, (dtype, arch) = ScanProgram.from_json(content), device
    require(not any((*backwards, *flipped)), "it runs backwards")
    require(len(program.state) == 2, f"its state has {len(program.state)} axes")
    channels, states = program.state
    roles = need(mamba_roles(program), "its recurrence is not that of Mamba")
    start, *given = call.args[1].fields
    values = {name: given[place] for name, place in roles.items()}
    dt, dt_bias = step_before(flow, values["dt"], (length, channels))[1]
    y, final = _results(flow, var, (1, channels, states))
    x = view_of(flow, values["x"]).root
    result, z, d = skip_and_gate(flow, y, x, (length, channels))
    rule = prefill_scan_rule(1, length, channels, states, dtype, arch=arch)
    require(rule.kernels, rule.reason)
    narrow = {"x": x, "z": z.root, "dt": dt.root}
    rates = {name: view_of(flow, values[name]).root for name in "bc"}
    kept = {"state": start, "a": values["a"], "d": d, "dt_bias": dt_bias}
    return Planned(
        result=result,
        operands={name: Operand(value) for name, value in narrow.items()}
        | {name: Operand(value, "float32") for name, value in rates.items()}
        | {name: Operand(_root(flow, value), "kept") for name, value in kept.items()},
        rule=lambda *_: rule,
        kind="prefill_scan",
        reason=f"{dtype}, {states} states, {length} steps, {len(rule.kernels)} kernels",
        fused=("softplus", "skip", "gate"),
        states={"state_out": final},
    )


def _root(flow: Dataflow, value: Any) -> Any:
    return view_of(flow, value).root


def _results(flow: Dataflow, var: Any, shape: tuple[int, int, int]) -> tuple[Any, Any]:
    """Return the variables of y and of the last state, the latter in the shape of the first."""
    items = {int(flow.values[u].index): u for u in flow.users[var] if _is_item(flow, u)}
    require(set(items) == {0, 1}, "it has other results than y and a state")
    state = found = items[1]
    while (user := flow.only_user(state)) is not None and any(
        flow.bound(user, f"relax.{op}") is not None for op in _RESHAPES
    ):
        state = user
        found = state if static_shape(state) == shape else found
    return items[0], found


def _is_item(flow: Dataflow, var: Any) -> bool:
    return var is not None and isinstance(flow.values.get(var), relax.TupleGetItem)


def mamba_roles(program: ScanProgram) -> dict[str, int] | None:
    """Return which operand of a recurrence is dt, x, A, B and C of Mamba; None if it is another.

    It is known by its values at random numbers, however it is written: ``h = exp(dt A) h + dt x B``
    and ``y = sum h C``.
    """
    rows = [i for i, one in enumerate(program.operands) if one.axes == (True, False)]
    columns = [i for i, one in enumerate(program.operands) if one.axes == (False, True)]
    tables = [i for i, one in enumerate(program.operands) if one.axes == (True, True)]
    found = (len(rows), len(columns), len(tables), len(program.outputs), len(program.early))
    if found != (2, 2, 1, 1, 0):
        return None
    rng = np.random.default_rng(0)
    known = {i: rng.standard_normal((3, 1)) for i in rows}
    known |= {i: rng.standard_normal((1, 4)) for i in columns}
    known |= {i: rng.standard_normal((3, 4)) for i in tables}
    old = rng.standard_normal((3, 4))
    for (dt, x), (b, c) in ((r, s) for r in permutations(rows) for s in permutations(columns)):
        (a,) = tables
        new = np.exp(known[dt] * known[a]) * old + known[dt] * known[x] * known[b]
        seen = (new * known[c]).sum(1, keepdims=True)
        if _same(program, known, old, new, seen):
            return {"dt": dt, "x": x, "a": a, "b": b, "c": c}
    return None


def _same(
    program: ScanProgram, known: Mapping[int, Array], old: Array, new: Array, seen: Array
) -> bool:
    try:
        update = _value(program.update, known, {"old": old})
        sums = [_value(term, known, {"new": new}).sum(1, keepdims=True) for term in program.late]
        output = _value(program.outputs[0][0], known, {"new": new, "late": sums})
    except KeyError:
        return False
    return bool(np.allclose(update, new) and np.allclose(output, seen))


def _value(term: Term, known: Mapping[int, Array], state: Mapping[str, Any]) -> Array:
    if term.op == "number":
        return np.asarray(term.number)
    if term.op == "operand":
        return known[term.place]
    if term.op in ("old", "new"):
        return np.asarray(state[term.op])
    if term.op == "late":
        return np.asarray(state["late"][term.place])
    return np.asarray(_OPERATORS[term.op](*(_value(arg, known, state) for arg in term.args)))
