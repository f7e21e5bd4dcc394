"""Least-squares refit of the surviving weights on the Gram matrix of the inputs.

How far a refit may go is read from data that it did not see. The inputs of one layer can be
almost of low rank on a little text; a weak ridge then fits that text and not the layer.
"""

from __future__ import annotations

import numpy as np
from scipy import linalg

from icd_tvm.adapters.arrays import Array, Bool, Float64
from icd_tvm.adapters.calibration import Calibration, output_energy
from icd_tvm.errors import ConfigError

# Ridge relative to the mean diagonal of the Gram matrix, where there is nothing to choose it on.
RIDGE = 0.1
# The strengths to choose from, and the groups of columns that are refitted for it.
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
JUDGED_GROUPS = 8


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


def choose_ridge(weight: Array, data: Calibration, columns: list[Array], kept: Bool) -> float:
    """Choose the ridge whose refit on one half of the inputs errs least on the other half.

    Parameters
    ----------
    weight : array, shape [K, N]
    data : Calibration
        With ``halves``, best of different texts; without them the answer is `RIDGE`.
    columns : list of int arrays
        Columns of each group.
    kept : bool array, shape [groups, K]
        Kept rows of each group.

    Returns
    -------
    float
        Of `RIDGES`; the weaker of two that are equal.

    Notes
    -----
    Both halves take both parts, on at most `JUDGED_GROUPS` groups spread evenly. That is
    ``2 * len(RIDGES) * JUDGED_GROUPS`` solves whatever the number of groups.
    """
    if data.halves is None or not columns or min(map(np.trace, data.halves)) <= 0:
        return RIDGE
    judged = np.unique(np.linspace(0, len(columns) - 1, JUDGED_GROUPS).astype(int))
    part = weight[:, np.concatenate([columns[i] for i in judged])]
    cuts = np.cumsum([len(columns[i]) for i in judged])
    local = np.split(np.arange(cuts[-1]), cuts[:-1])
    errors = [_held_out(part, data.halves, local, kept[judged], ridge) for ridge in RIDGES]
    return RIDGES[int(np.argmin(errors))]


def _held_out(
    weight: Array, halves: tuple[Float64, Float64], columns: list[Array], kept: Bool, ridge: float
) -> float:
    """Return the sum of both relative output energies of the error."""
    dense = weight.astype(np.float64)
    lost = 0.0
    for fitted, unseen in (halves, halves[::-1]):
        delta = refit_groups(dense, fitted, columns, kept, ridge) - dense
        lost += output_energy(unseen, delta) / (output_energy(unseen, dense) or 1.0)
    return lost


def _solve(
    gram: Float64, dense: Float64, target: Float64, rows: Array, group: Array, pull: float
) -> Float64:
    matrix = gram[np.ix_(rows, rows)].copy()
    matrix[np.diag_indices(rows.size)] += pull
    cells = np.ix_(rows, group)
    right = target[cells] + pull * dense[cells]
    try:
        # linalg.solve would also estimate the condition number: five times the time at K = 768.
        factor = linalg.cho_factor(matrix, overwrite_a=True, check_finite=False)
        return np.asarray(linalg.cho_solve(factor, right, overwrite_b=True, check_finite=False))
    except linalg.LinAlgError as error:
        raise ConfigError(
            "the Gram matrix of the calibration is not positive semidefinite",
            "pass X.T @ X of real activations, or X itself",
        ) from error
