"""Which axes of a Relax function may be permuted, which are tied, and why the rest is pinned.

The coupling rules follow the dependency groups of structured pruning (Fang et al., DepGraph,
CVPR 2023); here an axis splits into factors and segments, so that a reshape to heads or a
fused projection keeps the freedom that is left.
"""

from __future__ import annotations

from collections.abc import Sequence

from icd_tvm._tvm import relax
from icd_tvm.relax_passes.axis_collect import collect_groups
from icd_tvm.relax_passes.axis_model import (
    AxisGroup,
    AxisGroups,
    ConstUse,
    Member,
    OpUse,
    ValueUse,
    WeightUse,
)
from icd_tvm.relax_passes.axis_rules.dims import Pin
from icd_tvm.relax_passes.axis_rules.trace import trace

__all__ = [
    "AxisGroup",
    "AxisGroups",
    "ConstUse",
    "Member",
    "OpUse",
    "Pin",
    "ValueUse",
    "WeightUse",
    "find_axis_groups",
]


def find_axis_groups(
    func: relax.Function,
    *,
    opaque_states: Sequence[tuple[str, str]] = (),
    keep_outputs: bool = True,
) -> AxisGroups:
    """Find every function-preserving index permutation of a Relax function.

    Constants are seen once per use, so two uses of one constant may be permuted differently.
    No constant is read except small index tensors.

    Parameters
    ----------
    func : relax.Function
        In A-normal form, as the ONNX importer makes it. Parameters beyond the attribute
        ``num_input`` count as weights.
    opaque_states : sequence of (input name, output name)
        States that only this function reads: their input and output axes are tied to each
        other instead of pinned. An output is named by its variable or by its number ("1").
    keep_outputs : bool
        False lets outputs be permuted; the caller then owns the inverse.

    Returns
    -------
    AxisGroups

    Raises
    ------
    TransformError
        If a state names no input or output, or changes its shape.
    """
    found = trace(func, opaque_states, keep_outputs)
    return collect_groups(found, tuple(opaque_states))
