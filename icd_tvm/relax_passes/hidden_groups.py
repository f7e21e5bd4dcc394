"""Which axis groups are hidden units: made by matmuls, consumed by matmuls, elementwise between."""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import Call, Op

# Beside matmul, everything that treats each index of the axis alone.
_POINTWISE_PREFIXES = ("relax.nn.gelu", "relax.nn.relu", "relax.nn.silu", "relax.nn.leakyrelu")
_POINTWISE = {
    "relax.abs",
    "relax.add",
    "relax.astype",
    "relax.clip",
    "relax.divide",
    "relax.erf",
    "relax.exp",
    "relax.matmul",
    "relax.maximum",
    "relax.minimum",
    "relax.multiply",
    "relax.negative",
    "relax.power",
    "relax.sigmoid",
    "relax.sqrt",
    "relax.subtract",
    "relax.tanh",
}


def hidden_groups(func: Any, groups: Any) -> list[Any]:
    """Return the free groups whose indices are hidden units of an MLP.

    Such a unit may be removed: no normalisation or reduction mixes it with the others, and
    every constant it meets is a weight or a per-unit vector.
    """
    ops = _producing_ops(func)
    return [group for group in groups.free if _is_hidden(group, ops)]


def _is_hidden(group: Any, ops: dict[Any, str]) -> bool:
    sides = {use.side for use in group.weights}
    return (
        group.constraint == "free"
        and sides == {"K", "N"}
        and not group.counted
        and all(
            use.structure.is_leaf and _is_pointwise(ops.get(use.var, "")) for use in group.values
        )
    )


def _is_pointwise(op: str) -> bool:
    return op in _POINTWISE or op.startswith(_POINTWISE_PREFIXES)


def _producing_ops(func: Any) -> dict[Any, str]:
    return {
        binding.var: binding.value.op.name
        for block in func.body.blocks
        for binding in block.bindings
        if isinstance(binding.value, Call) and isinstance(binding.value.op, Op)
    }
