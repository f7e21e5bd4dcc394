"""Second moments of a layer's input, and the output error they predict."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from icd_tvm.adapters.arrays import Array, Float64, require_finite, require_real
from icd_tvm.errors import ShapeError


@dataclass(frozen=True)
class Calibration:
    """Second moments of the inputs of ``y = x @ W``.

    Parameters
    ----------
    energy : float64 array, shape [K]
        Sum of x_k ** 2 over tokens.
    gram : float64 array, shape [K, K], optional
        ``X.T @ X``; absent when only column norms are known.
    """

    energy: Float64
    gram: Float64 | None = None

    def output_error(self, weight: Array, changed: Array) -> float | None:
        """Return ``||X (W' - W)||_F / ||X W||_F``, or None without a Gram matrix.

        Parameters
        ----------
        weight, changed : array, shape [K, N]
        """
        if self.gram is None:
            return None
        before = weight.astype(np.float64)
        delta = changed.astype(np.float64) - before
        total = _energy(self.gram, before)
        if total <= 0:
            return 0.0
        return float(np.sqrt(max(_energy(self.gram, delta), 0.0) / total))


def as_calibration(data: Array | Calibration | None, length: int) -> Calibration | None:
    """Read calibration data in any of its three forms.

    Parameters
    ----------
    data : array or Calibration, optional
        Activations X, shape [tokens, K]; or the L2 norms of the columns of X, shape [K]; or
        the Gram matrix X.T @ X, shape [K, K] (recognised as square and symmetric).
    length : int
        K, the weight's number of rows.

    Returns
    -------
    Calibration or None

    Raises
    ------
    ShapeError
        A shape that fits none of the three.
    NonFiniteError
        NaN or infinity inside.
    """
    if data is None or isinstance(data, Calibration):
        return data if data is None else _checked(data, length)
    array = np.asarray(data)
    if array.ndim not in (1, 2) or array.shape[-1] != length or array.shape[0] == 0:
        raise _shape_error(array, length)
    require_real(array, "calibration")
    require_finite(array, "calibration")
    values = array.astype(np.float64)
    if values.ndim == 1:
        return Calibration(values**2)
    if _is_gram(values):
        return Calibration(np.diagonal(values).copy(), values)
    gram = values.T @ values
    return Calibration(np.diagonal(gram).copy(), gram)


def _checked(data: Calibration, length: int) -> Calibration:
    if data.energy.shape != (length,):
        raise _shape_error(data.energy, length)
    require_finite(data.energy, "calibration")
    if data.gram is not None:
        if data.gram.shape != (length, length):
            raise _shape_error(data.gram, length)
        require_finite(data.gram, "calibration")
    return data


def _is_gram(values: Float64) -> bool:
    if values.shape[0] != values.shape[1] or float(np.diagonal(values).min()) < 0:
        return False
    # Sums in float32 are symmetric up to rounding only; activations are not symmetric at all.
    return float(np.linalg.norm(values - values.T)) <= 1e-3 * float(np.linalg.norm(values))


def _energy(gram: Float64, weight: Float64) -> float:
    return float(np.sum(weight * (gram @ weight)))


def _shape_error(array: Array, length: int) -> ShapeError:
    return ShapeError(
        f"calibration has shape {list(array.shape)} for a weight with {length} rows",
        f"pass X [tokens, {length}], column norms [{length}] or a Gram matrix [{length}, {length}]",
    )
