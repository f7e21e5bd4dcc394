"""Models for sm_90a: products of many rows are those of warpgroups, and machine code says so."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from cuda_cases import needs_compiler
from cuda_modules import EmulatedModule, selected
from relax_models import example, mlp, mlp_weights, run

from icd_tvm.errors import IcdError
from icd_tvm.runtime.cross_compile import check_machine_code, cross_compile
from icd_tvm.tir_schedules.cuda.archs import HOPPER


@needs_compiler
def test_many_rows_are_multiplied_by_warpgroups(tmp_path: Path) -> None:
    mod, x = mlp(*mlp_weights(), rows=256), example(256)
    made, chosen = selected(mod, arch=HOPPER)
    assert [kernel.family for kernel in chosen.kernels.values()] == ["gemm_wgmma"] * 2
    (found,), right = EmulatedModule(made, chosen, tmp_path)({"x": x}), run(mod, x)
    # Operands and what lies between them are rounded.
    assert np.abs(found - right).max() <= 4e-3 * np.abs(right).max()
    for rows, arch in ((256, "sm_90"), (8, HOPPER)):
        _, others = selected(mlp(*mlp_weights(), rows=rows), arch=arch)
        assert {kernel.family for kernel in others.kernels.values()} == {"gemm"}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
def test_a_library_holds_code_of_this_target(tmp_path: Path) -> None:
    mod, library = mlp(*mlp_weights(), rows=256), tmp_path / "a.so"
    (found,) = cross_compile(mod, HOPPER, library, "float16")
    assert found.arch == HOPPER
    assert b".text.gemm_wgmma_kernel" in library.read_bytes()
    with pytest.raises(IcdError, match="no machine code of sm_90"):
        check_machine_code(library, "sm_90")
