"""FuseGelu: every spelling of the exact GELU becomes one operator, and nothing else does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_cpu_lowering import Build, execute, execute_plain, module

from icd_tvm._tvm import relax, tvm
from icd_tvm.relax_passes.fuse_gelu import FuseGelu

SHAPE = (2, 5, 32)
op = relax.op


def number(value: float) -> Any:
    return relax.const(np.float32(value))


def halved_last(emit: Any, x: Any) -> Any:
    inner = emit(op.erf(emit(op.divide(x, number(2**0.5)))))
    return emit(op.multiply(emit(op.multiply(x, emit(op.add(inner, number(1))))), number(0.5)))


def halved_first(emit: Any, x: Any) -> Any:
    inner = emit(op.erf(emit(op.multiply(number(0.5**0.5), x))))
    return emit(op.multiply(emit(op.multiply(number(0.5), x)), emit(op.add(number(1), inner))))


def halved_within(emit: Any, x: Any) -> Any:
    inner = emit(op.multiply(emit(op.erf(emit(op.multiply(x, number(0.5**0.5))))), number(0.5)))
    return emit(op.multiply(emit(op.add(inner, number(0.5))), x))


def around(inner: Build) -> Any:
    """Return a module in which the GELU has neighbours on both sides."""
    return module(lambda emit, x: emit(op.negative(inner(emit, emit(op.tanh(x))))), x=SHAPE)


@pytest.mark.parametrize("spelling", [halved_last, halved_first, halved_within])
def test_every_spelling_becomes_the_operator(spelling: Build) -> None:
    fuse = FuseGelu()
    expected = around(lambda emit, x: emit(op.nn.gelu(x)))
    tvm.ir.assert_structural_equal(fuse(around(spelling)), expected)
    assert len(fuse.fused) == 1


def test_two_in_a_row_are_two() -> None:
    fuse = FuseGelu()
    fused = fuse(around(lambda emit, x: halved_first(emit, halved_last(emit, x))))
    expected = around(lambda emit, x: emit(op.nn.gelu(emit(op.nn.gelu(x)))))
    tvm.ir.assert_structural_equal(fused, expected)


def inner_reader(emit: Any, x: Any) -> Any:
    inner = emit(op.erf(emit(op.multiply(x, number(0.5**0.5)))))
    whole = emit(op.multiply(x, emit(op.add(inner, number(1)))))
    return emit(op.add(emit(op.multiply(whole, number(0.5))), inner))


def other_factor(emit: Any, x: Any) -> Any:
    inner = emit(op.erf(emit(op.multiply(x, number(0.7)))))
    return emit(op.multiply(emit(op.multiply(x, emit(op.add(inner, number(1))))), number(0.5)))


def erf_alone(emit: Any, x: Any) -> Any:
    return emit(op.erf(emit(op.multiply(x, number(0.5**0.5)))))


def erf_of_a_constant(emit: Any, x: Any) -> Any:
    return emit(op.multiply(x, emit(op.erf(emit(op.multiply(number(2), number(3)))))))


@pytest.mark.parametrize("other", [inner_reader, other_factor, erf_alone, erf_of_a_constant])
def test_anything_else_stays(other: Build) -> None:
    fuse = FuseGelu()
    tvm.ir.assert_structural_equal(fuse(around(other)), around(other))
    assert fuse.fused == []


def test_doubles_stay() -> None:
    def build(emit: Any, x: Any) -> Any:
        wide = emit(op.astype(x, "float64"))
        half, root = (relax.const(value, "float64") for value in (0.5, 0.5**0.5))
        inner = emit(op.erf(emit(op.multiply(wide, root))))
        scaled = emit(op.add(emit(op.multiply(inner, half)), half))
        return emit(op.astype(emit(op.multiply(scaled, wide)), "float32"))

    tvm.ir.assert_structural_equal(FuseGelu()(around(build)), around(build))


@pytest.mark.parametrize("spelling", [halved_last, halved_first, halved_within])
def test_results_are_those_of_the_operators(spelling: Build) -> None:
    mod = module(spelling, x=SHAPE)
    x = np.random.default_rng(0).normal(0, 4, SHAPE).astype(np.float32)
    np.testing.assert_allclose(execute(mod, x), execute_plain(mod, x), atol=1e-6)
