"""Single weights beside groups that share rows: the groups stay closed, the rest is a list."""

from __future__ import annotations

from typing import Any

import numpy as np

from icd_tvm.adapters.arrays import Array, Bool, Float64
from icd_tvm.adapters.sparsity_spec import SparsitySpec
from icd_tvm.errors import ConfigError

# Bytes of a row and a column number.
COORDINATES = 8


def check_strays(share: float, spec: SparsitySpec) -> None:
    """Raise ConfigError unless a type takes this share of strays."""
    if not 0.0 <= share < 1.0:
        raise ConfigError(f"strays = {share!r} is outside [0, 1)", "e.g. 0.002")
    if share and spec.kind != "vec":
        raise ConfigError(f"strays given for {spec}", "only vecV has groups that are closed")


def stray_values(weight: Array, saliency: Float64, kept: Bool, share: float) -> Array:
    """Return the most salient of the weights that are not kept.

    Parameters
    ----------
    weight : array, shape [K, N]
    saliency : float64 array, shape [K, N]
    kept : bool array, shape [K, N]
    share : float
        Of all elements, rounded; ties go to the first in row-major order.

    Returns
    -------
    array, shape [K, N], dtype of ``weight``
        Zero elsewhere.
    """
    out = np.zeros_like(weight)
    if not share:
        return out
    dropped = np.flatnonzero(~kept)
    best = np.argsort(-saliency.ravel()[dropped], kind="stable")[: round(share * weight.size)]
    out.ravel()[dropped[best]] = weight.ravel()[dropped[best]]
    return out


def as_coo(residual: Array) -> dict[str, Any]:
    """Return rows, columns and values of the non-zeros as JSON lists, in row-major order."""
    rows, columns = np.nonzero(residual)
    return {
        "rows": rows.tolist(),
        "columns": columns.tolist(),
        "values": residual[rows, columns].astype(np.float64).tolist(),
    }
