"""The combined cost J of an order, and two of its terms: alignment and stability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike

from icd_tvm.core.cost import TileAccess, check_accesses
from icd_tvm.core.permutation import Perm, as_permutation, invert
from icd_tvm.errors import ConfigError

# Cells of one dense block of rows of an incidence.
_CELLS = 1 << 26


@dataclass(frozen=True)
class Weights:
    """Weights of J = (c C + q (1 - Q) + u U / U_max + a A + s S) / (weights of the terms present).

    U is what a kernel pays, C and Q are surrogates of it, so U gets half of the weight. Alignment
    A and stability S have none unless it is given: U counts whole tiles, which start on vector
    borders, so A adds nothing to it for the kernels of this package, and S never makes an order
    faster; it chooses among orders of equal cost when its weight is small.

    Raises
    ------
    ConfigError
        If a weight is negative or not finite.
    """

    c: float = 0.25
    q: float = 0.25
    u: float = 0.5
    a: float = 0.0
    s: float = 0.0

    def __post_init__(self) -> None:
        if not all(np.isfinite(value) and value >= 0 for value in astuple(self)):
            raise ConfigError(f"weights of J {astuple(self)} must be finite and not negative")


DEFAULT_WEIGHTS = Weights()


def combined_cost(
    distance: float | None,
    quality: float | None,
    relative_units: float | None,
    weights: Weights = DEFAULT_WEIGHTS,
    *,
    misaligned: float | None = None,
    displaced: float | None = None,
) -> float:
    """Return J from C, Q, U / U_max, A and S; a term that is None drops out. Lower is better."""
    terms = [
        (weights.c, distance),
        (weights.q, None if quality is None else 1.0 - quality),
        (weights.u, relative_units),
        (weights.a, misaligned),
        (weights.s, displaced),
    ]
    present = [(weight, value) for weight, value in terms if value is not None]
    total = sum(weight for weight, _ in present)
    return sum(weight * value for weight, value in present) / total if total else 0.0


def misalignment(accesses: Sequence[TileAccess], perm: ArrayLike) -> float:
    """Return A(perm), the share of touches that begin a run off a vector or line border.

    A run is a maximal set of consecutive positions that one window touches; it begins off a
    border when its first position is no multiple of ``access.alignment``. Such a run needs one
    vector or line more than one that begins on a border may need. In [0, 1); 0 where nothing is
    touched. A = M / sum_w weight_w d_w, M the weighted number of such runs: the denominator does
    not depend on the order, so that more runs on borders do not hide those off them.
    O(windows * n) byte operations.

    Raises
    ------
    ShapeError, PermutationError
        If the accesses disagree on n, or ``perm`` is no permutation of n indices.
    """
    order = as_permutation(perm, check_accesses(accesses))
    touches = sum(float(a.degrees() @ a.unit_weights) for a in accesses)
    runs = sum(_runs_off_border(access, order) for access in accesses)
    return runs / touches if touches else 0.0


def _runs_off_border(access: TileAccess, order: Perm) -> float:
    off = np.flatnonzero(np.arange(access.n) % access.alignment)
    if not off.size:
        return 0.0
    weights, total = access.unit_weights, 0.0
    step = max(1, _CELLS // access.n)
    for first in range(0, access.windows, step):
        part = sp.csr_matrix(access.incidence[first : first + step])
        touched = part[:, order].toarray()
        begins = touched[:, off] & ~touched[:, off - 1]
        total += float(weights[first : first + step] @ begins.sum(axis=1))
    return total


def displacement(perm: ArrayLike, reference: ArrayLike | None = None) -> float:
    """Return S(perm), how far the indices are from their places in a reference order, in [0, 1].

    S = sum_i abs(p_i - r_i) / floor(n^2 / 2), p and r the positions of index i in the two orders:
    Spearman's footrule over its maximum, which the reversed order attains.
    Source: Diaconis and Graham, J. R. Stat. Soc. B 39(2), 1977.

    Parameters
    ----------
    perm : array_like of int, shape [n]
    reference : array_like of int, shape [n], optional
        The order to stay near; the identity if omitted.
    """
    order = as_permutation(perm)
    place = invert(order).astype(np.int64)
    start = np.arange(order.size) if reference is None else invert(reference).astype(np.int64)
    as_permutation(start, order.size)
    most = order.size**2 // 2
    return float(np.abs(place - start).sum()) / most if most else 0.0
