"""Models of the GPU suite whose middle layer is repeated: their modules, weights and memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_on_cpu import Actual, NoGraphs, OnCpu, opened

from benchmarks.gpu import build_models, lift, model_times, peers
from benchmarks.gpu import models as models_module
from benchmarks.gpu.arm_modules import BASE_LAYERS, DEPTHS, MAMBA_TEST, MODELS, Arms, Orders
from benchmarks.gpu.cases import (
    ARMS,
    CASES,
    INDEX,
    MAMBA,
    MAMBA_SIZES,
    NOTES,
    PART,
    UNIT,
    VECTORS,
    Case,
)
from benchmarks.gpu.machine import TvmMachine
from benchmarks.gpu.recipes import Pool, as_json, from_json, quantised, realise
from benchmarks.gpu.repeat_layers import repeat_layers
from icd_tvm._tvm import apply_pass, const_name, relax, tvm
from icd_tvm.adapters.quant import parse_quant, quantize
from icd_tvm.errors import MeasurementError
from icd_tvm.measure.cuda_timing import Clock
from icd_tvm.models.bert import BERT_MINI, build_bert, random_bert_weights
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.mamba import (
    MambaConfig,
    build_mamba_step,
    mamba_states,
    random_mamba_weights,
)
from icd_tvm.relax_passes.attach_layout_tags import AttachLayoutTags
from icd_tvm.relax_passes.cuda_sparse_products import paying_blocks
from icd_tvm.relax_passes.lower_cuda import lower_cuda
from icd_tvm.tir_schedules.cuda.gemm import SLAB
from icd_tvm.tir_schedules.target import cuda_target

DEEP = Case("mamba-2.8b deep test", 1, 1, UNIT)
DEEP_VECTORS = replace(DEEP, sparsity=VECTORS)
DEEP_INT8 = replace(DEEP, dtype="int8")


@pytest.fixture(scope="module", autouse=True)
def constants_are_parameters() -> Iterator[None]:
    """Lift all that is lifted at the real size: norms, biases."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lift, "KEPT_BYTES", 64)
        yield


@pytest.fixture(scope="module")
def folder(constants_are_parameters: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("deep")
    build_models.build_models(place, OnCpu("sm_90"), (DEEP, DEEP_VECTORS, DEEP_INT8), 2.0)
    return place


def lifted(*bases: int) -> tuple[Any, list[Any]]:
    """Return a lowered Mamba with its constants as parameters, and those.

    It has a layer for each number, with the weights of that layer of another.
    """
    config = replace(MAMBA_TEST, layers=len(bases))
    random = random_mamba_weights(config)
    known = dict(random)
    for layer, base in enumerate(bases):
        own, other = f"layers.{layer}.", f"layers.{base}."
        known |= {n: random[n.replace(own, other)] for n in random if own in n}
    mod = import_onnx(build_mamba_step(config, known)).mod
    mod = apply_pass(AttachLayoutTags(mamba_states(config)), mod)
    low = lower_cuda(mod, cuda_target("sm_90"), "float16")
    return lift.lift(low, lift.matrices(mod))


def test_repeated_layers_are_the_longer_model() -> None:
    bases = (0, 1, 1, 1, 1, 2)
    (short, constants), (long, every) = lifted(*range(BASE_LAYERS)), lifted(*bases)
    wide = repeat_layers(short, constants, 6)
    relax.analysis.well_formed(wide.mod)  # raises where it is not
    tvm.ir.assert_structural_equal(wide.mod["main"], long["main"], map_free_vars=True)
    names = [str(p.name) for p in wide.mod["main"].params[:13]]
    assert names == ["input_ids", *(old for old, _ in mamba_states(replace(MAMBA_TEST, layers=6)))]
    assert int(wide.mod["main"].attrs["num_input"]) == 13
    # Layers 1 to 4 are the second one, and 5 is the third.
    named = {place: const_name(const) for const, places in zip(constants, wide.places, strict=True)
             for place in places}  # fmt: skip
    for place, const in enumerate(every):
        name = const_name(const)
        for layer, base in enumerate(bases):
            if f"layers.{layer}." in name:
                assert named[place] == name.replace(f"layers.{layer}.", f"layers.{base}.")
                break
        else:
            assert named[place] == name
    # Kernels are shared.
    assert len(wide.mod.get_global_vars()) == len(short.get_global_vars())


def test_a_longer_middle_is_repeated_as_a_whole() -> None:
    long = lifted(0, 1, 2, 1, 2, 3)[0]
    wide = repeat_layers(*lifted(*range(4)), 6)
    tvm.ir.assert_structural_equal(wide.mod["main"], long["main"], map_free_vars=True)


@pytest.mark.parametrize(("base", "layers"), [(2, 6), (3, 2), (4, 7)])
def test_other_depths_are_refused(base: int, layers: int) -> None:
    with pytest.raises(MeasurementError, match=f"{base} layers cannot be repeated to {layers}"):
        repeat_layers(*lifted(*range(base)), layers)


def test_a_model_without_states_is_refused() -> None:
    config = replace(BERT_MINI, hidden=64, ffn=128)
    mod = import_onnx(build_bert(config, random_bert_weights(config), 8, 1)).mod
    low = relax.transform.LegalizeOps()(mod)
    with pytest.raises(MeasurementError, match="no layers to repeat"):
        repeat_layers(*lift.lift(low), 6)


def test_arms_of_a_deep_model_are_one_function(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = opened(folder)
    monkeypatch.setattr(model_times, "ROUNDS", 1)
    found = model_times.measure_models(NoGraphs(), models, Clock(480.0))  # type: ignore[arg-type]
    for case in (DEEP, DEEP_VECTORS, DEEP_INT8):
        item = found[case.name]
        assert item["values"]["equal"], item
        assert max(item["values"]["relative_differences"].values()) < 1e-4
        arm = models.cases[case.name]["arms"]["iterative"]
        assert len(arm["inputs"]) == 13
        assert arm["inputs"][-1]["name"] == "ssm_5"
        copies = {len(parameter["places"]) for parameter in arm["parameters"]}
        assert copies == {1, 4}
    assert models.cases[DEEP_INT8.name]["orders"] == models.cases[DEEP.name]["orders"]
    sizes = found[DEEP.name]["parameter_bytes"]
    assert sizes["iterative"] < 0.8 * sizes["linear"]
    assert found[DEEP_INT8.name]["parameter_bytes"]["linear"] < 0.6 * sizes["linear"]


def test_orders_fit_the_blocks_of_the_device() -> None:
    arms = Arms(DEEP_VECTORS, Orders(2.0))
    names = [n for n in arms.drawn if n.endswith(("in_proj.weight", "out_proj.weight"))]
    assert len(names) == 2 * BASE_LAYERS
    for arm, pays in (("linear", False), ("iterative", True)):
        known = lift.matrices(arms.make(arm)[0])
        weights = [known[name].value.numpy() for name in names]
        lists = [paying_blocks(weight) for weight in weights]
        assert [blocks is not None for blocks in lists] == [pays] * len(names)
        for weight, blocks in zip(weights, lists, strict=True):
            assert blocks is None or 2 * blocks.shape[1] * SLAB == len(weight)


def test_weights_of_repeated_layers_lie_in_memory_of_their_own(folder: Path) -> None:
    models = opened(folder)
    run = models.runs(DEEP.name, ("linear",), sets=1)["linear"]
    tensors = run._parameters
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
    item = next(p for p in models.cases[DEEP.name]["arms"]["linear"]["parameters"]
                if len(p["places"]) == 4 and "sources" in p)  # fmt: skip
    first, *others = (tensors[place].numpy() for place in item["places"])
    for other in others:
        np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("sparsity", [UNIT, VECTORS])
def test_recipes_make_codes_and_scales_of_cuda_kernels_again(sparsity: str) -> None:
    arms = Arms(replace(DEEP_INT8, sparsity=sparsity), Orders(2.0))
    packings = set[str]()
    for name in ("dense", "iterative"):
        mod = arms.make(name)[0]
        lowered = build_models.Device("sm_90").lower(arms.narrowed(mod), "int8")
        _, constants = lift.lift(lowered, arms.drawn)
        pool, shapes = Pool(), arms.drawn.shapes
        known = lift.Recogniser(mod, partial(arms.codes, name), shapes, arms.coded)
        known.look(constants)
        for const in filter(known.drawn, constants):
            recipe = from_json(as_json(known.recipe(const), pool), pool)
            packings.add(f"{recipe.packing} {recipe.dtype}")
            np.testing.assert_array_equal(realise(recipe, Actual(arms.drawn)), const.value.numpy())
    assert {"scale float32", "transposed int8"} <= packings
    assert ("gemv live int8" in packings) == (sparsity == VECTORS)


def test_codes_are_those_of_the_transform_in_any_order() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((96, 1100)).astype(np.float32)
    w[::3], w[:, 5] = 0, 0
    codes, scales = quantised(w)
    tensor, _ = quantize(w, parse_quant("int8"))
    np.testing.assert_array_equal(codes, tensor.codes)
    np.testing.assert_array_equal(scales, tensor.scales[0])
    rows, columns = rng.permutation(96), rng.permutation(1100)
    moved, moved_scales = quantised(w[rows][:, columns])
    np.testing.assert_array_equal(moved, codes[rows][:, columns])
    np.testing.assert_array_equal(moved_scales, scales[columns])
    alive = np.arange(96) % 3 != 0
    np.testing.assert_array_equal(quantised(w[alive])[0], codes[alive])


class Small(TvmMachine):
    """A device that says how many bytes are free."""

    free = 0

    def free_bytes(self) -> int:
        return self.free


def test_weights_that_do_not_fit_are_refused_and_others_dropped(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models_module, "WORKSPACE", 0)
    models = opened(folder, lambda place: Small(NoGraphs(), place))  # type: ignore[arg-type]
    with pytest.raises(MeasurementError, match="GB of weights do not fit the device's free memory"):
        models.runs(DEEP.name, ("linear",), sets=1)
    monkeypatch.setattr(Small, "free", 1 << 30)
    models.runs(DEEP.name, ("linear",), sets=1)
    first = set(models._tensors)
    models.runs(DEEP_VECTORS.name, ("linear",), sets=1)
    assert first < set(models._tensors)
    monkeypatch.setattr(Small, "free", 0)
    models.runs(DEEP_VECTORS.name, ("linear",), sets=1)
    with pytest.raises(MeasurementError, match="do not fit"):
        models.runs(DEEP_INT8.name, ("linear",), sets=1)
    assert not first <= set(models._tensors)


def test_the_part_is_measured_where_the_whole_is_refused(tmp_path: Path) -> None:
    whole, part = (Case(model, 1, 1, UNIT) for model in (MAMBA, PART))
    assert part.stands_for == whole.name
    assert whole.stands_for == ""
    assert CASES.index(whole) < CASES.index(part)
    cases = {
        whole.name: {"refused": "why"},
        part.name: {"refused": "why", "stands_for": whole.name},
    }
    (tmp_path / INDEX).write_text(json.dumps({"arch": "sm_90", "notes": {}, "cases": cases}))
    Pool().save(tmp_path / "arrays.npz")
    models = opened(tmp_path)
    assert models.superfluous(part.name, {whole.name: {"values": {}}})
    assert not models.superfluous(part.name, {whole.name: "not measured: too large"})
    assert not models.superfluous(whole.name, {part.name: {}})


def test_the_whole_model_has_its_real_size() -> None:
    config = MODELS[MAMBA]
    assert isinstance(config, MambaConfig)
    assert (config.hidden, config.inner, config.rank, config.vocab) == (2560, 5120, 160, 50280)
    assert (config.layers, DEPTHS[MAMBA]) == (BASE_LAYERS, 64)
    assert MAMBA_SIZES[MAMBA] == (64, 50280)
    wanted = {(s, d) for s in (UNIT, VECTORS) for d in ("float16", "int8")}
    assert {(c.sparsity, c.dtype) for c in CASES if c.model == MAMBA} == wanted
    assert "memory of their own" in NOTES[MAMBA]
    assert set(ARMS) == {"dense", "identity", "random", "linear", "iterative"}
    assert peers.MAMBA_SIZES is MAMBA_SIZES


def test_a_table_of_more_words_keeps_their_order() -> None:
    words, order = np.arange(4, dtype=np.int32), np.array([2, 0, 1], np.int32)
    source = lift.Source("t", words, order)
    longer = lift._longer(source, (4, 3), (9, 3))
    assert longer is not None
    assert longer.rows.tolist() == list(range(9))
    assert longer.columns.tolist() == [2, 0, 1]
    assert lift._longer(replace(source, rows=words[::-1]), (4, 3), (9, 3)) is None
    assert lift._longer(replace(source, alive=np.ones((4, 3), bool)), (4, 3), (9, 3)) is None
