"""A pilot: one matmul kernel on one mask, many orders of one axis, each of them timed.

The kernel is the one the compiler builds, packed for each order. Every layout computes the same
function, which is checked, so the times compare layouts and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from icd_tvm._tvm import tvm
from icd_tvm.core import starts
from icd_tvm.core.combined_cost import combined_cost
from icd_tvm.core.cost import (
    TileAccess,
    incidence_distance,
    incidence_modularity,
    tile_cost,
    tile_upper_bound,
)
from icd_tvm.core.joint import block_count
from icd_tvm.core.permutation import Perm, identity
from icd_tvm.core.solver import fit_permutation
from icd_tvm.errors import ConfigError, VerificationError
from icd_tvm.measure.latency import balanced_orders
from icd_tvm.tir_schedules.cpu.block_sparse import BlockSparseRule
from icd_tvm.tir_schedules.cpu.matmul_kinds import build_matmul, pack_matmul
from icd_tvm.tir_schedules.cpu.stack import compile_kernel
from icd_tvm.tir_schedules.target import host_target

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]

KERNELS = ("vrow16", "vrow32", "rowlist")
MASKS = ("vec", "unstructured", "block", "rows")
# Floats of one cache line: the tile of an axis that is read by gathers.
_LINE = 16
# Side of the blocks whose count is the score of a tile that is not the kernel's.
WRONG_SIDE = 16
_TOLERANCE = 1e-3
_WARMUP = 3
# Times one layout is packed again, to see what the place of its arrays in memory does.
_COPIES = 3


@dataclass(frozen=True)
class PilotCase:
    """One kernel on one masked weight.

    Attributes
    ----------
    kernel : {"vrow16", "vrow32", "rowlist"}
        A V-row kernel is timed over orders of the output axis (N); a row list is the same
        length for each of those, so it is timed over orders of the reduced axis (K).
    m, k, n : int
        Rows of X and the shape of the weight.
    mask : {"vec", "unstructured", "block", "rows"}
        ``vec``: groups of 16 scattered columns share their rows; ``block``: 16 x 16 blocks over
        scattered rows and columns; ``rows``: whole rows.
    density : float
        Share of the weights that are not zero, in (0, 1).

    Raises
    ------
    ConfigError
        If a field is out of range, or the mask does not divide the shape.
    """

    kernel: str
    m: int
    k: int
    n: int
    mask: str
    density: float

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS or self.mask not in MASKS:
            raise ConfigError(
                f"pilot case {self.kernel} on {self.mask}",
                f"kernels: {', '.join(KERNELS)}; masks: {', '.join(MASKS)}",
            )
        if min(self.m, self.k, self.n) < 1 or not 0 < self.density < 1:
            raise ConfigError(f"pilot case {self.name}: sizes or density out of range")
        if self.mask in ("vec", "block") and (self.n % 16 or self.k % 16):
            raise ConfigError(f"pilot case {self.name}: 16 does not divide {self.k} x {self.n}")

    @property
    def name(self) -> str:
        """Kernel, shape and mask as one word."""
        sparsity = round(100 * (1 - self.density))
        return f"{self.kernel} {self.m}x{self.k}x{self.n} {self.mask} {sparsity} %"

    @property
    def tile(self) -> int:
        """Positions of the permuted axis that the kernel handles as one unit."""
        return _LINE if self.kernel == "rowlist" else int(self.kernel[4:])


@dataclass(frozen=True, eq=False)
class PilotTimes:
    """What one case gave.

    Attributes
    ----------
    case : PilotCase
    orders : dict of str to int32 array
        The order of each layout.
    scores : list of dict
        One a layout, see :func:`layout_scores`.
    samples : float64 array, shape [rounds, layouts]
        CPU seconds of the thread.
    copies : float64 array, shape [rounds, copies], optional
        The same for the first layout, packed again for each column.
    """

    case: PilotCase
    orders: dict[str, Perm]
    scores: list[dict[str, float]]
    samples: npt.NDArray[np.float64]
    copies: npt.NDArray[np.float64] | None = None


def run_case(
    case: PilotCase,
    *,
    rounds: int = 40,
    solve_s: float = 5.0,
    layouts: int = 14,
    seed: int = 0,
    target: Any = None,
) -> PilotTimes:
    """Build, check and time every layout of a case in interleaved rounds.

    Parameters
    ----------
    case : PilotCase
    rounds : int
        Interleaved rounds.
    solve_s : float
        Wall-clock limit of each solver run, seconds.
    layouts : int
        The most layouts to time.
    seed : int
    target : tvm.target.Target, optional
        One thread of this machine if omitted.

    Returns
    -------
    PilotTimes

    Raises
    ------
    VerificationError
        If a layout computes something else than the reference.
    """
    target = target or host_target(threads=1)
    weight = masked_weight(case, seed)
    access = case_access(case, weight != 0)
    orders = dict(list(pilot_orders(access, solve_s, seed).items())[:layouts])
    x = np.random.default_rng([seed, 1]).standard_normal((case.m, case.k), dtype=np.float32)
    libraries: dict[int, Any] = {}
    timed = [*orders.values(), *[next(iter(orders.values()))] * _COPIES]
    arms = [_arm(case, x, weight, order, target, libraries) for order in timed]
    samples = thread_times(arms, rounds, seed)
    return PilotTimes(
        case,
        orders,
        [layout_scores(case, weight != 0, access, order) for order in orders.values()],
        samples[:, : len(orders)],
        samples[:, len(orders) :],
    )


def thread_times(
    arms: Sequence[Callable[[], object]], rounds: int, seed: int
) -> npt.NDArray[np.float64]:
    """Return the CPU seconds of this thread in each call, float64 [rounds, arms].

    One call of every arm a round, in balanced orders. Unlike wall-clock time, that of the thread
    does not grow while another process has the core, so short kernels can be ranked on a machine
    that is not idle.
    """
    schedule = balanced_orders(len(arms), seed)
    for _ in range(_WARMUP):
        for arm in arms:
            arm()
    samples = np.empty((rounds, len(arms)))
    for row in samples:
        for k in next(schedule):
            start = time.thread_time_ns()
            arms[k]()
            row[k] = max(time.thread_time_ns() - start, 1) * 1e-9
    return samples


def masked_weight(case: PilotCase, seed: int) -> Floats:
    """Return a random weight [k, n] under the mask of a case.

    Rows and columns differ in scale, as those of trained layers do, so that an unstructured mask
    has fuller and emptier columns.
    """
    rng = np.random.default_rng([seed, case.k, case.n])
    weight = rng.standard_normal((case.k, case.n))
    weight *= np.exp(0.3 * rng.standard_normal(case.n))
    weight *= np.exp(0.2 * rng.standard_normal((case.k, 1)))
    return np.where(_mask(case, weight, rng), weight, 0.0).astype(np.float32)


def _mask(case: PilotCase, weight: npt.NDArray[np.float64], rng: np.random.Generator) -> Mask:
    power = weight**2
    if case.mask == "unstructured":
        return power > np.quantile(power, 1 - case.density)
    if case.mask == "rows":
        norm = power.sum(axis=1, keepdims=True)
        return np.broadcast_to(norm > np.quantile(norm, 1 - case.density), weight.shape)
    rows = rng.permutation(case.k) if case.mask == "block" else np.arange(case.k)
    cols = rng.permutation(case.n)
    side = 16 if case.mask == "block" else 1
    tiles = power[np.ix_(rows, cols)].reshape(case.k // side, side, -1, 16).sum(axis=(1, 3))
    # Every group of columns keeps the same number of rows, as the adapters do.
    kept = max(1, round(case.density * tiles.shape[0]))
    keep = np.argsort(np.argsort(-tiles, axis=0, kind="stable"), axis=0) < kept
    mask = np.zeros(weight.shape, dtype=np.bool_)
    mask[np.ix_(rows, cols)] = np.kron(keep, np.ones((side, 16), dtype=np.bool_))
    return mask


def case_access(case: PilotCase, mask: Mask) -> TileAccess:
    """Return what the kernel of a case touches on the axis that is permuted.

    V-row: a window is one row of W, one step of the reduction, and all groups of columns take as
    many steps as the one with the longest list. Row list: every row of X is read
    at the rows of the list, by cache lines.
    """
    if case.kernel != "rowlist":
        return TileAccess(sp.csr_matrix(mask), case.tile, padded=True)
    used = sp.csr_matrix(np.asarray(mask.any(axis=1))[None, :])
    return TileAccess(used, case.tile, counts=np.array([float(case.m)]))


def pilot_orders(access: TileAccess, solve_s: float, seed: int) -> dict[str, Perm]:
    """Return named orders of very different quality; equal ones are left out."""
    n = access.n
    rng = np.random.default_rng([seed, 2])
    items, weights = starts.stacked_items([access])

    def solved(steps: int, kernel: TileAccess = access) -> Perm:
        return fit_permutation(
            accesses=[kernel], time_budget_s=solve_s, refine_steps=steps, rng_seed=seed
        )[0]

    best = solved(2_000)
    rules: dict[str, Callable[[], Perm]] = {
        "identity": lambda: identity(n),
        "solver": lambda: best,
        "solver, sum": lambda: solved(2_000, replace(access, padded=False)),
        "norm sort": lambda: starts.norm_order(items, weights),
        "shuffled 20 %": lambda: shuffled(best, 0.2, rng),
        "shuffled 5 %": lambda: shuffled(best, 0.05, rng),
        "random": lambda: rng.permutation(n).astype(np.int32),
        "shuffled 50 %": lambda: shuffled(best, 0.5, rng),
        "spectral": lambda: starts.incidence_fiedler_order(items, weights),
        "greedy": lambda: starts.greedy_order(
            items, weights, access.tile, deadline=time.perf_counter() + solve_s
        ),
        "solver, no steps": lambda: solved(0),
        "solver, 30 steps": lambda: solved(30),
        "shuffled 1 %": lambda: shuffled(best, 0.01, rng),
        "shuffled 2 %": lambda: shuffled(best, 0.02, rng),
        "shuffled 10 %": lambda: shuffled(best, 0.1, rng),
        "shuffled 30 %": lambda: shuffled(best, 0.3, rng),
    }
    orders: dict[str, Perm] = {}
    for name, rule in rules.items():
        order = rule()
        if not any(np.array_equal(order, known) for known in orders.values()):
            orders[name] = order
    return orders


def shuffled(order: Perm, share: float, rng: np.random.Generator) -> Perm:
    """Return ``order`` with the items of a random ``share`` of its positions permuted."""
    count = min(order.size, max(2, round(share * order.size)))
    places = rng.permutation(order.size)[:count]
    result = order.copy()
    result[places] = order[rng.permutation(places)]
    return result


def layout_scores(case: PilotCase, mask: Mask, access: TileAccess, order: Perm) -> dict[str, float]:
    """Return the scores of one order, lower is better.

    ``U`` is what the kernel handles: for a V-row kernel groups * (rows of the longest list), for
    a row list the cache lines of X. ``U_sum`` adds the groups' own lists instead. ``U_wrong``
    counts 16 x 16 blocks. ``-Q`` has blocks of one tile, C saturates at one tile, and J combines
    C, Q and ``U`` / ``U_max`` with the default weights.
    """
    plain = replace(access, padded=False)
    axes = (order, identity(case.n)) if case.kernel == "rowlist" else (identity(case.k), order)
    units, most = tile_cost([access], order), tile_upper_bound([access])
    quality = incidence_modularity([plain], order, access.tiles)
    distance = incidence_distance([plain], order, access.tile)
    return {
        "U": units,
        "U_sum": tile_cost([plain], order),
        "U_wrong": float(block_count(mask, WRONG_SIDE, WRONG_SIDE, *axes)),
        "-Q": -quality,
        "C": distance,
        "J": combined_cost(distance, quality, units / most),
        "U_max": most,
    }


def _arm(
    case: PilotCase,
    x: Floats,
    weight: Floats,
    order: Perm,
    target: Any,
    libraries: dict[int, Any],
) -> Callable[[], object]:
    """Return a call of the kernel packed for ``order``, after checking what it computes."""
    rows = case.kernel == "rowlist"
    permuted = np.ascontiguousarray(weight[order] if rows else weight[:, order])
    packed = pack_matmul(case.kernel, permuted, (case.m, case.k, case.n), target)
    kept = int(packed["rows"].shape[-1])
    if kept not in libraries:
        libraries[kept] = _compiled(case, kept, target)
    main = libraries[kept]
    result = tvm.runtime.tensor(np.empty((case.m, case.n), np.float32))
    inputs = [x[:, order] if rows else x, *packed.values()]
    arguments = [*(tvm.runtime.tensor(np.ascontiguousarray(a)) for a in inputs), result]
    main(*arguments)
    expected = x @ weight if rows else (x @ weight)[:, order]
    gap = float(np.abs(result.numpy() - expected).max())
    if not gap <= _TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise VerificationError(f"pilot {case.name}: a layout is off by {gap:.2e}")
    return lambda: main(*arguments)


def _compiled(case: PilotCase, kept: int, target: Any) -> Any:
    func = build_matmul(case.kernel, (case.m, case.k, case.n), kept, target)
    schedule = BlockSparseRule().apply(func, target, False)
    return compile_kernel(schedule.mod["main"], target)["main"]
