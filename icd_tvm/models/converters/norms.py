"""Layer and RMS normalisation with an optional skip connection (com.microsoft)."""

from __future__ import annotations

from typing import Any

import numpy as np

from icd_tvm._tvm import relax
from icd_tvm.models.converters.node import Converter, OnnxNode, dtype_of, with_name

_EPSILON = 1e-5
_DATA, _SKIP, _GAMMA = range(3)


def skip_layer_normalization(node: OnnxNode) -> Any:
    """``layer_norm(input + skip + bias)``; the fourth output is that sum."""
    total = _skip_sum(node, bias=4)
    gamma = node.input(_GAMMA)
    zeros = with_name(np.zeros(node.shape(gamma), dtype_of(gamma)), f"{node.name}.beta")
    beta = node.input(3) if node.has(3) else zeros
    result = relax.op.nn.layer_norm(total, gamma, beta, axes=[-1], epsilon=_epsilon(node))
    return _with_sum(node, result, total)


def skip_simplified_layer_normalization(node: OnnxNode) -> Any:
    """``rms_norm(input + skip + bias)``; the fourth output is that sum."""
    total = _skip_sum(node, bias=3)
    result = relax.op.nn.rms_norm(total, node.input(_GAMMA), axes=[-1], epsilon=_epsilon(node))
    return _with_sum(node, result, total)


def simplified_layer_normalization(node: OnnxNode) -> Any:
    """``x / sqrt(mean(x^2) + epsilon) * scale`` over the axes from ``axis`` on."""
    if node.wants(1):
        raise node.refuse("its output inv_std_var is used")
    rank = len(node.shape(node.input(0)))
    axes = list(range(int(node.attr("axis", -1)) % rank, rank))
    return relax.op.nn.rms_norm(node.input(0), node.input(1), axes=axes, epsilon=_epsilon(node))


def _epsilon(node: OnnxNode) -> float:
    return float(node.attr("epsilon", _EPSILON))


def _skip_sum(node: OnnxNode, bias: int) -> Any:
    total = node.emit(relax.op.add(node.input(_DATA), node.input(_SKIP)))
    return node.emit(relax.op.add(total, node.input(bias))) if node.has(bias) else total


def _with_sum(node: OnnxNode, result: Any, total: Any) -> tuple[Any, None, None, Any]:
    if node.wants(1) or node.wants(2):
        raise node.refuse("its outputs mean and inv_std_var are for training only")
    return result, None, None, total


CONVERTERS: dict[tuple[str, str], Converter] = {
    ("com.microsoft", "SkipLayerNormalization"): skip_layer_normalization,
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): skip_simplified_layer_normalization,
    ("com.microsoft", "SimplifiedLayerNormalization"): simplified_layer_normalization,
    # Some exporters leave out the domain.
    ("", "SimplifiedLayerNormalization"): simplified_layer_normalization,
}
