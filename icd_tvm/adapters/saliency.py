"""How much one weight matters: what pruning keeps."""

from __future__ import annotations

from typing import Literal

import numpy as np

from icd_tvm.adapters.arrays import Array, Float64
from icd_tvm.adapters.calibration import Calibration
from icd_tvm.errors import ConfigError

Saliency = Literal["magnitude", "wanda", "obs"]

# Ridge of the inverse, relative to the mean diagonal of the Gram matrix.
RIDGE = 0.01


def weight_saliency(weight: Array, saliency: str, data: Calibration | None) -> Float64:
    """Return the saliency of every element of a weight.

    Parameters
    ----------
    weight : array, shape [K, N]
    saliency : {"magnitude", "wanda", "obs"}
        ``W ** 2``; times the energy of the input; or divided by the diagonal of the inverse Gram
        matrix, which is the output energy that is lost with the element alone after a refit.
    data : Calibration, optional
        Needed by ``wanda``; with a Gram matrix by ``obs``.

    Returns
    -------
    float64 array, shape [K, N]

    Raises
    ------
    ConfigError
        An unknown name, or calibration that is missing.

    Notes
    -----
    Sun et al., "A simple and effective pruning approach for large language models", 2023 (wanda);
    Hassibi and Stork, "Second order derivatives for network pruning", 1992 (obs).
    """
    squares = np.asarray(weight.astype(np.float64) ** 2)
    if saliency == "magnitude":
        return squares
    if saliency not in ("wanda", "obs"):
        raise ConfigError(f"unknown saliency {saliency!r}", "known: magnitude, wanda, obs")
    if data is None:
        raise ConfigError(
            f"saliency {saliency!r} needs calibration", "pass X [tokens, K] or norms [K]"
        )
    if saliency == "wanda":
        return np.asarray(squares * data.energy[:, None])
    if data.gram is None:
        raise ConfigError("saliency 'obs' needs a Gram matrix", "pass X [tokens, K] or [K, K]")
    return np.asarray(squares * energy_after_refit(data.gram)[:, None])


def energy_after_refit(gram: Float64) -> Float64:
    """Return ``1 / inv(G)[k, k]``: the energy of input k that the others cannot replace.

    Parameters
    ----------
    gram : float64 array, shape [K, K]

    Returns
    -------
    float64 array, shape [K]
    """
    return np.asarray(1.0 / np.diagonal(np.linalg.inv(ridged(gram))))


def ridged(gram: Float64) -> Float64:
    """Return a Gram matrix with `RIDGE` added, so that it has an inverse."""
    ridge = RIDGE * float(np.trace(gram)) / len(gram) or 1.0
    return np.asarray(gram + ridge * np.eye(len(gram)))
