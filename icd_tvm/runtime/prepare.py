"""What can be refused before anything is written, and the threads of the run."""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import tvm_ffi
from icd_tvm.config import Config
from icd_tvm.runtime.evaluate import parse_quality
from icd_tvm.runtime.transforms import Transform, find_transforms
from icd_tvm.tir_schedules.target import parse_target


def prepare(config: Config) -> tuple[Any, list[Transform]]:
    """Return the target and the transforms of a configuration; set the number of threads.

    Raises
    ------
    ConfigError
        If one of them, or the quality metric, is unknown.
    """
    transforms = find_transforms(config)
    target = parse_target(config.target, config.threads)
    if config.quality.metric is not None:
        parse_quality(config.quality.metric)
    if config.threads:
        tvm_ffi.get_global_func("runtime.config_threadpool")(1, config.threads)
    return target, transforms
