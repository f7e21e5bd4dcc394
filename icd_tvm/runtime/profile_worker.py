"""Runs a compiled model under Nsight Compute: ``python -m icd_tvm.runtime.profile_worker FOLDER``.

The folder holds ``module.so``, ``model.json`` (its signature) and ``inputs.npz``. On a CUDA device
only the last call lies inside the profiled range.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from icd_tvm.runtime.loaded import MODULE, SIGNATURE, LoadedModel

INPUTS = "inputs.npz"
WARM_UP = 5
_CUDART = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")


def main(folder: Path) -> None:
    """Call the model of a folder some times, the last time inside the profiler's range."""
    signature = json.loads((folder / SIGNATURE).read_text("utf-8"))
    model = LoadedModel(folder / MODULE, signature)
    with np.load(folder / INPUTS) as stored:
        feeds = dict(stored)
    for _ in range(WARM_UP):
        model(feeds)
    with _profiled(signature.get("device")):
        model(feeds)


@contextmanager
def _profiled(device: str | None) -> Iterator[None]:
    """Start and stop the profiler around the body, where the device has one."""
    if device != "cuda":
        yield
        return
    runtime = _cudart()
    runtime.cudaDeviceSynchronize()
    runtime.cudaProfilerStart()
    try:
        yield
    finally:
        runtime.cudaDeviceSynchronize()
        runtime.cudaProfilerStop()


def _cudart() -> ctypes.CDLL:
    for name in _CUDART:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise SystemExit(f"none of {', '.join(_CUDART)} can be loaded")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
