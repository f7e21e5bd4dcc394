"""Lowering to the CPU: the passes one by one, and a whole encoder against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scipy import special

from icd_tvm._tvm import GenericConst, const_name, named_const, relax, tvm
from icd_tvm.models.bert import BertConfig, build_bert, random_bert_weights
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.inputs import random_inputs
from icd_tvm.relax_passes.attention_match import Codes
from icd_tvm.relax_passes.fuse_attention import FuseAttention
from icd_tvm.relax_passes.fuse_residual_norm import FuseResidualNorm
from icd_tvm.relax_passes.lower_cpu import build_cpu, cpu_pipeline, lower_and_build
from icd_tvm.relax_passes.merge_parallel_matmul import MergeParallelMatmul
from icd_tvm.relax_passes.pack_weights import PackWeights
from icd_tvm.relax_passes.replace_constants import replace_constants
from icd_tvm.relax_passes.select_kernels import SelectKernels, read_kernels
from icd_tvm.tir_schedules.cpu.block_sparse import pack_vrow, vrow_matmul
from icd_tvm.tir_schedules.cpu.matmul_kinds import build_matmul
from icd_tvm.tir_schedules.cpu.select import KernelChoice
from icd_tvm.tir_schedules.target import host_target, parse_target

Array = np.ndarray
TINY = BertConfig(layers=2, hidden=64, heads=4, ffn=160, vocab=50, max_position=32)
TARGET = host_target(2)
Build = Callable[..., Any]


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def module(build: Build, **inputs: tuple[int, ...]) -> Any:
    """Return a module whose main computes ``build(emit, *inputs)``."""
    builder = relax.BlockBuilder()
    variables = [relax.Var(n, relax.TensorType(s, "float32")) for n, s in inputs.items()]
    with builder.function("main", variables):
        with builder.dataflow():
            out = builder.emit_output(build(builder.emit, *variables))
        builder.emit_func_output(out)
    return builder.get()


def calls(mod: Any) -> list[str]:
    """Return the names of the kernels and operators main calls, in order."""
    names = []
    for block in mod["main"].body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, tvm.ir.Call) and isinstance(value.op, tvm.ir.Op):
                called = value.op.name == "relax.call_tir"
                names.append(value.args[0].name_hint if called else value.op.name)
    return names


def constants(mod: Any) -> dict[str, Array]:
    found: dict[str, Array] = {}

    def visit(expr: Any) -> None:
        if isinstance(expr, GenericConst):
            found[const_name(expr)] = expr.value.numpy()

    relax.analysis.post_order_visit(mod["main"], visit)
    return found


def lower(mod: Any, target: Any = TARGET, **options: Any) -> Any:
    with target:
        return cpu_pipeline(target, **options)(mod)


def execute(mod: Any, *inputs: Array, target: Any = TARGET, **options: Any) -> Array:
    machine = relax.VirtualMachine(build_cpu(mod, target, **options), tvm.cpu())
    return machine["main"](*[tvm.runtime.tensor(array) for array in inputs]).numpy()


@lru_cache
def tiny(seq: int = 16, batch: int = 1) -> Any:
    return import_onnx(build_bert(TINY, random_bert_weights(TINY), seq=seq, batch=batch))


def onnx_runtime(imported: Any, feeds: dict[str, Array]) -> Array:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        imported.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)[0]


# A whole encoder


@pytest.mark.parametrize(("seq", "batch"), [(16, 1), (13, 1), (1, 1), (9, 3)])
def test_encoder_equals_onnx_runtime(seq: int, batch: int) -> None:
    imported = tiny(seq, batch)
    feeds = random_inputs(imported)
    expected = onnx_runtime(imported, feeds)
    actual = execute(imported.mod, *[feeds[spec.name] for spec in imported.inputs])
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


def test_encoder_on_a_portable_target_equals_onnx_runtime() -> None:
    imported = tiny()
    feeds = random_inputs(imported, seed=3)
    inputs = [feeds[spec.name] for spec in imported.inputs]
    expected = onnx_runtime(imported, feeds)
    for name in ("x86-64-v3", "x86-64"):
        actual = execute(imported.mod, *inputs, target=parse_target(name, 1))
        assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


def test_encoder_runs_no_transpose_no_copy_and_no_unpacked_matmul() -> None:
    names = calls(lower(tiny().mod))
    assert sum("dense_matmul" in name for name in names) == 4 * TINY.layers
    assert sum(name.startswith("attention") for name in names) == TINY.layers
    assert sum("layer_norm" in name for name in names) == 2 * TINY.layers + 1
    # Two embedding look-ups, one addition of position embeddings, and the mask.
    rest = [n for n in names if not any(w in n for w in ("dense", "attention", "layer_norm"))]
    assert len(rest) <= 4
    for word in ("transpose", "permute", "reshape", "relax.", "split", "slice", "concat"):
        assert not any(word in name for name in names)
    gelu = [name for name in names if "gelu" in name]
    assert len(gelu) == TINY.layers
    assert all("dense_matmul" in name for name in gelu)


def test_lowering_leaves_the_module_of_the_caller_alone() -> None:
    mod = tiny().mod
    before = mod.clone()
    lower(mod)
    tvm.ir.assert_structural_equal(mod, before)


# Sparse kernels


def group_mask(shape: tuple[int, int], v: int, seed: int) -> Array:
    k, n = shape
    rng = np.random.default_rng(seed)
    keep = rng.random((k, -(-n // v))) < 0.5
    return np.repeat(keep, v, axis=1)[:, :n]


def sparse_encoder(v: int) -> Any:
    mod = tiny().mod
    arrays: dict[Any, Array] = {}

    def visit(expr: Any) -> None:
        if isinstance(expr, GenericConst) and "layer" in const_name(expr):
            array = expr.value.numpy()
            if array.ndim == 2:
                arrays[expr] = array * group_mask(array.shape, v, len(arrays))

    relax.analysis.post_order_visit(mod["main"], visit)
    assert len(arrays) == 6 * TINY.layers
    return replace_constants(mod, arrays)


@pytest.mark.parametrize(
    ("kind", "v"),
    [
        ("vrow16", 16),
        ("vrow32", 32),
        ("rowlist", 10**6),
        ("vcol8", 8),
        ("vcol16", 16),
        ("vcol1", 1),
    ],
)
def test_encoder_with_sparse_kernels_equals_the_dense_one(kind: str, v: int) -> None:
    mod, imported = sparse_encoder(v), tiny()
    feeds = random_inputs(imported)
    inputs = [feeds[spec.name] for spec in imported.inputs]
    lowered = calls(lower(mod, kernels=KernelChoice(kind, 0, "")))
    assert sum(f"{kind}_matmul" in name for name in lowered) == 4 * TINY.layers
    assert not any("dense_matmul" in name for name in lowered)
    dense = execute(mod, *inputs, kernels=KernelChoice("dense", 0, ""))
    actual = execute(mod, *inputs, kernels=KernelChoice(kind, 0, ""))
    np.testing.assert_allclose(actual, dense, atol=1e-5 * np.abs(dense).max())


def test_selection_records_every_choice_and_keeps_names() -> None:
    weight = random(64, 96)
    weight[:, :32] *= group_mask((64, 32), 32, 0)
    weight[:, 32:] *= group_mask((64, 64), 32, 1)

    def build(emit: Build, x: Any) -> Any:
        full = emit(relax.op.matmul(x, named_const(random(64, 64), "full")), name_hint="a")
        return emit(relax.op.matmul(full, named_const(weight, "holes")), name_hint="b")

    mod = module(build, x=(1, 32, 64))
    select = SelectKernels(TARGET, tune=False)
    after = select(mod)
    assert list(select.choices) == ["b"]
    choice = select.choices["b"]
    assert choice.kind == "vrow32"
    assert calls(after) == ["relax.matmul", "vrow32_matmul"]
    found = constants(PackWeights(TARGET)(after))
    assert set(found) == {"full", "holes", "holes.rows"}
    np.testing.assert_array_equal(found["holes.rows"], pack_vrow(weight, 32)[0])
    assert found["full"].shape[1] == 64
    x = random(1, 32, 64, seed=1)
    np.testing.assert_allclose(
        execute(mod, x, tune=False), x @ random(64, 64) @ weight, atol=2e-3, rtol=0
    )


def test_a_call_of_a_sparse_kernel_takes_its_epilogue() -> None:
    weight = random(48, 64) * group_mask((48, 64), 16, 0)
    idx, data = pack_vrow(weight, 16)
    bias = random(64, seed=2)

    def build(emit: Build, x: Any, residual: Any) -> Any:
        func = vrow_matmul(20, 48, 64, idx.shape[1], 16, lead=(1,), target=TARGET)
        gv = builder_of(emit).add_func(func, "vrow")
        args = relax.Tuple([x, relax.const(idx), relax.const(data)])
        y = emit(relax.call_tir(gv, args, relax.TensorType((1, 20, 64), "float32")))
        y = emit(relax.op.nn.gelu(emit(relax.op.add(y, relax.const(bias)))))
        return emit(relax.op.add(y, residual))

    mod = module(build, x=(1, 20, 48), residual=(1, 20, 64))
    assert len(calls(lower(mod))) == 1
    x, residual = random(1, 20, 48, seed=3), random(1, 20, 64, seed=4)
    hidden = x @ weight + bias
    expected = hidden * special.ndtr(hidden) + residual
    np.testing.assert_allclose(execute(mod, x, residual), expected, atol=1e-4)


def test_the_transposed_kernel_takes_an_epilogue_with_a_residual() -> None:
    weight = random(48, 70) * group_mask((48, 70), 8, 0)
    bias = random(70, seed=2)

    def build(emit: Build, x: Any, residual: Any) -> Any:
        y = emit(relax.op.matmul(x, named_const(weight, "w")))
        y = emit(relax.op.nn.gelu(emit(relax.op.add(y, relax.const(bias)))))
        return emit(relax.op.add(y, residual))

    mod = module(build, x=(2, 20, 48), residual=(2, 20, 70))
    kernels = KernelChoice("vcol8", 0, "")
    assert len(calls(lower(mod, kernels=kernels))) == 1
    x, residual = random(2, 20, 48, seed=3), random(2, 20, 70, seed=4)
    hidden = x @ weight + bias
    expected = hidden * special.ndtr(hidden) + residual
    np.testing.assert_allclose(execute(mod, x, residual, kernels=kernels), expected, atol=1e-4)


def test_choices_travel_with_the_module_and_the_build() -> None:
    mod = sparse_encoder(8)
    executable, choices, _ = lower_and_build(mod, TARGET, tune=False)
    assert len(choices) == 6 * TINY.layers - 2 * TINY.layers
    assert all(isinstance(choice, KernelChoice) for choice in choices.values())
    assert executable is not None
    assert read_kernels(lower(mod, tune=False)) == choices
    assert read_kernels(mod) == {}


def builder_of(emit: Build) -> Any:
    return emit.__self__  # type: ignore[attr-defined]


# Matmuls


def test_an_epilogue_that_broadcasts_runs_after_the_tile() -> None:
    weight = random(24, 32)

    def build(emit: Build, x: Any, y: Any) -> Any:
        return emit(relax.op.add(emit(relax.op.matmul(x, relax.const(weight))), y))

    mod = module(build, x=(1, 10, 24), y=(3, 10, 32))
    x, y = random(1, 10, 24), random(3, 10, 32, seed=1)
    np.testing.assert_allclose(execute(mod, x, y), x @ weight + y, atol=1e-4)


def test_a_transposed_constant_weight_is_packed() -> None:
    weight = random(40, 24)

    def build(emit: Build, x: Any) -> Any:
        turned = emit(relax.op.permute_dims(relax.const(weight)))
        return emit(relax.op.matmul(x, turned))

    mod = module(build, x=(7, 24))
    assert calls(lower(mod)) == ["dense_matmul"]
    x = random(7, 24)
    np.testing.assert_allclose(execute(mod, x), x @ weight.T, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "n", "kernel"),
    [((1,), 512, "narrow"), ((1, 1), 512, "narrow"), ((8,), 512, "narrow"), ((2, 4), 512, "narrow"),
     ((9,), 512, "dense"), ((3, 4), 512, "dense"), ((1,), 40, "dense")],
)  # fmt: skip
def test_few_rows_take_the_kernel_that_fetches_ahead(
    rows: tuple[int, ...], n: int, kernel: str
) -> None:
    weight = random(24, n)
    mod = module(lambda emit, x: emit(relax.op.matmul(x, relax.const(weight))), x=(*rows, 24))
    assert calls(lower(mod)) == [f"{kernel}_matmul"]
    x = random(*rows, 24)
    np.testing.assert_allclose(execute(mod, x), x @ weight, atol=1e-4)


@pytest.mark.parametrize(("rows", "name"), [(1, "narrow"), (64, "dense")])
def test_what_is_timed_as_dense_is_what_a_model_gets(rows: int, name: str) -> None:
    weight = random(24, 512)
    mod = module(lambda emit, x: emit(relax.op.matmul(x, relax.const(weight))), x=(rows, 24))
    given = PackWeights(TARGET)(mod)[f"{name}_matmul"]
    tvm.ir.assert_structural_equal(build_matmul("dense", (rows, 24, 512), 24, TARGET), given)


@pytest.mark.parametrize("shapes", [((2, 9, 24), (2, 24, 32)), ((5, 7), (7, 3)), ((4,), (4, 16))])
def test_matmul_without_a_constant(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    mod = module(lambda emit, a, b: emit(relax.op.matmul(a, b)), a=shapes[0], b=shapes[1])
    a, b = random(*shapes[0]), random(*shapes[1], seed=1)
    np.testing.assert_allclose(execute(mod, a, b), a @ b, atol=1e-4)


# What the vector code computes -> the operator, and numpy's.
LEGALISED: dict[str, tuple[Any, Any]] = {
    "gelu": (relax.op.nn.gelu, lambda x: x * special.ndtr(x)),
    "gelu_tanh": (
        relax.op.nn.gelu_tanh,
        lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    ),
    "silu": (relax.op.nn.silu, lambda x: x * special.expit(x)),
    "sigmoid": (relax.op.sigmoid, special.expit),
    "tanh": (relax.op.tanh, np.tanh),
    "exp": (relax.op.exp, np.exp),
    "erf": (relax.op.erf, special.erf),
    "log": (lambda x: relax.op.log(relax.op.abs(x)), lambda x: np.log(np.abs(x))),
    "round": (relax.op.round, np.rint),
    "divide": (lambda x: relax.op.divide(x, relax.const(np.float32(3))), lambda x: x / 3),
    "cube": (lambda x: relax.op.power(x, relax.const(np.float32(3))), lambda x: x**3),
    "softmax": (lambda x: relax.op.nn.softmax(x, axis=-1), lambda x: special.softmax(x, -1)),
    "softmax over the first axis": (
        lambda x: relax.op.nn.softmax(x, axis=0),
        lambda x: special.softmax(x, 0),
    ),
    "log_softmax": (
        lambda x: relax.op.nn.log_softmax(x, axis=-1),
        lambda x: special.log_softmax(x, -1),
    ),
}


def check_legalised(name: str, shape: tuple[int, ...], target: Any = TARGET) -> None:
    operator, exact = LEGALISED[name]
    x = random(*shape) * 3
    actual = execute(module(lambda emit, x: emit(operator(x)), x=shape), x, target=target)
    np.testing.assert_allclose(actual, exact(x.astype(np.float64)), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", LEGALISED)
def test_vector_legalisations(name: str) -> None:
    check_legalised(name, (5, 37))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(sorted(LEGALISED)),
    shape=st.lists(st.integers(1, 70), min_size=1, max_size=3).map(tuple),
    target=st.sampled_from([TARGET, parse_target("x86-64-v3", 1)]),
)
@example(name="softmax", shape=(19,), target=TARGET)
@example(name="gelu", shape=(3, 70, 127), target=TARGET)
def test_vector_legalisations_of_any_shape(name: str, shape: tuple[int, ...], target: Any) -> None:
    check_legalised(name, shape, target)


@pytest.mark.parametrize("name", ["divide", "power"])
def test_a_constant_that_adds_an_axis_keeps_it(name: str) -> None:
    operator = getattr(relax.op, name)
    number = relax.const(np.full((1, 1, 1), 2, np.float32))
    mod, x = module(lambda emit, x: emit(operator(x, number)), x=(5, 8)), random(5, 8)
    np.testing.assert_allclose(execute(mod, x), [x / 2 if name == "divide" else x * x], rtol=1e-6)


@pytest.mark.parametrize("number", [1e-45, -1e-39, 3e38, np.inf, np.nan])
def test_a_number_without_a_reciprocal_divides(number: float) -> None:
    mod = module(lambda emit, x: emit(relax.op.divide(x, scalar(number))), x=(1, 16))
    x = np.array([[0, 1, -1, 3e-39, 1e38, np.inf, -np.inf, np.nan] * 2], np.float32)
    with np.errstate(all="ignore"):
        expected = x / np.float32(number)
    np.testing.assert_array_equal(execute(mod, x), expected)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.integers(1, 40), width=st.integers(1, 70), lead=st.sampled_from([(1,), (3, 7)]))
def test_rows_of_a_table_are_looked_up(rows: int, width: int, lead: tuple[int, ...]) -> None:
    table = random(rows, width)
    places = np.random.default_rng(width).integers(0, rows, lead)
    builder, i = relax.BlockBuilder(), relax.Var("i", relax.TensorType(lead, "int64"))
    with builder.function("main", [i]):
        with builder.dataflow():
            out = builder.emit_output(relax.op.take(relax.const(table), i, axis=0))
        builder.emit_func_output(out)
    np.testing.assert_array_equal(execute(builder.get(), places), table[places])


# FuseAttention

BATCH, LENGTH, HEADS, DIM = 2, 6, 3, 8
WIDTH = HEADS * DIM


def scalar(value: float) -> Any:
    return relax.const(np.float32(value))


def attention_module(
    *,
    before: Any = None,
    after: Any = ("multiply", 0.25),
    mask: tuple[int, ...] | None = (BATCH, 1, 1, LENGTH),
    axis: int = -1,
    twice: bool = False,
    key_axes: list[int] | None = None,
    out_axes: list[int] | None = None,
    mask_first: bool = False,
    returns: bool = False,
    codes: dict[str, Codes] | None = None,
) -> Any:
    """Return softmax attention as exporters write it, with one part changed.

    ``codes`` sends operands through them: q, k, v, p (probabilities).
    """
    rows = (BATCH, LENGTH, WIDTH)
    split = (BATCH, LENGTH, HEADS, DIM)

    def build(emit: Build, q: Any, k: Any, v: Any, m: Any = None) -> Any:
        def heads(x: Any, axes: list[int]) -> Any:
            return emit(relax.op.permute_dims(emit(relax.op.reshape(x, split)), axes))

        def scaled(x: Any, step: Any) -> Any:
            return x if step is None else emit(getattr(relax.op, step[0])(x, scalar(step[1])))

        def coded(x: Any, name: str) -> Any:
            code = (codes or {}).get(name)
            if code is None:
                return x
            parameters = scalar(code.scale), relax.const(code.zero, code.dtype)
            small = emit(relax.op.quantize(x, *parameters, axis=1, out_dtype=code.dtype))
            return emit(relax.op.dequantize(small, *parameters, axis=1))

        query = scaled(heads(q, [0, 2, 1, 3]), before)
        if twice:
            key = emit(relax.op.permute_dims(heads(k, [0, 2, 1, 3]), [0, 1, 3, 2]))
        else:
            key = heads(k, key_axes or [0, 2, 3, 1])
        scores = scaled(emit(relax.op.matmul(coded(query, "q"), coded(key, "k"))), after)
        if m is not None:
            scores = emit(relax.op.add(m, scores) if mask_first else relax.op.add(scores, m))
        weights = emit(relax.op.nn.softmax(scores, axis=axis), name_hint="weights")
        values = coded(heads(v, [0, 2, 1, 3]), "v")
        context = emit(relax.op.matmul(coded(weights, "p"), values))
        context = emit(relax.op.permute_dims(context, out_axes or [0, 2, 1, 3]))
        out = emit(relax.op.reshape(context, rows), name_hint="out")
        if returns:
            out = emit(relax.op.add(out, emit(relax.op.sum(weights))))
        return out

    masks = {"m": mask} if mask is not None else {}
    return module(build, q=rows, k=rows, v=rows, **masks)


def attend(q: Array, k: Array, v: Array, mask: Any, scale: float) -> Array:
    def heads(x: Array) -> Array:
        return x.reshape(BATCH, LENGTH, HEADS, DIM).transpose(0, 2, 1, 3)

    scores = heads(q) @ heads(k).transpose(0, 1, 3, 2) * scale + mask
    out = special.softmax(scores, axis=-1) @ heads(v)
    return out.transpose(0, 2, 1, 3).reshape(BATCH, LENGTH, WIDTH)


@pytest.mark.parametrize(
    ("change", "scale"),
    [
        ({}, 0.25),
        ({"after": ("divide", 4.0)}, 0.25),
        ({"before": ("multiply", 0.25), "after": None}, 0.25),
        ({"before": ("divide", 2.0), "after": ("multiply", 0.5)}, 0.25),
        ({"after": None, "mask": None}, 1.0),
        ({"mask": (1, 1, 1, LENGTH)}, 0.25),
        ({"twice": True}, 0.25),
        ({"mask_first": True}, 0.25),
    ],
)
def test_attention_is_fused_as_exporters_write_it(change: dict[str, Any], scale: float) -> None:
    mod = attention_module(**change)
    fuse = FuseAttention(TARGET)
    after = fuse(mod)
    assert calls(after) == ["attention"]
    assert (fuse.fused, fuse.refusals) == (["out"], {})
    q, k, v = (random(BATCH, LENGTH, WIDTH, seed=s) for s in range(3))
    shape = change.get("mask", (BATCH, 1, 1, LENGTH))
    masks = [] if shape is None else [random(*shape, seed=9)]
    expected = attend(q, k, v, masks[0] if masks else 0, scale)
    np.testing.assert_allclose(execute(mod, q, k, v, *masks), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mask": (BATCH, 1, LENGTH, LENGTH)}, "the mask has shape (2, 1, 6, 6)"),
        ({"mask": (BATCH, HEADS, 1, LENGTH)}, "the mask has shape (2, 3, 1, 6)"),
        ({"axis": 2}, "it does not run over the last axis"),
        ({"returns": True}, "the probabilities have no single user"),
        ({"out_axes": [0, 1, 2, 3]}, "the context is transposed by (0, 1, 2, 3)"),
    ],
)
def test_attention_that_differs_is_left_alone_with_a_reason(
    change: dict[str, Any], reason: str
) -> None:
    mod = attention_module(**change)
    fuse = FuseAttention(TARGET)
    after = fuse(mod)
    assert "attention" not in calls(after)
    assert reason in fuse.refusals["weights"]
    assert fuse.fused == []


CODES = {
    "q": Codes("uint8", 0.02, 130),
    "k": Codes("int8", 0.025, 0),
    "v": Codes("int8", 0.03, 0),
    "p": Codes("uint8", 1 / 255, 0),
}


def rounded(x: Array, code: Codes) -> Array:
    info = np.iinfo(code.dtype)
    steps = np.clip(np.rint(x.astype(np.float64) / code.scale) + code.zero, info.min, info.max)
    return (steps - code.zero) * code.scale


@pytest.mark.parametrize("before", [None, ("divide", 2.0)])
def test_quantised_attention_multiplies_bytes(before: Any) -> None:
    mod = attention_module(codes=CODES, before=before)
    fuse = FuseAttention(TARGET)
    after = fuse(mod)
    assert calls(after) == [*["relax.quantize"] * 3, "byte_attention"]
    assert (fuse.fused, fuse.refusals) == (["out"], {})
    q, k, v = (random(BATCH, LENGTH, WIDTH, seed=s) for s in range(3))
    mask = random(BATCH, 1, 1, LENGTH, seed=9)

    def heads(x: Array) -> Array:
        return x.reshape(BATCH, LENGTH, HEADS, DIM).transpose(0, 2, 1, 3)

    query = rounded(q / (1.0 if before is None else 2.0), CODES["q"])
    scores = heads(query) @ heads(rounded(k, CODES["k"])).transpose(0, 1, 3, 2)
    weights = special.softmax(scores * 0.25 + mask, axis=-1)
    out = rounded(weights, CODES["p"]) @ heads(rounded(v, CODES["v"]))
    expected = out.transpose(0, 2, 1, 3).reshape(BATCH, LENGTH, WIDTH)
    # A value on the edge between two codes may fall to either side.
    error = np.abs(execute(mod, q, k, v, mask) - expected)
    assert np.quantile(error, 0.9) < 1e-5
    assert error.max() < 0.02


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"q": None}, "only some operands of its products are quantised"),
        ({"p": None}, "only some operands of its products are quantised"),
        ({"k": Codes("uint8", 0.1, 0)}, "its operands are ('uint8', 'uint8', 'int8', 'uint8')"),
        ({"v": Codes("int8", 0.1, 3)}, "the zero point of its keys, values or probabilities"),
    ],
)
def test_other_codes_are_left_alone_with_a_reason(change: dict[str, Any], reason: str) -> None:
    mod = attention_module(codes={**CODES, **change})
    fuse = FuseAttention(TARGET)
    assert "byte_attention" not in calls(fuse(mod))
    assert reason in fuse.refusals["weights"]


def test_unfused_attention_still_computes_the_same() -> None:
    mask = (BATCH, 1, LENGTH, LENGTH)
    q, k, v = (random(BATCH, LENGTH, WIDTH, seed=s) for s in range(3))
    m = random(*mask, seed=9)
    actual = execute(attention_module(mask=mask), q, k, v, m)
    np.testing.assert_allclose(actual, attend(q, k, v, m, 0.25), atol=1e-5)


def test_a_softmax_that_is_no_attention_is_refused_with_a_reason() -> None:
    fuse = FuseAttention(TARGET)
    fuse(module(lambda emit, x: emit(relax.op.nn.softmax(x), name_hint="s"), x=(4, 5)))
    assert "2 axes" in next(iter(fuse.refusals.values()))
    fuse(module(lambda emit, x: emit(relax.op.nn.softmax(x), name_hint="s"), x=(1, 2, 4, 5)))
    assert "no product" in next(iter(fuse.refusals.values()))


# MergeParallelMatmul


def projected_attention(*, same_input: bool = True, bias: bool = True, shared: bool = False) -> Any:
    rows, split = (1, LENGTH, WIDTH), (1, LENGTH, HEADS, DIM)

    def build(emit: Build, x: Any, other: Any) -> Any:
        parts = []
        for at, name in enumerate("qkv"):
            source = other if name == "v" and not same_input else x
            part = emit(relax.op.matmul(source, named_const(random(WIDTH, WIDTH, seed=at), name)))
            if bias or name == "k":
                part = emit(relax.op.add(part, named_const(random(WIDTH, seed=9), f"{name}.b")))
            parts.append(part)
        axes = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
        q, k, v = (
            emit(relax.op.permute_dims(emit(relax.op.reshape(p, split)), a))
            for p, a in zip(parts, axes, strict=True)
        )
        weights = emit(relax.op.nn.softmax(emit(relax.op.matmul(q, k))))
        out = emit(relax.op.permute_dims(emit(relax.op.matmul(weights, v)), [0, 2, 1, 3]))
        out = emit(relax.op.reshape(out, rows))
        return emit(relax.op.add(out, parts[0])) if shared else out

    return module(build, x=rows, other=rows)


def merge(mod: Any) -> tuple[Any, MergeParallelMatmul]:
    passed = MergeParallelMatmul(TARGET)
    return passed(FuseAttention(TARGET)(mod)), passed


@pytest.mark.parametrize("bias", [True, False])
def test_projections_of_one_input_are_merged(bias: bool) -> None:
    mod = projected_attention(bias=bias)
    after, passed = merge(mod)
    assert calls(after) == ["relax.matmul", "relax.add", "attention1"]
    assert passed.merged == 1
    found = constants(after)
    assert found["q+k+v"].shape == (WIDTH, 3 * WIDTH)
    np.testing.assert_array_equal(
        found["q+k+v"][:, WIDTH : 2 * WIDTH], random(WIDTH, WIDTH, seed=1)
    )
    x, other = random(1, LENGTH, WIDTH, seed=5), random(1, LENGTH, WIDTH, seed=6)
    expected = execute_plain(mod, x, other)
    np.testing.assert_allclose(execute(mod, x, other), expected, atol=1e-3)


def execute_plain(mod: Any, *inputs: Array) -> Array:
    """Run a module through TVM's own pipeline, as an independent reference."""
    machine = relax.VirtualMachine(tvm.compile(mod, tvm.target.Target("llvm")), tvm.cpu())
    return machine["main"](*[tvm.runtime.tensor(array) for array in inputs]).numpy()


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"same_input": False}, "different inputs"), ({"shared": True}, "used outside")],
)
def test_projections_that_cannot_be_merged_say_why(change: dict[str, Any], reason: str) -> None:
    mod = projected_attention(**change)
    after, passed = merge(mod)
    assert passed.merged == 0
    assert reason in passed.refusals[0]
    assert calls(after).count("relax.matmul") == 3
    x, other = random(1, LENGTH, WIDTH, seed=5), random(1, LENGTH, WIDTH, seed=6)
    np.testing.assert_allclose(execute(mod, x, other), execute_plain(mod, x, other), atol=1e-3)


# FuseResidualNorm


def norm_module(*, axes: list[int] | None = None, keep: bool = False, narrow: bool = False) -> Any:
    size = 6 if axes == [1] else 20

    def build(emit: Build, x: Any, y: Any) -> Any:
        total = emit(relax.op.add(x, y), name_hint="total")
        gamma, beta = relax.const(random(size)), relax.const(random(size, seed=1))
        out = emit(relax.op.nn.layer_norm(total, gamma, beta, axes or [-1]))
        return emit(relax.op.add(out, total)) if keep else out

    return module(build, x=(2, 6, 20), y=(1, 1, 20) if narrow else (2, 6, 20))


@pytest.mark.parametrize(
    ("change", "expected", "fused"),
    [
        ({}, ["residual_layer_norm"], {"residual": 1, "plain": 0}),
        ({"keep": True}, ["relax.add", "layer_norm", "relax.add"], {"residual": 0, "plain": 1}),
        ({"narrow": True}, ["relax.add", "layer_norm"], {"residual": 0, "plain": 1}),
    ],
)
def test_norms_are_fused(change: dict[str, Any], expected: list[str], fused: Any) -> None:
    mod = norm_module(**change)
    passed = FuseResidualNorm(TARGET)
    assert calls(passed(mod)) == expected
    assert passed.fused == fused
    inputs = [random(*(int(d) for d in p.ty.shape.values), seed=7) for p in mod["main"].params]
    np.testing.assert_allclose(execute(mod, *inputs), execute_plain(mod, *inputs), atol=1e-5)


def test_a_norm_over_another_axis_is_left_alone_with_a_reason() -> None:
    passed = FuseResidualNorm(TARGET)
    mod = norm_module(axes=[1])
    assert calls(passed(mod)) == ["relax.add", "relax.nn.layer_norm"]
    assert "not the last one" in passed.refusals["total"]
