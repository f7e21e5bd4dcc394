"""SelectKernels: matmuls whose weight has zeros become sparse kernels where that is faster."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm._tvm import PyExprMutator, const_name, mutator, named_const, relax, tvm
from icd_tvm.relax_passes.relax_graph import Dataflow, call_func, constant_weight, static_shape
from icd_tvm.tir_schedules.cpu.block_sparse import kept_rows, pack_rowlist, pack_vrow
from icd_tvm.tir_schedules.cpu.select import KernelChoice, build_matmul, choose_matmul_kernel
from icd_tvm.tir_schedules.cpu.tile import choose_tile, flat_rows


@tvm.transform.module_pass(opt_level=0, name="SelectKernels")
class SelectKernels:
    """Replace ``relax.matmul(x, W)`` by a V-row or row-list kernel where W's zeros pay.

    The packed values keep the name of the weight; the row list is named after it with
    ``.rows`` appended. Every other matmul stays for `PackWeights`.

    Parameters
    ----------
    target : tvm.target.Target
        Kernels are built, and timed, for it.
    force : KernelChoice, optional
        Use this kind for every weight that has zeros, without asking; its ``nk`` is ignored.
    tune : bool, optional
        Passed to `choose_matmul_kernel`.

    Attributes
    ----------
    choices : dict of str to KernelChoice
        Name of each matmul with zeros in its weight -> what was chosen, and why.
    """

    def __init__(
        self, target: Any, *, force: KernelChoice | None = None, tune: bool = True
    ) -> None:
        self.target = target
        self.force = force
        self.tune = tune
        self.choices: dict[str, KernelChoice] = {}

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a clone of ``mod`` with the chosen matmuls replaced."""
        mod = mod.clone()
        self.choices = {}
        for name, func in mod.functions_items():
            if isinstance(func, relax.Function):
                rewriter = _Selector(mod, Dataflow(func), self)
                new = rewriter.visit_expr(func)
                mod = rewriter.builder_.get()
                mod[name] = new
        return mod

    def choose(self, shape: tuple[int, ...], weight: npt.NDArray[Any]) -> KernelChoice:
        """Return the kernel for ``X[*shape] @ weight``."""
        *lead, m, k = shape
        if self.force is not None:
            return _forced(self.force, weight)
        n = weight.shape[1]
        return choose_matmul_kernel(m, k, n, weight, self.target, lead=tuple(lead), tune=self.tune)


@mutator
class _Selector(PyExprMutator):
    def __init__(self, mod: Any, flow: Dataflow, owner: SelectKernels) -> None:
        super().__init__(mod)
        self._names = {value: str(var.name) for var, value in flow.values.items()}
        self._owner = owner

    def visit_call_(self, call: Any) -> Any:
        name = self._names.get(call, "matmul")
        call = super().visit_call_(call)
        weight = constant_weight(call)
        if weight is None or weight.all():
            return call
        shape = static_shape(call.args[0]) or ()
        choice = self._owner.choose(shape, weight)
        self._owner.choices[name] = choice
        if choice.kind == "dense":
            return call
        rows, data = self._pack(choice, shape, weight)
        label = const_name(call.args[1])
        args = [call.args[0], named_const(rows, f"{label}.rows"), named_const(data, label)]
        full = (*shape, weight.shape[1])
        func = build_matmul(choice.kind, full, rows.shape[-1], self._owner.target)
        return call_func(self.builder_, func, f"{choice.kind}_matmul", args, call.ty)

    def _pack(
        self, choice: KernelChoice, shape: tuple[int, ...], weight: npt.NDArray[Any]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        if choice.group:
            return pack_vrow(weight, choice.group)
        rows = flat_rows(shape[:-2], shape[-2])[1]
        k, n = weight.shape
        tile = choose_tile(rows, k, n, self._owner.target)
        return pack_rowlist(weight, tile.columns)


def _forced(choice: KernelChoice, weight: npt.NDArray[Any]) -> KernelChoice:
    if choice.group:
        rows = kept_rows(weight, choice.group)
    else:
        rows = max(1, int(np.count_nonzero(weight.any(axis=1))))
    rows = weight.shape[0] if choice.kind == "dense" else rows
    return KernelChoice(choice.kind, rows, "forced")
