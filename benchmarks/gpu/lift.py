"""Constants of a lowered module become parameters, and a recipe says how each is made again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.gpu.recipes import COLUMNS, PACKINGS, Recipe, Source, by_column, pack, rounded
from icd_tvm._tvm import GenericConst, const_name, relax
from icd_tvm.errors import MeasurementError
from icd_tvm.relax_passes.replace_constants import replace_constants, rewrite_constants
from icd_tvm.tir_schedules.cuda.source_kernel import numpy_dtype

Array = npt.NDArray[Any]
Shapes = Mapping[str, tuple[int, ...]]
# Smaller constants stay in the library; smaller parameters are stored as they are.
KEPT_BYTES, STORED_BYTES = 1 << 12, 1 << 20
# Codes are bit patterns of float32; from here on they are normal numbers.
_FIRST = 0x00800000
# Elements of a weight that are looked at together.
_TOGETHER = 1 << 22


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

    `MergeSharedInput` joins the names of weights by ``+``; what products of codes keep beside a
    weight is named after it.
    """
    names = (name,) if name in drawn else tuple(map(_weight_of, name.split("+")))
    return names if all(one in drawn for one in names) else ()


def _weight_of(name: str) -> str:
    weight, _, part = name.rpartition(".")
    return weight if part in COLUMNS else name


def _bytes(const: Any) -> int:
    size = int(np.prod([int(n) for n in const.value.shape], dtype=np.int64))
    return size * numpy_dtype(str(const.value.dtype)).itemsize


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
    positions = np.arange(_FIRST, _FIRST + array.size, dtype=np.uint32).reshape(array.shape)
    positions[array == 0] = 0
    return positions.view(np.float32)


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
    # A dead row or column may be any: it is masked.
    rows, columns = np.zeros(len(found), np.int64), np.zeros(found.shape[1], np.int64)
    for part, alive, positions in _in_parts(found):
        rows[part] = np.where(alive, positions // width, 0).max(axis=1)
        columns = np.maximum(columns, np.where(alive, positions % width, 0).max(axis=0))
    for part, alive, positions in _in_parts(found):
        again = rows[part][:, None] * width + columns[None, :]
        if not np.array_equal(again[alive], positions[alive]):
            return None
    mask = found != 0
    whole = bool(mask.all())
    return Source(name, rows.astype(np.int32), columns.astype(np.int32), None if whole else mask)


def _in_parts(codes: Array) -> Iterator[tuple[slice, Array, Array]]:
    """Yield some rows at a time: which, what is alive, and its positions in the weight."""
    step = max(1, _TOGETHER // max(1, codes.shape[1]))
    for first in range(0, len(codes), step):
        part = slice(first, first + step)
        yield part, codes[part] != 0, codes[part].astype(np.int64) - _FIRST


class Recogniser:
    """Finds the recipe of a lowered constant among the weights of the arm's module.

    Parameters
    ----------
    arm : IRModule
        In floats, also where the lowered constants are codes.
    codes : callable
        Returns the same with positions for weights, once it is needed.
    shapes : mapping of str to tuple of int
        Drawn weights.
    coded : mapping of str to tuple of int, optional
        Shapes of the weights whose positions ``codes`` shows, where tables are shorter there.
    """

    def __init__(
        self, arm: Any, codes: Callable[[], Any], shapes: Shapes, coded: Shapes | None = None
    ) -> None:
        self._arm, self._shapes, self._coded = weights_of(arm, shapes), shapes, coded or shapes
        self._packings: dict[Any, str] = {}
        self._codes = cache(lambda: weights_of(codes(), shapes))

    def look(self, constants: Collection[Any]) -> None:
        """Find the packings of all constants and forget the arm: positions take as much memory."""
        self._packings = {const: self._packing(const) for const in constants}
        self._arm = {}

    def recipe(self, const: Any) -> Recipe:
        """Return the recipe of a constant.

        Raises
        ------
        MeasurementError
            If it is none of the arm's weights, rounded and packed in a known way.
        """
        name, dtype = const_name(const), str(const.value.dtype)
        shape = tuple(int(n) for n in const.value.shape)
        packing = self._packings[const] if const in self._packings else self._packing(const)
        if packing:
            sources = [self._source(one) for one in joined(name, self._shapes)]
            if None not in sources:
                return Recipe(shape, dtype, packing, tuple(s for s in sources if s is not None))
        raise MeasurementError(f"{name!r} {dtype}{list(shape)} is no weight in a known packing")

    def _source(self, name: str) -> Source | None:
        few, many = self._coded[name], self._shapes[name]
        found = source_of(name, _matrix(self._codes()[name]), few[-1])
        return found if found is None or few == many else _longer(found, few, many)

    def _packing(self, const: Any) -> str:
        """Return how a constant is packed; empty if in no known way."""
        name = const_name(const)
        names = joined(name, self._arm)
        if not names:
            return ""
        if name in self._arm and const.value.same_as(self._arm[name].value):
            return "plain"
        parts = [_matrix(self._arm[n]) for n in names]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        array, dtype = const.value.numpy(), str(const.value.dtype)
        part = name.rpartition(".")[2]
        if name not in self._arm and part in COLUMNS:
            made = by_column(whole, part).astype(dtype)
            return part if np.array_equal(made, array) else ""
        return _packing(rounded(whole, dtype), array, dtype)

    def drawn(self, const: Any) -> bool:
        """Say whether a constant is named after weights that hosts draw."""
        return bool(joined(const_name(const), self._shapes))


def _longer(source: Source, few: tuple[int, ...], many: tuple[int, ...]) -> Source | None:
    """Return the source of a table with more words; None if its words are moved or pruned."""
    indices = []
    for index, short, long in zip((source.rows, source.columns), few, many, strict=True):
        if short != long and not np.array_equal(index, np.arange(short)):
            return None
        indices.append(index if short == long else np.arange(long, dtype=np.int32))
    return None if source.alive is not None else Source(source.name, indices[0], indices[1])


def _matrix(const: Any) -> Array:
    array = np.asarray(const.value.numpy())
    return array.reshape(-1, array.shape[-1])


def _packing(values: Array, array: Array, dtype: str) -> str:
    """Return the packing that makes ``array`` of a rounded matrix, or an empty string."""
    for packing in PACKINGS:
        if packing.startswith("gemm") and array.ndim != 4:
            continue
        if packing.startswith("gemv") and dtype == "float32":
            continue
        try:
            made = pack(values, packing, tuple(array.shape))
        except (ValueError, AssertionError, IndexError, KeyError):
            continue
        if np.array_equal(made, array):
            return packing
    return ""
