"""NVIDIA GPUs through NVML: energy counter, sampled power, clocks and throttle reasons.

The energy counter is the measurement; sampled power is a cross-check. On Hopper
``nvmlDeviceGetPowerUsage`` is an average over one second, so the instantaneous field is read.
Source: NVML API reference (nvmlDeviceGetTotalEnergyConsumption, NVML_FI_DEV_POWER_INSTANT).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from icd_tvm.errors import MeasurementError

try:
    import pynvml
except ImportError:  # pragma: no cover - a dependency of the package
    pynvml = None

# Field identifiers of nvml.h; not every release of the bindings names them.
POWER_AVERAGE, POWER_INSTANT = 185, 186
DEFAULT_RATE_HZ = 10.0


@dataclass(frozen=True)
class PowerSample:
    """One sample of the device's state; None where the device does not tell.

    Attributes
    ----------
    t : float
        Seconds of the monotonic clock.
    watts : float
        Instantaneous power where the device has it, else its running average.
    sm_mhz, memory_mhz : int or None
    celsius : int or None
    throttle : int or None
        Bit mask ``nvmlClocksEventReasons``.
    """

    t: float
    watts: float
    sm_mhz: int | None
    memory_mhz: int | None
    celsius: int | None
    throttle: int | None


class NvmlDevice:
    """One GPU; an :class:`icd_tvm.measure.energy.EnergyCounter`.

    Parameters
    ----------
    index : int
        As ``nvidia-smi`` numbers them.

    Raises
    ------
    MeasurementError
        If there is no driver, no such device, or the device has no energy counter (before Volta).
    """

    source = "nvml"

    def __init__(self, index: int = 0) -> None:
        if pynvml is None:
            raise MeasurementError("package nvidia-ml-py is not installed")
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except pynvml.NVMLError as error:
            raise MeasurementError(f"NVML device {index}: {error}", _hint(error)) from error
        self.power_window = self._power_window()

    def joules(self) -> float:
        """Return the joules since the driver was loaded; ticks every 20-100 ms."""
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) * 1e-3

    def sample(self) -> PowerSample:
        """Return power, clocks, temperature and throttle reasons now."""
        return PowerSample(
            time.perf_counter(),
            self._watts(),
            _optional(lambda: pynvml.nvmlDeviceGetClockInfo(self._handle, pynvml.NVML_CLOCK_SM)),
            _optional(lambda: pynvml.nvmlDeviceGetClockInfo(self._handle, pynvml.NVML_CLOCK_MEM)),
            _optional(
                lambda: pynvml.nvmlDeviceGetTemperature(self._handle, pynvml.NVML_TEMPERATURE_GPU)
            ),
            _optional(lambda: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle)),
        )

    @contextmanager
    def sampling(self, rate_hz: float = DEFAULT_RATE_HZ) -> Iterator[list[PowerSample]]:
        """Sample in a thread while the body runs; the list fills as it goes."""
        samples: list[PowerSample] = []
        stop = threading.Event()

        def loop() -> None:
            while not stop.is_set():
                samples.append(self.sample())
                stop.wait(1 / rate_hz)

        thread = threading.Thread(target=loop, name="nvml-sampler", daemon=True)
        thread.start()
        try:
            yield samples
        finally:
            stop.set()
            thread.join()

    def _watts(self) -> float:
        if self.power_window == "instant":
            values = pynvml.nvmlDeviceGetFieldValues(self._handle, [POWER_INSTANT])
            return float(values[0].value.uiVal) * 1e-3
        return float(pynvml.nvmlDeviceGetPowerUsage(self._handle)) * 1e-3

    def _power_window(self) -> str:
        """Return ``instant`` or what the device averages over instead."""
        try:
            values = pynvml.nvmlDeviceGetFieldValues(self._handle, [POWER_INSTANT])
            if values[0].nvmlReturn == pynvml.NVML_SUCCESS:
                return "instant"
        except pynvml.NVMLError:
            pass
        return "average of one second (Ampere GA10x, Hopper) or less (older)"


def integral_joules(samples: list[PowerSample]) -> float | None:
    """Return the trapezoid integral of sampled power; None for fewer than two samples."""
    if len(samples) < 2:
        return None
    times = np.array([s.t for s in samples])
    watts = np.array([s.watts for s in samples])
    return float(np.sum((watts[1:] + watts[:-1]) / 2 * np.diff(times)))


def power_csv(samples: list[PowerSample]) -> str:
    """Return the samples as CSV with a header; empty cells where the device does not tell."""
    names = list(PowerSample.__dataclass_fields__)
    rows = [["" if v is None else str(v) for v in asdict(s).values()] for s in samples]
    return "\n".join(",".join(row) for row in [names, *rows]) + "\n"


def _optional(read: Any) -> int | None:
    try:
        return int(read())
    except pynvml.NVMLError:
        return None


def _hint(error: Any) -> str:
    text = str(error)
    if "Shared Library Not Found" in text or "Driver Not Loaded" in text:
        return "install the NVIDIA driver; inside a container start it with --gpus"
    if "Not Supported" in text:
        return "the energy counter needs Volta or newer"
    return ""
