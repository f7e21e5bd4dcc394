"""Checks that every adapter makes on the arrays it is given."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm.errors import NonFiniteError, ShapeError

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]
Index = npt.NDArray[np.integer[Any]]


def as_matrix(tensor: Array, name: str = "tensor") -> Array:
    """Return ``tensor`` as a non-empty finite real matrix, without copying.

    Parameters
    ----------
    tensor : array, shape [K, N], a real dtype
    name : str
        Name used in error texts.

    Raises
    ------
    ShapeError
        Not two-dimensional, empty, or not a real number type.
    NonFiniteError
        NaN or infinity inside.
    """
    matrix = np.asarray(tensor)
    if matrix.ndim != 2 or matrix.size == 0:
        raise ShapeError(
            f"{name} has shape {list(matrix.shape)}", "a weight is a non-empty matrix [K, N]"
        )
    require_real(matrix, name)
    require_finite(matrix, name)
    return matrix


def require_real(array: Array, name: str) -> None:
    """Raise ShapeError unless ``array`` has a real number type (bfloat16 and float8 included)."""
    if array.dtype.kind not in "fiu" and not _is_extension_float(array):
        raise ShapeError(f"{name} has dtype {array.dtype}", "pass real numbers")


def require_finite(array: Array, name: str) -> None:
    """Raise NonFiniteError when ``array`` holds NaN or infinity."""
    if array.dtype.kind in "iu":
        return
    finite = np.isfinite(array)
    if not finite.all():
        first = np.unravel_index(int(np.argmin(finite)), array.shape)
        where = [int(i) for i in first]
        raise NonFiniteError(
            f"{name} holds {int(finite.size - finite.sum())} NaN or infinite values, "
            f"the first at {where}",
            "check the model file",
        )


def require_length(array: Array, length: int, name: str) -> None:
    """Raise ShapeError unless the first dimension of ``array`` is ``length``."""
    if array.ndim == 0 or array.shape[0] != length:
        raise ShapeError(
            f"{name} has shape {list(array.shape)}, expected first dimension {length}",
            "pass it along the same axis as the weight",
        )


def _is_extension_float(array: Array) -> bool:
    # ml_dtypes register bfloat16 and float8 as kind "V" with a name of their own.
    return array.dtype.kind == "V" and "float" in array.dtype.name
