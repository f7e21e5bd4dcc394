"""AttachLayoutTags, BuildAccessGraph and DecidePermutation: attributes and what they hold."""

import json
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from relax_models import D, F, constants, example, gated_mlp, mlp, mlp_weights, random_mlp, run

from icd_tvm._tvm import apply_pass, tvm
from icd_tvm.adapters.quant import parse_quant
from icd_tvm.core.access_graph import build_w
from icd_tvm.core.cost import TileAccess
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.inputs import random_inputs
from icd_tvm.models.registry import build as build_model
from icd_tvm.relax_passes.apply_quant import ApplyQuant, quant_requests
from icd_tvm.relax_passes.attach_layout_tags import LAYOUT_TAG, AttachLayoutTags
from icd_tvm.relax_passes.axis_groups import find_axis_groups
from icd_tvm.relax_passes.build_access_graph import (
    QUAD,
    BuildAccessGraph,
    _read,
    byte_products,
    product_runs,
    weight_access,
)
from icd_tvm.relax_passes.coaccess_attr import (
    COACCESS_BLOCK,
    read_accesses,
    read_dead_units,
    to_attr,
    without,
)
from icd_tvm.relax_passes.decide_permutation import (
    DecidePermutation,
    _graph_nnz,
    read_permutations,
)
from icd_tvm.relax_passes.rewrite_layout import RewriteLayout
from icd_tvm.runtime.calibrate import calibrate
from icd_tvm.tir_schedules.target import host_target, parse_target, vector_bits


def _hidden_id() -> str:
    return find_axis_groups(random_mlp()["main"]).free[0].id


def test_tags_survive_save_and_load() -> None:
    tagged = tvm.ir.load_json(tvm.ir.save_json(AttachLayoutTags()(random_mlp())))
    tags = json.loads(tagged.attrs[LAYOUT_TAG])
    assert [group["size"] for group in tags["free"]] == [F]
    assert {pin["reason"] for group in tags["pinned"] for pin in group["pins"]}


def test_functions_are_unchanged() -> None:
    mod = random_mlp()
    passes = [AttachLayoutTags(), BuildAccessGraph(), DecidePermutation()]
    tvm.ir.assert_structural_equal(tvm.transform.Sequential(passes)(mod)["main"], mod["main"])


def test_a_dense_weight_is_one_window_that_touches_everything() -> None:
    accesses = read_accesses(BuildAccessGraph()(random_mlp()))
    assert list(accesses) == [_hidden_id()]
    (access,) = accesses[_hidden_id()]
    assert access.incidence.shape == (1, F)
    assert access.incidence.nnz == F
    assert access.counts is not None
    assert access.counts.sum() == D


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_windows_are_the_rows_of_the_mask(density: float) -> None:
    mask = np.random.default_rng(0).random((24, 40)) < density
    access = weight_access(mask, 7, "w", host_target(1))
    expected: dict[bytes, float] = {}
    for row in mask:
        expected[row.tobytes()] = expected.get(row.tobytes(), 0) + 1
    assert access.counts is not None
    rows = [row.toarray().ravel().tobytes() for row in access.incidence]
    assert dict(zip(rows, access.counts, strict=True)) == expected
    assert access.weight == 2.0 * 7 * access.tile
    assert (access.padded, access.lanes) == (False, vector_bits(host_target(1)) // 32)


def test_dead_columns_leave_the_windows_of_a_dense_weight() -> None:
    columns = np.random.default_rng(0).random(40) < 0.5
    access = weight_access(np.tile(columns, (24, 1)), 7, "w", host_target(1))
    assert access.incidence.toarray().tolist() == [columns.tolist()]
    assert access.counts is not None
    assert access.counts.tolist() == [24]


def test_a_byte_product_reads_whole_quads_and_nearly_dense_is_dense() -> None:
    weight = np.zeros((8, 4), np.float32)
    weight[1, 0] = weight[6, 2] = 1
    quads = _read(weight, QUAD)
    assert quads[:4].all(axis=0).tolist() == [True, False, False, False]
    assert quads[4:].all(axis=0).tolist() == [False, False, True, False]
    assert _read(weight, 1).sum() == 2
    ragged = _read(np.eye(6, 4, dtype=np.float32)[::-1], QUAD)
    assert ragged.shape == (6, 4)
    assert ragged[:4].any(axis=0).tolist() == ragged[0].tolist()
    rounded = np.ones((64, 32), np.float32)
    rounded[::16, 0] = 0  # a few weights that quantisation rounded to zero
    assert _read(rounded, 1).all()
    half = np.arange(32) < 16
    assert _read(np.where(half, rounded, 0), 1).tolist() == np.tile(half, (64, 1)).tolist()


def test_matmuls_of_quantised_operands_are_known() -> None:
    imported = import_onnx(build_model("bert-mini-random"))
    assert byte_products(imported.mod["main"]) == set()
    spec = parse_quant("int8:w8a8")
    requests = quant_requests(imported.mod, spec)
    batches = [random_inputs(imported, 0)]
    statistics = calibrate(imported.mod, requests, batches, host_target(1))
    mod = apply_pass(ApplyQuant(spec, statistics), imported.mod)
    assert len(byte_products(mod["main"])) == len(requests)
    weights = apply_pass(ApplyQuant(parse_quant("int8")), imported.mod)
    assert byte_products(weights["main"]) == set()
    target = parse_target("cooperlake", 1)
    assert set(product_runs(mod["main"], target).values()) == {QUAD}
    pairs = apply_pass(ApplyQuant(parse_quant("bf16")), imported.mod)
    assert product_runs(pairs["main"], target) == dict.fromkeys(requests, 2)
    assert product_runs(pairs["main"], parse_target("x86-64-v4", 1)) == {}


def test_dead_units_are_listed_and_can_be_left_out() -> None:
    w1, b1, w2 = mlp_weights()
    w2[10:20] = 0
    graphed = BuildAccessGraph()(mlp(w1, b1, w2))
    (dead,) = read_dead_units(graphed).values()
    assert dead.tolist() == list(range(10, 20))
    access = without(read_accesses(graphed)[_hidden_id()][0], dead)
    untouched = np.flatnonzero(access.incidence.sum(axis=0) == 0)
    assert untouched.tolist() == dead.tolist()
    assert "out:fc2" in read_accesses(graphed)


def test_a_few_dead_units_stay_in_their_group() -> None:
    w1, b1, w2 = mlp_weights()
    label = np.random.default_rng(0).permutation(np.repeat(np.arange(4), F // 4))
    w1[(np.arange(D) % 4)[:, None] != label[None, :]] = 0
    w2[[np.flatnonzero(label == group)[0] for group in range(3)]] = 0
    solver = DecidePermutation()
    solver(BuildAccessGraph()(mlp(w1, b1, w2)))
    order = solver.decisions[0].perm
    assert all(len(set(label[tile])) == 1 for tile in order.reshape(-1, 16))


def test_accesses_and_permutations_survive_save_and_load() -> None:
    w1, b1, w2 = mlp_weights()
    w2[::2] = 0
    graphed = BuildAccessGraph()(mlp(w1, b1, w2))
    decided = DecidePermutation()(graphed)
    loaded = tvm.ir.load_json(tvm.ir.save_json(decided))
    for before, after in zip(
        read_accesses(decided).values(), read_accesses(loaded).values(), strict=True
    ):
        assert (before[0].incidence != after[0].incidence).nnz == 0
        assert (before[0].tile, before[0].weight) == (after[0].tile, after[0].weight)
    (group, perm), *rest = read_permutations(loaded).items()
    assert (group, rest) == (_hidden_id(), [])
    assert set(perm[: F // 2]) == set(range(1, F, 2))


@pytest.mark.parametrize(("width", "pays"), [(16 * F, True), (F, False)])
def test_a_gather_must_pay(width: int, pays: bool) -> None:
    w1, b1, w2 = mlp_weights()
    w1, b1, w2 = np.tile(w1, width // F), np.tile(b1, width // F), np.tile(w2, (width // F, 1))
    label = np.random.default_rng(0).permutation(np.repeat([0, 1], D // 2))
    parity = np.arange(width) % 2
    w2[parity[:, None] != label[None, :]] = 0
    solver = DecidePermutation()
    solver(BuildAccessGraph()(mlp(w1, b1, w2)))
    decision = next(d for d in solver.decisions if d.group == "out:fc2")
    assert decision.improved is pays
    assert ("undoing the order would cost" in decision.stats["reason"]) is not pays


def test_same_seed_same_order() -> None:
    rng = np.random.default_rng(0)
    w1, b1, w2 = mlp_weights()
    w1[rng.random(w1.shape) < 0.9] = 0
    graphed = BuildAccessGraph()(mlp(w1, b1, w2))
    first, second = (read_permutations(DecidePermutation(seed=3)(graphed)) for _ in range(2))
    np.testing.assert_array_equal(first[_hidden_id()], second[_hidden_id()])


def test_every_field_of_an_access_travels() -> None:
    mask = sp.csr_matrix(np.random.default_rng(0).random((5, 12)) < 0.4)
    access = TileAccess(mask, 4, 1.5, "w", np.arange(5.0), padded=True, lanes=2)
    mod = tvm.IRModule().with_attr(COACCESS_BLOCK, to_attr({"g": [access]}))
    (read,) = read_accesses(tvm.ir.load_json(tvm.ir.save_json(mod)))["g"]
    left = without(access, np.array([3]))
    for other in (read, left):
        for field in ("tile", "weight", "label", "padded", "lanes"):
            assert getattr(other, field) == getattr(access, field), field
        np.testing.assert_array_equal(other.counts, access.counts)
    assert (read.incidence != access.incidence).nnz == 0
    assert left.incidence[:, [3]].nnz == 0


def test_no_attribute_reads_as_nothing() -> None:
    assert read_accesses(random_mlp()) == {}
    assert read_permutations(random_mlp()) == {}


def halves(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return w1 [D, 2 F]: the columns of one label share the rows that are not zero."""
    rng = np.random.default_rng(seed)
    kept = np.array([rng.permutation(D) < D // 2 for _ in range(labels.max() + 1)])
    return np.where(kept[labels].T, rng.standard_normal((D, labels.size)), 0).astype(np.float32)


def decided(mod: Any) -> tuple[dict[str, np.ndarray], Any, DecidePermutation]:
    solver = DecidePermutation()
    mod = solver(BuildAccessGraph(parse_target("x86-64-v4", 1))(mod))
    return read_permutations(mod), RewriteLayout()(mod), solver


def read_tiles(mod: Any) -> np.ndarray:
    """Return how many rows each run of 16 columns of the reordered w1 reads."""
    array = constants(mod)["w1"]
    return np.asarray((array.reshape(len(array), -1, 16) != 0).any(axis=2).sum(axis=0))


@pytest.mark.parametrize(("width", "segments"), [(F, [0, F]), (F - 8, [0])])
def test_segments_that_start_with_a_tile_make_a_group(width: int, segments: list[int]) -> None:
    w1 = halves(np.arange(2 * width))
    mod = gated_mlp(w1, mlp_weights()[2][:width])
    graph = read_accesses(BuildAccessGraph(parse_target("x86-64-v4", 1))(mod))
    accesses = graph[find_axis_groups(mod["main"]).free[0].id]
    assert [access.n for access in accesses] == [width] * len(segments)
    for access, start in zip(accesses, segments, strict=True):
        assert access.counts is not None
        touched = access.counts @ access.incidence
        assert touched.tolist() == (w1 != 0).sum(axis=0)[start : start + width].tolist()
    assert graph["out:fc1"][0].n == 2 * width


def test_halves_that_agree_share_one_order_without_a_gather() -> None:
    label = np.random.default_rng(1).permutation(np.repeat(np.arange(F // 16), 16))
    mod = gated_mlp(halves(np.concatenate([label, label + F // 16])), mlp_weights()[2])
    perms, rewritten, _ = decided(mod)
    assert list(perms) == [find_axis_groups(mod["main"]).free[0].id]
    assert read_tiles(rewritten).tolist() == [D // 2] * (2 * F // 16)
    np.testing.assert_allclose(run(rewritten, example()), run(mod, example()), rtol=1e-4, atol=1e-5)


def test_halves_that_do_not_agree_compete_with_an_order_of_their_own() -> None:
    label = np.random.default_rng(2).permutation(np.repeat(np.arange(2 * F // 16), 16))
    w1, w2 = np.tile(halves(label), (16, 1)), mlp_weights()[2]
    mod = gated_mlp(w1, np.tile(w2, 16))
    perms, rewritten, solver = decided(mod)
    assert "out:fc1" in perms
    assert read_tiles(rewritten).tolist() == [16 * D // 2] * (2 * F // 16)
    # It is charged against what the order of the group alone would leave.
    own = next(d for d in solver.decisions if d.group == "out:fc1").stats
    group = find_axis_groups(mod["main"]).free[0].id
    alone = RewriteLayout({group: perms[group]})(mod) if group in perms else mod
    assert own["U_before"] == 2 * 8 * 16 * read_tiles(alone).sum()
    x = np.random.default_rng(3).standard_normal((1, 8, 16 * D)).astype(np.float32)
    np.testing.assert_allclose(run(rewritten, x), run(mod, x), rtol=1e-3, atol=1e-3)


def test_an_order_of_its_own_leaves_dead_units_out() -> None:
    """What is counted is what is read once they are cut off."""
    label = np.random.default_rng(4).permutation(np.repeat(np.arange(2 * F // 32), 32))
    w1, w2 = np.tile(halves(label), (16, 1)), np.tile(mlp_weights()[2], 16)
    first = np.array([np.flatnonzero(label[:F] == own)[:4] for own in range(4)])
    w2[first.ravel()] = 0
    mod = gated_mlp(w1, w2)
    perms, rewritten, solver = decided(mod)
    assert "out:fc1" in perms
    assert constants(rewritten)["w1"].shape[1] == 2 * F - 32
    own = next(d for d in solver.decisions if d.group == "out:fc1")
    assert own.stats["U"] == 2 * 8 * 16 * read_tiles(rewritten).sum()
    x = np.random.default_rng(3).standard_normal((1, 8, 16 * D)).astype(np.float32)
    np.testing.assert_allclose(run(rewritten, x), run(mod, x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("copies", [1, 3])
def test_non_zeros_of_w_are_counted_by_support(copies: int) -> None:
    rng = np.random.default_rng(copies)
    masks = [np.repeat(rng.random((6, 8)) < 0.2, copies, axis=1) for _ in range(2)]
    masks[1][:, 0] = masks[0][:, 0] = False
    counts = np.array([0.0, 1, 2, 1, 1, 1])
    both = [TileAccess(sp.csr_matrix(mask), 4, counts=counts) for mask in masks]
    assert _graph_nnz(both) == build_w("tir", accesses=both).nnz > 0
