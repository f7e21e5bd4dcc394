"""What zeros of a weight are worth to the CUDA kernels: live blocks, strays beside them, 2:4.

Each is weighed against the dense product by counted operations; a choice is no measurement.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from icd_tvm.relax_passes.cuda_plan import ProductKernels
from icd_tvm.tir_schedules.cuda.gemm import LIVE_COLUMNS, SLAB, STRAY_INPUTS, live_blocks
from icd_tvm.tir_schedules.cuda.gemm_24 import gemm_24_rule, not_two_four, pack_two_four
from icd_tvm.tir_schedules.cuda.gemm_tile import ROW, choose_tile
from icd_tvm.tir_schedules.cuda.source_kernel import PLAIN, WIDTHS, Epilogue, Rule
from icd_tvm.tir_schedules.cuda.strays import Strays, pack_strays, split_strays

Array = npt.NDArray[Any]
Lists = npt.NDArray[np.int32]
# Lists of live blocks pay up to this share of a weight.
_PAYS = 0.8
# Multiply-adds of tensor cores that cost as much as one of a stray, which other units make and
# which reads A once more, and as a byte of DRAM (data sheets: 15 and 103 on an H200, 16 and 77 on
# an A100).
_STRAY, _BYTE = 32, 100
# Of the kept half of the products.
_TWO_FOUR = 0.5


def paying_blocks(weight: Array) -> Lists | None:
    """Return the lists of live blocks of a weight [K, N]; None where they do not pay."""
    blocks = live_blocks(weight, LIVE_COLUMNS)
    pays = _share(weight, blocks) <= _PAYS and not weight.shape[1] % LIVE_COLUMNS
    return blocks if pays else None


def _share(weight: Array, blocks: Lists | None) -> float:
    """Return the share of a weight that is multiplied."""
    return 1.0 if blocks is None else blocks.shape[1] * SLAB / len(weight)


class Split(NamedTuple):
    """A weight as live blocks, with their lists, and the elements outside of them."""

    weight: Array
    blocks: Lists
    strays: Strays


def paying_strays(weight: Array, blocks: Lists | None) -> Split | None:
    """Return a weight split into live blocks and strays; None where that does not pay.

    A block that holds less than what it costs becomes strays. The turned copy of A is read from and
    written to DRAM.

    Parameters
    ----------
    weight : float16 or bfloat16 [K, N]
    blocks : int32 array or None
        Its own lists, where they pay.
    """
    k, n = weight.shape
    if _living(weight) > _PAYS or n % LIVE_COLUMNS or k > STRAY_INPUTS:
        return None
    kept, rest = split_strays(weight, LIVE_COLUMNS, SLAB * LIVE_COLUMNS // _STRAY)
    lists, strays = live_blocks(kept, LIVE_COLUMNS), pack_strays(rest)
    if not strays.starts[-1]:
        return None
    turned = 2 * WIDTHS["float16"] * _BYTE / n
    cost = _share(weight, lists) + _STRAY * strays.list.size / weight.size + turned
    return Split(kept, lists, strays) if cost <= _PAYS * _share(weight, blocks) else None


def two_four_kernels(
    m: int, weight: Array, dtype: str, arch: str, blocks: Lists | None
) -> ProductKernels | str:
    """Return the kernels of sparse tensor cores for ``A[m, K] @ weight``, or why there are none.

    Parameters
    ----------
    m : int
    weight : float16 or bfloat16 [K, N]
    dtype, arch : str
    blocks : int32 array or None
        Lists of live blocks, where they pay.

    Returns
    -------
    ProductKernels or str
        An empty string where nothing suggests them: more than half of the elements are there, or
        lists leave less.
    """
    k, n = weight.shape
    if _living(weight) > _TWO_FOUR or _share(weight, blocks) <= _TWO_FOUR:
        return ""
    if reason := not_two_four(weight):
        return "" if blocks is not None else f"not 2:4: {reason}"
    if m == 1:
        return "2:4, of which the kernels of one row make no use"
    if choose_tile(m, n, -(-k * int(WIDTHS[dtype]) // ROW), arch).splits > 1:
        return f"2:4, but {m} rows want parts of K, which sparse tensor cores are not given"

    def make(epilogue: Epilogue, out: str) -> Rule:
        return gemm_24_rule(m, n, k, dtype, out=out, epilogue=epilogue, arch=arch)

    plain = make(PLAIN, "float32")
    if not plain.kernels:
        return f"2:4, but {plain.reason}"
    packed = pack_two_four(weight, plain.kernels[0].arguments[1].shape[2])
    return ProductKernels(make, packed._asdict(), kind="gemm_24")


def _living(weight: Array) -> float:
    """Return the share of elements that are not zero."""
    return float(np.mean(weight != 0))
