"""Fused loops taken apart into the digits that an access uses."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import tvm_ffi

from icd_tvm._tvm import Var, sym, tirx, tvm
from icd_tvm.tir_schedules.index_eval import Loop, variables
from icd_tvm.tir_schedules.tensor_access import THREADS, Access, nodes


def split_fused(access: Access, *, keep_threads: bool = False) -> Access:
    """Replace loops used through ``//`` and ``%`` by one loop for each digit that is used.

    A fused loop ties the axes it was fused from together; its digits do not, so that those the
    access does not depend on need not be enumerated. ``keep_threads`` leaves threadIdx alone.
    """
    cuts = _cuts(access, keep_threads)
    loops: list[Loop] = []
    values: dict[Any, Any] = {}
    analyzer = sym.Analyzer()
    for loop in access.loops:
        digits = _digits(loop, cuts.get(loop.var, set()))
        loops += digits
        if len(digits) > 1:
            values[loop.var] = _recombined(digits)
        for digit in digits:
            if digit.constant_extent is not None and not variables([digit.minimum]):
                analyzer.bind(digit.var, tvm.ir.Range.from_min_extent(digit.minimum, digit.extent))
    if not values:
        return access

    def rewrite(expr: Any) -> Any:
        if isinstance(expr, int):
            return expr
        return analyzer.simplify(
            tvm_ffi.structural_map(expr, (Var, lambda var: values.get(var, var)))
        )

    return replace(
        access,
        loops=tuple(loops),
        indices=tuple(rewrite(index) for index in access.indices),
        predicates=tuple(rewrite(predicate) for predicate in access.predicates),
    )


def _cuts(access: Access, keep_threads: bool) -> dict[Any, set[int]]:
    """Return the strides at which indices and predicates cut each loop that may be split."""
    bounds = variables(bound for p in access.loops for bound in (p.minimum, p.extent))
    extents = {
        p.var: p.constant_extent
        for p in access.loops
        if p.constant_extent is not None
        and isinstance(p.minimum, (int, tirx.IntImm))
        and int(p.minimum) == 0
        and p.var not in bounds
        and not (keep_threads and p.tag in THREADS)
    }
    cuts: dict[Any, set[int]] = {var: {1, extent} for var, extent in extents.items()}
    for expr in (*access.indices, *access.predicates):
        for node in nodes(expr):
            if (digit := _digit(node, extents)) is not None:
                cuts[digit[0]] |= set(digit[1:])
    return cuts


def _digit(expr: Any, extents: Mapping[Any, int]) -> tuple[Any, int, int] | None:
    """Return (loop variable, low, high) of an expression ``loop % high // low``, else None."""
    if isinstance(expr, Var):
        return (expr, 1, extents[expr]) if expr in extents else None
    if not isinstance(expr, (tirx.FloorDiv, tirx.FloorMod)) or not isinstance(expr.b, tirx.IntImm):
        return None
    inner = _digit(expr.a, extents)
    if inner is None:
        return None
    var, low, high = inner
    border = low * int(expr.b.value)
    if isinstance(expr, tirx.FloorDiv):
        return var, border, max(high, border)
    return var, low, min(high, border)


def _digits(loop: Loop, cuts: set[int]) -> list[Loop]:
    """Split a loop at ``cuts``, the slowest digit first; whole if they do not nest."""
    borders = sorted(cuts)
    pairs = list(itertools.pairwise(borders))
    if len(pairs) < 2 or any(high % low for low, high in pairs):
        return [loop]
    if borders[-1] != loop.constant_extent:
        return [loop]
    dtype = str(loop.var.ty.dtype)
    return [
        replace(
            loop,
            var=Var(f"{loop.name}_{k}", dtype),
            minimum=tirx.IntImm(dtype, 0),
            extent=tirx.IntImm(dtype, high // low),
        )
        for k, (low, high) in enumerate(pairs)
    ][::-1]


def _recombined(digits: Sequence[Loop]) -> Any:
    value = digits[0].var
    for digit in digits[1:]:
        value = value * digit.extent + digit.var
    return value
