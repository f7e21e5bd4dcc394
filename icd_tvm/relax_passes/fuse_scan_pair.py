"""FuseScanPair: a scan and the same one back in time, added, become one kernel."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np

from icd_tvm._tvm import GenericConst, PyExprMutator, Var, mutator, relax, tvm
from icd_tvm.relax_passes.relax_graph import (
    Dataflow,
    call_func,
    is_call,
    rewrite_functions,
    static_shape,
)
from icd_tvm.tir_schedules.cpu.scan_pair import kept_bytes, scan_pair
from icd_tvm.tir_schedules.cpu.scan_program import ScanProgram
from icd_tvm.tir_schedules.cpu.selective_scan import SCAN_PROGRAM, output_shape

# With what else a task reads, this stays in the second level of cache (1 MiB on Zen 5).
_MAX_BYTES = 640 * 1024


class _Scan(NamedTuple):
    """A call of the scan kernel, of which nothing but its one output is read."""

    args: list[Any]
    program: dict[str, Any]
    length: int
    backwards: list[bool]
    flipped: bool


@tvm.transform.module_pass(opt_level=0, name="FuseScanPair")
class FuseScanPair:
    """Replace ``scan(x) + scan(x, back in time)`` by a kernel that shares their exponentials.

    Bidirectional state space models run each recurrence both ways on the same operands. Applies
    where both have the same recurrence and operands, every operand is read in the other order,
    and nothing else reads their outputs or final states.

    Attributes
    ----------
    fused : int
        Pairs replaced.
    refusals : dict of str to str
        Sum of two scans that stays -> the reason.
    """

    def __init__(self) -> None:
        self.fused = 0
        self.refusals: dict[str, str] = {}

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a clone of ``mod`` with the pairs replaced."""
        self.fused, self.refusals = 0, {}
        mod = relax.transform.DeadCodeElimination()(mod)
        mod = rewrite_functions(mod, lambda new, func: _Fuser(new, Dataflow(func), self))
        return relax.transform.DeadCodeElimination()(mod)


@mutator
class _Fuser(PyExprMutator):
    def __init__(self, mod: Any, flow: Dataflow, owner: FuseScanPair) -> None:
        super().__init__(mod)
        self._mod, self._flow, self._owner = mod, flow, owner
        self._names = {call: str(var.name) for var, call in flow.values.items()}

    def visit_call_(self, call: Any) -> Any:
        pair = self._pair(call)
        if pair is None:
            return super().visit_call_(call)
        first, second = pair
        reason = _difference(self._flow, first, second)
        if reason:
            self._owner.refusals[self._names.get(call, "")] = reason
            return super().visit_call_(call)
        self._owner.fused += 1
        program = ScanProgram.from_json(first.program)
        func = scan_pair(program, first.length, tuple(first.backwards))
        args = [self.visit_expr(arg) for arg in (first.args[0], second.args[0], *first.args[1:])]
        like = relax.TensorType(output_shape(program, 0, first.length), "float32")
        rows = self.builder_.emit(call_func(self.builder_, func, "scan_pair", args, like))
        return relax.op.reshape(rows, static_shape(call))

    def _pair(self, call: Any) -> tuple[_Scan, _Scan] | None:
        """Return the two scans that are added, the one whose output is not turned first."""
        if not is_call(call, "relax.add") or static_shape(call) is None:
            return None
        if any(static_shape(arg) != static_shape(call) for arg in call.args):
            return None
        found = [self._scan(arg) for arg in call.args]
        if found[0] is None or found[1] is None or found[0].flipped == found[1].flipped:
            return None
        first, second = sorted((found[0], found[1]), key=lambda scan: scan.flipped)
        return first, second

    def _scan(self, expr: Any) -> _Scan | None:
        """Return the scan whose one output ``expr`` is, in another shape or not."""
        flow, item = self._flow, expr
        while isinstance(item, Var) and flow.single_use(item):
            view = flow.bound(item, "relax.reshape")
            if view is None:
                break
            item = view.args[0]
        part = flow.values.get(item) if isinstance(item, Var) else None
        if not isinstance(part, relax.TupleGetItem) or part.index != 0:
            return None
        if not flow.single_use(item) or not flow.single_use(part.tuple_value):
            return None
        call = flow.resolve(part.tuple_value)
        if not is_call(call, "relax.call_tir") or len(part.tuple_value.ty.fields) != 2:
            return None
        attrs = self._mod[call.args[0]].attrs
        if attrs is None or SCAN_PROGRAM not in attrs:
            return None
        program, length, backwards, flipped = json.loads(str(attrs[SCAN_PROGRAM]))
        return _Scan(list(call.args[1].fields), program, length, backwards, flipped[0])


def _difference(flow: Dataflow, first: _Scan, second: _Scan) -> str:
    """Return why two scans have no common kernel, or an empty string."""
    if (first.program, first.length) != (second.program, second.length):
        return "the scans have different recurrences"
    (_, _, own), *_ = first.program["outputs"]
    if own:
        return "the output has a value for every state"
    pairs = zip(first.args[1:], second.args[1:], strict=True)
    if not all(_same(flow, left, right) for left, right in pairs):
        return "the scans read different operands"
    scanned = [scanned for scanned, _ in first.program["operands"]]
    turns = zip(scanned, first.backwards, second.backwards, strict=True)
    if any(used and left == right for used, left, right in turns):
        return "an operand is read in the same order by both"
    kept = kept_bytes(ScanProgram.from_json(first.program), first.length)
    if kept == 0:
        return "nothing that both directions compute alike costs more than reading it back"
    if kept > _MAX_BYTES:
        return f"{first.length} steps keep {kept} bytes a task, more than {_MAX_BYTES}: use fewer"
    return ""


def _same(flow: Dataflow, left: Any, right: Any) -> bool:
    """Tell whether two expressions are the same tensor, by the same shape."""
    left, right = flow.resolve(left), flow.resolve(right)
    if left.same_as(right):
        return True
    if isinstance(left, GenericConst) and isinstance(right, GenericConst):
        return bool(np.array_equal(left.value.numpy(), right.value.numpy()))
    if not is_call(left, "relax.reshape") or not is_call(right, "relax.reshape"):
        return False
    return static_shape(left) == static_shape(right) and _same(flow, left.args[0], right.args[0])
