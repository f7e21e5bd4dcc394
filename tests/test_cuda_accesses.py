"""Orders for the blocks of the CUDA kernels: what is counted, and planted blocks that come back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from relax_models import constants, mlp

from icd_tvm._tvm import named_const, relax
from icd_tvm.core.cost import TileAccess, tile_cost
from icd_tvm.relax_passes.attach_layout_tags import tagged_groups
from icd_tvm.relax_passes.build_access_graph import BuildAccessGraph, listed_blocks
from icd_tvm.relax_passes.coaccess_attr import LISTED_BLOCKS, read_accesses
from icd_tvm.relax_passes.cuda_sparse_products import paying_blocks
from icd_tvm.relax_passes.decide_permutation import DecidePermutation, Decision
from icd_tvm.relax_passes.permute_constants import permute_groups
from icd_tvm.relax_passes.repermute_pass import RepermutePass
from icd_tvm.tir_schedules.cuda.gemm import LIVE_COLUMNS, SLAB, live_blocks
from icd_tvm.tir_schedules.target import cuda_target, host_target

Array = np.ndarray
DEVICE = cuda_target("sm_90")
ROWS = 4


def chain(*weights: Array, gated: bool = False) -> Any:
    """Return main(x [1, ROWS, K]): products with ReLU between them, or a gate after the first."""
    x = relax.Var("x", relax.TensorType((1, ROWS, len(weights[0])), "float32"))
    builder, value = relax.BlockBuilder(), x
    with builder.function("main", [x], attrs={"num_input": 1}):
        with builder.dataflow():
            for i, weight in enumerate(weights):
                if i:
                    value = builder.emit(relax.op.nn.relu(value))
                value = builder.emit(relax.op.matmul(value, named_const(weight, f"w{i}")), f"fc{i}")
                if gated and not i:
                    both = builder.emit(relax.op.split(value, 2, -1))
                    value = builder.emit(relax.op.multiply(both[0], relax.op.nn.silu(both[1])))
            out = builder.emit_output(relax.op.nn.relu(value))
        builder.emit_func_output(out)
    return relax.transform.Normalize()(builder.get())


def dense(k: int, n: int) -> Array:
    return np.random.default_rng(k).uniform(0.5, 1, (k, n)).astype(np.float32)


def planted(slabs: int, groups: int, rng: np.random.Generator) -> Array:
    """Return a weight whose every group of columns has half of the slabs."""
    alive = np.stack([rng.permutation(slabs) < slabs // 2 for _ in range(groups)], axis=1)
    mask = np.repeat(np.repeat(alive, SLAB, axis=0), LIVE_COLUMNS, axis=1)
    return dense(*mask.shape) * mask


def accesses_of(mod: Any, size: int, target: Any = DEVICE) -> list[TileAccess]:
    """Return the accesses of the one axis of a length."""
    (found,) = (a for a in read_accesses(BuildAccessGraph(target)(mod)).values() if a[0].n == size)
    return found


def blocks(weight: Array) -> int:
    return int(np.count_nonzero(live_blocks(weight, LIVE_COLUMNS) >= 0))


@given(st.integers(0, 2**32 - 1))
def test_u_is_the_flop_of_the_live_blocks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = [np.zeros(shape, np.float32) for shape in ((128, 256), (256, 128))]
    for weight in weights:
        weight.ravel()[rng.choice(weight.size, 20, replace=False)] = 1
    accesses = accesses_of(mlp(weights[0], dense(1, 256)[0], weights[1], rows=ROWS), 256)
    assert [a.tile for a in accesses] == [LIVE_COLUMNS, SLAB]
    order = rng.permutation(256)
    live = blocks(weights[0][:, order]) + blocks(weights[1][order])
    assert tile_cost(accesses, order) == 2 * ROWS * SLAB * LIVE_COLUMNS * live


def test_a_row_is_a_window_where_rows_are_ordered_too() -> None:
    weight = planted(16, 8, np.random.default_rng(0))
    fixed = accesses_of(chain(weight, dense(512, 32)), 512)[0]
    assert fixed.windows <= 16
    mod = chain(dense(32, 256), weight, dense(512, 32))
    columns, rows = accesses_of(mod, 512)[0], accesses_of(mod, 256)[-1]
    for access, masks in ((columns, weight != 0), (rows, weight.T != 0)):
        assert access.label == "w1"
        found = {window.toarray().tobytes() for window in access.incidence}
        assert found == {mask.tobytes() for mask in masks}
        assert access.counts is not None
        assert access.counts.sum() == len(masks)
    # In the planted order they add up to the blocks, on either side.
    for access in (fixed, columns, rows):
        flop = tile_cost([access], np.arange(access.n))
        assert flop == 2 * ROWS * SLAB * LIVE_COLUMNS * blocks(weight)


@pytest.mark.parametrize("strays", [0, 3])
def test_blocks_scattered_over_both_axes_are_found(strays: int) -> None:
    rng = np.random.default_rng(strays)
    weight = planted(16, 8, rng)
    least, total = blocks(weight), 16 * 8
    dead = np.argwhere(weight == 0)
    weight[tuple(dead[rng.choice(len(dead), strays)].T)] = 1
    scattered = weight[rng.permutation(256)][:, rng.permutation(512)]
    mod = chain(dense(64, 256), scattered, dense(512, 64))
    assert (least, blocks(scattered)) == (total // 2, total)
    rewrite = RepermutePass(target=DEVICE, time_budget_s=20.0)
    found = constants(rewrite(mod))["w1"]
    assert least <= blocks(found) <= least + strays
    assert paying_blocks(found) is not None
    sums = [sorted(w.sum(axis=1, dtype=np.float64)) for w in (found, weight)]
    assert sums[0] == pytest.approx(sums[1])
    # The kernels of a CPU see columns alone.
    host = RepermutePass(target=host_target(1), time_budget_s=5.0, verify=False)
    assert paying_blocks(constants(host(mod))["w1"]) is None


@pytest.mark.parametrize("seed", range(2))
def test_orders_of_both_axes_leave_no_more_blocks_than_were_there(seed: int) -> None:
    rng = np.random.default_rng(seed)
    alive = np.kron(rng.random((16, 6)) < 0.3, np.ones((SLAB, LIVE_COLUMNS)))
    weight = (alive * (rng.random(alive.shape) < 0.03)).astype(np.float32)
    weight[~weight.any(axis=1), 0] = weight[0, ~weight.any(axis=0)] = 1
    mod = chain(dense(64, 256), weight, dense(384, 64))
    # Nearly empty rows find others than their neighbours, which they share blocks with.
    build, decide = BuildAccessGraph(DEVICE), DecidePermutation(time_budget_s=10.0)
    blind = DecidePermutation(time_budget_s=10.0)
    graphed = build(mod)
    blind(graphed.with_attr(LISTED_BLOCKS, False))
    decide(graphed)
    assert live(graphed, blind.decisions) > blocks(weight) >= live(graphed, decide.decisions)
    dense_flop = {256: 64 * 256, 384: 384 * 64}
    for decision in decide.decisions:
        own = 2 * ROWS * (SLAB * LIVE_COLUMNS * blocks(weight) + dense_flop[len(decision.perm)])
        assert decision.stats["U"] <= own == decision.stats["U_before"]


def live(mod: Any, decisions: list[Decision]) -> int:
    """Return the live blocks of the second weight in the orders decided."""
    perms = {decision.group: decision.perm for decision in decisions if decision.improved}
    return blocks(constants(permute_groups(mod, tagged_groups(mod), perms))["w1"])


def test_dead_units_are_in_no_block() -> None:
    weights = [dense(64, 256), planted(16, 8, np.random.default_rng(0)), dense(512, 64)]
    mod, dead = chain(*weights), np.arange(64, 192)
    groups = tagged_groups(mod)
    (group,) = (one.id for one in groups.free if one.size == 512)
    found = listed_blocks(mod["main"], groups, {group: dead})
    weights[1][:, dead], weights[2][dead] = 0, 0
    block = 2 * ROWS * SLAB * LIVE_COLUMNS
    assert found.flop({}) == block * sum(map(blocks, weights))
    order = np.random.default_rng(1).permutation(512)
    weights[1], weights[2] = weights[1][:, order], weights[2][order]
    assert found.flop({group: order}) == block * sum(map(blocks, weights))


@pytest.mark.parametrize(("hidden", "sides"), [(256, "NNK"), (96, "K")])
def test_segments_of_whole_tiles_are_ordered(hidden: int, sides: str) -> None:
    rng = np.random.default_rng(0)
    weight = planted(8, -(-2 * hidden // LIVE_COLUMNS), rng)
    order = rng.permutation(hidden)
    both = np.concatenate([weight[:, :hidden][:, order], weight[:, hidden:][:, order]], axis=1)
    mod = chain(both, dense(hidden, 64), gated=True)
    tiles = {"N": LIVE_COLUMNS, "K": SLAB}
    assert [a.tile for a in accesses_of(mod, hidden)] == [tiles[side] for side in sides]
    found = constants(RepermutePass(target=DEVICE, time_budget_s=5.0)(mod))["w0"]
    if sides != "K":
        assert blocks(found) == blocks(weight) == 32 < blocks(both)


def test_an_order_pays_for_the_blocks_of_segments_that_are_no_whole_tiles() -> None:
    slabs = np.array([0, 1, 0])[None, :] == np.arange(8)[:, None] // 4
    first = dense(128, 192) * np.kron(slabs, np.ones((SLAB, LIVE_COLUMNS), np.float32))
    second = dense(96, 128) * (np.arange(96)[:, None] % 2 == np.arange(128) // LIVE_COLUMNS)
    rewrite = RepermutePass(target=DEVICE, time_budget_s=5.0)
    found = constants(rewrite(chain(first, second.astype(np.float32), gated=True)))
    assert blocks(found["w0"]) + blocks(found["w1"]) <= blocks(first) + blocks(second) == 24
    # Alone the second weight has an order with half of its blocks.
    alone = constants(rewrite(chain(dense(128, 192), second.astype(np.float32), gated=True)))
    assert blocks(alone["w1"]) == 6


def test_a_weight_without_lists_is_read_whole() -> None:
    first, second = dense(64, 96), dense(96, 96)
    first[:, 7], first[3:50, 8:] = 0, 0
    second[7] = 0
    for access in accesses_of(chain(first, second), 96):
        assert access.windows == 1
        assert np.flatnonzero(~access.incidence.toarray().ravel()).tolist() == [7]


def test_no_product_has_an_output_order_of_its_own() -> None:
    weight = planted(8, 2, np.random.default_rng(0))
    mod = mlp(dense(128, 128), dense(1, 128)[0], weight)
    assert len(read_accesses(BuildAccessGraph(host_target(1))(mod))) == 2
    assert len(read_accesses(BuildAccessGraph(DEVICE)(mod))) == 1


@pytest.mark.parametrize(("target", "kept"), [(DEVICE, 192), (host_target(1), 160)])
def test_whole_tiles_of_units_are_removed(target: Any, kept: int) -> None:
    first, second = dense(64, 256), dense(256, 64)
    first[:, 156:], second[156:] = 0, 0
    rewrite = RepermutePass(target=target, time_budget_s=5.0)
    assert constants(rewrite(chain(first, second)))["w0"].shape == (64, kept)
