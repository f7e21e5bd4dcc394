"""What the attention matchers share: the scores around a softmax, and how they refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from icd_tvm._tvm import relax
from icd_tvm.relax_passes.relax_graph import (
    Dataflow,
    is_float32,
    operands,
    rounded_to_bf16,
    scalar_constant,
    static_shape,
)


@dataclass(frozen=True)
class Codes:
    """How an operand was quantised: ``(code - zero) * scale``, one scale for all of it."""

    dtype: str
    scale: float
    zero: int

    def divided(self, factor: float) -> Codes:
        """Return the codes of what was multiplied by ``factor`` before it was quantised."""
        return replace(self, scale=self.scale / factor)


class Refused(Exception):
    """Carries the reason why a softmax is not part of a supported attention."""


def replace_attentions(
    mod: Any, match: Callable[[Dataflow, Any], Any], rewriter: Callable[[Any, list[Any], Any], Any]
) -> tuple[Any, list[str], dict[str, str]]:
    """Replace every attention that ``match`` accepts.

    Parameters
    ----------
    mod : tvm.IRModule
        Left untouched.
    match : callable
        (flow, variable of a softmax) -> a match with a ``result``; raises :class:`Refused`.
    rewriter : callable
        (module, matches, flow) -> the mutator that replaces the results.

    Returns
    -------
    mod : tvm.IRModule
    fused : list of str
        Names of the results that were replaced.
    refusals : dict of str to str
        Name of each softmax that was left alone -> the reason.
    """
    mod, fused, refusals = mod.clone(), [], {}
    for name, func in mod.functions_items():
        if not isinstance(func, relax.Function):
            continue
        flow, found = Dataflow(func), []
        for var in list(flow.values):
            if flow.call(var, "relax.nn.softmax") is None:
                continue
            try:
                found.append(match(flow, var))
            except Refused as refusal:
                refusals[str(var.name)] = str(refusal)
        fused += [str(one.result.name) for one in found]
        mutator = rewriter(mod, found, flow)
        new = mutator.visit_expr(func)
        mod = mutator.builder_.get()
        mod[name] = new
    return relax.transform.DeadCodeElimination()(mod), fused, refusals


def match_softmax(flow: Dataflow, probabilities: Any) -> tuple[Any, tuple[int, ...]]:
    """Return the call of softmax over the last of four static float32 axes, and its shape."""
    softmax = flow.call(probabilities, "relax.nn.softmax")
    shape = need(static_shape(softmax), "its shape is not static")
    require(len(shape) == 4, f"its input has {len(shape)} axes, not 4")
    require(int(softmax.attrs.axis) in (-1, 3), "it does not run over the last axis")
    require(is_float32(softmax), "it is not float32")
    return softmax, shape


def match_scores(flow: Dataflow, scores: Any) -> tuple[Any, float, Any]:
    """Return (product of queries and keys, scale, mask or None)."""
    mask = None
    added = flow.call(scores, "relax.add")
    if added is not None:
        scores, mask = _scores_and_mask(added)
    scores, scale = strip_scale(flow, scores)
    product = flow.call(scores, "relax.matmul")
    require(product is not None, "its input is no product of queries and keys")
    return product, scale, mask


def _scores_and_mask(added: Any) -> tuple[Any, Any]:
    full = static_shape(added)
    first, second = operands(added)
    return (first, second) if static_shape(first) == full else (second, first)


def strip_scale(flow: Dataflow, expr: Any) -> tuple[Any, float]:
    """Strip multiplications and divisions by a scalar constant; return their product too."""
    scale = 1.0
    while True:
        times, over = flow.call(expr, "relax.multiply"), flow.call(expr, "relax.divide")
        if times is not None:
            inner, factor = operands(times)
        elif over is not None:
            inner, factor = over.args
        else:
            return expr, scale
        number = scalar_constant(flow.resolve(factor))
        if number is None or number == 0.0:
            return expr, scale
        scale = scale / number if times is None else scale * number
        expr = inner


def strip_codes(flow: Dataflow, expr: Any) -> tuple[Any, Codes | None]:
    """Strip a trip through codes of one constant scale; return what was quantised, and how.

    A trip through bfloat16 counts as codes of scale 1.
    """
    rounded = rounded_to_bf16(flow, expr)
    if rounded is not None:
        return rounded, Codes("bfloat16", 1.0, 0)
    restored = flow.call(expr, "relax.dequantize")
    made = flow.call(restored.args[0], "relax.quantize") if restored is not None else None
    if made is None:
        return expr, None
    numbers = [
        [scalar_constant(flow.resolve(arg)) for arg in call.args[1:3]] for call in (made, restored)
    ]
    scale, zero = numbers[0]
    same = numbers[0] == numbers[1] and scale is not None and zero is not None
    require(same, "an operand has codes of more than one scale")
    return made.args[0], Codes(str(made.ty.dtype), float(scale or 0.0), int(zero or 0))


def user_of(flow: Dataflow, var: Any, op: str, what: str) -> Any:
    """Return the only user of ``var``, a call of ``op``; refuse otherwise."""
    user = flow.only_user(var)
    require(user is not None, f"{what} have no single user")
    require(flow.call(user, op) is not None, f"{what} are not used by {op}")
    return user


def require(condition: Any, reason: str) -> None:
    """Refuse with ``reason`` unless ``condition`` holds."""
    if not condition:
        raise Refused(reason)


def need(value: Any, reason: str) -> Any:
    """Return ``value``; refuse with ``reason`` if it is None."""
    require(value is not None, reason)
    return value
