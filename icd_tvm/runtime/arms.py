"""The arms of a comparison: one transformed function in several orders, and the dense one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from icd_tvm.relax_passes.axis_groups import find_axis_groups
from icd_tvm.relax_passes.permute_constants import permute_groups
from icd_tvm.relax_passes.rewrite_layout import RewriteLayout

DENSE, IDENTITY, RANDOM, LINEAR, ITERATIVE = "dense", "identity", "random", "linear", "iterative"


@dataclass
class Arm:
    """One module to compile and time.

    Attributes
    ----------
    name : str
        ``dense``, ``identity``, ``random``, ``linear`` or ``iterative``.
    mod : tvm.IRModule
        The Relax module before lowering.
    same_as : str
        Name of an earlier arm with the very same module, or empty. Both are still timed: two
        equal arms must come out equal.
    notes : dict
        What was done to the order.
    """

    name: str
    mod: Any
    same_as: str = ""
    notes: dict[str, Any] = field(default_factory=dict)


def make_arms(
    dense: Any,
    transformed: Any,
    before: Mapping[str, np.ndarray],
    after: Mapping[str, np.ndarray] | None,
    seed: int,
) -> list[Arm]:
    """Return the arms in reporting order.

    Parameters
    ----------
    dense : tvm.IRModule
        The model as imported.
    transformed : tvm.IRModule
        The model after the transform, order untouched.
    before : Mapping[str, numpy.ndarray]
        The permutations decided before the transform.
    after : Mapping[str, numpy.ndarray] or None
        The permutations decided after it; None leaves the iterative arm out.
    seed : int
        Seed of the random arm.
    """
    arms = [
        Arm(DENSE, dense),
        Arm(IDENTITY, transformed),
        Arm(RANDOM, _randomly_permuted(transformed, seed)),
        _ordered(LINEAR, transformed, before, compact=False),
    ]
    if after is not None:
        arms.append(_ordered(ITERATIVE, transformed, after, compact=True))
    return arms


def _ordered(name: str, mod: Any, perms: Mapping[str, np.ndarray], compact: bool) -> Arm:
    if not perms and not compact:
        return Arm(name, mod, same_as=IDENTITY)
    rewrite = RewriteLayout(perms, compact=compact)
    return Arm(name, rewrite(mod), notes={"removed_units": dict(rewrite.removed)})


def _randomly_permuted(mod: Any, seed: int) -> Any:
    groups = find_axis_groups(mod["main"])
    rng = np.random.default_rng(seed)
    perms = {group.id: rng.permutation(group.size) for group in groups.free}
    return permute_groups(mod, groups, perms)
