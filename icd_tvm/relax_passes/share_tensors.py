"""ShareTensors: values that the memory plan gives the same place and shape share one tensor."""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import PyExprMutator, Var, mutator, relax, tvm
from icd_tvm.relax_passes.relax_graph import is_call, rewrite_functions, static_shape


@tvm.transform.module_pass(opt_level=0, name="ShareTensors")
class ShareTensors:
    """Make one tensor for every place and shape in planned memory, and one view of each shape.

    The memory plan lets the same storage hold one value after the other, but makes a tensor
    object for each: in a decoding step of hundreds of small kernels that takes as long as a
    tenth of the kernels. Runs between `StaticPlanBlockMemory` and `KillAfterLastUse`; outputs
    are not in planned memory and get a tensor of their own at every call.

    Attributes
    ----------
    shared : int
        Bindings that use an earlier tensor or view.
    """

    def __init__(self) -> None:
        self.shared = 0

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a clone of ``mod`` with the tensors shared."""
        self.shared = 0
        return rewrite_functions(mod, lambda new, _: _Sharer(new, self))


def vm_pipeline() -> Any:
    """Return TVM's passes from scheduled calls to the virtual machine, with `ShareTensors`."""
    rx = relax.transform
    return tvm.transform.Sequential(
        [
            relax.backend.DispatchSampling(),
            relax.backend.DispatchSortScan(),
            rx.LegalizeOps(),
            rx.RewriteDataflowReshape(),
            rx.ToNonDataflow(),
            rx.RemovePurityChecking(),
            rx.CallTIRRewrite(),
            rx.StaticPlanBlockMemory(),
            ShareTensors(),
            rx.LowerAllocTensor(),
            rx.KillAfterLastUse(),
            rx.LowerRuntimeBuiltin(),
            rx.ComputePrimValue(),
            rx.VMShapeLower(),
            rx.AttachGlobalSymbol(),
        ],
        name="icd.vm",
    )


@mutator
class _Sharer(PyExprMutator):
    def __init__(self, mod: Any, owner: ShareTensors) -> None:
        super().__init__(mod)
        self._owner = owner
        self._known: dict[Any, Any] = {}

    def visit_seq_expr_(self, seq: Any) -> Any:
        """Forget at the end of a branch what was made in it."""
        known = dict(self._known)
        seq = super().visit_seq_expr_(seq)
        self._known = known
        return seq

    def visit_var_binding_(self, binding: Any) -> None:
        value = self.visit_expr(binding.value)
        if isinstance(value, Var):
            self.set_var_remap(binding.var, value)
            return
        key = _place(value)
        if key in self._known:
            self._owner.shared += 1
            self.set_var_remap(binding.var, self._known[key])
            return
        var = self.visit_var_def(binding.var)
        self.builder_.emit_normalized(relax.VarBinding(var, self.builder_.normalize(value)))
        self.set_var_remap(binding.var, var)
        if key is not None:
            self._known[key] = var


def _place(value: Any) -> tuple[Any, ...] | None:
    """Return what makes a tensor in planned memory, or a view, what it is; None for others."""
    if is_call(value, "relax.memory.alloc_tensor"):
        storage, offset, _, dtype = value.args[:4]
        sizes = static_shape(value)
        return None if sizes is None else (storage, int(offset), sizes, str(dtype.value))
    if is_call(value, "relax.reshape") and static_shape(value) is not None:
        return ("view", value.args[0], static_shape(value))
    return None
