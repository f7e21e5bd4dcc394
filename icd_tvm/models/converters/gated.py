"""Activations that TVM's frontend lacks: Swish, SwiGLU and the Gelus of com.microsoft."""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import relax
from icd_tvm.models.converters.node import Converter, OnnxNode, scalar


def swish(node: OnnxNode) -> Any:
    """``x * sigmoid(alpha * x)``."""
    return _swish(node, node.input(0), float(node.attr("alpha", 1.0)))


def swiglu(node: OnnxNode) -> Any:
    """``swish(a) * b``."""
    gate = node.emit(_swish(node, node.input(0), float(node.attr("alpha", 1.0))))
    return relax.op.multiply(gate, node.input(1))


def quick_gelu(node: OnnxNode) -> Any:
    """``x * sigmoid(alpha * x)`` with an ``alpha`` of 1.702 by default."""
    return _swish(node, node.input(0), float(node.attr("alpha", 1.702)))


def bias_gelu(node: OnnxNode) -> Any:
    """``gelu(x + bias)``."""
    return relax.op.nn.gelu(node.emit(relax.op.add(node.input(0), node.input(1))))


def fast_gelu(node: OnnxNode) -> Any:
    """Gelu by tanh, of ``x + bias`` if there is a bias."""
    data = node.input(0)
    if node.has(1):
        data = node.emit(relax.op.add(data, node.input(1)))
    return relax.op.nn.gelu_tanh(data)


def _swish(node: OnnxNode, data: Any, alpha: float) -> Any:
    if alpha == 1.0:
        return relax.op.nn.silu(data)
    scaled = node.emit(relax.op.multiply(data, scalar(alpha, data)))
    return relax.op.multiply(data, node.emit(relax.op.sigmoid(scaled)))


CONVERTERS: dict[tuple[str, str], Converter] = {
    ("", "Swish"): swish,
    ("", "SwiGLU"): swiglu,
    ("com.microsoft", "QuickGelu"): quick_gelu,
    ("com.microsoft", "BiasGelu"): bias_gelu,
    ("com.microsoft", "FastGelu"): fast_gelu,
}
