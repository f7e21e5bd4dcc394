"""Transposes in registers: the kernel, and where the legalisation takes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cpu_kernels import run
from test_cpu_lowering import execute, module

from icd_tvm._tvm import relax
from icd_tvm.errors import ShapeError
from icd_tvm.relax_passes.lower_cpu import cpu_pipeline
from icd_tvm.tir_schedules.cpu.transpose import transpose
from icd_tvm.tir_schedules.target import host_target, parse_target, vector_bits

TARGET = host_target(2)
few = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@few
@given(
    lead=st.sampled_from([(), (1,), (3,), (2, 2)]),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    target=st.sampled_from([TARGET, parse_target("x86-64-v3", 1), parse_target("x86-64", 1)]),
)
def test_kernel(lead: tuple[int, ...], rows: int, columns: int, target: Any) -> None:
    lanes = vector_bits(target) // 32
    shape = (*lead, rows * lanes, columns * lanes)
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    turned = x.swapaxes(-1, -2)
    np.testing.assert_array_equal(run(transpose(shape, target), [x], turned.shape, target), turned)


@pytest.mark.parametrize("shape", [(16,), (16, 17), (17, 16), (0, 16, 16)])
def test_other_sizes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="a transpose of"):
        transpose(shape, TARGET)


@pytest.mark.parametrize(
    ("shape", "axes", "taken"),
    [
        ((128, 192), (1, 0), True),
        ((1, 128, 192), (0, 2, 1), True),
        ((16, 16), (1, 0), False),  # small
        ((130, 192), (1, 0), False),  # ragged
        ((16, 16, 96), (2, 0, 1), False),
        ((2, 2, 64, 96), (0, 1, 3, 2), False),
    ],
)
def test_large_swaps_of_the_last_two_axes_take_it(
    shape: tuple[int, ...], axes: tuple[int, ...], taken: bool
) -> None:
    mod = module(lambda emit, x: emit(relax.op.exp(emit(relax.op.permute_dims(x, axes)))), x=shape)
    with TARGET:
        lowered = cpu_pipeline(TARGET)(mod)
    names = [name.name_hint for name, _ in lowered.functions_items()]
    assert ("transpose" in names) == taken
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    np.testing.assert_allclose(execute(mod, x), np.exp(x.transpose(axes)), rtol=1e-6)
