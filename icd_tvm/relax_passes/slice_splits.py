"""SliceSplits: the parts of a split become slices, which fuse with what reads them."""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import PyExprMutator, mutator, relax, tvm
from icd_tvm.relax_passes.relax_graph import Dataflow, is_call, rewrite_functions, static_shape


@tvm.transform.module_pass(opt_level=0, name="SliceSplits")
class SliceSplits:
    """Replace ``split(x, ...)[i]`` by ``strided_slice(x, ...)``.

    A split writes all its parts to memory before anything reads them. A slice is computed inside
    its only reader, if that is elementwise. Splits of unknown sizes are left alone.

    Attributes
    ----------
    slices : int
        Parts replaced.
    """

    def __init__(self) -> None:
        self.slices = 0

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a clone of ``mod`` with the parts replaced."""
        self.slices = 0
        mod = rewrite_functions(mod, lambda new, func: _Slicer(new, Dataflow(func), self))
        return relax.transform.DeadCodeElimination()(mod)


@mutator
class _Slicer(PyExprMutator):
    def __init__(self, mod: Any, flow: Dataflow, owner: SliceSplits) -> None:
        super().__init__(mod)
        self._flow, self._owner = flow, owner

    def visit_tuple_getitem_(self, item: Any) -> Any:
        split = self._flow.resolve(item.tuple_value)
        sizes = _sizes(split)
        if sizes is None:
            return super().visit_tuple_getitem_(item)
        self._owner.slices += 1
        start = sum(sizes[: item.index])
        axis = _axis(split)
        return relax.op.strided_slice(
            self.visit_expr(split.args[0]), [axis], [start], [start + sizes[item.index]]
        )


def _sizes(split: Any) -> list[int] | None:
    """Return the sizes of the parts along the axis that is split, or None."""
    if not is_call(split, "relax.split"):
        return None
    shapes = [static_shape(relax.Var("part", part)) for part in split.ty.fields]
    sizes = [shape[_axis(split)] for shape in shapes if shape is not None]
    return sizes if len(sizes) == len(shapes) else None


def _axis(split: Any) -> int:
    return int(split.attrs.axis) % int(split.args[0].ty.ndim)
