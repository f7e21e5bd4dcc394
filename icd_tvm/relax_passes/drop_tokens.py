"""DropTokens: an encoder's later layers run on the tokens that attention looks at most."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from icd_tvm._tvm import relax, tvm
from icd_tvm.adapters.token_spec import TokenSpec, parse_tokens
from icd_tvm.adapters.units import kept_count
from icd_tvm.errors import ConfigError, IcdError, TransformError
from icd_tvm.relax_passes.attention_match import Refused, match_scores, match_softmax, user_of
from icd_tvm.relax_passes.axis_groups import find_axis_groups
from icd_tvm.relax_passes.axis_model import AxisGroups
from icd_tvm.relax_passes.compact_groups import compact_groups
from icd_tvm.relax_passes.relax_graph import Dataflow, static_shape
from icd_tvm.relax_passes.transform_meta import with_transform_meta

__all__ = ["DropTokens", "parse_tokens"]

_SOFTMAX = "relax.nn.softmax"
_TOKENS = 2
# Added to the attention mass of tokens that always stay; float32 keeps their order anyway.
_ALWAYS = np.float32(1e30)


class _Cut(NamedTuple):
    """An attention, and what is computed before and behind it."""

    probabilities: Any
    context: Any
    mask: Any
    before: list[Any]
    behind: list[Any]


@tvm.transform.module_pass(opt_level=0, name="DropTokens")
class DropTokens:
    """Gather the tokens with the most attention mass, and shorten everything behind.

    The mass of a token is the attention it receives from real tokens, over all heads of one
    layer; padding receives none and goes first. The number of kept tokens is static, their order
    stays. From that attention's result on, every value with a token axis is gathered once, the
    mask too, so a mean over tokens that is weighted by the mask stays one over the tokens left.

    Refused, with the module as it is: a token-level output, an unweighted mean over the tokens,
    a constant for every token behind the cut (a table of positions), a batch above 1.

    Parameters
    ----------
    spec : TokenSpec

    Attributes
    ----------
    meta : dict
        JSON record, also merged into ``icd.transform_meta`` under ``kv``.

    Notes
    -----
    Goyal et al., "PoWER-BERT", 2020. :func:`icd_tvm.adapters.token_drop.drop_tokens` is the same
    choice on arrays.
    """

    def __init__(self, spec: TokenSpec) -> None:
        self.spec = spec
        self.meta: dict[str, Any] = {}

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return the module of the shorter sequence, with the metadata attached."""
        try:
            new = self._shortened(mod)
        except (IcdError, Refused) as error:
            why = error.line() if isinstance(error, IcdError) else str(error)
            self.meta = {"kind": "token_drop", "spec": str(self.spec), "skipped": True, "why": why}
            warnings.warn(f"kv {self.spec} skipped: {why}", RuntimeWarning, stacklevel=2)
            new = mod.clone()
        return with_transform_meta(new, {"kv": self.meta})

    def _shortened(self, mod: Any) -> Any:
        func = mod["main"]
        cut = _find_cut(func, self.spec.layer)
        shape = static_shape(cut.context) or ()
        if shape[0] != 1:
            raise TransformError(
                f"the batch is {shape[0]}: its sequences would keep different tokens",
                "compile for a batch of 1",
            )
        tokens = shape[_TOKENS]
        count = kept_count(tokens, self.spec.drop)
        if not self.spec.keep_first <= count < tokens:
            raise TransformError(
                f"{count} of {tokens} tokens would stay, {self.spec.keep_first} of them always",
                "drop more tokens, or keep fewer first ones",
            )
        live, tail, groups = _tail(mod, func, cut)
        group = groups.value_axes[cut.context][_TOKENS].group
        places = {var: _token_axis(groups, var, group) for var in live}
        _check_constants(groups, group)
        small = compact_groups(tail, groups, {group: np.arange(count)}, resizable=(_SOFTMAX,))
        new = mod.clone()
        new["main"] = _joined(func, cut, live, places, small["main"], count, self.spec.keep_first)
        self.meta = _meta(self.spec, tokens, count, cut, live, places)
        passes = (relax.transform.Normalize(), relax.transform.CanonicalizeBindings())
        return tvm.transform.Sequential([*passes, relax.transform.DeadCodeElimination()])(new)


def _find_cut(func: Any, layer: int) -> _Cut:
    if len(func.body.blocks) != 1:
        raise TransformError("the function is not one dataflow block")
    flow, bindings = Dataflow(func), list(func.body.blocks[0].bindings)
    found = [b.var for b in bindings if flow.call(b.var, _SOFTMAX) is not None]
    found = [var for var in found if _is_attention(var)]
    if layer >= len(found):
        raise ConfigError(
            f"layer {layer} is none of {len(found)} attentions over tokens", "count from 0"
        )
    softmax, _ = match_softmax(flow, found[layer])
    mask = match_scores(flow, softmax.args[0])[2]
    context = user_of(flow, found[layer], "relax.matmul", "the probabilities")
    place = next(i for i, binding in enumerate(bindings) if binding.var.same_as(context))
    return _Cut(found[layer], context, mask, bindings[: place + 1], bindings[place + 1 :])


def _is_attention(var: Any) -> bool:
    shape = static_shape(var) or ()
    return len(shape) == 4 and shape[2] == shape[3] > 1


def _tail(mod: Any, func: Any, cut: _Cut) -> tuple[list[Any], Any, AxisGroups]:
    """Return what lies behind the cut as a module, its inputs, and its axis groups."""
    made = {binding.var for binding in cut.behind}
    used = [var for b in cut.behind for var in relax.analysis.free_vars(b.value)]
    used += list(relax.analysis.free_vars(func.body.body))
    live = list(dict.fromkeys(var for var in used if var not in made))
    block = type(func.body.blocks[0])(cut.behind)
    body = relax.SeqExpr([block], func.body.body)
    # No input of the tail is one of the graph: their axes are free, those of the outputs are not.
    attrs = tvm.ir.make_node("ir.DictAttrs", global_symbol="main", num_input=0)
    tail = mod.clone()
    tail["main"] = relax.Function(live, body, func.ret_ty, func.is_pure, attrs)
    return live, tail, find_axis_groups(tail["main"])


def _token_axis(groups: AxisGroups, var: Any, group: str) -> int | None:
    """Return the axis of the tokens, or None if the variable has none."""
    axes = groups.value_axes.get(var, ())
    found = [i for i, axis in enumerate(axes) if group in axis.groups()]
    if len(found) > 1 or any(not axes[i].is_leaf for i in found):
        raise TransformError(
            f"{var.name!r} has tokens on several axes, or merged with others",
            "choose another layer",
        )
    return found[0] if found else None


def _check_constants(groups: AxisGroups, group: str) -> None:
    for use in groups.get(group).consts:
        name = use.name or "a constant"
        raise TransformError(
            f"{name} holds a value for every token (read at {use.node!r})",
            "drop behind a later layer",
        )


def _joined(
    func: Any,
    cut: _Cut,
    live: Sequence[Any],
    places: dict[Any, int | None],
    small: Any,
    count: int,
    first: int,
) -> Any:
    """Return the function: what was before, the choice, the gathers, the shorter rest."""
    bindings = list(cut.before)
    index = _choice(bindings, cut, count, first)
    builder = relax.BlockBuilder()
    for old, new in zip(live, small.params, strict=True):
        axis = places[old]
        value = old if axis is None else builder.normalize(relax.op.take(old, index, axis, "clip"))
        bindings.append(relax.VarBinding(new, value))
    block = type(func.body.blocks[0])([*bindings, *small.body.blocks[0].bindings])
    body = relax.SeqExpr([block], small.body.body)
    return relax.Function(func.params, body, small.ret_ty, func.is_pure, func.attrs, func.span)


def _choice(bindings: list[Any], cut: _Cut, count: int, first: int) -> Any:
    """Emit the places of the kept tokens, ascending: int64 [count]."""
    op, builder = relax.op, relax.BlockBuilder()
    tokens = (static_shape(cut.context) or ())[_TOKENS]

    def emit(value: Any, what: str) -> Any:
        value = builder.normalize(value)
        var = relax.DataflowVar(f"{cut.probabilities.name}_{what}", value.ty)
        bindings.append(relax.VarBinding(var, value))
        return var

    received = cut.probabilities
    if cut.mask is not None:
        # A token is real where nothing is added to its scores.
        real = emit(op.greater(cut.mask, relax.const(np.float32(-1))), "real")
        real = emit(op.astype(real, "float32"), "weight")
        received = emit(op.matmul(real, received), "seen")
    mass = emit(op.reshape(emit(op.sum(received, [0, 1, 2]), "total"), (tokens,)), "mass")
    always = np.where(np.arange(tokens) < first, _ALWAYS, np.float32(0)).astype(np.float32)
    mass = emit(op.add(mass, relax.const(always)), "ranked")
    best = emit(op.topk(mass, count, axis=0, ret_type="indices", dtype="int64"), "best")
    return emit(op.sort(best, axis=0), "kept")


def _meta(
    spec: TokenSpec, tokens: int, count: int, cut: _Cut, live: Sequence[Any], places: Any
) -> dict[str, Any]:
    gathered = [var for var in live if places[var] is not None]
    before = sum(_bytes(var) for var in gathered)
    return {
        "kind": "token_drop",
        "spec": str(spec),
        "rate": spec.drop,
        "tokens": {"before": tokens, "after": count, "dropped": tokens - count},
        "behind": str(cut.probabilities.name),
        "gathered": [str(var.name) for var in gathered],
        "bytes_before": before,
        "bytes_after": before // tokens * count,
        "loss": None,
        "loss_why": "which tokens go is decided on every input",
        "delta_layout": True,
        "skipped": False,
        "why": "later layers see a shorter dense sequence",
    }


def _bytes(var: Any) -> int:
    size = int(np.prod(static_shape(var) or (1,)))
    return size * np.dtype(str(var.ty.dtype)).itemsize
