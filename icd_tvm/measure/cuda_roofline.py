"""Predicted time of CUDA kernels from counted operations and bytes; a bound, not a measurement.

Time is at least operations / peak and at least bytes / bandwidth (Williams, Waterman, Patterson,
"Roofline", CACM 52(4), 2009). Peaks and bandwidths are those of data sheets; what kernels reach of
them is not known before they run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from icd_tvm.core.hardware import H200
from icd_tvm.tir_schedules.cuda.archs import HOPPER
from icd_tvm.tir_schedules.cuda.catalogue import Entry
from icd_tvm.tir_schedules.cuda.source_kernel import SourceKernel


@dataclass(frozen=True)
class Device:
    """Data sheet figures: operations / s by unit, bytes / s, and where they are from."""

    name: str
    peaks: dict[str, float]
    bandwidth: float
    source: str


DEVICES = {
    "sm_90": Device(
        "NVIDIA H200",
        {"fp16": H200.peak_flops, "int8": 2 * H200.peak_flops, "fp32": 67e12},
        H200.dram_bandwidth,
        "NVIDIA H200 data sheet (SXM), without sparsity",
    ),
    "sm_80": Device(
        "NVIDIA A100 80GB",
        {"fp16": 312e12, "int8": 624e12, "fp32": 19.5e12},
        2.039e12,
        "NVIDIA A100 80GB data sheet (SXM), without sparsity",
    ),
}
# The same device: its data sheet counts warpgroup products.
DEVICES[HOPPER] = DEVICES["sm_90"]


@dataclass(frozen=True)
class Prediction:
    """One named rule: its counts, the bound in microseconds, what binds, and against dense."""

    name: str
    gflop: float
    mbytes: float
    microseconds: float
    bound: str
    launches: int
    against_dense: float | None = None


def predict(entries: Iterable[Entry], arch: str) -> list[Prediction]:
    """Return the bound of every rule; kernels of a rule run one after another.

    Parameters
    ----------
    entries : iterable of Entry
        E.g. of `catalogue`. Rules that do not fit are left out.
    arch : str
        A key of `DEVICES`.
    """
    device, found = DEVICES[arch], dict[str, Prediction]()
    for entry in entries:
        kernels = entry.rule.kernels
        if not kernels:
            continue
        times = [_seconds(kernel, device) for kernel in kernels]
        total = sum(max(pair) for pair in times)
        found[entry.name] = Prediction(
            entry.name,
            sum(k.flop for k in kernels) / 1e9,
            sum(k.bytes for k in kernels) / 1e6,
            total * 1e6,
            "operations" if sum(t[0] for t in times) > sum(t[1] for t in times) else "bytes",
            len(kernels),
            total * 1e6 / found[entry.dense].microseconds if entry.dense in found else None,
        )
    return list(found.values())


def _seconds(kernel: SourceKernel, device: Device) -> tuple[float, float]:
    return kernel.flop / device.peaks[kernel.unit], kernel.bytes / device.bandwidth
