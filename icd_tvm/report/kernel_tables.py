"""The tables about kernels: what was chosen, removed, modelled and profiled."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from icd_tvm.report.table import Cell, Table, numeric, scaled
from icd_tvm.report.values import ABSENT, as_list, as_mapping, as_number, binary, dig, text


def kernels(record: Mapping[str, Any]) -> Table:
    """Lay out the kernel that each arm chose for each matmul."""
    chosen = {
        name: _by_node(as_mapping(dig(arm, "kernels")))
        for name, arm in as_mapping(record.get("arms")).items()
        if as_mapping(dig(arm, "kernels"))
    }
    table = Table("Kernel of each matmul", ["matmul", "layer", *chosen])
    nodes = dict.fromkeys(node for found in chosen.values() for node in found)
    names = {node: name for found in chosen.values() for node, (name, _) in found.items()}
    for node in nodes:
        name = next(found[node][0] for found in chosen.values() if node in found)
        cells = [found.get(node, ("", None))[1] for found in chosen.values()]
        table.add(name, layer(names[node]), *cells)
    return table.without_empty_columns()


def _by_node(found: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Key kernels by node; a matmul that was given an order of its outputs keeps its row."""
    rows: dict[str, tuple[str, Any]] = {}
    for name, kernel in found.items():
        key = re.sub(r"\W|_", "_", name).removesuffix("_ordered")
        rows[name if key in rows else key] = (name, kernel)
    return rows


def layer(name: Any) -> Cell:
    """Return the number of the layer in a node's name, where it has one."""
    found = re.search(r"(?:layers?|blocks?|h)[._/](\d{1,6})\b", str(name).replace("_", "."))
    return Cell(found[1], float(found[1])) if found else Cell(ABSENT)


def removed_units(record: Mapping[str, Any]) -> Table:
    """Lay out how many units of each axis an arm no longer computes."""
    removed = {
        name: as_mapping(dig(arm, "removed_units"))
        for name, arm in as_mapping(record.get("arms")).items()
        if as_mapping(dig(arm, "removed_units"))
    }
    sizes = {dig(g, "id"): dig(g, "size") for g in as_list(record.get("groups"))}
    table = Table("Units removed", ["axis", "size", *removed])
    for axis in dict.fromkeys(axis for found in removed.values() for axis in found):
        table.add(
            axis, numeric(sizes.get(axis), 0), *(numeric(f.get(axis), 0) for f in removed.values())
        )
    return table


def cache_totals(record: Mapping[str, Any]) -> Table:
    """Lay out the modelled caches of every arm that has such a model."""
    found = {
        name: {text(dig(level, "name")): level for level in as_list(model.get("levels"))}
        for name, model in cache_models(record)
    }
    sizes = {
        name: dig(lv, "size_bytes") for levels in found.values() for name, lv in levels.items()
    }
    heads = [
        f"{name} {what}"
        for name, size in sizes.items()
        for what in (f"({binary(size)}) requests", "misses", "hit %")
    ]
    table = Table("Caches of one run (model)", ["arm", *heads, "from memory"])
    for name, model in cache_models(record):
        cells = [cell for level in sizes for cell in _level_cells(found[name].get(level))]
        table.add(name, *cells, scaled(model.get("dram_bytes"), "B"))
    return table


def all_cache_kernels(record: Mapping[str, Any]) -> list[Table]:
    """Return a table of kernels for every arm that has a cache model."""
    return [cache_kernels(name, model) for name, model in cache_models(record)]


def cache_kernels(name: str, model: Mapping[str, Any]) -> Table:
    """Lay out the modelled cache events of every kernel of an arm."""
    levels = [text(dig(level, "name")) for level in as_list(model.get("levels"))]
    heads = [f"{level} {what}" for level in levels for what in ("requests", "misses", "hit %")]
    table = Table(f"Kernels of {text(name)} (model)", ["node", "kernel", *heads, "remark"])
    for kernel in as_list(model.get("kernels")):
        counts = as_list(dig(kernel, "levels"))
        cells = [
            cell
            for i in range(len(levels))
            for cell in _level_cells(counts[i] if i < len(counts) else None)
        ]
        table.add(dig(kernel, "node"), dig(kernel, "kernel"), *cells, dig(kernel, "reason"))
    return table.without_empty_columns()


def _level_cells(count: Any) -> Iterator[Cell]:
    requests, misses = (as_number(dig(count, key)) for key in ("requests", "misses"))
    hit = 100 * (1 - misses / requests) if requests and misses is not None else None
    yield from (scaled(requests), scaled(misses), numeric(hit, 2))


def cache_models(record: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the arms that have a cache model, and it."""
    for name, arm in as_mapping(record.get("arms")).items():
        if as_mapping(dig(arm, "cache_model")):
            yield name, as_mapping(dig(arm, "cache_model"))


def profiles(ncu: Mapping[str, Any]) -> list[Table]:
    """Lay out ``ncu.json``: that of one arm, or one of each arm."""
    runs = {"": ncu} if "kernels" in ncu else {k: v for k, v in ncu.items() if dig(v, "kernels")}
    found = []
    for name, run in runs.items():
        kernels = [as_mapping(kernel) for kernel in as_list(as_mapping(run).get("kernels"))]
        metrics = list(dict.fromkeys(key for kernel in kernels for key in kernel if key != "name"))
        title = " ".join(filter(None, ("Nsight Compute,", text(name) if name else "one run")))
        table = Table(title, ["kernel", *metrics])
        for kernel in kernels:
            table.add(kernel.get("name"), *(scaled(kernel.get(metric)) for metric in metrics))
        found.append(table.without_empty_columns())
    return found
