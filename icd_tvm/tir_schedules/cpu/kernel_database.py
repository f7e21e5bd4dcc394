"""Kernel times that outlive a process: a plain file of JSON lines, which may be deleted any time.

A line is one comparison: kernels that were timed in turns on one shape. It counts only for the
machine, the code, the target and the number of threads that it was timed with. Writers append
whole lines under the system's lock; what a killed one left unfinished is skipped and timed again.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import logging
import math
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

from icd_tvm._tvm import tvm, tvm_ffi
from icd_tvm.core.hardware import data_caches, processor_name
from icd_tvm.errors import OutputError
from icd_tvm.files import default_cache, make_folder, source_digest

LOGGER = logging.getLogger("icd_tvm")
FORMAT = "icd/kernel-times/v1"
FILE_NAME = "kernels.jsonl"
_PACKAGE = Path(__file__).parents[2]
# What makes a kernel, and how it is timed.
_CODE = ("tir_schedules/cpu", "tir_schedules/target.py")

# What a record is asked by.
_KEY_FIELDS = ("machine", "code", "threads", "target", "shape", "rows")

Question = Mapping[str, Any]
Record = dict[str, Any]


class KernelDatabase:
    """Times of kernels by what they were timed for.

    Parameters
    ----------
    path : Path, optional
        The file, made when first written; ``kernels.jsonl`` in the cache folder if omitted.

    Attributes
    ----------
    damaged : int
        Lines of the file, as last read, that hold no record.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or default_cache() / FILE_NAME
        self.damaged = 0

    def get(self, question: Question) -> dict[str, float] | None:
        """Return the newest seconds by kind that are kept for ``question``; None if none are.

        Parameters
        ----------
        question : Mapping
            ``target`` (text), ``shape`` and ``rows`` (kind -> rows of W read per group), plain
            JSON. The machine, the code and the threads of TVM's pool are added to it.
        """
        wanted = _canonical({**_circumstances(), **question})
        return next((r["seconds"] for r in self.records()[::-1] if _question(r) == wanted), None)

    def put(self, question: Question, seconds: Mapping[str, float]) -> str:
        """Keep times; return why they could not be kept, or an empty string."""
        record = {"format": FORMAT, **_circumstances(), **question, "seconds": dict(seconds)}
        created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        try:
            make_folder(self.path.parent)
            _append(self.path, json.dumps({**record, "created": created}).encode() + b"\n")
        except (OSError, OutputError) as error:
            LOGGER.warning("kernel times are not kept: %s: %s", self.path, error)
            return str(error)
        return ""

    def records(self) -> list[Record]:
        """Return all records, the oldest first; a damaged line is counted and said, not returned.

        Lines of a later format are left out and do not count as damaged.
        """
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            lines = []
        except OSError as error:
            LOGGER.warning("kernel times cannot be read: %s: %s", self.path, error)
            lines = []
        found = [_parse(line) for line in lines if line.strip()]
        damaged = found.count(None)
        if damaged > self.damaged:
            LOGGER.warning(
                "%s: %d damaged lines; those kernels are timed again", self.path, damaged
            )
        self.damaged = damaged
        return [record for record in found if record]

    def clear(self) -> int:
        """Delete the file; return how many records it held.

        Raises
        ------
        OutputError
            If it cannot be deleted.
        """
        count = len(self.records())
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"cannot delete {self.path}: {error.strerror or error}") from error
        return count


def _circumstances() -> Record:
    """Return what times depend on beside the question: the machine, the code, the threads."""
    threads = int(tvm_ffi.get_global_func("runtime.NumThreads")())
    return {"machine": _machine(), "code": _code(), "threads": threads}


@cache
def _machine() -> Record:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": processor_name(),
        # A virtual machine may hide the model; LLVM looks at what the CPU can do.
        "llvm": str(tvm.target.codegen.llvm_get_system_cpu()),
        "caches": list(data_caches()),
        "cores": cores,
    }


@cache
def _code() -> str:
    version = importlib.metadata.version("apache-tvm")
    return f"{source_digest(_PACKAGE, _CODE)[:16]}, TVM {version}"


def _canonical(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True)


def _question(record: Record) -> str:
    return _canonical({name: record[name] for name in _KEY_FIELDS})


def _parse(line: bytes) -> Record | None:
    """Return the record of a line, {} for one of a later format, None for a damaged one."""
    try:
        record = json.loads(line)
        if record["format"] != FORMAT:
            return {} if record["format"].startswith("icd/kernel-times/") else None
        seconds = record["seconds"]
        sound = (
            record.keys() >= set(_KEY_FIELDS)
            and isinstance(record["shape"], list)
            and seconds.keys() == record["rows"].keys()
            and all(isinstance(value, float) and 0 < value < math.inf for value in seconds.values())
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return record if sound else None


def _append(path: Path, line: bytes) -> None:
    """Add a whole line; one that a killed writer left unfinished ends before it."""
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
