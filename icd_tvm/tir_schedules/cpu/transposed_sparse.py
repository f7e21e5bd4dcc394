"""Block-sparse matmul on transposed activations: vectors along the rows of X.

The V-row kernel keeps one vector of columns per row of X, so that every multiply-add needs a
broadcast of X of its own: it waits for loads. Here vectors run along the rows of X. A panel of
X is transposed once into scratch memory; a step then loads two vectors of one column of X and
multiplies them by eight weights, each broadcast once for both. A group of columns may be as
narrow as eight and reads exactly the rows of W it needs. Tiles are transposed back in
registers before the epilogue, so X and Y keep their layout: both transposes together cost 2 to
4 % of a half-dense matmul of an encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log2, prod
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from icd_tvm._tvm import ScheduleRule, i64, s_tir
from icd_tvm.errors import TransformError
from icd_tvm.tir_schedules.cpu.block_sparse import group_rows
from icd_tvm.tir_schedules.cpu.dense import (
    OUT_EWISE_FUSABLE,
    matrix_shape,
    ravel_index,
    shape64,
    unravel_index,
)
from icd_tvm.tir_schedules.cpu.elementwise import inline_spatial, schedule_spatial
from icd_tvm.tir_schedules.cpu.emit import f32, prefetch
from icd_tvm.tir_schedules.cpu.register_transpose import emit_transpose
from icd_tvm.tir_schedules.cpu.tile import (
    TILE_ATTR,
    Lead,
    Tile,
    find_tiled_block,
    flat_rows,
    is_prim_func,
    row_pieces,
    tile_attrs,
)
from icd_tvm.tir_schedules.target import host_target, target_threads, vector_bits

KERNEL = "vcol"
# Vectors of rows per panel. A group of one column has no other column to hide the latency of its
# multiply-adds, and shares the load of its index and weight with them.
_VECTORS, _LONE_VECTORS = 2, 8
# Cycles in which L2 gives one line.
_L2_CYCLES = 2.0


@dataclass(frozen=True)
class VColShape:
    """Sizes of one kernel, and how the output is cut.

    Attributes
    ----------
    lead : tuple of int
        Batch axes of X and Y.
    m, k, n : int
        Rows of X, columns of X, columns of Y.
    nk : int
        Most rows of W that a group lists.
    v : int
        Columns of a group.
    lanes : int
        fp32 values of a vector register.
    """

    lead: Lead
    m: int
    k: int
    n: int
    nk: int
    v: int
    lanes: int

    @property
    def batch(self) -> Lead:
        """Batch axes that stay axes; batches of few rows are one run of rows."""
        return flat_rows(self.lead, self.m)[0]

    @property
    def rows(self) -> int:
        """Rows of X per element of ``batch``."""
        return flat_rows(self.lead, self.m)[1]

    @property
    def width(self) -> int:
        """Rows of X in one panel: whole vectors, about as many in each panel."""
        vectors = -(-self.rows // self.lanes)
        panels = -(-vectors // (_VECTORS if self.tile > 1 else _LONE_VECTORS))
        return self.lanes * -(-vectors // panels)

    @property
    def panels(self) -> int:
        """Panels that cover the rows."""
        return -(-self.rows // self.width)

    @property
    def tile(self) -> int:
        """Columns of Y in one register tile, all of one group."""
        return min(self.v, 8 if self.lanes == 16 else 4)

    @property
    def block(self) -> int:
        """Columns of Y that are finished together; whole vectors and whole groups."""
        return block_columns(self.v, self.lanes)

    @property
    def blocks(self) -> int:
        """Blocks that cover the columns of Y."""
        return -(-self.n // self.block)

    @property
    def groups(self) -> int:
        """Groups of columns, those that only pad the last block included."""
        return self.blocks * self.block // self.v

    @property
    def depth(self) -> int:
        """Columns of X rounded up to whole vectors."""
        return -(-self.k // self.lanes) * self.lanes


def vcol_matmul(
    m: int, k: int, n: int, nk: int, v: int = 8, *, lead: Lead = (), target: Any = None
) -> Any:
    """Return the TIR function of ``Y[i, j] = sum_t X[i, idx[j//v, t]] * data[j//v, t, j%v]``.

    The sum runs over ``t < counts[j//v]``: every group has a number of rows of its own.

    Parameters
    ----------
    m, k, n : int
        Rows of X, columns of X, columns of Y.
    nk : int
        Rows of W for which ``idx`` and ``data`` have space.
    v : int, optional
        Columns of W per group: 8 or a multiple (4 where vectors are short), or 1: each column
        has a row list of its own, which is the CSR form of the transposed weight.
    lead : tuple of int, optional
        Leading batch axes of X and Y.
    target : tvm.target.Target, optional
        Gives the width of the vectors; this machine if omitted.

    Returns
    -------
    PrimFunc
        ``(X: f32[*lead, m, k], counts: i32[G], idx: i32[G, nk], data: f32[G, nk, v],
        Y: f32[*lead, m, n])`` with G from `pack_vcol`, marked so that FuseOps fuses an epilogue
        into it.

    Raises
    ------
    TransformError
        If a vector of columns is not made of whole groups or a group of whole vectors, or
        ``nk`` is less than one.
    """
    lanes = vector_bits(target or host_target()) // 32
    shape = VColShape(lead, m, k, n, nk, v, lanes)
    if v % shape.tile or (v % lanes and lanes % v):
        raise TransformError(f"groups of {v} columns do not fit vectors of {lanes}", "use v = 8")
    if nk < 1:
        raise TransformError(f"kept rows nk = {nk} must be at least 1", "pack the weight first")
    return _build(shape)


def vcol_cycles(shape: VColShape, rows: float) -> float:
    """Return the modelled cycles of a `vcol_matmul` that reads ``rows`` rows of W per group.

    A step costs the busier of two FMA and two load ports, and about half a cycle more when the
    panel comes from L2; a transpose costs one cycle per shuffle and one per load and store. Groups
    of one column use each vector of the panel once and wait for L2: measured on Zen 5, 15 to 18
    cycles for eight vectors.
    """
    vectors = shape.width // shape.lanes
    panels = prod(shape.batch) * shape.panels
    tiles = panels * shape.blocks * shape.block // shape.tile
    step = max(shape.tile * vectors / 2, (shape.tile + vectors + 1) / 2, 4.0) + 0.5
    if shape.tile == 1:
        step = max(step, _L2_CYCLES * vectors)
    turn = shape.lanes * (log2(shape.lanes) + 2)
    turns = panels * vectors * (shape.depth + shape.blocks * shape.block) / shape.lanes
    return tiles * step * rows + turns * turn


def block_columns(v: int, lanes: int) -> int:
    """Return how many columns of Y are finished together."""
    return max(v, lanes)


def pack_vcol(
    weight: npt.NDArray[Any], v: int, lanes: int, space: int = 0
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return the counts, row lists and values of a `vcol_matmul`.

    Parameters
    ----------
    weight : array [K, N] of float32
    v : int
        Columns per group.
    lanes : int
        fp32 values of a vector register of the target.
    space : int, optional
        Least length of the row lists; functions are shared between weights of one length.

    Returns
    -------
    counts : array [G] of int32
        Rows of each group; G groups of v columns fill whole vectors, so the last may be empty.
    idx : array [G, nk] of int32
        Ascending rows, then zeros.
    data : array [G, nk, v] of float32
        Their values, then zeros.
    """
    k, n = matrix_shape(weight)
    columns = -(-n // block_columns(v, lanes)) * block_columns(v, lanes)
    padded = np.zeros((k, columns), np.float32)
    padded[:, :n] = weight
    used = group_rows(padded, v)
    counts = used.sum(axis=1).astype(np.int32)
    nk = max(1, space, int(counts.max(initial=0)))
    idx = np.zeros((counts.size, nk), np.int32)
    data = np.zeros((counts.size, nk, v), np.float32)
    for group, mask in enumerate(used):
        rows = np.flatnonzero(mask)
        idx[group, : rows.size] = rows
        data[group, : rows.size] = padded[rows, group * v : (group + 1) * v]
    return counts, idx, data


class TransposedSparseRule(ScheduleRule):
    """Schedule rule for functions that hold one `vcol_matmul` and its epilogue."""

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        """Return the schedule of ``func``, or None if it holds no such matmul."""
        if not is_prim_func(func):
            return None
        sch = s_tir.Schedule(func)
        acc = find_tiled_block(sch, (KERNEL,))
        if acc is None:
            return None
        (panel,) = sch.get_producers(acc)
        inline_spatial(sch, keep=[acc, panel])
        *tasks, block = sch.get_loops(acc)
        pieces = _pieces(sch, tasks, block, target_threads(target))
        if pieces > 1:
            piece, block = sch.split(block, [pieces, None])
            _parallel(sch, sch.get_loops(panel)[:-1])
        else:
            sch.compute_at(panel, tasks[-1], preserve_unit_loops=True)
        _fuse_epilogue(sch, acc, block, target)
        _parallel(sch, [*tasks, piece] if pieces > 1 else tasks)
        return sch


def _pieces(sch: Any, tasks: list[Any], block: Any, threads: int) -> int:
    """Return into how many pieces the columns are cut so that every thread has work."""
    count = prod(int(sch.get(loop).extent) for loop in tasks)
    return row_pieces(count, int(sch.get(block).extent), threads)


def _parallel(sch: Any, loops: list[Any]) -> None:
    sch.parallel(sch.fuse(*loops) if len(loops) > 1 else loops[0])


def _fuse_epilogue(sch: Any, acc: Any, at: Any, target: Any) -> None:
    """Compute the consumer of the accumulator on each block, or after all if shapes differ."""
    (consumer,) = sch.get_consumers(acc)
    try:
        sch.reverse_compute_at(consumer, at, preserve_unit_loops=True)
    except s_tir.ScheduleError:
        schedule_spatial(sch, consumer, target)
        return
    sch.set_scope(acc, 0, "local")
    tile = Tile(*(int(v) for v in sch.get(acc).annotations[TILE_ATTR]))
    inner = sch.get_loops(consumer)[-1]
    # The last block of a ragged output stores under a predicate, which does not vectorise.
    if int(sch.get(consumer).iter_vars[-1].dom.extent) % tile.columns == 0:
        sch.vectorize(sch.split(inner, [None, tile.lanes])[1])


def _build(s: VColShape) -> Any:
    """Return the TIR function: transpose panels of X, multiply tile by tile, copy out."""
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_name("vcol_matmul")
        T.func_attr({"tirx.noalias": True, "op_pattern": OUT_EWISE_FUSABLE})
        x = _arg("X", (*s.lead, s.m, s.k))
        counts = _arg("counts", (s.groups,), "int32")
        idx = _arg("idx", (s.groups, s.nk), "int32")
        data = _arg("data", (s.groups, s.nk, s.v))
        y = _arg("Y", (*s.lead, s.m, s.n))
        turned = _buffer((*s.batch, s.panels, s.depth, s.width))
        acc = _buffer((*s.batch, s.panels * s.width, s.blocks * s.block))
        _emit_panels(s, x, turned)
        _emit_product(s, (turned, counts, idx, data), acc)
        _emit_output(s, acc, y)
    return builder.get()


def _emit_panels(s: VColShape, x: Any, turned: Any) -> None:
    """Fill ``turned[*batch, panel, k, row]`` with the transposed panels of X."""
    chunks, lanes = s.depth // s.lanes, s.lanes
    grid = (*s.batch, s.panels, chunks, s.width // lanes)
    with T.grid(*shape64(grid)) as loops, T.sblock("panel"):
        *batch, panel, chunk, vector = _axes(loops)
        first, left = chunk * lanes, vector * lanes
        T.reads(x[tuple(slice(0, extent) for extent in (*s.lead, s.m, s.k))])
        T.writes(turned[(*batch, panel, slice(first, first + lanes), slice(left, left + lanes))])

        def row(at: Any) -> tuple[Any, ...]:
            at = panel * s.width + left + at
            at = at if s.panels * s.width == s.rows else T.min(at, i64(s.rows - 1))
            return (*batch, at) if s.batch == s.lead else unravel_index(at, (*s.lead, s.m))

        def whole() -> None:
            emit_transpose(
                lanes,
                lambda r: x[(*row(r), _run(first, lanes))],
                lambda c, value: T.buffer_store(
                    turned, value, [*batch, panel, first + c, _run(left, lanes)]
                ),
            )

        def ragged() -> None:
            with T.serial(i64(lanes)) as c, T.serial(i64(lanes)) as r:
                value = x[(*row(r), T.min(first + c, i64(s.k - 1)))]
                T.buffer_store(turned, value, [*batch, panel, first + c, left + r])

        _emit_last(s.depth == s.k, chunk == chunks - 1, whole, ragged)


def _emit_last(
    never: bool, last: Any, whole: Callable[[], None], ragged: Callable[[], None]
) -> None:
    """Emit ``ragged`` where ``last`` holds and ``whole`` elsewhere."""
    if never:
        whole()
        return
    with T.If(last):
        with T.Then():
            ragged()
        with T.Else():
            whole()


def _emit_product(s: VColShape, inputs: tuple[Any, ...], acc: Any) -> None:
    """Fill ``acc[*batch, row, column]``, one panel of rows and block of columns at a time."""
    turned, counts, idx, data = inputs
    with T.grid(*shape64((*s.batch, s.panels, s.blocks))) as loops, T.sblock("acc"):
        *batch, panel, block = _axes(loops)
        first, group = block * s.block, block * (s.block // s.v)
        groups = slice(group, group + s.block // s.v)
        T.reads(
            turned[(*batch, panel, slice(0, s.depth), slice(0, s.width))],
            counts[groups],
            idx[groups, 0 : s.nk],
            data[groups, 0 : s.nk, 0 : s.v],
        )
        rows = slice(panel * s.width, (panel + 1) * s.width)
        T.writes(acc[(*batch, rows, slice(first, first + s.block))])
        T.sblock_attr(tile_attrs(Tile(s.width, s.block // s.lanes, s.lanes), KERNEL))
        columns = _local(s.block, s.width)
        with T.serial(i64(s.block // s.tile)) as tile:
            start = tile * s.tile
            _emit_tile(s, (turned, counts, idx, data), (*batch, panel), group, start, columns)
        with (
            T.serial(i64(s.width // s.lanes)) as vector,
            T.serial(i64(s.block // s.lanes)) as chunk,
        ):
            left, top = vector * s.lanes, chunk * s.lanes
            emit_transpose(
                s.lanes,
                lambda c: columns[top + c, _run(left, s.lanes)],
                lambda r, value: T.buffer_store(
                    acc,
                    value,
                    [*batch, panel * s.width + left + r, _run(first + top, s.lanes)],
                ),
            )


def _emit_tile(
    s: VColShape,
    inputs: tuple[Any, ...],
    panel: tuple[Any, ...],
    group: Any,
    start: Any,
    columns: Any,
) -> None:
    """Emit one register tile: ``s.tile`` columns of Y for the rows of a panel."""
    turned, counts, idx, data = inputs
    sums = _local(s.tile, s.width)
    group = group + start // s.v

    def each(store: Any) -> None:
        with (
            T.unroll(i64(s.tile)) as c,
            T.unroll(i64(s.width // s.lanes)) as vector,
            T.vectorized(i64(s.lanes)) as lane,
        ):
            store(c, vector * s.lanes + lane)

    each(lambda c, r: T.buffer_store(sums, f32(0.0), [c, r]))
    with T.serial(counts[group]) as step:
        row = T.bind(idx[group, step].astype("int64"))
        following = T.min(group + max(1, s.block // s.v), i64(s.groups - 1))
        # The weights of a model stream from memory, and the gathered rows of X hide that stream
        # from the hardware: without this a multiply takes a third longer than on warm weights.
        # Single columns read a line in sixteen steps, which it sees.
        if s.v > 1:
            T.evaluate(prefetch(data[following, step, start % s.v], locality=2))

        def add(c: Any, r: Any) -> None:
            product = data[group, step, start % s.v + c] * turned[(*panel, row, r)]
            T.buffer_store(sums, sums[c, r] + product, [c, r])

        each(add)
    each(lambda c, r: T.buffer_store(columns, sums[c, r], [start + c, r]))


def _emit_output(s: VColShape, acc: Any, y: Any) -> None:
    """Copy what lies inside of Y; schedules compute this stage, and what follows, on the tile."""
    with T.grid(*shape64((*s.lead, s.m, s.n))) as loops, T.sblock("Y"):
        *row, column = _axes(loops)
        at = row if s.batch == s.lead else [ravel_index(row, (*s.lead, s.m))]
        T.reads(acc[(*at, column)])
        T.writes(y[(*row, column)])
        T.buffer_store(y, acc[(*at, column)], [*row, column])


def _axes(loops: Any) -> list[Any]:
    axes = T.axis.remap("S" * len(loops), list(loops), dtype="int64")
    return list(axes) if len(loops) > 1 else [axes]


def _run(start: Any, lanes: int) -> Any:
    """Return the index of ``lanes`` neighbours."""
    return T.ramp(start, i64(1), lanes)


def _arg(name: str, shape: tuple[int, ...], dtype: str = "float32") -> Any:
    return T.arg(name, T.Buffer(shape64(shape), dtype))


def _buffer(shape: tuple[int, ...]) -> Any:
    return T.sblock_alloc_buffer(shape64(shape), "float32")


def _local(*shape: int) -> Any:
    return T.sblock_alloc_buffer(shape64(shape), "float32", scope="local")
