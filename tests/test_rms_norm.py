"""RMS norms on the CPU: the row kernel, and the spellings that become it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cpu_targets import HOST, RUNNABLE
from hypothesis import given
from hypothesis import strategies as st
from test_cpu_kernels import few, random, run
from test_cpu_lowering import TARGET, Build, calls, execute, module, scalar

from icd_tvm._tvm import named_const, relax, tvm
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.registry import build as build_model
from icd_tvm.relax_passes.fuse_rms_norm import FuseRmsNorm
from icd_tvm.tir_schedules.cpu.rms_norm import rms_norm
from icd_tvm.tir_schedules.target import host_target, parse_target

Array = np.ndarray
EPS, WIDTH = 1e-5, 24
GAMMA = random(np.random.default_rng(1), WIDTH)


def reference(x: Array, gamma: Array, eps: float = EPS) -> Array:
    x = x.astype(np.float64)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * gamma


@few
@given(
    lead=st.sampled_from([(1,), (3,), (2, 5)]),
    d=st.integers(1, 200),
    size=st.sampled_from([1e-3, 1.0, 1e6]),
    target=st.sampled_from([HOST, host_target(2), *(parse_target(n, 2) for n in RUNNABLE)]),
)
def test_kernel(lead: Any, d: int, size: float, target: Any) -> None:
    rng = np.random.default_rng(d)
    x, gamma = random(rng, *lead, d) * np.float32(size), random(rng, d)
    actual = run(rms_norm((*lead, d), EPS, target), [x, gamma], (*lead, d), target)
    np.testing.assert_allclose(actual, reference(x, gamma), rtol=2e-6, atol=1e-7)


def test_a_row_of_zeros_stays_zero_and_a_nan_in_its_row() -> None:
    x = random(np.random.default_rng(0), 3, WIDTH)
    x[0], x[1, 5] = 0, np.nan
    actual = run(rms_norm(x.shape, EPS, HOST), [x, GAMMA], x.shape, HOST)
    np.testing.assert_array_equal(actual[0], 0)
    assert np.isnan(actual[1]).all()
    np.testing.assert_allclose(actual[2], reference(x[2:], GAMMA)[0], rtol=2e-6)


def norm(
    *,
    square: str = "power",
    unit: str = "divide",
    gamma_first: bool = False,
    axis: int = -1,
    keepdims: bool = True,
    columns: int = WIDTH,
    read: bool = False,
    exponent: float = 2.0,
    other: bool = False,
) -> Any:
    """Return a norm as exporters write it, with one part changed."""
    gamma = named_const(GAMMA[:columns], "gamma")

    def build(emit: Build, x: Any, y: Any) -> Any:
        source = y if other else x
        power = relax.op.power(source, scalar(exponent))
        squares = emit(power if square == "power" else relax.op.multiply(source, source))
        mean = emit(relax.op.mean(squares, axis, keepdims))
        total = emit(relax.op.add(mean, scalar(EPS)))
        root = emit(relax.op.rsqrt(total) if unit == "rsqrt" else relax.op.sqrt(total))
        if unit == "reciprocal":
            root = emit(relax.op.divide(scalar(1.0), root))
        scaled = emit(relax.op.divide(x, root) if unit == "divide" else relax.op.multiply(x, root))
        pair = (gamma, scaled) if gamma_first else (scaled, gamma)
        out = emit(relax.op.multiply(*pair), name_hint="norm")
        return emit(relax.op.add(out, scaled)) if read else out

    return module(build, x=(2, 5, WIDTH), y=(2, 5, WIDTH))


def whole(axes: tuple[int, ...] = (-1,)) -> Any:
    sizes = [(5, WIDTH)[axis] for axis in axes]
    gamma = named_const(np.ones(sizes, np.float32), "gamma")
    return module(
        lambda emit, x, y: emit(relax.op.nn.rms_norm(x, gamma, axes, EPS), name_hint="norm"),
        x=(2, 5, WIDTH),
        y=(1,),
    )


@pytest.mark.parametrize("square", ["power", "product"])
@pytest.mark.parametrize("unit", ["divide", "reciprocal", "rsqrt"])
@pytest.mark.parametrize("gamma_first", [False, True])
def test_every_spelling_becomes_one_kernel(square: str, unit: str, gamma_first: bool) -> None:
    mod = norm(square=square, unit=unit, gamma_first=gamma_first)
    before, fuse = mod.clone(), FuseRmsNorm(TARGET)
    assert calls(fuse(mod)) == ["rms_norm"]
    assert (fuse.fused, fuse.refusals) == (["norm"], {})
    tvm.ir.assert_structural_equal(mod, before)


@pytest.mark.parametrize("mod", [norm(), norm(unit="reciprocal"), whole()])
def test_the_module_equals_float64(mod: Any) -> None:
    inputs = [random(np.random.default_rng(0), *map(int, p.ty.shape)) for p in mod["main"].params]
    gamma = GAMMA if len(inputs[1].shape) > 1 else np.ones(WIDTH)
    np.testing.assert_allclose(
        execute(mod, *inputs), reference(inputs[0], gamma), rtol=2e-6, atol=1e-7
    )


@pytest.mark.parametrize(
    "mod",
    [
        norm(axis=1),
        norm(columns=1),
        norm(read=True),
        norm(exponent=3.0),
        norm(other=True),
        whole((-2, -1)),
    ],
)
def test_what_is_another_norm_stays(mod: Any) -> None:
    fuse = FuseRmsNorm(TARGET)
    tvm.ir.assert_structural_equal(fuse(mod), mod)
    assert (fuse.fused, fuse.refusals) == ([], {})


def test_a_norm_without_a_kernel_says_why() -> None:
    x = relax.Var("x", relax.TensorType((WIDTH,), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit_output(relax.op.nn.rms_norm(x, relax.const(GAMMA), -1, EPS), "norm")
        builder.emit_func_output(out)
    fuse = FuseRmsNorm(TARGET)
    fuse(builder.get())
    assert "two axes" in fuse.refusals["norm"]
    assert fuse.fused == []


@pytest.mark.parametrize("name", ["decoder-mini-step-random", "mamba-mini-random"])
def test_the_norms_of_a_decoder_are_row_kernels(name: str) -> None:
    fuse = FuseRmsNorm(TARGET)
    names = calls(fuse(relax.transform.FoldConstant()(import_onnx(build_model(name)).mod)))
    assert "relax.sqrt" not in names
    assert names.count("rms_norm") + sum("rms_norm" in n for n in set(names)) > 1
    assert fuse.refusals == {}
