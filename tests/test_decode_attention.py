"""Attention of one token over a KV cache: the kernel, and the pass that finds it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cpu_targets import assert_stays_inside
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scipy import special
from test_cpu_kernels import assert_close, random, run
from test_cpu_lowering import calls, execute, module

from icd_tvm._tvm import relax
from icd_tvm.adapters.kv_quant import dequantize_rows, quantize_rows
from icd_tvm.errors import ShapeError
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.registry import build
from icd_tvm.relax_passes.fuse_decode_attention import FuseDecodeAttention
from icd_tvm.tir_schedules.cpu.decode_attention import DecodeShape, decode_attention, decode_lanes
from icd_tvm.tir_schedules.target import host_target, parse_target

TARGET = host_target(2)
LOWEST = np.finfo(np.float32).min
FLOATS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def reference(q: Any, k: Any, v: Any, mask: Any, scale: float) -> Any:
    """Float64 attention of [batch, heads, 1, dim] over [batch, KV heads, SLOTS, dim]."""
    share = q.shape[1] // k.shape[1]
    k, v = (np.repeat(array.astype(np.float64), share, axis=1) for array in (k, v))
    return special.softmax(q @ k.transpose(0, 1, 3, 2) * scale + mask, axis=-1) @ v


def arrays(shape: DecodeShape, seed: int = 0) -> list[Any]:
    """Return what the kernel takes before the mask: of codes, their scales too."""
    rng = np.random.default_rng(seed)
    cache = (shape.batch, shape.kv_heads, shape.slots, shape.head_dim)
    query = (shape.batch, shape.kv_heads * shape.share, 1, shape.head_dim)
    rows = [random(rng, *cache) for _ in range(2)]
    if shape.dtype == "int8":
        (keys, k_scale), (values, v_scale) = (quantize_rows(one) for one in rows)
        return [random(rng, *query), keys, values, k_scale, v_scale]
    return [random(rng, *query), *(one.astype(FLOATS[shape.dtype]) for one in rows)]


def widened(inputs: list[Any]) -> list[Any]:
    """Return queries, keys and values as floats."""
    query, keys, values, *scales = inputs
    if not scales:
        return inputs
    return [query, *(dequantize_rows(*one) for one in zip((keys, values), scales, strict=True))]


def computed(shape: DecodeShape, inputs: list[Any], mask: Any, target: Any) -> Any:
    return run(decode_attention(shape, target), [*inputs, mask], inputs[0].shape, target)


@few
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 3),
    share=st.integers(1, 5),
    slots=st.integers(1, 200),
    head_dim=st.sampled_from([4, 8, 20, 32, 64]),
    threads=st.sampled_from([1, 2, 4]),
    mask_value=st.sampled_from([LOWEST, -np.inf]),
    dtype=st.sampled_from([*FLOATS, "int8"]),
)
@example(1, 1, 4, 130, 64, 4, -np.inf, "float32")  # ragged, cut in runs
@example(1, 3, 3, 64, 64, 2, LOWEST, "float32")
@example(1, 1, 9, 16, 128, 1, LOWEST, "float32")  # more sums than registers: panels
@example(1, 1, 4, 130, 64, 4, -np.inf, "float16")
@example(2, 3, 3, 75, 64, 2, LOWEST, "bfloat16")
@example(1, 1, 4, 130, 64, 4, -np.inf, "int8")
def test_kernel(
    batch: int,
    kv_heads: int,
    share: int,
    slots: int,
    head_dim: int,
    threads: int,
    mask_value: float,
    dtype: str,
) -> None:
    """Narrow numbers are widened without loss, so they are compared as tightly."""
    shape = DecodeShape(batch, kv_heads, share, slots, head_dim, 0.3, dtype)
    inputs = arrays(shape, slots)
    seen = np.random.default_rng(slots).random(slots) < 0.6
    seen[slots // 2] = True
    mask = np.where(seen, 0, mask_value).astype(np.float32)
    actual = computed(shape, inputs, mask, host_target(threads))
    assert_close(actual, reference(*widened(inputs), mask, 0.3))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_number_of_16_bits_is_widened_exactly(dtype: str) -> None:
    """A cache of one slot comes out as it is, subnormal numbers and signs too."""
    bits = np.arange(2**16, dtype=np.uint16).view(FLOATS[dtype])
    finite = bits[np.isfinite(bits.astype(np.float32))]
    values = np.resize(finite, (-(-len(finite) // 64), 1, 1, 64))
    shape = DecodeShape(len(values), 1, 1, 1, 64, 1.0, dtype)
    query = np.zeros(values.shape, np.float32)
    zeros, mask = np.zeros(values.shape, FLOATS[dtype]), np.zeros(1, np.float32)
    actual = computed(shape, [query, zeros, values], mask, host_target(1))
    np.testing.assert_array_equal(actual, values.astype(np.float32))


@pytest.mark.parametrize(("slots", "threads"), [(37, 1), (37, 4), (5, 1), (32, 2)])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_nothing_past_the_last_slot_is_read(slots: int, threads: int, dtype: str) -> None:
    shape, target = DecodeShape(2, 1, 2, slots, 16, 1.0, dtype), host_target(threads)
    query, cache, scales = 4 * 2 * 2 * 16, 2 * slots * 16, [4 * 2 * slots] * 2
    rows = [cache, cache, *scales] if dtype == "int8" else [4 * cache] * 2
    sizes = [query, *rows, 4 * slots, query]
    assert_stays_inside(decode_attention(shape, target), sizes, target)


@pytest.mark.parametrize("value", [LOWEST, -np.inf])
def test_a_run_without_a_visible_slot_adds_nothing(value: float) -> None:
    shape = DecodeShape(1, 1, 2, 64, 16, 1.0)
    inputs = arrays(shape)
    mask = np.full(64, value, np.float32)
    mask[3] = 0
    actual = computed(shape, inputs, mask, host_target(4))
    assert_close(actual, np.broadcast_to(inputs[2][:, :, 3:4], inputs[0].shape))


def test_large_scores_do_not_overflow() -> None:
    shape = DecodeShape(1, 2, 1, 48, 16, 100.0)
    inputs = arrays(shape)
    mask = np.zeros(48, np.float32)
    assert_close(computed(shape, inputs, mask, TARGET), reference(*inputs, mask, 100.0))


@pytest.mark.parametrize("cpu", ["x86-64", "x86-64-v3"])
@pytest.mark.parametrize("dtype", [*FLOATS, "int8"])
def test_narrower_vectors_compute_the_same(cpu: str, dtype: str) -> None:
    shape = DecodeShape(1, 2, 3, 21, 16, 0.5, dtype)
    inputs, mask = arrays(shape), np.zeros(21, np.float32)
    actual = computed(shape, inputs, mask, parse_target(cpu, 1))
    assert_close(actual, reference(*widened(inputs), mask, 0.5))


def test_lanes_divide_the_head() -> None:
    target = parse_target("x86-64-v4", 1)
    assert [decode_lanes(n, target) for n in (64, 8, 20, 6)] == [16, 8, 4, None]


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ((1, 1, 0, 4, 8, 1.0), "at least 1"),
        ((1, 1, 1, 4, 6, 1.0), "head_dim 6 is not a multiple of 4"),
        ((1, 1, 1, 4, 8, 1.0, "float64"), "a cache of float64 .*float16"),
    ],
)
def test_bad_sizes_are_refused(sizes: tuple[Any, ...], text: str) -> None:
    with pytest.raises(ShapeError, match=text):
        decode_attention(DecodeShape(*sizes), TARGET)


# The pass

SLOTS, KV, SHARE, DIM = 10, 2, 3, 8


def step(
    *,
    wide: bool = True,
    mask: tuple[int, ...] | None = (SLOTS,),
    queries: int = 1,
    dim: int = DIM,
    axes: tuple[int, ...] = (0, 1, 3, 2),
) -> Any:
    """Return one token's attention as exporters write it, with one part changed."""
    heads = KV * SHARE if wide else KV
    cache = (1, KV, SLOTS, dim)

    def build(emit: Any, q: Any, k: Any, v: Any, m: Any = None) -> Any:
        def widened(x: Any) -> Any:
            if not wide:
                return x
            x = emit(relax.op.expand_dims(x, 2))
            x = emit(relax.op.broadcast_to(x, (1, KV, SHARE, SLOTS, dim)))
            return emit(relax.op.reshape(x, (1, heads, SLOTS, dim)))

        turned = emit(relax.op.permute_dims(widened(k), list(axes)))
        scores = emit(relax.op.matmul(q, turned))
        scores = emit(relax.op.multiply(scores, relax.const(np.float32(0.25))))
        if m is not None:
            scores = emit(relax.op.add(scores, m))
        weights = emit(relax.op.nn.softmax(scores, axis=-1), name_hint="weights")
        return emit(relax.op.matmul(weights, widened(v)), name_hint="out")

    masks = {"m": mask} if mask is not None else {}
    return module(build, q=(1, heads, queries, dim), k=cache, v=cache, **masks)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("mask", [(SLOTS,), (1, 1, 1, SLOTS), None])
def test_decode_attention_is_fused(wide: bool, mask: tuple[int, ...] | None) -> None:
    mod = step(wide=wide, mask=mask)
    fuse = FuseDecodeAttention(TARGET)
    after = fuse(mod)
    reshaped = ["relax.reshape"] if mask and len(mask) > 1 else []
    assert calls(after) == [*reshaped, "decode_attention"]
    assert (fuse.fused, fuse.refusals) == (["out"], {})
    shape = DecodeShape(1, KV, SHARE if wide else 1, SLOTS, DIM, 0.25)
    inputs = arrays(shape)
    bias = np.zeros(mask or (SLOTS,), np.float32)
    bias[..., 4:7] = LOWEST
    masks = [bias] if mask else []
    want = reference(*inputs, bias if mask else 0, 0.25)
    np.testing.assert_allclose(execute(mod, *inputs, *masks), want, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"queries": 2}, "it has 2 queries, not 1"),
        ({"mask": (KV * SHARE, 1, SLOTS)}, "the mask has shape (6, 1, 10), not [10]"),
        ({"dim": 6}, "no vector divides 6 channels"),
        ({"dim": SLOTS, "axes": (0, 1, 2, 3)}, "the keys are not transposed"),
    ],
)
def test_what_differs_is_left_alone_with_a_reason(change: dict[str, Any], reason: str) -> None:
    fuse = FuseDecodeAttention(TARGET)
    after = fuse(step(**change))
    assert "decode_attention" not in calls(after)
    assert reason in fuse.refusals["weights"]
    assert fuse.fused == []


def test_the_decoder_step_reads_its_cache_without_a_widened_copy() -> None:
    mod = import_onnx(build("decoder-mini-step-random", seq=9)).mod
    fuse = FuseDecodeAttention(TARGET)
    names = calls(fuse(mod))
    assert len(fuse.fused) == 2
    assert fuse.refusals == {}
    assert "relax.broadcast_to" not in names
    assert "relax.nn.softmax" not in names
