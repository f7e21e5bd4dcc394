"""Data-cache misses of one compiled kernel, counted by cachegrind (valgrind) on Linux.

Cachegrind executes the machine code that TVM made and simulates two cache levels, so registers
and instruction selection are the real ones. It cannot run AVX-512: compile for ``x86-64-v3``.
Source: valgrind manual, chapter 5.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm_ffi import libinfo

from icd_tvm._tvm import tirx, tvm, tvm_ffi
from icd_tvm.errors import MeasurementError
from icd_tvm.measure.cache_sim import CacheLevel
from icd_tvm.tir_schedules.cpu.stack import register_pipeline

ARENA_ALIGNMENT = 1 << 16
_SYMBOL = "kernel"
# LLVM turns plain copies into calls of the C library.
_FUNCTIONS = (f"{_SYMBOL}_compute_", _SYMBOL, "memcpy", "memmove", "memset")
_TIMEOUT_S = 600


@dataclass(frozen=True)
class CacheCounts:
    """Events of one kernel: data references, and misses of the first and the last level."""

    references: int
    first_misses: int
    last_misses: int


def missing_tool() -> str:
    """Return why cachegrind cannot be used here, or an empty string."""
    for tool, hint in (("valgrind", "install valgrind"), ("cc", "install a C compiler")):
        if shutil.which(tool) is None:
            return f"{tool} is not installed ({hint})"
    return ""


def arena_offsets(arrays: Sequence[NDArray[Any]]) -> tuple[list[int], int]:
    """Return the byte offset of each array in one arena, and the size of the arena."""
    offsets, end = [], 0
    for array in arrays:
        offsets.append(end)
        end += -(-array.nbytes // 4096) * 4096
    return offsets, end


def run_cachegrind(
    func: Any,
    arrays: Sequence[NDArray[Any]],
    target: Any,
    first: CacheLevel,
    last: CacheLevel,
    *,
    calls: int = 1,
) -> CacheCounts:
    """Count the data-cache events of ``calls`` calls of a scheduled function, on one thread.

    Parameters
    ----------
    func : PrimFunc
        Scheduled for ``target``; parallel loops are run serially.
    arrays : sequence of ndarray
        One for each parameter, outputs included, laid out as :func:`arena_offsets` says.
    target : tvm.target.Target
        LLVM target without AVX-512.
    first, last : CacheLevel
        The two levels to simulate; sizes that valgrind can express (powers of two of sets).
    calls : int
        Calls in a row; caches stay warm between them.

    Raises
    ------
    MeasurementError
        If a tool is missing or fails; the message holds its last line.
    """
    if reason := missing_tool():
        raise MeasurementError(f"cachegrind: {reason}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _export(func, target, folder / "kernel.so")
        _write_arena(arrays, folder / "arena")
        command = [str(_driver(folder)), str(folder / "kernel.so"), f"__tvm_ffi_{_SYMBOL}"]
        command.append(str(folder / "arena"))
        options = _options(first, last, folder / "profile")
        counts = []
        # A run without a call has the copies that the loader makes.
        for number in (calls, 0):
            _run(["valgrind", *options, *command, str(number), *_tensor_arguments(arrays)])
            counts.append(_parse((folder / "profile").read_text(errors="replace"), *_FUNCTIONS))
        called, loaded = (astuple(count) for count in counts)
        return CacheCounts(*(a - b for a, b in zip(called, loaded, strict=True)))


def serial(func: Any) -> Any:
    """Return the function with parallel loops made serial."""

    def plain(loop: Any) -> Any:
        if int(loop.kind) != int(tirx.ForKind.PARALLEL):
            return loop
        return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)

    return func.with_body(tvm_ffi.structural_map(func.body, (tirx.For, plain)))


def _export(func: Any, target: Any, path: Path) -> None:
    named = serial(func).with_attr("global_symbol", _SYMBOL)
    built = tvm.compile(tvm.IRModule({_SYMBOL: named}), target, tir_pipeline=register_pipeline())
    built.export_library(str(path))


def _write_arena(arrays: Sequence[NDArray[Any]], path: Path) -> None:
    offsets, size = arena_offsets(arrays)
    with path.open("wb") as file:
        file.truncate(size)
        for array, offset in zip(arrays, offsets, strict=True):
            file.seek(offset)
            file.write(np.ascontiguousarray(array).tobytes())


def _driver(folder: Path) -> Path:
    source = files("icd_tvm.measure").joinpath("cachegrind_driver.c").read_text(encoding="utf-8")
    (folder / "driver.c").write_text(source, encoding="utf-8")
    library = Path(libinfo.find_libtvm_ffi()).parent
    includes = [f"-I{libinfo.find_include_path()}", f"-I{libinfo.find_dlpack_include_path()}"]
    link = ["-ldl", f"-L{library}", "-Wl,--no-as-needed", "-ltvm_ffi", f"-Wl,-rpath,{library}"]
    driver = folder / "driver"
    _run(["cc", "-O1", str(folder / "driver.c"), "-o", str(driver), *includes, *link])
    return driver


def _tensor_arguments(arrays: Sequence[NDArray[Any]]) -> list[str]:
    codes = {"i": 0, "u": 1, "f": 2}
    words: list[int] = []
    for array, offset in zip(arrays, arena_offsets(arrays)[0], strict=True):
        words += [codes[array.dtype.kind], 8 * array.dtype.itemsize, offset]
        words += [array.ndim, *array.shape]
    return [str(word) for word in words]


def _options(first: CacheLevel, last: CacheLevel, profile: Path) -> list[str]:
    sizes = [f"{c.size_bytes},{c.ways},{c.line_bytes}" for c in (first, last)]
    return [
        "--tool=cachegrind",
        "--cache-sim=yes",
        f"--D1={sizes[0]}",
        f"--LL={sizes[1]}",
        f"--cachegrind-out-file={profile}",
    ]


def _run(command: list[str]) -> None:
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise MeasurementError(f"cachegrind: {command[0]} ran for {_TIMEOUT_S} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise MeasurementError(f"cachegrind: {command[0]} failed: {lines[-1] if lines else '?'}")


def _parse(text: str, *functions: str) -> CacheCounts:
    """Sum the events of the named functions.

    Raises
    ------
    MeasurementError
        If the text is no cachegrind profile or holds none of the functions.
    """
    events: list[str] = []
    totals: dict[str, int] = {}
    inside = False
    for line in text.splitlines():
        if line.startswith("events:"):
            events = line.split()[1:]
        elif line.startswith("fn="):
            # __memcpy_avx_unaligned_erms is memcpy.
            name = re.sub(r"^_+(mem[a-z]+)_.*", r"\1", line[3:].strip())
            inside = name in functions
        elif inside and re.fullmatch(r"\d+( \d+)+", line):
            for event, value in zip(events, line.split()[1:], strict=False):
                totals[event] = totals.get(event, 0) + int(value)
    # The summary is the last line: without it the profile was cut short.
    whole = re.search(r"^summary:( \d+)+$", text, re.MULTILINE)
    if not whole or not {"Dr", "Dw", "D1mr", "D1mw", "DLmr", "DLmw"} <= totals.keys():
        raise MeasurementError(f"cachegrind: no events of {functions[0]} in the profile")
    return CacheCounts(
        totals["Dr"] + totals["Dw"],
        totals["D1mr"] + totals["D1mw"],
        totals["DLmr"] + totals["DLmw"],
    )
