"""A prompt through the kernels of a Mamba layer on the CPU, against float64, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from cuda_cases import EPS, ORDERS, close, needs, needs_compiler, plant
from cuda_emulation import Emulated, numpy_dtype

from icd_tvm.tir_schedules.cuda.mamba_step import scan_step_rule
from icd_tvm.tir_schedules.cuda.prefill_scan import prefill_conv_rule, prefill_scan_rule
from icd_tvm.tir_schedules.cuda.source_kernel import Rule


class Case(NamedTuple):
    batch: int
    length: int
    channels: int
    states: int
    dtype: str
    conv: bool
    chunk: int

    def rule(self) -> Rule:
        return prefill_scan_rule(*self[:5], conv=self.conv, chunk=self.chunk)


CASES = {
    "one chunk": Case(2, 37, 24, 16, "float16", False, 48),
    "chunks": Case(2, 70, 136, 16, "float16", False, 32),
    "conv": Case(1, 50, 24, 16, "bfloat16", True, 64),
    "conv, chunks": Case(2, 50, 40, 16, "float16", True, 16),
    "two steps": Case(2, 2, 8, 8, "float16", True, 16),
    "128 states": Case(1, 33, 24, 128, "float16", True, 16),
    "4 states": Case(1, 20, 136, 4, "bfloat16", False, 16),
}
CONVS = {"fp16": (2, 70, 136, "float16"), "bf16, three steps": (1, 3, 8, "bfloat16")}
# What a kernel may get wrong.
MISTAKES = {
    "chunks from zeros": ("if (!CARRY) h[j] =", "if (false) h[j] ="),
    "the state after a chunk": ("chunk) * fours + at] = h;", "chunk) * fours + at] = rate;"),
    "no decay over a chunk": ("h.x * exp2f(total * rate.x)", "h.x"),
    "steps of the next tile": ("here + G::DT, place", "here + G::DT, place + G::CHANNELS"),
    "a missing barrier": ("      sync_block();\n    }\n    if (t + 1", "    }\n    if (t + 1"),
    "no input before a chunk": ("t - 4 + i < 0 ? old[t + i]", "true ? 0.0f"),
    "a window one late": ("past = make_float4(past.y,", "past = make_float4(past.x,"),
}


def make(case: Case) -> dict[str, np.ndarray]:
    batch, length, channels, states, dtype = case[:5]
    rng, kind = np.random.default_rng(length), numpy_dtype(dtype)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    given = {name: normal(batch, length, channels).astype(kind) for name in "xz"}
    given["dt"] = (2 * normal(batch, length, channels) - 2).astype(kind)
    given |= {name: normal(batch, length, states) for name in "bc"}
    given["state"] = normal(batch, channels, states)
    given["a"] = -rng.random((channels, states)).astype(np.float32)
    given |= {name: normal(channels) for name in ("d", "dt_bias", "bias")}
    given["window"], given["weight"] = normal(batch, channels, 4), normal(channels, 4)
    # The window holds what were activations.
    given["window"] = given["window"].astype(kind).astype(np.float32)
    return given


def layer(case: Case, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what a layer makes of a prompt, one step after another, in float64."""
    f = {name: array.astype(float) for name, array in given.items()}
    state, window, outs, convs = f["state"], f["window"], [], []
    for t in range(case.length):
        x = f["x"][:, t]
        window = np.concatenate([window[..., 1:], x[..., None]], -1)
        convs.append((window * f["weight"]).sum(-1) + f["bias"])
        convs[-1] = convs[-1] / (1 + np.exp(-convs[-1]))
        x = convs[-1] if case.conv else x
        step = np.logaddexp(0, f["dt"][:, t] + f["dt_bias"])[..., None]
        state = state * np.exp(step * f["a"]) + step * x[..., None] * f["b"][:, t, None]
        y = (state * f["c"][:, t, None]).sum(-1) + f["d"] * x
        outs.append(y * f["z"][:, t] / (1 + np.exp(-f["z"][:, t])))
    return {
        "out": np.stack(outs, 1),
        "conv": np.stack(convs, 1),
        "state_out": state,
        "window_out": window,
    }


def run(
    rule: Rule, given: dict[str, np.ndarray], emulated: Emulated, order: int
) -> dict[str, np.ndarray]:
    known = dict(given)
    for kernel in rule.kernels:
        known |= emulated.run(kernel, needs(kernel, known), order)
    return known


def check(case: Case, emulated: Emulated) -> None:
    given = make(case)
    expected = layer(case, given)
    size = np.abs(expected["state_out"]).max()
    assert len(case.rule().kernels) == (1 if case.length <= case.chunk else 3)
    for order in ORDERS:
        found = run(case.rule(), given, emulated, order)
        close(found["out"], expected["out"], case.dtype, case.states, 32 * size)
        error = np.abs(found["state_out"] - expected["state_out"]) / (1 + size)
        assert error.max() < 2e-5, f"worst state is {error.max():.1e} off"
        if case.conv:
            np.testing.assert_array_equal(found["window_out"], expected["window_out"])


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    rules = [case.rule() for case in CASES.values()]
    rules += [prefill_conv_rule(*sizes) for sizes in CONVS.values()]
    rules += [scan_step_rule(24, 16, "float16")]
    kernels = [kernel for rule in rules for kernel in rule.kernels]
    return Emulated(kernels, tmp_path_factory.mktemp("emulated"))


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_scan_equals_float64(name: str, emulated: Emulated) -> None:
    check(CASES[name], emulated)


@needs_compiler
@pytest.mark.parametrize("name", CONVS)
def test_convolution_equals_float64(name: str, emulated: Emulated) -> None:
    case = Case(*CONVS[name][:3], 16, CONVS[name][3], True, 64)
    given = make(case)
    expected = layer(case, given)
    for order in ORDERS:
        found = run(prefill_conv_rule(*CONVS[name]), given, emulated, order)
        close(found["out"], expected["conv"], case.dtype, 4, 16)
        np.testing.assert_array_equal(found["window_out"], expected["window_out"])


@needs_compiler
def test_a_step_goes_on_where_the_prompt_ends(emulated: Emulated) -> None:
    case = CASES["one chunk"]
    given = make(case)
    shorter = case._replace(length=case.length - 1)
    expected = layer(case, given)
    whole = run(case.rule(), given, emulated, 0)
    cut = {k: v[:, :-1] if k in ["xz", "dt", "b", "c"] else v for k, v in given.items()}
    state = layer(shorter, cut)["state_out"].astype(np.float32)
    (step,) = scan_step_rule(case.channels, case.states, case.dtype).kernels
    one = {k: v[0, -1] for k, v in given.items() if k in ("x", "z", "dt", "b", "c")}
    one |= {k: given[k] for k in ("a", "d", "dt_bias")} | {"state": state[0]}
    found = emulated.run(step, needs(step, one))
    error = np.abs(found["out"].astype(float) - whole["out"][0, -1].astype(float))
    assert (error <= 2 * EPS["float16"] * np.abs(expected["out"][0, -1]) + 1e-4).all()
    np.testing.assert_allclose(found["state_out"], whole["state_out"][0], rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("mistake", MISTAKES)
def test_emulator_notices_a_planted_mistake(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong = MISTAKES[mistake]
    case = CASES["conv, chunks"]
    plant(monkeypatch, right, wrong, "prefill_scan")
    broken = Emulated(case.rule().kernels, tmp_path)
    with pytest.raises(AssertionError, match=r"worst|not equal"):
        check(case, broken)


def test_chunks_fill_the_device() -> None:
    (_, _, scan) = prefill_scan_rule(1, 1024, 5120, 16, "float16").kernels
    assert 132 <= np.prod(scan.grid) <= 3 * 132
    assert len(prefill_scan_rule(8, 1024, 5120, 16, "float16").kernels) == 1


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (prefill_scan_rule(1, 8, 12, 16, "float16"), "rows of 12"),
        (prefill_scan_rule(1, 8, 16, 12, "float16"), "12 states"),
        (prefill_scan_rule(1, 8, 16, 16, "int8"), "activations of int8"),
        (prefill_scan_rule(1, 0, 16, 16, "float16"), "0 steps"),
        (prefill_conv_rule(1, 8, 12, "float16"), "rows of 12"),
        (prefill_conv_rule(1, 8, 16, "float16", taps=3), "3 taps"),
    ],
)
def test_what_does_not_fit_has_a_reason(rule: Rule, reason: str) -> None:
    assert rule.kernels == ()
    assert reason in rule.reason
