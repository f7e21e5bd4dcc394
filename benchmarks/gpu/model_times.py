"""Outputs and times of the arms of whole models.

*Warm*: calls follow each other on one set of inputs. *Cold*: before every call twice the L2 cache
is copied over, outside of the events, and input sets take turns. Weights lie in memory once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.gpu.cases import SETS
from benchmarks.gpu.machine import ArmRun
from benchmarks.gpu.models import Models
from benchmarks.gpu.ratios import ratio_of, summary_of
from icd_tvm.measure.cuda_driver import CudaDevice
from icd_tvm.measure.cuda_timing import Clock

# Rounds, those in which launches on the stream are timed as well, least seconds of a warm sample,
# steps whose states are fed back before outputs are compared.
ROUNDS, STREAM_ROUNDS, SAMPLE_S, STEPS = 40, 10, 2e-3, 3
# Arms round the same operands and sum in other orders: 12 layers of float16 stay below this.
ALLOWED = 2e-2
PAIRS = (
    ("iterative", "linear"),
    ("iterative", "identity"),
    ("iterative", "dense"),
    ("random", "linear"),
    ("linear", "identity"),
)


def measure_models(device: CudaDevice, models: Models, clock: Clock) -> dict[str, Any]:
    """Compare and time the arms of every case that fits the time."""
    found: dict[str, Any] = {"notes": dict(models.notes)}
    for name in models.cases:
        if models.superfluous(name, found):
            found[name] = "not measured: the whole model is"
            continue
        if clock.over("models"):
            found[name] = "not measured: no time is left"
            continue
        try:
            found[name] = _measured(device, models, name)
        except Exception as error:
            found[name] = f"not measured: {type(error).__name__}: {error}"
    return found


def _measured(device: CudaDevice, models: Models, name: str) -> dict[str, Any]:
    """Measure one case; what it held is free again when this returns."""
    runs = models.runs(name)
    values = compare(models, runs, models.cases[name].get("allowed", ALLOWED))
    return {"values": values, **time_arms(device, runs), **_sizes(models, name)}


def _sizes(models: Models, name: str) -> dict[str, Any]:
    case = models.cases[name]
    sizes = {arm: about["parameter_bytes"] for arm, about in case["arms"].items()}
    return {"tokens": case["tokens"], "parameter_bytes": sizes, "orders": case["orders"]}


def compare(models: Models, runs: Mapping[str, ArmRun], allowed: float = ALLOWED) -> dict[str, Any]:
    """Return how far the first output of each arm is from that of the identity arm.

    The dense arm is another function: of it only that all values are finite is said.
    """
    first = {
        arm: models.arrays(run.steps(STEPS))[0].astype(np.float64) for arm, run in runs.items()
    }
    base = first["identity"]
    size = float(np.linalg.norm(base))
    differences = {
        arm: float(np.linalg.norm(value - base)) / size
        for arm, value in first.items()
        if arm not in ("identity", "dense")
    }
    finite = all(bool(np.isfinite(value).all()) for value in first.values()) and size > 0
    equal = finite and all(value <= allowed for value in differences.values())
    return {
        "relative_differences": differences,
        "allowed": allowed,
        "finite": finite,
        "equal": equal,
    }


class Prepared:
    """An arm as what starts it, for each set of inputs: one graph, or launches on the stream."""

    def __init__(self, device: CudaDevice, run: ArmRun, sets: int = SETS) -> None:
        self.stream = [lambda i=i: run(i) for i in range(sets)]
        self.works, self.how, self._kept = list[Any](self.stream), "stream", list[Any]()
        for work in self.stream:
            work()
            work()
        device.wait()
        try:
            self.works = [self._captured(device, work) for work in self.stream]
            for work in self.works:
                work()
            device.wait()
            self.how = "graph"
        except Exception as error:
            self.works, self.how = list(self.stream), f"stream ({error})"

    def _captured(self, device: CudaDevice, work: Callable[[], Any]) -> Callable[[], None]:
        # What was just given back is used again: nothing may be allocated while capturing.
        work()
        device.wait()
        return device.graph(lambda: self._kept.append(work()))


def time_arms(device: CudaDevice, runs: Mapping[str, ArmRun]) -> dict[str, Any]:
    """Time all arms in turns, warm and cold.

    Returns
    -------
    dict
        ``arms``: arm -> ``warm``, ``cold`` and ``stream`` in milliseconds, and how it was started;
        ``ratios``: ``warm`` and ``cold`` -> pair -> median, interval.
    """
    ready = {arm: Prepared(device, run) for arm, run in runs.items()}
    flush = Flush(device)
    inner = {arm: _inner(device, item.works[0]) for arm, item in ready.items()}
    samples: dict[str, dict[str, list[float]]] = {
        mode: {arm: [] for arm in ready} for mode in ("warm", "cold", "stream")
    }
    try:
        for turn in range(ROUNDS):
            for arm in _order(list(ready), turn):
                item = ready[arm]
                samples["warm"][arm].append(_repeated(device, item.works[0], inner[arm]))
                flush()
                samples["cold"][arm].append(device.seconds(item.works[turn % len(item.works)]))
                if turn < STREAM_ROUNDS:
                    samples["stream"][arm].append(device.seconds(item.stream[0]))
    finally:
        flush.free()
    arms = {
        arm: {"by": item.how, **{mode: summary_of(samples[mode][arm]) for mode in samples}}
        for arm, item in ready.items()
    }
    return {"arms": arms, "ratios": {mode: _ratios(samples[mode]) for mode in ("warm", "cold")}}


def _ratios(samples: Mapping[str, list[float]]) -> dict[str, Any]:
    pairs = [pair for pair in PAIRS if set(pair) <= samples.keys()]
    found = {f"{a}/{b}": ratio_of(samples[a], samples[b]) for a, b in pairs}
    plain = [arm for arm in ("dense", "identity") if arm in samples]
    if plain and "iterative" in samples:
        best = min(plain, key=lambda arm: float(np.median(samples[arm])))
        found["iterative/best unordered"] = ratio_of(samples["iterative"], samples[best]) | {
            "arm": best
        }
    return found


def _order(arms: list[str], turn: int) -> list[str]:
    start = turn // 2 % len(arms)
    turned = arms[start:] + arms[:start]
    return turned[::-1] if turn % 2 else turned


def _inner(device: CudaDevice, work: Callable[[], Any]) -> int:
    once = device.seconds(work)
    return int(np.clip(SAMPLE_S / max(once, 1e-6), 1, 50))


def _repeated(device: CudaDevice, work: Callable[[], Any], count: int) -> float:
    def all_of_them() -> None:
        for _ in range(count):
            work()

    return device.seconds(all_of_them) / count


class Flush:
    """Copies twice the L2 cache to another place: four times its size is touched."""

    def __init__(self, device: CudaDevice) -> None:
        self._device, self._size = device, 2 * device.l2_bytes
        self._places = (device.empty(self._size), device.empty(self._size))

    def __call__(self) -> None:
        """Start the copy."""
        self._device.copy(*self._places, self._size)

    def free(self) -> None:
        """Give the memory back."""
        for place in self._places:
            self._device.free(place)
