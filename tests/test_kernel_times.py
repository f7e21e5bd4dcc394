"""The profiled run: kernels in order, repeats and budget; the roof of the machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from icd_tvm._tvm import tvm
from icd_tvm.errors import MeasurementError
from icd_tvm.measure import peaks
from icd_tvm.measure.kernel_times import kernel_times
from icd_tvm.measure.peaks import machine_peaks
from icd_tvm.tir_schedules.cpu.stack import compile_kernel
from icd_tvm.tir_schedules.target import parse_target


class Machine:
    """Runs made-up kernels and tells its instrument as TVM's virtual machine does."""

    def __init__(self, kernels: Sequence[str], pause_s: float = 0.0) -> None:
        self.kernels = kernels
        self.pause_s = pause_s
        self.calls = 0

    def set_instrument(self, note: Any) -> None:
        self.note = note

    def call(self) -> None:
        self.calls += 1
        for name in ("vm.builtin.alloc_tensor", *self.kernels):
            self.note(None, name, True, None, 1)
            time.sleep(self.pause_s if name == "slow" else 0)
            self.note(None, name, False, None, 1)


def test_each_kernel_has_its_own_time_in_the_order_of_execution() -> None:
    machine = Machine(["quick", "slow", "quick"], 2e-3)
    seconds = kernel_times(machine, machine.call, ["quick", "slow", "quick"], repeats=5)
    assert seconds.shape == (5, 3)
    assert machine.calls == 6
    assert seconds[:, 1].min() >= 2e-3
    assert seconds.min() >= 0


def test_a_budget_ends_the_run_after_three_calls() -> None:
    machine = Machine(["slow"], 1e-3)
    seconds = kernel_times(machine, machine.call, ["slow"], repeats=1000, budget_s=0.0)
    assert seconds.shape == (3, 1)


@pytest.mark.parametrize("named", ["quick quick", "quick slow slow", "slow quick"])
def test_other_kernels_than_those_named_are_refused(named: str) -> None:
    machine = Machine(["quick", "slow"])
    with pytest.raises(MeasurementError, match="not the"):
        kernel_times(machine, machine.call, named.split())


def test_the_roof_is_measured_once_and_says_how() -> None:
    target = parse_target("x86-64-v3", 1)
    roof = machine_peaks(target)
    assert roof == machine_peaks(target)
    assert roof["source"].startswith("measured, fp32, threads: ")
    # No machine that runs this is slower than a gigaflop or a hundred megabytes a second.
    assert roof["peak_flops"] > 1e9
    assert roof["dram_bandwidth"] > 1e8
    assert roof["buffer_bytes"] >= 64 << 20


@pytest.mark.parametrize("level", ["x86-64-v3", "host"])
def test_the_reader_reads_every_number_once(level: str) -> None:
    target, parts, steps = parse_target(level, 1), 2, 3
    run = compile_kernel(peaks._row_sums(parts, steps), target)["main"]
    shape = (parts, steps * peaks._PAGE_LINES // peaks._SUMS, peaks._SUMS, 16)
    rows = np.random.default_rng(0).integers(-9, 10, shape).astype(np.float32)
    sums = tvm.runtime.tensor(np.full((parts, peaks._SUMS, 16), np.nan, np.float32))
    run(tvm.runtime.tensor(rows.reshape(parts, steps, peaks._PAGE_LINES, 16)), sums)
    np.testing.assert_array_equal(sums.numpy(), rows.sum(axis=1))
