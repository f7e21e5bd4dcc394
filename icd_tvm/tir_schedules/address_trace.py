"""The addresses that a scheduled TIR function touches, in the order of its execution.

One record is one load or store of the lowered text; a vector access is one record. Loops marked
parallel run one after the other, as they do on one thread. Scratch that holds vectors and fits the
register file is taken to live there, less the registers that operands need: of a tile of 16
accumulators on 16 registers three are spilled. LLVM may keep more in registers, which only removes
hits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icd_tvm._tvm import Call, apply_pass, s_tir, tirx, tvm, tvm_ffi
from icd_tvm.errors import ConfigError
from icd_tvm.tir_schedules.access_patterns import Access, accesses
from icd_tvm.tir_schedules.index_eval import Constants, Ints, Loop, Points, variables
from icd_tvm.tir_schedules.target import vector_bits

# Vector registers by their bits; a load, a broadcast and a temporary take three of them.
_REGISTERS, _OPERANDS = {512: 32, 256: 16, 128: 16}, 3
# Arrays of scalars are indexed and so stay in memory.
_SCALAR_BYTES = 64
# Records evaluated at a time, about.
_CHUNK = 1 << 20
# For planning only: iterations of a loop whose extent depends on data.
_GUESSED_EXTENT = 256
_KEY = object()


@dataclass(frozen=True)
class Trace:
    """A run of memory accesses in program order.

    Attributes
    ----------
    address : int64[N]
        First byte.
    size : int64[N]
        Bytes touched from there on.
    write : bool[N]
    """

    address: Ints
    size: Ints
    write: NDArray[np.bool_]

    def units(self, unit_bytes: int) -> Ints:
        """Return the aligned units (sectors, lines) touched, in order; int64[>= N]."""
        first = self.address // unit_bytes
        count = (self.address + self.size - 1) // unit_bytes - first + 1
        start = np.cumsum(count) - count
        return np.repeat(first - start, count) + np.arange(int(count.sum()))


def lower_loops(func: Any, target: Any) -> Any:
    """Return a scheduled PrimFunc as loops over flat buffers, vector accesses formed.

    These are the passes that TVM's own pipeline runs before it makes the packed function.
    """
    schedule, plain = s_tir.transform, tirx.transform
    passes = [
        plain.BindTarget(target),
        schedule.CanonicalizeLoop(),
        schedule.LowerInitBlock(),
        schedule.PlanAndUpdateBufferAllocationLocation(),
        schedule.ConvertBlocksToOpaque(),
        schedule.CompactBufferAllocation(),
        schedule.LowerMatchBuffer(),
        schedule.StmtSimplify(),
        schedule.LowerOpaqueBlock(),
        plain.FlattenBuffer(),
        plain.NarrowDataType(32),
        schedule.LoopPartition(),
        plain.VectorizeLoop(True),
        plain.StorageRewrite(),
        schedule.HoistIfThenElse(),
        plain.StmtSimplify(),
        plain.RemoveNoOp(),
    ]
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    lowered = apply_pass(tvm.transform.Sequential(passes), mod)["main"]
    # A prefetch brings early what is loaded anyway; it is no access of its own.
    return lowered.with_body(
        tvm_ffi.structural_map(lowered.body, (tirx.Evaluate, _without_prefetch))
    )


def _without_prefetch(node: Any) -> Any:
    prefetch = isinstance(node.value, Call) and "prefetch" in str(node.value)
    return tirx.Evaluate(0) if prefetch else node


def address_trace(
    func: Any, addresses: Sequence[int], scratch: int, *, consts: Constants | None = None
) -> Iterator[Trace]:
    """Yield the memory accesses of one call in program order, in chunks.

    Parameters
    ----------
    func : PrimFunc
        From :func:`lower_loops`, with static shapes.
    addresses : sequence of int
        First byte of each parameter.
    scratch : int
        First byte of the stack area for allocations that are not in registers.
    consts : mapping of str to ndarray, optional
        Values of the parameters that indices, loop bounds or guards load from, by name.

    Raises
    ------
    ConfigError
        If the number of addresses is wrong, a shape is symbolic, or a value is unknown.
    UnsupportedOpError
        If an index cannot be evaluated.
    """
    if len(addresses) != len(func.params):
        raise ConfigError(f"{len(func.params)} parameters but {len(addresses)} addresses")
    found = accesses(func)
    bases = _bases(func, found, addresses, scratch)
    placed = [_Placed(a, *bases[a.buffer]) for a in found if a.buffer in bases]
    for shape in (p.access.shape for p in placed):
        if min(shape, default=0) < 0:
            raise ConfigError(f"shape {shape} is symbolic", "specialise the function")
    if placed:
        flat = {name: np.ravel(values) for name, values in (consts or {}).items()}
        yield from _in_order(_nest(placed, 0), Points(flat))


@dataclass(frozen=True, eq=False)
class _Placed:
    """An access with the address of its buffer; lane loops are kept apart."""

    access: Access
    base: int
    # Bytes at its start that are in registers.
    resident: int = 0

    @property
    def loops(self) -> list[Loop]:
        return [loop for loop in self.access.loops if loop.tag != "vectorized"]

    @property
    def lanes(self) -> list[Loop]:
        return [loop for loop in self.access.loops if loop.tag == "vectorized"]

    @property
    def item_bytes(self) -> int:
        return int(tvm_ffi.dtype(self.access.dtype).itemsize)


def _bases(
    func: Any, found: Sequence[Access], addresses: Sequence[int], scratch: int
) -> dict[Any, tuple[int, int]]:
    """Return the first byte of each buffer in memory, and how many of its bytes are not."""
    registers, free = _register_bytes(func)
    parameters = {str(p.name): address for p, address in zip(func.params, addresses, strict=True)}
    bases: dict[Any, tuple[int, int]] = {}
    for access in found:
        if access.name in parameters:
            bases[access.buffer] = parameters[access.name], 0
        elif access.buffer not in bases:
            dtype = tvm_ffi.dtype(access.dtype)
            size = int(np.prod(access.shape)) * int(dtype.itemsize)
            if size > (free if dtype.lanes > 1 else _SCALAR_BYTES):
                # A tile meant for the registers is spilled in part, a larger array as a whole.
                spilled = dtype.lanes > 1 and size <= registers
                bases[access.buffer] = scratch, free if spilled else 0
                scratch += -(-size // 64) * 64
    return bases


def _register_bytes(func: Any) -> tuple[int, int]:
    """Return the bytes of the vector registers of a function's target, and those that are free."""
    target = func.attrs["target"] if func.attrs and "target" in func.attrs else None
    bits = 512 if target is None or target.kind.name != "llvm" else vector_bits(target)
    return _REGISTERS[bits] * bits // 8, (_REGISTERS[bits] - _OPERANDS) * bits // 8


@dataclass(frozen=True, eq=False)
class _Nest:
    """A loop over its parts, the parts in a row (loop None), or one access."""

    parts: tuple[_Nest, ...] = ()
    loop: Loop | None = None
    placed: _Placed | None = None

    @property
    def records(self) -> int:
        """About how many records one entry makes."""
        inside = sum(part.records for part in self.parts) if self.parts else 1
        return inside * self._extent

    @property
    def span(self) -> int:
        """How many keys one entry needs to put its records in order."""
        inside = max((part.span for part in self.parts), default=1) * max(len(self.parts), 1)
        return inside * (self._extent if self._fixed else 1 << 16)

    @property
    def _fixed(self) -> bool:
        return self.loop is None or self.loop.constant_extent is not None

    @property
    def _extent(self) -> int:
        if self.loop is None:
            return 1
        known = self.loop.constant_extent
        return _GUESSED_EXTENT if known is None else known


def _nest(placed: Sequence[_Placed], depth: int) -> _Nest:
    """Rebuild the nest below ``depth``: neighbours under one loop variable share the loop."""

    def loop_of(one: _Placed) -> Any:
        return one.loops[depth].var if depth < len(one.loops) else None

    parts: list[_Nest] = []
    for var, run in itertools.groupby(placed, key=loop_of):
        members = list(run)
        if var is None:
            parts += [_Nest(placed=one) for one in members]
        else:
            inner = _nest(members, depth + 1)
            row = inner.loop is None and inner.placed is None
            parts.append(_Nest(inner.parts if row else (inner,), members[0].loops[depth]))
    return parts[0] if len(parts) == 1 else _Nest(tuple(parts))


def _in_order(nest: _Nest, points: Points) -> Iterator[Trace]:
    """Run outer loops a few iterations at a time, so that a chunk fits the memory."""
    if nest.placed is not None or nest.records * points.size <= _CHUNK:
        yield _chunk(nest, points)
        return
    inner = _copy(points)
    if nest.loop is not None:
        inner.expand(nest.loop)
    body = _Nest(nest.parts) if len(nest.parts) > 1 else nest.parts[0]
    for few in inner.chunks(max(1, _CHUNK // body.records)):
        if body.records * few.size <= _CHUNK or body.loop is not None:
            yield from _in_order(body, few)
        else:  # one iteration, larger than a chunk
            for part in body.parts or (body,):
                yield from _in_order(part, few)


def _copy(points: Points) -> Points:
    return Points(points.consts, dict(points.env), points.size)


def _chunk(nest: _Nest, points: Points) -> Trace:
    """Evaluate every access below ``nest`` and sort the records by their keys."""
    if nest.span * points.size >= 1 << 62:
        raise ConfigError("the loop nest is too deep to be put in order")
    start = _copy(points)
    start.env[_KEY] = np.arange(points.size, dtype=np.int64) * nest.span
    found: list[tuple[Ints, Ints, Ints, bool]] = []
    _collect(nest, start, found)
    order = np.argsort(np.concatenate([keys for keys, *_ in found]), kind="stable")
    writes = [np.full(keys.size, write) for keys, _, _, write in found]
    return Trace(
        np.concatenate([address for _, address, _, _ in found])[order],
        np.concatenate([size for _, _, size, _ in found])[order],
        np.concatenate(writes)[order],
    )


def _collect(nest: _Nest, points: Points, found: list[tuple[Ints, Ints, Ints, bool]]) -> None:
    if nest.placed is not None:
        found.append(_records(nest.placed, points))
        return
    inside = max(part.span for part in nest.parts)
    inner = _copy(points)
    if nest.loop is not None:
        inner.expand(nest.loop)
        low = points_value(inner, nest.loop.minimum)
        inner.env[_KEY] += (inner.env[nest.loop.var] - low) * inside * len(nest.parts)
    for place, part in enumerate(nest.parts):
        below = _copy(inner)
        below.env[_KEY] = inner.env[_KEY] + place * inside
        _collect(part, below, found)


def points_value(points: Points, expr: Any) -> Ints:
    """Evaluate ``expr`` at every point as int64[size]."""
    return np.asarray(np.broadcast_to(points.value(expr), points.size), dtype=np.int64)


def _records(placed: _Placed, points: Points) -> tuple[Ints, Ints, Ints, bool]:
    """Return keys, addresses and sizes of one access at all points."""
    inner, lanes = _copy(points), placed.lanes
    by_lane = {loop.var for loop in lanes}
    guarded = any(variables([p]) & by_lane for p in placed.access.predicates)
    inner.filter([p for p in placed.access.predicates if not variables([p]) & by_lane])
    if not guarded and len(lanes) == 1 and (size := _contiguous(placed, inner)):
        inner.env[lanes[0].var] = np.zeros(inner.size, dtype=np.int64)
    else:
        inner.expand_all(lanes, placed.access.predicates)
        size = placed.item_bytes
    if placed.resident:
        inner.take(_addresses(placed, inner) >= placed.base + placed.resident)
    return inner.env[_KEY], _addresses(placed, inner), np.full(inner.size, size), _writes(placed)


def _writes(placed: _Placed) -> bool:
    return placed.access.write


def _contiguous(placed: _Placed, points: Points) -> int:
    """Return the bytes of a vector access whose lanes are neighbours or equal, else 0."""
    loop, ends = placed.lanes[0], []
    for lane in (0, 1):
        probe = _copy(points)
        probe.env[loop.var] = np.full(points.size, lane, dtype=np.int64)
        ends.append(_addresses(placed, probe))
    steps = np.unique(ends[1] - ends[0])
    if steps.size == 0 or np.array_equal(steps, [0]):
        return placed.item_bytes
    lanes = int(loop.extent)
    return lanes * placed.item_bytes if np.array_equal(steps, [placed.item_bytes]) else 0


def _addresses(placed: _Placed, points: Points) -> Ints:
    offset = np.zeros(points.size, dtype=np.int64)
    for index, extent in zip(placed.access.indices, placed.access.shape, strict=True):
        offset = offset * extent + points_value(points, index)
    return placed.base + offset * placed.item_bytes
