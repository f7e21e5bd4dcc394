"""AttachLayoutTags: write which axes are tied, which are free and why the rest is pinned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from icd_tvm._tvm import tvm
from icd_tvm.relax_passes.axis_groups import AxisGroups, find_axis_groups

LAYOUT_TAG = "icd.layout_tag"


@tvm.transform.module_pass(opt_level=0, name="AttachLayoutTags")
class AttachLayoutTags:
    """Attach the axis groups of ``main`` as the module attribute ``icd.layout_tag`` (JSON).

    Parameters
    ----------
    opaque_states : Sequence[tuple[str, str]], optional
        Pairs (input name, output name) that the same module feeds back to itself; those of an
        earlier tag if omitted.
    """

    def __init__(self, opaque_states: Sequence[tuple[str, str]] | None = None) -> None:
        self.opaque_states = None if opaque_states is None else tuple(opaque_states)

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a module with the attribute; the functions are unchanged."""
        states = opaque_states(mod) if self.opaque_states is None else self.opaque_states
        groups = find_axis_groups(mod["main"], opaque_states=states)
        return mod.with_attr(LAYOUT_TAG, json.dumps(groups.to_json()))


def opaque_states(mod: Any) -> list[tuple[str, str]]:
    """Return the states that the tag of ``mod`` declares; without a tag there are none."""
    if mod.attrs is None or LAYOUT_TAG not in mod.attrs:
        return []
    pairs = json.loads(str(mod.attrs[LAYOUT_TAG]))["opaque_states"]
    return [(source, target) for source, target in pairs]


def tagged_groups(mod: Any) -> AxisGroups:
    """Analyse ``main`` as it is now, with the states that its tag declares."""
    return find_axis_groups(mod["main"], opaque_states=opaque_states(mod))
