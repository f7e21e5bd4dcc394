"""Scales and zero points beside the data they belong to."""

from __future__ import annotations

from typing import Any

import numpy as np

from icd_tvm._tvm import relax
from icd_tvm.models.converters.node import OnnxNode


def along(node: OnnxNode, vector: Any, data: Any, axis: int | None) -> Any:
    """Return a scale or zero point so that it broadcasts along one axis of the data.

    Parameters
    ----------
    node : OnnxNode
    vector : relax.Expr
        One element, one for each index of the axis, or a shape that broadcasts already.
    data : relax.Expr
    axis : int or None
        None if only one element is allowed.
    """
    shape, rank = node.shape(vector), len(node.shape(data))
    count = int(np.prod(shape))
    if count == 1:
        return node.emit(relax.op.reshape(vector, ()))
    if axis is None:
        raise node.refuse(f"{count} scales or zero points where one is expected")
    if len(shape) > 1:
        return vector
    sizes = [count if i == axis % rank else 1 for i in range(rank)]
    return node.emit(relax.op.reshape(vector, sizes))
