"""What runs libraries of models on the GPU host, and one arm made of a library and its arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from icd_tvm.errors import MeasurementError
from icd_tvm.measure.cuda_driver import CudaDevice

Array = npt.NDArray[Any]


class Machine(Protocol):
    """What runs libraries: TVM on a GPU, or in tests on the CPU."""

    def load(self, library: Path) -> Callable[..., Any]:
        """Return ``main`` of a library."""

    def tensor(self, array: Array) -> Any:
        """Return an array on the device."""

    def free_bytes(self) -> int | None:
        """Return the device's free memory; None if it does not say."""

    def arrays(self, outputs: Any) -> list[Array]:
        """Wait, and return all outputs as numpy."""


class TvmMachine:
    """TVM's small runtime, which starts everything on the stream of the suite's device.

    Raises
    ------
    MeasurementError
        If TVM, its CUDA part or a GPU is missing.
    """

    def __init__(self, device: CudaDevice, folder: Path) -> None:
        try:
            import tvm_ffi

            from icd_tvm.runtime import bundled_run
        except (ImportError, RuntimeError) as error:
            raise MeasurementError(f"TVM's runtime cannot be loaded: {error}") from error
        try:
            self._kind = bundled_run.find_device("cuda", folder)
        except RuntimeError as error:
            raise MeasurementError(str(error)) from error
        self._tvm, self._machine, self._wait = (
            bundled_run.tvm,
            bundled_run.VirtualMachine,
            device.wait,
        )
        # For the rest of the process; else the events of our stream would lie around nothing.
        tvm_ffi.use_raw_stream(self._kind, device.stream).__enter__()

    def load(self, library: Path) -> Callable[..., Any]:
        """Return ``main`` of a library."""
        module = self._tvm.runtime.load_module(str(library))
        main: Callable[..., Any] = self._machine(module, self._kind)["main"]
        return main

    def tensor(self, array: Array) -> Any:
        """Return an array on the GPU."""
        return self._tvm.runtime.tensor(np.asarray(array, order="C"), self._kind)

    def free_bytes(self) -> int | None:
        """Return the GPU's free memory; None on the CPU."""
        found = self._kind.available_global_memory
        return None if found is None else int(found)

    def arrays(self, outputs: Any) -> list[Array]:
        """Wait, and return all outputs as numpy."""
        self._wait()
        flat = [outputs] if isinstance(outputs, self._tvm.runtime.Tensor) else list(outputs)
        return [tensor.numpy() for tensor in flat]


class ArmRun:
    """One arm, ready to be called; its inputs are its own, since states may be written in place."""

    def __init__(
        self, main: Callable[..., Any], inputs: list[list[Any]], parameters: list[Any]
    ) -> None:
        self._main, self._inputs, self._parameters = main, inputs, parameters

    def __call__(self, index: int = 0) -> Any:
        """Start the model on one set of inputs; return its outputs.

        Nothing is kept: a call that is captured must find the memory that one before it gave back.
        """
        return self._main(*self._inputs[index % len(self._inputs)], *self._parameters)

    def steps(self, count: int) -> Any:
        """Return the outputs after ``count`` calls, states fed back; a model without: of one."""
        ids, *states = self._inputs[0]
        outputs = self()
        for _ in range(count - 1 if self._has_states(outputs) else 0):
            states = list(outputs)[1:]
            outputs = self._main(ids, *states, *self._parameters)
        return outputs

    def _has_states(self, outputs: Any) -> bool:
        return hasattr(outputs, "__len__") and len(outputs) == len(self._inputs[0]) > 1


def feed(item: Mapping[str, Any], fill: str, seed: int) -> Array:
    """Return the values of an input: ``ids:LIMIT``, ``ones`` or ``zeros``."""
    shape, dtype = tuple(item["shape"]), np.dtype(item["dtype"])
    if fill.startswith("ids:"):
        limit = int(fill.removeprefix("ids:"))
        return np.random.default_rng(seed).integers(0, limit, shape).astype(dtype)
    return np.full(shape, fill == "ones", dtype)
