"""SelectKernels: matmuls whose weight has zeros become sparse kernels where that is faster."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy.typing as npt

from icd_tvm._tvm import PyExprMutator, const_name, mutator, named_const, tvm
from icd_tvm.relax_passes.relax_graph import (
    Dataflow,
    call_func,
    constant_weight,
    rewrite_functions,
    static_shape,
)
from icd_tvm.tir_schedules.cpu.matmul_kinds import build_matmul, pack_matmul, read_rows
from icd_tvm.tir_schedules.cpu.select import KernelChoice, choose_matmul_kernel

KERNELS_ATTR = "icd.kernels"


@tvm.transform.module_pass(opt_level=0, name="SelectKernels")
class SelectKernels:
    """Replace ``relax.matmul(x, W)`` by a sparse kernel where W's zeros pay.

    The packed values keep the name of the weight; row lists and counts are named after it with
    ``.rows`` and ``.counts`` appended. Every other matmul stays for `PackWeights`. The choices
    travel with the module as JSON (`read_kernels`).

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
        self.choices = {}
        mod = rewrite_functions(mod, lambda new, func: _Selector(new, Dataflow(func), self))
        choices = {node: asdict(choice) for node, choice in self.choices.items()}
        return mod.with_attr(KERNELS_ATTR, json.dumps(choices))

    def choose(self, shape: tuple[int, ...], weight: npt.NDArray[Any]) -> KernelChoice:
        """Return the kernel for ``X[*shape] @ weight``."""
        *lead, m, k = shape
        if self.force is not None:
            return KernelChoice(self.force.kind, read_rows(self.force.kind, weight), "forced")
        n = weight.shape[1]
        return choose_matmul_kernel(m, k, n, weight, self.target, lead=tuple(lead), tune=self.tune)


def read_kernels(mod: Any) -> dict[str, KernelChoice]:
    """Return the choices that `SelectKernels` left in a module; none if it did not run.

    Parameters
    ----------
    mod : tvm.IRModule

    Returns
    -------
    dict of str to KernelChoice
        Name of each matmul with zeros in its weight -> what was chosen, and why.
    """
    text = (mod.attrs or {}).get(KERNELS_ATTR, "{}")
    return {node: KernelChoice(**fields) for node, fields in json.loads(str(text)).items()}


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
        return call if choice.kind == "dense" else self._sparse(call, choice.kind, shape, weight)

    def _sparse(
        self, call: Any, kind: str, shape: tuple[int, ...], weight: npt.NDArray[Any]
    ) -> Any:
        full, target = (*shape, weight.shape[1]), self._owner.target
        packed = pack_matmul(kind, weight, full, target)
        label = const_name(call.args[1])
        args = [
            named_const(array, label if part == "data" else f"{label}.{part}")
            for part, array in packed.items()
        ]
        func = build_matmul(kind, full, packed["rows"].shape[-1], target)
        return call_func(self.builder_, func, f"{kind}_matmul", [call.args[0], *args], call.ty)
