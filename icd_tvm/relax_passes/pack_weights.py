"""PackWeights: matmuls with constant weights become packed kernels, repacked at compile time."""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import PyExprMutator, const_name, mutator, named_const, tvm
from icd_tvm.relax_passes.relax_graph import (
    call_func,
    constant_weight,
    rewrite_functions,
    static_shape,
)
from icd_tvm.tir_schedules.cpu.matmul_kinds import dense_kernel


@tvm.transform.module_pass(opt_level=0, name="PackWeights")
class PackWeights:
    """Replace ``relax.matmul(x, W)`` with a constant 2-D W by the packed dense kernel.

    Runs before legalisation, while the weight is still recognisable as one. The packed
    constant keeps the name of the weight.

    Parameters
    ----------
    target : tvm.target.Target
        The register tile, and so the packing, is chosen for it.

    Attributes
    ----------
    packed : int
        Matmuls replaced.
    """

    def __init__(self, target: Any) -> None:
        self.target = target
        self.packed = 0

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a clone of ``mod`` with the matmuls replaced."""
        self.packed = 0
        mod = rewrite_functions(mod, lambda new, func: _Packer(new, self))
        return mod


@mutator
class _Packer(PyExprMutator):
    def __init__(self, mod: Any, owner: PackWeights) -> None:
        super().__init__(mod)
        self._owner = owner

    def visit_call_(self, call: Any) -> Any:
        call = super().visit_call_(call)
        weight = constant_weight(call)
        if weight is None:
            return call
        shape = (*(static_shape(call.args[0]) or ()), weight.shape[1])
        kernel = dense_kernel(shape, self._owner.target)
        self._owner.packed += 1
        args = [call.args[0], named_const(kernel.pack(weight), const_name(call.args[1]))]
        return call_func(self.builder_, kernel.func, kernel.name, args, call.ty)
