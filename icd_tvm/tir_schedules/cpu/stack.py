"""Compile TIR for the CPU with small scratch buffers on the stack.

TVM lowers every local buffer, even one of four bytes, to a pair of calls into its workspace
pool. A register tile then lives in memory that LLVM must not touch across the calls, and a row
kernel spends more time allocating than computing. Buffers marked here become an ``alloca``,
which LLVM turns into registers.
"""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import tirx, tvm, tvm_ffi

TIR_PIPELINE = "icd_cpu"
# Worker threads have stacks of megabytes; kernels hold a handful of such buffers.
_MAX_BYTES = 128 * 1024
_MARK = "disable_lower_builtin"


@tvm.transform.module_pass(opt_level=0, name="KeepOnStack")
class KeepOnStack:
    """Mark constant-size local buffers of up to 128 KiB for allocation on the stack.

    Runs on lowered TIR, right before the builtins are lowered.
    """

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return ``mod`` with the marks added."""
        mod = mod.clone()
        for name, func in mod.functions_items():
            if isinstance(func, tirx.PrimFunc):
                body = tvm_ffi.structural_map(func.body, (tirx.AllocBuffer, _mark))
                mod[name] = func.with_body(body)
        return mod


def compile_kernel(func: Any, target: Any) -> Any:
    """Return the compiled module of one scheduled TIR function, callable as ``["main"]``.

    Parameters
    ----------
    func : PrimFunc
        Scheduled for ``target``.
    target : tvm.target.Target
        An LLVM target.

    Returns
    -------
    tvm.runtime.Executable
    """
    return tvm.compile(
        func.with_attr("global_symbol", "main"), target, tir_pipeline=register_pipeline()
    )


def register_pipeline() -> str:
    """Register the TIR pipeline of this package and return its name.

    It is TVM's own pipeline with `KeepOnStack` before the builtins are lowered.
    """
    tirx.register_tir_pipeline(TIR_PIPELINE, _pipeline)
    return TIR_PIPELINE


def _pipeline() -> Any:
    lower, finalize_host, finalize_device = tirx.get_tir_pipeline("s_tir")
    return (
        lower,
        lambda: tvm.transform.Sequential([KeepOnStack(), finalize_host()]),
        finalize_device,
    )


def _mark(alloc: Any) -> Any:
    if _byte_count(alloc.buffer) > _MAX_BYTES:
        return alloc
    notes = {**dict(alloc.annotations), _MARK: tirx.IntImm("bool", 1)}
    return tirx.AllocBuffer(alloc.buffer, annotations=notes)


def _byte_count(buffer: Any) -> int:
    count = int(tvm_ffi.dtype(str(buffer.ty.dtype)).itemsize)
    for extent in buffer.ty.shape:
        if not isinstance(extent, tirx.IntImm):
            return _MAX_BYTES + 1
        count *= int(extent)
    return count
