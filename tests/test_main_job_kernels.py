"""What the re-permuted module runs: fused kernels on packed constants, nothing that moves data."""

from typing import Any

import pytest
from relax_models import constants

from icd_tvm._tvm import Call, Op, apply_pass
from icd_tvm.adapters.sparsity import parse_sparsity
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.registry import build
from icd_tvm.relax_passes.apply_sparsity import ApplySparsity
from icd_tvm.relax_passes.lower_cpu import cpu_pipeline
from icd_tvm.relax_passes.repermute_pass import RepermutePass
from icd_tvm.tir_schedules.target import host_target

MOVES = ("transpose", "permute", "reshape", "layout", "pack", "copy", "split", "concat")


def _called(mod: Any) -> list[str]:
    """Return the names of the kernels that ``main`` calls, in order."""
    names = []
    for block in mod["main"].body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, Call) and isinstance(value.op, Op):
                names.append(
                    value.args[0].name_hint if value.op.name == "relax.call_tir" else value.op.name
                )
    return names


@pytest.fixture(scope="module")
def kernels() -> list[str]:
    imported = import_onnx(build("bert-mini-random", seq=32))
    pruned = apply_pass(ApplySparsity(parse_sparsity("unit:0.5")), imported.mod)
    ordered = apply_pass(RepermutePass(), pruned)
    target = host_target(1)
    with target:
        return _called(cpu_pipeline(target, tune=False)(ordered))


def test_nothing_moves_data_at_run_time(kernels: list[str]) -> None:
    assert [name for name in kernels if any(move in name for move in MOVES)] == []


def test_every_matmul_is_a_packed_kernel(kernels: list[str]) -> None:
    matmuls = [name for name in kernels if "matmul" in name]
    assert len(matmuls) == 2 * 4
    assert all("dense_matmul" in name for name in matmuls)


def test_one_layer_is_seven_kernels(kernels: list[str]) -> None:
    assert len(kernels) <= 2 * 7 + 6


def test_only_kernels_are_called(kernels: list[str]) -> None:
    assert not [name for name in kernels if name.startswith("relax.")]


def test_half_of_each_ffn_is_gone() -> None:
    imported = import_onnx(build("bert-mini-random", seq=32))
    pruned = apply_pass(ApplySparsity(parse_sparsity("unit:0.5")), imported.mod)
    shapes = [array.shape for array in constants(apply_pass(RepermutePass(), pruned)).values()]
    assert shapes.count((64, 128)) == 2
    assert shapes.count((128, 64)) == 2
    assert (64, 256) not in shapes
