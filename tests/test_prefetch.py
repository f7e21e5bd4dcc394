"""What the dense kernel fetches ahead: every line of the next panel, and nothing as an access."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from icd_tvm._tvm import tirx, tvm_ffi
from icd_tvm.tir_schedules.access_patterns import accesses
from icd_tvm.tir_schedules.cpu.dense import DenseRule, dense_matmul
from icd_tvm.tir_schedules.cpu.prefetch import prefetch_next_panel
from icd_tvm.tir_schedules.cpu.tile import Tile, choose_tile, schedule_tiled
from icd_tvm.tir_schedules.index_eval import Loop, Points, variables
from icd_tvm.tir_schedules.target import parse_target

TARGET = parse_target("x86-64-v4", 1)
LINE = 16


def tiled(m: int, k: int, n: int, tile: Tile) -> Any:
    return schedule_tiled(dense_matmul(m, k, n, tile), TARGET, ("dense",))


def nodes(func: Any, kind: type) -> list[Any]:
    found: list[Any] = []
    tvm_ffi.structural_map(func.body, (kind, lambda node: found.append(node) or node))
    return found


def fetched(func: Any) -> dict[int, set[int]]:
    """Return the lines of each panel that a call fetches."""
    calls = [node for node in nodes(func, tirx.Evaluate) if "prefetch" in str(node)]
    loops = nodes(func, tirx.For)
    found: dict[int, set[int]] = {}
    for call in calls:
        (load,) = call.value.args[0].args
        points, needed = Points({}), variables(list(load.indices))
        for loop in loops:
            if loop.loop_var in needed:
                points.expand(Loop(loop.loop_var, loop.min, loop.extent, "serial"))
        panel, row, column = (
            np.broadcast_to(points.value(index), points.size) for index in load.indices
        )
        width = int(load.source.ty.shape[2])
        assert (column < width).all()
        assert (row < int(load.source.ty.shape[1])).all()
        for at, line in zip(panel.tolist(), (row * width + column).tolist(), strict=True):
            found.setdefault(at, set()).add(line // LINE)
    return found


@pytest.mark.parametrize(("m", "k", "n"), [(32, 40, 96), (9, 7, 33), (1, 64, 300), (128, 64, 144)])
def test_every_line_of_the_next_panel_is_fetched(m: int, k: int, n: int) -> None:
    tile = choose_tile(m, k, n, TARGET)
    panels, lines = -(-n // tile.columns), -(-k * tile.columns // LINE)
    found = fetched(prefetch_next_panel(tiled(m, k, n, tile)).mod["main"])
    assert found == {panel: set(range(lines)) for panel in range(1, panels)}


def test_a_single_panel_has_no_next_one() -> None:
    sch = DenseRule().apply(dense_matmul(32, 40, 48, Tile(8, 3, 16)), TARGET, False)
    assert not fetched(sch.mod["main"])


def test_a_prefetch_is_no_access() -> None:
    sch = tiled(32, 40, 96, Tile(8, 3, 16))
    func = prefetch_next_panel(sch).mod["main"]
    assert fetched(func)
    assert len(accesses(func)) == len(accesses(sch.mod["main"]))
