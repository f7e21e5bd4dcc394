"""Energy windows on a simulated counter, RAPL files, and NVML behind a stand-in."""

from __future__ import annotations

import json
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icd_tvm.errors import MeasurementError
from icd_tvm.measure import nvml
from icd_tvm.measure.energy import RaplCounter, as_json, measure_energy, open_counter


class Chip:
    """A clock and an energy counter that ticks; calls move both."""

    source = "simulated"

    def __init__(self, tick_s: float = 0.1, idle_watts: float = 20.0) -> None:
        self.now, self.energy, self.shown, self.tick = 0.0, 0.0, 0.0, tick_s
        self.idle_watts, self.next_tick = idle_watts, tick_s

    def spend(self, seconds: float, watts: float) -> None:
        left = seconds
        while left > 0:
            step = min(left, self.next_tick - self.now)
            self.now, self.energy, left = self.now + step, self.energy + step * watts, left - step
            if self.next_tick - self.now < 1e-9:
                self.shown, self.next_tick = self.energy, self.next_tick + self.tick

    def joules(self) -> float:
        return self.shown

    def arm(self, seconds: float, watts: float) -> Callable[[], None]:
        return lambda: self.spend(seconds, watts)

    def sleep(self, seconds: float) -> None:
        self.spend(seconds, self.idle_watts)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.002, 0.05), st.floats(0.002, 0.05), st.floats(30, 200), st.floats(0.02, 0.1))
def test_windows_find_the_planted_energies(
    first: float, second: float, watts: float, tick: float
) -> None:
    chip = Chip(tick)
    arms = {"a": chip.arm(first, watts), "b": chip.arm(second, 2 * watts)}
    found = measure_energy(arms, chip, clock=lambda: chip.now, sleep=chip.sleep)
    for name, joules, seconds in (("a", first * watts, first), ("b", 2 * second * watts, second)):
        # A tick may fall inside a call: one call, or one tick, of a window of five seconds.
        slack = 2 * (seconds + tick) / 5
        assert found[name].joules_per_call == pytest.approx(joules, rel=slack)
        idle = joules - seconds * chip.idle_watts
        assert found[name].net_joules_per_call == pytest.approx(idle, abs=joules * slack)
    assert found["a"].watts == pytest.approx(watts, rel=2 * (first + tick) / 5)


def test_arms_run_in_order_and_back_and_the_record_is_json() -> None:
    chip, order = Chip(), []

    def arm(name: str) -> Callable[[], None]:
        def call() -> None:
            if not order or order[-1] != name:
                order.append(name)
            chip.spend(0.05, 50)

        return call

    arms = {"a": arm("a"), "b": arm("b")}
    found = measure_energy(arms, chip, idle_s=0, clock=lambda: chip.now, sleep=chip.sleep)
    # Neighbouring windows of one arm merge: A-B B-A A-B B-A.
    assert order == ["a", "b", "a", "b", "a"]
    assert found["a"].net_joules_per_call is None
    assert all(w.seconds >= 5 for w in found["a"].windows)
    assert json.loads(json.dumps(as_json(found["a"])))["source"] == "simulated"


def test_a_counter_that_stands_still_is_no_measurement() -> None:
    chip = Chip(tick_s=1e9)
    with pytest.raises(MeasurementError, match="stood still"):
        measure_energy({"a": chip.arm(0.1, 9)}, chip, clock=lambda: chip.now, sleep=chip.sleep)


@pytest.mark.parametrize(
    ("arms", "options", "match"),
    [
        ({}, {}, "no arms"),
        ({"a": print}, {"window_s": 1.0}, "too short"),
        ({"a": print}, {"windows": 5}, "even"),
    ],
)
def test_bad_requests_are_refused(arms: Any, options: Any, match: str) -> None:
    with pytest.raises(MeasurementError, match=match):
        measure_energy(arms, Chip(), **options)


def rapl(root: Path, micro_joules: int, name: str = "intel-rapl:0") -> Path:
    zone = root / "sys/class/powercap" / name
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "energy_uj").write_text(f"{micro_joules}\n")
    (zone / "max_energy_range_uj").write_text("1000000\n")
    return zone


def test_rapl_sums_sockets_and_survives_a_wrap(tmp_path: Path) -> None:
    zone = rapl(tmp_path, 900_000)
    other = rapl(tmp_path, 0, "intel-rapl:1")
    rapl(tmp_path, 5, "intel-rapl:0:0")  # a core inside socket 0 is not counted again
    counter = RaplCounter(tmp_path)
    assert counter.joules() == 0
    (zone / "energy_uj").write_text("100000")
    (other / "energy_uj").write_text("300000")
    assert counter.joules() == pytest.approx(0.5)


def test_no_rapl_is_explained(tmp_path: Path) -> None:
    counter, reason = open_counter(tmp_path)
    assert counter is None
    assert "powercap" in reason
    zone = rapl(tmp_path, 1)
    (zone / "energy_uj").write_text("garbage")
    assert "cannot be read" in open_counter(tmp_path)[1]


class FakeNvml(types.SimpleNamespace):
    """The part of pynvml that is used; ``refuse`` names calls that fail."""

    NVML_SUCCESS, NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 0, 1, 2, 0

    class NVMLError(Exception):
        """Stands for every NVML error."""

    def __init__(self, refuse: dict[str, str] | None = None, instant: int = 0) -> None:
        super().__init__()
        self.refuse, self.instant = refuse or {}, instant

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            raise AttributeError(name)

        def call(*_: Any) -> Any:
            if name in self.refuse:
                raise self.NVMLError(self.refuse[name])
            field = types.SimpleNamespace(
                nvmlReturn=self.instant, value=types.SimpleNamespace(uiVal=250_000)
            )
            answers = {
                "nvmlDeviceGetTotalEnergyConsumption": 12_500,
                "nvmlDeviceGetFieldValues": [field],
                "nvmlDeviceGetPowerUsage": 300_000,
                "nvmlDeviceGetClockInfo": 1980,
            }
            return answers.get(name, 40)

        return call


def test_nvml_reads_counter_power_and_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "pynvml", FakeNvml({"nvmlDeviceGetTemperature": "Not Supported"}))
    device = nvml.NvmlDevice()
    assert device.joules() == 12.5
    sample = device.sample()
    assert (sample.watts, sample.sm_mhz, sample.celsius) == (250.0, 1980, None)
    assert device.power_window == "instant"


def test_nvml_says_what_its_power_averages_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "pynvml", FakeNvml(instant=3))
    device = nvml.NvmlDevice()
    assert "one second" in device.power_window
    assert device.sample().watts == 300.0


@pytest.mark.parametrize(
    ("text", "hint"), [("Driver Not Loaded", "driver"), ("Not Supported", "Volta")]
)
def test_nvml_failures_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, text: str, hint: str
) -> None:
    monkeypatch.setattr(nvml, "pynvml", FakeNvml({"nvmlDeviceGetHandleByIndex": text}))
    with pytest.raises(MeasurementError, match=hint):
        nvml.NvmlDevice()


def test_sampling_fills_while_the_body_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "pynvml", FakeNvml())
    with nvml.NvmlDevice().sampling(rate_hz=200) as samples:
        deadline = time.perf_counter() + 5
        while len(samples) < 3 and time.perf_counter() < deadline:
            time.sleep(0.005)
    assert len(samples) >= 3
    text = nvml.power_csv(samples).splitlines()
    assert text[0] == "t,watts,sm_mhz,memory_mhz,celsius,throttle"
    assert len(text) == len(samples) + 1
    assert nvml.power_csv([nvml.PowerSample(1.0, 2.0, None, 3, None, None)]).endswith(
        "1.0,2.0,,3,,\n"
    )


def test_power_is_integrated_by_trapezoids() -> None:
    def sample(t: float, watts: float) -> nvml.PowerSample:
        return nvml.PowerSample(t, watts, None, None, None, None)

    assert nvml.integral_joules([sample(0, 100), sample(1, 200), sample(3, 200)]) == 550
    assert nvml.integral_joules([sample(0, 100)]) is None
