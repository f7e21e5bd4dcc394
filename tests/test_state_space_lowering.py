"""State space models on the CPU: scan, convolution, softplus and splits, pass by pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cpu_targets import HOST, RUNNABLE, assert_stays_inside
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cpu_lowering import TARGET, Build, calls, constants, execute, lower, module

from icd_tvm._tvm import named_const, relax, te, tvm
from icd_tvm.relax_passes.fuse_depthwise_conv import FuseDepthwiseConv
from icd_tvm.relax_passes.fuse_softplus import FuseSoftplus
from icd_tvm.relax_passes.slice_splits import SliceSplits
from icd_tvm.tir_schedules.cpu import vector_math
from icd_tvm.tir_schedules.cpu.scan_program import Operand, ScanProgram, Term
from icd_tvm.tir_schedules.cpu.scan_terms import POWER, SCALED, spare_states
from icd_tvm.tir_schedules.cpu.selective_scan import operand_shape, output_shape, selective_scan
from icd_tvm.tir_schedules.cpu.stack import compile_kernel
from icd_tvm.tir_schedules.target import parse_target

Array = np.ndarray
few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
targets = st.sampled_from([HOST, *(parse_target(name, 1) for name in RUNNABLE)])
scans = given(
    length=st.integers(1, 20),
    channels=st.sampled_from([1, 6, 16, 48]),
    states=st.sampled_from([1, 3, 16, 33]),
    turned=st.booleans(),
    target=targets,
)
DT, U, B, C, A, D = (Term("operand", place=i) for i in range(6))
OLD, NEW, SUM = Term("old"), Term("new"), Term("late")


def term(op: str, *args: Term) -> Term:
    return Term(op, args)


def mamba(channels: int, states: int) -> ScanProgram:
    """``h = exp(dt A) h + u (dt B)``, ``y = C h + D u``, as ONNX files spell it."""
    along = [(True, False), (True, False), (False, True), (False, True), (True, True)]
    operands = [Operand(i if i < 4 else None, axes) for i, axes in enumerate(along)]
    operands.append(Operand(None, (True, False)))
    kept = term("Mul", term("Exp", term("Mul", DT, A)), OLD)
    given = term("Mul", U, term("Mul", DT, B))
    output = term("Add", SUM, term("Mul", U, D))
    return ScanProgram(
        (channels, states),
        operands,
        term("Add", kept, given),
        [],
        [term("Mul", NEW, C)],
        [(output, (channels,), False)],
    )


# The recurrence


def test_a_step_multiplies_once_what_all_states_share() -> None:
    scaled = Term(SCALED, place=4, number=vector_math.LOG2_E)
    kept = term("Mul", term(POWER, term("Mul", DT, scaled)), OLD)
    given = term("Mul", term("Mul", U, DT), B)
    program = mamba(8, 4)
    spared = spare_states(program)
    assert spared.update == term("Add", kept, given)
    assert (spared.late, spared.outputs) == (program.late, program.outputs)


def test_an_exponential_of_what_changes_stays() -> None:
    program = ScanProgram(
        (8, 4),
        [Operand(0, (True, True)), Operand(None, (False, True))],
        term("Exp", term("Neg", DT)),
    )
    assert spare_states(program).update == program.update
    # Nor is anything copied that has no channels.
    program.update = term("Exp", term("Mul", OLD, U))
    assert spare_states(program).update == program.update


@few
@scans
def test_a_scan_equals_float64(
    length: int, channels: int, states: int, turned: bool, target: Any
) -> None:
    program, rng = mamba(channels, states), np.random.default_rng(length * 100 + states)
    given = random_operands(program, length, rng)
    start = rng.standard_normal((1, channels, states)).astype(np.float32)
    outputs = [
        np.full(shape, np.nan, np.float32)
        for shape in (output_shape(program, 0, length), start.shape)
    ]
    func = selective_scan(program, length, (turned,) * 4 + (False,) * 2, (turned,))
    tensors = [tvm.runtime.tensor(array) for array in (start, *given, *outputs)]
    compile_kernel(func, target)["main"](*tensors)
    wanted = reference(start, given, turned)
    for tensor, exact in zip(tensors[-2:], wanted, strict=True):
        bound = 2e-6 * max(1.0, np.abs(exact).max())
        np.testing.assert_allclose(tensor.numpy(), exact, rtol=0, atol=bound)


def random_operands(program: ScanProgram, length: int, rng: np.random.Generator) -> list[Array]:
    """Operands of a `mamba`: steps are positive and rates negative."""
    shapes = [operand_shape(program, operand, length) for operand in program.operands]
    given = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    given[0], given[4] = np.abs(given[0]), -np.exp(given[4] * 2)
    return given


def reference(start: Array, given: list[Array], turned: bool) -> tuple[Array, Array]:
    dt, u, b, c, a, d = (array.astype(np.float64) for array in given)
    h, rows = start.astype(np.float64)[0], np.zeros_like(dt)
    steps = range(len(dt))
    for t in reversed(steps) if turned else steps:
        h = np.exp(dt[t] * a[0]) * h + u[t] * dt[t] * b[t]
        rows[t] = (h * c[t]).sum(-1, keepdims=True) + d[0] * u[t]
    return rows, h[None]


def test_a_scan_forgets_and_keeps() -> None:
    """A decay of 0 and of 1, and a NaN that stays in its channel."""
    program = mamba(16, 2)
    shapes = [operand_shape(program, operand, 3) for operand in program.operands]
    given = [np.ones(shape, np.float32) for shape in shapes]
    given[4][:] = [0.0, -1e30]
    given[0][1, 5] = np.nan
    start = np.full((1, 16, 2), 7, np.float32)
    tensors = [tvm.runtime.tensor(a) for a in (start, *given, np.zeros((3, 16, 1), np.float32))]
    final = tvm.runtime.tensor(np.zeros_like(start))
    func = selective_scan(program, 3, (False,) * 6, (False,))
    compile_kernel(func, HOST)["main"](*tensors, final)
    states = final.numpy()[0]
    assert np.isnan(states[5]).all()
    np.testing.assert_array_equal(np.delete(states, 5, 0), [[10, 1]] * 15)


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize(("op", "exact"), [("Max", np.maximum), ("Min", np.minimum)])
def test_a_step_compares_as_many_numbers_as_there_are(op: str, exact: Any, count: int) -> None:
    operands = [Operand(i, (True, True)) for i in range(count)]
    program = ScanProgram((8, 4), operands, term(op, OLD, *[DT, U][:count]))
    rng = np.random.default_rng(0)
    start, *given = (
        rng.standard_normal((n, 8, 4)).astype(np.float32) for n in [1, 3, 3][: 1 + count]
    )
    final = tvm.runtime.tensor(np.zeros_like(start))
    tensors = [tvm.runtime.tensor(array) for array in (start, *given)]
    compile_kernel(selective_scan(program, 3, (False,) * count, ()), HOST)["main"](*tensors, final)
    np.testing.assert_array_equal(
        final.numpy(), exact.reduce(np.concatenate([start, *given]))[None]
    )


def test_a_scan_compiles_for_aarch64() -> None:
    func = selective_scan(mamba(32, 4), 5, (False,) * 6, (False,))
    text = compile_kernel(func, parse_target("aarch64", 1)).mod.inspect_source("asm")
    assert "fmla" in text


# FuseDepthwiseConv


def filters(channels: int, taps: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(taps)
    weight = rng.standard_normal((channels, 1, taps)).astype(np.float32)
    return weight, rng.standard_normal((1, channels, 1)).astype(np.float32)


def convolved(batch: bool, channels: int, taps: int, bias: bool = True, **attrs: Any) -> Build:
    """Return ``transpose(conv1d(transpose(x)) + bias)`` on rows, with a batch axis or without."""
    weight, added = filters(channels, taps)
    axes = [0, 2, 1] if batch else [1, 0]

    def build(emit: Any, x: Any) -> Any:
        value = emit(relax.op.permute_dims(x, axes))
        value = value if batch else emit(relax.op.expand_dims(value, 0))
        options = {"groups": channels, **attrs}
        value = emit(relax.op.nn.conv1d(value, named_const(weight, "w"), **options))
        if bias:
            value = emit(relax.op.add(value, named_const(added, "b")))
        value = value if batch else emit(relax.op.squeeze(value, [0]))
        return emit(relax.op.permute_dims(value, axes))

    return build


@few
@given(
    batch=st.booleans(),
    rows=st.integers(8, 20),
    channels=st.sampled_from([1, 16, 20, 48]),
    taps=st.integers(1, 5),
    padding=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    step=st.sampled_from([1, 2]),
    bias=st.booleans(),
    target=targets,
)
def test_a_convolution_of_rows_equals_float64(
    batch: bool,
    rows: int,
    channels: int,
    taps: int,
    padding: tuple[int, int],
    step: int,
    bias: bool,
    target: Any,
) -> None:
    shape = (2, rows, channels) if batch else (rows, channels)
    build = convolved(batch, channels, taps, bias, padding=padding, dilation=step)
    mod = module(build, x=shape)
    fuse = FuseDepthwiseConv()
    assert calls(fuse(mod)) == ["depthwise_conv"]
    assert (fuse.fused, fuse.refusals) == (1, {})
    x = np.random.default_rng(rows).standard_normal(shape).astype(np.float32)
    weight, added = (array.astype(np.float64) for array in filters(channels, taps))
    padded = np.pad(x.astype(np.float64), [(0, 0)] * batch + [padding, (0, 0)])
    length = rows + sum(padding) - (taps - 1) * step
    parts = [padded[..., k * step : k * step + length, :] * weight[:, 0, k] for k in range(taps)]
    wanted = sum(parts) + (added[0, :, 0] if bias else 0)
    np.testing.assert_allclose(execute(mod, x, target=target), wanted, rtol=0, atol=2e-5)


def test_a_row_that_is_not_there_is_not_read() -> None:
    x = np.full((8, 16), np.nan, np.float32)
    x[:, 0] = 1
    result = execute(module(convolved(False, 16, 3, False, padding=[9, 0]), x=(8, 16)), x)
    np.testing.assert_array_equal(result[:7], 0)
    assert np.isnan(result[7:, 1:]).all()


@pytest.mark.parametrize(("rows", "taps"), [(20, 4), (1, 3), (3, 5)])
def test_no_memory_around_the_rows_is_read(rows: int, taps: int) -> None:
    """Both sides of a selection are computed: the row that is read lies in X all the same."""
    lowered = lower(module(convolved(False, 16, taps, padding=[3, 2]), x=(rows, 16)))
    (kernel,) = (f for v, f in lowered.functions.items() if "depthwise" in str(v.name_hint))
    sizes = [4 * int(np.prod([int(extent) for extent in one.shape])) for one in kernel.params]
    assert_stays_inside(kernel, sizes, TARGET)


def test_the_constants_keep_their_names() -> None:
    fused = FuseDepthwiseConv()(module(convolved(False, 16, 4), x=(9, 16)))
    weight, added = filters(16, 4)
    found = constants(fused)
    np.testing.assert_array_equal(found["w"], weight[:, 0].T)
    np.testing.assert_array_equal(found["b"], added.reshape(-1))


def test_other_convolutions_stay() -> None:
    for change, reason in (
        ({"strides": 2}, "its stride is 2"),
        ({"groups": 1}, "one filter for every channel"),
        ({"padding": [20, 0], "taps": 17}, "17 taps"),
    ):
        options = {"groups": 16, **change}
        shape = (16, 16 if "groups" in change else 1, options.pop("taps", 4))
        weight = named_const(np.ones(shape, np.float32), "w")

        def build(emit: Any, x: Any, weight: Any = weight, options: Any = options) -> Any:
            turned = emit(relax.op.permute_dims(x, [0, 2, 1]))
            value = emit(relax.op.nn.conv1d(turned, weight, **options), name_hint="conv")
            return emit(relax.op.permute_dims(value, [0, 2, 1]))

        stays(module(build, x=(1, 9, 16)), reason)


def test_a_convolution_that_is_read_elsewhere_stays() -> None:
    def build(emit: Any, x: Any) -> Any:
        turned = emit(relax.op.permute_dims(x, [0, 2, 1]))
        taps = named_const(filters(16, 4)[0], "w")
        value = emit(relax.op.nn.conv1d(turned, taps, groups=16), name_hint="conv")
        again = emit(relax.op.permute_dims(value, [0, 2, 1]))
        return emit(relax.op.add(again, emit(relax.op.sum(value))))

    stays(module(build, x=(1, 9, 16)), "nothing else reads")


def test_a_convolution_with_filters_from_outside_stays() -> None:
    def build(emit: Any, x: Any, w: Any) -> Any:
        turned = emit(relax.op.permute_dims(x, [0, 2, 1]))
        value = emit(relax.op.nn.conv1d(turned, w, groups=16), name_hint="conv")
        return emit(relax.op.permute_dims(value, [0, 2, 1]))

    stays(module(build, x=(1, 9, 16), w=(16, 1, 4)), "no constant")


def stays(mod: Any, reason: str) -> None:
    fuse = FuseDepthwiseConv()
    tvm.ir.assert_structural_equal(fuse(mod), mod)
    assert fuse.fused == 0
    assert reason in fuse.refusals["conv"]


# FuseSoftplus


def spelled(emit: Any, x: Any) -> Any:
    """Return softplus as the importer spells it."""
    one = relax.const(np.float32(1.0))
    small = emit(relax.op.exp(emit(relax.op.negative(emit(relax.op.abs(x))))))
    total = emit(relax.op.add(small, one))
    upper = emit(relax.op.multiply(emit(relax.op.log(total)), small))
    quotient = emit(relax.op.divide(upper, emit(relax.op.subtract(total, one))))
    tail = emit(relax.op.where(emit(relax.op.equal(total, one)), small, quotient))
    positive = emit(relax.op.maximum(x, relax.const(np.float32(0.0))))
    return emit(relax.op.add(positive, tail))


def one_softplus(emit: Any, x: Any) -> Any:
    kernel = relax.BlockBuilder.current().call_te(
        lambda t: te.compute(t.shape, lambda *at: vector_math.softplus(t[at]), name="compute"),
        x,
        primfunc_name_hint="softplus",
    )
    return emit(kernel)


@pytest.mark.parametrize("short", [False, True])
def test_softplus_becomes_one_function(short: bool) -> None:
    def plain(emit: Any, x: Any) -> Any:
        small = emit(relax.op.exp(emit(relax.op.negative(emit(relax.op.abs(x))))))
        tail = emit(relax.op.log(emit(relax.op.add(small, relax.const(np.float32(1.0))))))
        return emit(relax.op.add(emit(relax.op.maximum(x, relax.const(np.float32(0.0)))), tail))

    def around(inner: Build) -> Any:
        def build(emit: Any, x: Any) -> Any:
            return emit(relax.op.negative(inner(emit, emit(relax.op.tanh(x)))))

        return module(build, x=(5, 32))

    fuse = FuseSoftplus()
    tvm.ir.assert_structural_equal(fuse(around(plain if short else spelled)), around(one_softplus))
    assert len(fuse.fused) == 1


def test_softplus_with_an_inner_reader_stays() -> None:
    def build(emit: Any, x: Any) -> Any:
        size = emit(relax.op.abs(x))
        small = emit(relax.op.exp(emit(relax.op.negative(size))))
        tail = emit(relax.op.log(emit(relax.op.add(small, relax.const(np.float32(1.0))))))
        whole = emit(relax.op.add(emit(relax.op.maximum(x, relax.const(np.float32(0.0)))), tail))
        return emit(relax.op.add(whole, size))

    mod = module(build, x=(5, 32))
    tvm.ir.assert_structural_equal(FuseSoftplus()(mod), mod)


def test_fused_softplus_equals_float64() -> None:
    x = np.linspace(-80, 80, 5 * 4096, dtype=np.float32).reshape(5, -1)
    result = execute(module(spelled, x=x.shape), x)
    np.testing.assert_allclose(result, np.logaddexp(0, x.astype(np.float64)), rtol=5e-7, atol=0)


# SliceSplits


def test_splits_become_slices() -> None:
    def split(emit: Any, x: Any) -> Any:
        parts = emit(relax.op.split(x, [3, 5], 1))
        first, last = (emit(relax.TupleGetItem(parts, i)) for i in (0, 2))
        return emit(relax.op.add(emit(relax.op.exp(first)), emit(relax.op.sum(last))))

    def sliced(emit: Any, x: Any) -> Any:
        first, last = (emit(relax.op.strided_slice(x, [1], [a], [b])) for a, b in ((0, 3), (5, 8)))
        return emit(relax.op.add(emit(relax.op.exp(first)), emit(relax.op.sum(last))))

    passed = SliceSplits()
    tvm.ir.assert_structural_equal(passed(module(split, x=(4, 8))), module(sliced, x=(4, 8)))
    assert passed.slices == 2


def test_equal_parts_on_a_last_axis_are_sliced() -> None:
    def build(emit: Any, x: Any) -> Any:
        parts = emit(relax.op.split(x, 2, -1))
        first, last = (emit(relax.TupleGetItem(parts, i)) for i in (0, 1))
        return emit(relax.op.subtract(first, last))

    x = np.arange(4 * 8, dtype=np.float32).reshape(4, 8)
    mod = module(build, x=(4, 8))
    assert calls(SliceSplits()(mod)) == ["relax.strided_slice"] * 2 + ["relax.subtract"]
    np.testing.assert_array_equal(execute(mod, x), x[:, :4] - x[:, 4:])
