"""Which elements a TIR function touches together, by evaluating its index expressions.

Works on schedulable functions (with SBlocks, before or after scheduling) and on lowered ones.
Index expressions are evaluated with numpy over the loop nest, so floor division, modulo, guards
and indirect indices through constant arrays are exact; nothing is approximated by intervals.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
import tvm_ffi
from numpy.typing import NDArray

from icd_tvm._tvm import Call, TensorLoad, Var, s_tir, sym, tirx, tvm
from icd_tvm.core.cost import TileAccess
from icd_tvm.errors import ConfigError, ShapeError, UnsupportedOpError
from icd_tvm.tir_schedules.index_eval import Constants, Ints, Loop, Points, op_name, variables

Window = Literal["vector", "warp", "sector", "line", "tile", "cta", "reduction", "all"]
WINDOWS = ("vector", "warp", "sector", "line", "tile", "cta", "reduction", "all")

_KINDS = ("serial", "parallel", "vectorized", "unrolled", "thread")
_LANES = ("vectorized", "intrinsic")
_THREADS = ("threadIdx.z", "threadIdx.y", "threadIdx.x")
_WARP = 32
_MAX_WARPS = 32
_POINT_CAP = 1 << 26
# Points evaluated at a time.
_CHUNK = 1 << 20
# Chance that the error bound of a sampled incidence fails for a given entry.
_SAMPLING_RISK = 1e-3


@dataclass(frozen=True, eq=False)
class Access:
    """One load or store in the source of a function.

    Attributes
    ----------
    buffer : Var
        The buffer itself, the variable of a parameter or of an allocation.
    shape : tuple of int
        -1 where symbolic.
    dtype : str
    write : bool
    indices : tuple of Expr
        In terms of the loop variables.
    loops : tuple of Loop
        Outermost first.
    predicates : tuple of Expr
        All must hold for the access to happen.
    block : str
        Name of the innermost named SBlock, "" outside any.
    """

    buffer: Any
    shape: tuple[int, ...]
    dtype: str
    write: bool
    indices: tuple[Any, ...]
    loops: tuple[Loop, ...]
    predicates: tuple[Any, ...]
    block: str

    @property
    def name(self) -> str:
        """Name of the buffer."""
        return str(self.buffer.name)

    @property
    def item_bits(self) -> int:
        """Size of one element in bits."""
        return int(tvm_ffi.dtype(self.dtype).bits)


@dataclass(frozen=True)
class Affine:
    """An index ``sum coefficients[loop] * loop + offset``; names as in :class:`Loop`."""

    coefficients: dict[str, int]
    offset: int


@dataclass(frozen=True, eq=False)
class Incidence:
    """Which indices of an axis each window touches.

    Attributes
    ----------
    matrix : csr_matrix of bool, shape [windows, n]
    counts : float64[windows]
        How many windows of the execution a row stands for: loops that the access does not
        depend on multiply it, and so does sampling.
    error : float
        0 when exact. When windows were sampled: bound on the error of the relative frequency of
        any event that a window decides, such as touching i and j both, that holds with
        probability 0.999 (Hoeffding's inequality).
    """

    matrix: sp.csr_matrix
    counts: NDArray[np.float64]
    error: float = 0.0

    def tile_access(self, tile: int, weight: float = 1.0, label: str = "") -> TileAccess:
        """Return the input of the solver: these windows on a kernel that handles ``tile``s."""
        return TileAccess(self.matrix, tile, weight, label, self.counts)


def accesses(func: Any) -> list[Access]:
    """Return every load and store of a TIR function, in the order of its text.

    Parameters
    ----------
    func : PrimFunc
        Schedulable or lowered, for a CPU or a GPU.

    Raises
    ------
    UnsupportedOpError
        If the function has a while loop, whose trip count no index expression gives.
    """
    walk = _Walk()
    walk.statement(func.body)
    reduction = walk.reduction_vars(func)
    return [_marked(access, reduction) for access in walk.found]


def _marked(access: Access, reduction: set[Any]) -> Access:
    loops = tuple(replace(loop, reduction=loop.var in reduction) for loop in access.loops)
    return replace(access, loops=loops)


class _Walk:
    """Collects accesses; block variables and bound variables are replaced by loop variables."""

    def __init__(self) -> None:
        self.found: list[Access] = []
        self.loops: list[Loop] = []
        self.predicates: list[Any] = []
        self.values: dict[Any, Any] = {}
        self.block = ""
        self.reduced: set[Any] = set()
        self.accumulated: set[Any] = set()

    def statement(self, node: Any) -> None:
        handler = self._HANDLERS.get(type(node))
        if handler is not None:
            handler(self, node)

    def _sequence(self, node: Any) -> None:
        for part in node.seq:
            self.statement(part)

    def _for(self, node: Any) -> None:
        thread = node.thread_binding
        tag = thread.thread_tag if thread is not None else _KINDS[int(node.kind)]
        if node.step is not None and int(node.step) != 1:
            raise UnsupportedOpError(f"loop {node.loop_var.name} has step {node.step}")
        self.loads(node.min)
        self.loads(node.extent)
        self._inside(Loop(node.loop_var, self.plain(node.min), self.plain(node.extent), tag), node)

    def _attribute(self, node: Any) -> None:
        if node.attr_key != "thread_extent":
            self.statement(node.body)
            return
        self._inside(Loop(node.node.var, 0, self.plain(node.value), node.node.thread_tag), node)

    def _inside(self, loop: Loop, node: Any) -> None:
        self.loops.append(loop)
        self.statement(node.body)
        self.loops.pop()

    def _while(self, node: Any) -> None:
        raise UnsupportedOpError("while loop: its windows are unknown", "use a for loop")

    def _if(self, node: Any) -> None:
        self.loads(node.condition)
        condition = self.plain(node.condition)
        self._guarded(condition, lambda: self.statement(node.then_case))
        if node.else_case is not None:
            self._guarded(tirx.Not(condition), lambda: self.statement(node.else_case))

    def _guarded(self, condition: Any, visit: Callable[[], None]) -> None:
        self.predicates.append(condition)
        visit()
        self.predicates.pop()

    def _bind(self, node: Any) -> None:
        self.loads(node.value)
        self.values[node.var] = self.plain(node.value)

    def _evaluate(self, node: Any) -> None:
        self.loads(node.value)

    def _store(self, node: Any) -> None:
        self.loads(node.value)
        for index in node.indices:
            self.loads(index)
        self._record(node.buffer, node.indices, write=True)
        if any(load.source.same_as(node.buffer) for load in _loads_of(node.value)):
            fixed = variables(self.found[-1].indices)
            self.accumulated |= {loop.var for loop in self.loops if loop.var not in fixed}

    def _realize(self, node: Any) -> None:
        block, outer = node.block, self.block
        for variable, value in zip(block.iter_vars, node.iter_values, strict=True):
            plain = self.plain(value)
            self.values[variable.var] = plain
            if int(variable.iter_type) == 2:
                self.reduced |= variables([plain])
        self.block = str(block.name_hint) or outer
        self._guarded(self.plain(node.predicate), lambda: self._block_body(block))
        self.block = outer

    def _block_body(self, block: Any) -> None:
        if block.match_buffers:
            # A tensor instruction works through pointers: its regions say what it touches.
            for write, regions in ((False, block.reads), (True, block.writes)):
                for region in regions:
                    self._region(region, write)
            return
        if block.init is not None:
            self.statement(block.init)
        self.statement(block.body)

    def _region(self, region: Any, write: bool) -> None:
        spans = [Var(f"span{k}", "int64") for k in range(len(region.region))]
        added = [
            Loop(span, 0, self.plain(part.extent), "intrinsic")
            for span, part in zip(spans, region.region, strict=True)
        ]
        self.loops.extend(added)
        parts = zip(region.region, spans, strict=True)
        indices = [part.min.astype("int64") + span for part, span in parts]
        self._record(region.source, indices, write=write)
        del self.loops[len(self.loops) - len(added) :]

    def loads(self, expr: Any) -> None:
        """Record the loads of an expression; a load under if_then_else gets its condition."""
        if isinstance(expr, int):
            return
        if isinstance(expr, Call) and op_name(expr) == "if_then_else":
            condition, yes, no = expr.args
            self.loads(condition)
            plain = self.plain(condition)
            self._guarded(plain, lambda: self.loads(yes))
            self._guarded(tirx.Not(plain), lambda: self.loads(no))
            return
        if isinstance(expr, TensorLoad):
            self._record(expr.source, expr.indices, write=False)
        for child in _children(expr):
            self.loads(child)

    def _record(self, buffer: Any, indices: Sequence[Any], *, write: bool) -> None:
        plain = [self.plain(index) for index in indices]
        lanes: dict[int, Any] = {}
        scalar = tuple(_without_ramps(index, lanes) for index in plain)
        ramps = tuple(Loop(var, 0, count, "vectorized") for count, var in lanes.items())
        self.found.append(
            Access(
                buffer,
                tuple(int(s) if isinstance(s, tirx.IntImm) else -1 for s in buffer.ty.shape),
                str(buffer.ty.dtype.dtype),
                write,
                scalar,
                (*self.loops, *ramps),
                tuple(p for p in self.predicates if not _is_true(p)),
                self.block,
            )
        )

    def plain(self, expr: Any) -> Any:
        """Return the expression in terms of loop variables only."""
        if isinstance(expr, int) or not self.values:
            return expr
        return tvm_ffi.structural_map(expr, (Var, lambda v: self.values.get(v, v)))

    def reduction_vars(self, func: Any) -> set[Any]:
        """Return the reduction loops: as the blocks declare them, else as stores show them.

        A lowered function has no blocks. There, a loop reduces when a store inside it adds to
        an element whose index does not depend on it, and no store to a parameter does.
        """
        if self.reduced:
            return self.reduced
        parameters = list(func.params)
        spatial: set[Any] = set()
        for access in self.found:
            if access.write and any(access.buffer.same_as(p) for p in parameters):
                spatial |= variables(access.indices)
        return self.accumulated - spatial - self._concurrent()

    def _concurrent(self) -> set[Any]:
        loops = [loop for access in self.found for loop in access.loops]
        return {p.var for p in loops if p.tag not in ("serial", "unrolled")}

    _HANDLERS: Mapping[type, Callable[[_Walk, Any], None]] = {
        tirx.SeqStmt: _sequence,
        tirx.For: _for,
        tirx.AttrStmt: _attribute,
        tirx.While: _while,
        tirx.IfThenElse: _if,
        tirx.Bind: _bind,
        tirx.Evaluate: _evaluate,
        tirx.BufferStore: _store,
        s_tir.SBlockRealize: _realize,
    }


def _is_true(expr: Any) -> bool:
    return isinstance(expr, tirx.IntImm) and int(expr.value) != 0


def _children(expr: Any) -> list[Any]:
    if isinstance(expr, TensorLoad):
        return list(expr.indices)
    if isinstance(expr, Call):
        return [arg for arg in expr.args if not isinstance(arg, str)]
    names = ("a", "b", "value", "condition", "true_value", "false_value", "base", "stride")
    return [child for name in names if (child := getattr(expr, name, None)) is not None]


def _loads_of(expr: Any) -> list[Any]:
    found: list[Any] = []
    tvm_ffi.structural_walk(expr, (TensorLoad, found.append))
    return found


def _without_ramps(expr: Any, lanes: dict[int, Any]) -> Any:
    """Replace the lanes of a vector index by a loop variable, one for each number of lanes."""
    if not any(isinstance(node, (tirx.Ramp, tirx.Broadcast)) for node in _nodes(expr)):
        return expr

    def ramp(node: Any) -> Any:
        count = int(node.lanes)
        lane = lanes.setdefault(count, Var(f"lane{count}", "int64"))
        return node.base.astype("int64") + lane * node.stride.astype("int64")

    return tvm_ffi.structural_map(
        expr, [(tirx.Ramp, ramp), (tirx.Broadcast, lambda node: node.value)]
    )


def _nodes(expr: Any) -> Iterable[Any]:
    pending = [expr]
    while pending:
        node = pending.pop()
        yield node
        pending += _children(node)


def affine(access: Access) -> list[Affine | None]:
    """Return each index as an affine function of the loops, or None where it is not affine.

    Floor division and modulo, as splitting and fusing leave them, are not affine here.
    """
    variables = [loop.var for loop in access.loops]
    return [_affine(index, variables) for index in access.indices]


def _affine(index: Any, variables: list[Any]) -> Affine | None:
    if isinstance(index, int):
        return Affine({}, index)
    if not variables:
        return Affine({}, int(index)) if isinstance(index, tirx.IntImm) else None
    terms = list(sym.detect_linear_equation(index, variables))
    if not terms or not all(isinstance(term, tirx.IntImm) for term in terms):
        return None
    values = [int(term.value) for term in terms]
    pairs = zip(variables, values[:-1], strict=True)
    return Affine({str(v.name): value for v, value in pairs if value}, values[-1])


def window_incidence(
    access: Access,
    axis_of: int | Callable[..., Ints],
    window: Window,
    *,
    consts: Constants | None = None,
    nonzero: NDArray[np.bool_] | None = None,
    logical: Callable[..., Sequence[Ints]] | None = None,
    length: int | None = None,
    line_bytes: int = 64,
    point_cap: int = _POINT_CAP,
    seed: int = 0,
) -> Incidence:
    """Return which indices of one axis each window of an access touches.

    Loops that the access does not depend on only multiply ``counts``; they are not enumerated.

    Parameters
    ----------
    access : Access
    axis_of : int or callable
        The axis of the logical buffer, or a function of the logical indices (one int64[N] array
        for each) that gives the index on the axis, int64[N].
    window : {"vector", "warp", "sector", "line", "tile", "cta", "reduction", "all"}
        Elements that belong together: one vector instruction of one thread; one request of a
        warp of 32 threads; 32 bytes; ``line_bytes``; the register tile, which is what the loops
        inside the innermost reduction loop touch (without one: the unrolled and vector loops);
        one CTA or parallel chunk; one step of the reduction loops; the whole access.
    consts : mapping of str to ndarray, optional
        Values of the buffers that index expressions load from, by name.
    nonzero : ndarray of bool, optional
        Shape of the logical buffer; where False, an element does not count as touched.
    logical : callable, optional
        Maps buffer indices (one int64[N] array each) to logical indices, for packed buffers.
        Logical indices outside the logical shape are padding and do not count.
    length : int, optional
        Length of the axis where neither the buffer nor ``nonzero`` gives it.
    line_bytes : int
        Bytes of a cache line.
    point_cap : int
        Evaluate at most this many points; beyond, windows are sampled (see Incidence.error).
    seed : int
        Of the sampling.

    Returns
    -------
    Incidence
        Windows that touch nothing after ``nonzero`` keep an empty row.

    Raises
    ------
    ConfigError, ShapeError, UnsupportedOpError
        If an argument is invalid, an index cannot be evaluated, or a window by address is
        beyond ``point_cap``.
    """
    if window not in WINDOWS:
        raise ConfigError(f"window={window!r} is unknown", ", ".join(WINDOWS))
    shape = _logical_shape(access, nonzero, logical)
    n = _axis_length(shape, axis_of, length)
    access = split_fused(access, keep_threads=window == "warp")
    domain = _Domain(access, _window_loops(access, window), window == "warp", consts or {})
    naming = _Naming(access, window, domain, line_bytes)
    ids, cells = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for points in domain.points(naming.by_address, point_cap, seed):
        index = [np.broadcast_to(points.value(i), points.size) for i in access.indices]
        place = list(logical(*index)) if logical is not None else list(index)
        axis = place[axis_of] if isinstance(axis_of, int) else axis_of(*place)
        axis = np.broadcast_to(np.asarray(axis, dtype=np.int64), points.size)
        keep = _inside(place, shape) & (axis >= 0) & (axis < n)
        if nonzero is not None:
            keep[keep] = nonzero[tuple(np.asarray(p)[keep] for p in place)]
        name = naming.ids(points, index)
        ids.append(_distinct(name))
        cells.append(_distinct(name[keep] * n + axis[keep]))
    names, touched = np.unique(np.concatenate(ids)), np.unique(np.concatenate(cells))
    rows = np.searchsorted(names, touched // n)
    matrix = sp.csr_matrix(
        (np.ones(touched.size, dtype=np.bool_), (rows, touched % n)), shape=(names.size, n)
    )
    factor = 1.0 if naming.by_address else domain.repeats * domain.scale
    return Incidence(matrix, np.full(names.size, factor), domain.error)


def _distinct(values: Ints) -> Ints:
    """np.unique, without sorting where the range of values is small."""
    top = int(values.max(initial=0)) + 1
    if top > 64 * max(values.size, 1 << 16):
        return np.unique(values)
    seen = np.zeros(top, dtype=np.bool_)
    seen[values] = True
    return np.flatnonzero(seen)


def reduction_windows(
    access: Access,
    axis_of: int | Callable[..., Ints],
    *,
    consts: Constants | None = None,
    nonzero: NDArray[np.bool_] | None = None,
    logical: Callable[..., Sequence[Ints]] | None = None,
) -> Incidence:
    """Return what each step of the reduction loops touches; see :func:`window_incidence`.

    For the masked weight of a matmul: row k holds the columns n with a non-zero (k, n), which
    are the windows of a V-row kernel.
    """
    return window_incidence(
        access, axis_of, "reduction", consts=consts, nonzero=nonzero, logical=logical
    )


def _logical_shape(
    access: Access, nonzero: NDArray[np.bool_] | None, logical: object
) -> tuple[int, ...] | None:
    if nonzero is not None:
        if logical is None and nonzero.shape != access.shape:
            raise ShapeError(f"nonzero {nonzero.shape} differs from {access.name} {access.shape}")
        return nonzero.shape
    return access.shape if logical is None else None


def _axis_length(
    shape: tuple[int, ...] | None, axis_of: int | Callable[..., Ints], length: int | None
) -> int:
    if length is not None:
        return length
    if shape is None or not isinstance(axis_of, int):
        raise ConfigError("the length of the axis is unknown", "pass length")
    if not 0 <= axis_of < len(shape) or shape[axis_of] < 0:
        raise ConfigError(f"axis {axis_of} is no axis of known length of {shape}", "pass length")
    return shape[axis_of]


def _inside(place: Sequence[Any], shape: tuple[int, ...] | None) -> NDArray[np.bool_]:
    keep = np.ones(np.asarray(place[0]).shape, dtype=np.bool_)
    for values, size in zip(place, shape or (), strict=False):
        keep &= (np.asarray(values) >= 0) & (np.asarray(values) < size)
    return keep


def _window_loops(access: Access, window: str) -> list[Loop]:
    """Return the loops whose values tell one window from another."""
    loops = access.loops
    if window == "vector":
        return [p for p in loops if p.tag not in _LANES]
    if window == "warp":
        return [p for p in loops if p.tag not in _LANES and p.tag not in _THREADS]
    if window == "tile":
        reducing = [k for k, p in enumerate(loops) if p.reduction and p.tag not in _LANES]
        if reducing:
            return list(loops[: reducing[-1] + 1])
        return [p for p in loops if p.tag not in (*_LANES, "unrolled")]
    if window == "cta":
        return [p for p in loops if p.tag == "parallel" or p.tag.startswith("blockIdx")]
    if window == "reduction":
        return [p for p in loops if p.reduction]
    return []


class _Domain:
    """The loops an access depends on, apart from those that only repeat it.

    Attributes
    ----------
    main : list of Loop
        Loops connected with the indices by a common index, guard or loop bound.
    repeats : int
        Distinct windows that the other window loops make of one; 0: the access never happens.
    scale, error : float
        Windows each evaluated one stands for, and the bound of Incidence.error.
    """

    def __init__(
        self, access: Access, chosen: Sequence[Loop], by_warp: bool, consts: Constants
    ) -> None:
        self.access, self.consts = access, consts
        self.window_vars = {loop.var for loop in chosen}
        groups = _connected(access, by_warp)
        self.main = [p for p in access.loops if p.var in groups[0]]
        self.scale, self.error = 1.0, 0.0
        self.repeats = math.prod(self._repeats(group) for group in groups[1:])
        for predicate in access.predicates:
            if not variables([predicate]) and not np.all(Points(consts).value(predicate)):
                self.repeats = 0

    def _guards(self, group: set[Any]) -> list[Any]:
        return [p for p in self.access.predicates if variables([p]) & group]

    def _repeats(self, group: set[Any]) -> int:
        loops = [p for p in self.access.loops if p.var in group]
        guards = self._guards(group)
        if not guards and len(loops) == 1 and (extent := loops[0].constant_extent) is not None:
            return extent if loops[0].var in self.window_vars else min(extent, 1)
        points = Points(self.consts)
        points.expand_all(loops, guards)
        if points.size == 0:
            return 0
        columns = [points.env[p.var] for p in loops if p.var in self.window_vars]
        return len(np.unique(np.stack(columns, axis=1), axis=0)) if columns else 1

    def points(self, by_address: bool, cap: int, seed: int) -> Iterator[Points]:
        """Yield all points, or those of a sample of windows, in chunks."""
        if self.repeats == 0:
            return
        # An extent that varies counts as 1 here, for want of an estimate.
        total = math.prod(p.constant_extent or 1 for p in self.main)
        if total <= cap:
            yield from self._chunks(Points(self.consts), self.main)
            return
        if by_address:
            raise ConfigError(
                f"{self.access.name}: {total} points exceed point_cap {cap}",
                "windows by address cannot be sampled; raise point_cap or use another window",
            )
        sample, inner = self._sample(total, cap, seed)
        yield from self._chunks(sample, inner)

    def _chunks(self, points: Points, loops: Sequence[Loop]) -> Iterator[Points]:
        pending = self._guards({p.var for p in self.main})
        points.filter(pending)
        rest = math.prod(p.constant_extent or 1 for p in loops)
        if not loops or points.size * rest <= _CHUNK:
            points.expand_all(loops, pending)
            yield points
            return
        points.expand(loops[0])
        rest //= loops[0].constant_extent or 1
        for chunk in points.chunks(max(1, _CHUNK // max(rest, 1))):
            yield from self._chunks(chunk, loops[1:])

    def _sample(self, total: int, cap: int, seed: int) -> tuple[Points, list[Loop]]:
        """Bind the window loops to a random set of windows; return the loops left to bind."""
        outer = [p for p in self.main if p.var in self.window_vars]
        inner = [p for p in self.main if p.var not in self.window_vars]
        if any(p.constant_extent is None or variables([p.minimum]) for p in outer):
            raise ConfigError(
                f"{self.access.name}: windows of varying loops cannot be sampled", "raise point_cap"
            )
        windows = math.prod(p.constant_extent or 0 for p in outer)
        number = min(cap // max(1, total // windows), windows)
        if number < 1:
            raise ConfigError(
                f"{self.access.name}: one window exceeds point_cap {cap}", "raise point_cap"
            )
        ids = np.sort(np.random.default_rng(seed).choice(windows, number, replace=False))
        points = Points(self.consts, {}, number)
        for loop in reversed(outer):
            ids, digit = np.divmod(ids, int(loop.extent))
            points.env[loop.var] = digit + int(loop.minimum)
        self.scale = windows / number
        self.error = math.sqrt(math.log(2 / _SAMPLING_RISK) / (2 * number))
        return points, inner


def _connected(access: Access, by_warp: bool) -> list[set[Any]]:
    """Group the loop variables by common indices, guards and bounds; the indices' group first."""
    loops = {loop.var for loop in access.loops}
    cliques = [variables(access.indices) & loops]
    if by_warp:
        cliques[0] |= {p.var for p in access.loops if p.tag in _THREADS}
    groups = [
        *(variables([p]) & loops for p in access.predicates),
        *(variables([p.minimum, p.extent]) & loops | {p.var} for p in access.loops),
    ]
    for clique in groups:
        if not clique:
            continue
        touching = [k for k, group in enumerate(cliques) if group & clique]
        merged = clique.union(*(cliques[k] for k in touching))
        first = 0 if 0 in touching else len(cliques)
        kept = [g for k, g in enumerate(cliques) if k not in touching]
        cliques = [merged, *kept] if first == 0 else [*kept, merged]
    return cliques


class _Naming:
    """Gives each point the number of its window."""

    def __init__(self, access: Access, window: str, domain: _Domain, line_bytes: int) -> None:
        self.access = access
        self.by_address = window in ("sector", "line")
        self.unit = 32 if window == "sector" else line_bytes
        self.digits = [p for p in domain.main if p.var in domain.window_vars]
        self.threads = [
            p for tag in _THREADS for p in domain.main if window == "warp" and p.tag == tag
        ]
        if self.by_address and min(access.shape, default=0) < 0:
            raise ConfigError(f"{access.name} {access.shape} is symbolic", "specialise it")
        # Loops of varying bounds get 31 bits, the others what their extent needs.
        self.radix = [p.constant_extent or 1 << 31 for p in self.digits]
        if math.prod(self.radix) >= 1 << 48:
            raise ConfigError(f"{access.name}: too many {window} windows to number")

    def ids(self, points: Points, index: Sequence[Ints]) -> Ints:
        """Return the window of each point, int64[N]."""
        ids = np.zeros(points.size, dtype=np.int64)
        if self.by_address:
            for values, extent in zip(index, self.access.shape, strict=True):
                ids = ids * extent + values
            return ids * self.access.item_bits // (8 * self.unit)
        for loop, radix in zip(self.digits, self.radix, strict=True):
            low = 0 if loop.constant_extent is None else points.value(loop.minimum)
            ids = ids * radix + (points.env[loop.var] - low)
        if self.threads:
            ids = ids * _MAX_WARPS + self._thread(points) // _WARP
        return ids

    def _thread(self, points: Points) -> Ints:
        ids = np.zeros(points.size, dtype=np.int64)
        for loop in self.threads:
            ids = ids * int(loop.extent) + points.env[loop.var]
        return ids


def split_fused(access: Access, *, keep_threads: bool = False) -> Access:
    """Replace loops used through ``//`` and ``%`` by one loop for each digit that is used.

    A fused loop ties the axes it was fused from together; its digits do not, so that those the
    access does not depend on need not be enumerated. ``keep_threads`` leaves threadIdx alone.
    """
    cuts = _cuts(access, keep_threads)
    loops: list[Loop] = []
    values: dict[Any, Any] = {}
    analyzer = sym.Analyzer()
    for loop in access.loops:
        digits = _digits(loop, cuts.get(loop.var, set()))
        loops += digits
        if len(digits) > 1:
            values[loop.var] = _recombined(digits)
        for digit in digits:
            if digit.constant_extent is not None and not variables([digit.minimum]):
                analyzer.bind(digit.var, tvm.ir.Range.from_min_extent(digit.minimum, digit.extent))
    if not values:
        return access

    def rewrite(expr: Any) -> Any:
        if isinstance(expr, int):
            return expr
        return analyzer.simplify(
            tvm_ffi.structural_map(expr, (Var, lambda var: values.get(var, var)))
        )

    return replace(
        access,
        loops=tuple(loops),
        indices=tuple(rewrite(index) for index in access.indices),
        predicates=tuple(rewrite(predicate) for predicate in access.predicates),
    )


def _cuts(access: Access, keep_threads: bool) -> dict[Any, set[int]]:
    """Return the strides at which indices and predicates cut each loop that may be split."""
    bounds = variables(bound for p in access.loops for bound in (p.minimum, p.extent))
    extents = {
        p.var: p.constant_extent
        for p in access.loops
        if p.constant_extent is not None
        and isinstance(p.minimum, (int, tirx.IntImm))
        and int(p.minimum) == 0
        and p.var not in bounds
        and not (keep_threads and p.tag in _THREADS)
    }
    cuts: dict[Any, set[int]] = {var: {1, extent} for var, extent in extents.items()}
    for expr in (*access.indices, *access.predicates):
        for node in _nodes(expr):
            if (digit := _digit(node, extents)) is not None:
                cuts[digit[0]] |= set(digit[1:])
    return cuts


def _digit(expr: Any, extents: Mapping[Any, int]) -> tuple[Any, int, int] | None:
    """Return (loop variable, low, high) of an expression ``loop % high // low``, else None."""
    if isinstance(expr, Var):
        return (expr, 1, extents[expr]) if expr in extents else None
    if not isinstance(expr, (tirx.FloorDiv, tirx.FloorMod)) or not isinstance(expr.b, tirx.IntImm):
        return None
    inner = _digit(expr.a, extents)
    if inner is None:
        return None
    var, low, high = inner
    border = low * int(expr.b.value)
    if isinstance(expr, tirx.FloorDiv):
        return var, border, max(high, border)
    return var, low, min(high, border)


def _digits(loop: Loop, cuts: set[int]) -> list[Loop]:
    """Split a loop at ``cuts``, the slowest digit first; whole if they do not nest."""
    borders = sorted(cuts)
    pairs = list(itertools.pairwise(borders))
    if len(pairs) < 2 or any(high % low for low, high in pairs):
        return [loop]
    if borders[-1] != loop.constant_extent:
        return [loop]
    dtype = str(loop.var.ty.dtype)
    return [
        replace(
            loop,
            var=Var(f"{loop.name}_{k}", dtype),
            minimum=tirx.IntImm(dtype, 0),
            extent=tirx.IntImm(dtype, high // low),
        )
        for k, (low, high) in enumerate(pairs)
    ][::-1]


def _recombined(digits: Sequence[Loop]) -> Any:
    value = digits[0].var
    for digit in digits[1:]:
        value = value * digit.extent + digit.var
    return value
