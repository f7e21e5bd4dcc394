"""MigrateScales: move range from the input of matmuls into their weights, through a norm.

A norm is `layer_norm`, `rms_norm`, or what an exporter made of one: a product with a constant of
one element a channel, with or without a constant added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm._tvm import (
    Call,
    PyExprMutator,
    Var,
    const_name,
    mutator,
    named_const,
    relax,
    tvm,
)
from icd_tvm.adapters.activation_statistics import ActivationStatistics
from icd_tvm.adapters.quant import migrate_scales
from icd_tvm.errors import IcdError
from icd_tvm.relax_passes.relax_graph import Dataflow, constant_array, is_call, operands

_NORMS = ("relax.nn.layer_norm", "relax.nn.rms_norm")
_NO_NORM = "its input is not the result of a norm"
# Call -> positions of its arguments that hold one constant a channel.
_Affine = dict[Any, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class _Move:
    """Where an input is divided, the matmuls that read it, and the scales between them.

    Without an affine end of a norm the division is a call of its own.
    """

    affine: _Affine
    nodes: tuple[str, ...]
    products: tuple[Any, ...]
    scales: npt.NDArray[np.float32]


@tvm.transform.module_pass(opt_level=0, name="MigrateScales")
class MigrateScales:
    """Divide the channels of a norm's result by scales, and multiply the weights that read it.

    The function stays the same up to rounding. Only constants change where matmuls with constant
    weights alone read the norm.

    Parameters
    ----------
    alphas : Mapping[str, float]
        Matmul binding -> share of its input's range that moves, in [0, 1].
    statistics : Mapping[str, ActivationStatistics]
        Of the inputs of those matmuls.
    insert : bool
        Whether an input whose norm cannot take the division is multiplied at run time, once for
        all its matmuls; lowering fuses that with the rounding that follows.

    Attributes
    ----------
    scales : dict of str to numpy.ndarray
        Matmul binding -> float32 [K] that its input was divided by.
    refusals : dict of str to str
        Matmul binding -> why no norm took the division, also where it was inserted.

    Notes
    -----
    Xiao et al., "SmoothQuant", 2022.
    """

    def __init__(
        self,
        alphas: Mapping[str, float],
        statistics: Mapping[str, ActivationStatistics],
        *,
        insert: bool = False,
    ) -> None:
        self.alphas = dict(alphas)
        self.statistics = dict(statistics)
        self.insert = insert
        self.scales: dict[str, npt.NDArray[np.float32]] = {}
        self.refusals: dict[str, str] = {}

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a clone of ``mod`` with scales moved."""
        mod = mod.clone()
        self.scales, self.refusals = {}, {}
        moves = self._moves(Dataflow(mod["main"]))
        self.scales = {node: move.scales for move in moves for node in move.nodes}
        mod["main"] = _Mover(mod, moves).visit_expr(mod["main"])
        return mod

    def _moves(self, flow: Dataflow) -> list[_Move]:
        inputs: dict[Any, list[str]] = {}
        for var, value in flow.values.items():
            if var.name in self.alphas and is_call(value, "relax.matmul"):
                inputs.setdefault(value.args[0], []).append(var.name)
        moves = []
        for source, nodes in inputs.items():
            affine = _affine(flow, source)
            why = affine if isinstance(affine, str) else _other_reader(flow, source)
            if why:
                self.refusals |= dict.fromkeys(nodes, why)
            if isinstance(affine, dict) and not why:
                moves += self._move(flow, [user.name for user in flow.users[source]], nodes, affine)
            elif self.insert:
                moves += self._move(flow, nodes, nodes, {})
        return moves

    def _move(
        self, flow: Dataflow, readers: list[str], nodes: list[str], affine: _Affine
    ) -> list[_Move]:
        """Return the one move between an input and its readers, or none and keep the reason."""
        calls = {var.name: value for var, value in flow.values.items() if var.name in readers}
        missing = [node for node in nodes if node not in self.statistics]
        if missing:
            self.refusals |= dict.fromkeys(nodes, f"no statistics of the input of {missing[0]!r}")
            return []
        weights = [constant_array(call.args[1], dims=2) for call in calls.values()]
        known = [weight for weight in weights if weight is not None]
        if len(known) < len(weights):
            self.refusals |= dict.fromkeys(nodes, "a weight that reads the input is no constant")
            return []
        top = self.statistics[nodes[0]].absmax
        try:
            scales = migrate_scales(top, known, self.alphas[nodes[0]])
        except IcdError as error:
            self.refusals |= dict.fromkeys(nodes, str(error))
            return []
        return [_Move(affine, tuple(calls), tuple(calls.values()), scales)]


def _other_reader(flow: Dataflow, source: Any) -> str:
    """Name a reader that a division would change, or return an empty string."""
    for user in flow.users[source]:
        if not _weighs(flow.values.get(user)):
            return f"the norm before is also read by {_label(user)}"
    return ""


def _affine(flow: Dataflow, source: Any) -> _Affine | str:
    """Find the constants that scale and shift the channels of ``source``."""
    call: Any = flow.resolve(source)
    if any(is_call(call, name) for name in _NORMS):
        if not all(constant_array(arg, dims=1) is not None for arg in call.args[1:]):
            return "the scale or shift of the norm before is no constant of one axis"
        return {call: tuple(range(1, len(call.args)))}
    shift: _Affine = {}
    if is_call(call, "relax.add"):
        inner, constant = operands(call)
        if constant_array(constant, dims=1) is None or not flow.single_use(inner):
            return _NO_NORM
        shift = {call: (_position(call, constant),)}
        call = flow.resolve(inner)
    if not is_call(call, "relax.multiply"):
        return _NO_NORM
    constant = operands(call)[1]
    if constant_array(constant, dims=1) is None:
        return _NO_NORM
    return {call: (_position(call, constant),), **shift}


def _position(call: Any, argument: Any) -> int:
    return next(i for i, arg in enumerate(call.args) if arg.same_as(argument))


def _weighs(product: Any) -> bool:
    """Tell whether a call multiplies by a constant matrix."""
    return is_call(product, "relax.matmul") and constant_array(product.args[1], dims=2) is not None


def _label(user: Any) -> str:
    return user.name if isinstance(user, Var) else "the output"


@mutator
class _Mover(PyExprMutator):
    def __init__(self, mod: Any, moves: list[_Move]) -> None:
        super().__init__(mod)
        self._divided = {
            call: (at, move.scales) for move in moves for call, at in move.affine.items()
        }
        self._of_product = {call: move for move in moves for call in move.products}
        self._inserted: dict[_Move, Any] = {}

    def visit_call_(self, call: Any) -> Any:
        if call in self._divided:
            return self._divide(call, *self._divided[call])
        if call in self._of_product:
            return self._product(call, self._of_product[call])
        return super().visit_call_(call)

    def _divide(self, call: Any, at: tuple[int, ...], scales: npt.NDArray[np.float32]) -> Any:
        args = [
            _divided(arg, scales) if i in at else self.visit_expr(arg)
            for i, arg in enumerate(call.args)
        ]
        return _with_args(call, args)

    def _product(self, call: Any, move: _Move) -> Any:
        weight = np.asarray(call.args[1].value.numpy())
        moved = (weight * move.scales.astype(np.float64)[:, None]).astype(weight.dtype)
        data = self.visit_expr(call.args[0])
        if not move.affine:
            data = self._insert(data, move)
        return _with_args(call, [data, named_const(moved, const_name(call.args[1]))])

    def _insert(self, data: Any, move: _Move) -> Any:
        if move not in self._inserted:
            factor = (1 / move.scales.astype(np.float64)).astype(np.float32)
            label = f"{getattr(data, 'name', '')}.smooth"
            product = relax.op.multiply(data, named_const(factor, label))
            self._inserted[move] = self.builder_.emit(product)
        return self._inserted[move]


def _divided(constant: Any, scales: npt.NDArray[np.float32]) -> Any:
    array = np.asarray(constant.value.numpy())
    return named_const(
        (array / scales.astype(np.float64)).astype(array.dtype), const_name(constant)
    )


def _with_args(call: Any, args: list[Any]) -> Any:
    return Call(call.op, args, call.attrs, call.ty_args, call.span)
