"""From a Relax module to CUDA code: fuse, legalise, schedule, compile."""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import dlight, relax, tvm
from icd_tvm.relax_passes.plain_names import PlainNames
from icd_tvm.relax_passes.select_cuda_kernels import SelectCudaKernels


def cuda_pipeline(arch: str, precision: str | None = None) -> Any:
    """Return the passes that turn a Relax module into scheduled CUDA kernels.

    Parameters
    ----------
    arch : str
        ``sm_80`` or ``sm_90``.
    precision : str, optional
        ``float16`` or ``bfloat16``: round the operands of matmuls with constant weights to it and
        use tensor cores. All stays float32, by TVM's schedules, if omitted.

    Returns
    -------
    tvm.transform.Sequential
        To be run under ``with target:``.
    """
    rx, gpu = relax.transform, dlight.gpu
    return tvm.transform.Sequential(
        [
            rx.FoldConstant(),
            *([] if precision is None else [SelectCudaKernels(arch, precision)]),
            rx.DeadCodeElimination(),
            # Else a kernel of its own transposes the weight in every call.
            rx.FuseTransposeMatmul(),
            # Legalised operators are named after their inputs, fused ones after their parameters.
            PlainNames(),
            rx.LegalizeOps(),
            rx.AnnotateTIROpPattern(),
            rx.FoldConstant(),
            rx.FuseOps(),
            PlainNames(),
            rx.FuseTIR(),
            rx.DeadCodeElimination(),
            dlight.ApplyDefaultSchedule(
                gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback()
            ),
        ],
        name="icd.cuda",
    )


def lower_cuda(mod: Any, target: Any, precision: str | None = None) -> Any:
    """Return the calls of scheduled kernels that `build_cuda` compiles; arguments as there."""
    with target:
        return cuda_pipeline(str(target.attrs["arch"]), precision)(mod)


def build_cuda(mod: Any, target: Any, precision: str | None = None) -> Any:
    """Lower and compile a module for a CUDA device.

    Parameters
    ----------
    mod : IRModule
        Constants bound. Left untouched.
    target : tvm.target.Target
        From `icd_tvm.tir_schedules.target.cuda_target`.
    precision : str, optional
        As for `cuda_pipeline`.

    Returns
    -------
    tvm.runtime.vm.VMExecutable
        For ``VirtualMachine(executable, tvm.cuda())``.
    """
    return compile_lowered(lower_cuda(mod, target, precision), target)


def compile_lowered(lowered: Any, target: Any) -> Any:
    """Compile what `lower_cuda` returned, whose constants may have become parameters since."""
    with target:
        return tvm.compile(lowered, target, relax_pipeline=relax.get_default_pipeline(target))
