"""What can be refused before anything is written, and the threads of the run."""

from __future__ import annotations

import os
from typing import Any

from icd_tvm._tvm import tvm_ffi
from icd_tvm.config import Config
from icd_tvm.errors import ConfigError
from icd_tvm.measure.cuda_toolkit import find_cudart, find_nvcc
from icd_tvm.runtime.evaluate import parse_quality
from icd_tvm.runtime.transforms import Transform, find_transforms
from icd_tvm.tir_schedules.target import cuda_arch, host_target, parse_target, runs_here


def prepare(config: Config) -> tuple[Any, list[Transform]]:
    """Return the target and the transforms of a configuration; set the number of threads.

    Raises
    ------
    ConfigError
        If one of them, or the quality metric, is unknown.
    MissingDependencyError
        If the target is a CUDA device and its compiler is missing.
    """
    transforms = find_transforms(config)
    target = _target(config)
    if config.quality.metric is not None:
        parse_quality(config.quality.metric)
    if config.threads:
        set_pool_threads(config.threads)
    return target, transforms


def set_pool_threads(count: int) -> None:
    """Size TVM's pool, and leave the calling thread free to move.

    TVM binds the caller to a CPU. Threads that start later inherit that: those of a BLAS that is
    first used then would spin on one CPU together, ten times slower than one alone.
    """
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    tvm_ffi.get_global_func("runtime.config_threadpool")(1, count)
    if affinity is not None:
        os.sched_setaffinity(0, affinity)


def _target(config: Config) -> Any:
    """Return the CPU target; for a device or CPU that this machine is not, that of the host.

    It decides and verifies then.
    """
    if cuda_arch(config.target) is None:
        target = parse_target(config.target, config.threads)
        lent = config.measure.rpc is not None
        return target if lent or runs_here(target) else host_target(config.threads)
    if config.measure.rpc is not None:
        raise ConfigError("a CUDA target cannot be timed over RPC", "leave out --rpc")
    find_nvcc()
    find_cudart()
    return host_target(config.threads)
