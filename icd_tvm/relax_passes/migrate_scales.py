"""MigrateScales: move range from the input of matmuls into their weights, through a norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm._tvm import (
    Call,
    GenericConst,
    PyExprMutator,
    Var,
    const_name,
    mutator,
    named_const,
    tvm,
)
from icd_tvm.adapters.activation_statistics import ActivationStatistics
from icd_tvm.adapters.quant import fold_scales, migrate_scales
from icd_tvm.relax_passes.relax_graph import Dataflow, constant_array, is_call

_NORMS = ("relax.nn.layer_norm", "relax.nn.rms_norm")


@dataclass(frozen=True, eq=False)
class _Move:
    """One norm, the matmuls that read it, and the scales that move between them."""

    norm: Any
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
        norm: Any = flow.resolve(source)
        if not any(is_call(norm, name) for name in _NORMS):
            return "its input is not the result of a norm"
        if not all(isinstance(arg, GenericConst) for arg in norm.args[1:]):
            return "the scale or shift of the norm before is no constant"
        if len(norm.attrs.axes) != 1 or len(norm.args[1].value.shape) != 1:
            return "the norm before runs over more than one axis"
        products: list[Any] = [flow.values.get(user) for user in flow.users[source]]
        others = [u for u, p in zip(flow.users[source], products, strict=True) if not _weighs(p)]
        if others:
            return f"the norm before is also read by {_label(others[0])}"
        missing = [node for node in nodes if node not in self.statistics]
        if missing:
            return f"no statistics of the input of {missing[0]!r}"
        weights = [constant_array(product.args[1]) for product in products]
        top = self.statistics[nodes[0]].absmax
        scales = migrate_scales(top, [w for w in weights if w is not None], self.alphas[nodes[0]])
        readers = tuple(user.name for user in flow.users[source])
        return _Move(norm, readers, tuple(products), scales)


def _weighs(product: Any) -> bool:
    """Tell whether a call multiplies by a constant matrix."""
    return is_call(product, "relax.matmul") and constant_array(product.args[1], dims=2) is not None


def _label(user: Any) -> str:
    return user.name if isinstance(user, Var) else "the output"


@mutator
class _Mover(PyExprMutator):
    def __init__(self, mod: Any, moves: list[_Move]) -> None:
        super().__init__(mod)
        self._of_norm = {move.norm: move.scales for move in moves}
        self._of_product = {call: move.scales for move in moves for call in move.products}

    def visit_call_(self, call: Any) -> Any:
        if call in self._of_norm:
            return self._norm(call, self._of_norm[call])
        if call in self._of_product:
            return self._product(call, self._of_product[call])
        return super().visit_call_(call)

    def _norm(self, call: Any, scales: npt.NDArray[np.float32]) -> Any:
        vectors = [np.asarray(arg.value.numpy()) for arg in call.args[1:]]
        shift = vectors[1] if len(vectors) > 1 else np.zeros_like(vectors[0])
        folded = fold_scales(scales, vectors[0], shift, [])[: len(vectors)]
        names = [const_name(arg) for arg in call.args[1:]]
        new = [named_const(array, name) for array, name in zip(folded, names, strict=True)]
        return _with_args(call, [self.visit_expr(call.args[0]), *new])

    def _product(self, call: Any, scales: npt.NDArray[np.float32]) -> Any:
        weight = np.asarray(call.args[1].value.numpy())
        moved = (weight * scales.astype(np.float64)[:, None]).astype(weight.dtype)
        new = named_const(moved, const_name(call.args[1]))
        return _with_args(call, [self.visit_expr(call.args[0]), new])


def _with_args(call: Any, args: list[Any]) -> Any:
    return Call(call.op, args, call.attrs, call.ty_args, call.span)
