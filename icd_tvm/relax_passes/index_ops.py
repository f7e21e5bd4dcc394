"""Ops that treat every index of an axis alone: what happens to one unit stays its own."""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import Call, Op, Var, relax
from icd_tvm.relax_passes.axis_rules.elementwise import BROADCAST, UNARY

# Zero in, zero out, at every index.
ZERO_TO_ZERO = frozenset(
    f"relax.{name}"
    for name in (
        *("abs", "astype", "erf", "negative", "round", "sin", "sqrt", "tan", "tanh"),
        *("nn.gelu", "nn.gelu_tanh", "nn.leakyrelu", "nn.relu", "nn.silu"),
        *("broadcast_to", "expand_dims", "flatten", "permute_dims", "repeat", "reshape"),
        *("split", "squeeze", "strided_slice", "sum"),
    )
)
ZERO_IF_BOTH = frozenset(
    {"relax.add", "relax.concat", "relax.maximum", "relax.minimum", "relax.subtract"}
)
_ELEMENTWISE = frozenset(
    f"relax.{name}" for name in (*UNARY, *BROADCAST, "dequantize", "nn.prelu", "quantize")
)
INDEXWISE = ZERO_TO_ZERO | ZERO_IF_BOTH | _ELEMENTWISE
SCAN_KERNEL = "selective_scan"


def op_name(value: Any) -> str:
    """Return the operator that a bound value calls; empty if it calls none."""
    return str(value.op.name) if isinstance(value, Call) and isinstance(value.op, Op) else ""


def operand_exprs(value: Any) -> list[Any]:
    """Return what a bound value reads, tuples flattened."""
    if isinstance(value, Call):
        return [leaf for arg in value.args for leaf in operand_exprs(arg)]
    if isinstance(value, relax.Tuple):
        return [leaf for field in value.fields for leaf in operand_exprs(field)]
    if isinstance(value, relax.TupleGetItem):
        return operand_exprs(value.tuple_value)
    return [value]


def is_scan(value: Any) -> bool:
    """Whether a bound value runs the selective scan kernel, which keeps channels apart."""
    if op_name(value) != "relax.call_tir":
        return False
    return str(value.args[0].name_hint).rstrip("0123456789_") == SCAN_KERNEL


def is_depthwise(value: Any) -> bool:
    """Whether a bound value is a convolution with one filter for every channel."""
    if not op_name(value).startswith("relax.nn.conv") or "transpose" in op_name(value):
        return False
    channels = value.args[0].ty.shape.values[str(value.attrs.data_layout).index("C")]
    return int(value.attrs.groups) == int(channels) == int(_filters(value))


def _filters(call: Any) -> Any:
    return call.args[1].ty.shape.values[str(call.attrs.kernel_layout).index("O")]


def is_indexwise(value: Any) -> bool:
    """Whether a bound value treats every index of its axes alone, contractions aside."""
    if isinstance(value, Var | relax.Tuple | relax.TupleGetItem):
        return True
    return op_name(value) in INDEXWISE or is_scan(value) or is_depthwise(value)
