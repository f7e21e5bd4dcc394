"""Scales and zero points: the range of values that the codes of a number format span."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from icd_tvm.adapters.arrays import Array, Float64
from icd_tvm.adapters.quant_spec import Dtype, Method

# Shares of the full range that ptq-mse and ptq-kld try; the widest comes first and wins ties.
FACTORS: Float64 = np.linspace(1.0, 0.4, 31)
# Histogram bins for ptq-kld.
BINS = 2048
# Probability given to what the quantised distribution cannot represent.
SMOOTH = 1e-4
TINY = float(np.finfo(np.float32).tiny)
_BF16_TOP = (2 - 2.0**-7) * 2.0**127


@dataclass(frozen=True)
class NumberFormat:
    """A format of codes.

    Parameters
    ----------
    bits : int
        Width of a packed code.
    low, high : float
        Range of the codes.
    storage : numpy dtype
        Dtype of the unpacked codes; int4 is kept in int8.
    """

    bits: int
    low: float
    high: float
    storage: np.dtype[Any]

    @property
    def is_float(self) -> bool:
        """Whether codes are floating point numbers."""
        return self.storage != np.int8

    @property
    def is_scaled(self) -> bool:
        """Whether codes are scaled; bf16 has the range of float32."""
        return self.bits < 16


def _float8(kind: Any, top: float) -> NumberFormat:
    return NumberFormat(8, -top, top, np.dtype(kind))


FORMATS: dict[Dtype, NumberFormat] = {
    "int8": NumberFormat(8, -128, 127, np.dtype(np.int8)),
    "int4": NumberFormat(4, -8, 7, np.dtype(np.int8)),
    "fp8_e4m3": _float8(ml_dtypes.float8_e4m3fn, 448.0),
    "fp8_e5m2": _float8(ml_dtypes.float8_e5m2, 57344.0),
    "bf16": NumberFormat(16, -_BF16_TOP, _BF16_TOP, np.dtype(ml_dtypes.bfloat16)),
}


def encode(values: Float64, scale: Array, zero: Array, form: NumberFormat) -> Array:
    """Round values to codes.

    Parameters
    ----------
    values : float64 array
    scale, zero : arrays that broadcast against ``values``
    form : NumberFormat

    Returns
    -------
    array, dtype ``form.storage``
        Saturated; ties go to the even code.
    """
    steps = values / scale.astype(np.float64)
    if form.is_float:
        # Saturated first: past the top a cast gives NaN (e4m3) or infinity (e5m2).
        return np.clip(steps, form.low, form.high).astype(np.float32).astype(form.storage)
    codes: Array = np.clip(np.rint(steps + zero), form.low, form.high).astype(np.int8)
    return codes


def decode(codes: Array, scale: Array, zero: Array) -> Float64:
    """Return the values that codes stand for, float64."""
    return np.asarray((codes.astype(np.float64) - zero) * scale.astype(np.float64))


def block_scales(
    block: Float64,
    form: NumberFormat,
    method: Method,
    symmetric: bool,
    energy: Float64 | None = None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int8]]:
    """Choose one scale and zero point for each column of a block.

    Parameters
    ----------
    block : float64 array, shape [R, C]
    form : NumberFormat
    method : {"ptq-minmax", "ptq-kld", "ptq-mse"}
        Full range; the share of it with the least Kullback-Leibler divergence of magnitudes,
        one share for the block because a single column has too few values for a histogram; or
        the share with the least squared error, one a column.
    symmetric : bool
        Whether the zero point is 0.
    energy : float64 array, shape [R], optional
        Weight of every row in the squared error.

    Returns
    -------
    scales : float32 array, shape [C]
        Positive; 1 for a column of zeros, and for a format that is not scaled.
    zero_points : int8 array, shape [C]

    Notes
    -----
    The divergence follows Migacz, "8-bit inference with TensorRT", 2017.
    """
    if not form.is_scaled:
        return np.ones(block.shape[1], np.float32), np.zeros(block.shape[1], np.int8)
    low, high = _range(block, symmetric)
    full = scales_of_range(low, high, form, symmetric)
    if method == "ptq-minmax" or not block.size:
        return full
    if method == "ptq-kld":
        clip = kl_factor(_magnitudes(block, low, high), levels(form))
        return scales_of_range(low * clip, high * clip, form, symmetric)
    weights = np.ones(len(block)) if energy is None else energy
    least = np.full(block.shape[1], np.inf)
    factor = np.ones(block.shape[1])
    for share in FACTORS:
        scale, zero = scales_of_range(low * share, high * share, form, symmetric)
        back = decode(encode(block, scale, zero, form), scale, zero)
        error = weights @ (back - block) ** 2
        factor = np.where(error < least, share, factor)
        least = np.minimum(error, least)
    return scales_of_range(low * factor, high * factor, form, symmetric)


def scales_of_range(
    low: Float64, high: Float64, form: NumberFormat, symmetric: bool
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int8]]:
    """Return the scales and zero points that span ``[low, high]``, with low <= 0 <= high."""
    if symmetric:
        scale = np.maximum(-low, high) / form.high
        return _usable(scale), np.zeros(scale.shape, np.int8)
    usable = _usable((high - low) / (form.high - form.low))
    zero = np.clip(np.rint(form.low - low / usable), form.low, form.high)
    return usable, zero.astype(np.int8)


def levels(form: NumberFormat) -> int:
    """Return the number of code magnitudes on one side of zero."""
    return int(form.high) + 1


def kl_factor(counts: Float64, steps: int) -> float:
    """Choose where to clip so that the quantised distribution diverges least.

    Parameters
    ----------
    counts : float64 array, shape [B]
        Histogram of magnitudes over the full range; B is far above ``steps``.
    steps : int
        Code magnitudes.

    Returns
    -------
    float
        Share of the range; the widest of those that are equally good.
    """
    found = [_divergence(counts, round(counts.size * float(f)), steps) for f in FACTORS]
    return float(FACTORS[int(np.argmin(found))])


def _range(block: Float64, symmetric: bool) -> tuple[Float64, Float64]:
    high = np.maximum(block.max(axis=0, initial=0.0), 0.0)
    low = np.minimum(block.min(axis=0, initial=0.0), 0.0)
    if not symmetric:
        return low, high
    top = np.maximum(-low, high)
    return -top, top


def _usable(scale: Float64) -> npt.NDArray[np.float32]:
    # Below the smallest normal number a scale loses its digits, and a zero scale divides by zero.
    safe = np.where(scale > 0, np.maximum(scale, TINY), 1.0)
    return safe.astype(np.float32)


def _magnitudes(block: Float64, low: Float64, high: Float64) -> Float64:
    """Histogram of magnitudes relative to the end of their column's range: [BINS]."""
    end = np.where(block < 0, -low, high)
    share = np.abs(block) / np.where(end > 0, end, 1.0)
    index = np.minimum((share * BINS).astype(np.int64), BINS - 1)
    return np.bincount(index.ravel(), minlength=BINS).astype(np.float64)


def _divergence(counts: Float64, kept: int, steps: int) -> float:
    inside = counts[:kept]
    clipped = inside.copy()
    clipped[-1] += counts[kept:].sum()
    edges = (np.arange(steps) * kept) // steps
    width = np.diff(np.append(edges, kept))
    filled = (inside > 0).astype(np.float64)
    count = np.maximum(np.add.reduceat(filled, edges), 1.0)
    spread = np.repeat(np.add.reduceat(inside, edges) / count, width) * filled
    seen = clipped > 0
    target = clipped[seen] / max(float(clipped.sum()), 1.0)
    model = spread[seen] / max(float(spread.sum()), 1.0)
    return float(np.sum(target * np.log(target / (model + SMOOTH))))
