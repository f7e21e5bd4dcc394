"""Modules with products of quantised operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax

from icd_tvm._tvm import apply_pass, named_const
from icd_tvm.adapters.quant import parse_quant
from icd_tvm.relax_passes.apply_quant import ApplyQuant
from icd_tvm.relax_passes.layer_rules import LayerRules, parse_layer_rules

op = relax.op
ROWS, K, N = 4, 32, 64
# Runs without optimisation: the code compiles in a quarter of the time.
PLAIN = tvm.target.Target({"kind": "llvm", "opt-level": 0})
Emit = Callable[..., Any]


def array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def module(
    body: Callable[[Emit, Any], Any], rows: int = ROWS, builder: relax.BlockBuilder | None = None
) -> tvm.IRModule:
    """Return ``main(x)`` with what ``body`` makes of it."""
    x = relax.Var("x", relax.TensorType((1, rows, K), "float32"))
    builder = builder or relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit_output(body(builder.emit, x))
        builder.emit_func_output(out)
    return builder.get()


def static(
    emit: Emit,
    x: Any,
    step: float = 0.02,
    point: int = 120,
    dtype: str = "uint8",
    seed: int = 0,
    scales: np.ndarray | None = None,
) -> Any:
    """Return x times a weight, both quantised by constant scales."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-127, 128, (int(x.ty.shape[-1]), N)).astype(np.int8)
    if scales is None:
        scales = (rng.random(N) / 500 + 0.001).astype(np.float32)
    by = named_const(np.float32(step), "x.scale"), named_const(np.asarray(point, dtype), "x.zero")
    codes = emit(op.quantize(x, *by, axis=1, out_dtype=dtype))
    weight = op.dequantize(
        named_const(values, "w"), named_const(scales, "w.scale"), relax.const(0, "int8"), axis=1
    )
    return emit(op.matmul(emit(op.dequantize(codes, *by, axis=1)), emit(weight)), "product")


def everything(text: str) -> LayerRules:
    """Return rules that quantise every weight alike, also small ones and the last."""
    return parse_layer_rules([f"*={text}"], parse_quant(text), parse_quant)


def with_codes(text: str, mod: tvm.IRModule) -> tvm.IRModule:
    """Return a module with its products quantised as a request says that needs no statistics."""
    return apply_pass(ApplyQuant(everything(text)), mod)
