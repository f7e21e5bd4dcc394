"""CollectActivationStats: make a module also return statistics of chosen matmul inputs.

Second moments are summed over every token of one call, so a caller adds them up over its
calibration batches. A distribution has no such sum of fixed size and range: for it the input
itself is returned, and reduced outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from icd_tvm._tvm import Call, relax, tvm
from icd_tvm.errors import TransformError

Statistic = Literal["moment", "gram", "activation", "activation+gram"]


@tvm.transform.module_pass(opt_level=0, name="CollectActivationStats")
class CollectActivationStats:
    """Append one output per requested matmul to ``main``.

    Parameters
    ----------
    requests : Mapping[str, Statistic]
        Name of a matmul binding -> ``"moment"`` (float32 [K], sum over tokens of x_k^2),
        ``"gram"`` (float32 [K, K], X^T X), ``"activation"`` or ``"activation+gram"`` (float32
        [tokens, K], X itself, to be reduced outside) of its left operand.

    Raises
    ------
    TransformError
        If a requested binding does not exist in ``main``.
    """

    def __init__(self, requests: Mapping[str, Statistic]) -> None:
        self.requests = dict(requests)

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a clone whose ``main`` returns ``(output, statistic, ...)``."""
        mod = mod.clone()
        mod["main"] = _with_statistics(mod["main"], self.requests)
        return mod


def _with_statistics(func: Any, requests: Mapping[str, Statistic]) -> Any:
    operands = _left_operands(func, requests)
    builder = relax.BlockBuilder()
    with builder.function("main", list(func.params), attrs=dict(func.attrs or {})):
        with builder.dataflow():
            for block in func.body.blocks:
                for binding in block.bindings:
                    builder.emit_normalized(binding)
            results = [
                builder.emit_output(builder.normalize(_statistic(builder, operands[node], kind)))
                for node, kind in requests.items()
            ]
        builder.emit_func_output(relax.Tuple([func.body.body, *results]))
    return builder.get()["main"]


def _left_operands(func: Any, requests: Mapping[str, Statistic]) -> dict[str, Any]:
    found = {
        binding.var.name: binding.value.args[0]
        for block in func.body.blocks
        for binding in block.bindings
        if binding.var.name in requests and isinstance(binding.value, Call)
    }
    missing = sorted(set(requests) - set(found))
    if missing:
        raise TransformError(f"cannot calibrate: no matmul named {missing[0]!r} in the module")
    return found


def _statistic(builder: Any, operand: Any, kind: Statistic) -> Any:
    width = int(operand.ty.shape.values[-1])
    rows = builder.emit(relax.op.reshape(operand, (-1, width)))
    if kind.startswith("activation"):
        return rows
    if kind == "moment":
        return relax.op.sum(builder.emit(relax.op.multiply(rows, rows)), axis=0)
    return relax.op.matmul(builder.emit(relax.op.permute_dims(rows)), rows)
