"""Tiles of masks: counted by hand, sorted by what they lose, drawn; damaged files are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from report_pages import record

from icd_tvm._tvm import named_const, relax
from icd_tvm.measure.metrics import write_metrics
from icd_tvm.report.page import render_folder
from icd_tvm.report.run_files import read_run
from icd_tvm.runtime.arms import Arm
from icd_tvm.runtime.tile_occupancy import MAX_PIXELS, Tiles, occupancy, save_tiles, tile_occupancy

RNG = np.random.default_rng(3)


def striped(order: np.ndarray | None = None) -> np.ndarray:
    """Return a weight whose every second row is zero, in an order of its rows."""
    weight = RNG.standard_normal((64, 48)).astype(np.float32)
    weight[::2] = 0
    return weight if order is None else weight[order]


def module(**weights: np.ndarray) -> Any:
    """Return a module that multiplies its input by each weight."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4, 64), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            products = [
                builder.emit(relax.op.matmul(x, named_const(array, name)))
                for name, array in weights.items()
            ]
            out = builder.emit_output(relax.Tuple(products))
        builder.emit_func_output(out)
    return builder.get()


def test_a_tile_is_a_row_of_sixteen_columns_also_at_the_edge() -> None:
    mask = np.zeros((20, 33), dtype=np.bool_)
    mask[:16, :16] = True
    mask[19, 32] = True
    found = occupancy(mask)
    assert (found.held, found.total) == (17, 60)
    assert found.picture.shape == (20, 3)
    assert found.picture[19, 2] == 1
    assert found.picture.sum() == 17
    long = occupancy(np.arange(2 * MAX_PIXELS + 1)[:, None] % 2 == np.zeros(16))
    assert long.held == MAX_PIXELS + 1
    assert max(long.picture.shape) <= MAX_PIXELS
    assert set(long.picture.ravel().tolist()) <= {np.float16(1 / 3), np.float16(2 / 3), 1.0}


def test_an_order_that_gathers_the_zeros_empties_half_of_the_tiles() -> None:
    gather = np.argsort(np.arange(64) % 2 == 0, kind="stable")
    even = RNG.standard_normal((64, 48)).astype(np.float32)
    arms = {
        "dense": Arm("dense", module(w=striped())),
        "identity": Arm("identity", module(w=striped(), full=even)),
        "linear": Arm("linear", module(w=striped(), full=even)),
        "iterative": Arm("iterative", module(w=striped(gather), full=even)),
    }
    found = tile_occupancy(arms)
    assert list(found) == ["w"]
    assert list(found["w"]) == ["identity", "linear", "iterative"]
    assert {arm: tiles.held for arm, tiles in found["w"].items()} == {
        "identity": 96,
        "linear": 96,
        "iterative": 96,
    }
    # As many tiles, side by side: the picture is what changes.
    assert found["w"]["identity"].picture[:, 0].tolist() == [0, 1] * 32
    assert found["w"]["iterative"].picture[:, 0].tolist() == [1] * 32 + [0] * 32


def test_only_the_weights_that_gain_most_are_kept() -> None:
    count = 9
    before = {f"w{i}": striped() for i in range(count)}
    after = {name: np.array(array) for name, array in before.items()}
    for i in range(count):
        after[f"w{i}"][: 16 * (i // 3 + 1)] = 0
    arms = {"identity": Arm("identity", module(**before)), "linear": Arm("linear", module(**after))}
    found = tile_occupancy(arms)
    assert set(found) == {"w3", "w4", "w5", "w6", "w7", "w8"}


def test_pictures_reach_the_page_and_damaged_ones_are_named(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.json", record("vec16-0.5-2t"))
    images = {"identity": Tiles(np.ones((4, 3), np.float16), 1200, 1200)}
    images["iterative"] = Tiles(np.eye(4, 3, dtype=np.float16), 300, 1200)
    save_tiles(tmp_path / "tiles.npz", {"layer.0/w|odd <name>": images})
    page = render_folder(tmp_path)
    assert "as it comes 1,200 of 1,200 (100.0 %); re-permuted 300 of 1,200 (25.0 %)." in page
    assert "layer.0/w|odd &lt;name&gt;" in page
    for damage in (b"", b"PK\x03\x04 nothing"):
        (tmp_path / "tiles.npz").write_bytes(damage)
        assert "cannot be read" in read_run(tmp_path).problems["tiles.npz"]
        assert "cannot be read" in render_folder(tmp_path)
    whole = {"w|identity|tiles": np.array([1, 2])}
    np.savez(tmp_path / "tiles.npz", **whole, **{"w|identity|picture": np.full((2, 2), np.nan)})
    assert "no picture" in read_run(tmp_path).problems["tiles.npz"]
    np.savez(tmp_path / "tiles.npz", **{"w|identity|picture": np.ones((2, 2))})
    assert "tiles" in read_run(tmp_path).problems["tiles.npz"]
