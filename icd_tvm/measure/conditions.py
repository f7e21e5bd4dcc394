"""What a measurement ran under: clock and temperature before and after, and pinned threads."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

NO_AFFINITY = "this system has no sched_setaffinity"


def clock(root: Path = Path("/")) -> dict[str, Any]:
    """Return the clock and the temperature of this moment.

    Parameters
    ----------
    root : Path
        Where ``proc`` and ``sys`` are found.

    Returns
    -------
    dict
        ``mhz`` {min, median, max} over the cores and ``celsius`` (the hottest zone), each null
        where the system does not tell, with ``reasons``.
    """
    reasons: dict[str, str] = {}
    info = _read(root / "proc/cpuinfo")
    found = [float(v) for v in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", info, re.MULTILINE)]
    if not found:
        reasons["mhz"] = "no 'cpu MHz' in /proc/cpuinfo"
    zones = [
        _read(path).strip() for path in sorted(root.glob("sys/class/thermal/thermal_zone*/temp"))
    ]
    degrees = [int(text) / 1000 for text in zones if re.fullmatch(r"-?\d{1,9}", text)]
    if not degrees:
        reasons["celsius"] = "no thermal zone in /sys/class/thermal"
    return {
        "mhz": _spread(found) if found else None,
        "celsius": max(degrees) if degrees else None,
        "reasons": reasons,
    }


@contextmanager
def pinned(enabled: bool = True) -> Iterator[dict[str, Any]]:
    """Keep the calling thread on one CPU inside the block.

    TVM's pool binds its workers to a CPU each and leaves the calling thread, which works too,
    free to move. It gets the first usable CPU that no other thread of this process is bound to.
    Processes started inside the block inherit the binding: start them before.

    Parameters
    ----------
    enabled : bool
        False changes nothing and records the CPUs all the same.

    Yields
    ------
    dict
        ``pinned``, ``cpus`` of the calling thread, ``workers`` (CPUs that other threads are bound
        to) and ``reason`` (why nothing was pinned, or null).
    """
    if not hasattr(os, "sched_setaffinity"):
        yield _affinity(None, [], NO_AFFINITY)
        return
    before = os.sched_getaffinity(0)
    workers = _bound_elsewhere()
    free = sorted(before - set(workers))
    reason = None if enabled else "measure.pin_threads is false"
    if enabled and not free:
        reason = "every usable CPU has a worker bound to it"
    if reason is not None:
        yield _affinity(sorted(before), workers, reason)
        return
    os.sched_setaffinity(0, {free[0]})
    try:
        yield _affinity([free[0]], workers, None)
    finally:
        os.sched_setaffinity(0, before)


def _affinity(cpus: list[int] | None, workers: list[int], reason: str | None) -> dict[str, Any]:
    return {"pinned": reason is None, "cpus": cpus, "workers": workers, "reason": reason}


def _bound_elsewhere() -> list[int]:
    """Return the CPUs that another thread of this process is bound to alone."""
    own = os.getpid()
    found = set()
    for task in Path("/proc/self/task").glob("*/status"):
        cpus = re.search(r"^Cpus_allowed_list:\s*(\d+)$", _read(task), re.MULTILINE)
        if cpus and int(task.parent.name) != own:
            found.add(int(cpus[1]))
    return sorted(found)


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "min": min(values),
        "median": float(np.median(values)),
        "max": max(values),
    }


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
