"""Co-activation of the units of a layer, as a sparse graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from icd_tvm.core.cost import Csr
from icd_tvm.errors import ConfigError, NonFiniteError, ShapeError

DEFAULTS: dict[str, Any] = {"neighbours": 20, "threshold": 0.0, "center": True, "block": 1024}


def collect_correlations(
    activations: ArrayLike | Iterable[ArrayLike], cfg: Mapping[str, Any] | None = None
) -> tuple[Csr, dict[str, Any]]:
    """Return the graph of absolute correlation between units, each with its nearest neighbours.

    W[i, j] = abs(corr(i, j)) where j is among the ``neighbours`` units most correlated with i or
    the other way round. Symmetric, zero diagonal, deterministic. Memory is that of one block of
    rows and the result; the correlation matrix is never formed as a whole.

    Parameters
    ----------
    activations : array_like of float, shape [samples, units], or an iterable of them
        Any batches of one layer's activations; leading axes are flattened to samples.
    cfg : mapping, optional
        ``neighbours`` (int, default 20), ``threshold`` (drop correlations below it, default 0),
        ``center`` (subtract the means, default True; False gives cosines), ``block`` (rows of
        the correlation matrix formed at a time, default 1024).

    Returns
    -------
    matrix : csr_matrix of float32, shape [units, units]
    meta : dict
        ``samples``, ``units``, ``constant`` (units that never change, without edges), and cfg.

    Raises
    ------
    ShapeError, NonFiniteError, ConfigError
        If an array or a key of ``cfg`` is invalid.
    """
    options = {**DEFAULTS, **(cfg or {})}
    if unknown := set(options) - set(DEFAULTS):
        raise ConfigError(f"collect_correlations: unknown key {sorted(unknown)[0]!r}")
    if options["neighbours"] < 1 or options["block"] < 1:
        raise ConfigError("collect_correlations: neighbours and block must be at least 1")
    if not 0 <= options["threshold"] <= 1:
        raise ConfigError(f"collect_correlations: threshold={options['threshold']} not in [0, 1]")
    samples = _stacked(activations)
    unit = samples - samples.mean(axis=0) if options["center"] else samples
    norm = np.linalg.norm(unit, axis=0)
    scale = np.abs(samples).max(axis=0, initial=0.0) * np.sqrt(len(samples))
    constant = norm <= 1e-6 * scale
    inverse = np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, norm))
    graph = _nearest(np.asarray(unit * inverse, dtype=np.float32), options)
    meta = {
        "samples": int(samples.shape[0]),
        "units": int(samples.shape[1]),
        "constant": int(constant.sum()),
        **options,
    }
    return graph, meta


def _stacked(activations: ArrayLike | Iterable[ArrayLike]) -> NDArray[np.float32]:
    batches: Any = [activations] if isinstance(activations, np.ndarray) else activations
    parts = [np.asarray(batch, dtype=np.float32) for batch in batches]
    if not parts:
        raise ShapeError("collect_correlations: no activations")
    widths = {part.shape[-1] if part.ndim >= 2 else -1 for part in parts}
    if len(widths) != 1 or -1 in widths:
        raise ShapeError("collect_correlations: batches must be [..., units] of one width")
    samples = np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])
    if samples.shape[0] < 2:
        raise ShapeError(f"collect_correlations: {samples.shape[0]} sample, at least 2 are needed")
    if not np.all(np.isfinite(samples)):
        raise NonFiniteError("collect_correlations: activations hold NaN or infinity")
    return samples


def _nearest(unit: NDArray[np.float32], options: Mapping[str, Any]) -> Csr:
    n = unit.shape[1]
    count = min(options["neighbours"], n - 1)
    rows, cols, data = [], [], []
    for first in range(0, n, options["block"]):
        block = np.abs(unit[:, first : first + options["block"]].T @ unit)
        number = np.arange(block.shape[0])
        block[number, number + first] = -1.0
        row, col = np.nonzero(strongest(block, count) & (block > max(options["threshold"], 1e-7)))
        rows.append(row + first)
        cols.append(col)
        data.append(block[row, col])
    flat = [np.concatenate(part) for part in (data, rows, cols)]
    graph = sp.csr_matrix((flat[0], (flat[1], flat[2])), shape=(n, n), dtype=np.float32)
    both = sp.csr_matrix(graph.maximum(graph.T))
    both.data = np.minimum(both.data, np.float32(1.0))
    both.sort_indices()
    return both


def strongest(values: NDArray[np.float32], keep: int) -> NDArray[np.bool_]:
    """Mark the ``keep`` largest values of each row, the first ones among equals."""
    if keep <= 0:
        return np.zeros(values.shape, dtype=np.bool_)
    border = np.partition(values, -keep, axis=1)[:, -keep, None]
    above, equal = values > border, values == border
    room = keep - above.sum(axis=1, keepdims=True)
    return above | (equal & (np.cumsum(equal, axis=1, dtype=np.int32) <= room))
