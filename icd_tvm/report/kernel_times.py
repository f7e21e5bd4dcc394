"""The tables of the profiled run: where the time of each arm goes, by layer and by kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from icd_tvm.report.kernel_tables import layer
from icd_tvm.report.table import Cell, Table, numeric, scaled
from icd_tvm.report.values import ABSENT, as_list, as_mapping, as_number, dig, text

_OUTSIDE = "outside the layers"


def profiled(record: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the arms whose kernels were timed, and the record of that."""
    for name, arm in as_mapping(record.get("arms")).items():
        if as_list(dig(arm, "kernel_times", "kernels")):
            yield name, as_mapping(dig(arm, "kernel_times"))


def layers(record: Mapping[str, Any]) -> Table:
    """Lay out the microseconds of each layer, an arm in each column."""
    found = {name: _by_layer(times) for name, times in profiled(record)}
    rows = dict.fromkeys(key for times in found.values() for key in times)
    table = Table("Least time of each layer, µs (profiled run)", ["layer", *found])
    for key in sorted(rows, key=lambda key: float(key) if key.isdecimal() else float("inf")):
        title = Cell(key, float(key)) if key.isdecimal() else Cell(key)
        table.add(title, *(numeric(times.get(key), 2) for times in found.values()))
    if table.rows:
        totals = (sum(times.values()) for times in found.values())
        table.add("all kernels", *(numeric(total, 2) for total in totals))
    return table


def _by_layer(times: Mapping[str, Any]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for kernel in as_list(times.get("kernels")):
        shown = _layer(kernel).shown
        key = _OUTSIDE if shown == ABSENT else shown
        sums[key] = sums.get(key, 0.0) + (as_number(dig(kernel, "us_min")) or 0.0)
    return sums


def _layer(kernel: Any) -> Cell:
    """Return the layer that the operator's name, or that of a weight or a group, tells."""
    names = [dig(kernel, "node"), *as_list(dig(kernel, "weights")), *as_list(dig(kernel, "groups"))]
    found = (layer(name) for name in names)
    return next((cell for cell in found if cell.shown != ABSENT), Cell(ABSENT))


def all_kernel_times(record: Mapping[str, Any]) -> list[Table]:
    """Return a table of timed kernels for every arm that has them."""
    return [kernel_times(name, times) for name, times in profiled(record)]


def kernel_times(arm: str, times: Mapping[str, Any]) -> Table:
    """Lay out what each kernel of an arm took, computed and moved."""
    heads = ["operator", "layer", "least µs", "share %", "median", "flop", "flop / s"]
    heads += ["flop / byte", "kernel", "axis groups"]
    table = Table(f"Kernels of {text(arm)} (profiled run)", heads)
    kernels = as_list(times.get("kernels"))
    total = sum(as_number(dig(kernel, "us_min")) or 0.0 for kernel in kernels)
    for kernel in kernels:
        us, flop, moved = (as_number(dig(kernel, key)) for key in ("us_min", "flop", "bytes"))
        table.add(
            dig(kernel, "node"),
            _layer(kernel),
            numeric(us, 2),
            numeric(100 * us / total if us is not None and total else None, 1),
            numeric(dig(kernel, "us"), 2),
            scaled(flop),
            scaled(flop / us * 1e6 if flop and us else None),
            numeric(flop / moved if flop and moved else None, 2),
            dig(kernel, "kernel"),
            as_list(dig(kernel, "groups")),
        )
    return table.without_empty_columns()
