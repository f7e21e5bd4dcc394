"""int8 codes of values that are known up to an error, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def expected_codes(y: Array, error: Array, step: Any, point: Any) -> tuple[Array, Array]:
    """Return the codes of values, and the error allowed of them.

    It is less than a code, except where the error lets a value be rounded either way.

    Parameters
    ----------
    y, error : float64 arrays of one shape
        Values, and how far off those may be that were coded.
    step, point : numbers, or arrays that broadcast against ``y``
        What a code is worth, and the code of 0.0.
    """
    value, doubt = y / step + point, error / step + 1e-4
    either = np.abs(value - np.floor(value) - 0.5) <= doubt
    return np.clip(np.rint(value), -128, 127), np.where(either, 1 + doubt, 0.01)


def expected_row_codes(
    y: Array, error: Array, step: float, point: float
) -> dict[str, tuple[Array, Array]]:
    """Return values and errors of ``codes``, and of ``row_scale`` and ``row_zero`` if there are.

    Parameters
    ----------
    y, error : float64 [rows, width]
        As for `expected_codes`.
    step, point : float
        A step of 0 asks for the range of each row.
    """
    if step:
        return {"codes": expected_codes(y, error, step, point)}
    low, high = np.minimum(y.min(1), 0), np.maximum(y.max(1), 0)
    steps = (high - low) / 255
    steps = np.where(steps == 0, 1, steps)
    points = np.clip(np.rint(-low / steps), 0, 255) - 128
    return {
        "row_scale": (steps, 1e-5 * steps + error.max(1) / 64),
        "row_zero": (points, np.full(len(y), 0.01)),
        "codes": expected_codes(y, error, steps[:, None], points[:, None]),
    }
