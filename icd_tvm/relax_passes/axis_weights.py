"""Follow constant weights to the matmul that reads them, through casts and dequantisation."""

from __future__ import annotations

from typing import NamedTuple

from icd_tvm._tvm import Var
from icd_tvm.relax_passes.axis_rules.site import Tensor
from icd_tvm.relax_passes.axis_rules.trace import Step, Use

# Ops that leave every element of a weight where it is.
_KEEPS_PLACES = frozenset(
    f"relax.{name}" for name in ("add", "astype", "dequantize", "divide", "multiply", "subtract")
)


class WeightView(NamedTuple):
    """A constant as a variable shows it: axis i of the view is axis ``order[i]`` of it.

    ``order`` is empty while a reshape has cut the constant into blocks.
    """

    use: Use
    order: tuple[int, ...]


class WeightPaths:
    """Which variables are views of a constant weight; to be shown every step in order."""

    def __init__(self) -> None:
        self._views: dict[Var, WeightView] = {}
        self._constant: set[Var] = set()

    def follow(self, step: Step) -> None:
        """Note what a step makes of a weight."""
        if not isinstance(step.out, Tensor):
            return
        constant = all(not isinstance(e, Var) or e in self._constant for e in step.operands)
        if not constant:
            return
        self._constant.add(step.var)
        view = self._view(step, step.out)
        if view is not None:
            self._views[step.var] = view

    def weight(self, step: Step, position: int) -> WeightView | None:
        """Return the weight that an operand of a step is a view of."""
        for use in step.uses:
            if use.path == (position,):
                return WeightView(use, tuple(range(len(use.axes))))
        operand = step.operands[position]
        return self._views.get(operand) if isinstance(operand, Var) else None

    def _view(self, step: Step, out: Tensor) -> WeightView | None:
        if step.op == "relax.permute_dims":
            view = self.weight(step, 0)
            ordered = view is not None and len(view.order) == out.rank
            return view._replace(order=_turned(view, step)) if view and ordered else None
        if step.op == "relax.reshape":
            return self._reshaped(step, out)
        return self._scaled(step, out) if step.op in _KEEPS_PLACES else None

    def _scaled(self, step: Step, out: Tensor) -> WeightView | None:
        """A weight stays itself under scales and zero points that broadcast to it."""
        for position, operand in enumerate(step.args):
            view = self.weight(step, position)
            if view is not None and isinstance(operand, Tensor) and _sizes(operand) == _sizes(out):
                return view
        return None

    def _reshaped(self, step: Step, out: Tensor) -> WeightView | None:
        """Between two reshapes a weight may be cut into blocks."""
        view = self.weight(step, 0)
        if view is None:
            return None
        straight = tuple(range(len(view.use.axes)))
        back = _sizes(out) == [axis.size for axis in view.use.axes]
        return view._replace(order=straight if back and view.order in ((), straight) else ())


def _turned(view: WeightView, step: Step) -> tuple[int, ...]:
    return tuple(view.order[i] for i in step.order)


def _sizes(tensor: Tensor) -> list[int]:
    return [axis.size for axis in tensor.axes]
