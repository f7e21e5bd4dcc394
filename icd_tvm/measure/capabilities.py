"""What can be measured on this machine, what can't, and how to enable it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from icd_tvm.errors import IcdError
from icd_tvm.measure.cache_model import host_levels
from icd_tvm.measure.cachegrind import missing_tool
from icd_tvm.measure.energy import open_counter
from icd_tvm.measure.environment import fingerprint
from icd_tvm.measure.ncu import explain, missing_ncu
from icd_tvm.measure.nvml import NvmlDevice
from icd_tvm.measure.quality import DATA_VARIABLE, data_dir


@dataclass(frozen=True)
class Capability:
    """One thing that may be measured.

    Attributes
    ----------
    name : str
    available : bool
    detail : str
        What is used, or why it is missing and how to enable it.
    """

    name: str
    available: bool
    detail: str


def capabilities() -> list[Capability]:
    """Return every capability of this machine; never raises."""
    return [Capability(name, *check()) for name, check in _CHECKS.items()]


Answer = tuple[bool, str]


def _latency() -> Answer:
    record = fingerprint()
    cpu = record["cpu"]
    busy = (record["load_average"] or [0.0])[0] > 0.5
    warning = "; the machine is busy, intervals will be wide" if busy else ""
    clock = cpu["governor"] or record["reasons"].get("cpu.governor", "clock unknown")
    return True, f"{cpu['usable_cores']} cores of {cpu['model']}, {clock}{warning}"


def _cpu_energy() -> Answer:
    counter, reason = open_counter()
    return counter is not None, reason or "RAPL"


def _gpu() -> Answer:
    try:
        device = NvmlDevice()
    except IcdError as error:
        return False, str(error)
    return True, f"NVML energy counter; sampled power: {device.power_window}"


def _ncu() -> Answer:
    gpu, why = _gpu()
    reason = missing_ncu() or ("" if gpu else why) or locked_counters()
    return not reason, reason or f"ncu at {shutil.which('ncu')}"


def locked_counters(root: Path = Path("/")) -> str:
    """Return why this user may not read the counters of the GPU, or an empty string."""
    try:
        text = (root / "proc/driver/nvidia/params").read_text()
    except OSError:
        return ""
    locked = re.search(r"RmProfilingAdminOnly:\s*1", text) is not None
    return explain("ERR_NVGPUCTRPERM") if locked and os.geteuid() != 0 else ""


def _model() -> Answer:
    try:
        levels = host_levels()
    except IcdError as error:
        return False, str(error)
    sizes = ", ".join(f"{c.name} {c.size_bytes >> 10} KiB {c.ways}-way" for c in levels)
    return True, f"a model, not a counter: {sizes}"


def _cachegrind() -> Answer:
    reason = missing_tool()
    return not reason, reason or "valgrind; kernels are compiled without AVX-512 for it"


def _peer() -> Answer:
    found = find_spec("onnxruntime") is not None
    return found, "onnxruntime" if found else "pip install onnxruntime"


def _data() -> Answer:
    found = data_dir()
    missing = f"no evaluation data; set {DATA_VARIABLE} to its folder"
    return found is not None, missing if found is None else str(found)


def _export() -> Answer:
    found = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("cc")
    return found is not None, found or "install a C++ compiler (g++ or clang)"


_CHECKS: dict[str, Callable[[], Answer]] = {
    "latency": _latency,
    "energy, CPU": _cpu_energy,
    "energy and power, GPU": _gpu,
    "L2 and DRAM counters, GPU": _ncu,
    "cache model, CPU": _model,
    "cachegrind": _cachegrind,
    "peer": _peer,
    "task quality": _data,
    "export of a library": _export,
}
