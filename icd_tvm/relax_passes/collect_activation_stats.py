"""CollectActivationStats: make a module also return statistics of chosen matmul inputs.

Second moments are summed over every token of one call, so a caller adds them up over its
calibration batches. Where a graph of single tokens is wanted, a bounded sample of rows is
returned instead; and a distribution, which has no sum of fixed size, needs the input itself,
to be reduced outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from icd_tvm._tvm import Call, Op, relax, tvm
from icd_tvm.errors import ConfigError, TransformError

# Behind the name of a matmul: its right operand, which is no constant in an attention.
RIGHT = ":right"
Statistic = Literal["moment", "gram", "gram-halves", "rows", "activation", "activation+gram"]


@tvm.transform.module_pass(opt_level=0, name="CollectActivationStats")
class CollectActivationStats:
    """Append one output per requested matmul to ``main``.

    Parameters
    ----------
    requests : Mapping[str, Statistic]
        Name of a matmul binding -> ``"moment"`` (float32 [K], sum over tokens of x_k^2),
        ``"gram"`` or ``"gram-halves"`` (float32 [K, K], X^T X), ``"rows"`` (float32
        [min(M, row_cap), K], tokens of X), ``"activation"`` or ``"activation+gram"`` (float32
        [M, K], X itself) of its left operand X [M, K], or of its right one where the name ends
        in :data:`RIGHT`.
    row_cap : int
        The most rows of one ``"rows"`` output. Where there are more tokens, as many are drawn
        without replacement, the same ones in every call.
    seed : int
        Of that draw.

    Raises
    ------
    ConfigError
        If ``row_cap`` is below 1.
    TransformError
        If a requested binding is no matmul of ``main``.
    """

    def __init__(
        self, requests: Mapping[str, Statistic], *, row_cap: int = 1024, seed: int = 0
    ) -> None:
        if row_cap < 1:
            raise ConfigError(f"row_cap={row_cap} must be at least 1")
        self.requests = dict(requests)
        self.row_cap = row_cap
        self.seed = seed

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a clone whose ``main`` returns ``(output, statistic, ...)``."""
        mod = mod.clone()
        mod["main"] = self._with_statistics(mod["main"])
        return mod

    def _with_statistics(self, func: Any) -> Any:
        operands = _operands(func, self.requests)
        builder = relax.BlockBuilder()
        with builder.function("main", list(func.params), attrs=dict(func.attrs or {})):
            with builder.dataflow():
                for block in func.body.blocks:
                    for binding in block.bindings:
                        builder.emit_normalized(binding)
                results = [
                    builder.emit_output(
                        builder.normalize(self._statistic(builder, operands[node], kind))
                    )
                    for node, kind in self.requests.items()
                ]
            builder.emit_func_output(relax.Tuple([func.body.body, *results]))
        return builder.get()["main"]

    def _statistic(self, builder: Any, operand: Any, kind: Statistic) -> Any:
        *lead, width = (int(size) for size in operand.ty.shape.values)
        rows = builder.emit(relax.op.reshape(operand, (-1, width)))
        if kind == "rows":
            return self._sampled(builder, rows, int(np.prod(lead)))
        if kind.startswith("activation"):
            return rows
        if kind == "moment":
            return relax.op.sum(builder.emit(relax.op.multiply(rows, rows)), axis=0)
        return relax.op.matmul(builder.emit(relax.op.permute_dims(rows)), rows)

    def _sampled(self, builder: Any, rows: Any, count: int) -> Any:
        rows = builder.emit(relax.op.astype(rows, "float32"))
        if count <= self.row_cap:
            return relax.op.reshape(rows, rows.ty.shape)
        drawn = np.random.default_rng(self.seed).choice(count, self.row_cap, replace=False)
        return relax.op.take(rows, relax.const(np.sort(drawn)), axis=0, mode="clip")


def _operands(func: Any, requests: Mapping[str, Statistic]) -> dict[str, Any]:
    found = {}
    for block in func.body.blocks:
        for binding in block.bindings:
            if not _is_matmul(binding.value):
                continue
            for side, name in enumerate((binding.var.name, binding.var.name + RIGHT)):
                if name in requests:
                    found[name] = binding.value.args[side]
    missing = sorted(set(requests) - set(found))
    if missing:
        raise TransformError(f"cannot calibrate: no matmul named {missing[0]!r} in the module")
    return found


def _is_matmul(value: Any) -> bool:
    named = isinstance(value, Call) and isinstance(value.op, Op)
    return named and value.op.name == "relax.matmul"
