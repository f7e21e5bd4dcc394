"""A quantised weight: codes, scales, and what is needed to read them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm.adapters.arrays import Array, Bool, Index
from icd_tvm.adapters.quant_scales import FORMATS, decode
from icd_tvm.adapters.quant_spec import Dtype
from icd_tvm.errors import PermutationError, ShapeError

# Bytes of a scale, a zero point and a row number in the packed form.
SCALE_BYTES = 4
ZERO_BYTES = 1
INDEX_BYTES = 4
# Float64 copies of so many elements stay in a core's cache; larger ones cost time and memory.
BLOCK_ELEMENTS = 1 << 17


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Codes and scales of a weight of ``y = x @ W``; row k belongs to scale group ``g_idx[k]``.

    Parameters
    ----------
    dtype : str
        Number format of the codes; ``none`` for a weight that was left as it is.
    codes : array, shape [K, N]
        int8 for int8 and (unpacked) int4, float8 for fp8, bfloat16 for bf16, the weight itself for
        ``none``.
    scales : float32 array, shape [G, N], or [G, 1] when the columns share them
    zero_points : int8 array, shape of ``scales``
    g_idx : int32 array, shape [K]
        Scale group of every row.
    source_dtype : numpy dtype
        Dtype of the weight before.
    order : int32 array, shape [K], optional
        Row order in which every group is contiguous: ``sorted[i] = codes[order[i]]``. Present
        with act-order groups only.
    salient : bool array, shape [K], optional
        Rows kept in floating point; their codes are 0.
    salient_values : float array, shape [S, N], optional
        Those rows, ascending.
    """

    dtype: Dtype
    codes: Array
    scales: npt.NDArray[np.float32]
    zero_points: npt.NDArray[np.int8]
    g_idx: npt.NDArray[np.int32]
    source_dtype: np.dtype[Any]
    order: npt.NDArray[np.int32] | None = None
    salient: Bool | None = None
    salient_values: Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape [K, N] of the weight."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the packed form: codes, scales, zero points, order and salient rows."""
        if self.dtype == "none":
            return int(self.codes.nbytes)
        salient = int(self.salient.sum()) if self.salient is not None else 0
        coded = (self.shape[0] - salient) * self.shape[1]
        form = FORMATS[self.dtype]
        size = -(-coded * form.bits // 8) + self.scales.size * SCALE_BYTES * form.is_scaled
        size += self.zero_points.size * ZERO_BYTES if self.zero_points.any() else 0
        size += self.order.size * INDEX_BYTES if self.order is not None else 0
        size += salient * INDEX_BYTES
        return int(size) + (self.salient_values.nbytes if self.salient_values is not None else 0)

    def dequantize(self, dtype: npt.DTypeLike | None = None, columns: slice = slice(None)) -> Array:
        """Return the weight that the codes stand for.

        Parameters
        ----------
        dtype : optional
            The weight's own dtype when not given.
        columns : slice
            Only these; all by default.

        Returns
        -------
        array, shape [K, N]
        """
        wanted = self.source_dtype if dtype is None else np.dtype(dtype)
        codes = self.codes[:, columns]
        if self.dtype == "none":
            return codes.astype(wanted)
        own = slice(None) if self.scales.shape[1] == 1 else columns
        scale, zero = (
            spread_rows(table[:, own], self.g_idx) for table in (self.scales, self.zero_points)
        )
        values = decode(codes, scale, zero)
        if self.salient is not None and self.salient_values is not None:
            values[self.salient] = self.salient_values[:, columns].astype(np.float64)
        return values.astype(wanted)

    def permute_rows(self, order: Index) -> QuantizedTensor:
        """Return the tensor with rows in another order: ``new[i] = old[order[i]]``.

        Parameters
        ----------
        order : int array, shape [K]
            A permutation; ``self.order`` makes every act-order group contiguous.

        Raises
        ------
        PermutationError
            ``order`` is no permutation of the rows.
        """
        pi = np.asarray(order)
        if not np.array_equal(np.sort(pi), np.arange(self.shape[0])):
            raise PermutationError(
                f"order {list(pi.shape)} is no permutation of {self.shape[0]} rows"
            )
        moved = replace(self, codes=self.codes[pi], g_idx=self.g_idx[pi])
        if self.order is not None:
            position = np.empty(pi.size, np.int32)
            position[pi] = np.arange(pi.size, dtype=np.int32)
            moved = replace(moved, order=position[self.order])
        if self.salient is None or self.salient_values is None:
            return moved
        rank = np.cumsum(self.salient) - 1
        salient = self.salient[pi]
        values = self.salient_values[rank[pi][salient]]
        return replace(moved, salient=salient, salient_values=values)


def spread_rows(table: Array, group: Index) -> Array:
    """Return the row of each group; one row for all broadcasts as it is."""
    return table if len(table) == 1 else table[group]


def column_blocks(rows: int, width: int) -> list[slice]:
    """Cut the columns of a matrix into blocks of at most `BLOCK_ELEMENTS`."""
    step = max(1, BLOCK_ELEMENTS // max(1, rows))
    return [slice(first, first + step) for first in range(0, width, step)]


def pack_int4(codes: Array) -> npt.NDArray[np.uint8]:
    """Pack int4 codes two a byte along K.

    Parameters
    ----------
    codes : int8 array, shape [K, N], values -8 to 7

    Returns
    -------
    uint8 array, shape [ceil(K / 2), N]
        Even rows in the low halves; an odd last row is followed by zeros.

    Raises
    ------
    ShapeError
        Not a matrix of int8, or values that need more than four bits.
    """
    if codes.ndim != 2 or codes.dtype != np.int8 or codes.size == 0:
        raise ShapeError(f"codes have shape {list(codes.shape)} and dtype {codes.dtype}", "int8")
    if codes.min() < -8 or codes.max() > 7:
        raise ShapeError(f"codes span {codes.min()} to {codes.max()}", "int4 holds -8 to 7")
    halves = np.bitwise_and(codes, 0xF).astype(np.uint8)
    packed: npt.NDArray[np.uint8] = halves[0::2].copy()
    packed[: len(codes) // 2] |= np.left_shift(halves[1::2], 4)
    return packed


def unpack_int4(packed: npt.NDArray[np.uint8], rows: int) -> npt.NDArray[np.int8]:
    """Undo :func:`pack_int4`: int8 array, shape [rows, N]."""
    both = np.stack([packed & 0xF, packed >> 4], axis=1).reshape(-1, packed.shape[1])
    signed = both[:rows].astype(np.int8)
    codes: npt.NDArray[np.int8] = np.where(signed > 7, signed - 16, signed).astype(np.int8)
    return codes
