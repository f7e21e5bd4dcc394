"""Time matmul kernels against each other, interleaved, once per class of shapes and machine."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm._tvm import tvm
from icd_tvm.errors import OutputError
from icd_tvm.files import default_cache
from icd_tvm.steps import steps
from icd_tvm.tir_schedules.cpu.block_sparse import BlockSparseRule
from icd_tvm.tir_schedules.cpu.dense import DenseRule
from icd_tvm.tir_schedules.cpu.kernel_database import FILE_NAME, KernelDatabase
from icd_tvm.tir_schedules.cpu.matmul_kinds import (
    build_matmul,
    dense_kernel,
    group_width,
    modelled_cycles,
    pack_matmul,
)
from icd_tvm.tir_schedules.cpu.stack import compile_kernel
from icd_tvm.tir_schedules.cpu.tile_builder import ExplicitTileRule
from icd_tvm.tir_schedules.cpu.transposed_sparse import TransposedSparseRule

_RULES = (DenseRule, BlockSparseRule, TransposedSparseRule, ExplicitTileRule)
_MIN_ROUNDS, _MAX_ROUNDS, _SECONDS = 5, 40, 0.05
# Extents are rounded to two steps per power of two, kept rows to quarters of K.
_STEPS, _SHARES, _SMALL = 2, 4, 64
# Every call of an arm reads other copies of its weights: in a model they come from memory.
_COPY_BYTES = 16 * 2**20

Shape = tuple[int, ...]
Arm = Callable[[], Any]
_COMPILED: dict[tuple[str, str, Shape, int], Any] = {}
_TIMES: dict[str, dict[str, float]] = {}
_USED: Counter[str] = Counter()


def timed_kernels(rows: Mapping[str, int], shape: Shape, target: Any) -> dict[str, float]:
    """Return the least seconds of one run of each kernel, on random data.

    Timed on a shape of the same class (`reference_shape`) and scaled by `modelled_cycles`, so
    that the layers of a model, which differ by a few columns, share one measurement. All
    kernels of a comparison run in turns; results are kept in the `KernelDatabase`.

    Parameters
    ----------
    rows : Mapping[str, int]
        Kernel kind -> rows of W it reads per group.
    shape : tuple of int
        ``(*lead, m, k, n)``.
    target : tvm.target.Target

    Returns
    -------
    dict of str to float
        Seconds, by kind.
    """
    reference = reference_shape(shape)
    kept = {kind: _reference_rows(count, shape[-2], reference[-2]) for kind, count in rows.items()}
    times = _times(kept, reference, target)
    return {
        kind: seconds
        * modelled_cycles(kind, shape, rows[kind], target)
        / modelled_cycles(kind, reference, kept[kind], target)
        for kind, seconds in times.items()
    }


def comparisons() -> Counter[str]:
    """Return how many comparisons this process has timed, read from the database, found damaged."""
    return Counter(_USED)


def _times(rows: dict[str, int], shape: Shape, target: Any) -> dict[str, float]:
    """Return the seconds of the kernels on ``shape`` itself: known, kept, or timed now."""
    question = {"target": str(target), "shape": list(shape), "rows": rows}
    key = json.dumps(question, sort_keys=True)
    if key not in _TIMES:
        database = _database(_place())
        times = database.get(question)
        _USED["damaged lines"] = database.damaged
        _USED["kernel comparisons read"] += times is not None
        if times is None:
            kinds = steps(rows.items(), "timing kernels")
            times = least_seconds({k: _arm(k, shape, nk, target) for k, nk in kinds})
            database.put(question, times)
            _USED["kernel comparisons timed"] += 1
        _TIMES[key] = times
    return _TIMES[key]


def _place() -> Path:
    """Return the file of the database; without a home folder one that keeps nothing."""
    try:
        return default_cache() / FILE_NAME
    except OutputError:
        return Path(os.devnull)


@cache
def _database(path: Path) -> KernelDatabase:
    """Return the one object for a file, which says once what is wrong with it."""
    return KernelDatabase(path)


def reference_shape(shape: Shape) -> Shape:
    """Return the shape that stands for ``shape``: K and N rounded, rows and batch as they are.

    Small and ragged extents stay: their kernels differ.
    """
    *rows, k, n = shape
    return (*rows, _round(k), _round(n))


def least_seconds(arms: Mapping[str, Arm]) -> dict[str, float]:
    """Return the least wall time of each arm, run in turns for about 50 ms.

    Parameters
    ----------
    arms : Mapping[str, callable]
        What to time.
    """
    best = dict.fromkeys(arms, float("inf"))
    start, rounds = time.perf_counter(), 0
    while rounds < _MIN_ROUNDS or (rounds < _MAX_ROUNDS and time.perf_counter() - start < _SECONDS):
        for kind, arm in arms.items():
            before = time.perf_counter()
            arm()
            best[kind] = min(best[kind], time.perf_counter() - before)
        rounds += 1
    return best


def _round(extent: int) -> int:
    if extent < _SMALL or extent % 16:
        return extent
    step = (1 << (extent.bit_length() - 1)) // _STEPS
    return (extent + step // 2) // step * step


def _reference_rows(count: int, k: int, reference: int) -> int:
    return max(1, round(count / k * _SHARES)) * reference // _SHARES or 1


def _arm(kind: str, shape: Shape, nk: int, target: Any) -> Arm:
    """Return a call of one kernel on weights that are not in the caches."""
    *lead, m, k, n = shape
    rng = np.random.default_rng(0)
    constants, length = _pack(kind, _random_weight(kind, k, n, nk, rng), shape, target)
    key = (str(target), kind, shape, length)
    if key not in _COMPILED:
        _COMPILED[key] = _compile(build_matmul(kind, shape, length, target), target)
    main = _COMPILED[key]["main"]
    x = tvm.runtime.tensor(rng.standard_normal((*lead, m, k), dtype=np.float32))
    y = tvm.runtime.tensor(np.empty((*lead, m, n), np.float32))
    copies = max(1, _COPY_BYTES // sum(array.nbytes for array in constants))
    weights = cycle([[tvm.runtime.tensor(array) for array in constants] for _ in range(copies)])
    return lambda: main(x, *next(weights), y)


def _pack(
    kind: str, weight: npt.NDArray[Any], shape: Shape, target: Any
) -> tuple[list[npt.NDArray[Any]], int]:
    """Return the constants of a kernel and the length of its row lists."""
    if kind == "dense":
        return [dense_kernel(shape, target).pack(weight)], shape[-2]
    constants = pack_matmul(kind, weight, shape, target)
    return list(constants.values()), int(constants["rows"].shape[-1])


def _compile(func: Any, target: Any) -> Any:
    sch = next(s for s in (rule().apply(func, target, False) for rule in _RULES) if s)
    return compile_kernel(sch.mod["main"], target)


def _random_weight(
    kind: str, k: int, n: int, nk: int, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Return a weight of which every group of columns keeps ``nk`` random rows."""
    weight = np.zeros((k, n), np.float32)
    width = group_width(kind) or n
    for start in range(0, n, width):
        stop = min(start + width, n)
        rows = rng.permutation(k)[:nk]
        weight[rows, start:stop] = rng.standard_normal((nk, stop - start), dtype=np.float32)
    return weight
