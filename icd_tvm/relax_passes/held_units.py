"""Which dead units a quantisation by the range at run time keeps alive, and why."""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

import numpy as np

from icd_tvm.relax_passes.attach_layout_tags import tagged_groups
from icd_tvm.relax_passes.axis_groups import AxisGroup
from icd_tvm.relax_passes.dead_units import dead_heads, dead_units
from icd_tvm.relax_passes.hidden_groups import hidden_groups

WHY = (
    "no reader uses them, but their activations are part of the range that the scale of the "
    "readers' input is read from at run time: zero the weights that make them, or give the readers "
    "static inputs"
)


def held_units(before: Any, after: Any, nodes: Set[str]) -> list[dict[str, Any]]:
    """Return the hidden units and heads that could be cut off before a quantisation only.

    Parameters
    ----------
    before, after : tvm.IRModule
        The same model with inputs in floating point, and with inputs that are quantised by their
        range at run time.
    nodes : set of str
        Bindings of the matmuls whose inputs are quantised so.

    Returns
    -------
    list of dict
        JSON records, one a group that holds any: ``group``, ``kind`` ("units" or "heads"),
        ``count``, ``readers`` (bindings among ``nodes``) and ``why``.
    """
    kept = {group.id: dead for group, _, dead in _dead(after)}
    records: list[dict[str, Any]] = []
    for group, kind, dead in _dead(before):
        readers = [use.node for use in group.weights if use.side == "K" and use.node in nodes]
        held = int((dead & ~kept.get(group.id, np.zeros_like(dead))).sum())
        if readers and held:
            record = {"group": group.id, "kind": kind, "count": held}
            records.append({**record, "readers": readers, "why": WHY})
    return records


def _dead(mod: Any) -> Iterator[tuple[AxisGroup, str, np.ndarray]]:
    func, groups = mod["main"], tagged_groups(mod)
    hidden = hidden_groups(func, groups)
    yield from ((group, "units", dead_units(func, group)) for group in hidden)
    others = (group for group in groups.free if group not in hidden)
    yield from ((group, "heads", dead_heads(func, group)) for group in others)
