"""Codes of int8 products, written by the kernels that make what they are of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from icd_tvm._tvm import relax
from icd_tvm.relax_passes.cuda_plan import Planned
from icd_tvm.relax_passes.relax_graph import Dataflow
from icd_tvm.tir_schedules.cuda.row_codes import RowCodes

_NORMS = ("layer_norm", "rms_norm")
# Each of their blocks makes parts of rows, whole.
_WHOLE = ("gemm", "attention")


def with_codes(flow: Dataflow, plans: Mapping[str, Planned]) -> dict[str, Planned]:
    """Return the plans with codes fused into norms, products and attentions.

    A norm holds whole rows: it writes their codes in any form, and its own result besides where
    something else reads that. A product or an attention, whose blocks hold parts of rows, writes
    codes of one step instead of its result.

    Parameters
    ----------
    flow : Dataflow
    plans : mapping of str to Planned
        By the name of the operator.
    """
    found = dict(plans)
    order = {var: i for i, var in enumerate(flow.values)}
    for name, plan in plans.items():
        if plan.codes is None:
            continue
        source = plan.operands["x"].value
        maker = next((n for n, other in found.items() if other.result.same_as(source)), None)
        fused = None if maker is None else _fused(flow, found[maker], plan, order)
        if maker is not None and fused is not None:
            found[maker] = fused
            del found[name]
    return found


def _fused(
    flow: Dataflow, maker: Planned, codes: Planned, order: Mapping[Any, int]
) -> Planned | None:
    """Return the plan that makes both, or None where it cannot."""
    value = flow.values[codes.result]
    call = value.tuple_value if isinstance(value, relax.TupleGetItem) else codes.result
    others = [user for user in flow.users[maker.result] if user is None or not user.same_as(call)]
    # What both are made for must come after both.
    late = all(user is None or order[user] > order[codes.result] for user in others)
    assert codes.codes is not None
    words, rule = (*maker.fused, "codes"), _with(maker.rule, codes.codes)
    if maker.kind in _NORMS and not maker.states and late:
        if not others:
            return replace(maker, result=codes.result, states=codes.states, rule=rule, fused=words)
        states = {**codes.states, "codes": codes.result}
        return replace(maker, states=states, rule=rule, fused=words, asked=True)
    plain = maker.kind in _WHOLE and "residual" not in maker.fused and not maker.states
    if plain and not others and codes.codes.step:
        return replace(maker, result=codes.result, rule=rule, fused=words, flexible=False)
    return None


def _with(rule: Any, codes: RowCodes) -> Any:
    """Return the rule of a family that can write codes, for those."""
    return partial(rule, codes=codes)
