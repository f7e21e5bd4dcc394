"""Static activation scales from calibration, and the migration of scale into weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from icd_tvm.adapters.arrays import (
    Array,
    Float64,
    as_matrix,
    require_finite,
    require_length,
    require_real,
)
from icd_tvm.adapters.quant_scales import (
    FACTORS,
    FORMATS,
    decode,
    encode,
    kl_factor,
    levels,
    scales_of_range,
)
from icd_tvm.adapters.quant_spec import QuantSpec, checked, parse_quant
from icd_tvm.errors import ConfigError, ShapeError

# Bins on each side of zero.
HALF = 2048


@dataclass(frozen=True, eq=False)
class Histogram:
    """Distribution of one activation tensor over calibration.

    Parameters
    ----------
    low, high : float
        Smallest and largest value seen.
    limit : float
        The bins span [-limit, limit]; a power of two, so that histograms of different batches
        merge exactly and the order of the batches does not matter.
    counts : float64 array, shape [2 * HALF]
    """

    low: float
    high: float
    limit: float
    counts: Float64


def observe(values: Array, seen: Histogram | None = None) -> Histogram:
    """Add activations to a histogram.

    Parameters
    ----------
    values : array of any shape, real, not empty
    seen : Histogram, optional
        What was observed before.

    Returns
    -------
    Histogram

    Raises
    ------
    ShapeError
        Empty, or not real numbers.
    NonFiniteError
        NaN or infinity inside.
    """
    array = np.asarray(values)
    require_real(array, "activations")
    if array.size == 0:
        raise ShapeError(f"activations have shape {list(array.shape)}", "pass at least one value")
    require_finite(array, "activations")
    flat = array.astype(np.float64).ravel()
    low, high = float(flat.min()), float(flat.max())
    limit = _power_above(max(-low, high))
    counts, _ = np.histogram(flat, bins=2 * HALF, range=(-limit, limit))
    found = Histogram(low, high, limit, counts.astype(np.float64))
    return found if seen is None else merge_histograms(seen, found)


def merge_histograms(first: Histogram, second: Histogram) -> Histogram:
    """Return the histogram of what two of them saw, in any order and exactly."""
    limit = max(first.limit, second.limit)
    counts = _widened(first.counts, first.limit, limit)
    counts = counts + _widened(second.counts, second.limit, limit)
    return Histogram(min(first.low, second.low), max(first.high, second.high), limit, counts)


def activation_scale(
    histogram: Histogram,
    dtype: str = "int8",
    method: str = "ptq-minmax",
    *,
    symmetric: bool = True,
) -> tuple[float, int]:
    """Choose the static scale and zero point of an activation tensor.

    Parameters
    ----------
    histogram : Histogram
        From :func:`observe`.
    dtype : {"int8", "int4", "fp8_e4m3", "fp8_e5m2"}
    method : {"ptq-minmax", "ptq-kld", "ptq-mse"}
    symmetric : bool
        Whether the zero point is 0.

    Returns
    -------
    scale : float
        Positive.
    zero_point : int
        Code of 0.0; codes are signed.

    Raises
    ------
    ConfigError
        Unknown dtype or method, or a combination that does not exist.
    """
    spec = _activation_spec(dtype, method, symmetric)
    form = FORMATS[spec.dtype]
    low, high = np.array([min(histogram.low, 0.0)]), np.array([max(histogram.high, 0.0)])
    if symmetric:
        high = np.maximum(-low, high)
        low = -high
    factor = np.ones(1)
    if spec.method == "ptq-kld":
        factor *= kl_factor(_side_counts(histogram, low, high), levels(form))
    elif spec.method == "ptq-mse":
        factor = _least_error(histogram, low, high, spec)
    scale, zero = scales_of_range(low * factor, high * factor, form, symmetric)
    return float(scale[0]), int(zero[0])


def migrate_scales(
    activation_absmax: Array, weights: Array | Sequence[Array], alpha: float = 0.5
) -> npt.NDArray[np.float32]:
    """Balance the ranges of a layer's input and of the weights that read it.

    ``x / s`` and ``s[:, None] * W`` give the same product; 1 / s is folded into the scale and
    bias of the norm before (:func:`fold_scales`).

    Parameters
    ----------
    activation_absmax : array, shape [K]
        Largest magnitude of each input channel over calibration.
    weights : array, shape [K, N], or sequence of them
        All weights that read the input.
    alpha : float
        Share of the range that moves into the weights, in [0, 1].

    Returns
    -------
    float32 array, shape [K]
        ``absmax ** alpha / rowmax ** (1 - alpha)``; 1 for channels that are zero on either side.

    Raises
    ------
    ConfigError
        ``alpha`` outside [0, 1].
    ShapeError
        Lengths that differ, a negative magnitude, or no weight.
    NonFiniteError
        NaN or infinity inside.

    Notes
    -----
    Xiao et al., "SmoothQuant", 2022.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ConfigError(f"alpha = {alpha!r} is outside [0, 1]", "0.5 is the usual balance")
    top = np.asarray(activation_absmax)
    if top.ndim != 1 or top.size == 0:
        raise ShapeError(f"activation_absmax has shape {list(top.shape)}", "pass one a channel")
    require_real(top, "activation_absmax")
    require_finite(top, "activation_absmax")
    if float(top.min()) < 0:
        raise ShapeError("activation_absmax is negative", "pass magnitudes")
    rows = _row_absmax(weights, top.size)
    live = (top > 0) & (rows > 0)
    x, w = np.where(live, top, 1.0).astype(np.float64), np.where(live, rows, 1.0)
    scales: npt.NDArray[np.float32] = (x**alpha / w ** (1 - alpha)).astype(np.float32)
    return scales


def fold_scales(
    scales: Array, norm_scale: Array, norm_bias: Array, weights: Sequence[Array]
) -> tuple[Array, Array, list[Array]]:
    """Fold migrated scales into the norm before and the weights after.

    Parameters
    ----------
    scales : array, shape [K]
        From :func:`migrate_scales`.
    norm_scale, norm_bias : arrays, shape [K]
        Affine part of the norm that makes the layer's input.
    weights : sequence of arrays, shape [K, N]

    Returns
    -------
    norm_scale, norm_bias : arrays, shape [K]
        Divided by ``scales``.
    weights : list of arrays, shape [K, N]
        Rows multiplied by ``scales``.

    Raises
    ------
    ShapeError
        Lengths that differ.
    """
    for name, array in (("norm_scale", norm_scale), ("norm_bias", norm_bias)):
        require_length(np.asarray(array), scales.size, name)
    for i, weight in enumerate(weights):
        require_length(np.asarray(weight), scales.size, f"weights[{i}]")
    wide = scales.astype(np.float64)
    return (
        (norm_scale / wide).astype(norm_scale.dtype),
        (norm_bias / wide).astype(norm_bias.dtype),
        [(w * wide[:, None]).astype(w.dtype) for w in weights],
    )


def _activation_spec(dtype: str, method: str, symmetric: bool) -> QuantSpec:
    text = f"{dtype}:tensor:{method}" + ("" if symmetric else ":asym")
    spec = checked(parse_quant(text))
    if spec.dtype == "none":
        raise ConfigError("activation dtype 'none' has no scale", "e.g. int8")
    return spec


def _power_above(value: float) -> float:
    # Strictly above, so that the largest value falls in the same bin at every later limit.
    return math.ldexp(1.0, max(math.frexp(value)[1], -126))


def _widened(counts: Float64, limit: float, wider: float) -> Float64:
    """Re-bin counts over [-limit, limit] into bins over [-wider, wider]."""
    merge = round(wider / limit)
    out = np.zeros_like(counts)
    if merge >= HALF:
        out[HALF - 1], out[HALF] = counts[:HALF].sum(), counts[HALF:].sum()
        return out
    merged = counts.reshape(-1, merge).sum(axis=1)
    first = HALF - len(merged) // 2
    out[first : first + len(merged)] = merged
    return out


def _centres(histogram: Histogram) -> Float64:
    step = histogram.limit / HALF
    return np.asarray((np.arange(2 * HALF) - HALF + 0.5) * step, dtype=np.float64)


def _side_counts(histogram: Histogram, low: Float64, high: Float64) -> Float64:
    """Histogram of magnitudes relative to the end of the range on their side: [HALF]."""
    centres = _centres(histogram)
    end = np.where(centres < 0, -low, high)
    share = np.abs(centres) / np.where(end > 0, end, 1.0)
    index = np.minimum((share * HALF).astype(np.int64), HALF - 1)
    return np.bincount(index, weights=histogram.counts, minlength=HALF).astype(np.float64)


def _least_error(
    histogram: Histogram, low: Float64, high: Float64, spec: QuantSpec
) -> npt.NDArray[np.float64]:
    form = FORMATS[spec.dtype]
    # Bin centres lie inside the range that was seen, also in its first and last bin.
    centres = np.clip(_centres(histogram), low, high)
    errors = []
    for share in FACTORS:
        scale, zero = scales_of_range(low * share, high * share, form, spec.symmetric)
        back = decode(encode(centres, scale, zero, form), scale, zero)
        errors.append(float(histogram.counts @ (back - centres) ** 2))
    return FACTORS[[int(np.argmin(errors))]]


def _row_absmax(weights: Array | Sequence[Array], length: int) -> Float64:
    many = [weights] if isinstance(weights, np.ndarray) else list(weights)
    if not many:
        raise ShapeError("no weight reads this input", "pass at least one weight")
    top = np.zeros(length)
    for i, weight in enumerate(many):
        matrix = as_matrix(weight, f"weights[{i}]")
        require_length(matrix, length, f"weights[{i}]")
        top = np.maximum(top, np.abs(matrix.astype(np.float64)).max(axis=1))
    return top
