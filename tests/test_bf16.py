"""bfloat16 products: kernels against numpy float64 of the rounded operands, and whole modules."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from converter_check import run_ort
from cpu_targets import HOST, RUNNABLE
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from quant_models import example as inputs
from quant_models import two_layers

from icd_tvm._tvm import relax, te, tvm
from icd_tvm.adapters.quant import apply_quant, parse_quant
from icd_tvm.errors import ConfigError, ShapeError
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.inputs import random_inputs
from icd_tvm.models.registry import build as build_model
from icd_tvm.relax_passes.apply_quant import ApplyQuant
from icd_tvm.relax_passes.fuse_attention import FuseAttention
from icd_tvm.relax_passes.fuse_bf16_matmul import FuseBf16Matmul
from icd_tvm.relax_passes.layer_rules import parse_layer_rules
from icd_tvm.relax_passes.lower_cpu import lower_and_build
from icd_tvm.relax_passes.verify_layout import order_tolerance
from icd_tvm.runtime.build import build as build_module
from icd_tvm.tir_schedules.cpu.attention_head import AttentionShape, attention_shape
from icd_tvm.tir_schedules.cpu.bf16_attention import bf16_attention
from icd_tvm.tir_schedules.cpu.bf16_dot import bf16_dot, has_bf16, round_bits
from icd_tvm.tir_schedules.cpu.bf16_matmul import bf16_matmul, bf16_tile, pack_bf16
from icd_tvm.tir_schedules.cpu.block_bf16 import (
    block_bf16_matmul,
    choose_bf16_blocks,
    pack_block_bf16,
)
from icd_tvm.tir_schedules.cpu.elementwise import ElementwiseRule
from icd_tvm.tir_schedules.cpu.stack import compile_kernel
from icd_tvm.tir_schedules.cpu.tile import Tile, flat_rows
from icd_tvm.tir_schedules.cpu.tile_builder import ExplicitTileRule
from icd_tvm.tir_schedules.target import host_target, parse_target

Array = np.ndarray
native = pytest.mark.skipif(not has_bf16(HOST), reason="this CPU has no AVX512_BF16")
few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
sizes = st.integers(1, 70)


def rounded(values: Array) -> Array:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def bits(values: Array) -> Array:
    return values.astype(ml_dtypes.bfloat16).view(np.uint16)


def product(x: Array, w: Array, target: Any, tile: Tile | None = None) -> Array:
    """Run the kernel on an output full of NaN."""
    *lead, m, k = x.shape
    n = w.shape[1]
    func = bf16_matmul(m, k, n, target, lead=tuple(lead), tile=tile)
    tile = tile or bf16_tile(flat_rows(tuple(lead), m)[1], k, n, target)
    sch = ExplicitTileRule().apply(func, target, False)
    arrays = (bits(x), pack_bf16(w, tile.columns), np.full((*lead, m, n), np.nan, np.float32))
    *operands, out = [tvm.runtime.tensor(array) for array in arrays]
    compile_kernel(sch.mod["main"], target)["main"](*operands, out)
    return out.numpy()


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def check(x: Array, w: Array, target: Any, tile: Tile | None = None) -> None:
    """Compare with float64: float32 sums of k products err by at most k half steps."""
    a, b = (rounded(side).astype(np.float64) for side in (x, w))
    bound = (x.shape[-1] + 2) * 2.0**-23 * (np.abs(a) @ np.abs(b)) + 1e-30
    assert np.all(np.abs(product(x, w, target, tile) - a @ b) <= bound)


@few
@given(m=sizes, k=sizes, n=sizes, threads=st.sampled_from([1, 2]), seed=st.integers(0, 99))
@example(m=1, k=1, n=1, threads=1, seed=0)
@example(m=64, k=64, n=48, threads=2, seed=0)
@example(m=300, k=37, n=50, threads=2, seed=0)
@example(m=3, k=600, n=130, threads=2, seed=0)
def test_product_of_any_shape(m: int, k: int, n: int, threads: int, seed: int) -> None:
    check(*drawn(seed, (m, k), (k, n)), host_target(threads))


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 7), (2, 3, 1), (6, 1)])
def test_product_keeps_batch_axes(shape: tuple[int, ...]) -> None:
    check(*drawn(1, (*shape, 21), (21, 19)), HOST)


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("shape", [(9, 31, 20), (1, 64, 32)])
def test_portable_targets_widen(name: str, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    check(*drawn(2, (m, k), (k, n)), parse_target(name, 1))


@pytest.mark.parametrize(("rows", "vectors"), [(1, 1), (5, 2), (4, 6)])
def test_any_tile_gives_the_product(rows: int, vectors: int) -> None:
    check(*drawn(3, (13, 40), (40, 170)), HOST, Tile(rows, vectors, bf16_dot(HOST).lanes))


def test_hot_loop_is_the_dot_instruction_without_spills() -> None:
    target = parse_target("cooperlake", 1)
    sch = ExplicitTileRule().apply(bf16_matmul(128, 384, 384, target), target, False)
    text = compile_kernel(sch.mod["main"], target).mod.inspect_source("asm")
    loop = max(text.split("\n."), key=lambda body: body.count("vdpbf16ps"))
    tile = bf16_tile(128, 384, 384, target)
    assert loop.count("vdpbf16ps") >= 4 * tile.rows * tile.vectors
    assert "(%rsp)" not in "\n".join(line for line in loop.splitlines() if "zmm" in line)


@pytest.mark.parametrize("weight", [np.zeros(3, np.float32), np.zeros((2, 2))])
def test_weight_that_is_no_float32_matrix_is_refused(weight: Array) -> None:
    with pytest.raises(ShapeError):
        pack_bf16(weight, 16)


SPECIAL = np.array(
    [0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, np.inf, -np.inf, np.nan, 1e-40, -2.5],
    np.float32,
)


@pytest.mark.parametrize("name", ["host", "x86-64-v3"])
def test_rounding_is_to_nearest_even(name: str) -> None:
    quiet = np.array([0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    values = np.concatenate([SPECIAL, quiet, *drawn(0, (51,))])
    data = te.placeholder([values.size], "float32", name="X")
    made = te.compute(data.shape, lambda i: round_bits(data[i]), name="Y")
    target = parse_target(name, 1)
    sch = ElementwiseRule().apply(te.create_prim_func([data, made]), target, False)
    out = tvm.runtime.tensor(np.full(values.shape, 7, np.uint16))
    compile_kernel(sch.mod["main"], target)["main"](tvm.runtime.tensor(values), out)
    found = out.numpy().view(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(found, rounded(values))


def attended(shape: AttentionShape, rows: list[Array], mask: Array, threads: int = 1) -> Array:
    func = bf16_attention(shape, host_target(threads))
    out = np.full((shape.batch, shape.queries, shape.width), np.nan, np.float32)
    *args, result = [tvm.runtime.tensor(array) for array in (*rows, mask, out)]
    compile_kernel(func, HOST)["main"](*args, result)
    return result.numpy()


def expected_attention(shape: AttentionShape, rows: list[Array], mask: Array) -> Array:
    heads = [
        rounded(row).reshape(shape.batch, -1, shape.heads, shape.head_dim).transpose(0, 2, 1, 3)
        for row in rows
    ]
    q, k, v = (head.astype(np.float64) for head in heads)
    scores = q @ k.transpose(0, 1, 3, 2) * shape.scale + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    made = rounded(weights.astype(np.float32)).astype(np.float64) @ v / total
    return made.transpose(0, 2, 1, 3).reshape(shape.batch, shape.queries, shape.width)


@native
@few
@given(
    queries=st.integers(1, 40),
    keys=st.integers(1, 40),
    heads=st.integers(1, 3),
    dim=st.sampled_from([16, 32, 48]),
    batch=st.integers(1, 2),
    threads=st.sampled_from([1, 2]),
)
@example(queries=17, keys=33, heads=2, dim=32, batch=2, threads=2)
@example(queries=1, keys=1, heads=1, dim=16, batch=1, threads=1)
def test_attention(queries: int, keys: int, heads: int, dim: int, batch: int, threads: int) -> None:
    width = heads * dim
    shape = AttentionShape(
        batch, queries, keys, heads, dim, dim**-0.5, batch, (width,) * 3, products="bfloat16"
    )
    rows = drawn(keys, *((batch, length, width) for length in (queries, keys, keys)))
    mask = np.where(np.arange(keys) % 5 == 4, -3e38, 0.0).astype(np.float32)
    mask = np.broadcast_to(mask, (batch, 1, 1, keys)).copy()
    found = attended(shape, rows, mask, threads)
    # An exponential at a tie may round either way: a step of 2**-8 of one weight.
    np.testing.assert_allclose(found, expected_attention(shape, rows, mask), atol=2e-2)
    close = np.abs(found - expected_attention(shape, rows, mask)) < 1e-4
    assert close.mean() > 0.9


def test_attention_that_has_no_kernel_is_refused() -> None:
    shape = AttentionShape(1, 4, 4, 2, 24, 1.0, 1, (48,) * 3)
    with pytest.raises(ConfigError, match="AVX512_BF16"):
        bf16_attention(shape, parse_target("x86-64-v4", 1))
    with pytest.raises(ShapeError, match="24"):
        bf16_attention(shape, parse_target("cooperlake", 1))


@pytest.mark.parametrize("text", ["bf16", "bf16:attention"])
def test_request_reads_back(text: str) -> None:
    assert str(parse_quant(text)) == text


@pytest.mark.parametrize("text", ["bf16:channel", "bf16:w8a8", "bf16:asym", "bf16:smooth0.5"])
def test_request_has_no_scales(text: str) -> None:
    with pytest.raises(ConfigError, match="scales"):
        parse_quant(text)


def test_weight_is_rounded_and_takes_half_the_bytes() -> None:
    (weight,) = drawn(4, (30, 20))
    made, meta = apply_quant(weight, "bf16")
    np.testing.assert_array_equal(made.dequantize(), rounded(weight))
    assert (meta["bytes_before"], meta["bytes_after"], meta["format"]) == (2400, 1200, "bf16 codes")


def narrow(request: str = "bf16") -> Any:
    rules = parse_layer_rules(["*=bf16"], parse_quant(request), parse_quant)
    return ApplyQuant(rules)(import_onnx(two_layers()).mod)


def kernels(mod: Any) -> list[str]:
    return sorted(str(var.name_hint) for var in mod.get_global_vars() if var.name_hint != "main")


def run(mod: Any, target: Any) -> tuple[Array, list[str]]:
    lowered = lower_and_build(mod, target)
    machine = relax.VirtualMachine(lowered.executable, tvm.cpu())
    return machine["main"](tvm.runtime.tensor(inputs())).numpy(), kernels(lowered.mod)


def expected_layers() -> Array:
    weights = [
        np.frombuffer(t.raw_data, np.float32).reshape(tuple(t.dims))
        for t in two_layers().graph.initializer
    ]
    first, second = (rounded(weight) for weight in weights)
    return rounded(np.maximum(rounded(inputs()) @ first, 0)) @ second


@pytest.mark.parametrize("name", ["host", *RUNNABLE])
def test_module_computes_the_same_on_every_target(name: str) -> None:
    found, made = run(narrow(), parse_target(name, 1))
    # The hidden layer may round the other way at a tie.
    np.testing.assert_allclose(found, expected_layers(), atol=5e-3)
    assert sum("bf16_matmul" in kernel for kernel in made) == 2


@pytest.fixture(scope="module")
def bert() -> tuple[Any, Any, Any]:
    model = build_model("bert-mini-random")
    imported = import_onnx(model)
    return model, imported, random_inputs(imported, 0)


@pytest.mark.parametrize("text", ["bf16", "bf16:attention"])
def test_a_transformer_stays_close_to_onnx_runtime(bert: tuple[Any, Any, Any], text: str) -> None:
    model, imported, feeds = bert
    quantise = ApplyQuant(parse_quant(text))
    target = parse_target("x86-64-v3", 1) if not has_bf16(HOST) else HOST
    built = build_module(quantise(imported.mod), target)
    [plain], [found] = run_ort(model, feeds), built.run_all(feeds)
    assert quantise.meta["quant"]["quantised"] == 12
    # Eight significant bits: 2**-9 a rounding, through two layers.
    error = np.linalg.norm(found - plain) / np.linalg.norm(plain)
    assert 1e-4 < error < 1e-2


@native
def test_attentions_are_fused_with_rounded_products(bert: tuple[Any, Any, Any]) -> None:
    quantise = ApplyQuant(parse_quant("bf16:attention"))
    mod = quantise(bert[1].mod)
    entries = quantise.meta["quant"]["attention"]
    fuse = FuseAttention(HOST)
    fused = fuse(relax.transform.FoldConstant()(mod))
    assert (len(fuse.fused), fuse.refusals) == (len(entries), {})
    shapes = [attention_shape(f) for v, f in fused.functions_items() if v.name_hint != "main"]
    assert {shape.products for shape in shapes if shape} == {"bfloat16"}
    portable = FuseAttention(parse_target("x86-64-v4", 1))
    portable(relax.transform.FoldConstant()(mod))
    assert not portable.fused
    assert all("AVX512_BF16" in why for why in portable.refusals.values())


def test_attention_of_one_query_stays_as_it_is() -> None:
    quantise = ApplyQuant(parse_quant("bf16:attention"))
    quantise(import_onnx(build_model("decoder-mini-step-random")).mod)
    entries = quantise.meta["quant"]["attention"]
    assert len(entries) == 2
    assert all(entry["skipped"] and "one query" in entry["why"] for entry in entries)


def test_rounding_joins_the_kernel_before_it() -> None:
    names = [name.rstrip("1") for name in run(narrow(), HOST)[1]]
    assert names == ["bf16_matmul", "fused_bf16_matmul_relu_round_to_bf16", "round_to_bf16"]


def one_product(weight: Array, rows: int) -> Any:
    """Return ``round(x) @ weight`` for x [rows, K]."""
    x = relax.Var("x", relax.TensorType((rows, len(weight)), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            narrow = builder.emit(relax.op.astype(x, "bfloat16"))
            wide = builder.emit(relax.op.astype(narrow, "float32"))
            out = builder.emit_output(relax.op.matmul(wide, relax.const(weight)))
        builder.emit_func_output(out)
    return builder.get()


@pytest.mark.parametrize(
    ("target", "rows", "round_weight", "reason"),
    [
        ("x86-64-v4", 9, True, "AVX512_BF16"),
        ("cooperlake", 9, False, "does not hold"),
        ("x86-64-v3", 8, True, ""),
        ("cooperlake", 9, True, ""),
    ],
)
def test_products_that_stay_say_why(
    target: str, rows: int, round_weight: bool, reason: str
) -> None:
    (weight,) = drawn(5, (32, 16))
    mod = one_product(rounded(weight) if round_weight else weight, rows)
    before = mod.clone()
    fuse = FuseBf16Matmul(parse_target(target, 1))
    made = fuse(mod)
    tvm.ir.assert_structural_equal(mod, before)
    if reason:
        assert reason in next(iter(fuse.refused.values()))
        assert not fuse.kernels
        tvm.ir.assert_structural_equal(made, before)
    else:
        assert list(fuse.kernels.values()) == ["bf16, 32 rows"]
        assert not fuse.refused
        assert kernels(made) == ["bf16_matmul", "round_to_bf16"]


def test_roundings_widen_the_tolerance_of_an_order() -> None:
    plain = order_tolerance(import_onnx(two_layers()).mod).value
    assert order_tolerance(narrow()).value > 10 * plain


def block_product(x: Array, w: Array, target: Any, vectors: int) -> Array:
    *lead, m, k = x.shape
    n = w.shape[1]
    tile = bf16_tile(flat_rows(tuple(lead), m)[1], k, n, target, vectors)
    counts, pairs, data = pack_block_bf16(w, tile.columns)
    func = block_bf16_matmul(m, k, n, pairs.shape[1], tile, target, lead=tuple(lead))
    sch = ExplicitTileRule().apply(func, target, False)
    out = tvm.runtime.tensor(np.full((*lead, m, n), np.nan, np.float32))
    arrays = [tvm.runtime.tensor(array) for array in (bits(x), counts, pairs, data)]
    compile_kernel(sch.mod["main"], target)["main"](*arrays, out)
    return out.numpy()


def with_dead_blocks(seed: int, k: int, n: int, keep: float) -> Array:
    """Return a weight of which runs of two rows and 16 columns are zero."""
    rng = np.random.default_rng(seed)
    alive = rng.random((-(-k // 2), -(-n // 16))) < keep
    return drawn(seed, (k, n))[0] * np.kron(alive, np.ones((2, 16)))[:k, :n].astype(np.float32)


@few
@given(
    lead=st.sampled_from([(), (3,), (2, 1)]),
    m=sizes,
    pairs=sizes,
    n=sizes,
    vectors=st.sampled_from([1, 2]),
    keep=st.floats(0, 1),
    target=st.sampled_from([HOST, host_target(2), *(parse_target(name, 2) for name in RUNNABLE)]),
)
@example(lead=(), m=9, pairs=20, n=50, vectors=1, keep=0.0, target=HOST)
@example(lead=(), m=30, pairs=40, n=64, vectors=2, keep=1.0, target=HOST)
def test_blocks_that_are_zero_are_skipped(
    lead: tuple[int, ...], m: int, pairs: int, n: int, vectors: int, keep: float, target: Any
) -> None:
    w = with_dead_blocks(n, 2 * pairs, n, keep)
    (x,) = drawn(m, (*lead, m, 2 * pairs))
    a, b = rounded(x).astype(np.float64), rounded(w).astype(np.float64)
    bound = (2 * pairs + 2) * 2.0**-23 * (np.abs(a) @ np.abs(b))
    assert np.all(np.abs(block_product(x, w, target, vectors) - a @ b) <= bound)


def test_blocks_of_an_odd_weight_are_refused() -> None:
    with pytest.raises(ShapeError, match="even"):
        block_bf16_matmul(4, 7, 16, 4, Tile(4, 1, 16), HOST)
    assert choose_bf16_blocks(4, np.zeros((7, 16), np.float32), HOST)[0] is None


def test_kernel_follows_the_zeros() -> None:
    target = parse_target("cooperlake", 1)
    names = {}
    for keep in (0.2, 1.0):
        fuse = FuseBf16Matmul(target)
        mod = fuse(one_product(rounded(with_dead_blocks(1, 64, 96, keep)), 16))
        names[keep] = kernels(mod)[0]
        assert bool(fuse.sparse) == (keep < 1)
    assert names == {0.2: "block_bf16_matmul", 1.0: "bf16_matmul"}
