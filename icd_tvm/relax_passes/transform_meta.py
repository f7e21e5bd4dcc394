"""The module attribute in which every transform says what it did."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

TRANSFORM_META = "icd.transform_meta"


def transform_meta(mod: Any) -> dict[str, Any]:
    """Return what the transforms of a module recorded: ``{"sparsity": ..., "quant": ...}``."""
    text = mod.attrs[TRANSFORM_META] if mod.attrs and TRANSFORM_META in mod.attrs else "{}"
    found: dict[str, Any] = json.loads(str(text))
    return found


def with_transform_meta(mod: Any, meta: Mapping[str, Any]) -> Any:
    """Return a module with a transform's record beside those of the transforms before it."""
    return mod.with_attr(TRANSFORM_META, json.dumps({**transform_meta(mod), **meta}))
