"""The units of a group in the constants that hold them, wherever they lie on an axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icd_tvm.relax_passes.axis_model import AxisGroup, ConstUse, WeightUse

Array = NDArray[Any]


def unit_rows(use: WeightUse, group: AxisGroup) -> list[Array]:
    """Return the weight with one row a unit, once for every place that a unit has on the axis.

    Returns
    -------
    list of numpy.ndarray
        Each [units, other axis]; two for the halves of a fused projection.
    """
    rows = np.moveaxis(use.const.value.numpy(), use.axis, 0)
    return [rows[places] for places in use.positions(group.id).T]


def kept_places(use: ConstUse | WeightUse, group: AxisGroup, kept: NDArray[np.bool_]) -> Array:
    """Return bool [length of the axis]: False where a dropped unit lies."""
    places = np.ones(use.structure.size, dtype=np.bool_)
    places[use.positions(group.id)[~kept].ravel()] = False
    return places


def is_float(use: ConstUse | WeightUse) -> bool:
    """Whether a constant holds floats: neither codes of a quantised weight nor indices."""
    return "float" in str(use.const.ty.dtype.dtype)


def in_floats(groups: Sequence[AxisGroup]) -> list[AxisGroup]:
    """Return the groups none of whose weights is quantised."""
    return [group for group in groups if all(is_float(use) for use in group.weights)]
