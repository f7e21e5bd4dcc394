"""AttachLayoutTags: write which axes are tied, which are free and why the rest is pinned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from icd_tvm._tvm import tvm
from icd_tvm.relax_passes.axis_groups import find_axis_groups

LAYOUT_TAG = "icd.layout_tag"


@tvm.transform.module_pass(opt_level=0, name="AttachLayoutTags")
class AttachLayoutTags:
    """Attach the axis groups of ``main`` as the module attribute ``icd.layout_tag`` (JSON).

    Parameters
    ----------
    opaque_states : Sequence[tuple[str, str]]
        Pairs (input name, output name) that the same module feeds back to itself.
    """

    def __init__(self, opaque_states: Sequence[tuple[str, str]] = ()) -> None:
        self.opaque_states = tuple(opaque_states)

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a module with the attribute; the functions are unchanged."""
        groups = find_axis_groups(mod["main"], opaque_states=self.opaque_states)
        return mod.with_attr(LAYOUT_TAG, json.dumps(groups.to_json()))
