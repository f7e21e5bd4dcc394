"""Constants of a lowered module become parameters, and a recipe says how each is made again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.gpu.recipes import COLUMNS, PACKINGS, Recipe, Source, pack
from icd_tvm._tvm import GenericConst, const_name, relax
from icd_tvm.errors import MeasurementError
from icd_tvm.relax_passes.replace_constants import replace_constants, rewrite_constants

Array = npt.NDArray[Any]
# Smaller constants stay in the library; smaller parameters are stored as they are.
KEPT_BYTES, STORED_BYTES = 1 << 12, 1 << 20
# Codes are bit patterns of float32; from here on they are normal numbers.
_FIRST = 0x00800000


def big_constants(func: Any, drawn: Collection[str] = ()) -> list[Any]:
    """Return the large constants of a function and those made of ``drawn``, each once, in order."""
    found: dict[Any, None] = {}

    def visit(expr: Any) -> None:
        if isinstance(expr, GenericConst) and (
            _bytes(expr) > KEPT_BYTES or joined(const_name(expr), drawn)
        ):
            found[expr] = None

    relax.analysis.post_order_visit(func, visit)
    return list(found)


def joined(name: str, drawn: Collection[str]) -> tuple[str, ...]:
    """Return the weights that a constant is named after, side by side; none if one is not drawn.

    `MergeSharedInput` joins the names of weights by ``+``; what products of int8 keep beside a
    weight is named after it.
    """
    names = (name,) if name in drawn else tuple(map(_weight_of, name.split("+")))
    return names if all(one in drawn for one in names) else ()


def _weight_of(name: str) -> str:
    weight, _, part = name.rpartition(".")
    return weight if part in COLUMNS else name


def _bytes(const: Any) -> int:
    size = int(np.prod([int(n) for n in const.value.shape], dtype=np.int64))
    return size * const.value.numpy().dtype.itemsize if size else 0


def lift(mod: Any, drawn: Collection[str] = ()) -> tuple[Any, list[Any]]:
    """Return a module whose large constants are parameters of ``main``, after its inputs.

    Parameters
    ----------
    mod : IRModule
        Lowered.
    drawn : collection of str
        Weights that the host draws: they must be parameters however little an arm keeps of them.

    Returns
    -------
    IRModule
        With ``num_input``: what follows the inputs stays the same from call to call.
    list of GenericConst
        The constants, in the order of the parameters.
    """
    func = mod["main"]
    constants = big_constants(func, drawn)
    params = {c: relax.Var(f"weight_{i}", c.ty) for i, c in enumerate(constants)}
    body = rewrite_constants(func, lambda const, var, path: params.get(const, const)).body
    every = [*func.params, *params.values()]
    lifted = relax.Function(every, body, func.ret_ty, func.is_pure, func.attrs, func.span)
    mod = mod.clone()
    mod["main"] = lifted.with_attr("num_input", len(func.params))
    return relax.transform.Normalize()(mod), constants


def coded(mod: Any, drawn: Collection[str]) -> Any:
    """Return the module with each drawn weight replaced by its elements' positions.

    What is zero stays zero. Passes that only move or remove elements treat the two alike.
    """
    new = {c: _codes(c.value.numpy()) for c in weights_of(mod, drawn).values()}
    return replace_constants(mod, new)


def matrices(mod: Any) -> dict[str, Any]:
    """Return the named float32 constants with several axes that are worth a recipe."""
    return {
        const_name(c): c
        for c in big_constants(mod["main"])
        if const_name(c) and c.value.dtype == "float32" and len(c.value.shape) > 1
    }


def weights_of(mod: Any, drawn: Collection[str]) -> dict[str, Any]:
    """Return the constants of those names, whatever is left of them."""
    found = big_constants(mod["main"], drawn)
    return {const_name(c): c for c in found if const_name(c) in drawn}


def _codes(array: Array) -> Array:
    positions = np.arange(_FIRST, _FIRST + array.size, dtype=np.uint32).view(np.float32)
    return np.where(array != 0, positions.reshape(array.shape), np.float32(0))


def source_of(name: str, codes: Array, width: int) -> Source | None:
    """Return which rows and columns of a weight an array of codes shows; None if it is no such.

    Parameters
    ----------
    name : str
    codes : [..., N]
        What became of the codes of the weight.
    width : int
        Last axis of the weight.
    """
    found = np.asarray(codes, order="C").reshape(-1, codes.shape[-1]).view(np.uint32)
    alive = found != 0
    positions = found.astype(np.int64) - _FIRST
    rows = np.where(alive, positions // width, -1).max(axis=1)
    columns = np.where(alive, positions % width, -1).max(axis=0)
    # A dead row or column may be any: it is masked.
    mask = None if alive.all() else alive
    rows, columns = np.maximum(rows, 0), np.maximum(columns, 0)
    again = rows[:, None] * width + columns[None, :]
    if not np.array_equal(np.where(alive, again, 0), np.where(alive, positions, 0)):
        return None
    return Source(name, rows.astype(np.int32), columns.astype(np.int32), mask)


class Recogniser:
    """Finds the recipe of a lowered constant among the weights of the arm's module."""

    def __init__(self, arm: Any, arm_coded: Any, dense: Mapping[str, Array]) -> None:
        self._arm = {name: c.value.numpy() for name, c in weights_of(arm, dense).items()}
        self._codes = {name: c.value.numpy() for name, c in weights_of(arm_coded, dense).items()}
        self._widths = {name: array.shape[-1] for name, array in dense.items()}

    def recipe(self, const: Any) -> Recipe:
        """Return the recipe of a constant.

        Raises
        ------
        MeasurementError
            If it is none of the arm's weights, rounded and packed in a known way.
        """
        array, name = const.value.numpy(), const_name(const)
        shape, dtype = tuple(array.shape), str(const.value.dtype)
        names = joined(name, self._arm)
        if names:
            whole = np.concatenate([_matrix(self._arm[n]) for n in names], axis=1)
            packing = _packing(whole, array, dtype)
            sources = [source_of(n, self._codes[n], self._widths[n]) for n in names]
            if packing and None not in sources:
                return Recipe(shape, dtype, packing, tuple(s for s in sources if s is not None))
        raise MeasurementError(f"{name!r} {dtype}{list(shape)} is no weight in a known packing")

    def drawn(self, const: Any) -> bool:
        """Say whether a constant is named after weights that hosts draw."""
        return bool(joined(const_name(const), self._widths))


def _matrix(array: Array) -> Array:
    return array.reshape(-1, array.shape[-1])


def _packing(whole: Array, array: Array, dtype: str) -> str:
    """Return the packing that makes ``array`` of a matrix, or an empty string."""
    for packing in PACKINGS:
        if (packing.startswith("gemm") and array.ndim != 4) or (
            packing in COLUMNS and array.ndim != 1
        ):
            continue
        if packing.startswith("gemv") and dtype == "float32":
            continue
        try:
            made = pack(whole, packing, tuple(array.shape), dtype)
        except (ValueError, AssertionError, IndexError, KeyError):
            continue
        if np.array_equal(made, array):
            return packing
    return ""
