"""Which matmul kernel is fastest for a weight with zeros: timed, or modelled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from icd_tvm.errors import ConfigError
from icd_tvm.tir_schedules.cpu.matmul_kinds import (
    KINDS,
    candidate_rows,
    modelled_cycles,
)
from icd_tvm.tir_schedules.cpu.time_kernels import timed_kernels
from icd_tvm.tir_schedules.target import runs_here

# A kernel must beat a simpler one by more than the noise of a measurement.
_MARGIN = 0.97
# Kernels modelled this much slower than the best one are not timed.
_HOPELESS = 1.2


@dataclass(frozen=True)
class KernelChoice:
    """A matmul kernel: its kind, the rows of W it reads per group, and why it was chosen."""

    kind: str
    nk: int
    reason: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"unknown matmul kernel {self.kind!r}", f"use one of {KINDS}")


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
        Time the kernels that the model does not rule out, on this machine and on random data of
        about these sizes (`timed_kernels`). Otherwise, and for a CPU that this machine is not,
        compare modelled cycles.

    Returns
    -------
    KernelChoice
        ``reason`` says whether the ratio to the dense kernel was measured or modelled.
    """
    kept = {kind: rows for kind, rows in candidate_rows(weight, target).items() if rows < k}
    if not kept:
        return KernelChoice("dense", k, "every group of columns needs every row")
    shape = (*lead, m, k, n)
    kept = {"dense": k, **kept}
    costs = {kind: modelled_cycles(kind, shape, rows, target) for kind, rows in kept.items()}
    tune = tune and runs_here(target)
    if tune:
        limit = _HOPELESS * min(costs.values())
        timed = {
            kind: rows for kind, rows in kept.items() if kind == "dense" or costs[kind] <= limit
        }
        costs = timed_kernels(timed, shape, target)
    best = preferred(costs)
    source = "measured, scaled by the model" if tune else "model"
    if best != "dense":
        return KernelChoice(
            best, kept[best], f"{source}: {costs[best] / costs['dense']:.2f} of dense"
        )
    rival = min((kind for kind in costs if kind != "dense"), key=costs.__getitem__, default="")
    if not rival:
        return KernelChoice("dense", k, "model: no sparse kernel comes near")
    ratio = costs[rival] / costs["dense"]
    return KernelChoice("dense", k, f"{source}: {rival} is {ratio:.2f} of dense")


def preferred(costs: Mapping[str, float]) -> str:
    """Return the simplest kind that no other one beats by more than 3 %.

    Parameters
    ----------
    costs : Mapping[str, float]
        Kind -> time in any unit.
    """
    least = min(costs.values())
    return next(kind for kind in KINDS if kind in costs and costs[kind] * _MARGIN <= least)
