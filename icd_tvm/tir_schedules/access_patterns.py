"""Which elements a TIR function touches together, by evaluating its index expressions.

Index expressions are evaluated with numpy over the loop nest, so floor division, modulo, guards
and indirect indices through constant arrays are exact; nothing is approximated by intervals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from icd_tvm.core.cost import TileAccess
from icd_tvm.errors import ConfigError, ShapeError
from icd_tvm.tir_schedules.access_domain import Domain
from icd_tvm.tir_schedules.index_eval import Constants, Ints, Loop, Points
from icd_tvm.tir_schedules.split_loops import split_fused
from icd_tvm.tir_schedules.tensor_access import THREADS, Access, Affine, accesses, affine

__all__ = [
    "Access",
    "Affine",
    "Incidence",
    "accesses",
    "affine",
    "merge_equal",
    "reduction_windows",
    "split_fused",
    "window_incidence",
]

Window = Literal["vector", "warp", "sector", "line", "tile", "cta", "reduction", "all"]
WINDOWS = ("vector", "warp", "sector", "line", "tile", "cta", "reduction", "all")

_LANES = ("vectorized", "intrinsic")
_WARP = 32
_MAX_WARPS = 32
_POINT_CAP = 1 << 26


@dataclass(frozen=True, eq=False)
class Incidence:
    """Which indices of an axis each window touches.

    Attributes
    ----------
    matrix : csr_matrix of bool, shape [windows, n]
    counts : float64[windows]
        How many windows of the execution a row stands for: loops that the access does not
        depend on multiply it, and so does sampling.
    error : float
        0 when exact. When windows were sampled: bound on the error of the relative frequency of
        any event that a window decides, such as touching i and j both, that holds with
        probability 0.999 (Hoeffding's inequality).
    """

    matrix: sp.csr_matrix
    counts: NDArray[np.float64]
    error: float = 0.0

    def tile_access(self, tile: int, weight: float = 1.0, label: str = "") -> TileAccess:
        """Return the input of the solver: these windows on a kernel that handles ``tile``s."""
        return TileAccess(self.matrix, tile, weight, label, self.counts)


def window_incidence(
    access: Access,
    axis_of: int | Callable[..., Ints],
    window: Window,
    *,
    consts: Constants | None = None,
    nonzero: NDArray[np.bool_] | None = None,
    logical: Callable[..., Sequence[Ints]] | None = None,
    length: int | None = None,
    line_bytes: int = 64,
    point_cap: int = _POINT_CAP,
    seed: int = 0,
) -> Incidence:
    """Return which indices of one axis each window of an access touches.

    Loops that the access does not depend on only multiply ``counts``; they are not enumerated.

    Parameters
    ----------
    access : Access
    axis_of : int or callable
        The axis of the logical buffer, or a function of the logical indices (one int64[N] array
        for each) that gives the index on the axis, int64[N].
    window : {"vector", "warp", "sector", "line", "tile", "cta", "reduction", "all"}
        Elements that belong together: one vector instruction of one thread; one request of a
        warp of 32 threads; 32 bytes; ``line_bytes``; the register tile, which is what the loops
        inside the innermost reduction loop touch (without one: the unrolled and vector loops);
        one CTA or parallel chunk; one step of the reduction loops; the whole access.
    consts : mapping of str to ndarray, optional
        Values of the buffers that index expressions load from, by name.
    nonzero : ndarray of bool, optional
        Shape of the logical buffer; where False, an element does not count as touched.
    logical : callable, optional
        Maps buffer indices (one int64[N] array each) to logical indices, for packed buffers.
        Logical indices outside the logical shape are padding and do not count.
    length : int, optional
        Length of the axis where neither the buffer nor ``nonzero`` gives it.
    line_bytes : int
        Bytes of a cache line.
    point_cap : int
        Evaluate at most this many points; beyond, windows are sampled (see Incidence.error).
    seed : int
        Of the sampling.

    Returns
    -------
    Incidence
        Windows that touch nothing after ``nonzero`` keep an empty row.

    Raises
    ------
    ConfigError, ShapeError, UnsupportedOpError
        If an argument is invalid, an index cannot be evaluated, or a window by address is
        beyond ``point_cap``.
    """
    if window not in WINDOWS:
        raise ConfigError(f"window={window!r} is unknown", ", ".join(WINDOWS))
    shape = _logical_shape(access, nonzero, logical)
    n = _axis_length(shape, axis_of, length)
    access = split_fused(access, keep_threads=window == "warp")
    domain = Domain(access, _window_loops(access, window), window == "warp", consts or {})
    naming = _Naming(access, window, domain, line_bytes)
    ids, cells = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for points in domain.points(naming.by_address, point_cap, seed):
        index = [np.broadcast_to(points.value(i), points.size) for i in access.indices]
        place = list(logical(*index)) if logical is not None else list(index)
        axis = place[axis_of] if isinstance(axis_of, int) else axis_of(*place)
        axis = np.broadcast_to(np.asarray(axis, dtype=np.int64), points.size)
        keep = _inside(place, shape) & (axis >= 0) & (axis < n)
        if nonzero is not None:
            keep[keep] = nonzero[tuple(np.asarray(p)[keep] for p in place)]
        name = naming.ids(points, index)
        ids.append(_distinct(name))
        cells.append(_distinct(name[keep] * n + axis[keep]))
    names, touched = _distinct(np.concatenate(ids)), _distinct(np.concatenate(cells))
    rows = np.searchsorted(names, touched // n)
    matrix = sp.csr_matrix(
        (np.ones(touched.size, dtype=np.bool_), (rows, touched % n)), shape=(names.size, n)
    )
    factor = 1.0 if naming.by_address else domain.repeats * domain.scale
    return Incidence(matrix, np.full(names.size, factor), domain.error)


def merge_equal(
    windows: NDArray[np.bool_], counts: NDArray[np.float64]
) -> tuple[sp.csr_matrix, NDArray[np.float64]]:
    """Return distinct windows, and the sum of the counts of those that are equal.

    Parameters
    ----------
    windows : ndarray of bool, shape [windows, n]
    counts : float64[windows]

    Returns
    -------
    csr_matrix of bool, shape [distinct, n]
    float64[distinct]
    """
    if windows.all():
        return sp.csr_matrix(windows[:1]), counts.sum(keepdims=True)
    packed = np.packbits(windows, axis=1)
    _, first, of = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    merged = np.bincount(of.ravel(), weights=counts, minlength=len(first))
    return sp.csr_matrix(windows[first]), np.asarray(merged, dtype=np.float64)


def _distinct(values: Ints) -> Ints:
    """np.unique, without sorting where the range of values is small."""
    top = int(values.max(initial=0)) + 1
    if top > 64 * max(values.size, 1 << 16):
        return np.unique(values)
    seen = np.zeros(top, dtype=np.bool_)
    seen[values] = True
    return np.flatnonzero(seen)


def reduction_windows(
    access: Access,
    axis_of: int | Callable[..., Ints],
    *,
    consts: Constants | None = None,
    nonzero: NDArray[np.bool_] | None = None,
    logical: Callable[..., Sequence[Ints]] | None = None,
) -> Incidence:
    """Return what each step of the reduction loops touches; see :func:`window_incidence`.

    For the masked weight of a matmul: row k holds the columns n with a non-zero (k, n), which
    are the windows of a V-row kernel.
    """
    return window_incidence(
        access, axis_of, "reduction", consts=consts, nonzero=nonzero, logical=logical
    )


def _logical_shape(
    access: Access, nonzero: NDArray[np.bool_] | None, logical: object
) -> tuple[int, ...] | None:
    if nonzero is not None:
        if logical is None and nonzero.shape != access.shape:
            raise ShapeError(f"nonzero {nonzero.shape} differs from {access.name} {access.shape}")
        return nonzero.shape
    return access.shape if logical is None else None


def _axis_length(
    shape: tuple[int, ...] | None, axis_of: int | Callable[..., Ints], length: int | None
) -> int:
    if length is not None:
        return length
    if shape is None or not isinstance(axis_of, int):
        raise ConfigError("the length of the axis is unknown", "pass length")
    if not 0 <= axis_of < len(shape) or shape[axis_of] < 0:
        raise ConfigError(f"axis {axis_of} is no axis of known length of {shape}", "pass length")
    return shape[axis_of]


def _inside(place: Sequence[Any], shape: tuple[int, ...] | None) -> NDArray[np.bool_]:
    keep = np.ones(np.asarray(place[0]).shape, dtype=np.bool_)
    for values, size in zip(place, shape or (), strict=False):
        keep &= (np.asarray(values) >= 0) & (np.asarray(values) < size)
    return keep


def _window_loops(access: Access, window: str) -> list[Loop]:
    """Return the loops whose values tell one window from another."""
    loops = access.loops
    if window == "vector":
        return [p for p in loops if p.tag not in _LANES]
    if window == "warp":
        return [p for p in loops if p.tag not in _LANES and p.tag not in THREADS]
    if window == "tile":
        reducing = [k for k, p in enumerate(loops) if p.reduction and p.tag not in _LANES]
        if reducing:
            return list(loops[: reducing[-1] + 1])
        return [p for p in loops if p.tag not in (*_LANES, "unrolled")]
    if window == "cta":
        return [p for p in loops if p.tag == "parallel" or p.tag.startswith("blockIdx")]
    if window == "reduction":
        return [p for p in loops if p.reduction]
    return []


class _Naming:
    """Gives each point the number of its window."""

    def __init__(self, access: Access, window: str, domain: Domain, line_bytes: int) -> None:
        self.access = access
        self.by_address = window in ("sector", "line")
        self.unit = 32 if window == "sector" else line_bytes
        self.digits = [p for p in domain.main if p.var in domain.window_vars]
        self.threads = [
            p for tag in THREADS for p in domain.main if window == "warp" and p.tag == tag
        ]
        if self.by_address and min(access.shape, default=0) < 0:
            raise ConfigError(f"{access.name} {access.shape} is symbolic", "specialise it")
        # Loops of varying bounds get 31 bits, the others what their extent needs.
        self.radix = [p.constant_extent or 1 << 31 for p in self.digits]
        if math.prod(self.radix) >= 1 << 48:
            raise ConfigError(f"{access.name}: too many {window} windows to number")

    def ids(self, points: Points, index: Sequence[Ints]) -> Ints:
        """Return the window of each point, int64[N]."""
        ids = np.zeros(points.size, dtype=np.int64)
        if self.by_address:
            for values, extent in zip(index, self.access.shape, strict=True):
                ids = ids * extent + values
            return ids * self.access.item_bits // (8 * self.unit)
        for loop, radix in zip(self.digits, self.radix, strict=True):
            low = 0 if loop.constant_extent is None else points.value(loop.minimum)
            ids = ids * radix + (points.env[loop.var] - low)
        if self.threads:
            ids = ids * _MAX_WARPS + self._thread(points) // _WARP
        return ids

    def _thread(self, points: Points) -> Ints:
        ids = np.zeros(points.size, dtype=np.int64)
        for loop in self.threads:
            ids = ids * int(loop.extent) + points.env[loop.var]
        return ids
