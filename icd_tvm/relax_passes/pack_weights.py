"""PackWeights: matmuls with constant weights become packed kernels, repacked at compile time."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy.typing as npt

from icd_tvm._tvm import PyExprMutator, const_name, mutator, named_const, tvm
from icd_tvm.relax_passes.relax_graph import (
    call_func,
    constant_weight,
    rewrite_functions,
    static_shape,
)
from icd_tvm.tir_schedules.cpu.dense import dense_matmul, pack_dense
from icd_tvm.tir_schedules.cpu.gemv import (
    MAX_ROWS,
    NarrowWeight,
    narrow_matmul,
    narrow_tile,
    pack_narrow,
)
from icd_tvm.tir_schedules.cpu.tile import choose_tile, flat_rows

# With fewer panels the padding of the last one is a large part of the weight.
_MIN_PANELS = 4


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
        *lead, m, _ = static_shape(call.args[0]) or ()
        name, func, packed = self._kernel(tuple(lead), m, weight)
        self._owner.packed += 1
        args = [call.args[0], named_const(packed, const_name(call.args[1]))]
        return call_func(self.builder_, func, name, args, call.ty)

    def _kernel(
        self, lead: tuple[int, ...], m: int, weight: npt.NDArray[Any]
    ) -> tuple[str, Any, npt.NDArray[Any]]:
        """Return the name and function of the kernel, and the weight packed for it."""
        (k, n), target = weight.shape, self._owner.target
        batch, rows = flat_rows(lead, m)
        # Few rows take what the weight takes to arrive, so that fetching ahead pays.
        columns = narrow_tile(min(rows, MAX_ROWS), target).columns
        if rows * prod(batch) <= MAX_ROWS and n >= _MIN_PANELS * columns:
            form = NarrowWeight(32, k)
            func = narrow_matmul(m, k, n, form, target, lead=lead)
            return "narrow_matmul", func, pack_narrow(weight, [], form, columns)[0]
        tile = choose_tile(rows, k, n, target)
        return "dense_matmul", dense_matmul(m, k, n, tile, lead), pack_dense(weight, tile.columns)
