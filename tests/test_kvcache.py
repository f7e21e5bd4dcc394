"""KV cache compaction, its 8-bit storage, and token drop for encoders."""

from __future__ import annotations

import json
import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icd_tvm.adapters.kv_pages import KVCache, KVScales, break_even_steps, compact
from icd_tvm.adapters.kv_quant import decode_e4m3, encode_e4m3
from icd_tvm.adapters.kvcache import apply_kvcache
from icd_tvm.adapters.token_drop import drop_tokens
from icd_tvm.errors import ConfigError, NonFiniteError, ShapeError, TransformError

SETTINGS = settings(max_examples=60, deadline=None)


def make_cache(
    layers: int = 2, heads: int = 3, tokens: int = 40, depth: int = 8, seed: int = 0
) -> KVCache:
    rng = np.random.default_rng(seed)
    shape = (layers, heads, tokens, depth)
    keys, values = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    return KVCache(keys, values)


def probabilities(cache: KVCache, queries: int = 6, share: int = 2, seed: int = 1) -> Any:
    layers, heads, tokens, _ = cache.keys.shape
    raw = np.random.default_rng(seed).standard_normal((layers, heads * share, queries, tokens))
    weights = np.exp(3 * raw)
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


@st.composite
def requests(draw: Any) -> tuple[KVCache, dict[str, Any]]:
    tokens = draw(st.integers(24, 90))
    cache = make_cache(
        draw(st.integers(1, 3)), draw(st.integers(1, 4)), tokens, 4, draw(st.integers(0, 9))
    )
    options = {
        "block": draw(st.sampled_from([1, 3, 8, 16, 128])),
        "drop": draw(st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.9])),
        "score": draw(st.sampled_from(["attention_mass", "key_norm", "recency"])),
        "scope": draw(st.sampled_from(["per_head", "shared"])),
        "keep_sinks": draw(st.integers(0, 1)),
        "keep_recent": draw(st.integers(0, 1)),
        "attention": probabilities(cache),
    }
    return cache, options


@SETTINGS
@given(requests())
def test_compaction_keeps_values_and_order_and_frees_what_was_dropped(
    request_: tuple[KVCache, dict[str, Any]],
) -> None:
    cache, options = request_
    keys, values = cache.keys.copy(), cache.values.copy()
    small, meta = apply_kvcache(cache, **options)
    np.testing.assert_array_equal(cache.keys, keys)
    np.testing.assert_array_equal(cache.values, values)
    kept = small.positions
    assert kept is not None
    assert kept.dtype == np.int32
    assert (np.diff(kept, axis=-1) > 0).all()
    np.testing.assert_array_equal(np.take_along_axis(keys, kept[..., None], 2), small.keys)
    np.testing.assert_array_equal(np.take_along_axis(values, kept[..., None], 2), small.values)

    layers, heads, tokens, depth = keys.shape
    row, block = 2 * depth * 4, options["block"]
    freed = meta["bytes_before"] - meta["bytes_after"]
    assert freed == meta["pages"]["freed"] * block * row
    assert abs(freed / (layers * heads) - options["drop"] * tokens * row) <= (block + 1) * row
    assert meta["pages"]["freed_without_compaction"] <= meta["pages"]["freed"]
    assert json.loads(json.dumps(meta)) == meta

    again, meta_again = apply_kvcache(cache, **options)
    np.testing.assert_array_equal(again.positions, kept)
    assert meta_again == meta


@SETTINGS
@given(requests())
def test_protected_tokens_stay_and_shared_heads_agree(
    request_: tuple[KVCache, dict[str, Any]],
) -> None:
    cache, options = request_
    options.update(keep_sinks=3, keep_recent=5)
    kept = apply_kvcache(cache, **options)[0].positions
    assert kept is not None
    last = cache.tokens - 1
    assert (kept[..., :3] == [0, 1, 2]).all()
    if cache.tokens * (1 - options["drop"]) >= 8:
        assert (kept[..., -5:] == np.arange(last - 4, last + 1)).all()
    if options["scope"] == "shared":
        assert (kept == kept[:, :1]).all()


def test_the_best_tokens_by_each_score_stay() -> None:
    cache = make_cache(1, 2, 10)
    options: dict[str, Any] = {"drop": 0.6, "keep_sinks": 0, "keep_recent": 0, "block": 2}
    recent, _ = apply_kvcache(cache, score="recency", **options)
    np.testing.assert_array_equal(recent.positions, np.broadcast_to([6, 7, 8, 9], (1, 2, 4)))

    short = cache.keys.copy()
    short[0, 0, [1, 4, 5, 8]] *= 0.01
    short[0, 1, [0, 2, 3, 9]] *= 0.01
    norm, _ = apply_kvcache(KVCache(short, cache.values), score="key_norm", **options)
    np.testing.assert_array_equal(norm.positions, [[[1, 4, 5, 8], [0, 2, 3, 9]]])

    mass = np.full((1, 4, 10), 0.01)
    mass[0, 1, [0, 3]] = mass[0, 0, [6, 9]] = 1.0  # both query heads of KV head 0
    mass[0, 2, [1, 2, 7, 8]] = 1.0
    heavy, meta = apply_kvcache(cache, attention=mass, **options)
    np.testing.assert_array_equal(heavy.positions, [[[0, 3, 6, 9], [1, 2, 7, 8]]])
    assert meta["params"]["score"] == "attention_mass"
    assert meta["loss"]["output"] is None
    both, _ = apply_kvcache(cache, attention=mass, scope="shared", **options)
    assert both.positions is not None
    assert (both.positions[0, 0] == both.positions[0, 1]).all()


def test_scattered_tokens_free_pages_only_by_compaction() -> None:
    keys = np.ones((1, 1, 64, 4), np.float32)
    keys[0, 0, ::2] = 0.1
    cache = KVCache(keys, keys)
    _, meta = apply_kvcache(cache, block=8, drop=0.5, score="key_norm", keep_sinks=0, keep_recent=0)
    assert meta["pages"] == {"before": 8, "after": 4, "freed": 4, "freed_without_compaction": 0}
    assert meta["bytes_before"] == 2 * meta["bytes_after"] == 64 * 4 * 4 * 2
    assert meta["copy"] == {
        "bytes_read": 32 * 4 * 4 * 2,
        "bytes_written": 32 * 4 * 4 * 2,
        "break_even_steps": 2.0,
        "source": "model",
    }


def test_break_even_is_the_model() -> None:
    assert break_even_steps(0.9) == pytest.approx(18)
    assert break_even_steps(0.5) == pytest.approx(2)
    assert break_even_steps(1.0) is None
    assert break_even_steps(1.0, 0.25) == pytest.approx(1.25 / 0.75)


def test_index_maps_compose_and_layers_are_optional() -> None:
    cache = make_cache(1, 3, 40)
    flat = KVCache(cache.keys[0], cache.values[0])
    once, _ = apply_kvcache(flat, drop=0.25, block=4, keep_sinks=1, keep_recent=1)
    twice, meta = apply_kvcache(once, drop=0.5, block=4, keep_sinks=1, keep_recent=1)
    assert twice.keys.shape == (3, 15, 8)
    assert twice.positions is not None
    picked = np.take_along_axis(flat.keys, twice.positions[..., None], 1)
    np.testing.assert_array_equal(picked, twice.keys)
    assert meta["shape"] == [1, 3, 30, 8]
    layered, _ = apply_kvcache(cache, drop=0.25, block=4, keep_sinks=1, keep_recent=1)
    np.testing.assert_array_equal(layered.keys[0], once.keys)


def test_output_loss_is_the_attention_error() -> None:
    cache = make_cache(1, 1, 12)
    weights = probabilities(cache, share=1)
    small, meta = apply_kvcache(
        cache, drop=0.5, block=2, keep_sinks=0, keep_recent=0, attention=weights
    )
    assert small.positions is not None
    part = weights[0, 0][:, small.positions[0, 0]].astype(np.float64)
    got = (part / part.sum(1, keepdims=True)) @ small.values[0, 0]
    want = weights[0, 0].astype(np.float64) @ cache.values[0, 0]
    expected = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert meta["loss"]["output"] == pytest.approx(expected, rel=1e-5)
    assert meta["loss"]["output"] > 0.01


@pytest.mark.parametrize(("dtype", "bound"), [("int8", 0.01), ("fp8_e4m3", 0.04)])
def test_eight_bit_storage(dtype: Any, bound: float) -> None:
    cache = make_cache(2, 2, 37)
    cache.keys[..., 3] *= 100  # a channel of outliers does not cost the others their bits
    small, meta = apply_kvcache(cache, block=16, drop=0.0, dtype=dtype)
    assert small.keys.dtype.itemsize == 1
    assert small.scales is not None
    assert small.scales.keys.shape == (2, 2, 3, 8)
    assert meta["bytes_after"] == 4 * 3 * (16 * 16 + 4 * 16)
    assert small.nbytes == 4 * (37 * 16 + 3 * 16 * 4)
    back = small.dequantized()
    assert back.scales is None
    for before, after in ((cache.keys, back.keys), (cache.values, back.values)):
        spread = np.abs(before).max(axis=(0, 1, 2))
        assert (np.abs(before - after) <= spread * bound).all()
    assert 0 < meta["loss"]["quant"] < bound * 2
    assert meta["delta_layout"]
    assert not meta["skipped"]
    assert back.dequantized() is back


def test_eight_bit_storage_of_zeros_and_tiny_values() -> None:
    keys = np.zeros((1, 1, 8, 2), np.float64)
    keys[..., 1] = 1e-300
    small, _ = apply_kvcache(KVCache(keys, keys), block=4, drop=0.0, dtype="int8")
    assert not small.dequantized().keys.any()
    with pytest.raises(NonFiniteError, match="no float32 scale"):
        apply_kvcache(KVCache(keys + 1e300, keys), drop=0.0, score="recency", dtype="int8")


def test_e4m3_agrees_with_the_reference_rounding() -> None:
    codes = np.arange(256, dtype=np.uint8)
    reference = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(decode_e4m3(codes), reference)
    rng = np.random.default_rng(0)
    spread = rng.standard_normal(5000) * 10.0 ** rng.integers(-4, 3, 5000)
    halfway = (reference[:126] + reference[1:127]) / 2
    values = np.concatenate([spread, halfway, -reference[:127]]).clip(-448, 448)
    expected = values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(encode_e4m3(values), expected)
    assert decode_e4m3(encode_e4m3(np.array([1e9, -1e9]))).tolist() == [448, -448]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"drop": 0.5, "keep_recent": 100}, "sinks or recent"),
        ({"drop": 0.01, "keep_recent": 0}, "less than one"),
    ],
)
def test_impossible_requests_warn_and_leave_the_cache(options: dict[str, Any], why: str) -> None:
    cache = make_cache(tokens=30)
    with pytest.warns(RuntimeWarning, match=why):
        same, meta = apply_kvcache(cache, **options)
    np.testing.assert_array_equal(same.keys, cache.keys)
    assert same.keys is not cache.keys
    np.testing.assert_array_equal(same.positions, np.broadcast_to(np.arange(30), (2, 3, 30)))
    assert meta["skipped"]
    assert why in meta["why"]
    assert meta["bytes_after"] == meta["bytes_before"]


def test_drop_zero_is_silent_and_sinks_limit_the_drop() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, meta = apply_kvcache(make_cache(), drop=0.0)
    assert meta["skipped"]
    small, meta = apply_kvcache(make_cache(tokens=40), drop=0.9, keep_sinks=4, keep_recent=16)
    assert small.tokens == meta["tokens"]["after"] == 20
    assert meta["pages"]["freed"] == 0
    assert "no page is free" in meta["why"]


NAN = make_cache()
NAN.values[1, 2, 3, 4] = np.nan
GOOD = make_cache()


@pytest.mark.parametrize(
    ("cache", "options", "error", "text"),
    [
        (NAN, {}, NonFiniteError, r"values holds 1 NaN .*\[1, 2, 3, 4\]"),
        (KVCache(GOOD.keys[0, 0], GOOD.values), {}, ShapeError, "keys has shape"),
        (KVCache(GOOD.keys[:, :, :0], GOOD.values), {}, ShapeError, "non-empty"),
        (KVCache(GOOD.keys, GOOD.values[:, :1]), {}, ShapeError, "differ"),
        (KVCache(GOOD.keys.astype(complex), GOOD.values), {}, ShapeError, "dtype"),
        (KVCache(GOOD.keys, GOOD.values, np.zeros(3, np.int32)), {}, ShapeError, "positions"),
        (GOOD.keys, {}, ConfigError, "cache is a ndarray"),
        (GOOD, {"drop": 1.0}, ConfigError, "drop 1.0 is outside"),
        (GOOD, {"drop": float("nan")}, ConfigError, "drop nan is outside"),
        (GOOD, {"block": 0}, ConfigError, "block 0"),
        (GOOD, {"block": 1.5}, ConfigError, "block 1.5"),
        (GOOD, {"keep_sinks": -1}, ConfigError, "keep_sinks -1"),
        (GOOD, {"score": "magic"}, ConfigError, "score 'magic'.*known: attention_mass"),
        (GOOD, {"scope": "layer"}, ConfigError, "scope 'layer'"),
        (GOOD, {"dtype": "int4"}, ConfigError, "dtype 'int4'"),
        (GOOD, {"score": "attention_mass"}, ConfigError, "needs attention"),
        (GOOD, {"attention": np.ones((2, 4, 40))}, ShapeError, "attention has shape"),
        (GOOD, {"attention": np.ones((2, 3, 41))}, ShapeError, "attention has shape"),
        (GOOD, {"attention": np.ones((2, 0, 40))}, ShapeError, "attention has shape"),
        (GOOD, {"attention": -np.ones((2, 3, 40))}, ConfigError, "negative"),
        (GOOD, {"attention": np.full((2, 3, 40), np.inf)}, NonFiniteError, "attention"),
    ],
)  # fmt: skip
def test_bad_input(cache: Any, options: dict[str, Any], error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        apply_kvcache(cache, **options)


def test_a_quantised_cache_is_refused() -> None:
    small, _ = apply_kvcache(make_cache(), drop=0.0, dtype="int8")
    assert isinstance(small.scales, KVScales)
    with pytest.raises(TransformError, match=r"dequantized\(\)"):
        apply_kvcache(small)
    with pytest.raises(TransformError, match=r"dequantized\(\)"):
        compact(small, np.ones(small.keys.shape[:-1], np.bool_))


def test_compact_refuses_ragged_and_foreign_masks() -> None:
    mask = np.zeros((2, 3, 40), np.bool_)
    mask[0, 0, 0] = True
    with pytest.raises(ShapeError, match="between 0 and 1"):
        compact(GOOD, mask)
    with pytest.raises(ShapeError, match="expected bool"):
        compact(GOOD, mask[0])


@SETTINGS
@given(
    st.integers(1, 3), st.integers(2, 20), st.integers(0, 50),
    st.one_of(st.floats(0.05, 1.0), st.integers(1, 20)),
)  # fmt: skip
def test_tokens_of_an_encoder(batch: int, tokens: int, seed: int, keep: float | int) -> None:
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((batch, tokens, 4)).astype(np.float32)
    scores = rng.random((batch, tokens))
    mask = (np.arange(tokens) < rng.integers(1, tokens + 1, (batch, 1))).astype(np.int64)
    if isinstance(keep, int):
        keep = min(keep, tokens)
    out, meta = drop_tokens(hidden, mask, scores, keep)
    assert out.positions.dtype == np.int32
    assert (out.positions[:, 0] == 0).all()
    assert (np.diff(out.positions, axis=1) > 0).all()
    rows = np.arange(batch)[:, None]
    np.testing.assert_array_equal(hidden[rows, out.positions], out.hidden)
    np.testing.assert_array_equal(mask[rows, out.positions], out.mask)
    count = meta["tokens"]["after"]
    assert (out.mask.sum(axis=1) == np.minimum(mask.sum(axis=1), count)).all()
    assert meta["loss"]["tokens"] == mask.sum() - out.mask.sum()
    assert json.loads(json.dumps(meta)) == meta


def test_dropped_tokens_are_the_worst() -> None:
    hidden = np.arange(6, dtype=np.float32).reshape(1, 6, 1)
    scores = np.array([[0.0, 0.4, 0.1, 0.3, 0.2, 9.0]])
    out, meta = drop_tokens(hidden, np.array([[1, 1, 1, 1, 1, 0]]), scores, 3)
    assert out.positions.tolist() == [[0, 1, 3]]
    assert out.hidden.ravel().tolist() == [0, 1, 3]
    assert meta["loss"] == {"score": pytest.approx(0.3), "tokens": 2}
    assert drop_tokens(hidden, np.ones((1, 6)), -scores, 6)[1]["skipped"]
    assert drop_tokens(hidden, np.ones((1, 6)), -scores, 5)[1]["loss"]["score"] is None


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"hidden": np.ones((2, 3))}, ShapeError, "hidden has shape"),
        ({"mask": np.ones((1, 4))}, ShapeError, "mask has shape"),
        ({"scores": np.ones((1, 4))}, ShapeError, "scores has shape"),
        ({"scores": np.full((1, 3), np.nan)}, NonFiniteError, "scores"),
        ({"hidden": np.full((1, 3, 2), np.inf)}, NonFiniteError, "hidden"),
        ({"keep": 0}, ConfigError, "keep 0"),
        ({"keep": 4}, ConfigError, "keep 4"),
        ({"keep": 1.5}, ConfigError, "keep 1.5"),
        ({"keep_first": 3}, ConfigError, "keep_first 3"),
    ],
)
def test_bad_token_drops(changes: dict[str, Any], error: Any, text: str) -> None:
    good: dict[str, Any] = {
        "hidden": np.ones((1, 3, 2)), "mask": np.ones((1, 3)), "scores": np.ones((1, 3)), "keep": 2,
    }  # fmt: skip
    with pytest.raises(error, match=text):
        drop_tokens(**{**good, **changes})
