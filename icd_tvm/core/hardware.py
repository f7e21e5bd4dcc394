"""Cache sizes, bandwidths and peak rates of the machines the cost model knows.

Values of the host are read from the operating system and measured once; values of GPUs are
copied from vendor documents, named beside each entry.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from icd_tvm.errors import ConfigError

_SYSFS = Path("/sys/devices/system/cpu/cpu0/cache")
_FORMAT = "icd/hardware/v1"


@dataclass(frozen=True)
class Hardware:
    """One machine, as the cost model sees it.

    Attributes
    ----------
    name : str
    line_bytes : int
        Size of a cache line.
    sector_bytes : int
        Smallest unit a memory transfer moves.
    cache_bytes : tuple of int
        Capacity of each cache level, smallest first.
    cache_bandwidth : tuple of float
        Bandwidth out of each cache level, bytes / s; same length.
    dram_bandwidth : float
        Bytes / s.
    peak_flops : float
        Multiply and add count as two, fp32 (GPUs: fp16 tensor cores, dense), flop / s.
    source : str
        Where the values are from.
    """

    name: str
    line_bytes: int
    sector_bytes: int
    cache_bytes: tuple[int, ...]
    cache_bandwidth: tuple[float, ...]
    dram_bandwidth: float
    peak_flops: float
    source: str

    def __post_init__(self) -> None:
        if len(self.cache_bytes) != len(self.cache_bandwidth):
            raise ConfigError(f"hardware {self.name}: cache sizes and bandwidths differ in number")
        rates = (*self.cache_bandwidth, self.dram_bandwidth, self.peak_flops)
        if not all(np.isfinite(rate) and rate > 0 for rate in rates):
            raise ConfigError(f"hardware {self.name}: rates {rates} must be finite and positive")
        if list(self.cache_bytes) != sorted(self.cache_bytes):
            raise ConfigError(f"hardware {self.name}: caches must be listed smallest first")

    def bandwidth(self, footprint: float) -> float:
        """Return the bandwidth of the smallest level that holds ``footprint`` bytes."""
        for size, rate in zip(self.cache_bytes, self.cache_bandwidth, strict=True):
            if footprint <= size:
                return rate
        return self.dram_bandwidth


# H200: 141 GB HBM3e, 4.8 TB/s, 989 TFLOPS fp16 without sparsity (NVIDIA H200 datasheet, SXM;
# the sheet prints the 1,979 of 2:4 sparsity). 50 MiB L2 on H100 and H200 (NVIDIA H100 Tensor
# Core GPU Architecture, whitepaper; the device reports 60 MiB on H200). The L2 bandwidth has no
# published value: 5.5 TB/s is the H100 read figure of Chips and Cheese (2023), used as a guess.
H200 = Hardware(
    "NVIDIA H200",
    line_bytes=128,
    sector_bytes=32,
    cache_bytes=(60 << 20,),
    cache_bandwidth=(5.5e12,),
    dram_bandwidth=4.8e12,
    peak_flops=989e12,
    source="NVIDIA H200 datasheet; L2 bandwidth assumed",
)

# A100 80 GB SXM: 2.039 TB/s, 312 TFLOPS fp16 (NVIDIA A100 datasheet), 40 MB L2 and 5,120 B/clk
# of L2 read bandwidth at 1.41 GHz (NVIDIA A100 Tensor Core GPU Architecture, whitepaper).
A100 = Hardware(
    "NVIDIA A100 80GB",
    line_bytes=128,
    sector_bytes=32,
    cache_bytes=(40 << 20,),
    cache_bandwidth=(7.2e12,),
    dram_bandwidth=2.039e12,
    peak_flops=312e12,
    source="NVIDIA A100 datasheet and whitepaper",
)


def host(cache_dir: str | Path, *, refresh: bool = False) -> Hardware:
    """Return the host, measured once (0.3 s) and then read from ``cache_dir``.

    Parameters
    ----------
    cache_dir : str or Path
        Folder that keeps ``hardware.json``; made if absent.
    refresh : bool
        Measure again. A file that cannot be read or is of another processor is replaced.
    """
    path = Path(cache_dir) / "hardware.json"
    name = processor_name()
    if not refresh and (known := _read(path, name)) is not None:
        return known
    hardware = _measure(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"format": _FORMAT, **asdict(hardware)}), encoding="utf-8")
    temporary.replace(path)
    return hardware


def processor_name() -> str:
    """Return the model name of the processor, or its architecture where none is given."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def data_caches() -> tuple[int, ...]:
    """Return the sizes in bytes of the data caches the system reports, smallest first."""
    sizes = []
    for folder in sorted(_SYSFS.glob("index*")):
        try:
            if (folder / "type").read_text().strip() == "Instruction":
                continue
            sizes.append(_parse_size((folder / "size").read_text().strip()))
        except (OSError, ValueError):
            continue
    return tuple(sorted(sizes)) or (32 << 10, 1 << 20)


def _parse_size(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text)


def _line_size() -> int:
    try:
        return int((_SYSFS / "index0" / "coherency_line_size").read_text())
    except (OSError, ValueError):
        return 64


def _read(path: Path, name: str) -> Hardware | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.pop("format") != _FORMAT or record["name"] != name:
            return None
        for key in ("cache_bytes", "cache_bandwidth"):
            record[key] = tuple(record[key])
        return Hardware(**record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError):
        return None


def _measure(name: str) -> Hardware:
    caches, line = data_caches(), _line_size()
    rates = [_read_rate(size // 2) for size in caches]
    dram = _read_rate(4 * caches[-1])
    # Call overhead hides the rate of small caches; an inner level is never the slower one.
    monotone = np.maximum.accumulate([dram, *rates[::-1]])[::-1].tolist()
    source = "measured: one-thread memcmp, and sgemm with the threads BLAS uses"
    return Hardware(name, line, line, caches, tuple(monotone[:-1]), monotone[-1], _peak(), source)


def _read_rate(footprint: int) -> float:
    """Bytes / s of the C library's memcmp over two equal buffers of ``footprint`` together."""
    half = max(footprint // 2, 4096)
    # Ones, not zeros: the pages of np.zeros all map to one page until they are written.
    a, b = np.ones(half, dtype=np.uint8), np.ones(half, dtype=np.uint8)
    compare = ctypes.CDLL(None).memcmp
    compare.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    repeats = max(1, (1 << 22) // half)

    def run() -> None:
        for _ in range(repeats):
            compare(a.ctypes.data, b.ctypes.data, half)

    return 2 * half * repeats / _fastest(run)


def _peak(size: int = 768) -> float:
    """flop / s of the BLAS numpy was built with, on a square fp32 product."""
    a = np.full((size, size), 1e-3, dtype=np.float32)
    out = np.empty_like(a)
    return 2.0 * size**3 / _fastest(lambda: np.matmul(a, a, out=out))


def _fastest(run: Callable[[], object], seconds: float = 0.05) -> float:
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best if np.isfinite(best) else seconds
