"""A folder that ``--build`` wrote, on the GPU host: arms with their weights made and in place."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.cases import ARMS, INDEX, POOL, SETS
from benchmarks.gpu.machine import ArmRun, Array, Machine, feed
from benchmarks.gpu.recipes import Draws, Pool, from_json, realise
from icd_tvm.errors import MeasurementError
from icd_tvm.tir_schedules.cuda.archs import runs_on
from icd_tvm.tir_schedules.cuda.source_kernel import WIDTHS

# Bytes that must stay free beside weights: inputs, states, what a call needs, the flushed copies.
WORKSPACE = 2 << 30


class Models:
    """A folder that ``--build`` wrote.

    Raises
    ------
    MeasurementError
        If there is none, or it is for another device.
    """

    def __init__(self, folder: Path | None, arch: str, make: Callable[[Path], Machine]) -> None:
        if folder is None or not (folder / INDEX).exists():
            raise MeasurementError(f"no {INDEX}: make it with --build where nvcc and TVM are")
        index = json.loads((folder / INDEX).read_text("utf-8"))
        if not runs_on(index["arch"], arch):
            raise MeasurementError(f"models are compiled for {index['arch']}, this is {arch}")
        self.folder, self.notes = folder, index["notes"]
        self.cases: Mapping[str, Any] = index["cases"]
        with np.load(folder / POOL) as stored:
            self._pool = Pool(dict(stored))
        self._machine = make(folder)
        self._draws: dict[str, Draws] = {}
        self._tensors: dict[str, list[Any]] = {}

    def runs(self, name: str, arms: Sequence[str] = ARMS, sets: int = SETS) -> dict[str, ArmRun]:
        """Return arms of a case, their parameters made and on the device.

        Raises
        ------
        MeasurementError
            If the case was refused when it was built; the message says why.
        """
        case = self.cases[name]
        if "refused" in case:
            raise MeasurementError(case["refused"])
        self._make_room(case, arms)
        return {arm: self._run(case, case["arms"][arm], sets) for arm in arms}

    def superfluous(self, name: str, found: Mapping[str, Any]) -> bool:
        """Tell whether a case stands for another one that was measured."""
        return isinstance(found.get(self.cases[name].get("stands_for", "")), dict)

    def _make_room(self, case: Mapping[str, Any], arms: Sequence[str]) -> None:
        """Drop weights of other cases if those of this one do not fit beside them.

        Raises
        ------
        MeasurementError
            If they do not fit alone either.
        """
        model = case["case"]["model"]
        wanted = [item for arm in arms for item in case["arms"][arm]["parameters"]]
        items = {_key(model, item): item for item in wanted}
        missing = sum(self._bytes(item) for key, item in items.items() if key not in self._tensors)
        if not self._fits(missing):
            self._tensors = {key: kept for key, kept in self._tensors.items() if key in items}
            if not self._fits(missing):
                raise MeasurementError(
                    f"{missing / 1e9:.1f} GB of weights do not fit the device's free memory, "
                    f"{(self._machine.free_bytes() or 0) / 1e9:.1f} GB"
                )

    def _fits(self, size: int) -> bool:
        free = self._machine.free_bytes()
        return free is None or size + WORKSPACE <= free

    def _bytes(self, item: Mapping[str, Any]) -> int:
        count = len(item.get("places", (0,)))
        if "stored" in item:
            return int(self._pool.arrays[item["stored"]].nbytes) * count
        return int(prod(item["shape"]) * WIDTHS[item["dtype"]]) * count

    def arrays(self, outputs: Any) -> list[Array]:
        """Wait, and return all outputs as numpy."""
        return self._machine.arrays(outputs)

    def _run(self, case: Mapping[str, Any], arm: Mapping[str, Any], sets: int) -> ArmRun:
        model = case["case"]["model"]
        about = {name: (tuple(shape), *rest) for name, (shape, *rest) in case["weights"].items()}
        draws = self._draws.setdefault(model, Draws(about))
        parameters = self._parameters(model, arm["parameters"], draws)
        fills = case["inputs"]
        inputs = [
            [
                self._machine.tensor(feed(item, fills.get(item["name"], "zeros"), seed))
                for item in arm["inputs"]
            ]
            for seed in range(sets)
        ]
        return ArmRun(self._machine.load(self.folder / arm["library"]), inputs, parameters)

    def _parameters(
        self, model: str, wanted: Sequence[Mapping[str, Any]], draws: Draws
    ) -> list[Any]:
        keys = [_key(model, item) for item in wanted]
        missing = {k: w for k, w in zip(keys, wanted, strict=True) if k not in self._tensors}
        with ThreadPoolExecutor(8) as threads:
            made = threads.map(lambda item: self._array(item, draws), missing.values())
            for (key, item), array in zip(missing.items(), made, strict=True):
                # Layers of the same numbers have memory of their own: caches must not help.
                self._tensors[key] = [self._machine.tensor(array) for _ in _places(item, 0)]
        placed = {
            place: tensor
            for number, (key, item) in enumerate(zip(keys, wanted, strict=True))
            for place, tensor in zip(_places(item, number), self._tensors[key], strict=True)
        }
        return [placed[place] for place in range(len(placed))]

    def _array(self, item: Mapping[str, Any], draws: Draws) -> Array:
        if "stored" in item:
            return self._pool.arrays[item["stored"]]
        return realise(from_json(item, self._pool), draws)


def _key(model: str, item: Mapping[str, Any]) -> str:
    return f"{model} {json.dumps(item, sort_keys=True)}"


def _places(item: Mapping[str, Any], alone: int) -> Sequence[int]:
    """Return which parameters an item is; one of a model without repeated layers is its own."""
    places: Sequence[int] = item.get("places", (alone,))
    return places
