"""MatMulNBits: a product with a weight of 2, 4 or 8 bits, quantised in blocks along K."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from icd_tvm._tvm import relax
from icd_tvm.models.converters.node import Converter, OnnxNode, cast, dtype_of, scalar, with_name
from icd_tvm.models.converters.packed import unpack_bits
from icd_tvm.models.converters.products import matmul

_A, _B, _SCALES, _ZERO_POINTS, _G_IDX, _BIAS = range(6)


def matmul_nbits(node: OnnxNode) -> Any:
    """Convert to integers [K, N] that are dequantised and multiplied.

    The scale of each row of the weight is fetched through its group number, also where groups
    are plain blocks of K: the K axis then stays free to be permuted, with the group numbers
    following it. The weight stays in integers here; lowering folds the constants.
    """
    k, n = int(node.required("K")), int(node.required("N"))
    bits = int(node.attr("bits", 4))
    if bits not in (2, 4, 8):
        raise node.refuse(f"{bits} bits")
    packed = node.constant(_B, "the weight").reshape(n, -1)
    values = unpack_bits(packed.view(np.uint8), bits)[:, :k].T
    quantised = node.emit(cast(with_name(values, node.label(_B)), dtype_of(node.input(_A))))
    groups = _group_numbers(node, k)
    shifted = node.emit(
        relax.op.subtract(quantised, _rows(node, _zero_points(node, n, bits), groups))
    )
    scales = with_name(node.constant(_SCALES, "the scales").reshape(n, -1).T, node.label(_SCALES))
    weight = node.emit(relax.op.multiply(shifted, _rows(node, scales, groups)))
    product = matmul(node, node.input(_A), weight)
    return relax.op.add(product, node.input(_BIAS)) if node.has(_BIAS) else product


def _group_numbers(node: OnnxNode, k: int) -> NDArray[np.int32]:
    if node.has(_G_IDX):
        return node.constant(_G_IDX, "g_idx").astype(np.int32)[:k]
    return np.arange(k, dtype=np.int32) // int(node.required("block_size"))


def _zero_points(node: OnnxNode, n: int, bits: int) -> Any:
    """Return the zero points [groups, N], or a scalar where they are the default."""
    like = node.input(_A)
    if not node.has(_ZERO_POINTS):
        return scalar(float(1 << (bits - 1)), like)
    stored = node.constant(_ZERO_POINTS, "the zero points")
    count = node.constant(_SCALES, "the scales").size // n
    if stored.dtype == np.uint8:
        stored = unpack_bits(stored.reshape(n, -1), bits)[:, :count]
    points = stored.reshape(n, count).T
    return node.emit(cast(with_name(points, node.label(_ZERO_POINTS)), dtype_of(like)))


def _rows(node: OnnxNode, table: Any, groups: NDArray[np.int32]) -> Any:
    """Return the row of [groups, N] that belongs to each row of the weight."""
    shape = node.shape(table)
    if not shape or shape[0] == 1:
        return table
    index = with_name(groups, f"{node.label(_B)}.g_idx")
    return node.emit(relax.op.take(table, index, axis=0, mode="clip"))


CONVERTERS: dict[tuple[str, str], Converter] = {("com.microsoft", "MatMulNBits"): matmul_nbits}
