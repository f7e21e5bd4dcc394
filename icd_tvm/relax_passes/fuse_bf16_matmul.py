"""FuseBf16Matmul: products of operands that bfloat16 holds get the bfloat16 kernel."""

from __future__ import annotations

import json
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm._tvm import PyExprMutator, const_name, i64, mutator, named_const, relax, te, tvm
from icd_tvm.errors import ConfigError
from icd_tvm.relax_passes.fuse_quantized_matmul import BYTE_KERNELS_ATTR, read_byte_kernels
from icd_tvm.relax_passes.narrow_weight import DENSE
from icd_tvm.relax_passes.relax_graph import (
    Dataflow,
    call_func,
    constant_weight,
    is_call,
    rewrite_functions,
    rounded_to_bf16,
    static_shape,
)
from icd_tvm.tir_schedules.cpu.bf16_dot import require_bf16, round_bits
from icd_tvm.tir_schedules.cpu.bf16_matmul import (
    PAIR,
    bf16_matmul,
    bf16_tile,
    pack_bf16,
)
from icd_tvm.tir_schedules.cpu.block_bf16 import (
    block_bf16_matmul,
    choose_bf16_blocks,
    pack_block_bf16,
)
from icd_tvm.tir_schedules.cpu.gemv import MAX_ROWS
from icd_tvm.tir_schedules.cpu.tile import flat_rows

_LOW_HALF = 0xFFFF


@tvm.transform.module_pass(opt_level=0, name="FuseBf16Matmul")
class FuseBf16Matmul:
    """Replace ``matmul(astype(astype(x, bfloat16), float32), W)`` by the bfloat16 kernel.

    W is a float32 constant whose values are all numbers of bfloat16; it is stored as such, so
    nothing is lost. The bits of x are made once for all matmuls that read it, by an elementwise
    function that joins the kernel before it. Runs after constants are folded and projections
    merged. Without AVX512_BF16 only products of up to `MAX_ROWS` rows, which wait for the bytes
    of the weight, are replaced: the others multiply float32 faster.

    Where the zeros of W leave out pairs of rows for whole groups of columns, the block-sparse
    kernel skips them if that is modelled to pay.

    The packed constant keeps the name of the weight.

    Parameters
    ----------
    target : tvm.target.Target
        The kernels are built for it.

    Attributes
    ----------
    kernels : dict of str to str
        Name of each result that was replaced -> its kernel; joins `BYTE_KERNELS_ATTR`.
    refused : dict of str to str
        Name of each matmul with a rounded input that was left alone -> the reason.
    sparse : dict of str to str
        Name of each weight with zeros -> what skipping them is worth.
    """

    def __init__(self, target: Any) -> None:
        self.target = target
        self.kernels: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self.sparse: dict[str, str] = {}

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a clone of ``mod`` with the matmuls replaced."""
        self.kernels, self.refused, self.sparse = {}, {}, {}
        mod = rewrite_functions(mod, lambda new, func: _Fuser(new, Dataflow(func), self))
        if not self.kernels:
            return mod
        kernels = json.dumps(read_byte_kernels(mod) | self.kernels)
        return relax.transform.DeadCodeElimination()(mod).with_attr(BYTE_KERNELS_ATTR, kernels)

    def unsupported(self, shape: tuple[int, ...], weight: npt.NDArray[Any] | None) -> str:
        """Return why a product of rounded rows stays as it is, or an empty string."""
        if weight is None:
            return "its weight is no constant float32 matrix, or its input has no static shape"
        if np.any(weight.view(np.uint32) & _LOW_HALF):
            return "its weight has values that bfloat16 does not hold: round it first"
        lead, rows = flat_rows(shape[:-2], shape[-2])
        if prod(lead) * rows <= MAX_ROWS:
            return ""
        try:
            require_bf16(self.target)
        except ConfigError as error:
            return str(error)
        return ""


def round_to_bf16(shape: tuple[int, ...]) -> Any:
    """Return the TIR function that rounds float32 to the bits of bfloat16 (uint16), elementwise."""
    data = te.placeholder([i64(extent) for extent in shape], "float32", name="X")
    bits = te.compute(data.shape, lambda *at: round_bits(data[at]), name="bits")
    return te.create_prim_func([data, bits]).without_attr("global_symbol")


@mutator
class _Fuser(PyExprMutator):
    def __init__(self, mod: Any, flow: Dataflow, owner: FuseBf16Matmul) -> None:
        super().__init__(mod)
        self._flow, self._owner = flow, owner
        self._names = {value: str(var.name) for var, value in flow.values.items()}
        self._bits: dict[Any, Any] = {}

    def visit_call_(self, call: Any) -> Any:
        source = (
            rounded_to_bf16(self._flow, call.args[0]) if is_call(call, "relax.matmul") else None
        )
        if source is None:
            return super().visit_call_(call)
        name, weight = self._names.get(call, "matmul"), constant_weight(call)
        shape = static_shape(source) or ()
        reason = self._owner.unsupported(shape, weight)
        if reason or weight is None:
            self._owner.refused[name] = reason
            return super().visit_call_(call)
        found, self._owner.kernels[name] = self._product(self._made(source, shape), weight, call)
        return found

    def _made(self, source: Any, shape: tuple[int, ...]) -> Any:
        if source not in self._bits:
            like = relax.TensorType(shape, "uint16")
            args = [self.visit_expr(source)]
            made = call_func(self.builder_, round_to_bf16(shape), "round_to_bf16", args, like)
            self._bits[source] = self.builder_.emit(made)
        return self._bits[source]

    def _product(self, bits: Any, weight: npt.NDArray[Any], call: Any) -> tuple[Any, str]:
        """Return the product, and the kernel that makes it."""
        *lead, m, k = static_shape(bits) or ()
        n, target, name = weight.shape[1], self._owner.target, const_name(call.args[1])
        rows = flat_rows(tuple(lead), m)[1]
        tile = None
        if np.count_nonzero(weight) <= DENSE * weight.size:
            tile, self._owner.sparse[name] = choose_bf16_blocks(rows, weight, target)
        if tile is not None:
            counts, pairs, data = pack_block_bf16(weight, tile.columns)
            parts = {f"{name}.counts": counts, f"{name}.rows": pairs, name: data}
            func = block_bf16_matmul(m, k, n, pairs.shape[1], tile, target, lead=tuple(lead))
            args = [bits, *(named_const(array, part) for part, array in parts.items())]
            made = call_func(self.builder_, func, "block_bf16_matmul", args, call.ty)
            return made, f"block_bf16, {PAIR * pairs.shape[1]} rows"
        tile = bf16_tile(rows, k, n, target)
        packed = named_const(pack_bf16(weight, tile.columns), name)
        func = bf16_matmul(m, k, n, target, lead=tuple(lead), tile=tile)
        made = call_func(self.builder_, func, "bf16_matmul", [bits, packed], call.ty)
        return made, f"bf16, {k} rows"
