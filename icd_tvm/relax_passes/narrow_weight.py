"""Choose how a quantised weight is stored for a product with floats."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm.relax_passes.quantized_operands import Weight
from icd_tvm.tir_schedules.cpu.gemv import NarrowWeight

# Below it the tables of scales are about as large as the weight.
MIN_BLOCK = 16
_NIBBLE, _BYTE = 15, 255
Array = npt.NDArray[Any]


def narrow_form(weight: Weight) -> tuple[NarrowWeight, Array, list[Array]]:
    """Return the narrowest storage of a weight, without loss.

    Zero points are subtracted from the values where the differences are as narrow as the
    values; only otherwise do they stay a table.

    Parameters
    ----------
    weight : Weight
        Its `block` is the number of rows that share a scale.

    Returns
    -------
    form : NarrowWeight
    values : array [K, N] of int32
        For `pack_narrow`.
    tables : list of arrays [G, N]
        Scales, then the zero points if ``form.zeros``.
    """
    block = weight.block()
    values = weight.values.astype(np.int32)
    shifted = values - weight.zero.astype(np.int32)
    scale = np.ones((1, 1), np.float32) if weight.scale is None else weight.scale
    tables = [_by_block(scale, weight, block)]
    nibbles = block % 8 == 0
    for bits, most in ((4, _NIBBLE),) * nibbles + ((8, _BYTE),):
        if np.ptp(shifted) <= most:
            return NarrowWeight(bits, block, _low(shifted, bits)), shifted, tables
        if np.ptp(values) <= most:
            form = NarrowWeight(bits, block, _low(values, bits), zeros=True)
            return form, values, [*tables, _by_block(weight.zero, weight, block)]
    raise AssertionError("bytes span at most 255")


def _low(values: Array, bits: int) -> int:
    """Return the number that is stored as zero; none where int8 holds the values as they are."""
    least, most = int(values.min()), int(values.max())
    if bits == 8:
        return 0 if least >= -128 and most <= 127 else least + 128
    return least


def _by_block(table: Array, weight: Weight, block: int) -> Array:
    k, n = weight.values.shape
    return np.broadcast_to(table if len(table) == 1 else table[::block], (k // block, n))
