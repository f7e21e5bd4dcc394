"""The register tile every CPU matmul shares: how large it is, and the schedule that keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, gcd, prod
from typing import Any

from icd_tvm._tvm import s_tir, tvm
from icd_tvm.tir_schedules.cpu.elementwise import inline_spatial, schedule_spatial
from icd_tvm.tir_schedules.cpu.emit import LINE
from icd_tvm.tir_schedules.target import target_threads, vector_bits

Lead = tuple[int, ...]
TILE_ATTR = "icd.tile"
# Of reading a list of rows: one more load a step, which tiles of one vector feel; Zen 5.
INDEX_COST = 1.08
# Multiply-adds in the body of a loop along K: longer bodies lose up to 1 % on Zen 5.
_BODY = 64
_CHUNK_BYTES = 512 * 1024
_MAX_VECTORS = 8
_MAX_CLAMPED = 4
_FEW_TILES = 8
# Level-1 data cache of current x86-64 cores: 64 sets of 8 to 12 ways.
_L1_SETS, _L1_WAYS = 64, 12


@dataclass(frozen=True)
class Tile:
    """Accumulators held in registers: ``rows`` x (``vectors`` x ``lanes``) fp32 values."""

    rows: int
    vectors: int
    lanes: int

    @property
    def columns(self) -> int:
        """Columns of the output that one tile covers, which is the width of a weight panel."""
        return self.vectors * self.lanes

    def padded(self, m: int, n: int) -> tuple[int, int]:
        """Return ``m`` and ``n`` rounded up to whole tiles."""
        return ceil(m / self.rows) * self.rows, ceil(n / self.columns) * self.columns


def choose_tile(m: int, k: int, n: int, target: Any, vectors: int | None = None) -> Tile:
    """Return the register tile with the least modelled cycles for an ``m`` x ``n`` output.

    Tiles that leave no registers for the weight vectors and one broadcast are not considered.

    Parameters
    ----------
    m, k, n : int
        Rows of the output, length of a row of X, columns of the output.
    target : tvm.target.Target
        LLVM target; its vector width gives the lanes and the number of registers.
    vectors : int, optional
        Fixes the width of the tile, for kernels whose weight groups are that wide.

    Returns
    -------
    Tile
    """
    bits = vector_bits(target)
    lanes, registers = bits // 32, 32 if bits == 512 else 16
    widths = range(1, _MAX_VECTORS + 1) if vectors is None else (vectors,)
    tiles = [
        Tile(rows, width, lanes)
        for width in widths
        for rows in range(1, min(m, registers) + 1)
        if rows * width + width + 2 <= registers or rows == 1
    ]
    return _fastest(tiles, m, k, n)


def dot_tile(dot: Any, m: int, steps: int, n: int, vectors: int | None = None) -> Tile:
    """Return the register tile with the least modelled cycles for products of runs along K.

    Parameters
    ----------
    dot : LaneDot
        Knows its lanes and registers, and how many of these a tile needs.
    m, steps, n : int
        Rows of the output, runs in a row of X, columns of the output.
    vectors : int, optional
        Fixes the width of the tile.
    """
    widths = range(1, _MAX_VECTORS + 1) if vectors is None else (vectors,)
    tiles = [
        Tile(rows, width, dot.lanes)
        for width in widths
        for rows in range(1, min(m, dot.registers) + 1)
        if dot.needs(rows, width) <= dot.registers or (rows, width) == (1, widths[0])
    ]
    return _fastest(tiles, m, steps, n)


def _fastest(tiles: list[Tile], m: int, k: int, n: int) -> Tile:
    return min(tiles, key=lambda t: (tile_cycles(t, m, k, n), abs(t.vectors - 3), -t.rows))


def tile_cycles(tile: Tile, m: int, k: int, n: int) -> float:
    """Return the modelled cycles per step along K for an ``m`` x ``n`` output.

    One step of one tile costs the busier of two FMA ports, two load ports and the FMA latency
    of four cycles. Measured on Zen 5: about one cycle more when LLVM runs short of vector
    registers or loads X once per FMA, a third more when several clamped rows of a ragged tile
    need address registers of their own, and a multiple when the rows of X share cache sets.
    """
    rows, columns = tile.padded(m, n)
    count = (rows // tile.rows) * (columns // tile.columns)
    fma = tile.rows * tile.vectors / 2
    loads = (tile.rows + tile.vectors) / 2
    crowded = (0.5 if tile.vectors == 1 else 0.0) + (0.7 if tile.rows * tile.vectors > 24 else 0.0)
    ragged = 1.3 if rows - m > _MAX_CLAMPED else 1.0
    conflict = 4.0 if _lines_per_set(tile.rows, k) > _L1_WAYS - 2 else 1.0
    return count * (max(fma, loads, 4.0) + crowded + 0.3) * ragged * conflict


def _lines_per_set(rows: int, k: int) -> float:
    """Return how many of ``rows`` lines, ``k`` fp32 values apart, share one L1 set."""
    lines = max(1, 4 * k // LINE)
    return rows * gcd(lines, _L1_SETS) / _L1_SETS


def flat_rows(lead: Lead, m: int) -> tuple[Lead, int]:
    """Return the batch axes and rows a matmul is tiled over.

    A batch of single rows, as in a decoding step, is taken as one run of rows; otherwise every
    batch would stream the whole weight for itself. Only one batch axis may be longer than one:
    with more, a tile's rows are no box in the output and its epilogue could not be bounded.
    """
    flat = m == 1 and sum(extent > 1 for extent in lead) == 1
    return ((), prod(lead)) if flat else (lead, m)


def tile_attrs(tile: Tile, kernel: str) -> dict[str, Any]:
    """Return the block annotations by which the schedule rules recognise a matmul."""
    return {TILE_ATTR: [tile.rows, tile.vectors, tile.lanes], "icd.kernel": kernel}


def annotated_tile(block: Any) -> Tile:
    """Return the tile that `tile_attrs` wrote on a block."""
    return Tile(*(int(v) for v in block.annotations[TILE_ATTR]))


def find_tiled_block(sch: Any, kernels: tuple[str, ...]) -> Any:
    """Return the block of ``sch`` annotated as one of ``kernels``, or None."""
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        notes = sch.get(block).annotations
        if TILE_ATTR in notes and str(notes["icd.kernel"]) in kernels:
            return block
    return None


def schedule_tiled(func: Any, target: Any, kernels: tuple[str, ...]) -> Any:
    """Return the schedule of a tiled matmul and its fused epilogue, or None if it is none.

    The accumulator block iterates over (batch..., i, j, k) with i and j padded to whole tiles.
    What follows it is inlined into one block, which is computed on the tile while it is still
    in registers.
    """
    sch = s_tir.Schedule(func)
    acc = find_tiled_block(sch, kernels)
    if acc is None:
        return None
    tile = annotated_tile(sch.get(acc))
    prologue = sch.get_producers(acc)
    inline_spatial(sch, keep=[acc, *prologue])
    threads = target_threads(target)
    tasks, rows, chunk, inner, reduce = _tile_loops(sch, acc, tile, threads)
    fuse_epilogue(sch, acc, chunk, tile, target)
    for producer in prologue:
        schedule_spatial(sch, producer, target)
    # Annotate before the split of the reduction: its init block inherits the loop kinds.
    sch.parallel(spread(sch, tasks, rows, threads))
    for loop in (reduce[1], *inner[:2]):
        sch.unroll(loop)
    sch.vectorize(inner[2])
    sch.decompose_reduction(acc, reduce[0])
    return sch


def _tile_loops(
    sch: Any, acc: Any, tile: Tile, threads: int
) -> tuple[list[Any], Any, Any, list[Any], list[Any]]:
    """Split the loops of the accumulator; return (tasks, row tiles, panels, tile, reduction)."""
    *batch, i, j, k = sch.get_loops(acc)
    rows, ii = sch.split(i, [None, tile.rows])
    panel, jv, lane = sch.split(j, [None, tile.vectors, tile.lanes])
    length = int(sch.get(k).extent)
    panels = int(sch.get(panel).extent)
    outer, chunk = sch.split(panel, [None, panel_chunk(tile, panels, length, threads)])
    reduce = list(sch.split(k, [None, _unroll(tile, length)]))
    sch.reorder(*batch, outer, rows, chunk, *reduce, ii, jv, lane)
    tasks = share_panels(sch, batch, outer, rows, threads)
    return tasks, rows, chunk, [ii, jv, lane], reduce


def _unroll(tile: Tile, length: int) -> int:
    """Return how many steps along K make the body of a loop."""
    return gcd(length, 4 if 4 * tile.rows * tile.vectors <= _BODY else 2)


def share_panels(sch: Any, batch: list[Any], panel: Any, rows: Any, threads: int) -> list[Any]:
    """Return the task loops, reordered so that short batches use a weight panel together.

    A batch of few row tiles has hardly used a panel when the next batch streams it from L3 again.
    Each thread keeps batches of its own, whose rows are in its caches. Measured on Zen 5 with 8
    batches of 32 rows on one thread: fp32 and bf16 1 to 2 % faster, int8 up to 1 %; with 128 rows
    no gain.

    Parameters
    ----------
    sch : tvm.s_tir.Schedule
    batch : list of LoopRV
        Outermost loops; ``panel`` follows and ``rows``, over the row tiles, lies inside.
    panel, rows : LoopRV
    threads : int
    """
    count = int(sch.get(batch[-1]).extent) if batch else 1
    if count % threads or count == threads or int(sch.get(rows).extent) > _FEW_TILES:
        return [*batch, panel]
    own, inner = sch.split(batch[-1], [threads, None])
    sch.reorder(own, panel, inner)
    return [*batch[:-1], own, panel, inner]


def panel_chunk(tile: Tile, panels: int, length: int, threads: int) -> int:
    """Return how many weight panels are used on one row tile before the next row tile.

    A narrow tile reads X once per FMA, so X should stay in L1 while a chunk of weights
    streams from L2; a wide tile keeps one weight panel and streams X. Every thread gets at
    least one chunk if there are that many panels.
    """
    if tile.vectors > 1:
        return 1
    fits = max(1, min(_CHUNK_BYTES // (length * tile.columns * 4), panels // threads))
    return max(c for c in range(1, panels + 1) if panels % c == 0 and c <= fits)


def fuse_epilogue(sch: Any, acc: Any, at: Any, tile: Tile, target: Any) -> Any:
    """Compute the consumer of the accumulator on the tile, or after it if shapes differ.

    Returns
    -------
    SBlockRV or None
        The consumer, if it is computed on tiles and in vectors.
    """
    (consumer,) = sch.get_consumers(acc)
    try:
        sch.reverse_compute_at(consumer, at, preserve_unit_loops=True)
    except s_tir.ScheduleError:
        schedule_spatial(sch, consumer, target)
        return None
    sch.set_scope(acc, 0, "local")
    inner = sch.get_loops(consumer)[-1]
    # The last panel of a ragged output stores under a predicate, which does not vectorise.
    whole = int(sch.get(consumer).iter_vars[-1].dom.extent) % tile.columns == 0
    if not whole or int(sch.get(inner).extent) % tile.lanes:
        return None
    sch.vectorize(sch.split(inner, [None, tile.lanes])[1])
    return consumer


def spread(sch: Any, tasks: list[Any], rows: Any, threads: int) -> Any:
    """Fuse the task loops, with a piece of the row loop if there are too few, into one loop."""
    count = prod(int(sch.get(loop).extent) for loop in tasks)
    pieces = row_pieces(count, int(sch.get(rows).extent), threads)
    if pieces > 1:
        tasks = [*tasks, sch.split(rows, [pieces, None])[0]]
    return sch.fuse(*tasks) if len(tasks) > 1 else tasks[0]


def row_pieces(tasks: int, rows: int, threads: int) -> int:
    """Return into how many pieces the row tiles are cut so that ``threads`` share the work.

    Parameters
    ----------
    tasks : int
        Independent tasks without a cut.
    rows : int
        Row tiles of one task; only divisors of it are considered.
    threads : int
        Worker threads, each of which gets an equal share of the tasks.
    """

    def balance(pieces: int) -> float:
        return tasks * pieces / (ceil(tasks * pieces / threads) * threads)

    choices = [p for p in range(1, rows + 1) if rows % p == 0]
    good = [p for p in choices if balance(p) >= 0.9]
    return good[0] if good else max(choices, key=balance)


def is_prim_func(func: Any) -> bool:
    """Tell whether ``func`` is a TIR function, the only kind a schedule rule accepts."""
    return isinstance(func, tvm.tirx.PrimFunc)
