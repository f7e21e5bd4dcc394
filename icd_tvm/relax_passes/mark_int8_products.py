"""MarkInt8Products: matmuls of quantised operands that the CUDA kernels multiply in int8."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm._tvm import PyExprMutator, mutator, named_const, relax, tvm
from icd_tvm.relax_passes.attention_match import Refused, need, require
from icd_tvm.relax_passes.dynamic_range import range_codes
from icd_tvm.relax_passes.int8_product import CodesCall, Int8Product
from icd_tvm.relax_passes.quantized_operands import (
    Activation,
    Weight,
    evaluate,
    find_activation,
    find_weight,
    reads_bytes,
)
from icd_tvm.relax_passes.relax_graph import (
    Dataflow,
    is_call,
    is_float32,
    rewrite_functions,
    static_shape,
)
from icd_tvm.relax_passes.select_cuda_kernels import with_refusals
from icd_tvm.tir_schedules.cuda.gemm import gemm_rule

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Product:
    """What a product is of.

    Attributes
    ----------
    source : relax.Expr
        float32 that is quantised.
    step : float
        Of its codes; 0: by its range at run time.
    point : int
        The int8 code of 0.0.
    values : int8 array [K, N]
    scale : float32 array [N]
        Of the weight.
    name : str
        Of the weight.
    """

    source: Any
    step: float
    point: int
    values: npt.NDArray[np.int8]
    scale: Array
    name: str


@tvm.transform.module_pass(opt_level=0, name="MarkInt8Products")
class MarkInt8Products:
    """Replace products of int8 codes with constant int8 weights by calls of `int8_product`.

    Runs before constants are folded, which would dequantise the weights. Recognised is what
    `ApplyQuant` makes of W8A8 and the importer of quantised models: ``dequantize(quantize(x)) @
    dequantize(W)``, and integer products of DynamicQuantizeLinear's codes. uint8 codes become int8,
    128 lower; what zero points add to the sums is taken away by the sums of the weight's columns.
    A static step stays what it is. A dynamic one is taken of each row instead of the whole tensor:
    a row's range lies within the tensor's, so no step gets coarser, and one kernel finds it.

    What stays has a reason in the module attribute that `SelectCudaKernels` goes on with; its
    weight is dequantised when constants are folded.

    Parameters
    ----------
    arch : str
        ``sm_80``, ``sm_90`` or ``sm_90a``.

    Attributes
    ----------
    marked : list of str
        Names of the matmuls that were replaced.
    refused : dict of str to str
        Name of each other matmul of two quantised operands -> the reason.
    """

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self.marked: list[str] = []
        self.refused: dict[str, str] = {}

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a clone of ``mod`` with the products replaced."""
        self.marked, self.refused = [], {}
        mod = rewrite_functions(mod, lambda new, func: _Marker(new, self._find(func)))
        # Else the weights' values would be folded to floats that nothing reads.
        mod = relax.transform.DeadCodeElimination()(mod)
        return with_refusals(mod, self.refused)

    def _find(self, func: Any) -> dict[Any, _Product]:
        """Return the products, by the call that makes their float32."""
        flow, found = Dataflow(func), dict[Any, _Product]()
        for var, call in flow.values.items():
            if not is_call(call, "relax.matmul") or not reads_bytes(flow, call.args[1]):
                continue
            data = find_activation(flow, call.args[0])
            if data is None:
                # Weights alone are quantised: they are read as they are, or become floats.
                continue
            try:
                end, product = _product(flow, var, data)
                self._check(call, product)
            except Refused as refusal:
                self.refused[str(var.name)] = f"no product of int8: {refusal}"
                continue
            found[end] = product
            self.marked.append(str(var.name))
        return found

    def _check(self, call: Any, product: _Product) -> None:
        rows = prod((static_shape(call.args[0]) or ())[:-1])
        require(rows > 1, "one row; what reads it as floats is bound by its weights alone")
        k, n = product.values.shape
        rule = gemm_rule(rows, n, k, "int8", out="float32", arch=self.arch)
        require(rule.kernels, rule.reason)


def _product(flow: Dataflow, var: Any, data: Activation) -> tuple[Any, _Product]:
    """Return a product and the call that makes its float32, or refuse."""
    call = flow.values[var]
    weight = need(
        find_weight(flow, call.args[1]),
        "its weight is no matrix of bytes with constant float32 scales and whole zero points",
    )
    shape = static_shape(call.args[0])
    require(shape is not None and len(shape) > 1 and min(shape) > 0, f"its input is {data.data.ty}")
    require(weight.per_column, f"scales change every {weight.block()} rows of its weight")
    values, zero = weight.signed()
    require(not zero.any(), "its weight has zero points that int8 cannot take up: leave out asym")
    require(
        (data.scale is None) == (weight.scale is None), "only one of its operands has a scale here"
    )
    if data.scale is None:
        return _dynamic(flow, var, data, (values, weight.name))
    return call, _static(flow, data, values, weight)


def _static(
    flow: Dataflow, data: Activation, values: npt.NDArray[np.int8], weight: Weight
) -> _Product:
    made = need(flow.call(data.data, "relax.quantize"), "its codes are not made by a quantize")
    source = made.args[0]
    step, point = (_number(flow, one) for one in (data.scale, data.zero))
    same = [_number(flow, one) for one in made.args[1:3]] == [step, point]
    require(same, "its input is dequantised by another scale than it was quantised by")
    require(step > 0 and is_float32(source), f"what is quantised is {source.ty}")
    lower = 128 if str(data.data.ty.dtype) == "uint8" else 0
    assert weight.scale is not None
    scale = np.broadcast_to(weight.scale, (1, values.shape[1]))[0]
    return _Product(source, step, int(point) - lower, values, scale, weight.name)


def _number(flow: Dataflow, expr: Any) -> float:
    array = evaluate(flow, expr)
    require(array is not None and array.size == 1, "its input has no constant scale and zero point")
    assert array is not None
    return float(array.reshape(()))


def _dynamic(
    flow: Dataflow, var: Any, data: Activation, weight: tuple[npt.NDArray[np.int8], str]
) -> tuple[Any, _Product]:
    values, name = weight
    require(str(data.data.ty.dtype) == "uint8", "codes of a dynamic range are uint8")
    made = range_codes(flow, data.data, data.zero)
    require(is_float32(made.source), f"what is quantised is {made.source.ty}")
    cast = need(flow.only_user(var), "its sums are read more than once")
    wide = is_call(flow.values.get(cast), "relax.astype") and is_float32(cast)
    require(wide, "its sums stay int32")
    scaled = need(flow.only_user(cast), "its sums are read more than once")
    times = need(flow.bound(scaled, "relax.multiply"), "its sums are not multiplied by scales")
    factor = times.args[1] if times.args[0].same_as(cast) else times.args[0]
    columns = _without(flow, factor, made.scale)
    n = values.shape[1]
    require(columns is not None and columns.size in (1, n), "its scales are not one a column")
    assert columns is not None
    scale = np.broadcast_to(columns.reshape(-1), (n,)).astype(np.float32)
    return times, _Product(made.source, 0.0, 0, values, scale, name)


def _without(flow: Dataflow, factor: Any, scale: Any) -> npt.NDArray[Any] | None:
    """Return the constant that a variable was multiplied by, or None."""
    if factor.same_as(scale):
        return np.ones(1, np.float32)
    call = flow.call(factor, "relax.multiply")
    if call is None:
        return None
    for one, other in (call.args, list(call.args)[::-1]):
        if one.same_as(scale):
            return evaluate(flow, other)
    return None


@mutator
class _Marker(PyExprMutator):
    """Replaces products; codes that several of them read are made once."""

    def __init__(self, mod: Any, found: dict[Any, _Product]) -> None:
        super().__init__(mod)
        self._found = found
        self._codes: dict[Any, tuple[Any, ...]] = {}

    def visit_call_(self, call: Any) -> Any:
        product = self._found.get(call)
        return super().visit_call_(call) if product is None else self._marked(product)

    def _marked(self, product: _Product) -> Any:
        *rows, codes = self._coded(product)
        sums, name = product.values.sum(axis=0, dtype=np.int64), product.name
        scale = product.scale.astype(np.float64) * (product.step or 1.0)
        offset = -scale * product.point * sums if product.step else sums
        scales, offsets = (np.asarray(one, np.float32) for one in (scale, offset))
        part = "zero_sums" if product.step else "sums"
        return Int8Product(
            codes,
            named_const(product.values, name),
            named_const(scales, f"{name}.scale"),
            named_const(offsets, f"{name}.{part}"),
            tuple(rows),
        ).call()

    def _coded(self, product: _Product) -> tuple[Any, ...]:
        key = (product.source, product.step, product.point)
        if key not in self._codes:
            self._codes[key] = self._emitted(product, self.visit_expr(product.source))
        return self._codes[key]

    def _emitted(self, product: _Product, source: Any) -> tuple[Any, ...]:
        """Return the codes, and before them scales and zero points of rows if they have some."""
        builder, name = self.builder_, f"{getattr(source, 'name', 'input')}_codes"
        if product.step:
            step = named_const(np.asarray(product.step, np.float32), "")
            point = named_const(np.asarray(product.point, np.int8), "")
            return (builder.emit(CodesCall(source, step, point).call(), name),)
        made = builder.emit(CodesCall(source).call(), f"{name}_of_rows")
        *rows, codes = (relax.TupleGetItem(made, i) for i in range(3))
        return (*map(builder.emit, rows), builder.emit(codes, name))
