"""Values, times and energy of CUDA kernels on the device at hand.

Times are *cold* where every launch has buffers of its own, in turn, that together exceed the L2
cache three times over, and *warm* where all launches share one set.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from icd_tvm.errors import IcdError, MeasurementError
from icd_tvm.measure.cuda_driver import CudaDevice
from icd_tvm.measure.cuda_reference import Arrays, make_trial
from icd_tvm.measure.energy import MIN_WINDOW_S, MIN_WINDOWS, as_json, measure_energy
from icd_tvm.measure.nvml import NvmlDevice
from icd_tvm.tir_schedules.cuda.catalogue import Entry
from icd_tvm.tir_schedules.cuda.source_kernel import numpy_dtype

# Share of the limit by which a part must have begun its last item; what is left goes to the next.
PARTS = {
    "correctness": 0.20,
    "times": 0.32,
    "peers": 0.38,
    "models": 0.58,
    "model_energy": 0.78,
    "model_counters": 0.88,
    "model_peers": 0.93,
    "counters": 0.97,
    "energy": 1.0,
}
REPEATS, LAUNCHES = 20, 20
MAX_SETS = 64
COPY_BYTES = 1 << 30
# Arms whose energy and counters are read: dense, and the same with half of it gone.
CHOSEN = (
    "bert ffn1 4096 rows fp16",
    "bert ffn1 4096 rows fp16, half of the units",
    "bert ffn1 4096 rows fp16, half of the blocks",
    "mamba in_proj fp16",
    "mamba in_proj fp16, half of the blocks",
)


class Clock:
    """What is left of the time."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s, self._began = limit_s, time.monotonic()

    def spent(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self._began

    def over(self, part: str) -> bool:
        """Say whether a part may begin nothing more."""
        return self.left(part) < 0

    def left(self, part: str) -> float:
        """Return the seconds until a part may begin nothing more."""
        return PARTS[part] * self.limit_s - self.spent()


class Buffers:
    """Sets of arrays of a rule on the device."""

    def __init__(self, device: CudaDevice, entry: Entry, inputs: Arrays, sets: int) -> None:
        self._device, self._kernels = device, entry.rule.kernels
        arguments = {a.name: a for kernel in self._kernels for a in kernel.arguments}
        self._sizes = {
            name: int(np.prod(a.shape)) * numpy_dtype(a.dtype).itemsize
            for name, a in arguments.items()
        }
        self._sets: list[dict[str, int]] = []
        for _ in range(sets):
            self._sets.append({name: device.empty(size) for name, size in self._sizes.items()})
        for pointers in self._sets:
            for name, array in inputs.items():
                device.upload(pointers[name], array)

    @staticmethod
    def size(entry: Entry) -> int:
        """Return the bytes of one set."""
        arguments = {a.name: a for kernel in entry.rule.kernels for a in kernel.arguments}
        return sum(
            int(np.prod(a.shape)) * numpy_dtype(a.dtype).itemsize for a in arguments.values()
        )

    def call(self, index: int = 0) -> None:
        """Start the rule's kernels on one set."""
        pointers = self._sets[index % len(self._sets)]
        for kernel in self._kernels:
            self._device.launch(kernel, [pointers[a.name] for a in kernel.arguments])

    def outputs(self) -> Arrays:
        """Return what the kernels wrote to the first set."""
        found = {}
        for kernel in self._kernels:
            for a in kernel.arguments[-kernel.outputs :]:
                found[a.name] = np.empty(a.shape, numpy_dtype(a.dtype))
                self._device.download(self._sets[0][a.name], found[a.name])
        return found

    def free(self) -> None:
        """Give all memory back."""
        for pointers in self._sets:
            for pointer in pointers.values():
                self._device.free(pointer)


def check_values(device: CudaDevice, entries: Iterable[Entry], clock: Clock) -> dict[str, Any]:
    """Compare every kernel's outputs with float64."""

    def one(entry: Entry) -> dict[str, Any]:
        trial = make_trial(entry.rule)
        buffers = Buffers(device, entry, trial.inputs, 1)
        try:
            buffers.call()
            worst = trial.check(buffers.outputs())
        finally:
            buffers.free()
        return {"error_of_allowed": worst, "correct": worst <= 1.0}

    return each(entries, clock, "correctness", one)


def measure_times(device: CudaDevice, entries: Iterable[Entry], clock: Clock) -> dict[str, Any]:
    """Time every rule, cold and warm."""

    def one(entry: Entry) -> dict[str, Any]:
        inputs = make_trial(entry.rule, rows=1).inputs
        sets = sets_of(device, entry)
        found: dict[str, Any] = {"sets": sets, "set_bytes": Buffers.size(entry)}
        # Sets of the smallest rules do not exceed the cache even if there are many.
        found["cold_is_cold"] = sets * Buffers.size(entry) >= 3 * device.l2_bytes
        for label, count in (("cold", sets), ("warm", 1)):
            buffers = Buffers(device, entry, inputs, count)
            try:
                found[label] = _timed(device, buffers.call, max(LAUNCHES, count))
            finally:
                buffers.free()
        return found

    return each(entries, clock, "times", one)


def _timed(device: CudaDevice, call: Callable[[int], None], launches: int) -> dict[str, Any]:
    def all_of_them() -> None:
        for index in range(launches):
            call(index)

    try:
        work, how = device.graph(all_of_them), "graph"
    except MeasurementError as error:
        work, how = all_of_them, f"stream ({error})"
    for _ in range(3):
        work()
    device.wait()
    times = [device.seconds(work) / launches * 1e6 for _ in range(REPEATS)]
    low, middle, high = np.percentile(times, (25, 50, 75))
    return {"us": middle, "q25": low, "q75": high, "repeats": REPEATS, "by": how}


def copy_rate(device: CudaDevice) -> float:
    """Return bytes read and written in a second by a copy on the device."""
    source, to = device.empty(COPY_BYTES), device.empty(COPY_BYTES)
    try:
        device.copy(to, source, COPY_BYTES)
        times = [
            device.seconds(lambda: device.copy(to, source, COPY_BYTES)) for _ in range(REPEATS)
        ]
    finally:
        device.free(source)
        device.free(to)
    return 2 * COPY_BYTES / float(np.median(times))


def count_joules(device: CudaDevice, entries: Iterable[Entry], clock: Clock) -> dict[str, Any]:
    """Count joules of back-to-back calls, arms in order and back."""
    counter = NvmlDevice()
    chosen = [entry for entry in entries if entry.name in CHOSEN]
    fits = int((clock.left("energy") / (1.2 * MIN_WINDOW_S) - 1) // MIN_WINDOWS)
    if fits < 1:
        raise MeasurementError("no time is left for a window")
    arms, kept = {}, []
    for entry in chosen[:fits]:
        sets = sets_of(device, entry)
        buffers = Buffers(device, entry, make_trial(entry.rule, rows=1).inputs, sets)
        kept.append(buffers)
        arms[entry.name] = _finished(device, _graph_of(device, buffers, 200))
    try:
        found = measure_energy(arms, counter)
    finally:
        for buffers in kept:
            buffers.free()
    return {name: {**as_json(record), "rules_per_call": 200} for name, record in found.items()}


def _graph_of(device: CudaDevice, buffers: Buffers, launches: int) -> Callable[[], None]:
    def work() -> None:
        for index in range(launches):
            buffers.call(index)

    return device.graph(work)


def _finished(device: CudaDevice, work: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        work()
        device.wait()

    return call


def sets_of(device: CudaDevice, entry: Entry, most: int = MAX_SETS) -> int:
    """Return how many sets of buffers exceed the L2 cache three times over, 2 to ``most``."""
    return int(np.clip(3 * device.l2_bytes // Buffers.size(entry) + 1, 2, most))


def each(
    entries: Iterable[Entry], clock: Clock, part: str, one: Callable[[Entry], dict[str, Any]]
) -> dict[str, Any]:
    """Return what ``one`` gives for each rule; a failure is recorded and the next one follows."""
    found: dict[str, Any] = {}
    for entry in entries:
        if clock.over(part):
            found[entry.name] = "not measured: no time is left"
            continue
        try:
            found[entry.name] = one(entry)
        except IcdError as error:
            found[entry.name] = f"not measured: {error}"
    return found
