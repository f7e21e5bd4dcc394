"""What a compiler made of CUDA kernels: registers, spills, instructions. Nothing runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from icd_tvm.errors import IcdError
from icd_tvm.measure.cuda_toolkit import find_nvcc
from icd_tvm.tir_schedules.cuda.source_kernel import SourceKernel, whole_text

_ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
    re.DOTALL,
)
# Of ptxas: products of warpgroups wait for one another (C7510 to C7517, by the reason).
_SERIALIZED = re.compile(r"\(C75\d\d\) (.*?) in (?:the )?function '(\w+)'")
_PTX_ENTRY = re.compile(r"\.entry (\w+)\(.*?^\}", re.DOTALL | re.MULTILINE)
_PTX_OPERATION = re.compile(r"^\s*(?:@!?%p\d+ )?([a-z][\w.:]+)[ ;]", re.MULTILINE)
_SASS_SECTION = re.compile(r"\.section\s+\.text\.(\w+)[^\n]*\n(.*?)(?=\.section\s|\Z)", re.DOTALL)
_SASS_OPERATION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", re.MULTILINE)


@dataclass(frozen=True)
class Inspection:
    """One kernel after compilation.

    Attributes
    ----------
    registers : int
        Of a thread.
    stack, spilled : int
        Bytes of a thread.
    ptx, sass : Counter of str
        Instruction with its modifiers -> how often it stands there; ``sass`` is empty where there
        is no disassembler.
    serialized : str
        Why warpgroup products wait for one another, by ptxas; empty where they do not.
    """

    registers: int
    stack: int
    spilled: int
    ptx: Counter[str] = field(default_factory=Counter)
    sass: Counter[str] = field(default_factory=Counter)
    serialized: str = ""

    def count(self, prefix: str) -> int:
        """Return how many instructions of SASS, or of PTX, begin so."""
        return sum(n for name, n in (self.sass + self.ptx).items() if name.startswith(prefix))


def find_disassembler() -> str | None:
    """Return the path of nvdisasm (the package nvidia-cuda-nvdisasm has it), or None."""
    package = Path(sysconfig.get_paths()["purelib"]) / "nvidia/cu13/bin/nvdisasm"
    places = ("/usr/local/cuda/bin/nvdisasm", str(package))
    chosen = os.environ.get("ICD_NVDISASM") or shutil.which("nvdisasm")
    return chosen or next((place for place in places if Path(place).exists()), None)


def inspect_kernels(
    kernels: Sequence[SourceKernel], arch: str, folder: Path
) -> dict[str, Inspection]:
    """Compile kernels and read what came out.

    Parameters
    ----------
    kernels : sequence of SourceKernel
    arch : str
        E.g. ``sm_90``.
    folder : Path
        For the text and the machine code.

    Returns
    -------
    dict of str to Inspection
        Name of each kernel -> what it became.

    Raises
    ------
    MissingDependencyError
        If nvcc is missing.
    IcdError
        If it refuses a kernel.
    """
    source, cubin, ptx = (folder / f"kernels.{kind}" for kind in ("cu", "cubin", "ptx"))
    source.write_text(whole_text(list(kernels)), "utf-8")
    base = [find_nvcc(), "-O3", "-std=c++17", "-w", f"-arch={arch}", "-o"]
    _compiled([*base, str(ptx), "-ptx", str(source)])
    told = _compiled([*base, str(cubin), "-cubin", "-Xptxas=-v", str(ptx)])
    by_ptx = _operations(ptx.read_text("utf-8"), _PTX_ENTRY, _PTX_OPERATION)
    by_sass = _operations(_disassembled(cubin), _SASS_SECTION, _SASS_OPERATION)
    serialized = {name: why for why, name in _SERIALIZED.findall(told)}
    return {
        name: Inspection(
            int(registers),
            int(stack),
            int(stored) + int(loaded),
            by_ptx.get(name, Counter()),
            by_sass.get(name, Counter()),
            serialized.get(name, ""),
        )
        for name, stack, stored, loaded, registers, _ in _ENTRY.findall(told)
    }


def _compiled(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise IcdError(f"nvcc: {lines[0].strip()[:300]}")
    return done.stderr


def _disassembled(cubin: Path) -> str:
    tool = find_disassembler()
    if tool is None:
        return ""
    return subprocess.run(
        [tool, "-c", str(cubin)], check=True, capture_output=True, text=True
    ).stdout


def _operations(
    text: str, entries: re.Pattern[str], operations: re.Pattern[str]
) -> dict[str, Counter[str]]:
    return {
        match.group(1): Counter(operations.findall(match.group(0)))
        for match in entries.finditer(text)
    }
