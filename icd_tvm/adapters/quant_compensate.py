"""Rounding with error compensation: later rows absorb the rounding error of earlier ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import linalg

from icd_tvm.adapters.arrays import Bool, Float64, Index
from icd_tvm.adapters.quant_scales import NumberFormat, block_scales, decode, encode
from icd_tvm.adapters.quant_spec import Granularity, Method
from icd_tvm.adapters.quant_tensor import column_blocks, spread_rows

# Ridge, relative to the mean diagonal of the Gram matrix.
DAMPING = 0.01
# Rows whose errors are applied to the rest in one matrix product.
BLOCK = 128


class Coder:
    """Scales, codes and salient rows of one weight while it is being rounded.

    Parameters
    ----------
    weight : float64 array, shape [K, N]
    form : NumberFormat
    method : {"ptq-minmax", "ptq-kld", "ptq-mse"}
    symmetric : bool
    granularity : {"tensor", "channel", "group"}
    group : int
        Rows in a group.
    order : int array, shape [K]
        Row order that the groups are cut from.
    energy : float64 array, shape [K], optional
        Energy of each input.
    salient : bool array, shape [K]
        Rows kept in floating point.
    float_dtype : numpy dtype
        Dtype of those rows.
    """

    def __init__(
        self,
        weight: Float64,
        form: NumberFormat,
        method: Method,
        symmetric: bool,
        granularity: Granularity,
        group: int,
        order: Index,
        energy: Float64 | None,
        salient: Bool,
        float_dtype: np.dtype[Any],
    ) -> None:
        rows, width = weight.shape
        self.weight, self.form, self.method, self.symmetric = weight, form, method, symmetric
        self.order, self.energy, self.salient = order, energy, salient
        self.float_dtype = float_dtype
        self.whole = granularity == "tensor"
        self.size = group if granularity == "group" else rows
        count = -(-rows // self.size)
        self.g_idx = np.empty(rows, np.int32)
        self.g_idx[order] = np.arange(rows, dtype=np.int32) // self.size
        self.scales = np.ones((count, 1 if self.whole else width), np.float32)
        self.zeros = np.zeros(self.scales.shape, np.int8)
        self.codes = np.zeros(weight.shape, form.storage)
        self.floats = np.zeros(weight.shape, float_dtype)

    def fit(self, group: int, rows: Index, values: Float64, columns: slice = slice(None)) -> None:
        """Choose the scales of a group from the values its rows have now, in some columns."""
        coded = ~self.salient[rows]
        block = values[coded]
        energy = None if self.energy is None else self.energy[rows][coded]
        if self.whole:
            energy = None if energy is None else np.repeat(energy, block.shape[1])
            block = block.reshape(-1, 1)
        own = slice(None) if self.whole else columns
        self.scales[group, own], self.zeros[group, own] = block_scales(
            block, self.form, self.method, self.symmetric, energy
        )

    def put(self, rows: Index, values: Float64, columns: slice = slice(None)) -> Float64:
        """Round rows, store their codes and return the values the codes stand for."""
        own = slice(None) if self.whole else columns
        scale, zero = (
            spread_rows(table[:, own], self.g_idx[rows]) for table in (self.scales, self.zeros)
        )
        codes = encode(values, scale, zero, self.form)
        out = decode(codes, scale, zero)
        kept = self.salient[rows]
        if kept.any():
            floats = values[kept].astype(self.float_dtype)
            self.floats[rows[kept], columns] = floats
            codes[kept] = np.zeros((), self.form.storage)
            out[kept] = floats.astype(np.float64)
        self.codes[rows, columns] = codes
        return out

    def round_plain(self) -> Float64:
        """Round every row to its nearest codes; return the rounded weight, float64 [K, N]."""
        out = np.empty_like(self.weight)
        # One scale, or one share of the range, for all columns needs them together.
        together = self.whole or self.method == "ptq-kld"
        blocks = [slice(None)] if together else column_blocks(self.size, self.weight.shape[1])
        for group, first in enumerate(range(0, len(self.order), self.size)):
            rows = self.order[first : first + self.size]
            for columns in blocks:
                values = self.weight[rows, columns]
                self.fit(group, rows, values, columns)
                out[rows, columns] = self.put(rows, values, columns)
        return out

    def round_compensated(self, gram: Float64) -> Float64:
        """Round row after row; rows to come make up for the error of each.

        Weights that are zero stay zero: they were pruned, and what the compensation would put
        there is compensated like a rounding error (Frantar and Alistarh, "SparseGPT", 2023).

        Parameters
        ----------
        gram : float64 array, shape [K, K]
            ``X.T @ X``.

        Returns
        -------
        float64 array, shape [K, N]

        Raises
        ------
        numpy.linalg.LinAlgError
            The Gram matrix is not positive definite even with its ridge.

        Notes
        -----
        Frantar et al., "GPTQ: accurate post-training quantization for generative pre-trained
        transformers", 2022.
        """
        factor = inverse_factor(gram[np.ix_(self.order, self.order)])
        work, out = self.weight[self.order], np.empty_like(self.weight)
        alive = work != 0
        length, span = len(work), _span(self.size, len(work))
        for first in range(0, length, span):
            last = min(first + span, length)
            errors = np.empty((last - first, work.shape[1]))
            for i in range(first, last):
                if i % self.size == 0:
                    end = i + self.size
                    self.fit(i // self.size, self.order[i:end], work[i:end] * alive[i:end])
                row = self.order[i : i + 1]
                out[row] = self.put(row, work[i : i + 1] * alive[i : i + 1])
                error = (work[i] - out[row[0]]) / factor[i, i]
                work[i + 1 : last] -= np.outer(factor[i, i + 1 : last], error)
                errors[i - first] = error
            work[last:] -= factor[first:last, last:].T @ errors
        return out

    def salient_rows(self) -> npt.NDArray[Any] | None:
        """Return the rows kept in floating point, ascending, or None."""
        return self.floats[self.salient] if self.salient.any() else None


def inverse_factor(gram: Float64) -> Float64:
    """Return the upper Cholesky factor of the inverse of the damped Gram matrix.

    Parameters
    ----------
    gram : float64 array, shape [K, K]

    Returns
    -------
    float64 array, shape [K, K]
        U with ``U.T @ U = inv(gram + ridge)``.

    Raises
    ------
    numpy.linalg.LinAlgError
        Not positive definite.
    """
    damped = gram.copy()
    # An input without energy gets the ridge alone; without any energy the unit matrix will do.
    damped[np.diag_indices(len(gram))] += DAMPING * float(np.trace(gram)) / len(gram) or 1.0
    lower = linalg.cholesky(damped, lower=True, check_finite=False)
    inverse = linalg.cho_solve((lower, True), np.eye(len(gram)), check_finite=False)
    return np.asarray(linalg.cholesky(inverse, lower=False, check_finite=False))


def _span(size: int, length: int) -> int:
    """Rows handled together, so that a group never starts on rows not yet brought up to date."""
    if size >= length or size % BLOCK == 0:
        return BLOCK
    return size * max(1, BLOCK // size)
