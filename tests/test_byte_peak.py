"""The roof of byte products: the loop that is timed does every product it is credited with."""

from __future__ import annotations

import numpy as np
import pytest

from icd_tvm._tvm import tvm
from icd_tvm.errors import ConfigError
from icd_tvm.measure import byte_peak as module
from icd_tvm.measure.byte_peak import byte_peak
from icd_tvm.tir_schedules.cpu.dot_product import dot_product
from icd_tvm.tir_schedules.cpu.stack import compile_kernel
from icd_tvm.tir_schedules.target import host_target, parse_target

HOST = host_target(1)
needs_vnni = pytest.mark.skipif(not dot_product(HOST).native, reason="no vpdpbusd here")


@needs_vnni
def test_every_step_adds_four_products_to_each_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STEPS", 7)
    dot = dot_product(HOST)
    compiled = compile_kernel(module._chains(dot, 3), HOST)
    weights = np.arange(4 * dot.lanes, dtype=np.int8)
    sums = tvm.runtime.tensor(np.ones((3, module._CHAINS, dot.lanes), np.int32))
    compiled["main"](tvm.runtime.tensor(weights), sums)
    expected = 1 + 7 * weights.astype(np.int32).reshape(-1, 4).sum(axis=1)
    assert (sums.numpy() == expected).all()
    assert compiled.mod.inspect_source("asm").count("vpdpbusd") >= module._CHAINS


@needs_vnni
def test_a_peak_is_a_rate() -> None:
    assert 1e9 < byte_peak(HOST) < 1e16


def test_a_target_without_byte_products_has_no_peak() -> None:
    with pytest.raises(ConfigError, match="vpdpbusd"):
        byte_peak(parse_target("x86-64-v3", 1))
