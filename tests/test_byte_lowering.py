"""Passes that keep bytes between the products of an encoder: merged, written, and read as bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_cpu_lowering import (
    CODES,
    TARGET,
    Build,
    calls,
    constants,
    execute,
    execute_plain,
    module,
    random,
)

from icd_tvm._tvm import dlight, named_const, relax, te, tvm
from icd_tvm.relax_passes.fold_scales import FoldScales
from icd_tvm.relax_passes.fuse_attention import FuseAttention
from icd_tvm.relax_passes.fuse_quantized_matmul import FuseQuantizedMatmul
from icd_tvm.relax_passes.fuse_quantized_output import FuseQuantizedOutput
from icd_tvm.relax_passes.fuse_residual_norm import FuseResidualNorm
from icd_tvm.relax_passes.merge_parallel_matmul import MergeParallelMatmul
from icd_tvm.relax_passes.shorten_erf import ShortenErf
from icd_tvm.relax_passes.vector_legalize import legalize_map
from icd_tvm.tir_schedules.cpu import cpu_rules, vector_math
from icd_tvm.tir_schedules.cpu.stack import register_pipeline

Array = np.ndarray
LENGTH, HEADS, DIM = 6, 3, 8
WIDTH = HEADS * DIM
SCALE, ZERO = 0.03, 120


def const(value: Any, dtype: str = "float32") -> Any:
    return relax.const(np.asarray(value, dtype), dtype)


def through(emit: Build, x: Any, scale: Any = SCALE, zero: int = ZERO, dtype: str = "uint8") -> Any:
    """Send ``x`` through codes."""
    parameters = const(scale), const(zero, dtype)
    small = emit(relax.op.quantize(x, *parameters, axis=2, out_dtype=dtype))
    return emit(relax.op.dequantize(small, *parameters, axis=2))


def projection(emit: Build, x: Any, name: str, columns: int = WIDTH, *, bias: bool = True) -> Any:
    """Return ``x @ W + b`` of a quantised weight with one scale a column."""
    rng = np.random.default_rng(len(name) + ord(name[0]))
    rows = int(x.ty.shape.values[-1])
    weight = named_const(rng.integers(-127, 128, (rows, columns)).astype(np.int8), name)
    scale = named_const(rng.uniform(2e-3, 6e-3, columns).astype(np.float32), f"{name}.scale")
    floats = emit(relax.op.dequantize(weight, scale, const(0, "int8"), axis=1))
    out = emit(relax.op.matmul(x, floats))
    return emit(relax.op.add(out, const(rng.standard_normal(columns)))) if bias else out


def attended(emit: Build, rows: dict[str, Any], *, coded: bool = True) -> Any:
    split = (1, LENGTH, HEADS, DIM)

    def heads(name: str, axes: list[int]) -> Any:
        moved = emit(relax.op.permute_dims(emit(relax.op.reshape(rows[name], split)), axes))
        return passed(moved, name)

    def passed(x: Any, name: str) -> Any:
        code = CODES[name]
        return through(emit, x, code.scale, code.zero, code.dtype) if coded else x

    q, k, v = (
        heads(n, a) for n, a in zip("qkv", ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True)
    )
    weights = passed(emit(relax.op.nn.softmax(emit(relax.op.matmul(q, k)))), "p")
    out = emit(relax.op.permute_dims(emit(relax.op.matmul(weights, v)), [0, 2, 1, 3]))
    return emit(relax.op.reshape(out, (1, LENGTH, WIDTH)))


def attention_module(
    *, coded: bool = True, biased: str = "qkv", other: str = "", shared: bool = False
) -> Any:
    """Return byte projections of x and their attention; ``other`` names those of another input."""

    def build(emit: Build, x: Any, y: Any) -> Any:
        inputs = {"": through(emit, x), "other": through(emit, y)}
        rows = {
            name: projection(emit, inputs["other" * (name in other)], name, bias=name in biased)
            for name in "qkv"
        }
        out = attended(emit, rows, coded=coded)
        return emit(relax.op.add(out, rows["v"])) if shared else out

    return module(build, x=(1, LENGTH, WIDTH), y=(1, LENGTH, WIDTH))


def merged(mod: Any) -> tuple[Any, MergeParallelMatmul]:
    merge = MergeParallelMatmul(TARGET)
    return merge(FuseAttention(TARGET)(FuseQuantizedMatmul(TARGET)(mod))), merge


def run_alone(mod: Any) -> Array:
    """Run a module as the passes so far left it."""
    rx = relax.transform
    passes = [rx.LegalizeOps(legalize_map(TARGET)), rx.AnnotateTIROpPattern(), rx.FuseOps()]
    passes += [rx.FuseTIR(), dlight.ApplyDefaultSchedule(*cpu_rules())]
    with TARGET:
        lowered = tvm.transform.Sequential(passes)(mod)
        built = tvm.compile(lowered, TARGET, tir_pipeline=register_pipeline())
    arguments = [tvm.runtime.tensor(array) for array in inputs()]
    return relax.VirtualMachine(built, tvm.cpu())["main"](*arguments).numpy()


def inputs() -> list[Array]:
    return [random(1, LENGTH, WIDTH, seed=5), random(1, LENGTH, WIDTH, seed=6)]


def assert_codes_differ_rarely(actual: Array, expected: Array) -> None:
    """A value on the edge between two codes may fall to either side, and moves what follows."""
    error = np.abs(actual.astype(np.float64) - expected)
    scale = np.abs(expected).max()
    assert np.quantile(error, 0.8) < 2e-4 * scale
    assert error.max() < 0.05 * scale


STEPS = ["relax.subtract", "relax.astype", "relax.multiply", "relax.add"]


@pytest.mark.parametrize(
    ("coded", "biased", "kernels"),
    [
        (True, "qkv", [*STEPS, "relax.quantize", "byte_attention1"]),
        (True, "", [*STEPS[:3], "relax.quantize", "byte_attention1"]),
        (False, "qkv", [*STEPS, "attention1"]),
    ],
)
def test_byte_projections_of_one_input_are_merged(
    coded: bool, biased: str, kernels: list[str]
) -> None:
    mod = attention_module(coded=coded, biased=biased)
    after, merge = merged(mod)
    assert calls(after) == ["relax.quantize", "int8_matmul1", *kernels]
    assert (merge.merged, merge.refusals) == (1, [])
    found = constants(after)
    assert found["q+k+v"].dtype == np.int8
    assert found["q.scale+k.scale+v.scale"].shape == (3 * WIDTH,)
    assert_codes_differ_rarely(execute(mod, *inputs()), execute_plain(mod, *inputs()))


def test_merged_bytes_are_those_of_three_products() -> None:
    """Without the merge the same codes come out, to the last one."""
    mod = attention_module()
    apart = FuseAttention(TARGET)(FuseQuantizedMatmul(TARGET)(mod))
    together, _ = merged(mod)
    np.testing.assert_array_equal(run_alone(together), run_alone(apart))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"other": "v"}, "different inputs"),
        ({"biased": "qv"}, "differ in the steps after their products"),
        ({"shared": True, "coded": False}, "used outside"),
    ],
)
def test_byte_projections_that_cannot_be_merged_say_why(
    change: dict[str, Any], reason: str
) -> None:
    mod = attention_module(**change)
    after, merge = merged(mod)
    assert merge.merged == 0
    assert reason in merge.refusals[0]
    assert calls(after).count("int8_matmul") + calls(after).count("int8_matmul1") == 3
    assert_codes_differ_rarely(execute(mod, *inputs()), execute_plain(mod, *inputs()))


# FuseQuantizedOutput


def fused(mod: Any) -> tuple[Any, FuseQuantizedOutput]:
    output = FuseQuantizedOutput(TARGET)
    return output(FuseResidualNorm(TARGET)(merged(mod)[0])), output


def smoothed(emit: Build, x: Any, *, scale: Any = SCALE, dtype: str = "uint8") -> Any:
    factor = np.random.default_rng(3).uniform(0.5, 2, WIDTH)
    product = emit(relax.op.multiply(x, const(factor)))
    return through(emit, product, scale, ZERO if dtype == "uint8" else 0, dtype)


def output_module(*, factor: bool = True, reads: bool = False, **code: Any) -> Any:
    """Return an attention whose result is quantised, read as floats too where ``reads``."""

    def build(emit: Build, x: Any, y: Any) -> Any:
        source = through(emit, x)
        rows = {name: projection(emit, source, name) for name in "qkv"}
        out = attended(emit, rows)
        coded = smoothed(emit, out, **code) if factor else through(emit, out)
        return emit(relax.op.add(coded, out if reads else y))

    return module(build, x=(1, LENGTH, WIDTH), y=(1, LENGTH, WIDTH))


@pytest.mark.parametrize("factor", [True, False])
def test_attention_writes_the_codes_that_are_read(factor: bool) -> None:
    mod = output_module(factor=factor)
    after, output = fused(mod)
    assert output.fused == {"attention": 1, "norm": 0}
    assert calls(after)[-3:] == ["byte_attention", "relax.dequantize", "relax.add"]
    assert_codes_differ_rarely(execute(mod, *inputs()), execute_plain(mod, *inputs()))


@pytest.mark.parametrize("change", [{"reads": True}, {"dtype": "int8"}, {"scale": 1e-45}])
def test_an_attention_stays_in_floats_for_other_readers_and_scales(change: dict[str, Any]) -> None:
    mod = output_module(**change)
    after, output = fused(mod)
    assert output.fused == {"attention": 0, "norm": 0}
    assert "relax.quantize" in calls(after)[-4:]
    assert_codes_differ_rarely(execute(mod, *inputs()), execute_plain(mod, *inputs()))


def norm_module(*, twice: bool = False) -> Any:
    """Return a norm that is read as floats and as codes, by a second scale too if ``twice``."""

    def build(emit: Build, x: Any, y: Any) -> Any:
        total = emit(relax.op.add(x, y))
        norm = emit(relax.op.nn.layer_norm(total, const(random(WIDTH)), const(random(WIDTH)), [-1]))
        out = emit(relax.op.add(smoothed(emit, norm), norm))
        return emit(relax.op.add(out, through(emit, norm, 0.05))) if twice else out

    return module(build, x=(1, LENGTH, WIDTH), y=(1, LENGTH, WIDTH))


@pytest.mark.parametrize("twice", [False, True])
def test_norms_write_codes_beside_their_floats(twice: bool) -> None:
    mod = norm_module(twice=twice)
    after, output = fused(mod)
    assert output.fused == {"attention": 0, "norm": 1}
    assert calls(after).count("relax.quantize") == int(twice)
    assert calls(after)[0] == "residual_layer_norm1"
    assert_codes_differ_rarely(execute(mod, *inputs()), execute_plain(mod, *inputs()))


# FoldScales

ROWS = (2, 5, 32)


def scaled(*factors: Any, scale: float = 0.03, reads: bool = False) -> Any:
    """Return codes of x times factors; those that are tuples divide."""

    def build(emit: Build, x: Any) -> Any:
        rows = x
        for factor in factors:
            op = relax.op.divide if isinstance(factor, tuple) else relax.op.multiply
            rows = emit(op(rows, const(factor[0] if isinstance(factor, tuple) else factor)))
        out = through(emit, rows, scale)
        return emit(relax.op.add(out, rows)) if reads else out

    return module(build, x=ROWS)


COLUMNS = np.random.default_rng(4).uniform(0.5, 2, ROWS[-1]).astype(np.float32)


@pytest.mark.parametrize(
    ("factors", "total"), [((0.5, COLUMNS, (4.0,)), COLUMNS * np.float64(0.125)), ((0.5,), 0.5)]
)
def test_factors_before_a_quantisation_become_one(factors: tuple[Any, ...], total: Any) -> None:
    fold = FoldScales()
    after = fold(scaled(*factors))

    def expected(emit: Build, x: Any) -> Any:
        factor = np.asarray(total / np.float64(np.float32(0.03)), np.float32)
        product = emit(relax.op.multiply(x, const(factor)))
        one, zero = relax.const(1.0, "float32"), const(ZERO, "uint8")
        codes = emit(relax.op.quantize(product, one, zero, axis=2, out_dtype="uint8"))
        return emit(relax.op.dequantize(codes, const(0.03), zero, axis=2))

    tvm.ir.assert_structural_equal(after, module(expected, x=ROWS))
    assert list(fold.folded.values()) == [len(factors)]


@pytest.mark.parametrize(
    "mod",
    [
        scaled(),
        scaled(0.5, COLUMNS, reads=True),
        scaled(0.5, np.ones((5, 1))),
        scaled(0.5, 0.0),
        scaled(0.5, 2.0, scale=1e-45),
    ],
)
def test_other_factors_stay(mod: Any) -> None:
    fold = FoldScales()
    tvm.ir.assert_structural_equal(fold(mod), mod)
    assert fold.folded == {}


def test_folded_codes_are_those_of_the_factors() -> None:
    mod = scaled(0.5, COLUMNS, (0.3,))
    x = random(*ROWS, seed=1)
    assert_codes_differ_rarely(execute(mod, x), execute_plain(mod, x))


# ShortenErf


def erf_module(*, floats: bool = False) -> Any:
    def build(emit: Build, x: Any) -> Any:
        inner = emit(relax.op.erf(emit(relax.op.multiply(x, const(0.5**0.5)))), name_hint="inner")
        gelu = emit(relax.op.multiply(x, emit(relax.op.add(inner, const(1.0)))))
        coded = through(emit, gelu, 0.02, 20)
        return emit(relax.op.add(coded, gelu)) if floats else coded

    return module(build, x=(2, 5, 32))


@pytest.mark.parametrize(
    ("function", "kernel"),
    [(relax.op.erf, vector_math.erf_short), (relax.op.nn.gelu, vector_math.gelu_short)],
)
def test_erf_that_becomes_bytes_is_short(function: Any, kernel: Any) -> None:
    before = module(lambda emit, x: through(emit, emit(function(x))), x=(2, 5, 32))

    def short(emit: Build, x: Any) -> Any:
        call = relax.BlockBuilder.current().call_te(
            lambda t: te.compute(t.shape, lambda *at: kernel(t[at]), name="compute"),
            x,
            primfunc_name_hint=kernel.__name__,
        )
        return through(emit, emit(call))

    shorten = ShortenErf()
    tvm.ir.assert_structural_equal(shorten(before), module(short, x=(2, 5, 32)))
    assert len(shorten.shortened) == 1


def test_codes_of_a_short_gelu_are_those_of_the_long_one() -> None:
    mod = erf_module()
    x = random(2, 5, 32, seed=1) * 2
    step = np.abs(execute(mod, x) - execute_plain(mod, x)) / 0.02
    assert step.max() < 1.01
    assert np.mean(step > 0.01) <= 0.01


def test_erf_that_stays_a_float_is_left_alone() -> None:
    mod = erf_module(floats=True)
    shorten = ShortenErf()
    tvm.ir.assert_structural_equal(shorten(mod), mod)
    assert shorten.shortened == []


# Quantisation by constants


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("columns", [False, True])
def test_quantisation_by_constants_is_that_of_a_division(dtype: str, columns: bool) -> None:
    rng = np.random.default_rng(0)
    info = np.iinfo(dtype)
    scale = rng.uniform(0.01, 0.1, 32 if columns else ()).astype(np.float32)
    zero = rng.integers(info.min, info.max + 1, 32 if columns else ()).astype(dtype)

    def build(emit: Build, x: Any) -> Any:
        parameters = const(scale), const(zero, dtype)
        return emit(relax.op.quantize(x, *parameters, axis=2, out_dtype=dtype))

    x = random(2, 5, 32, seed=1) * 3
    exact = np.rint(x / scale.astype(np.float64)) + zero
    actual = execute(module(build, x=(2, 5, 32)), x)
    assert actual.dtype == dtype
    np.testing.assert_array_equal(actual, np.clip(exact, info.min, info.max).astype(dtype))


def test_a_scale_without_a_reciprocal_divides() -> None:
    scale = np.float32(1e-45)

    def build(emit: Build, x: Any) -> Any:
        parameters = const(scale), const(3, "int8")
        return emit(relax.op.quantize(x, *parameters, axis=2, out_dtype="int8"))

    x = np.resize(np.array([0, 1, -1], np.float32), (1, 1, 16))
    expected = np.resize(np.array([3, 127, -128], np.int8), (1, 1, 16))
    np.testing.assert_array_equal(execute(module(build, x=(1, 1, 16)), x), expected)


def test_halves_go_to_even_codes() -> None:
    x = np.arange(-8, 8, dtype=np.float32).reshape(1, 1, 16) * 0.25

    def build(emit: Build, x: Any) -> Any:
        return emit(relax.op.quantize(x, const(0.5), const(0, "int8"), axis=2, out_dtype="int8"))

    expected = np.rint(x / 0.5).astype(np.int8)
    np.testing.assert_array_equal(execute(module(build, x=(1, 1, 16)), x), expected)
