"""What this machine reaches in products of bytes: a loop of ``vpdpbusd`` in registers."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from icd_tvm._tvm import i64, tvm, tvm_ffi
from icd_tvm.errors import ConfigError
from icd_tvm.measure.peaks import least_time
from icd_tvm.tir_schedules.cpu.dot_product import DotProduct, dot_product
from icd_tvm.tir_schedules.cpu.emit import i32, local
from icd_tvm.tir_schedules.cpu.stack import compile_kernel

# As many sums as hide the latency of four or five cycles on two ports.
_CHAINS, _STEPS, _PARTS = 16, 1 << 15, 8
_ONES = 0x01010101


def byte_peak(target: Any) -> float:
    """Measure the operations a second of products of bytes on the threads of TVM's pool.

    A product and its sum are two operations, so one 32-bit lane of an instruction has eight.

    Parameters
    ----------
    target : tvm.target.Target
        LLVM target of this machine.

    Raises
    ------
    ConfigError
        If the target has no ``vpdpbusd``: what replaces it would be moved out of the loop.
    """
    dot = dot_product(target)
    if not dot.native:
        raise ConfigError(f"{target} has no vpdpbusd", "there is no byte peak to measure")
    parts = _PARTS * int(tvm_ffi.get_global_func("runtime.NumThreads")())
    run = compile_kernel(_chains(dot, parts), target)["main"]
    weights = tvm.runtime.tensor(np.ones(4 * dot.lanes, np.int8))
    sums = tvm.runtime.tensor(np.zeros((parts, _CHAINS, dot.lanes), np.int32))
    return parts * _STEPS * _CHAINS * dot.lanes * 8 / least_time(lambda: run(weights, sums))


def _chains(dot: DotProduct, parts: int) -> Any:
    """Return a function whose every step adds four products of bytes to each of its sums."""
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})
        weights = T.arg("weights", T.Buffer((i64(4 * dot.lanes),), "int8"))
        shape = (i64(parts), i64(_CHAINS), i64(dot.lanes))
        sums = T.arg("sums", T.Buffer(shape, "int32"))
        weight = weights[T.ramp(i64(0), i64(1), 4 * dot.lanes)]
        lanes = T.ramp(i64(0), i64(1), dot.lanes)
        with T.parallel(i64(parts)) as part, T.sblock("chains"):
            kept = local(_CHAINS, dot.lanes, dtype="int32")
            with T.unroll(i64(_CHAINS)) as chain:
                T.buffer_store(kept, sums[part, chain, lanes], [chain, lanes])
            with T.serial(i64(_STEPS)), T.unroll(i64(_CHAINS)) as chain:
                total = dot.add(kept[chain, lanes], i32(_ONES), weight)
                T.buffer_store(kept, total, [chain, lanes])
            with T.unroll(i64(_CHAINS)) as chain:
                T.buffer_store(sums, kept[chain, lanes], [part, chain, lanes])
    return builder.get()
