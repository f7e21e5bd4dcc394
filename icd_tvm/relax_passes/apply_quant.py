"""ApplyQuant: the Q transform on the matmul weights of a module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from icd_tvm._tvm import PyExprMutator, apply_pass, mutator, relax, tvm
from icd_tvm.adapters.activation_statistics import ActivationStatistics
from icd_tvm.adapters.quant import QuantSpec, parse_quant
from icd_tvm.errors import TransformError
from icd_tvm.relax_passes.collect_activation_stats import Statistic
from icd_tvm.relax_passes.emit_quantized import (
    bf16_activation,
    dequantized,
    dynamic_activation,
    emit_as,
    integer_product,
    salient_product,
    static_activation,
)
from icd_tvm.relax_passes.held_units import held_units
from icd_tvm.relax_passes.layer_rules import Layer, LayerRules, as_rules
from icd_tvm.relax_passes.matmul_weights import embedding_layers, matmul_weights
from icd_tvm.relax_passes.migrate_scales import MigrateScales
from icd_tvm.relax_passes.quant_plan import (
    QuantizedProduct,
    QuantRules,
    Statistics,
    plan_weight,
    weight_requests,
)
from icd_tvm.relax_passes.quantize_attention import QuantizeAttention, attention_products
from icd_tvm.relax_passes.transform_meta import with_transform_meta

__all__ = ["ApplyQuant", "QuantRules", "parse_quant", "quant_requests"]

_TABLE = "a table read by index: only weights of matmuls are quantised"


def quant_requests(mod: Any, spec: QuantSpec | QuantRules) -> dict[str, Statistic]:
    """Return the statistics that ``spec`` wants of ``mod``: of its weights and its attentions.

    Parameters
    ----------
    mod : tvm.IRModule
    spec : QuantSpec or LayerRules

    Returns
    -------
    dict of str to Statistic
        As :func:`icd_tvm.relax_passes.quant_plan.weight_requests`; where the request for all
        layers quantises attentions also ``"activation"`` of both operands of their products.
    """
    rules = as_rules(spec)
    requests = weight_requests(mod, rules)
    if rules.default.attention and rules.default.dtype != "bf16":
        for one in attention_products(mod["main"])[0]:
            requests |= dict.fromkeys(one.requests, "activation")
    return requests


@tvm.transform.module_pass(opt_level=0, name="ApplyQuant")
class ApplyQuant:
    """Quantise the constant weights of matmuls; their inputs and attentions where asked.

    The result is standard QDQ, as the ONNX importer makes it of a model that arrives quantised
    (:mod:`icd_tvm.relax_passes.emit_quantized`). The order of every axis stays as it is; groups
    that lie scattered say so in the metadata. Weights of convolutions are not looked at.

    Parameters
    ----------
    spec : QuantSpec or LayerRules
        One request for all weights that are not left out by default (tables read by index, the
        last product before an output, small weights), or rules.
    statistics : Mapping[str, Any], optional
        Matmul binding -> what :func:`quant_requests` asked for: float64 [K] (moment), [K, K]
        (gram), or ActivationStatistics.
    seed : int
        Recorded; nothing here is drawn at random.

    Attributes
    ----------
    meta : dict
        ``{"quant": {spec, rules, seed, delta_layout, bytes_before, bytes_after, quantised,
        unmatched_rules, held, entries, attention}}``, also added to ``icd.transform_meta``. There
        is one entry for every weight, and for every attention where those were asked for, with
        the reason where it was left as it is. ``delta_layout`` says that a layout decided before
        holds no longer: elements changed their size, or groups lie scattered (their order stands
        in the entry). ``held`` counts units that are dead but stay, as a dynamic scale is read
        from them too (:func:`icd_tvm.relax_passes.held_units.held_units`).

    Raises
    ------
    TransformError
        ``spec`` is neither a request nor rules.

    Notes
    -----
    A weight that cannot be quantised stays as it was, with a warning and the reason; the others
    go on.
    """

    def __init__(
        self, spec: QuantSpec | QuantRules, statistics: Statistics | None = None, *, seed: int = 0
    ) -> None:
        if not isinstance(spec, QuantSpec | LayerRules):
            raise TransformError(
                f"ApplyQuant got {spec!r} of type {type(spec).__name__}",
                "pass parse_quant(text) or rules",
            )
        self.rules = as_rules(spec)
        self.statistics: dict[str, Any] = dict(statistics or {})
        self.seed = seed
        self.meta: dict[str, Any] = {}

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a module with quantised weights and the metadata attached."""
        layers = [weight.layer for weight in matmul_weights(mod["main"])]
        tables = embedding_layers(mod["main"])
        smoothing = self._smoothing(mod)
        smoothed = apply_pass(smoothing, mod) if smoothing.alphas else mod.clone()
        statistics = _divided(self.statistics, smoothing)
        entries: list[dict[str, Any]] = []
        products: dict[Any, QuantizedProduct] = {}
        for weight in matmul_weights(smoothed["main"]):
            entry, made = plan_weight(weight, self.rules, statistics)
            entries.append(entry | _smooth_record(smoothing, weight.layer.node))
            products |= made
        entries += [self._table(layer) for layer in tables]
        self.meta = {"quant": self._record(entries, self.rules.unmatched([*layers, *tables]))}
        if products:
            floats = smoothed.clone()
            smoothed["main"] = _Quantiser(smoothed, products).visit_expr(smoothed["main"])
            self.meta["quant"]["held"] = _held(floats, smoothed, products.values())
        spec = self.rules.default
        if spec.attention:
            method = "bf16" if spec.dtype == "bf16" else spec.activations
            attention = QuantizeAttention(self.statistics, method)
            smoothed = apply_pass(attention, smoothed)
            self.meta["quant"]["attention"] = attention.entries
        return with_transform_meta(smoothed, self.meta)

    def _smoothing(self, mod: Any) -> Any:
        """Return the migration that the rules ask for; without statistics there is none."""
        alphas: dict[str, float] = {}
        for weight in matmul_weights(mod["main"]):
            spec = self.rules.choose(weight.layer).spec
            if spec is not None and spec.smooth and not weight.why_not:
                alphas |= dict.fromkeys((node for node, _ in weight.uses), spec.smooth)
        known = {
            node: found
            for node, found in self.statistics.items()
            if isinstance(found, ActivationStatistics)
        }
        return MigrateScales(alphas, known, insert=True)

    def _table(self, layer: Layer) -> dict[str, Any]:
        why = self.rules.choose(layer).why or _TABLE
        entry = {"weight": layer.name, "node": layer.node, "shape": list(layer.shape)}
        return {**entry, "skipped": True, "why": why}

    def _record(self, entries: list[dict[str, Any]], unmatched: list[str]) -> dict[str, Any]:
        done = [entry for entry in entries if not entry["skipped"]]
        rules = {rule.pattern: str(rule.spec or "none") for rule in self.rules.rules}
        return {
            "spec": str(self.rules.default),
            "rules": rules,
            "unmatched_rules": unmatched,
            "seed": self.seed,
            "quantised": len(done),
            "bytes_before": sum(entry["bytes_before"] for entry in done),
            "bytes_after": sum(entry["bytes_after"] for entry in done),
            "delta_layout": any(e["delta_layout"] or e["delta_packing"] for e in done),
            "held": [],
            "entries": entries,
        }


def _held(before: Any, after: Any, products: Iterable[QuantizedProduct]) -> list[dict[str, Any]]:
    nodes = {product.node for product in products if product.spec.activations == "dynamic"}
    return held_units(before, after, nodes) if nodes else []


def _divided(statistics: dict[str, Any], smoothing: Any) -> dict[str, Any]:
    """Return the statistics of inputs that were divided by scales."""
    moved = {
        node: statistics[node].divided(scales)
        for node, scales in smoothing.scales.items()
        if isinstance(statistics.get(node), ActivationStatistics)
    }
    return {**statistics, **moved}


def _smooth_record(smoothing: Any, node: str) -> dict[str, Any]:
    """Say where the range of an input went: to the norm before, or to a product at run time."""
    if node not in smoothing.alphas:
        return {}
    why = smoothing.refusals.get(node, "")
    place = ("norm" if not why else "run time") if node in smoothing.scales else "nowhere"
    return {"smooth": {"divided": place, "why": why}}


@mutator
class _Quantiser(PyExprMutator):
    """Replaces matmuls; an input that several of them read is quantised once."""

    def __init__(self, mod: Any, products: dict[Any, QuantizedProduct]) -> None:
        super().__init__(mod)
        self._products = products
        self._static: dict[Any, Any] = {}
        self._dynamic: dict[Any, Any] = {}
        self._bf16: dict[Any, Any] = {}

    def visit_var_binding_(self, binding: Any) -> None:
        """Leave the name to the matmul: an order decided before finds its axes by it."""
        product = self._products.get(binding.value)
        if product is None or not product.ends_in_another_op:
            super().visit_var_binding_(binding)
            return
        builder, name = self.builder_, f"{binding.var.name}_float"
        value = self.visit_expr(binding.value)
        is_output = builder.current_block_is_dataflow() and not isinstance(
            binding.var, relax.DataflowVar
        )
        emit = builder.emit_output if is_output else builder.emit
        self.set_var_remap(binding.var, emit(value, name))

    def visit_call_(self, call: Any) -> Any:
        product = self._products.get(call)
        if product is None:
            return super().visit_call_(call)
        data = self.visit_expr(call.args[0])
        label = product.name or product.node
        if product.spec.activations == "dynamic":
            return integer_product(
                self.builder_, self._codes(data), product.weight, label, product.node
            )
        return self._floats(data, product, label)

    def _codes(self, data: Any) -> Any:
        if data not in self._dynamic:
            self._dynamic[data] = dynamic_activation(self.builder_, data)
        return self._dynamic[data]

    def _floats(self, data: Any, product: QuantizedProduct, label: str) -> Any:
        weight, builder = product.weight, self.builder_
        grouped = product.spec.granularity == "group"
        matrix = dequantized(builder, weight, label, grouped)
        if product.spec.dtype == "bf16":
            return relax.op.matmul(self._rounded(data), matrix)
        matrix = builder.emit(matrix, f"{product.node}_weight")
        result = relax.op.matmul(self._restored(data, product.scale), matrix)
        if weight.salient is None or weight.salient_values is None:
            return result
        total = emit_as(builder, result, product.node)
        rest = salient_product(
            builder, data, weight.salient, weight.salient_values, label, product.node
        )
        return relax.op.add(total, rest)

    def _rounded(self, data: Any) -> Any:
        if data not in self._bf16:
            self._bf16[data] = bf16_activation(self.builder_, data)
        return self._bf16[data]

    def _restored(self, data: Any, scale: tuple[float, int] | None) -> Any:
        if scale is None:
            return data
        key = (data, scale)
        if key not in self._static:
            self._static[key] = static_activation(self.builder_, data, scale)
        return self._static[key]
