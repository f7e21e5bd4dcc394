"""The GPU suite's models on the CPU: compiled, run and timed by stand-ins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import build_models
from benchmarks.gpu.machine import TvmMachine
from benchmarks.gpu.models import Models
from benchmarks.gpu.recipes import Draws
from icd_tvm._tvm import relax, tvm
from icd_tvm.errors import MeasurementError
from icd_tvm.runtime import bundled_run


class OnCpu(build_models.Device):
    """Compiles for the CPU what would be compiled for a GPU; kernels are TVM's own."""

    def lower(self, mod: Any, dtype: str) -> Any:
        # Folding would make floats of int8 weights.
        folded = mod if dtype == "int8" else relax.transform.FoldConstant()(mod)
        return relax.transform.LegalizeOps()(folded)

    def compile(self, mod: Any, path: Path) -> None:
        tvm.compile(mod, tvm.target.Target("llvm")).export_library(str(path))


class NoGraphs:
    """A device whose time is the number of calls, in milliseconds, and that captures no graphs."""

    l2_bytes, stream = 64, 0

    def wait(self) -> None:
        pass

    def graph(self, work: Callable[[], Any]) -> Callable[[], None]:
        raise MeasurementError("no graphs here")

    def seconds(self, work: Callable[[], Any]) -> float:
        work()
        return 1e-3

    def empty(self, size: int) -> int:
        return size

    def copy(self, to: int, source: int, size: int) -> None:
        assert size == 2 * self.l2_bytes

    def free(self, pointer: int) -> None:
        pass

    @contextmanager
    def profiled(self) -> Iterator[None]:
        yield


def machine(folder: Path) -> TvmMachine:
    return TvmMachine(NoGraphs(), folder)  # type: ignore[arg-type]


def opened(folder: Path, make: Callable[[Path], TvmMachine] = machine) -> Models:
    """Return the models, run by the CPU in place of a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundled_run, "find_device", lambda kind, place: tvm.cpu())
        return Models(folder, "sm_90", make)


class Actual(Draws):
    """Draws the weights that the model has."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        super().__init__({})
        self._known = {name: a.reshape(-1, a.shape[-1]) for name, a in arrays.items()}
