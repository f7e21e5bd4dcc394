"""Which variable holds the memory of a tensor, and from which element on."""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from typing import Any, NamedTuple

from icd_tvm._tvm import relax
from icd_tvm.relax_passes.relax_graph import Dataflow, is_call, static_shape

_RESHAPES = ("relax.reshape", "relax.squeeze", "relax.expand_dims", "relax.flatten")
# Kernels read 16 bytes at once; eight elements are that many in any of their types or more.
_ALIGNED = 8


class View(NamedTuple):
    """A tensor as part of another: the variable that was computed, and the first element."""

    root: Any
    offset: int = 0


def view_of(flow: Dataflow, expr: Any, made: Collection[Any] = ()) -> View:
    """Return where the memory of a tensor lies, as far as it is one run of another's.

    Followed are other names, reshapes, transpositions that move axes of size 1 only, and slices
    and splits of one step along the first axis that has more than one element. ``made`` are
    variables that a kernel makes: what they were made of is no more.
    """
    offset = 0
    while expr not in made:
        value = flow.values.get(expr) if isinstance(expr, relax.Var) else None
        if isinstance(value, relax.Var):
            expr = value
            continue
        found = None if value is None else _step(flow, value)
        if found is None or (offset + found.offset) % _ALIGNED:
            return View(expr, offset)
        expr, offset = found.root, offset + found.offset
    return View(expr, offset)


def _step(flow: Dataflow, value: Any) -> View | None:
    """Return the tensor that ``value`` is a run of, and where it begins."""
    if isinstance(value, relax.TupleGetItem):
        return _split(flow.call(value.tuple_value, "relax.split"), int(value.index))
    if any(is_call(value, op) for op in _RESHAPES):
        return View(value.args[0])
    if is_call(value, "relax.permute_dims"):
        return _permuted(value)
    return _sliced(value) if is_call(value, "relax.strided_slice") else None


def _split(call: Any, index: int) -> View | None:
    shape = None if call is None else static_shape(call.args[0])
    if shape is None:
        return None
    axis, sections = int(call.attrs.axis) % len(shape), call.attrs.indices_or_sections
    if not hasattr(sections, "__len__"):
        step = shape[axis] // int(sections)
        begin = index * step
    else:
        begin = [0, *(int(s) for s in sections)][index]
    return _run(call.args[0], shape, axis, begin)


def _sliced(call: Any) -> View | None:
    shape = static_shape(call.args[0])
    fields = [getattr(arg, "fields", None) for arg in call.args[1:]]
    if shape is None or len(fields) < 2 or any(f is None or len(f) != 1 for f in fields):
        return None
    numbers = [_integer(f[0]) for f in fields if f is not None]
    axis, begin, *rest = numbers
    if axis is None or begin is None or begin < 0 or (len(rest) > 1 and rest[1] != 1):
        return None
    return _run(call.args[0], shape, axis % len(shape), begin)


def _integer(field: Any) -> int | None:
    value = getattr(field, "value", field)
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def _run(root: Any, shape: tuple[int, ...], axis: int, begin: int) -> View | None:
    if prod(shape[:axis]) != 1:
        return None
    return View(root, begin * prod(shape[axis + 1 :]))


def _permuted(call: Any) -> View | None:
    shape, axes = static_shape(call.args[0]), call.attrs.axes
    if shape is None:
        return None
    order = [int(a) for a in axes] if axes is not None else list(range(len(shape)))[::-1]
    wide = [axis for axis in order if shape[axis] > 1]
    return View(call.args[0]) if wide == sorted(wide) else None
