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
    halves : pair of float64 arrays, shape [K, K], optional
        The Gram matrices of two disjoint parts of the tokens, which sum to ``gram``: what is
        fitted on one can be judged on the other.
    """

    energy: Float64
    gram: Float64 | None = None
    halves: tuple[Float64, Float64] | None = None

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
        total = output_energy(self.gram, before)
        if total <= 0:
            return 0.0
        return float(np.sqrt(max(output_energy(self.gram, delta), 0.0) / total))


def as_calibration(data: Array | Calibration | None, length: int) -> Calibration | None:
    """Read calibration data in any of its forms.

    Parameters
    ----------
    data : array or Calibration, optional
        Activations X, shape [tokens, K], whose first and last half of the rows become
        ``halves``; or the L2 norms of the columns of X, shape [K]; or the Gram matrix X.T @ X,
        shape [K, K] (recognised as square and symmetric), or those of two halves, [2, K, K].
    length : int
        K, the weight's number of rows.

    Returns
    -------
    Calibration or None

    Raises
    ------
    ShapeError
        A shape that fits none of them.
    NonFiniteError
        NaN or infinity inside.
    """
    if data is None or isinstance(data, Calibration):
        return data if data is None else _checked(data, length)
    array = np.asarray(data)
    halved = array.shape == (2, length, length)
    fits = array.ndim in (1, 2) and array.shape[-1] == length and array.shape[0] > 0
    if not (halved or fits):
        raise _shape_error(array, length)
    require_real(array, "calibration")
    require_finite(array, "calibration")
    values = array.astype(np.float64)
    if values.ndim == 1:
        return Calibration(values**2)
    if values.ndim == 2 and _is_gram(values):
        return Calibration(np.diagonal(values).copy(), values)
    first, second = values if halved else (x.T @ x for x in np.array_split(values, 2))
    gram = first + second
    return Calibration(np.diagonal(gram).copy(), gram, (first, second))


def _checked(data: Calibration, length: int) -> Calibration:
    if data.energy.shape != (length,):
        raise _shape_error(data.energy, length)
    require_finite(data.energy, "calibration")
    for gram in () if data.gram is None else (data.gram, *(data.halves or ())):
        if gram.shape != (length, length):
            raise _shape_error(gram, length)
        require_finite(gram, "calibration")
    return data


def _is_gram(values: Float64) -> bool:
    if values.shape[0] != values.shape[1] or float(np.diagonal(values).min()) < 0:
        return False
    # Sums in float32 are symmetric up to rounding only; activations are not symmetric at all.
    return float(np.linalg.norm(values - values.T)) <= 1e-3 * float(np.linalg.norm(values))


def output_energy(gram: Float64, weight: Float64) -> float:
    """Return ``||X W||_F ** 2`` of a weight [K, N] from ``X.T @ X``."""
    return float(np.sum(weight * (gram @ weight)))


def _shape_error(array: Array, length: int) -> ShapeError:
    return ShapeError(
        f"calibration has shape {list(array.shape)} for a weight with {length} rows",
        f"pass X [tokens, {length}], column norms [{length}], a Gram matrix [{length}, {length}] "
        "or those of two halves",
    )
