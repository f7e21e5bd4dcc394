"""Least-squares refit of the surviving weights on the Gram matrix of the inputs."""

from __future__ import annotations

import numpy as np
from scipy import linalg

from icd_tvm.adapters.arrays import Array, Bool, Float64
from icd_tvm.errors import ConfigError

# Ridge, relative to the mean diagonal of the Gram matrix.
RIDGE = 0.01


def refit_groups(
    weight: Array, gram: Float64, columns: list[Array], kept: Bool, ridge: float = RIDGE
) -> Array:
    """Refit groups of columns, each on its own kept rows.

    For a group with columns c and kept rows s this solves
    ``(G[s, s] + r I) W'[s, c] = G[s, :] W[:, c] + r W[s, c]``, the ridge-regularised least-squares
    fit of the dense output that pulls towards the old weights; other rows become zero.

    Parameters
    ----------
    weight : array, shape [K, N]
    gram : float64 array, shape [K, K]
        ``X.T @ X`` of calibration inputs.
    columns : list of int arrays
        Columns of each group.
    kept : bool array, shape [groups, K]
        Kept rows of each group.
    ridge : float
        Strength of the pull, relative to the mean diagonal of ``gram``.

    Returns
    -------
    array, shape [K, N], dtype of ``weight``
        Without any calibration energy the survivors keep their values.

    Raises
    ------
    ConfigError
        ``gram`` is no Gram matrix: it is not positive semidefinite.
    """
    dense = weight.astype(np.float64)
    out = np.zeros_like(dense)
    # With no energy at all any ridge keeps the old weights; 1 is a well-conditioned one.
    pull = ridge * float(np.trace(gram)) / len(gram) or 1.0
    target = gram @ dense
    for group, rows_kept in zip(columns, kept, strict=True):
        rows = np.flatnonzero(rows_kept)
        if rows.size:
            out[np.ix_(rows, group)] = _solve(gram, dense, target, rows, group, pull)
    return out.astype(weight.dtype)


def _solve(
    gram: Float64, dense: Float64, target: Float64, rows: Array, group: Array, pull: float
) -> Float64:
    matrix = gram[np.ix_(rows, rows)].copy()
    matrix[np.diag_indices(rows.size)] += pull
    cells = np.ix_(rows, group)
    right = target[cells] + pull * dense[cells]
    try:
        return np.asarray(linalg.solve(matrix, right, assume_a="pos", check_finite=False))
    except linalg.LinAlgError as error:
        raise ConfigError(
            "the Gram matrix of the calibration is not positive semidefinite",
            "pass X.T @ X of real activations, or X itself",
        ) from error
