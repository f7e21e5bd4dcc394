"""Which axis groups are hidden units: made by matmuls, consumed by matmuls, apart in between."""

from __future__ import annotations

from collections import Counter
from typing import Any

from icd_tvm.relax_passes.axis_model import AxisGroup, AxisGroups
from icd_tvm.relax_passes.constant_values import ConstantValues
from icd_tvm.relax_passes.index_ops import is_indexwise, op_name


def hidden_groups(func: Any, groups: AxisGroups) -> list[AxisGroup]:
    """Return the free groups whose indices are hidden units: of an MLP, or channels of a scan.

    Such a unit may be removed: no normalisation or reduction mixes it with the others, and
    every constant it meets is a weight or has a part of its own for every unit.
    """
    values = ConstantValues(func)
    bound = {
        binding.var: getattr(binding, "value", None)
        for block in func.body.blocks
        for binding in block.bindings
    }
    return [group for group in groups.free if _is_hidden(group, bound, values)]


def _is_hidden(group: AxisGroup, bound: dict[Any, Any], values: ConstantValues) -> bool:
    uses = Counter(use.var for use in group.values if use.var not in values)
    return (
        group.constraint == "free"
        and {use.side for use in group.weights} == {"K", "N"}
        and not group.counted
        # A projection that makes other things beside (dt, B and C of a scan) has a width to keep.
        and all(use.structure.groups() == (group.id,) for use in group.weights if use.side == "N")
        # A parameter in a free group is an opaque state: each unit has a part of it.
        and all(var not in bound or _keeps_units_apart(bound[var]) for var in uses)
        and all(count == 1 for count in uses.values())
    )


def _keeps_units_apart(value: Any) -> bool:
    return op_name(value) == "relax.matmul" or is_indexwise(value)
