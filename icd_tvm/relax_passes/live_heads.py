"""Which attention heads of an axis group are read by anything."""

from __future__ import annotations

import numpy as np

from icd_tvm.relax_passes.axis_groups import AxisGroup
from icd_tvm.relax_passes.unit_weights import is_float


def live_heads(group: AxisGroup) -> np.ndarray:
    """Return the heads whose rows of the output projection are not all zero.

    Parameters
    ----------
    group : AxisGroup
        Any free group; one that is no head axis keeps everything.

    Returns
    -------
    numpy.ndarray
        Sorted int64 [live]; head 0 if none is live, so that the axis never becomes empty.
    """
    readers = [use for use in group.weights if use.side == "K"]
    whole = np.arange(group.size)
    if "heads" not in group.role or not readers or group.counted:
        return whole
    # The code of a quantised zero need not be zero.
    if not all(map(is_float, readers)):
        return whole
    live = np.zeros(group.size, dtype=np.bool_)
    for use in readers:
        used = use.const.value.numpy().any(axis=1 - use.axis)
        live |= used[use.positions(group.id)].any(axis=1)
    return np.flatnonzero(live) if live.any() else whole[:1]
