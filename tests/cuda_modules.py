"""Run a whole lowered module on the CPU: our kernels thread by thread, TVM's operators by LLVM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from cuda_emulation import Emulated
from tvm import relax

from icd_tvm._tvm import PyExprMutator, apply_pass, mutator
from icd_tvm.relax_passes.attach_layout_tags import AttachLayoutTags
from icd_tvm.relax_passes.hold_weight_only import HoldWeightOnly
from icd_tvm.relax_passes.kernel_calls import kernel_calls
from icd_tvm.relax_passes.mark_int8_products import MarkInt8Products
from icd_tvm.relax_passes.merge_shared_input import MergeSharedInput
from icd_tvm.relax_passes.relax_graph import is_call
from icd_tvm.relax_passes.select_cuda_kernels import SelectCudaKernels

States = tuple[tuple[str, str], ...]


def selected(
    mod: Any, dtype: str = "float16", states: States = (), arch: str = "sm_90"
) -> tuple[Any, SelectCudaKernels]:
    """Return the module with our kernels chosen as `cuda_pipeline` does, and the pass."""
    if states:
        mod = apply_pass(AttachLayoutTags(opaque_states=states), mod)
    chosen = SelectCudaKernels(arch, dtype)
    mod = apply_pass(HoldWeightOnly(dtype), apply_pass(MarkInt8Products(arch), mod))
    merged = apply_pass(MergeSharedInput(), relax.transform.FoldConstant()(mod))
    return apply_pass(chosen, merged), chosen


def launches(mod: Any) -> list[str]:
    """Return the kernels that ``main`` of a lowered module calls, in order."""
    return [call.kernel for call in kernel_calls(mod) if call.kernel]


class EmulatedModule:
    """A module whose kernels run in the emulator, in the order of the function.

    Attributes
    ----------
    calls : list of str
        Kernels of ours that the last run called, in order.
    """

    def __init__(self, mod: Any, chosen: SelectCudaKernels, folder: Path) -> None:
        self.calls: list[str] = []
        self._chosen = chosen
        self._emulated = Emulated(list(chosen.kernels.values()), folder)
        func = _ToPacked(mod, self).visit_expr(mod["main"])
        self._names = [str(param.name) for param in func.params]
        executable = tvm.compile(tvm.IRModule({"main": func}), "llvm")
        self._machine = relax.VirtualMachine(executable, tvm.cpu())

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return the outputs."""
        self.calls = []
        found = self._machine["main"](*(tvm.runtime.tensor(feeds[name]) for name in self._names))
        outputs = [found] if isinstance(found, tvm.runtime.Tensor) else list(found)
        return [output.numpy() for output in outputs]

    def packed(self, name: str, inside: list[int]) -> str:
        """Register a function that runs a kernel; return its name.

        New states come as outputs of their own: copies of the old ones, which are then written.
        """
        kernel = self._chosen.kernels[name]
        fresh = inside.count(-1) if inside else kernel.outputs
        count = len(kernel.arguments) - fresh

        def run(*tensors: Any) -> None:
            self.calls.append(name)
            arrays, outputs = list(tensors[:count]), tensors[count:]
            for place, out in zip(inside or [-1] * fresh, outputs, strict=True):
                if place < 0:
                    arrays.append(out)
                else:
                    out.copyfrom(arrays[place])
                    arrays[place] = out
            self._emulated.launch(kernel, [array.data_ptr() for array in arrays], order=2)

        label = f"icd_test.{id(self)}.{name}"
        tvm_ffi.register_global_func(label, run, override=True)
        return label


@mutator
class _ToPacked(PyExprMutator):
    """Replaces calls of our kernels by calls of the emulator."""

    def __init__(self, mod: Any, owner: EmulatedModule) -> None:
        super().__init__(mod)
        self._owner = owner

    def visit_call_(self, call: Any) -> Any:
        call = super().visit_call_(call)
        inside = is_call(call, "relax.call_tir_inplace")
        if not inside and not is_call(call, "relax.call_tir"):
            return call
        indices = [int(i) for i in call.attrs.inplace_indices] if inside else []
        label = self._owner.packed(str(call.args[0].name_hint), indices)
        kinds = call.ty_args[0]
        several = isinstance(kinds, relax.TupleType)
        return relax.call_dps_packed(label, call.args[1], list(kinds.fields) if several else kinds)
