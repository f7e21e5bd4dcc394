"""Which parts of a function the CUDA kernels compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from icd_tvm._tvm import GenericConst, const_name, relax
from icd_tvm.errors import TransformError
from icd_tvm.relax_passes.axis_rules.trace import state_places
from icd_tvm.relax_passes.cache_append import CacheAppend, find_appends
from icd_tvm.relax_passes.cuda_attention import plan_attention
from icd_tvm.relax_passes.cuda_codes import with_codes
from icd_tvm.relax_passes.cuda_decode import plan_decode
from icd_tvm.relax_passes.cuda_int8_products import plan_codes, plan_int8_product
from icd_tvm.relax_passes.cuda_mamba import plan_conv, plan_scan
from icd_tvm.relax_passes.cuda_norms import plan_norm
from icd_tvm.relax_passes.cuda_plan import Planned
from icd_tvm.relax_passes.cuda_prefill import plan_prefill_conv, plan_prefill_scan
from icd_tvm.relax_passes.cuda_products import plan_product
from icd_tvm.relax_passes.cuda_shared import SharedValues
from icd_tvm.relax_passes.cuda_weight_only import plan_weight_only
from icd_tvm.relax_passes.held_product import held_product
from icd_tvm.relax_passes.int8_product import int8_product
from icd_tvm.relax_passes.relax_graph import Dataflow, static_shape

States = Sequence[tuple[str, str]]


@dataclass
class Found:
    """What was found in one function.

    Attributes
    ----------
    plans : dict of str to Planned
        By the name of the operator.
    refusals : dict of str to str
        Name of each operator that stays with TVM -> the reason.
    owned : dict of relax.Var to relax.Var
        New states that may be written where the old ones lie -> the old ones.
    """

    plans: dict[str, Planned] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    owned: dict[Any, Any] = field(default_factory=dict)

    def note(self, var: Any, found: Planned | str | None, label: str = "") -> None:
        """Keep a plan or a reason, under the name of the variable or another."""
        if isinstance(found, Planned):
            self.plans[label or str(var.name)] = found
        elif found is not None:
            self.refusals[label or str(var.name)] = found


def find_kernels(mod: Any, func: Any, states: States, dtype: str, arch: str) -> Found:
    """Return the kernels for a function.

    Parameters
    ----------
    mod : tvm.IRModule
        Holds the kernels that the function calls already.
    func : relax.Function
        Constants bound and folded.
    states : sequence of (str, str)
        Opaque states: (input, output).
    dtype, arch : str
        As for `SelectCudaKernels`.
    """
    flow, found = Dataflow(func), Found()
    appends = _appends(func, states)
    found.owned = _moved(flow, func, states)
    found.owned |= {append.result: append.past for append in appends.values()}
    _blocks(flow, found, appends, dtype, arch)
    made = {var for plan in found.plans.values() for var in plan.results}
    for var in list(flow.values):
        found.note(var, plan_codes(flow, var, made))
    for var in list(flow.values):
        found.note(var, plan_prefill_conv(flow, var, dtype))
        found.note(var, plan_prefill_scan(mod, flow, var, dtype, arch))
    wanted = {var for plan in found.plans.values() for var in plan.read() | set(plan.results)}
    for var in list(flow.values):
        coded = plan_int8_product(flow, var, wanted, arch)
        coded = coded or plan_weight_only(flow, var, wanted, dtype)
        product = coded or plan_product(flow, var, wanted, dtype, arch)
        found.note(var, product, _merged_weights(flow, var))
        if isinstance(product, Planned):
            wanted |= product.read() | set(product.results)
    for var in list(flow.values):
        found.note(var, plan_norm(flow, var, wanted))
    found.plans = with_codes(flow, found.plans)
    return found


def _blocks(
    flow: Dataflow, found: Found, appends: dict[Any, CacheAppend], dtype: str, arch: str
) -> None:
    """Find attentions and Mamba steps: what products must leave to them."""
    shared = SharedValues(flow)
    for var in list(flow.values):
        softmax = flow.bound(var, "relax.nn.softmax")
        if softmax is not None and (static_shape(softmax) or ())[-2:-1] == (1,):
            plans, reason = plan_decode(flow, var, appends, shared, dtype, arch)
            for plan in plans:
                found.note(plan.result, plan)
            if reason:
                found.refusals[str(var.name)] = reason
        elif softmax is not None:
            one = plan_attention(flow, var, shared, dtype)
            found.note(one.result if isinstance(one, Planned) else var, one)
        else:
            found.note(var, plan_conv(flow, var, dtype))
            found.note(var, plan_scan(flow, var, dtype))


def _merged_weights(flow: Dataflow, var: Any) -> str:
    """Return the names of the weights of a merged product, which has no name of its own."""
    matmul = flow.bound(var, "relax.matmul")
    codes = int8_product(flow.values.get(var)) or held_product(flow.values.get(var))
    constant = None if matmul is None else matmul.args[1]
    constant = constant if codes is None else codes.weight
    label = const_name(constant) if isinstance(constant, GenericConst) else ""
    return label if "+" in label else ""


def _appends(func: Any, states: States) -> dict[Any, CacheAppend]:
    """Return the appends to caches that may be written in place, by what they make."""
    try:
        found, _ = find_appends(func, states)
    except TransformError:
        # A module that shows more outputs, to capture activations, keeps its cache whole.
        return {}
    return {append.result: append for append in found.values()}


def _moved(flow: Dataflow, func: Any, states: States) -> dict[Any, Any]:
    """Return the new states whose old ones have one reader, with those."""
    params = {str(param.name): param for param in func.params}
    try:
        places = state_places(func, states)
    except TransformError:
        return {}
    returned = flow.resolve(func.body.body)
    outputs = list(returned.fields) if isinstance(returned, relax.Tuple) else [returned]
    found = {}
    for name, place in places:
        if flow.single_use(params[name]) and place < len(outputs):
            value = outputs[place]
            while isinstance(flow.values.get(value), relax.Var):
                value = flow.values[value]
            found[value] = params[name]
    return found
