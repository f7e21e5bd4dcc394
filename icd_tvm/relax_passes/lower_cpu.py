"""From a Relax module to CPU code: fuse, pack, legalise, schedule, compile."""

from __future__ import annotations

from typing import Any, NamedTuple

from icd_tvm._tvm import dlight, relax, tvm
from icd_tvm.relax_passes.append_in_place import AppendInPlace
from icd_tvm.relax_passes.fold_scales import FoldScales
from icd_tvm.relax_passes.fuse_attention import FuseAttention
from icd_tvm.relax_passes.fuse_bf16_matmul import FuseBf16Matmul
from icd_tvm.relax_passes.fuse_decode_attention import FuseDecodeAttention
from icd_tvm.relax_passes.fuse_depthwise_conv import FuseDepthwiseConv
from icd_tvm.relax_passes.fuse_gelu import FuseGelu
from icd_tvm.relax_passes.fuse_quantized_matmul import FuseQuantizedMatmul
from icd_tvm.relax_passes.fuse_quantized_output import FuseQuantizedOutput
from icd_tvm.relax_passes.fuse_residual_norm import FuseResidualNorm
from icd_tvm.relax_passes.fuse_rms_norm import FuseRmsNorm
from icd_tvm.relax_passes.fuse_scan_pair import FuseScanPair
from icd_tvm.relax_passes.fuse_softplus import FuseSoftplus
from icd_tvm.relax_passes.merge_parallel_matmul import MergeParallelMatmul
from icd_tvm.relax_passes.pack_weights import PackWeights
from icd_tvm.relax_passes.select_kernels import SelectKernels, read_kernels
from icd_tvm.relax_passes.share_tensors import vm_pipeline
from icd_tvm.relax_passes.shorten_erf import ShortenErf
from icd_tvm.relax_passes.slice_splits import SliceSplits
from icd_tvm.relax_passes.vector_legalize import legalize_map
from icd_tvm.tir_schedules.cpu import cpu_rules
from icd_tvm.tir_schedules.cpu.select import KernelChoice
from icd_tvm.tir_schedules.cpu.stack import register_pipeline


class Lowered(NamedTuple):
    """A compiled module.

    Attributes
    ----------
    executable : tvm.runtime.vm.VMExecutable
        As `build_cpu` returns it.
    choices : dict of str to KernelChoice
        Name of each matmul with zeros in its weight -> its kernel, and why.
    mod : IRModule
        What runs: calls of scheduled TIR functions, and views.
    """

    executable: Any
    choices: dict[str, KernelChoice]
    mod: Any


def cpu_pipeline(target: Any, *, kernels: KernelChoice | None = None, tune: bool = True) -> Any:
    """Return the passes that turn a Relax module into scheduled CPU kernels.

    Parameters
    ----------
    target : tvm.target.Target
        LLVM target, e.g. from `host_target`.
    kernels : KernelChoice, optional
        Kernel for every matmul whose weight has zeros; ``KernelChoice("dense", 0, "")`` keeps
        them all dense. If omitted each is chosen by `choose_matmul_kernel`.
    tune : bool, optional
        Whether that choice is measured on this machine (else modelled).

    Returns
    -------
    tvm.transform.Sequential
        To be run under ``with target:``. Compile the result with the TIR pipeline that
        `build_cpu` uses; TVM's own gives the same results more slowly.
    """
    rx = relax.transform
    return tvm.transform.Sequential(
        [
            # Folding would turn quantised weights into floats.
            FuseQuantizedMatmul(target),
            # Patterns are easiest to recognise on named operators.
            rx.FoldConstant(),
            FuseAttention(target),
            FuseDecodeAttention(target),
            AppendInPlace(),
            MergeParallelMatmul(target),
            FuseResidualNorm(target),
            FuseRmsNorm(target),
            FuseGelu(),
            FoldScales(),
            FuseQuantizedOutput(target),
            ShortenErf(),
            FuseBf16Matmul(target),
            FuseScanPair(),
            FuseDepthwiseConv(),
            FuseSoftplus(),
            SliceSplits(),
            # Constant weights are laid out for the kernel that reads them.
            SelectKernels(target, force=kernels, tune=tune),
            PackWeights(target),
            # Everything else becomes loops; what depends on constants alone is computed now.
            rx.LegalizeOps(legalize_map(target)),
            rx.AnnotateTIROpPattern(),
            rx.FoldConstant(),
            # Elementwise consumers join the matmul before them, then run on its registers.
            rx.FuseOps(),
            rx.FuseTIR(),
            rx.DeadCodeElimination(),
            dlight.ApplyDefaultSchedule(*cpu_rules()),
        ],
        name="icd.cpu",
    )


def build_cpu(
    mod: Any, target: Any, *, kernels: KernelChoice | None = None, tune: bool = True
) -> Any:
    """Lower and compile a module for the CPU.

    Parameters
    ----------
    mod : IRModule
        Constants bound; matmuls may already be calls of our sparse kernels. Left untouched.
        States that its layout tag declares opaque are written in place where the module only
        appends to them (`AppendInPlace`): a caller that passes tensors gives them up.
    target, kernels, tune
        As for `cpu_pipeline`.

    Returns
    -------
    tvm.runtime.vm.VMExecutable
        For ``relax.VirtualMachine(executable, tvm.cpu())``.
    """
    return lower_and_build(mod, target, kernels=kernels, tune=tune).executable


def lower_and_build(
    mod: Any, target: Any, *, kernels: KernelChoice | None = None, tune: bool = True
) -> Lowered:
    """Lower and compile a module for the CPU, and tell which matmul kernels it got.

    Parameters
    ----------
    mod, target, kernels, tune
        As for `build_cpu`.

    Returns
    -------
    Lowered
    """
    with target:
        lowered = cpu_pipeline(target, kernels=kernels, tune=tune)(mod)
        executable = tvm.compile(
            lowered, target, relax_pipeline=vm_pipeline(), tir_pipeline=register_pipeline()
        )
    # What only changes a shape is a view in the virtual machine: no kernel runs.
    viewed = relax.transform.RewriteDataflowReshape()(lowered)
    return Lowered(executable, read_kernels(lowered), viewed)
