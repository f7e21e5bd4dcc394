"""Choose how a quantised weight is stored for a product with floats, and the kernel of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from icd_tvm.relax_passes.quantized_operands import Weight
from icd_tvm.tir_schedules.cpu.digit_lanes import (
    GROUP,
    lane_digit_matmul,
    pack_lane_digits,
    takes_lanes,
    whole_groups,
)
from icd_tvm.tir_schedules.cpu.digit_matmul import (
    digit_matmul,
    digit_tile,
    pack_digits,
    takes_digits,
)
from icd_tvm.tir_schedules.cpu.gemv import (
    SKIP_ROWS,
    NarrowWeight,
    narrow_matmul,
    narrow_tile,
    pack_narrow,
    pack_skipping,
)
from icd_tvm.tir_schedules.cpu.tile import flat_rows

# Below it the tables of scales are about as large as the weight.
MIN_BLOCK = 16
# With more non-zeros than this there are too few groups to skip.
DENSE = 0.95
_NIBBLE, _BYTE = 15, 255
Array = npt.NDArray[Any]


class NarrowProduct(NamedTuple):
    """The kernel of a product of few rows of floats with a quantised weight.

    Attributes
    ----------
    func : PrimFunc
        Of X, the constants and Y.
    name : str
    constants : dict of str to array
        What follows the name of the weight in that of a constant -> its value.
    description : str
        Which kernel it is, and how many rows of the weight it reads.
    """

    func: Any
    name: str
    constants: dict[str, Array]
    description: str


def narrow_product(weight: Weight, rows: tuple[int, ...], target: Any) -> NarrowProduct:
    """Return the kernel of ``X[*rows, K] @ weight``.

    Parameters
    ----------
    weight : Weight
    rows : tuple of int
        Shape of X without its last axis.
    target : tvm.target.Target

    Raises
    ------
    ShapeError
        If X has more than `MAX_ROWS` rows.
    """
    (*lead, m), (k, n) = rows, weight.values.shape
    form, values, tables = narrow_form(weight)
    flat = flat_rows(tuple(lead), m)[1]
    if takes_lanes(form, flat, k, target):
        kind, product = "digit", lane_digit_matmul
        values, tables = whole_groups(values), [whole_groups(table) for table in tables]
        form, constants = _packed(form, values, tables, GROUP)
        constants = _repacked(constants, pack_lane_digits)
    elif takes_digits(form, flat, k, target):
        kind, product = "digit", digit_matmul
        form, constants = _packed(form, values, tables, digit_tile(flat).columns)
        constants = _repacked(constants, pack_digits)
    else:
        kind, product = "narrow", narrow_matmul
        form, constants = _packed(form, values, tables, narrow_tile(flat, target).columns)
    func = product(m, k, n, form, target, lead=tuple(lead))
    text = f"{kind}, {form.steps * SKIP_ROWS or k} rows of {form.bits} bits"
    return NarrowProduct(func, f"{kind}_matmul", constants, text)


def _repacked(
    constants: dict[str, Array], pack: Callable[[list[Array]], list[Array]]
) -> dict[str, Array]:
    """Return the constants of a product of digits, whose sums come last."""
    *packed, sums = pack(list(constants.values()))
    return {**dict(zip(constants, packed, strict=True)), ".sums": sums}


def _packed(
    form: NarrowWeight, values: Array, tables: list[Array], columns: int
) -> tuple[NarrowWeight, dict[str, Array]]:
    """Return how a narrow weight is stored, and its constants."""
    k = len(values)
    if form == NarrowWeight(8, k) and k % SKIP_ROWS == 0:
        skipping, fewer = pack_skipping(values, tables[0], columns)
        if skipping.steps * SKIP_ROWS <= DENSE * k:
            return skipping, dict(zip(("", ".scale", ".rows"), fewer, strict=True))
    packed = pack_narrow(values, tables, form, columns)
    return form, dict(zip(("", ".scale", ".zero_point"), packed, strict=False))


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
