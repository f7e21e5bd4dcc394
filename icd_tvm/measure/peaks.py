"""What this machine reaches: fp32 operations and bytes read in a second, by two small kernels.

Both are compiled here and run on the threads of TVM's pool; the best of several runs counts, as a
roof is what can be reached. Source: Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from tvm.script import tirx as T

from icd_tvm._tvm import tvm, tvm_ffi
from icd_tvm.errors import MeasurementError
from icd_tvm.measure.environment import last_level_cache_bytes
from icd_tvm.tir_schedules.cpu.emit import AHEAD, LINE, prefetch
from icd_tvm.tir_schedules.cpu.stack import compile_kernel
from icd_tvm.tir_schedules.target import vector_bits

# Chains of fused multiply-adds that do not wait for each other: latency 4, two ports, some room.
_CHAINS, _STEPS = 12, 1 << 15
_ROUNDS, _LEAST_S = 7, 0.3
_LEAST_BYTES, _MOST_BYTES = 64 << 20, 1 << 30
# Lines that the reader fetches together, and sums that hide the latency of an addition.
_PAGE_LINES, _SUMS = 64, 8
# A call must be long against waking the threads.
_PARTS = 8


def machine_peaks(target: Any) -> dict[str, Any]:
    """Measure the roof of this machine; once a process for each target.

    Parameters
    ----------
    target : tvm.target.Target
        LLVM target of the arms; decides the vector width.

    Returns
    -------
    dict
        ``peak_flops`` (fp32, 1/s), ``dram_bandwidth`` (bytes read, 1/s), ``buffer_bytes``,
        ``threads`` and ``source``, which says how both came about.

    Raises
    ------
    MeasurementError
        If a kernel cannot be compiled or run.
    """
    threads = int(tvm_ffi.get_global_func("runtime.NumThreads")())
    return dict(_measured(str(target), threads))


def memory_reader(target: Any) -> tuple[Callable[[], Any], int]:
    """Return a call that reads memory once, in order, and the bytes it reads.

    To be timed in turns with what is compared to the bandwidth: alone, it finds a part of what it
    reads in the last-level cache.

    Parameters
    ----------
    target : tvm.target.Target
    """
    threads = int(tvm_ffi.get_global_func("runtime.NumThreads")())
    size, _ = _buffer_bytes()
    return _reader(_PARTS * threads, size, target), size


@cache
def _measured(text: str, threads: int) -> dict[str, Any]:
    target = tvm.target.Target(text)
    lanes, parts = vector_bits(target) // 32, _PARTS * threads
    size, cached = _buffer_bytes()
    try:
        flops = parts * _STEPS * _CHAINS * lanes * 2 / least_time(_multiplier(lanes, parts, target))
        read = size / least_time(_reader(parts, size, target))
    except tvm.error.TVMError as error:
        raise MeasurementError(f"the roof could not be measured: {error}") from error
    note = "; the buffer may lie in the last-level cache" if cached else ""
    return {
        "peak_flops": flops,
        "dram_bandwidth": read,
        "buffer_bytes": size,
        "threads": threads,
        "source": f"measured, fp32, threads: {threads}, best of {_LEAST_S} s; reading "
        f"{size >> 20} MiB{note}",
    }


def _buffer_bytes() -> tuple[int, bool]:
    """Return the size to read, four times the last-level cache within bounds, and if it fits it."""
    cache = last_level_cache_bytes()
    size = min(max(4 * cache, _LEAST_BYTES), _MOST_BYTES)
    return size, size <= 2 * cache


def least_time(call: Callable[[], Any]) -> float:
    """Return the least seconds of a call; a busy neighbour must not be there all the time."""
    call()
    seconds: list[float] = []
    while len(seconds) < _ROUNDS or sum(seconds) < _LEAST_S:
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _multiplier(lanes: int, parts: int, target: Any) -> Callable[[], Any]:
    run = tvm.compile(_fma_chains(lanes, parts), target)["main"]
    factors = tvm.runtime.tensor(np.full((2, lanes), 0.5, np.float32))
    sums = tvm.runtime.tensor(np.zeros((parts, _CHAINS, lanes), np.float32))
    return lambda: run(factors, sums)


def _reader(parts: int, size: int, target: Any) -> Callable[[], Any]:
    steps = size // parts // (_PAGE_LINES * LINE)
    run = compile_kernel(_row_sums(parts, steps), target)["main"]
    rows = tvm.runtime.tensor(np.zeros((parts, steps, _PAGE_LINES, LINE // 4), np.float32))
    sums = tvm.runtime.tensor(np.zeros((parts, _SUMS, LINE // 4), np.float32))
    return lambda: run(rows, sums)


def _fma_chains(lanes: int, parts: int) -> Any:
    """Return a function whose every step multiplies and adds to each of its sums."""

    @T.prim_func(s_tir=True)
    def main(factors_: T.handle, sums_: T.handle) -> None:
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        factors = T.match_buffer(factors_, (2, lanes), "float32")
        sums = T.match_buffer(sums_, (parts, _CHAINS, lanes), "float32")
        for part in T.parallel(parts):
            kept = T.alloc_buffer((_CHAINS, lanes), "float32", scope="local")
            for chain in T.unroll(_CHAINS):
                for lane in T.vectorized(lanes):
                    kept[chain, lane] = factors[0, lane] * T.Cast("float32", chain)
            for _ in range(_STEPS):
                for chain in T.unroll(_CHAINS):
                    for lane in T.vectorized(lanes):
                        kept[chain, lane] = kept[chain, lane] * factors[0, lane] + factors[1, lane]
            for chain in T.unroll(_CHAINS):
                for lane in T.vectorized(lanes):
                    sums[part, chain, lane] = kept[chain, lane]

    return main


def _row_sums(parts: int, steps: int) -> Any:
    """Return a function that reads every number once, each part a run of its own.

    It fetches ahead as the kernels that are held against it do, but a whole page at once: on
    Zen 5 a tenth to a fifth faster than line by line, and as fast as any product reads.
    """
    ahead, width = AHEAD // (_PAGE_LINES * LINE), LINE // 4

    @T.prim_func(s_tir=True)
    def main(rows_: T.handle, sums_: T.handle) -> None:
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        rows = T.match_buffer(rows_, (parts, steps, _PAGE_LINES, width), "float32")
        sums = T.match_buffer(sums_, (parts, _SUMS, width), "float32")
        for part in T.parallel(parts):
            kept = T.alloc_buffer((_SUMS, width), "float32", scope="local")
            for chain in T.unroll(_SUMS):
                for lane in T.vectorized(width):
                    kept[chain, lane] = T.float32(0)
            for step in range(steps):
                for line in T.unroll(_PAGE_LINES):
                    T.evaluate(prefetch(rows[part, step + ahead, line, 0]))
                for turn in T.unroll(_PAGE_LINES // _SUMS):
                    for chain in T.unroll(_SUMS):
                        for lane in T.vectorized(width):
                            kept[chain, lane] = (
                                kept[chain, lane] + rows[part, step, turn * _SUMS + chain, lane]
                            )
            for chain in T.unroll(_SUMS):
                for lane in T.vectorized(width):
                    sums[part, chain, lane] = kept[chain, lane]

    return main
