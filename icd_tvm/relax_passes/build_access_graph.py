"""BuildAccessGraph: what the scheduled kernels touch together on every axis that may move.

The kernel of each matmul with a constant weight is built and scheduled as it will be for the
target; its read of the packed weight is evaluated over the loop nest. One window is one step of
the reduction: the columns whose weights that step multiplies. Only non-zero weights count, so a
transform that zeroes weights changes the graph. Kernels of CUDA devices are no TIR:
`cuda_accesses` describes them by their blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import scipy.sparse as sp

from icd_tvm._tvm import Call, GenericConst, Op, tvm
from icd_tvm.core.cost import TileAccess
from icd_tvm.relax_passes.attach_layout_tags import tagged_groups
from icd_tvm.relax_passes.axis_groups import AxisGroup, AxisGroups, WeightUse
from icd_tvm.relax_passes.coaccess_attr import (
    COACCESS_BLOCK,
    DEAD_UNITS,
    LISTED_BLOCKS,
    OUTPUT_ORDER,
    to_attr,
)
from icd_tvm.relax_passes.constant_values import ConstantValues
from icd_tvm.relax_passes.cuda_accesses import Blocks
from icd_tvm.relax_passes.dead_units import dead_units
from icd_tvm.relax_passes.hidden_groups import hidden_groups
from icd_tvm.relax_passes.relax_graph import Dataflow, rounded_to_bf16
from icd_tvm.tir_schedules.access_patterns import Access, accesses, merge_equal, window_incidence
from icd_tvm.tir_schedules.cpu.bf16_dot import has_bf16
from icd_tvm.tir_schedules.cpu.block_sparse import vrow_tile
from icd_tvm.tir_schedules.cpu.dense import DenseRule, dense_matmul
from icd_tvm.tir_schedules.cpu.tile import Tile
from icd_tvm.tir_schedules.target import host_target, vector_bits

# Bytes, and bfloat16, along K that one 32-bit lane of a dot product multiplies.
QUAD, PAIR = 4, 2
# Fewer zeros than this leave no row of a 16-wide group untouched, in any order.
MOST_DENSITY = 0.95


@tvm.transform.module_pass(opt_level=0, name="BuildAccessGraph")
class BuildAccessGraph:
    """Attach ``icd.coaccess_block``: axis -> tile accesses of the kernels on it.

    ``icd.dead_units`` lists the hidden units of each group that contribute nothing.

    An axis is a free group that is the output of matmuls, or a segment of it that starts with a
    tile of the kernel; or ``out:NODE``: the output order of one matmul whose weight has zeros and
    whose output axis cannot be permuted as a group, or only segment by segment.
    For a CUDA device it is a free group on either side of matmuls (`cuda_accesses`),
    and ``icd.listed_blocks`` says so.

    Parameters
    ----------
    target : tvm.target.Target, optional
        Whose kernels are analysed, a CPU's or a CUDA device's; this machine if omitted.
    """

    def __init__(self, target: Any = None) -> None:
        self.target = target or host_target()

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a module with the attribute; the functions are unchanged."""
        func, groups = mod["main"], tagged_groups(mod)
        cuda = self.target.kind.name == "cuda"
        if cuda:
            blocks = listed_blocks(func, groups, {})
            graphs = {group: blocks.accesses(group) for group in blocks.places}
        else:
            graphs = self._host_accesses(func, groups)
        dead = {
            group.id: tvm.runtime.tensor(np.flatnonzero(dead_units(func, group)))
            for group in hidden_groups(func, groups)
            if group.id in graphs
        }
        mod = mod.with_attr(COACCESS_BLOCK, to_attr(graphs)).with_attr(DEAD_UNITS, dead)
        return mod.with_attr(LISTED_BLOCKS, cuda)

    def _host_accesses(self, func: Any, groups: AxisGroups) -> dict[str, list[TileAccess]]:
        rows, values = _output_rows(func), ConstantValues(func)
        runs, right = product_runs(func, self.target), _right_operands(func)
        lanes = vector_bits(self.target) // 32

        def access(node: str, columns: slice, label: str) -> TileAccess:
            mask = _read(values.array(right[node]), runs.get(node, 1))[:, columns]
            return weight_access(mask, rows[node], label, self.target)

        graphs: dict[str, list[TileAccess]] = {}
        owned: set[str] = set()
        for group in groups.free:
            makers = _makers(group, lanes)
            if makers:
                graphs[group.id] = [access(u.node, run, u.name or u.node) for u, run in makers]
            owned |= {use.node for use, _ in makers if use.structure.is_leaf}
        for node, weight in _weights(func).items():
            if node not in owned and _density(weight) <= MOST_DENSITY:
                graphs[OUTPUT_ORDER + node] = [access(node, slice(None), node)]
        return graphs


def _makers(group: AxisGroup, lanes: int) -> list[tuple[WeightUse, slice]]:
    """Return the matmuls that make a group, and their columns of it that start with a tile."""
    if group.constraint != "free":
        return []
    return [
        (use, run)
        for use in group.weights
        if use.side == "N"
        for run in use.segments(group.id)
        if run.start % lanes == 0
    ]


def listed_blocks(func: Any, groups: AxisGroups, dead: Mapping[str, np.ndarray]) -> Blocks:
    """Return the products of a function as the kernels of CUDA devices read them.

    Parameters
    ----------
    func : relax.Function
    groups : AxisGroups
    dead : Mapping[str, numpy.ndarray]
        Group -> indices that count as zero in every weight.
    """
    values, right = ConstantValues(func), _right_operands(func)
    gone = [
        (use.node, use.side, use.positions(group)[indices].ravel())
        for group, indices in dead.items()
        for use in groups.get(group).weights
    ]

    def read(node: str) -> np.ndarray:
        mask = _read(values.array(right[node]), 1)
        for other, side, places in gone:
            if other == node:
                (mask if side == "K" else mask.T)[places] = False
        return mask

    return Blocks(groups, _output_rows(func), read)


def byte_products(func: Any) -> set[str]:
    """Return the matmuls of quantised operands: their kernel multiplies four bytes at a time."""
    flow, found = Dataflow(func), set()
    for binding in _matmuls(func):
        left = binding.value.args[0]
        integer = "int" in str(left.ty.dtype.dtype)
        if integer or flow.call(left, "relax.dequantize") is not None:
            found.add(str(binding.var.name))
    return found


def product_runs(func: Any, target: Any) -> dict[str, int]:
    """Return the rows of W that the kernel of a matmul multiplies at a time; absent if one."""
    flow, found = Dataflow(func), dict.fromkeys(byte_products(func), QUAD)
    for binding in _matmuls(func) if has_bf16(target) else ():
        if rounded_to_bf16(flow, binding.value.args[0]) is not None:
            found[str(binding.var.name)] = PAIR
    return found


def _read(weight: Any, run: int) -> np.ndarray:
    """Return which weights a kernel reads: whole runs along K, and zeros among what is live."""
    mask = np.asarray(weight != 0)
    if run > 1:
        whole = np.pad(mask, ((0, -len(mask) % run), (0, 0)))
        read = whole.reshape(-1, run, mask.shape[1]).any(axis=1)
        mask = np.repeat(read, run, axis=0)[: len(mask)]
    live = np.outer(mask.any(axis=1), mask.any(axis=0))
    return live if mask.sum() > MOST_DENSITY * live.sum() else mask


def weight_access(mask: np.ndarray, rows: int, label: str, target: Any) -> TileAccess:
    """Return what the V-row kernel of one weight touches on its output axis.

    Parameters
    ----------
    mask : numpy.ndarray
        bool [K, N], True where the weight counts.
    rows : int
        Rows M of the matmul's left operand.
    label : str
        Name for reports.
    target : tvm.target.Target
        Whose kernel it is.

    Returns
    -------
    TileAccess
        Windows are reduction steps, equal ones merged; the weight of a unit is its FLOP. Not
        padded: where groups need lists of different lengths, the kernel that pays is vcol8, whose
        groups have their own (docs/Cost_Spec.md).
    """
    k, n = mask.shape
    tile = _kernel_read(rows, k, n, target)[1]
    if mask.all():
        matrix, counts = _dense_windows(rows, k, n, target)
    else:
        matrix, counts = _windows(rows, mask, target)
    lanes = vector_bits(target) // 32
    return TileAccess(matrix, tile.columns, 2.0 * rows * tile.columns, label, counts, lanes=lanes)


@lru_cache(maxsize=64)
def _dense_windows(rows: int, k: int, n: int, target: Any) -> tuple[sp.csr_matrix, np.ndarray]:
    """Return the windows of a dense weight: layers share shapes, and all are touched alike."""
    return _windows(rows, np.ones((k, n), dtype=np.bool_), target)


def _windows(rows: int, mask: np.ndarray, target: Any) -> tuple[sp.csr_matrix, np.ndarray]:
    access, tile = _kernel_read(rows, *mask.shape, target)

    def logical(panel: np.ndarray, row: np.ndarray, lane: np.ndarray) -> tuple[Any, Any]:
        return row, panel * tile.columns + lane

    found = window_incidence(access, 1, "reduction", nonzero=mask, logical=logical)
    return merge_equal(found.matrix.toarray(), found.counts)


@lru_cache(maxsize=64)
def _kernel_read(rows: int, k: int, n: int, target: Any) -> tuple[Access, Tile]:
    """Return the weight's read in the scheduled kernel, and the kernel's register tile."""
    tile = vrow_tile(rows, k, n, vector_bits(target) // 32, target)
    schedule = DenseRule().apply(dense_matmul(rows, k, n, tile), target, False)
    func = schedule.mod["main"]
    weight = func.params[1]
    reads = [a for a in accesses(func) if a.buffer.same_as(weight) and not a.write]
    return reads[0], tile


def _density(weight: Any) -> float:
    array = weight.value.numpy()
    return float(np.count_nonzero(array) / array.size)


def _weights(func: Any) -> dict[str, Any]:
    """Return the constant 2-D weight of every matmul by binding name."""
    return {
        binding.var.name: binding.value.args[1]
        for binding in _matmuls(func)
        if isinstance(binding.value.args[1], GenericConst)
        and len(binding.value.args[1].value.shape) == 2
    }


def _right_operands(func: Any) -> dict[str, Any]:
    return {binding.var.name: binding.value.args[1] for binding in _matmuls(func)}


def _output_rows(func: Any) -> dict[str, int]:
    return {
        binding.var.name: int(np.prod([int(s) for s in binding.var.ty.shape.values[:-1]]))
        for binding in _matmuls(func)
    }


def _matmuls(func: Any) -> list[Any]:
    return [
        binding
        for block in func.body.blocks
        for binding in block.bindings
        if isinstance(binding.value, Call)
        and isinstance(binding.value.op, Op)
        and binding.value.op.name == "relax.matmul"
    ]
