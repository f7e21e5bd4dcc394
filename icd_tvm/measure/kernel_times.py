"""Time of every kernel of a call, from a run of its own with the virtual machine's instrument.

The instrument is a Python function that TVM calls before and after each kernel. It costs under a
microsecond a kernel, which is inside the figure, and delays what lies between kernels, which is
not. So these figures say where the time goes; how long a call takes is said by the timed rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icd_tvm.errors import MeasurementError

# Repeats of a kernel that is timed; fewer where a call is long. The timed rounds came before, so
# one call fills this machine's caches.
REPEATS, WARM_UP, BUDGET_S = 30, 1, 0.7
SOURCE = "measured in a profiled run of its own, instrument included"


def kernel_times(
    machine: Any,
    call: Callable[[], Any],
    kernels: Sequence[str],
    *,
    repeats: int = REPEATS,
    budget_s: float = BUDGET_S,
) -> NDArray[np.float64]:
    """Time the kernels of a call one by one.

    Parameters
    ----------
    machine : VirtualMachine
        One of its own: its instrument stays set.
    call : callable
        Runs ``main`` of the machine once.
    kernels : sequence of str
        Names of the PrimFuncs that a call runs, in order.
    repeats : int
        Timed calls at most; three at least, whatever the budget says.
    budget_s : float
        Seconds, with those of the warm-up, after which no further call begins.

    Returns
    -------
    float64 [repeats, kernels]
        Seconds.

    Raises
    ------
    MeasurementError
        If the machine ran other kernels than those named.
    """
    log = _Log(set(kernels))
    machine.set_instrument(log.note)
    rows: list[list[int]] = []
    began = time.perf_counter()
    for turn in range(WARM_UP + repeats):
        log.names, log.spans = [], []
        call()
        if log.names != list(kernels):
            raise MeasurementError(
                f"the machine ran {len(log.names)} kernels, not the {len(kernels)} of the module"
            )
        if turn >= WARM_UP:
            rows.append(log.spans)
            if len(rows) >= 3 and time.perf_counter() - began > budget_s:
                break
    return np.asarray(rows, dtype=np.float64) * 1e-9


class _Log:
    """Keeps the nanoseconds of the kernels it knows, in the order they ran."""

    def __init__(self, known: set[str]) -> None:
        self.known = known
        self.names: list[str] = []
        self.spans: list[int] = []
        self._start = 0

    def note(self, _: Any, name: str, before: bool, *__: Any) -> None:
        """Take the clock as late as possible before a kernel, as early as possible after it."""
        now = time.perf_counter_ns()
        if name not in self.known:
            return
        if before:
            self.names.append(name)
            self._start = time.perf_counter_ns()
        else:
            self.spans.append(now - self._start)
