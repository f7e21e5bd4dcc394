"""QuantizeAttention: the two products of every attention take quantised operands."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from icd_tvm._tvm import PyExprMutator, mutator, relax, tvm
from icd_tvm.errors import IcdError
from icd_tvm.relax_passes.attention_match import Refused, match_scores, match_softmax, user_of
from icd_tvm.relax_passes.collect_activation_stats import RIGHT
from icd_tvm.relax_passes.emit_quantized import bf16_activation, static_activation
from icd_tvm.relax_passes.quant_plan import static_scale
from icd_tvm.relax_passes.relax_graph import Dataflow, static_shape
from icd_tvm.tir_schedules.cpu.bf16_attention import HEAD_STEP
from icd_tvm.tir_schedules.cpu.int8_matmul import QUAD

# Probabilities lie in [0, 1]: no calibration is needed for their codes.
PROBABILITY = (1.0 / 255.0, 0)
# Scale and zero point, and the type of the codes; no scale stands for bfloat16.
_Code = tuple[tuple[float, int] | None, str]
_BF16: list[_Code] = [(None, "bfloat16"), (None, "bfloat16")]


@dataclass(frozen=True)
class AttentionProducts:
    """The two matmuls of one attention.

    Attributes
    ----------
    scores, values : relax.Var
        Bound to the product of queries and keys, and to that of probabilities and values.
    """

    scores: Any
    values: Any

    @property
    def requests(self) -> tuple[str, str, str]:
        """Names under which the statistics of queries, keys and values are asked for."""
        scores, values = str(self.scores.name), str(self.values.name)
        return scores, scores + RIGHT, values + RIGHT


@tvm.transform.module_pass(opt_level=0, name="QuantizeAttention")
class QuantizeAttention:
    """Send queries, keys, values and probabilities of every attention through bytes (QDQ).

    Queries and probabilities become uint8, keys and values int8 with zero point 0: what
    :func:`icd_tvm.tir_schedules.cpu.byte_attention.byte_attention` multiplies. By the method
    ``bf16`` all four are rounded to bfloat16 instead, without statistics.

    Parameters
    ----------
    statistics : Mapping[str, ActivationStatistics]
        By the names of :attr:`AttentionProducts.requests`.
    method : str
        How a range becomes a scale: ``minmax``, ``kld`` or ``mse``; or ``bf16``.

    Attributes
    ----------
    entries : list of dict
        For each attention ``{node, skipped, why, scales}``.
    """

    def __init__(self, statistics: Mapping[str, Any], method: str = "minmax") -> None:
        self.statistics = dict(statistics)
        self.method = method
        self.entries: list[dict[str, Any]] = []

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a clone of ``mod`` with the operands quantised and dequantised."""
        mod = mod.clone()
        bf16 = self.method == "bf16"
        products, refusals = attention_products(mod["main"], bf16=bf16)
        found: dict[Any, list[_Code]] = {}
        self.entries = [_entry(node, why=why) for node, why in refusals.items()]
        flow = Dataflow(mod["main"])
        for one in products:
            if bf16:
                found |= {flow.values[var]: _BF16 for var in (one.scores, one.values)}
                self.entries.append(_entry(str(one.scores.name)))
                continue
            try:
                scales = self._scales(one)
            except IcdError as error:
                warnings.warn(f"{one.scores.name}: {error}", RuntimeWarning, stacklevel=2)
                self.entries.append(_entry(str(one.scores.name), why=str(error)))
                continue
            query, key, value = scales
            found[flow.values[one.scores]] = [(query, "uint8"), (key, "int8")]
            found[flow.values[one.values]] = [(PROBABILITY, "uint8"), (value, "int8")]
            named = zip(("query", "key", "value"), scales, strict=True)
            self.entries.append(_entry(str(one.scores.name), scales=dict(named)))
        mod["main"] = _Quantiser(mod, found).visit_expr(mod["main"])
        return mod

    def _scales(self, one: AttentionProducts) -> list[tuple[float, int]]:
        return [
            static_scale(name, self.method, self.statistics.get(name), signed=index > 0)
            for index, name in enumerate(one.requests)
        ]


def attention_products(
    func: Any, *, bf16: bool = False
) -> tuple[list[AttentionProducts], dict[str, str]]:
    """Find the attentions of a function whose products can take narrow operands.

    Parameters
    ----------
    func : relax.Function
    bf16 : bool
        Whether the operands are bfloat16 instead of bytes.

    Returns
    -------
    products : list of AttentionProducts
    refusals : dict of str to str
        Name of each other softmax -> the reason.
    """
    flow = Dataflow(func)
    # The matcher resolves a product to its call; statistics go by the name it is bound to.
    names = {call: var for var, call in flow.values.items()}
    products, refusals = [], {}
    for var in list(flow.values):
        if flow.call(var, "relax.nn.softmax") is None:
            continue
        try:
            products.append(_products(flow, names, var, bf16))
        except Refused as refusal:
            refusals[str(var.name)] = str(refusal)
    return products, refusals


def _products(
    flow: Dataflow, names: dict[Any, Any], probabilities: Any, bf16: bool
) -> AttentionProducts:
    softmax, _ = match_softmax(flow, probabilities)
    product, _, _ = match_scores(flow, softmax.args[0])
    values = user_of(flow, probabilities, "relax.matmul", "the probabilities")
    heads = static_shape(product.args[0])
    if bf16 and heads is not None and heads[-2] == 1:
        raise Refused("one query: a decode step reads its cache as it is kept")
    if heads is None or heads[-1] % (HEAD_STEP if bf16 else QUAD):
        what = "byte products take columns in fours"
        if bf16:
            what = f"bfloat16 products take columns in runs of {HEAD_STEP}"
        raise Refused(f"heads of shape {heads}: {what}")
    if not flow.call(values, "relax.matmul").args[0].same_as(probabilities):
        raise Refused("the probabilities are not the left operand of the product")
    return AttentionProducts(names[product], values)


def _entry(node: str, *, why: str = "", scales: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"node": node, "skipped": bool(why), "why": why, "scales": scales or {}}


@mutator
class _Quantiser(PyExprMutator):
    """Replaces the operands of chosen matmuls."""

    def __init__(self, mod: Any, found: Mapping[Any, Any]) -> None:
        super().__init__(mod)
        self._found = found

    def visit_call_(self, call: Any) -> Any:
        found = self._found.get(call)
        if found is None:
            return super().visit_call_(call)
        operands = [
            self._coded(self.visit_expr(arg), *code)
            for arg, code in zip(call.args, found, strict=True)
        ]
        return relax.op.matmul(*operands)

    def _coded(self, data: Any, scale: tuple[float, int] | None, dtype: str) -> Any:
        if scale is None:
            return bf16_activation(self.builder_, data)
        return static_activation(self.builder_, data, scale, dtype)
