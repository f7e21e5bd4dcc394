"""From a Relax module to CUDA code: fuse, legalise, schedule, compile."""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import dlight, relax, tvm
from icd_tvm.relax_passes.append_in_place import AppendInPlace
from icd_tvm.relax_passes.cuda_graph import for_graph, graph_config
from icd_tvm.relax_passes.hold_weight_only import HoldWeightOnly
from icd_tvm.relax_passes.mark_int8_products import MarkInt8Products
from icd_tvm.relax_passes.merge_shared_input import MergeSharedInput
from icd_tvm.relax_passes.plain_names import PlainNames
from icd_tvm.relax_passes.select_cuda_kernels import SelectCudaKernels


def cuda_pipeline(arch: str, precision: str | None = None) -> Any:
    """Return the passes that turn a Relax module into scheduled CUDA kernels.

    Parameters
    ----------
    arch : str
        ``sm_80``, ``sm_90`` or ``sm_90a``.
    precision : str, optional
        ``float16`` or ``bfloat16``: use tensor cores for matmuls with constant weights. Operands
        that are quantised both are multiplied in int8, others are rounded to it. All stays float32,
        by TVM's schedules, if omitted.

    Returns
    -------
    tvm.transform.Sequential
        To be run under ``with target:``.
    """
    rx, gpu = relax.transform, dlight.gpu
    return tvm.transform.Sequential(
        [
            *_coded(arch, precision),
            rx.FoldConstant(),
            *_kernels(arch, precision),
            # Caches whose append is not part of a kernel.
            AppendInPlace(gpu=True),
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


def _coded(arch: str, precision: str | None) -> list[Any]:
    # Weights would be dequantised where constants are folded.
    return [] if precision is None else [MarkInt8Products(arch), HoldWeightOnly(precision)]


def _kernels(arch: str, precision: str | None) -> list[Any]:
    return [] if precision is None else [MergeSharedInput(), SelectCudaKernels(arch, precision)]


def lower_cuda(mod: Any, target: Any, precision: str | None = None) -> Any:
    """Return the calls of scheduled kernels that `build_cuda` compiles; arguments as there."""
    with target:
        return cuda_pipeline(str(target.attrs["arch"]), precision)(mod)


def build_cuda(mod: Any, target: Any, precision: str | None = None, *, graph: bool = True) -> Any:
    """Lower and compile a module for a CUDA device.

    Parameters
    ----------
    mod : IRModule
        Constants bound. Left untouched.
    target : tvm.target.Target
        From `icd_tvm.tir_schedules.target.cuda_target`.
    precision : str, optional
        As for `cuda_pipeline`.
    graph : bool
        Capture the kernels of a step as a CUDA graph, at its first call; left out where a shape is
        not known. States that are written in place must then be the same tensors in every call.

    Returns
    -------
    tvm.runtime.vm.VMExecutable
        For ``VirtualMachine(executable, tvm.cuda())``.
    """
    lowered = lower_cuda(mod, target, precision)
    config = graph_config(lowered, graph)
    if graph:
        lowered = for_graph(lowered)
    with tvm.transform.PassContext(config=config):
        return compile_lowered(lowered, target)


def compile_lowered(lowered: Any, target: Any) -> Any:
    """Compile what `lower_cuda` returned, whose constants may have become parameters since."""
    with target:
        return tvm.compile(lowered, target, relax_pipeline=relax.get_default_pipeline(target))
