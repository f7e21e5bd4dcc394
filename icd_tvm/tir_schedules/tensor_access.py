"""Every load and store of a TIR function, its indices in terms of loop variables.

Works on schedulable functions (with SBlocks, before or after scheduling) and on lowered ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tvm_ffi

from icd_tvm._tvm import Call, TensorLoad, Var, s_tir, sym, tirx
from icd_tvm.errors import UnsupportedOpError
from icd_tvm.tir_schedules.index_eval import Loop, op_name, variables

_KINDS = ("serial", "parallel", "vectorized", "unrolled", "thread")
# The slowest axis first.
THREADS = ("threadIdx.z", "threadIdx.y", "threadIdx.x")


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


def stores(func: Any) -> list[tuple[Access, Any]]:
    """Return every store of a TIR function with the value it stores; see :func:`accesses`.

    The lanes of a vector store are no loop of it: its value has them.

    Raises
    ------
    UnsupportedOpError
        If the function has a while loop, or a tensor instruction that works through pointers.
    """
    walk = _Walk()
    walk.statement(func.body)
    if walk.regions:
        raise UnsupportedOpError("tensor instruction: what it computes is not in the loops")
    return walk.stored


def _marked(access: Access, reduction: set[Any]) -> Access:
    loops = tuple(replace(loop, reduction=loop.var in reduction) for loop in access.loops)
    return replace(access, loops=loops)


class _Walk:
    """Collects accesses; block variables and bound variables are replaced by loop variables."""

    def __init__(self) -> None:
        self.found: list[Access] = []
        self.stored: list[tuple[Access, Any]] = []
        self.regions = 0
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
        # The lanes of a vector are in the value already.
        scalar = replace(self.found[-1], loops=tuple(self.loops))
        self.stored.append((scalar, node.value))
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
        self.regions += 1
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
        """Record the loads of an expression; a load under if_then_else gets its condition.

        A prefetch brings early what is loaded anyway; it is no access of its own.
        """
        if isinstance(expr, int) or (isinstance(expr, Call) and op_name(expr) == "prefetch"):
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
    if not any(isinstance(node, (tirx.Ramp, tirx.Broadcast)) for node in nodes(expr)):
        return expr

    def ramp(node: Any) -> Any:
        count = int(node.lanes)
        lane = lanes.setdefault(count, Var(f"lane{count}", "int64"))
        return node.base.astype("int64") + lane * node.stride.astype("int64")

    return tvm_ffi.structural_map(
        expr, [(tirx.Ramp, ramp), (tirx.Broadcast, lambda node: node.value)]
    )


def nodes(expr: Any) -> Iterable[Any]:
    """Yield an expression and everything in it."""
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
