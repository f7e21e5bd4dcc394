"""Compile for a CUDA device on a machine that need not have one.

The compiler runs in a process of its own, which has the driver's stub; nothing of it stays in ours.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from icd_tvm.errors import IcdError, MeasurementError
from icd_tvm.measure.cuda_toolkit import find_cudart, find_nvcc, load_driver
from icd_tvm.runtime.fatbin import CodeEntry, machine_code

NOT_MEASURED = "not measured: arms for a GPU are compiled here, and not timed"
TIMEOUT_S = 3600
_ROOT = Path(__file__).resolve().parents[2]


def cross_compile(
    mod: Any,
    arch: str,
    path: Path,
    precision: str | None = None,
    *,
    graph: bool = True,
    lowered: bool = False,
) -> list[CodeEntry]:
    """Write a library with machine code of a CUDA architecture inside.

    Parameters
    ----------
    mod : tvm.IRModule
        A Relax module, constants bound.
    arch : str
        E.g. ``sm_90``.
    path : Path
        File to write.
    precision : str, optional
        As for `icd_tvm.relax_passes.lower_cuda.cuda_pipeline`.
    graph : bool
        As for `icd_tvm.relax_passes.lower_cuda.build_cuda`.
    lowered : bool
        ``mod`` comes from `icd_tvm.relax_passes.lower_cuda.lower_cuda`; no graph then.

    Returns
    -------
    list of CodeEntry
        The machine code that was found in the file.

    Raises
    ------
    MissingDependencyError
        If nvcc or the CUDA runtime library is missing.
    IcdError
        If the compiler fails, or the library holds no machine code of ``arch``.
    """
    from icd_tvm._tvm import tvm

    find_nvcc()
    find_cudart()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "module.json"
        source.write_text(tvm.ir.save_json(mod), "utf-8")
        mode = "lowered" if lowered else "graph" * graph
        _run_child([str(source), str(path), arch, precision or "", mode])
    return check_machine_code(path, arch)


def check_machine_code(path: Path, arch: str) -> list[CodeEntry]:
    """Return the machine code of ``arch`` in a library; an IcdError where there is none."""
    found = [entry for entry in machine_code(path) if entry.arch == arch]
    if not found:
        raise IcdError(
            f"{path.name} holds no machine code of {arch}",
            "TVM's CUDA runtime did not load, so only source text was embedded",
        )
    return found


def _run_child(arguments: list[str]) -> None:
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        # The default compiler is NVRTC; fast arithmetic would make equality a matter of luck.
        "TVM_CUDA_COMPILE_MODE": "nvcc",
        "TVM_CUDA_NVCC_NO_FAST_MATH": "1",
    }
    child = subprocess.run(
        [sys.executable, "-m", "icd_tvm.runtime.cross_compile", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=TIMEOUT_S,
    )
    if child.returncode != 0:
        lines = [line for line in child.stderr.splitlines() if line.strip()]
        telling = [line for line in lines if "error" in line.lower()]
        reason = (telling or lines or [f"exit status {child.returncode}"])[-1].strip()
        raise IcdError(f"the CUDA compiler failed: {reason[:300]}")


def _child(source: str, path: str, arch: str, precision: str, mode: str) -> None:
    load_driver()
    from icd_tvm._tvm import tvm, tvm_ffi
    from icd_tvm.relax_passes.lower_cuda import build_cuda, compile_lowered
    from icd_tvm.tir_schedules.target import cuda_target

    if tvm_ffi.get_global_func("ffi.Module.create.cuda", allow_missing=True) is None:
        raise MeasurementError("TVM's CUDA runtime did not load")
    mod = tvm.ir.load_json(Path(source).read_text("utf-8"))
    target = cuda_target(arch)
    if mode == "lowered":
        made = compile_lowered(mod, target)
    else:
        made = build_cuda(mod, target, precision or None, graph=mode == "graph")
    made.export_library(path)


if __name__ == "__main__":
    _child(*sys.argv[1:])
