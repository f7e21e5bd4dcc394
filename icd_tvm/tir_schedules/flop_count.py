"""Arithmetic operations of one call of a TIR function, counted from its loops.

An addition, subtraction, multiplication, division, minimum, maximum or negation is one operation,
and so is a call of a function such as ``exp``; a fused multiply-add is two. What is equal inside
one stored value is computed once. Indices, casts, comparisons and copies do not count. Integers
count only where they come from tensors: a product of bytes is what a quantised kernel does.
Source for the counting: Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm_ffi

from icd_tvm._tvm import Call, TensorLoad, tirx, tvm
from icd_tvm.tir_schedules.index_eval import Constants, Loop, Points, op_name, variables
from icd_tvm.tir_schedules.tensor_access import Access, accesses, stores

_ARITHMETIC = (
    tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Mod, tirx.FloorDiv, tirx.FloorMod,
    tirx.Min, tirx.Max,
)  # fmt: skip
_CHILDREN = ("a", "b", "value", "condition", "true_value", "false_value", "base", "stride")
# Calls that compute nothing: choices, bits that are read as another type, and shifts.
_FREE = (
    "if_then_else", "likely", "reinterpret", "shift_left", "shift_right", "bitwise_and",
    "bitwise_or", "bitwise_xor", "vectorlow", "vectorhigh", "vectorcombine", "shuffle",
)  # fmt: skip
# Operations of one 32-bit lane: four products and four sums, two products and a sum, two products
# and two sums; a rounding has none.
_DOT = (("vpdpbusd", 8), ("pmadd", 3), ("dpbf16ps", 4), ("cvtneps2bf16", 0))


def count_flop(func: Any, consts: Constants | None = None) -> int:
    """Return the arithmetic operations of one call.

    Parameters
    ----------
    func : PrimFunc
        Schedulable or scheduled, with static shapes.
    consts : mapping of str to ndarray, optional
        Values of the parameters that loop bounds or guards load from, by name.

    Raises
    ------
    UnsupportedOpError
        If a loop cannot be counted, or a tensor instruction hides what it computes.
    ConfigError
        If a value that decides a loop or a guard is unknown.
    """
    return sum(
        work * executions(access, consts or {})
        for access, value in stores(func)
        if (work := _operations(value))
    )


def touched_bytes(func: Any, consts: Constants | None = None) -> list[int]:
    """Return, for each parameter, the bytes that a call must move at least once.

    That is the size of the parameter, or less where fewer elements are read than it has (the rows
    that a gather takes); the same read twice in the text is one. Errors as :func:`count_flop`.
    """
    touched = dict.fromkeys((str(p.name) for p in func.params), 0)
    sizes = dict(touched)
    seen: set[tuple[Any, ...]] = set()
    for access in accesses(func):
        key = (access.name, *map(str, access.indices), *(loop.var for loop in access.loops))
        if access.name in touched and key not in seen:
            seen.add(key)
            item = access.item_bits // 8
            sizes[access.name] = int(np.prod(access.shape, dtype=np.int64)) * item
            touched[access.name] += executions(access, consts or {}) * item
    return [min(touched[name], sizes[name]) for name in touched]


def executions(access: Access, consts: Constants) -> int:
    """Return how often an access happens in one call."""
    deciding = _deciding(access)
    times = 1
    for loop in access.loops:
        if loop.var not in deciding:
            times *= int(loop.extent)
    points = Points(consts)
    loops = [loop for loop in access.loops if loop.var in deciding]
    points.expand_all(loops, access.predicates)
    return times * points.size


def _deciding(access: Access) -> set[Any]:
    """Return the loops that guards or bounds depend on, and those whose bounds vary."""

    def bounds(loop: Loop) -> set[Any]:
        return variables([loop.minimum, loop.extent])

    found = variables(access.predicates)
    found |= {loop.var for loop in access.loops if loop.constant_extent is None}
    for loop in reversed(access.loops):
        if loop.var in found or loop.constant_extent is None:
            found |= bounds(loop)
    return found


def _operations(value: Any) -> int:
    """Return the operations of a value, all lanes of a vector together."""
    seen: dict[Any, list[Any]] = {}
    total, pending = 0, [value]
    while pending:
        node = pending.pop()
        # Equal text is one value: LLVM computes it once.
        equal = seen.setdefault(tvm_ffi.structural_hash(node), [])
        if any(tvm_ffi.structural_equal(node, other) for other in equal):
            continue
        equal.append(node)
        total += _weight(node)
        pending += _operands(node)
    return total


def _operands(node: Any) -> list[Any]:
    if isinstance(node, TensorLoad):
        return []
    if isinstance(node, Call):
        return [arg for arg in node.args if not isinstance(arg, (str, int))]
    return [child for name in _CHILDREN if (child := getattr(node, name, None)) is not None]


def _weight(node: Any) -> int:
    kind = getattr(getattr(node, "ty", None), "dtype", None)
    dtype = tvm_ffi.dtype(str(kind)) if kind is not None else None
    if dtype is None or str(dtype).startswith("bool"):
        return 0
    lanes = max(int(dtype.lanes), 1)
    if isinstance(node, Call):
        return lanes * _of_call(node)
    if not isinstance(node, _ARITHMETIC):
        return 0
    return lanes if "float" in str(dtype) or _reads(node) else 0


def _of_call(node: Any) -> int:
    name = op_name(node)
    if name in _FREE:
        return 0
    if name == "call_pure_extern":
        intrinsic = str(node.args[0].value)
    elif name.startswith("call_llvm"):
        intrinsic = str(tvm.target.codegen.llvm_get_intrinsic_name(int(node.args[0])))
    else:
        return 1
    return next((count for part, count in _DOT if part in intrinsic), 1)


def _reads(node: Any) -> bool:
    found: list[Any] = []
    tvm_ffi.structural_walk(node, (TensorLoad, found.append))
    return bool(found)
