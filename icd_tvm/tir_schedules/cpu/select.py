"""Which matmul kernel is fastest for a weight with zeros: measured once per shape, or modelled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm._tvm import tvm
from icd_tvm.errors import ConfigError
from icd_tvm.tir_schedules.cpu.block_sparse import (
    BlockSparseRule,
    kept_rows,
    rowlist_matmul,
    vrow_matmul,
    vrow_tile,
)
from icd_tvm.tir_schedules.cpu.dense import DenseRule, dense_matmul
from icd_tvm.tir_schedules.cpu.stack import compile_kernel
from icd_tvm.tir_schedules.cpu.tile import Tile, choose_tile, flat_rows, tile_cycles
from icd_tvm.tir_schedules.target import vector_bits

KINDS = ("dense", "vrow16", "vrow32", "rowlist")
# The row index is one more load per step, which only one-vector tiles feel; Zen 5.
_INDEX_COST = 1.08
# A kernel must beat the dense one by more than the noise of a measurement.
_MARGIN = 0.97
_REPEATS, _MIN_SECONDS = 12, 1e-3

Key = tuple[str, str, tuple[int, ...], int]
_SECONDS: dict[Key, float] = {}


@dataclass(frozen=True)
class KernelChoice:
    """A matmul kernel: its kind, the rows of W it reads per group, and why it was chosen."""

    kind: str
    nk: int
    reason: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"unknown matmul kernel {self.kind!r}", f"use one of {KINDS}")

    @property
    def group(self) -> int:
        """Columns per group of a V-row kernel; 0 for the others."""
        return int(self.kind[4:]) if self.kind.startswith("vrow") else 0


def choose_matmul_kernel(
    m: int,
    k: int,
    n: int,
    weight: npt.NDArray[Any],
    target: Any,
    *,
    lead: tuple[int, ...] = (),
    tune: bool = True,
) -> KernelChoice:
    """Return the fastest kernel for ``X[*lead, m, k] @ weight``.

    Parameters
    ----------
    m, k, n : int
        Rows of X and the shape of the weight.
    weight : array [K, N] of float32
        Only its zeros matter.
    target : tvm.target.Target
        LLVM target.
    lead : tuple of int, optional
        Leading batch axes of X.
    tune : bool, optional
        Time each candidate once on this machine, on random data of these sizes; the times are
        kept for the life of the process. Otherwise compare modelled cycles.

    Returns
    -------
    KernelChoice
        ``reason`` holds the figures: measured microseconds, or ``model`` and the ratio.
    """
    kept = {kind: rows for kind, rows in candidate_rows(weight, target).items() if rows < k}
    if not kept:
        return KernelChoice("dense", k, "every group of columns needs every row")
    shape = (*lead, m, k, n)
    cost: Callable[[str, int], float]
    if tune:
        cost = lambda kind, nk: measured_seconds(kind, shape, nk, target)  # noqa: E731
    else:
        cost = lambda kind, nk: modelled_cycles(kind, shape, nk, target)  # noqa: E731
    dense = cost("dense", k)
    costs = {kind: cost(kind, nk) for kind, nk in kept.items()}
    best = min(costs, key=lambda kind: costs[kind])
    ratio = costs[best] / dense
    note = f"measured {costs[best] * 1e6:.0f} us, dense {dense * 1e6:.0f} us" if tune else "model"
    if ratio >= _MARGIN:
        return KernelChoice("dense", k, f"{note}: {best} is {ratio:.2f} of dense")
    return KernelChoice(best, kept[best], f"{note}: {ratio:.2f} of dense")


def candidate_rows(weight: npt.NDArray[Any], target: Any) -> dict[str, int]:
    """Return the rows per group that each sparse kernel would read, by kind."""
    lanes = vector_bits(target) // 32
    rows = {f"vrow{v}": kept_rows(weight, v) for v in (16, 32) if v % lanes == 0}
    used = int(np.count_nonzero(np.asarray(weight).any(axis=1)))
    return {**rows, "rowlist": max(1, used)}


def build_matmul(kind: str, shape: tuple[int, ...], nk: int, target: Any) -> Any:
    """Return the TIR function of one kernel kind for ``shape = (*lead, m, k, n)``."""
    *lead, m, k, n = shape
    if kind.startswith("vrow"):
        return vrow_matmul(m, k, n, nk, int(kind[4:]), lead=tuple(lead), target=target)
    tile = choose_tile(flat_rows(tuple(lead), m)[1], k, n, target)
    if kind == "rowlist":
        return rowlist_matmul(m, k, n, nk, tile, tuple(lead))
    return dense_matmul(m, k, n, tile, tuple(lead))


def modelled_cycles(kind: str, shape: tuple[int, ...], nk: int, target: Any) -> float:
    """Return the modelled cycles of one kernel; see `tile_cycles` for what is counted."""
    lead, m = flat_rows(shape[:-3], shape[-3])
    k, n = shape[-2:]
    tile = _tile(kind, m, k, n, target)
    factor = _INDEX_COST if kind != "dense" and tile.vectors == 1 else 1.0
    return float(np.prod(lead, dtype=float)) * tile_cycles(tile, m, k, n) * nk * factor


def measured_seconds(kind: str, shape: tuple[int, ...], nk: int, target: Any) -> float:
    """Return the least time of one run on random data; measured once per process."""
    key = (str(target), kind, shape, nk)
    if key not in _SECONDS:
        _SECONDS[key] = _time(build_matmul(kind, shape, nk, target), shape, target)
    return _SECONDS[key]


def _tile(kind: str, m: int, k: int, n: int, target: Any) -> Tile:
    if kind.startswith("vrow"):
        return vrow_tile(m, k, n, int(kind[4:]), target)
    return choose_tile(m, k, n, target)


def _time(func: Any, shape: tuple[int, ...], target: Any) -> float:
    rule = DenseRule().apply(func, target, False) or BlockSparseRule().apply(func, target, False)
    library = compile_kernel(rule.mod["main"], target)
    rng = np.random.default_rng(0)
    arguments = [tvm.runtime.tensor(_random(rng, param, shape[-2])) for param in func.params]
    run = library.mod.time_evaluator(
        "main", tvm.cpu(), number=1, repeat=_REPEATS, min_repeat_ms=int(_MIN_SECONDS * 1e3)
    )
    return float(run(*arguments).min)


def _random(rng: np.random.Generator, buffer: Any, k: int) -> npt.NDArray[Any]:
    shape = tuple(int(extent) for extent in buffer.ty.shape)
    if str(buffer.ty.dtype) == "int32":
        rows = [np.sort(rng.permutation(k)[: shape[-1]]) for _ in range(int(np.prod(shape[:-1])))]
        return np.asarray(rows, np.int32).reshape(shape)
    return rng.standard_normal(shape, dtype=np.float32)
