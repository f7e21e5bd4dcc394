"""What ApplyQuant does to each weight, decided on numpy arrays before any Relax is written."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from icd_tvm.adapters.activation_statistics import ActivationStatistics, merge_moments
from icd_tvm.adapters.calibration import Calibration
from icd_tvm.adapters.quant import (
    Histogram,
    QuantizedTensor,
    QuantSpec,
    activation_scale,
    quantize,
)
from icd_tvm.adapters.quant_scales import FORMATS
from icd_tvm.errors import IcdError, ShapeError, TransformError
from icd_tvm.relax_passes.collect_activation_stats import Statistic
from icd_tvm.relax_passes.layer_rules import LayerRules, as_rules
from icd_tvm.relax_passes.matmul_weights import MatmulWeight, matmul_weights

QuantRules = LayerRules[QuantSpec]
# From float64 [K] (moment), [K, K] (gram) or ActivationStatistics, by matmul binding.
Statistics = Mapping[str, Any]

SIMULATED = (
    "values are rounded to float8 and computed in float32: TVM's float8 code for the CPU is wrong "
    "for subnormals"
)
# From the zero point of int8 codes to that of uint8 codes.
_UNSIGNED = 128
_STATIC = ("minmax", "kld", "mse")


@dataclass(frozen=True, eq=False)
class QuantizedProduct:
    """What one matmul becomes.

    Parameters
    ----------
    node, name : str
        Binding of the matmul and ONNX name of its weight.
    spec : QuantSpec
    weight : QuantizedTensor
    scale : (float, int) or None
        Scale and uint8 zero point of a static input.
    """

    node: str
    name: str
    spec: QuantSpec
    weight: QuantizedTensor
    scale: tuple[float, int] | None

    @property
    def ends_in_another_op(self) -> bool:
        """Whether the matmul's own result is scaled, or salient rows are added to it."""
        return self.spec.activations == "dynamic" or self.weight.salient is not None


def weight_requests(mod: Any, spec: QuantSpec | QuantRules) -> dict[str, Statistic]:
    """Return the statistics that ``spec`` wants for the weights of ``mod``: the least that will do.

    Parameters
    ----------
    mod : tvm.IRModule
    spec : QuantSpec or LayerRules

    Returns
    -------
    dict of str to Statistic
        Matmul binding -> ``"activation"`` where its input is quantised by a static scale or
        scale moves out of it, ``"gram"`` for compensation, ``"activation+gram"`` for both,
        ``"moment"`` where the energy of the input weighs the rows. Matmuls that need none are
        absent.
    """
    rules = as_rules(spec)
    requests: dict[str, Statistic] = {}
    for weight in matmul_weights(mod["main"]):
        chosen = rules.choose(weight.layer).spec
        kind = _wanted(chosen) if chosen is not None and not weight.why_not else None
        if kind is not None:
            requests |= dict.fromkeys((node for node, _ in weight.uses), kind)
    return requests


def _wanted(spec: QuantSpec) -> Statistic | None:
    if spec.activations in _STATIC or spec.smooth:
        return "activation+gram" if spec.compensate else "activation"
    if spec.compensate:
        return "gram"
    if spec.act_order or spec.salient or spec.method == "ptq-mse":
        return "moment"
    return None


def plan_weight(
    weight: MatmulWeight, rules: QuantRules, statistics: Statistics
) -> tuple[dict[str, Any], dict[Any, QuantizedProduct]]:
    """Quantise one weight.

    Parameters
    ----------
    weight : MatmulWeight
    rules : LayerRules
    statistics : Mapping[str, Any]
        By matmul binding.

    Returns
    -------
    entry : dict
        JSON record: ``weight, node, shape, skipped, why`` and, where it was quantised, what
        :func:`icd_tvm.adapters.quant.apply_quant` says, ``activations`` and ``simulated``.
    products : dict of relax.Call to QuantizedProduct
        Empty where the weight stays.
    """
    choice = rules.choose(weight.layer)
    why = weight.why_not or choice.why
    if choice.spec is None or why or choice.spec.dtype == "none":
        return _entry(weight, skipped=True, why=why or "none was asked for"), {}
    try:
        return _quantised(weight, choice.spec, statistics)
    except IcdError as error:
        warnings.warn(
            f"{weight.layer.name or weight.layer.node} is not quantised: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return _entry(weight, skipped=True, why=str(error)), {}


def _quantised(
    weight: MatmulWeight, spec: QuantSpec, statistics: Statistics
) -> tuple[dict[str, Any], dict[Any, QuantizedProduct]]:
    data = _moments(weight, spec, statistics)
    tensor, meta = quantize(weight.array(), spec.weights_only, data)
    if meta["skipped"]:
        return _entry(weight, **meta), {}
    products, inputs = {}, {}
    for node, call in weight.uses:
        static = spec.activations in _STATIC
        scale = static_scale(node, spec.activations, statistics.get(node)) if static else None
        products[call] = QuantizedProduct(node, weight.layer.name, spec, tensor, scale)
        if scale is not None:
            inputs[node] = {"scale": scale[0], "zero_point": scale[1]}
    form = FORMATS[spec.dtype]
    kind = "static" if inputs else spec.activations if form.is_scaled else spec.dtype
    simulated = SIMULATED if form.is_float and form.is_scaled else ""
    entry = _entry(weight, **meta, simulated=simulated, activations={"kind": kind, **inputs})
    return {**entry, "spec": str(spec)}, products


def _entry(weight: MatmulWeight, **fields: Any) -> dict[str, Any]:
    layer = weight.layer
    return {"weight": layer.name, "node": layer.node, "shape": list(layer.shape), **fields}


def _moments(weight: MatmulWeight, spec: QuantSpec, statistics: Statistics) -> Calibration | None:
    """Add up second moments over all matmuls that read the weight."""
    total: Calibration | None = None
    for node, _ in weight.uses:
        if node not in statistics:
            if spec.compensate or spec.act_order:
                raise _missing(node, spec)
            return None
        found = _as_moments(statistics[node], weight.layer.shape[0], node)
        total = found if total is None else merge_moments(total, found)
    return total


def _as_moments(statistic: Any, length: int, node: str) -> Calibration:
    if isinstance(statistic, ActivationStatistics):
        moments = statistic.moments
    else:
        array = np.asarray(statistic, dtype=np.float64)
        whole = array.ndim == 2
        moments = Calibration(np.diagonal(array).copy(), array) if whole else Calibration(array)
    if moments.energy.shape != (length,):
        raise ShapeError(
            f"statistics of {node!r} have {moments.energy.size} channels for {length} rows",
            "calibrate the module that is quantised",
        )
    return moments


def static_scale(node: str, method: str, found: Any, *, signed: bool = False) -> tuple[float, int]:
    """Return scale and zero point of the codes of an operand whose range is known.

    Parameters
    ----------
    node : str
        Whose operand it is, for the error.
    method : str
        ``minmax``, ``kld`` or ``mse``.
    found : ActivationStatistics
        Anything else is an error.
    signed : bool
        int8 codes with zero point 0 instead of uint8 codes.

    Raises
    ------
    TransformError
        There are no statistics.
    """
    if not isinstance(found, ActivationStatistics):
        raise TransformError(
            f"a static scale needs statistics of the input of {node!r}",
            "calibrate what quant_requests asks for",
        )
    known = found.histogram
    if known is None:
        known = Histogram(float(found.low.min()), float(found.high.max()), 1.0, np.zeros(0))
    scale, zero = activation_scale(known, "int8", f"ptq-{method}", symmetric=signed)
    return scale, zero if signed else zero + _UNSIGNED


def _missing(node: str, spec: QuantSpec) -> TransformError:
    return TransformError(
        f"{spec} needs statistics of the input of {node!r}",
        "calibrate what quant_requests asks for",
    )
