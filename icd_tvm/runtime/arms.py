"""The arms of a comparison: one transformed function in several orders, and the dense one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from icd_tvm._tvm import apply_pass
from icd_tvm.relax_passes.attach_layout_tags import tagged_groups
from icd_tvm.relax_passes.permute_constants import permute_groups
from icd_tvm.relax_passes.rewrite_layout import LANES, RewriteLayout

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
    removed : dict[str, int]
        Hidden units removed from each group.
    """

    name: str
    mod: Any
    same_as: str = ""
    removed: dict[str, int] = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        """Whether the module differs from the arm it was made from."""
        return not self.same_as


def ordered_arms(
    transformed: Any,
    before: Mapping[str, np.ndarray],
    after: Mapping[str, np.ndarray] | None,
    seed: int,
    lanes: int = LANES,
) -> dict[str, Arm]:
    """Return the transformed function in the random, linear and iterative orders.

    Parameters
    ----------
    transformed : tvm.IRModule
        The model after the transform, order untouched (the identity arm).
    before : Mapping[str, numpy.ndarray]
        The permutations decided before the transform.
    after : Mapping[str, numpy.ndarray] or None
        The permutations decided after it; None leaves the iterative arm out. ``before`` itself
        where the order was kept.
    seed : int
        Seed of the random arm.
    lanes : int
        Units that go together where the iterative arm is shortened, see `RewriteLayout`.
    """
    arms = [
        Arm(RANDOM, _randomly_permuted(transformed, seed)),
        linear_arm(transformed, before),
    ]
    if after is not None:
        arms.append(_ordered(ITERATIVE, transformed, after, compact=True, lanes=lanes))
        if after is before and arms[-1].changed and not arms[-1].removed:
            arms[-1] = Arm(ITERATIVE, arms[-2].mod, same_as=LINEAR)
    return {arm.name: arm for arm in arms}


def linear_arm(transformed: Any, before: Mapping[str, np.ndarray]) -> Arm:
    """Return the transformed function in the order decided before the transform."""
    return _ordered(LINEAR, transformed, before, compact=False)


def _ordered(
    name: str, mod: Any, perms: Mapping[str, np.ndarray], compact: bool, lanes: int = LANES
) -> Arm:
    rewrite = RewriteLayout(perms, compact=compact, lanes=lanes)
    ordered = apply_pass(rewrite, mod)
    if not perms and not rewrite.removed:
        return Arm(name, mod, same_as=IDENTITY)
    return Arm(name, ordered, removed=rewrite.removed)


def _randomly_permuted(mod: Any, seed: int) -> Any:
    groups = tagged_groups(mod)
    rng = np.random.default_rng(seed)
    perms = {group.id: rng.permutation(group.size) for group in groups.free}
    return permute_groups(mod, groups, perms)
