"""AppendInPlace: a decoder step writes the new token's row into the cache it was given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from icd_tvm._tvm import PyExprMutator, mutator, relax, tvm
from icd_tvm.errors import TransformError
from icd_tvm.relax_passes.attach_layout_tags import opaque_states
from icd_tvm.relax_passes.cache_append import CacheAppend, find_appends
from icd_tvm.relax_passes.relax_graph import Dataflow, static_shape
from icd_tvm.tir_schedules.cpu.append_row import append_row


@tvm.transform.module_pass(opt_level=0, name="AppendInPlace")
class AppendInPlace:
    """Replace ``where(slot == length, row, past)`` by a write of the row alone.

    Only for opaque states: they are fed back to the same module, so the caller gives up the
    state that it passes. The output *is* the tensor that came in, with one row more; a step
    costs the same however long the cache is. A step may be repeated with the same length.

    Parameters
    ----------
    opaque_states : sequence of (str, str), optional
        (input, output) names; those of the module's layout tag if omitted. Without any the
        module stays as it is.
    gpu : bool
        Write the row with a thread for each channel.

    Attributes
    ----------
    appended : list of str
        States that are written in place.
    refusals : dict of str to str
        States that are not -> the reason.

    """

    def __init__(
        self, opaque_states: Sequence[tuple[str, str]] | None = None, *, gpu: bool = False
    ) -> None:
        self.gpu = gpu
        self.opaque_states = None if opaque_states is None else tuple(opaque_states)
        self.appended: list[str] = []
        self.refusals: dict[str, str] = {}

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a clone of ``mod`` that appends in place."""
        mod = mod.clone()
        self.appended, self.refusals = [], {}
        states = opaque_states(mod) if self.opaque_states is None else self.opaque_states
        if not states:
            return mod
        func = mod["main"]
        try:
            found, self.refusals = find_appends(func, states)
        except TransformError as error:
            # A module that shows more outputs, to capture activations, keeps its cache whole.
            self.refusals = {name: error.message for name, _ in states}
            return mod
        self.appended = list(found)
        rewriter = _Rewriter(mod, list(found.values()), Dataflow(func), self.gpu)
        new = rewriter.visit_expr(func)
        mod = rewriter.builder_.get()
        mod["main"] = new
        return relax.transform.DeadCodeElimination()(mod)


@mutator
class _Rewriter(PyExprMutator):
    """Replaces each append by a call that has the old cache as its result."""

    def __init__(self, mod: Any, found: list[CacheAppend], flow: Dataflow, gpu: bool) -> None:
        super().__init__(mod)
        self._gpu = gpu
        self._found = {flow.values[append.result]: append for append in found}

    def visit_call_(self, call: Any) -> Any:
        append = self._found.get(call)
        if append is None:
            return super().visit_call_(call)
        args = [self.visit_expr(arg) for arg in (append.past, append.row, append.length)]
        shape, length = static_shape(append.past), static_shape(append.length)
        assert shape is not None
        assert length is not None
        dtypes = (str(append.past.ty.dtype), str(append.length.ty.dtype))
        func = append_row(shape, dtypes[0], length, dtypes[1], gpu=self._gpu)
        place = self.builder_.add_func(func, "append_row")
        return relax.op.call_tir_inplace(place, args, 0, call.ty)
