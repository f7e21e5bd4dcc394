"""Nsight Compute: build the command, run it in a process of its own, parse its raw page.

L2 hit rates are ratios of sums over kernels. Stores always count as L2 hits, so the rate that
says something is that of reads from the SMs (``srcunit_tex_op_read``), with DRAM bytes beside it.
Source: Nsight Compute documentation (CLI, metrics reference) and, for the traps, NVIDIA's forum
threads 257458 and 361731.
"""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from icd_tvm.errors import ConfigError, MeasurementError

# The specification's name exists on no GPU; this is what it stands for.
ALIASES = {"l2_tex__t_sector_hit_rate.pct": "lts__t_sector_hit_rate.pct"}
_READ = "lts__t_sectors_srcunit_tex_op_read"
METRICS = (
    "lts__t_sector_hit_rate.pct",
    "lts__t_sectors.sum",
    "lts__t_sectors_lookup_hit.sum",
    "lts__t_sectors_srcunit_tex.sum",
    "lts__t_sectors_srcunit_tex_lookup_hit.sum",
    f"{_READ}.sum",
    f"{_READ}_lookup_hit.sum",
    "l1tex__t_sectors.sum",
    "l1tex__t_sectors_lookup_hit.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "gpu__time_duration.sum",
)
# GH100 has two L2 halves; what one half asks of the other is looked up twice.
FABRIC_METRICS = (
    "lts__t_sectors_srcunit_ltcfabric.sum",
    "lts__t_sectors_srcunit_ltcfabric_lookup_hit.sum",
)
MIN_VERSION = (2022, 1)

CacheControl = Literal["all", "none"]
Replay = Literal["kernel", "application", "app-range"]
_FIXED = ("ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream")
_TEXT = (*_FIXED, "Block Size", "Grid Size", "Device", "CC")
_UNITS = {
    "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9,
    "nsecond": 1e-9, "usecond": 1e-6, "msecond": 1e-3, "second": 1.0,
    "ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class KernelProfile:
    """Counters of one kernel launch, in bytes, seconds, sectors and per cent.

    Attributes
    ----------
    name : str
        Demangled kernel name; a TVM kernel is its PrimFunc's name with ``_kernel``.
    values : dict
        Metric -> value; None where ncu printed ``n/a``.
    """

    name: str
    values: dict[str, float | None]

    @property
    def prim_func(self) -> str:
        """Name of the PrimFunc that the kernel was made from."""
        return re.sub(r"_kernel(_\d+)?$", "", self.name.split("(")[0].split(" ")[-1])


@dataclass(frozen=True)
class NcuSummary:
    """Sums over kernels; None where a counter was not collected.

    Attributes
    ----------
    kernels : int
    time_s : float or None
    l2_hit_pct : float or None
        All clients, stores included.
    l2_read_hit_pct : float or None
        Reads of the SMs: the one to compare layouts by.
    l1_hit_pct : float or None
    dram_bytes : float or None
        Read and written.
    """

    kernels: int
    time_s: float | None
    l2_hit_pct: float | None
    l2_read_hit_pct: float | None
    l1_hit_pct: float | None
    dram_bytes: float | None


def resolve_metrics(
    names: Sequence[str], capability: tuple[int, int] | None = None
) -> tuple[list[str], list[str]]:
    """Return the metrics to collect, and a note for each that was renamed.

    Parameters
    ----------
    names : sequence of str
        Metrics asked for; :data:`METRICS` are always collected too.
    capability : (int, int), optional
        Compute capability; 9.x adds the counters of the fabric between L2 halves.

    Raises
    ------
    ConfigError
        If a name is no metric name.
    """
    notes, chosen = [], []
    for name in names:
        if not re.fullmatch(r"[a-z0-9_]+__[A-Za-z0-9_]+(\.[a-z0-9_]+)*", name):
            raise ConfigError(f"{name!r} is no metric name", "for example dram__bytes_read.sum")
        if name in ALIASES:
            notes.append(f"{name} exists on no GPU; {ALIASES[name]} is collected instead")
        chosen.append(ALIASES.get(name, name))
    fabric = FABRIC_METRICS if capability and capability[0] == 9 else ()
    return list(dict.fromkeys([*chosen, *METRICS, *fabric])), notes


def command(
    program: Sequence[str],
    *,
    metrics: Sequence[str] = METRICS,
    kernel: str | None = None,
    launch_skip: int = 0,
    launch_count: int | None = None,
    cache_control: CacheControl = "none",
    replay: Replay = "application",
    nvtx: str | None = None,
    from_start: bool = True,
    ncu: str = "ncu",
) -> list[str]:
    """Return the command line that profiles ``program``.

    Parameters
    ----------
    program : sequence of str
        Command to profile, in a process of its own.
    metrics : sequence of str
    kernel : str, optional
        Regular expression on demangled kernel names.
    launch_skip, launch_count : int
        Which of the matching launches.
    cache_control : {"none", "all"}
        ``all`` flushes before every pass: cold caches, nothing shared between kernels.
    replay : {"application", "kernel", "app-range"}
        ``none`` with kernel replay is warmed by the pass before; steady state needs
        ``application`` and a deterministic program.
    nvtx : str, optional
        Range to profile, e.g. ``timed/``.
    from_start : bool
        False: only between cudaProfilerStart and Stop.
    """
    line = [ncu, "--metrics", ",".join(metrics), "--csv", "--page", "raw"]
    line += ["--print-units", "base", "--print-fp", "--clock-control", "none"]
    line += ["--cache-control", cache_control, "--replay-mode", replay]
    line += ["--target-processes", "all"]
    if kernel:
        line += ["--kernel-name-base", "demangled", "--kernel-name", f"regex:{kernel}"]
    if launch_skip:
        line += ["--launch-skip", str(launch_skip)]
    if launch_count is not None:
        line += ["--launch-count", str(launch_count)]
    if nvtx:
        line += ["--nvtx", "--nvtx-include", nvtx]
    if not from_start:
        line += ["--profile-from-start", "off"]
    return [*line, *program]


def missing_ncu() -> str:
    """Return why ncu cannot be used here, or an empty string."""
    found = shutil.which("ncu")
    if found is None:
        return "ncu is not installed (it comes with the CUDA toolkit as nsight-compute)"
    done = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    version = parse_version(done.stdout)
    if version is None:
        return f"{found} --version says nothing that is understood"
    if version < MIN_VERSION:
        return f"ncu {version[0]}.{version[1]} is too old, {MIN_VERSION[0]}.{MIN_VERSION[1]} needed"
    return ""


def parse_version(text: str) -> tuple[int, int] | None:
    """Return (year, number) of ``ncu --version``, or None."""
    found = re.search(r"Version (\d{4})\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def profile(line: Sequence[str], *, timeout_s: float = 600) -> list[KernelProfile]:
    """Run a command of :func:`command` and return its kernels.

    Raises
    ------
    MeasurementError
        If ncu is missing, too old, not permitted, failed or profiled nothing.
    """
    if reason := missing_ncu():
        raise MeasurementError(f"ncu: {reason}")
    try:
        done = subprocess.run(
            list(line), capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise MeasurementError(
            f"ncu ran longer than {timeout_s:g} s", "profile fewer launches"
        ) from None
    if reason := explain(done.stdout + done.stderr):
        raise MeasurementError(f"ncu: {reason}")
    if done.returncode:
        raise MeasurementError(f"ncu: the program ended with status {done.returncode}")
    return parse(done.stdout)


def explain(output: str) -> str:
    """Return what a failure in ncu's output means and what to do; empty if there is none."""
    if "ERR_NVGPUCTRPERM" in output:
        return (
            "the driver reserves performance counters for root (ERR_NVGPUCTRPERM); run as root, "
            "or load nvidia with NVreg_RestrictProfilingToAdminUsers=0"
        )
    if "No kernels were profiled" in output:
        return "no kernel matched; check the kernel filter and the range"
    if found := re.search(r"==ERROR== (.*)", output):
        return found[1].strip()
    return ""


def parse(text: str) -> list[KernelProfile]:
    """Parse ``--csv --page raw``; chatter around it is skipped, torn rows are refused.

    Raises
    ------
    MeasurementError
        If there is no header, no unit row, or a row of another width.
    """
    rows = _rows(text)
    header, units = rows[0], rows[1]
    kernels = []
    for row in rows[2:]:
        if len(row) != len(header):
            raise MeasurementError(f"ncu: a row has {len(row)} cells, the header {len(header)}")
        cells = dict(zip(header, zip(row, units, strict=True), strict=True))
        values = {k: _number(v, unit) for k, (v, unit) in cells.items() if k not in _TEXT}
        kernels.append(KernelProfile(cells["Kernel Name"][0], values))
    return kernels


def _rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith('"')]
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise MeasurementError("ncu: no CSV header in its output")
    try:
        rows = list(csv.reader(io.StringIO("\n".join(lines[start:])), strict=True))
    except csv.Error as error:
        raise MeasurementError(f"ncu: its CSV is damaged ({error})") from error
    if len(rows) < 2 or "Kernel Name" not in rows[0] or len(rows[1]) != len(rows[0]):
        raise MeasurementError("ncu: its CSV has no row of units")
    return rows


def _number(text: str, unit: str) -> float | None:
    try:
        return float(text.replace(",", "")) * _UNITS.get(unit, 1.0)
    except ValueError:
        return None


def summarise(kernels: Sequence[KernelProfile]) -> NcuSummary:
    """Sum the counters over kernels; a rate is a ratio of sums."""
    written, read = (_sum(kernels, f"dram__bytes_{way}.sum") for way in ("write", "read"))
    return NcuSummary(
        len(kernels),
        _sum(kernels, "gpu__time_duration.sum"),
        _rate(kernels, "lts__t_sectors"),
        _rate(kernels, _READ),
        _rate(kernels, "l1tex__t_sectors"),
        None if written is None or read is None else written + read,
    )


def _sum(kernels: Sequence[KernelProfile], metric: str) -> float | None:
    values = [kernel.values.get(metric) for kernel in kernels]
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _rate(kernels: Sequence[KernelProfile], counter: str) -> float | None:
    hits, total = _sum(kernels, f"{counter}_lookup_hit.sum"), _sum(kernels, f"{counter}.sum")
    return 100 * hits / total if hits is not None and total else None


def attribute(
    kernels: Sequence[KernelProfile], owners: Mapping[str, Sequence[str]]
) -> dict[str, list[KernelProfile]]:
    """Group kernels by what they belong to.

    Parameters
    ----------
    kernels : sequence of KernelProfile
    owners : mapping of str to sequence of str
        PrimFunc -> the operators (ONNX names) or axis groups it computes.

    Returns
    -------
    dict
        Owner -> kernels, in order; kernels of no known PrimFunc under ``""``.
    """
    found: dict[str, list[KernelProfile]] = {}
    for kernel in kernels:
        for owner in owners.get(kernel.prim_func, [""]):
            found.setdefault(owner, []).append(kernel)
    return found


def as_json(
    kernels: Sequence[KernelProfile], calls: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Return kernels, their summary and the sums of each operator and axis group, as plain JSON.

    Parameters
    ----------
    kernels : sequence of KernelProfile
    calls : sequence of mapping
        ``kernel``, ``node`` and ``groups`` of each call of a PrimFunc, as
        :func:`icd_tvm.relax_passes.kernel_calls.owners` returns them.
    """
    nodes, groups = (owners_of_kernels(calls, key) for key in ("node", "groups"))
    return {
        "source": "ncu",
        "summary": vars(summarise(kernels)),
        "by_operator": _summaries(attribute(kernels, nodes)),
        "by_group": _summaries(attribute(kernels, groups)),
        "kernels": [
            {
                "name": kernel.name,
                "operators": nodes.get(kernel.prim_func, []),
                "groups": groups.get(kernel.prim_func, []),
                **kernel.values,
            }
            for kernel in kernels
        ],
    }


def owners_of_kernels(calls: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[str]]:
    """Return PrimFunc -> the distinct values of ``node`` or ``groups`` of its calls."""
    found: dict[str, dict[str, None]] = {}
    for call in calls:
        values = call[key] if isinstance(call[key], list) else [call[key]]
        found.setdefault(call["kernel"], {}).update(dict.fromkeys(values))
    return {kernel: list(values) for kernel, values in found.items()}


def _summaries(owned: Mapping[str, Sequence[KernelProfile]]) -> dict[str, Any]:
    return {owner: vars(summarise(kernels)) for owner, kernels in owned.items() if owner}
