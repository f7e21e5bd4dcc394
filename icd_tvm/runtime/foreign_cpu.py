"""Compile for a CPU whose code this machine cannot run: nothing is timed, nothing is executed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from icd_tvm._tvm import tvm
from icd_tvm.errors import MissingDependencyError
from icd_tvm.relax_passes.lower_cpu import build_cpu
from icd_tvm.tir_schedules.target import is_aarch64
from icd_tvm.tvm_log import without_scope_lines

ARM_LINKER = "aarch64-linux-gnu-g++"


def export_foreign(mod: Any, target: Any, path: Path) -> None:
    """Write the library of a module for ``target``; its kernels are chosen by the model.

    Parameters
    ----------
    mod : tvm.IRModule
        A Relax module, constants bound.
    target : tvm.target.Target
        LLVM target.
    path : Path
        ``.tar`` takes object files, to be linked over there by
        ``tvm.runtime.load_module`` or by hand; any other suffix a shared library.

    Raises
    ------
    MissingDependencyError
        If a shared library needs a linker that is not installed.
    """
    options = {}
    if path.suffix != ".tar" and is_aarch64(target):
        if shutil.which(ARM_LINKER) is None:
            raise MissingDependencyError(
                f"no linker for {path.suffix} of aarch64: {ARM_LINKER} is not installed",
                "install it, or write object files: -o model.tar",
            )
        options["fcompile"] = tvm.support.cc.cross_compiler(ARM_LINKER)
    executable = build_cpu(mod, target, tune=False)
    with without_scope_lines():
        executable.export_library(str(path), **options)
