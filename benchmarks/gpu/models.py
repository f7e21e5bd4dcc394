"""A folder that ``--build`` wrote, on the GPU host: arms with their weights made and in place."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.cases import ARMS, INDEX, POOL, SETS
from benchmarks.gpu.machine import ArmRun, Array, Machine, feed
from benchmarks.gpu.recipes import Draws, Pool, from_json, realise
from icd_tvm.errors import MeasurementError


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
        if index["arch"] != arch:
            raise MeasurementError(f"models are compiled for {index['arch']}, this is {arch}")
        self.folder, self.notes = folder, index["notes"]
        self.cases: Mapping[str, Any] = index["cases"]
        with np.load(folder / POOL) as stored:
            self._pool = Pool(dict(stored))
        self._machine = make(folder)
        self._draws: dict[str, Draws] = {}
        self._tensors: dict[str, Any] = {}

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
        return {arm: self._run(case, case["arms"][arm], sets) for arm in arms}

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
            [self._machine.tensor(feed(item, fills[item["name"]], seed)) for item in arm["inputs"]]
            for seed in range(sets)
        ]
        return ArmRun(self._machine.load(self.folder / arm["library"]), inputs, parameters)

    def _parameters(
        self, model: str, wanted: Sequence[Mapping[str, Any]], draws: Draws
    ) -> list[Any]:
        keys = [f"{model} {json.dumps(item, sort_keys=True)}" for item in wanted]
        missing = {k: w for k, w in zip(keys, wanted, strict=True) if k not in self._tensors}
        with ThreadPoolExecutor(8) as threads:
            made = threads.map(lambda item: self._array(item, draws), missing.values())
            for key, array in zip(missing, made, strict=True):
                self._tensors[key] = self._machine.tensor(array)
        return [self._tensors[key] for key in keys]

    def _array(self, item: Mapping[str, Any], draws: Draws) -> Array:
        if "stored" in item:
            return self._pool.arrays[item["stored"]]
        return realise(from_json(item, self._pool), draws)
