"""Weights as parameters: imported unread, analysed alike, permuted on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from axis_models import TARGET
from converter_check import run_ort

from icd_tvm._tvm import relax, tvm
from icd_tvm.errors import ModelFileError, PermutationError
from icd_tvm.models.bert import BERT_MINI, build_bert, random_bert_weights
from icd_tvm.models.importer import ImportedModel, import_onnx
from icd_tvm.models.inputs import random_inputs
from icd_tvm.models.mamba import MAMBA_MINI, build_mamba_step, mamba_states, random_mamba_weights
from icd_tvm.relax_passes.axis_groups import find_axis_groups
from icd_tvm.relax_passes.permute_constants import permute_groups
from icd_tvm.relax_passes.permute_parameters import permute_with_parameters, weight_params


@pytest.fixture(scope="module")
def proto() -> onnx.ModelProto:
    return build_bert(BERT_MINI, random_bert_weights(BERT_MINI), seq=8)


def run(mod: Any, imported: ImportedModel, weights: Any) -> np.ndarray:
    vm = relax.VirtualMachine(tvm.compile(mod, target=TARGET), tvm.cpu())
    arrays = [random_inputs(imported)[spec.name] for spec in imported.inputs]
    arrays += [np.asarray(weights[param.name]) for param in weight_params(mod)]
    return vm["main"](*map(tvm.runtime.tensor, arrays)).numpy()


def test_large_weights_become_named_parameters(proto: onnx.ModelProto) -> None:
    imported = import_onnx(proto, parameters=True)
    main = imported.mod["main"]
    assert int(main.attrs["num_input"]) == len(imported.inputs) == 3
    names = [param.name for param in weight_params(imported.mod)]
    assert names == list(imported.parameters)
    assert "encoder.layer.0.intermediate.dense.weight" in names
    found = run(imported.mod, imported, imported.parameters)
    expected = run_ort(proto, random_inputs(imported))[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_the_same_axes_are_free_and_permuting_arrays_keeps_the_function(
    proto: onnx.ModelProto,
) -> None:
    bound, imported = import_onnx(proto), import_onnx(proto, parameters=True)
    groups = find_axis_groups(imported.mod["main"])
    sizes = [
        sorted(g.size for g in find_axis_groups(m.mod["main"]).free) for m in (bound, imported)
    ]
    # The rows of the position table are read by constant ids, which can follow any order.
    assert sorted([*sizes[0], 64]) == sizes[1]
    rng = np.random.default_rng(0)
    perms = {group.id: rng.permutation(group.size) for group in groups.free}
    mod, arrays = permute_with_parameters(imported.mod, groups, perms, imported.parameters)
    changed = [n for n, a in arrays.items() if not np.array_equal(a, imported.parameters[n])]
    assert len(changed) == 13  # q, k, v, o, up and down of two layers, and the positions
    expected = run(imported.mod, imported, imported.parameters)
    found = run(mod, imported, arrays)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    with pytest.raises(PermutationError, match=r"holds parameter .*permute_with_parameters"):
        permute_groups(imported.mod, groups, perms)


def test_missing_and_wrong_arrays_are_refused(proto: onnx.ModelProto) -> None:
    imported = import_onnx(proto, parameters=True)
    groups = find_axis_groups(imported.mod["main"])
    group = next(group for group in groups.free if group.size == 256)
    perms = {group.id: np.roll(np.arange(256), 1)}
    with pytest.raises(PermutationError, match="no array is given for parameter 'encoder"):
        permute_with_parameters(imported.mod, groups, perms, {})
    wrong = {name: array.T for name, array in imported.parameters.items()}
    with pytest.raises(PermutationError, match=r"has shape \(256, 64\), the function says"):
        permute_with_parameters(imported.mod, groups, perms, wrong)


def test_external_data_is_mapped_and_not_read(tmp_path: Path) -> None:
    weights = random_mamba_weights(MAMBA_MINI)
    model = build_mamba_step(MAMBA_MINI, weights, data=tmp_path / "weights.bin")
    onnx.save(model, tmp_path / "step.onnx")
    imported = import_onnx(tmp_path / "step.onnx", parameters=True)
    assert imported.parameters
    assert all(isinstance(array, np.memmap) for array in imported.parameters.values())
    states = mamba_states(MAMBA_MINI)
    groups = find_axis_groups(imported.mod["main"], opaque_states=states)
    whole = import_onnx(tmp_path / "step.onnx")
    expected = find_axis_groups(whole.mod["main"], opaque_states=states)
    # The embedding is one parameter, read by rows and as output weight, and so ties its uses.
    assert {g.size for g in groups.free} == {g.size for g in expected.free}
    (tmp_path / "weights.bin").write_bytes(b"short")
    with pytest.raises(ModelFileError, match="cannot be read"):
        import_onnx(tmp_path / "step.onnx", parameters=True)
