"""What quantisation wants to know of one layer's input: ranges, distribution, second moments."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from icd_tvm.adapters.arrays import Array, Float64, require_length
from icd_tvm.adapters.calibration import Calibration
from icd_tvm.adapters.quant_activations import Histogram, merge_histograms, observe
from icd_tvm.errors import ShapeError


@dataclass(frozen=True, eq=False)
class ActivationStatistics:
    """Statistics of the inputs of ``y = x @ W`` over calibration tokens.

    Parameters
    ----------
    low, high : float64 array, shape [K]
        Smallest and largest value of each channel.
    histogram : Histogram or None
        Distribution of all values; None where it is not known (after :meth:`divided`).
    moments : Calibration
        Sums of x_k ** 2 and, where asked for, ``X.T @ X``.
    """

    low: Float64
    high: Float64
    histogram: Histogram | None
    moments: Calibration

    @property
    def absmax(self) -> Float64:
        """Largest magnitude of each channel, shape [K]."""
        top: Float64 = np.maximum(-self.low, self.high)
        return top

    def merged(self, other: ActivationStatistics) -> ActivationStatistics:
        """Return the statistics of both sets of tokens together.

        Raises
        ------
        ShapeError
            Other channels.
        """
        require_length(other.low, self.low.size, "statistics")
        both = (self.histogram, other.histogram)
        return ActivationStatistics(
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
            None if both[0] is None or both[1] is None else merge_histograms(both[0], both[1]),
            merge_moments(self.moments, other.moments),
        )

    def divided(self, scales: Array) -> ActivationStatistics:
        """Return the statistics of ``x / scales``, without the histogram.

        Parameters
        ----------
        scales : array, shape [K], positive

        Raises
        ------
        ShapeError
            Another length.
        """
        require_length(np.asarray(scales), self.low.size, "scales")
        by = np.asarray(scales, dtype=np.float64)
        gram = self.moments.gram
        moments = Calibration(
            self.moments.energy / by**2, None if gram is None else gram / np.outer(by, by)
        )
        return ActivationStatistics(self.low / by, self.high / by, None, moments)


def activation_statistics(values: Array, *, gram: bool = False) -> ActivationStatistics:
    """Observe activations.

    Parameters
    ----------
    values : array, shape [..., K], real
    gram : bool
        Whether ``X.T @ X`` is wanted, which costs most of the time and memory.

    Returns
    -------
    ActivationStatistics

    Raises
    ------
    ShapeError
        A scalar, empty, or not real.
    NonFiniteError
        NaN or infinity inside.
    """
    array = np.asarray(values)
    if array.ndim < 1:
        raise ShapeError("activations have no channels", "pass an array [..., K]")
    histogram = observe(array)
    rows = array.reshape(-1, array.shape[-1]).astype(np.float64)
    moments = Calibration((rows**2).sum(axis=0), rows.T @ rows if gram else None)
    return ActivationStatistics(rows.min(axis=0), rows.max(axis=0), histogram, moments)


def merge_moments(first: Calibration, second: Calibration) -> Calibration:
    """Add second moments; the Gram matrix is known only where both are."""
    energy = first.energy + second.energy
    if first.gram is None or second.gram is None:
        return Calibration(energy)
    return Calibration(energy, first.gram + second.gram)
