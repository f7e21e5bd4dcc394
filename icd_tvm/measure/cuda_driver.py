"""CUDA's driver through ctypes: memory, kernels, events and graphs; no TVM, no toolkit.

Source: CUDA Driver API reference, CUDA 12 and 13. Written without a device at hand.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm.errors import MeasurementError
from icd_tvm.tir_schedules.cuda.source_kernel import SourceKernel

LIBRARY = "libcuda.so.1"
# CUdevice_attribute, CUfunction_attribute and CUstreamCaptureMode of cuda.h.
_MULTIPROCESSORS, _L2_BYTES, _MAJOR, _MINOR = 16, 38, 75, 76
_DYNAMIC_SHARED = 8
_CAPTURE_THREAD_LOCAL = 1


class CudaDevice:
    """The first GPU, in its primary context, with a stream and the kernels of a cubin.

    Raises
    ------
    MeasurementError
        If there is no driver or no device.
    """

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise MeasurementError(f"no NVIDIA driver: {LIBRARY} is not found") from error
        self._call("cuInit", 0)
        self._device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(self._device), 0)
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._call("cuCtxSetCurrent", context)
        self._stream = self._new("cuStreamCreate", 1)
        self._functions: dict[str, ctypes.c_void_p] = {}

    @property
    def name(self) -> str:
        """What the driver calls the device."""
        text = ctypes.create_string_buffer(200)
        self._call("cuDeviceGetName", text, 200, self._device)
        return text.value.decode()

    @property
    def arch(self) -> str:
        """``sm_80``, ``sm_90``, ..."""
        return f"sm_{self._attribute(_MAJOR)}{self._attribute(_MINOR)}"

    @property
    def l2_bytes(self) -> int:
        """Size of the L2 cache."""
        return self._attribute(_L2_BYTES)

    @property
    def multiprocessors(self) -> int:
        """How many there are."""
        return self._attribute(_MULTIPROCESSORS)

    @property
    def stream(self) -> int:
        """The stream's handle, for whoever else starts work that is to be timed."""
        return int(self._stream.value or 0)

    def load(self, image: bytes, kernels: Sequence[SourceKernel]) -> None:
        """Load machine code that holds ``kernels``."""
        module = self._new("cuModuleLoadData", image)
        for kernel in kernels:
            function = self._new("cuModuleGetFunction", module, kernel.name.encode())
            self._call("cuFuncSetAttribute", function, _DYNAMIC_SHARED, kernel.shared)
            self._functions[kernel.name] = function

    def empty(self, size: int) -> int:
        """Return the address of new memory."""
        pointer = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
        return pointer.value

    def free(self, pointer: int) -> None:
        """Give memory back."""
        self._call("cuMemFree_v2", ctypes.c_uint64(pointer))

    def upload(self, pointer: int, array: npt.NDArray[Any]) -> None:
        """Copy an array to the device."""
        data = np.asarray(array, order="C")
        self._call(
            "cuMemcpyHtoD_v2",
            ctypes.c_uint64(pointer),
            ctypes.c_void_p(data.ctypes.data),
            ctypes.c_size_t(data.nbytes),
        )
        # From pageable memory the call may return before the copy has landed, and our stream does
        # not wait for it.
        self._call("cuCtxSynchronize")

    def download(self, pointer: int, array: npt.NDArray[Any]) -> None:
        """Wait for the stream and copy into an array."""
        self.wait()
        self._call(
            "cuMemcpyDtoH_v2",
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_uint64(pointer),
            ctypes.c_size_t(array.nbytes),
        )

    def copy(self, to: int, source: int, size: int) -> None:
        """Copy on the device, on the stream."""
        self._call(
            "cuMemcpyDtoDAsync_v2",
            ctypes.c_uint64(to),
            ctypes.c_uint64(source),
            ctypes.c_size_t(size),
            self._stream,
        )

    def launch(self, kernel: SourceKernel, pointers: Sequence[int]) -> None:
        """Start a kernel on the stream."""
        values = [ctypes.c_uint64(pointer) for pointer in pointers]
        arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        sizes = (*kernel.grid, kernel.threads, 1, 1, kernel.shared)
        self._call(
            "cuLaunchKernel",
            self._functions[kernel.name],
            *(ctypes.c_uint(size) for size in sizes),
            self._stream,
            arguments,
            None,
        )

    def wait(self) -> None:
        """Return when the stream is done; an error of a kernel is raised here."""
        self._call("cuStreamSynchronize", self._stream)

    def graph(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture what ``work`` starts; return what starts it again as one graph."""
        self._call("cuStreamBeginCapture_v2", self._stream, _CAPTURE_THREAD_LOCAL)
        captured = ctypes.c_void_p()
        try:
            work()
        finally:
            self._call("cuStreamEndCapture", self._stream, ctypes.byref(captured))
        ready = self._new("cuGraphInstantiateWithFlags", captured, ctypes.c_ulonglong(0))
        return lambda: self._call("cuGraphLaunch", ready, self._stream)

    def seconds(self, work: Callable[[], None]) -> float:
        """Return the time between two events around what ``work`` starts."""
        first, last = (self._new("cuEventCreate", ctypes.c_uint(0)) for _ in range(2))
        self._call("cuEventRecord", first, self._stream)
        work()
        self._call("cuEventRecord", last, self._stream)
        self._call("cuEventSynchronize", last)
        milliseconds = ctypes.c_float()
        self._call("cuEventElapsedTime", ctypes.byref(milliseconds), first, last)
        for event in (first, last):
            self._call("cuEventDestroy_v2", event)
        return milliseconds.value / 1e3

    @contextmanager
    def profiled(self) -> Iterator[None]:
        """Let profilers that wait for it look at what runs inside."""
        self._call("cuProfilerStart")
        try:
            yield
        finally:
            self._call("cuProfilerStop")

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), number, self._device)
        return value.value

    def _new(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """Call a function that writes a handle to its first argument."""
        handle = ctypes.c_void_p()
        self._call(name, ctypes.byref(handle), *arguments)
        return handle

    def _call(self, name: str, *arguments: Any) -> None:
        try:
            status = getattr(self._library, name)(*arguments)
        except AttributeError as error:
            raise MeasurementError(f"the driver has no {name}") from error
        if status:
            text = {2: "out of memory", 100: "no device", 209: "no code for this device"}
            raise MeasurementError(f"{name}: CUDA error {status} {text.get(status, '')}".strip())
