"""Fingerprint of the machine and the software that a measurement was taken on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

# Instruction-set flags that decide which kernels run.
FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
PACKAGES = ("icd-tvm", "apache-tvm", "apache-tvm-ffi", "numpy", "scipy", "onnx", "onnxruntime")
THREAD_VARIABLES = (
    "TVM_NUM_THREADS",
    "TVM_BIND_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
)
# What makes figures comparable; load, frequency and the like only explain noise.
HASHED = ("cpu", "os", "python", "packages", "threads", "container", "gpu")


def fingerprint(root: Path = Path("/")) -> dict[str, Any]:
    """Describe the machine and the software.

    Parameters
    ----------
    root : Path
        Where ``proc`` and ``sys`` are found.

    Returns
    -------
    dict
        JSON-serialisable: ``cpu {model, flags, cores, caches, governor, mhz}``, ``load_average``,
        ``os``, ``python``, ``packages``, ``threads``, ``container``, ``gpu``, ``energy``,
        ``reasons`` (why a field is null) and ``hash``. Sizes in bytes, frequency in MHz.
    """
    reasons: dict[str, str] = {}
    record: dict[str, Any] = {
        "cpu": _cpu(root, reasons),
        "load_average": _load_average(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "threads": {name: os.environ.get(name) for name in THREAD_VARIABLES},
        "container": _container(root),
        "gpu": _gpu(reasons),
        "energy": _energy_source(root, reasons),
    }
    record["reasons"] = reasons
    record["hash"] = environment_hash(record)
    return record


def environment_hash(record: dict[str, Any]) -> str:
    """Hash the parts of a fingerprint that decide whether two measurements compare.

    Parameters
    ----------
    record : dict
        From :func:`fingerprint`.

    Returns
    -------
    str
        16 hexadecimal digits; independent of load, frequency and free GPU memory.
    """
    parts = {name: record.get(name) for name in HASHED}
    cpu = parts["cpu"]
    if isinstance(cpu, dict):
        parts["cpu"] = {k: v for k, v in cpu.items() if k != "mhz"}
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def last_level_cache_bytes(root: Path = Path("/"), default: int = 32 << 20) -> int:
    """Return the size of the largest cache of the first core, in bytes."""
    return max((c["bytes"] for c in _caches(root)), default=default)


def data_cache_levels(root: Path = Path("/")) -> list[dict[str, Any]]:
    """Return the data and unified caches of the first core whose geometry is known."""
    caches = [c for c in _caches(root) if c["type"] != "instruction"]
    known = [c for c in caches if c["ways"] and c["line_bytes"]]
    return sorted(known, key=lambda c: int(c["level"]))


def _cpu(root: Path, reasons: dict[str, str]) -> dict[str, Any]:
    info = _read(root / "proc/cpuinfo")
    model = _field(info, "model name") or platform.processor() or None
    flags = set((_field(info, "flags") or _field(info, "Features") or "").split())
    scaling = root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
    governor = _read(scaling).strip() or None
    mhz = _field(info, "cpu MHz")
    if governor is None:
        reasons["cpu.governor"] = "no cpufreq in sysfs (virtual machine or fixed clock)"
    if mhz is None:
        reasons["cpu.mhz"] = "no 'cpu MHz' in /proc/cpuinfo"
    return {
        "model": model,
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "usable_cores": _usable_cores(),
        "caches": _caches(root),
        "governor": governor,
        "mhz": None if mhz is None else float(mhz),
    }


def _caches(root: Path) -> list[dict[str, Any]]:
    found = []
    for index in sorted((root / "sys/devices/system/cpu/cpu0/cache").glob("index*")):
        size = re.fullmatch(r"(\d+)([KMG]?)", _read(index / "size").strip())
        if size is None:
            continue
        scale = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[size[2]]
        found.append(
            {
                "level": int(_read(index / "level").strip() or 0),
                "type": _read(index / "type").strip().lower(),
                "bytes": int(size[1]) * scale,
                "ways": int(_read(index / "ways_of_associativity").strip() or 0),
                "line_bytes": int(_read(index / "coherency_line_size").strip() or 0),
                "shared_cpus": _read(index / "shared_cpu_list").strip(),
            }
        )
    return found


def _usable_cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _load_average() -> list[float] | None:
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (OSError, AttributeError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _container(root: Path) -> str | None:
    for name, mark in (("docker", ".dockerenv"), ("podman", "run/.containerenv")):
        if (root / mark).exists():
            return name
    found = re.search(r"docker|kubepods|containerd|lxc|libpod", _read(root / "proc/1/cgroup"))
    if found:
        return found[0]
    flags = (_field(_read(root / "proc/cpuinfo"), "flags") or "").split()
    return "virtual machine" if "hypervisor" in flags else None


def _energy_source(root: Path, reasons: dict[str, str]) -> str | None:
    if (root / "sys/class/powercap/intel-rapl:0/energy_uj").exists():
        return "rapl"
    reasons["energy"] = "no RAPL counter in /sys/class/powercap"
    return None


def _gpu(reasons: dict[str, str]) -> list[dict[str, Any]] | None:
    try:
        import pynvml
    except ImportError:
        reasons["gpu"] = "package nvidia-ml-py is not installed"
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        reasons["gpu"] = f"NVML: {error}"
        return None
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        cuda = pynvml.nvmlSystemGetCudaDriverVersion()
        handles = (pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount()))
        gpus = [
            {
                "name": _text(pynvml.nvmlDeviceGetName(handle)),
                "memory_bytes": int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                "driver": driver,
                "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
                "max_sm_mhz": int(pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)),
            }
            for handle in handles
        ]
    except pynvml.NVMLError as error:
        reasons["gpu"] = f"NVML: {error}"
        return None
    finally:
        pynvml.nvmlShutdown()
    if not gpus:
        reasons["gpu"] = "NVML reports no device"
    return gpus or None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _field(text: str, name: str) -> str | None:
    found = re.search(rf"^{re.escape(name)}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else None
