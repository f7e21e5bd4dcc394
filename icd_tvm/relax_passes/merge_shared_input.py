"""MergeSharedInput: products of one input with several constant weights become one product."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm._tvm import PyExprMutator, const_name, mutator, named_const, relax, tvm
from icd_tvm.relax_passes.attention_match import Refused
from icd_tvm.relax_passes.cuda_sparse_products import paying_blocks
from icd_tvm.relax_passes.fuse_attention import match_attention
from icd_tvm.relax_passes.held_product import HeldProduct, held_product, joined_held
from icd_tvm.relax_passes.int8_product import Int8Product, int8_product, joined
from icd_tvm.relax_passes.relax_graph import (
    Dataflow,
    constant_array,
    constant_weight,
    operands,
    rewrite_functions,
    static_shape,
)
from icd_tvm.relax_passes.select_cuda_kernels import with_refusals
from icd_tvm.tir_schedules.cuda.gemm import LIVE_COLUMNS


@dataclass(frozen=True)
class _Product:
    """``x W``, and the bias after it if it has one; ``result`` is the last variable of them.

    ``codes`` are the parts of a product of int8, whose input is codes, or of a held one.
    """

    matmul: Any
    result: Any
    weight: npt.NDArray[Any]
    weight_name: str
    bias: npt.NDArray[Any] | None = None
    bias_name: str = ""
    codes: Int8Product | HeldProduct | None = None

    @property
    def form(self) -> str:
        """What the weights of a merged product have in common, in words."""
        return self.codes.codes.form if isinstance(self.codes, HeldProduct) else "floats"


@tvm.transform.module_pass(opt_level=0, name="MergeSharedInput")
class MergeSharedInput:
    """Merge products of one row with constant weights, and those of an attention's three inputs.

    Each result becomes a slice of the wide one. For one row a slice is a part of memory; of more
    rows only attention reads slices without a copy, so others stay apart. Codes that
    `HoldWeightOnly` kept are merged where they have as many bits and inputs to a scale. Widths that
    are no whole groups of columns stay apart from weights whose lists of live blocks pay. Merged
    constants are named after theirs, joined by ``+``. Why one that reads the row of others is not
    merged travels with the module (`read_cuda_kernels`).

    Attributes
    ----------
    merged : int
        Products that others were merged into.
    refused : dict of str to str
        Binding of each product whose weight has another form than those of its row -> the reason.
    """

    def __init__(self) -> None:
        self.merged = 0
        self.refused: dict[str, str] = {}

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a clone of ``mod`` with the products merged."""
        self.merged, self.refused = 0, {}
        mod = rewrite_functions(mod, lambda new, func: _Merger(new, Dataflow(func), self))
        return with_refusals(relax.transform.DeadCodeElimination()(mod), self.refused)


@mutator
class _Merger(PyExprMutator):
    def __init__(self, mod: Any, flow: Dataflow, owner: MergeSharedInput) -> None:
        super().__init__(mod)
        self._flow, self._owner = flow, owner
        self._groups = {group[0].matmul: group for group in _groups(flow, owner.refused)}
        self._parts: dict[Any, Any] = {}

    def visit_var_binding_(self, binding: Any) -> None:
        """Emit the merged product where the first of them stood, and slices of it."""
        group = self._groups.get(binding.var)
        if group is not None:
            self._emit(group)
        part = self._parts.get(binding.var)
        if part is None:
            super().visit_var_binding_(binding)
        else:
            self.set_var_remap(
                binding.var, self.builder_.emit(part, name_hint=str(binding.var.name))
            )

    def _emit(self, group: list[_Product]) -> None:
        self._owner.merged += 1
        # No operator of the model makes it: its kernel is known by its weights.
        wide = self.builder_.emit(self._wide(group))
        if any(one.bias is not None for one in group):
            parts = [
                np.zeros(one.weight.shape[1], np.float32) if one.bias is None else one.bias
                for one in group
            ]
            label = "+".join(one.bias_name for one in group if one.bias is not None)
            bias = named_const(np.concatenate(parts), label)
            wide = self.builder_.emit(relax.op.add(wide, bias))
        axis, begin = len(static_shape(wide) or ()) - 1, 0
        for one in group:
            end = begin + one.weight.shape[1]
            self._parts[one.result] = relax.op.strided_slice(wide, [axis], [begin], [end])
            begin = end

    def _wide(self, group: list[_Product]) -> Any:
        codes = [one.codes for one in group if isinstance(one.codes, Int8Product)]
        if codes:
            return joined(codes, self.visit_expr).call()
        held = [one.codes for one in group if isinstance(one.codes, HeldProduct)]
        if held:
            return joined_held(held, self.visit_expr).call()
        source = self.visit_expr(self._flow.values[group[0].matmul].args[0])
        label = "+".join(one.weight_name for one in group)
        return relax.op.matmul(source, named_const(_side_by_side(group), label))


def _groups(flow: Dataflow, refused: dict[str, str]) -> list[list[_Product]]:
    """Return the products to merge, each group in program order; fill in reasons of others."""
    by_source: dict[Any, list[_Product]] = {}
    attended = _attended(flow)
    for var, value in flow.values.items():
        found = _product(flow, var, value)
        if found is None:
            continue
        source, product = found
        rows = int(np.prod((static_shape(source) or ())[:-1]))
        if rows == 1 or product.result in attended:
            key = source if rows == 1 else (source, attended[product.result])
            by_source.setdefault(key, []).append(product)
    merged: list[list[_Product]] = []
    for key, products in by_source.items():
        by_form = _by_form(products)
        # An attention whose three inputs have not one source has smaller groups, and keeps them.
        least = 2 if isinstance(key, relax.Var) else 3
        merged += [group for group in by_form.values() if len(group) >= least]
        for form, group in by_form.items() if len(by_form) > 1 else ():
            if len(group) < least:
                refused |= {str(one.matmul.name): _apart(form, by_form) for one in group}
    return merged


def _by_form(products: Iterable[_Product]) -> dict[str, list[_Product]]:
    """Return products by form; widths that would move the others' lists of blocks are another."""
    found: dict[str, list[_Product]] = {}
    for one in products:
        found.setdefault(one.form, []).append(one)
    for form, group in list(found.items()):
        whole = [one for one in group if one.weight.shape[1] % LIVE_COLUMNS == 0]
        rest = [one for one in group if one.weight.shape[1] % LIVE_COLUMNS]
        if whole and rest and paying_blocks(_side_by_side(whole)) is not None:
            found |= {form: whole, f"{form} in no groups of {LIVE_COLUMNS} columns": rest}
    return found


def _side_by_side(products: Iterable[_Product]) -> npt.NDArray[Any]:
    return np.concatenate([one.weight for one in products], axis=1)


def _apart(own: str, forms: Iterable[str]) -> str:
    others = ", ".join(form for form in forms if form != own)
    return f"a product of its own: its weight is {own}, others of its row are {others}"


def _product(flow: Dataflow, var: Any, value: Any) -> tuple[Any, _Product] | None:
    """Return a product with a constant weight, and the variable that it reads."""
    codes, held, weight = int8_product(value), held_product(value), constant_weight(value)
    if codes is not None:
        return codes.codes, _with_bias(flow, var, codes.weight, codes.array, codes)
    if held is not None:
        return held.x, _with_bias(flow, var, held.weight, held.codes.codes, held)
    if weight is None or not isinstance(value.args[0], relax.Var):
        return None
    return value.args[0], _with_bias(flow, var, value.args[1], weight)


def _attended(flow: Dataflow) -> dict[Any, Any]:
    """Return the inputs of encoder attentions -> the result of theirs, where each has three."""
    found: dict[Any, Any] = {}
    for var in flow.values:
        if flow.bound(var, "relax.nn.softmax") is None:
            continue
        try:
            match = match_attention(flow, var, None)
        except Refused:
            continue
        rows = (match.query, match.key, match.value)
        if len(set(rows)) == 3 and all(flow.single_use(one) for one in rows):
            found |= dict.fromkeys(rows, match.result)
    return found


def _with_bias(
    flow: Dataflow,
    var: Any,
    constant: Any,
    weight: npt.NDArray[Any],
    codes: Int8Product | HeldProduct | None = None,
) -> _Product:
    label = const_name(constant)
    user = flow.only_user(var)
    added = flow.bound(user, "relax.add")
    if added is not None:
        _, bias = operands(added)
        array = constant_array(bias, dims=1)
        if array is not None and array.shape == (weight.shape[1],):
            return _Product(var, user, weight, label, array, const_name(bias), codes)
    return _Product(var, var, weight, label, codes=codes)
