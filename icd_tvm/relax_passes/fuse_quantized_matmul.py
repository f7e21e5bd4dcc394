"""FuseQuantizedMatmul: matmuls of quantised operands become byte products."""

from __future__ import annotations

import json
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm._tvm import PyExprMutator, mutator, named_const, relax, tvm
from icd_tvm.errors import ConfigError
from icd_tvm.relax_passes.narrow_weight import DENSE, MIN_BLOCK, narrow_product
from icd_tvm.relax_passes.quantized_operands import (
    Activation,
    Weight,
    evaluate,
    find_activation,
    find_weight,
    reads_bytes,
)
from icd_tvm.relax_passes.relax_graph import Dataflow, call_func, is_call, is_float32, static_shape
from icd_tvm.tir_schedules.cpu.block_int8 import BlockProduct, block_int8_product
from icd_tvm.tir_schedules.cpu.dot_product import dot_product
from icd_tvm.tir_schedules.cpu.gemv import MAX_ROWS
from icd_tvm.tir_schedules.cpu.int8_matmul import int8_matmul, int8_tile, pack_int8
from icd_tvm.tir_schedules.cpu.row_max import row_max
from icd_tvm.tir_schedules.cpu.tile import flat_rows

# Sums, compensations and zero points of bytes together stay within 31 bits.
_MAX_DEPTH = 16384
# JSON: name of each matmul of quantised operands -> its kernel.
BYTE_KERNELS_ATTR = "icd.byte_kernels"


@tvm.transform.module_pass(opt_level=0, name="FuseQuantizedMatmul")
class FuseQuantizedMatmul:
    """Replace matmuls of a quantised activation and a quantised constant by the int8 kernel.

    Runs before constants are folded, which would dequantise the weights. Recognised are
    ``dequantize(x) @ dequantize(W)`` and products of widened integers with zero points
    (MatMulInteger, QLinearMatMul, DynamicQuantizeMatMul, QAttention), for int8 and uint8 of
    either operand: the kernel multiplies uint8 by int8, so int8 activations are quantised 128
    higher and uint8 weights 128 lower. What the zero points add is subtracted from the sums,
    then scales and all elementwise consumers run on the registers of the kernel. The integers
    are exact.

    Where the zeros of a weight leave out quads of rows for whole groups of columns, the
    block-sparse kernel skips them if that is modelled to pay.

    A product of up to eight rows of floats with a weight of 8 or 4 bits, with scales by column
    or by block, reads the narrow weight and widens it in registers. With more rows that costs
    time, so the weight becomes floats when the model is built.

    Packed constants keep the name of the weight; what belongs to it is named after it.

    Parameters
    ----------
    target : tvm.target.Target
        The kernels are built for it.

    Attributes
    ----------
    fused : list of str
        Names of the results that were replaced.
    refused : dict of str to str
        Name of each matmul with a quantised weight that was left alone -> the reason.
    sparse : dict of str to str
        Name of each weight with zeros in a byte product -> what skipping them is worth.
    kernels : dict of str to str
        Name of each result that was replaced -> its kernel; also `BYTE_KERNELS_ATTR` of the module.
    """

    def __init__(self, target: Any) -> None:
        self.target = target
        self.fused: list[str] = []
        self.refused: dict[str, str] = {}
        self.sparse: dict[str, str] = {}
        self.kernels: dict[str, str] = {}

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a clone of ``mod`` with the matmuls replaced."""
        mod = mod.clone()
        self.fused, self.refused, self.sparse, self.kernels = [], {}, {}, {}
        for name, func in mod.functions_items():
            if not isinstance(func, relax.Function):
                continue
            flow = Dataflow(func)
            found = self._find(flow)
            if not found:
                continue
            rewriter = _Rewriter(mod, flow, found, self)
            new = rewriter.visit_expr(func)
            mod = rewriter.builder_.get()
            mod[name] = new
        if not self.fused:
            return mod
        # A result that is bound to a second name would end the fusion of its consumers.
        mod = relax.transform.CanonicalizeBindings()(mod)
        mod = relax.transform.DeadCodeElimination()(mod)
        return mod.with_attr(BYTE_KERNELS_ATTR, json.dumps(self.kernels))

    def _find(self, flow: Dataflow) -> dict[Any, Activation | None]:
        """Return each matmul that gets another kernel, with its input where that is bytes."""
        found = {}
        for var, call in flow.values.items():
            if not is_call(call, "relax.matmul") or not reads_bytes(flow, call.args[1]):
                continue
            weight = find_weight(flow, call.args[1])
            data = find_activation(flow, call.args[0])
            reason = self._unsupported(call, data, weight)
            if weight is None or reason:
                self.refused[str(var.name)] = reason
            else:
                found[call] = data if weight.per_column else None
                self.fused.append(str(var.name))
        return found

    def _unsupported(self, call: Any, data: Activation | None, weight: Weight | None) -> str:
        """Return why a matmul stays as it is, or an empty string."""
        if weight is None:
            return (
                "its weight is no matrix of bytes with constant float32 scales by column or "
                "block and whole zero points"
            )
        shape = static_shape(call.args[0])
        if shape is None or len(shape) < 2 or min(shape) < 1:
            return f"its input is {call.args[0].ty}, not static with at least two axes"
        if data is None:
            return _not_narrow(call, shape, weight)
        if not weight.per_column:
            reason = f"scales change every {weight.block()} rows of the weight; use one a column"
            return reason if _not_narrow(call, shape, weight) else ""
        if (data.scale is None) != (weight.scale is None):
            return "only one of its operands has a scale"
        if not (is_float32(call) if weight.scale is not None else str(call.ty.dtype) == "int32"):
            return f"its result is {call.ty.dtype}"
        if shape[-1] > _MAX_DEPTH:
            return f"sums over {shape[-1]} products may overflow; cut it to {_MAX_DEPTH}"
        try:
            dot_product(self.target)
        except ConfigError as error:
            return str(error)
        return ""


def read_byte_kernels(mod: Any) -> dict[str, str]:
    """Return the kernels that `FuseQuantizedMatmul` named in a module; none if it made none."""
    return json.loads(str((mod.attrs or {}).get(BYTE_KERNELS_ATTR, "{}")))


def _not_narrow(call: Any, shape: tuple[int, ...], weight: Weight) -> str:
    """Return why a product of floats and a quantised weight stays, or an empty string."""
    lead, rows = flat_rows(shape[:-2], shape[-2])
    folded = "the weight is dequantised once, when the model is built"
    if not (is_float32(call.args[0]) and is_float32(call)):
        return f"only its weight is quantised and its input is {call.args[0].ty.dtype}; {folded}"
    if prod(lead) * rows > MAX_ROWS:
        return (
            f"only its weight has scales that a byte product can use and it has "
            f"{prod(lead) * rows} rows, more than {MAX_ROWS}: {folded}; quantise the activation "
            "with one scale"
        )
    if weight.block() < MIN_BLOCK:
        return (
            f"scales change every {weight.block()} rows of the weight: {folded}; "
            f"sort its rows so that {MIN_BLOCK} or more share a scale"
        )
    return ""


@mutator
class _Rewriter(PyExprMutator):
    def __init__(
        self,
        mod: Any,
        flow: Dataflow,
        found: dict[Any, Activation | None],
        owner: FuseQuantizedMatmul,
    ) -> None:
        super().__init__(mod)
        self._flow, self._found = flow, found
        self._target, self._sparse = owner.target, owner.sparse
        self._kernels, self._names = owner.kernels, {call: var for var, call in flow.values.items()}
        self._unsigned: dict[Any, Any] = {}

    def visit_call_(self, call: Any) -> Any:
        if call in self._found:
            # Read again, and one at a time: together the weights would be a second model.
            data, weight = self._found[call], find_weight(self._flow, call.args[1])
            assert weight is not None
            node = str(self._names[call].name)
            if data is None:
                return self._narrow(call, weight, node)
            return self._matmul(data, weight, node)
        if is_call(call, "relax.max") or is_call(call, "relax.min"):
            return self._extreme(call)
        return super().visit_call_(call)

    def _extreme(self, call: Any) -> Any:
        """Vectorise the range of a dynamic quantisation: row by row, then over the rows."""
        shape = static_shape(call.args[0])
        whole = call.attrs.axis is None and not call.attrs.keepdims
        if not whole or not is_float32(call) or not shape or len(shape) < 2 or min(shape) < 1:
            return super().visit_call_(call)
        lowest = is_call(call, "relax.min")
        func = row_max(shape, self._target, negate=lowest)
        like = relax.TensorType((*shape[:-1], 1), "float32")
        rows = self._call(func, "row_max", [self.visit_expr(call.args[0])], like)
        most = self.builder_.emit(relax.op.max(rows))
        return relax.op.negative(most) if lowest else most

    def _narrow(self, call: Any, weight: Weight, node: str) -> Any:
        """Multiply floats by the narrow weight."""
        x = self.visit_expr(call.args[0])
        rows = (static_shape(x) or ())[:-1]
        product = narrow_product(weight, rows, self._target)
        self._kernels[node] = product.description
        args = [named_const(a, weight.name + part) for part, a in product.constants.items()]
        return call_func(self.builder_, product.func, product.name, [x, *args], call.ty)

    def _matmul(self, data: Activation, weight: Weight, node: str) -> Any:
        values, zero = weight.signed()
        x, offset = self._bytes(data)
        total, self._kernels[node] = self._product(x, values, weight.name)
        total = self._compensated(total, x, (values, zero), data, offset, weight.name)
        if weight.scale is None:
            return total
        scale = np.broadcast_to(weight.scale, (1, values.shape[1]))[0]
        factor = self._factor(data.scale, scale, weight.name)
        floats = self.builder_.emit(relax.op.astype(total, "float32"))
        return relax.op.multiply(floats, factor)

    def _bytes(self, data: Activation) -> tuple[Any, int]:
        """Return the data as uint8, and by how much it was raised."""
        if str(data.data.ty.dtype) == "uint8":
            return self.visit_expr(data.data), 0
        if data.data not in self._unsigned:
            self._unsigned[data.data] = self.builder_.emit(self._raised(data.data))
        return self._unsigned[data.data], 128

    def _raised(self, data: Any) -> Any:
        """Return int8 data plus 128 as uint8, quantised so where the quantisation is at hand."""
        call = self._flow.call(data, "relax.quantize")
        zero = evaluate(self._flow, call.args[2]) if call is not None else None
        if call is None or zero is None:
            wide = relax.op.astype(self.visit_expr(data), "int32")
            return relax.op.astype(relax.op.add(wide, relax.const(128, "int32")), "uint8")
        point = named_const((zero.astype(np.int16) + 128).astype(np.uint8), "")
        source, scale = (self.visit_expr(arg) for arg in call.args[:2])
        return relax.op.quantize(source, scale, point, axis=int(call.attrs.axis), out_dtype="uint8")

    def _product(self, x: Any, values: npt.NDArray[np.int8], name: str) -> tuple[Any, str]:
        """Return the sums of products, and the kernel that makes them."""
        *lead, m, k = static_shape(x) or ()
        n, rows = values.shape[1], flat_rows(tuple(lead), m)[1]
        like = relax.TensorType((*lead, m, n), "int32")
        sparse = self._sparse_product(x, values, name)
        if sparse is not None:
            parts = sparse.constants.items()
            args = [x, *(named_const(array, name + part) for part, array in parts)]
            made = self._call(sparse.func, "block_int8_matmul", args, like)
            return made, f"block_int8, {sparse.rows} rows"
        tile = int8_tile(rows, k, n, self._target)
        packed = named_const(pack_int8(values, tile.columns), name)
        func = int8_matmul(m, k, n, self._target, lead=tuple(lead), tile=tile)
        return self._call(func, "int8_matmul", [x, packed], like), f"int8, {k} rows"

    def _sparse_product(
        self, x: Any, values: npt.NDArray[np.int8], name: str
    ) -> BlockProduct | None:
        """Return the kernel that skips zeros, where one is worth its lists."""
        if np.count_nonzero(values) > DENSE * values.size:
            return None
        *lead, m, _ = static_shape(x) or ()
        product, self._sparse[name] = block_int8_product(tuple(lead), m, values, self._target)
        return product

    def _compensated(
        self,
        total: Any,
        x: Any,
        weight: tuple[npt.NDArray[np.int8], npt.NDArray[np.int32]],
        data: Activation,
        offset: int,
        name: str,
    ) -> Any:
        """Return the sums less what the zero points of both operands added to them.

        ``sum (x - p) (w - q) = sum x w - p (sum w - k q) - q sum x``
        """
        values, zero = weight
        sums = values.sum(axis=0, dtype=np.int32) - np.int32(len(values)) * zero
        total = self._less_point(total, sums, data, offset, name)
        if zero.any():
            rows, _ = self._product(x, np.ones((len(values), 1), np.int8), f"{name}.ones")
            part = relax.op.multiply(rows, named_const(zero, f"{name}.zero_point"))
            total = self.builder_.emit(relax.op.subtract(total, part))
        return total

    def _less_point(
        self, total: Any, sums: npt.NDArray[np.int32], data: Activation, offset: int, name: str
    ) -> Any:
        """Return ``total - (zero point + offset) * sums``."""
        known = evaluate(self._flow, data.zero) if data.zero is not None else np.int32(0)
        if known is not None and known.size == 1:
            part = sums * np.int32(int(known.reshape(())) + offset)
            if not part.any():
                return total
            point = named_const(part, f"{name}.zero_sums")
        else:
            number = relax.op.astype(self.visit_expr(data.zero), "int32")
            number = relax.op.add(number, relax.const(offset, "int32"))
            point = relax.op.multiply(number, named_const(sums, f"{name}.sums"))
        return self.builder_.emit(relax.op.subtract(total, point))

    def _factor(self, scale: Any, columns: npt.NDArray[np.float32], name: str) -> Any:
        known = evaluate(self._flow, scale)
        if known is not None and known.size == 1:
            return named_const(columns * known.reshape(()), f"{name}.scale")
        return relax.op.multiply(self.visit_expr(scale), named_const(columns, f"{name}.scale"))

    def _call(self, func: Any, name: str, args: list[Any], like: Any) -> Any:
        return self.builder_.emit(call_func(self.builder_, func, name, args, like))
