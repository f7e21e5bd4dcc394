"""Weights that stay in their file while a module uses them as constants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from icd_tvm._tvm import GenericConst, const_name, relax
from icd_tvm.models.importer import ImportedModel, import_onnx
from icd_tvm.models.inputs import random_inputs
from icd_tvm.models.mamba import MAMBA_MINI, build_mamba_step, mamba_states, random_mamba_weights
from icd_tvm.models.mapped_weights import bind_weights, release
from icd_tvm.models.onnx_writer import PAGE
from icd_tvm.relax_passes.axis_groups import find_axis_groups
from icd_tvm.runtime.build import build
from icd_tvm.tir_schedules.target import host_target

STATES = mamba_states(MAMBA_MINI)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    weights = random_mamba_weights(MAMBA_MINI)
    model = build_mamba_step(MAMBA_MINI, weights, data=tmp_path / "weights.bin")
    onnx.save(model, tmp_path / "step.onnx")
    return tmp_path / "step.onnx"


def constants(imported: ImportedModel) -> dict[str, GenericConst]:
    found: dict[str, GenericConst] = {}

    def visit(expr: object) -> None:
        if isinstance(expr, GenericConst) and const_name(expr):
            found[const_name(expr)] = expr

    relax.analysis.post_order_visit(imported.mod["main"], visit)
    return found


def test_bound_weights_compute_the_same(path: Path) -> None:
    bound, plain = bind_weights(import_onnx(path, parameters=True)), import_onnx(path)
    assert [p.name for p in bound.mod["main"].params] == [spec.name for spec in bound.inputs]
    feeds, target = random_inputs(plain), host_target(1)
    expected = build(plain.mod, target).run_all(feeds)
    for got, want in zip(build(bound.mod, target).run_all(feeds), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max())


def test_bound_weights_have_the_groups_of_parameters(path: Path) -> None:
    imported = import_onnx(path, parameters=True)
    bound = find_axis_groups(bind_weights(imported).mod["main"], opaque_states=STATES)
    free = find_axis_groups(imported.mod["main"], opaque_states=STATES)
    assert sorted(g.size for g in bound.free) == sorted(g.size for g in free.free)


def test_constants_share_the_mapped_memory(path: Path) -> None:
    imported = import_onnx(path, parameters=True)
    found = constants(bind_weights(imported))
    for name, array in imported.parameters.items():
        np.testing.assert_array_equal(found[name].value.numpy(), array)
    name, array = next(iter(imported.parameters.items()))
    array.flat[0] = 7.5  # only in memory: the mapping is private
    assert found[name].value.numpy().flat[0] == 7.5
    release(imported.parameters)
    assert found[name].value.numpy().flat[0] != 7.5  # read from the file again


def test_every_tensor_starts_on_a_page(path: Path) -> None:
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    places = [{e.key: e.value for e in tensor.external_data} for tensor in tensors]
    offsets = [int(place["offset"]) for place in places if place]
    assert len(offsets) > 4
    assert all(offset % PAGE == 0 for offset in offsets)
