"""Storage of keys and values in 8 or 16 bits.

Whole caches: 8 bits, one scale for every channel of every page. A decode step's own state: one
scale for every token of every head, because a row must be stored without a look at its
neighbours; or floats of 16 bits, without scales.
"""

from __future__ import annotations

from typing import Any, Literal

import ml_dtypes
import numpy as np

from icd_tvm.adapters.arrays import Array
from icd_tvm.errors import NonFiniteError

KVDtype = Literal["int8", "fp8_e4m3"]
DTYPES: tuple[KVDtype, ...] = ("int8", "fp8_e4m3")

StateDtype = Literal["int8", "fp16", "bf16"]
# What a decode step's state may be stored as.
STATE_TYPES: dict[StateDtype, np.dtype[Any]] = {
    "int8": np.dtype(np.int8),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}

INT8_MAX = 127.0
E4M3_MAX = 448.0
# A row of zeros, or one below float32's normal range, must not divide by zero.
TINY = np.finfo(np.float32).tiny
# The input with the scales of the codes in input NAME is NAME_scale.
SCALE_SUFFIX = "_scale"


def _e4m3_values() -> Array:
    """Return the 127 finite non-negative numbers of e4m3 by code, ascending."""
    code = np.arange(127)
    exponent, mantissa = code >> 3, (code & 7) / 8.0
    normal = (1.0 + mantissa) * 2.0 ** (exponent - 7.0)
    return np.where(exponent == 0, mantissa * 2.0**-6, normal)


E4M3 = _e4m3_values()
# Halfway points between neighbours: a value on one goes to the even code.
_MIDDLE = (E4M3[1:] + E4M3[:-1]) / 2


def encode_e4m3(values: Array) -> Array:
    """Round to the nearest e4m3 number, ties to even, saturating at +-448.

    Parameters
    ----------
    values : float array

    Returns
    -------
    uint8 array of the same shape
        Bit patterns: sign, 4 bits of exponent (bias 7), 3 bits of mantissa.

    Notes
    -----
    Micikevicius et al., "FP8 formats for deep learning", 2022 (E4M3: no infinity).
    """
    size = np.abs(values.astype(np.float64))
    low, high = np.searchsorted(_MIDDLE, size, "left"), np.searchsorted(_MIDDLE, size, "right")
    code = np.where(low % 2 == 0, low, high).astype(np.uint8)
    return np.asarray(code | (np.signbit(values).astype(np.uint8) << 7))


def decode_e4m3(codes: Array) -> Array:
    """Return float32 values of e4m3 bit patterns; the pattern of NaN is never written."""
    table = np.append(E4M3, np.nan)
    return np.concatenate([table, -table]).astype(np.float32)[codes]


def quantize_pages(array: Array, block: int, dtype: KVDtype) -> tuple[Array, Array]:
    """Quantise [..., tokens, head_dim] symmetrically, page by page and channel by channel.

    A scale per channel folds into the query (keys) or into the attention output (values), so
    that a kernel multiplies once a page; channels with outliers keep theirs to themselves.

    Parameters
    ----------
    array : float array, shape [..., tokens, head_dim]
    block : int
        Tokens of a page.
    dtype : {"int8", "fp8_e4m3"}

    Returns
    -------
    codes : int8 or uint8 array, shape of ``array``
    scales : float32 array, shape [..., pages, head_dim]

    Raises
    ------
    NonFiniteError
        A value is too large for a float32 scale.

    Notes
    -----
    Liu et al., "KIVI", 2024: keys have channels of outliers.
    """
    limit = INT8_MAX if dtype == "int8" else E4M3_MAX
    starts = np.arange(0, array.shape[-2], block)
    peak = np.maximum.reduceat(np.abs(array.astype(np.float64)), starts, axis=-2)
    with np.errstate(over="ignore", under="ignore"):
        scales = (peak / limit).astype(np.float32)
    if not np.isfinite(scales).all():
        raise NonFiniteError(f"a value of {peak.max():.3g} has no float32 scale", "drop dtype")
    # A channel of zeros, or one below float32's range, is stored as zeros.
    scales = np.where(scales > np.finfo(np.float32).tiny, scales, np.float32(1))
    ratio = array.astype(np.float64) / _by_token(scales, block, array.shape[-2])
    if dtype == "int8":
        return np.clip(np.rint(ratio), -INT8_MAX, INT8_MAX).astype(np.int8), scales
    return encode_e4m3(ratio), scales


def dequantize_pages(codes: Array, scales: Array, block: int, dtype: KVDtype) -> Array:
    """Invert :func:`quantize_pages`; float32, shape of ``codes``."""
    values = codes.astype(np.float32) if dtype == "int8" else decode_e4m3(codes)
    return np.asarray(values * _by_token(scales, block, codes.shape[-2]), dtype=np.float32)


def quantize_rows(array: Array) -> tuple[Array, Array]:
    """Quantise [..., tokens, head_dim] symmetrically to int8, every row by itself.

    Parameters
    ----------
    array : float array, shape [..., tokens, head_dim]

    Returns
    -------
    codes : int8 array, shape of ``array``
    scales : float32 array, shape [..., tokens, 1]
        ``max |row| / 127``; a number is off by at most half of it.
    """
    wide = array.astype(np.float32)
    peak = np.abs(wide).max(axis=-1, keepdims=True)
    scales = np.maximum(peak / np.float32(INT8_MAX), TINY)
    return np.rint(wide / scales).astype(np.int8), scales


def dequantize_rows(codes: Array, scales: Array) -> Array:
    """Invert :func:`quantize_rows`; float32, shape of ``codes``."""
    return np.asarray(codes.astype(np.float32) * scales)


def narrow_rows(array: Array, dtype: StateDtype) -> Array:
    """Round to floats of 16 bits, to nearest even.

    Parameters
    ----------
    array : float array
    dtype : {"fp16", "bf16"}

    Returns
    -------
    float16 or bfloat16 array, shape of ``array``
        A number is off by at most 2**-11 (fp16; by 2**-25 below 2**-14) or 2**-8 (bf16) of itself.

    Raises
    ------
    NonFiniteError
        A finite number is outside the range of the type, 65504 for fp16.
    """
    with np.errstate(over="ignore"):
        narrow: Array = array.astype(STATE_TYPES[dtype])
    outside = np.isfinite(array) & ~np.isfinite(narrow.astype(np.float32))
    if outside.any():
        value = float(array[outside][0])
        raise NonFiniteError(f"{value:.6g} is outside the range of {dtype}", "store bf16 or int8")
    return narrow


def stored_rows(array: Array, dtype: StateDtype) -> Array:
    """Return rows [..., tokens, head_dim] as a decode step reads them from its state, float32."""
    if dtype == "int8":
        return dequantize_rows(*quantize_rows(array))
    return narrow_rows(array, dtype).astype(np.float32)


def _by_token(scales: Array, block: int, tokens: int) -> Array:
    return np.repeat(scales, block, axis=-2)[..., :tokens, :]
