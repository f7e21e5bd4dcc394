"""Whole hidden units: scoring, selection and zeroing across the weights that share the axis."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from icd_tvm.adapters.arrays import (
    Array,
    Bool,
    Float64,
    Index,
    as_matrix,
    require_finite,
    require_length,
)
from icd_tvm.adapters.calibration import Calibration, as_calibration
from icd_tvm.adapters.refit import choose_ridge, refit_groups
from icd_tvm.adapters.saliency import energy_after_refit, ridged
from icd_tvm.errors import ConfigError, ShapeError


def unit_scores(
    producers: Sequence[Array], consumers: Sequence[Array], second_moment: Array | None = None
) -> Float64:
    """Score the hidden units of a coupled set: what dropping one would cost.

    Parameters
    ----------
    producers : sequence of arrays, shape [K, U]
        Weights whose column u makes unit u.
    consumers : sequence of arrays, shape [U, N]
        Weights whose row u reads unit u.
    second_moment : array, shape [U] or [U, U], optional
        E[h_u ** 2], or the whole Gram matrix of the activations h. With [U] the score is the
        output energy that unit u carries, ``E[h_u ** 2] * ||W2[u, :]|| ** 2``. With [U, U] it is
        the output energy that is lost after the other units were refitted,
        ``||W2[u, :]|| ** 2 / inv(G)[u, u]``. Without it the energy of h_u is taken as
        ``||W1[:, u]|| ** 2``.

    Returns
    -------
    float64 array, shape [U]

    Raises
    ------
    ShapeError
        Nothing to score, or axes of different lengths.
    NonFiniteError
        NaN or infinity inside.

    Notes
    -----
    Hassibi and Stork, "Second order derivatives for network pruning", 1992, for the score after
    refit.
    """
    units = _unit_count(producers, consumers)
    read = np.zeros(units)
    for i, weight in enumerate(consumers):
        read += _energy(as_matrix(weight, f"consumers[{i}]"), axis=1)
    if not consumers:
        read += 1.0
    if second_moment is None:
        made = np.zeros(units)
        for i, weight in enumerate(producers):
            made += _energy(as_matrix(weight, f"producers[{i}]"), axis=0)
        return read * (made if producers else 1.0)
    moment = np.asarray(second_moment, dtype=np.float64)
    require_length(moment, units, "second_moment")
    require_finite(moment, "second_moment")
    if moment.ndim == 1:
        return read * moment
    if moment.shape != (units, units):
        raise ShapeError(
            f"second_moment has shape {list(moment.shape)}", f"pass [{units}] or [{units}, {units}]"
        )
    return read * energy_after_refit(moment)


def removal_costs(weight: Array, gram: Array, places: Index) -> Float64:
    """Return the output energy that is lost with each unit of several rows, after a refit.

    Parameters
    ----------
    weight : array, shape [K, N]
        Consumer of the units.
    gram : array, shape [K, K]
        ``X.T @ X`` of its calibration inputs.
    places : int array, shape [U, m]
        Rows that belong to each unit: one for a hidden unit, the head's size for a head.

    Returns
    -------
    float64 array, shape [U]
        ``trace(W_B.T inv(inv(G)_BB) W_B)`` over the rows B of the unit, as a share of the output
        energy ``trace(W.T G W)``; for m = 1 the score of :func:`unit_scores` up to that scale.

    Raises
    ------
    ShapeError, NonFiniteError
        Arrays that do not fit or are not finite.

    Notes
    -----
    Frantar et al., "Optimal brain compression", NeurIPS 2022, for the block form.
    """
    matrix = as_matrix(weight, "consumer").astype(np.float64)
    moments = as_matrix(gram, "gram").astype(np.float64)
    if moments.shape != (len(matrix), len(matrix)):
        raise ShapeError(f"gram {list(moments.shape)} does not fit {len(matrix)} rows")
    inverse = np.linalg.inv(ridged(moments))
    blocks = np.linalg.inv(inverse[places[:, :, None], places[:, None, :]])
    rows = matrix[places]
    total = float(np.sum(matrix * (moments @ matrix)))
    return np.asarray(np.sum(rows * (blocks @ rows), axis=(1, 2)) / (total or 1.0))


def select_units(scores: Array, rate: float, multiple_of: int = 1) -> Bool:
    """Choose the units to keep.

    Parameters
    ----------
    scores : array, shape [U]
        Cost of dropping each unit.
    rate : float
        Share to drop, in [0, 1).
    multiple_of : int
        The number of kept units is rounded up to a multiple of this, as far as U allows.

    Returns
    -------
    bool array, shape [U]
        True for kept units; ties keep the lower index.

    Raises
    ------
    ConfigError
        ``rate`` or ``multiple_of`` out of range.
    ShapeError
        ``scores`` is not a non-empty vector.
    NonFiniteError
        NaN or infinity inside.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ShapeError(f"scores has shape {list(values.shape)}", "pass one score a unit")
    require_finite(values, "scores")
    if not 0.0 <= rate < 1.0:
        raise ConfigError(f"sparsity rate {rate!r} is outside [0, 1)", "e.g. 0.5 drops one half")
    if multiple_of < 1:
        raise ConfigError(f"multiple_of = {multiple_of} is below 1", "pass 1 or more")
    kept = np.zeros(values.size, dtype=np.bool_)
    kept[np.argsort(-values, kind="stable")[: kept_count(values.size, rate, multiple_of)]] = True
    return kept


def kept_count(length: int, rate: float, multiple_of: int = 1) -> int:
    """Return how many of ``length`` items survive ``rate``: at least one, rounded up."""
    # Rounded first: (1 - 0.7) * 10 is a hair above 3.
    wanted = max(1, int(np.ceil(round(length * (1 - rate), 6))))
    return min(length, -(-wanted // multiple_of) * multiple_of)


def zero_units(weight: Array, kept: Bool, axis: int) -> Array:
    """Return a copy of ``weight`` whose dropped units are zero along ``axis``.

    Parameters
    ----------
    weight : array of any rank
    kept : bool array, shape [U]
    axis : int
        Axis that holds the units; its length is U.

    Raises
    ------
    ShapeError
        The axis does not exist or has another length.
    """
    array = np.asarray(weight)
    if not -array.ndim <= axis < array.ndim or array.shape[axis] != kept.size:
        raise ShapeError(
            f"weight has shape {list(array.shape)}, axis {axis} does not hold {kept.size} units"
        )
    shape = [1] * array.ndim
    shape[axis] = kept.size
    return np.where(kept.reshape(shape), array, np.zeros((), array.dtype))


def refit_consumer(
    weight: Array, calibration: Array | Calibration, kept: Bool, ridge: float | None = None
) -> Array:
    """Refit a consumer on the kept units so that its output changes least.

    Parameters
    ----------
    weight : array, shape [U, N]
        Consumer; row u reads unit u.
    calibration : array or Calibration
        Activations H [tokens, U], their Gram matrix [U, U], or those of two halves [2, U, U].
    kept : bool array, shape [U]
    ridge : float, optional
        See :func:`icd_tvm.adapters.refit.refit_groups`; chosen by
        :func:`icd_tvm.adapters.refit.choose_ridge` when not given.

    Returns
    -------
    array, shape [U, N], dtype of ``weight``
        Rows of dropped units are zero.

    Raises
    ------
    ShapeError, NonFiniteError
        Arrays that do not fit or are not finite.
    """
    matrix = as_matrix(weight, "consumer")
    units = matrix.shape[0]
    data = as_calibration(calibration, units)
    if data is None or data.gram is None or kept.shape != (units,):
        raise ShapeError(
            f"no Gram matrix, or kept {list(kept.shape)} does not fit {units} units",
            "pass X, or X.T @ X, and one flag a unit",
        )
    groups, rows = [np.arange(matrix.shape[1])], kept[None, :]
    if ridge is None:
        ridge = choose_ridge(matrix, data, groups, rows)
    return refit_groups(matrix, data.gram, groups, rows, ridge)


def _unit_count(producers: Sequence[Array], consumers: Sequence[Array]) -> int:
    lengths = [np.asarray(w).shape[-1] for w in producers]
    lengths += [np.asarray(w).shape[0] for w in consumers]
    if not lengths:
        raise ShapeError("a coupled set needs a producer or a consumer", "pass at least one weight")
    if len(set(lengths)) > 1:
        raise ShapeError(
            f"the coupled weights have unit axes of lengths {sorted(set(lengths))}",
            "producers are [K, U], consumers [U, N]",
        )
    return int(lengths[0])


def _energy(weight: Array, axis: int) -> Float64:
    return np.asarray(np.sum(weight.astype(np.float64) ** 2, axis=axis))
