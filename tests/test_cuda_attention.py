"""CUDA attention and Mamba steps executed on the CPU, thread by thread, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_cases import (
    ATTENTIONS,
    CONVS,
    DECODES,
    EPS,
    ORDERS,
    SCANS,
    close,
    needs,
    needs_compiler,
    other_rules,
)
from cuda_emulation import Emulated, numpy_dtype

from icd_tvm.tir_schedules.cuda.attention import attention_rule
from icd_tvm.tir_schedules.cuda.decode_attention import decode_attention_rule
from icd_tvm.tir_schedules.cuda.mamba_step import conv_step_rule, scan_step_rule
from icd_tvm.tir_schedules.cuda.source_kernel import FP8


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    kernels = [kernel for rule in other_rules() for kernel in rule.kernels]
    return Emulated(kernels, tmp_path_factory.mktemp("emulated"))


def softmax(scores: np.ndarray) -> np.ndarray:
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = weights.sum(-1, keepdims=True)
    return weights / np.where(total > 0, total, 1)


@needs_compiler
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_equals_float64(name: str, emulated: Emulated) -> None:
    batch, queries, keys, heads, size, dtype, masked = ATTENTIONS[name]
    rng = np.random.default_rng(keys)
    shapes = {"q": queries, "k": keys, "v": keys}
    given = {
        key: rng.standard_normal((batch, rows, heads, size)).astype(numpy_dtype(dtype))
        for key, rows in shapes.items()
    }
    mask = np.zeros((batch, keys), np.float32)
    if masked:
        mask[:, -keys // 4 :] = -np.inf
        # All keys of a first tile are masked: no finite maximum yet. One sequence is all masked.
        mask[0, :64] = -1e4 if keys <= 64 else -np.inf
        mask[-1] = -np.inf if batch > 1 else mask[-1]
        given["mask"] = mask
    q, k, v = (given[key].astype(float) for key in "qkv")
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(size) + mask[:, None, None]
    expected = np.einsum("bhqk,bkhd->bqhd", softmax(scores), v)
    (kernel,) = attention_rule(batch, queries, keys, heads, size, dtype, mask=masked).kernels
    for order in ORDERS:
        found = emulated.run(kernel, given, order)["out"]
        assert np.isfinite(found.astype(float)).all()
        # Weights are rounded to the operand type before the second product.
        assert np.abs(found.astype(float) - expected).max() <= 4 * EPS[dtype] * np.abs(v).max()


@needs_compiler
@pytest.mark.parametrize("name", DECODES)
def test_decode_attention_equals_float64(name: str, emulated: Emulated) -> None:
    batch, kv_heads, shared, capacity, size, dtype, cache = DECODES[name]
    rng = np.random.default_rng(capacity)
    slots = (batch, kv_heads, capacity)
    given = {"q": rng.standard_normal((batch, kv_heads, shared, size)).astype(numpy_dtype(dtype))}
    for key in "kv":
        if cache == "int8":
            given[key] = rng.integers(-127, 128, (*slots, size)).astype(np.int8)
        else:
            given[key] = rng.standard_normal((*slots, size)).astype(numpy_dtype(cache))
        if cache in ("int8", FP8):
            given[f"{key}_scale"] = (rng.random(slots) / 64).astype(np.float32)
    live = rng.integers(1, capacity + 1, (batch, kv_heads)).astype(np.int32)
    live.flat[0], live.flat[-1] = capacity, 1
    given["live"] = live
    k, v = (
        given[key].astype(float)
        * given.get(f"{key}_scale", np.ones(slots)).astype(float)[..., None]
        for key in "kv"
    )
    scores = np.einsum("bhgd,bhtd->bhgt", given["q"].astype(float), k) / np.sqrt(size)
    dead = np.arange(capacity) >= live[..., None]
    expected = np.einsum("bhgt,bhtd->bhgd", softmax(np.where(dead[:, :, None], -np.inf, scores)), v)
    partial, combine = decode_attention_rule(
        batch, kv_heads, shared, capacity, size, dtype, cache=cache
    ).kernels
    for order in ORDERS:
        given["parts"] = emulated.run(partial, needs(partial, given), order)["parts"]
        found = emulated.run(combine, needs(combine, given), order)["out"]
        assert np.abs(found.astype(float) - expected).max() <= 2 * EPS[dtype] * np.abs(v).max()


@needs_compiler
@pytest.mark.parametrize("name", CONVS)
def test_conv_step_equals_float64(name: str, emulated: Emulated) -> None:
    channels, dtype = CONVS[name]
    rng = np.random.default_rng(channels)
    given = {"x": rng.standard_normal(channels).astype(numpy_dtype(dtype))}
    for key in ("window", "weight"):
        given[key] = rng.standard_normal((channels, 4)).astype(np.float32)
    given["bias"] = rng.standard_normal(channels).astype(np.float32)
    moved = np.concatenate([given["window"][:, 1:], given["x"].astype(np.float32)[:, None]], 1)
    sums = (moved.astype(float) * given["weight"].astype(float)).sum(1) + given["bias"]
    (kernel,) = conv_step_rule(channels, dtype).kernels
    for order in ORDERS:
        found = emulated.run(kernel, given, order)
        np.testing.assert_array_equal(found["window_out"], moved)
        close(found["out"], sums / (1 + np.exp(-sums)), dtype, 4, 16)


@needs_compiler
@pytest.mark.parametrize("name", SCANS)
def test_scan_step_equals_float64(name: str, emulated: Emulated) -> None:
    channels, states, dtype = SCANS[name]
    rng = np.random.default_rng(states)
    given = {
        key: (rng.standard_normal(channels) * 2).astype(numpy_dtype(dtype)) for key in "xz"
    } | {"dt": (rng.standard_normal(channels) * 12).astype(numpy_dtype(dtype))}
    given["state"] = rng.standard_normal((channels, states)).astype(np.float32)
    given["a"] = -rng.random((channels, states)).astype(np.float32)
    given |= {key: rng.standard_normal(states).astype(np.float32) for key in "bc"}
    given |= {key: rng.standard_normal(channels).astype(np.float32) for key in ("d", "dt_bias")}
    f = {key: array.astype(float) for key, array in given.items()}
    step = np.logaddexp(0, f["dt"] + f["dt_bias"])
    state = f["state"] * np.exp(step[:, None] * f["a"]) + (step * f["x"])[:, None] * f["b"]
    y = (state @ f["c"] + f["d"] * f["x"]) * f["z"] / (1 + np.exp(-f["z"]))
    (kernel,) = scan_step_rule(channels, states, dtype).kernels
    for order in ORDERS:
        found = emulated.run(kernel, given, order)
        np.testing.assert_allclose(found["state_out"], state, rtol=2e-5, atol=2e-5)
        close(found["out"], y, dtype, states, 16 * np.abs(state).max())
