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
    """The affine end of one norm, the matmuls that read it, and the scales between them."""

    affine: _Affine
    nodes: tuple[str, ...]
    products: tuple[Any, ...]
    scales: npt.NDArray[np.float32]


@tvm.transform.module_pass(opt_level=0, name="MigrateScales")
class MigrateScales:
    """Divide the channels of a norm's result by scales, and multiply the weights that read it.

    Only constants change, and the function stays the same up to rounding. It is possible where
    matmuls with constant weights alone read the norm.

    Parameters
    ----------
    alphas : Mapping[str, float]
        Matmul binding -> share of its input's range that moves, in [0, 1].
    statistics : Mapping[str, ActivationStatistics]
        Of the inputs of those matmuls.

    Attributes
    ----------
    scales : dict of str to numpy.ndarray
        Matmul binding -> float32 [K] that its input was divided by.
    refusals : dict of str to str
        Matmul binding -> why nothing was moved.

    Notes
    -----
    Xiao et al., "SmoothQuant", 2022.
    """

    def __init__(
        self, alphas: Mapping[str, float], statistics: Mapping[str, ActivationStatistics]
    ) -> None:
        self.alphas = dict(alphas)
        self.statistics = dict(statistics)
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
            found = self._move(flow, source, nodes)
            if isinstance(found, str):
                self.refusals |= dict.fromkeys(nodes, found)
            else:
                moves.append(found)
        return moves

    def _move(self, flow: Dataflow, source: Any, nodes: list[str]) -> _Move | str:
        affine = _affine(flow, source)
        if isinstance(affine, str):
            return affine
        products: list[Any] = [flow.values.get(user) for user in flow.users[source]]
        others = [u for u, p in zip(flow.users[source], products, strict=True) if not _weighs(p)]
        if others:
            return f"the norm before is also read by {_label(others[0])}"
        missing = [node for node in nodes if node not in self.statistics]
        if missing:
            return f"no statistics of the input of {missing[0]!r}"
        weights = [constant_array(product.args[1]) for product in products]
        top = self.statistics[nodes[0]].absmax
        alpha = self.alphas[nodes[0]]
        try:
            scales = migrate_scales(top, [w for w in weights if w is not None], alpha)
        except IcdError as error:
            return str(error)
        readers = tuple(user.name for user in flow.users[source])
        return _Move(affine, readers, tuple(products), scales)


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
        self._of_product = {call: move.scales for move in moves for call in move.products}

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

    def _product(self, call: Any, scales: npt.NDArray[np.float32]) -> Any:
        weight = np.asarray(call.args[1].value.numpy())
        moved = (weight * scales.astype(np.float64)[:, None]).astype(weight.dtype)
        new = named_const(moved, const_name(call.args[1]))
        return _with_args(call, [self.visit_expr(call.args[0]), new])


def _divided(constant: Any, scales: npt.NDArray[np.float32]) -> Any:
    array = np.asarray(constant.value.numpy())
    return named_const(
        (array / scales.astype(np.float64)).astype(array.dtype), const_name(constant)
    )


def _with_args(call: Any, args: list[Any]) -> Any:
    return Call(call.op, args, call.attrs, call.ty_args, call.span)
