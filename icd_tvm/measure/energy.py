"""Energy of arms, from a counter of the hardware: NVML on a GPU, RAPL on a CPU, else nothing.

A counter that ticks every 20-100 ms is read from tick to tick: a window starts and ends at a
change of the counter, so its joules and its seconds belong together. Arms take turns (A-B-B-A),
because a chip that warms up draws more. Sources: NVML API reference,
``nvmlDeviceGetTotalEnergyConsumption``; Linux ``Documentation/power/powercap``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from icd_tvm.errors import MeasurementError
from icd_tvm.steps import steps

# A window of five seconds holds at least 50 ticks of 100 ms.
MIN_WINDOW_S = 5.0
MIN_WINDOWS = 4
# A counter that stands still for this long does not count.
STALLED_S = 2.0


class EnergyCounter(Protocol):
    """A counter of joules since some moment.

    Attributes
    ----------
    source : str
        What is read, for the record.
    """

    source: str

    def joules(self) -> float:
        """Return the counter; never smaller than before."""


class RaplCounter:
    """Package energy of every CPU socket, from Linux powercap.

    Parameters
    ----------
    root : Path
        Where ``sys`` is found.

    Raises
    ------
    MeasurementError
        If there is no counter, or it may not be read; the message says how to enable it.
    """

    source = "rapl"

    def __init__(self, root: Path = Path("/")) -> None:
        zones = sorted((root / "sys/class/powercap").glob("intel-rapl:*"))
        self._zones = [z for z in zones if z.name.count(":") == 1 and (z / "energy_uj").exists()]
        if not self._zones:
            raise MeasurementError(
                "no RAPL counter in /sys/class/powercap",
                "bare-metal Linux has one (modprobe intel_rapl_msr); virtual machines hide it",
            )
        self._span = [self._read(z / "max_energy_range_uj") for z in self._zones]
        self._last = [self._read(z / "energy_uj") for z in self._zones]
        self._total = 0

    def joules(self) -> float:
        """Return the joules since the counter was opened; call within a wrap (a minute)."""
        for k, zone in enumerate(self._zones):
            now = self._read(zone / "energy_uj")
            step = now - self._last[k]
            self._total += step if step >= 0 else step + self._span[k]
            self._last[k] = now
        return self._total * 1e-6

    @staticmethod
    def _read(path: Path) -> int:
        try:
            return int(path.read_text())
        except PermissionError as error:
            raise MeasurementError(
                f"{path} may not be read", "run as root, or chmod a+r energy_uj"
            ) from error
        except (OSError, ValueError) as error:
            raise MeasurementError(f"{path} cannot be read: {error}") from error


@dataclass(frozen=True)
class Window:
    """One tick-to-tick window of calls.

    Attributes
    ----------
    calls : float
        Calls that fell into it.
    seconds, joules : float
    """

    calls: int
    seconds: float
    joules: float

    @property
    def watts(self) -> float:
        """Mean power."""
        return self.joules / self.seconds


@dataclass
class EnergyRecord:
    """Energy of one arm.

    Attributes
    ----------
    source : str
        The counter.
    joules_per_call : float
        Median over windows.
    net_joules_per_call : float or None
        With the idle power subtracted; None if idle was not measured.
    watts : float
        Median over windows.
    spread_pct : float
        Half the range of joules per call over its median, per cent.
    windows : list of Window
    """

    source: str
    joules_per_call: float
    net_joules_per_call: float | None
    watts: float
    spread_pct: float
    windows: list[Window] = field(default_factory=list)


def measure_energy(
    arms: Mapping[str, Callable[[], object]],
    counter: EnergyCounter,
    *,
    window_s: float = MIN_WINDOW_S,
    windows: int = MIN_WINDOWS,
    idle_s: float = MIN_WINDOW_S,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, EnergyRecord]:
    """Measure the energy of one call of each arm.

    Parameters
    ----------
    arms : mapping of str to callable
        A call returns only when its work is done.
    counter : EnergyCounter
    window_s : float
        Least seconds of a window, at least 5.
    windows : int
        Windows of each arm, at least 4 and even: arms run in order and back.
    idle_s : float
        Seconds of idling before the first arm, for the idle power; 0 skips it.
    clock, sleep : callable
        For tests.

    Raises
    ------
    MeasurementError
        No arms, a window too short, or a counter that stands still.
    """
    if not arms:
        raise MeasurementError("no arms to measure the energy of")
    if window_s < MIN_WINDOW_S or windows < MIN_WINDOWS or windows % 2:
        raise MeasurementError(
            f"energy: {windows} windows of {window_s} s are too few or too short",
            f"use an even number >= {MIN_WINDOWS} of windows >= {MIN_WINDOW_S} s",
        )
    idle = _window(lambda: sleep(0.01), counter, idle_s, clock) if idle_s else None
    found: dict[str, list[Window]] = {name: [] for name in arms}
    for turn in steps(range(windows), "counting energy"):
        for name in list(arms) if turn % 2 == 0 else list(arms)[::-1]:
            found[name].append(_window(arms[name], counter, window_s, clock))
    return {name: _record(counter.source, taken, idle) for name, taken in found.items()}


def _window(
    call: Callable[[], object],
    counter: EnergyCounter,
    least_s: float,
    clock: Callable[[], float],
) -> Window:
    """Call until the counter ticks, then for ``least_s`` and on to the next tick."""
    _, start, begun = _until_tick(call, counter, clock, 0.0)
    calls, end, ended = _until_tick(call, counter, clock, least_s)
    return Window(calls, ended - begun, end - start)


def _until_tick(
    call: Callable[[], object],
    counter: EnergyCounter,
    clock: Callable[[], float],
    least_s: float,
) -> tuple[int, float, float]:
    """Return the number of calls, and the joules and the time right after the tick."""
    begun, calls, joules = clock(), 0, counter.joules()
    changed = begun
    while True:
        call()
        calls += 1
        latest, now = counter.joules(), clock()
        if latest != joules:
            if now - begun >= least_s:
                return calls, latest, now
            joules, changed = latest, now
        elif now - changed > STALLED_S:
            raise MeasurementError(f"the {counter.source} counter stood still for {STALLED_S} s")


def _record(source: str, windows: list[Window], idle: Window | None) -> EnergyRecord:
    per_call = np.array([w.joules / w.calls for w in windows])
    net = [(w.joules - idle.watts * w.seconds) / w.calls for w in windows] if idle else None
    median = float(np.median(per_call))
    return EnergyRecord(
        source,
        median,
        float(np.median(net)) if net else None,
        float(np.median([w.watts for w in windows])),
        float(50 * (per_call.max() - per_call.min()) / median) if median else 0.0,
        windows,
    )


def open_counter(root: Path = Path("/")) -> tuple[EnergyCounter | None, str]:
    """Return the energy counter of this machine's CPU, or None and the reason."""
    try:
        return RaplCounter(root), ""
    except MeasurementError as error:
        return None, str(error)


def as_json(record: EnergyRecord) -> dict[str, Any]:
    """Return a record of plain JSON values."""
    return {**vars(record), "windows": [vars(window) for window in record.windows]}
