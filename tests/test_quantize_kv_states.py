"""dtype=...: the step's cache holds 8-bit codes or 16-bit floats, and attention reads those."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from kv_models import STATES, appending_step, attended, feeds
from test_apply_kv_compress import (
    IDS,
    LENGTH,
    MINI,
    SLOTS,
    STEPS,
    WEIGHTS,
    compress,
    filled,
    masked_past,
    step,
    whole,
)
from test_apply_kv_compress import STATES as MINI_STATES

from icd_tvm._tvm import tvm
from icd_tvm.adapters.kv_quant import (
    STATE_TYPES,
    dequantize_rows,
    narrow_rows,
    quantize_rows,
    stored_rows,
)
from icd_tvm.adapters.kv_spec import KVSpec, parse_kv
from icd_tvm.errors import ConfigError, NonFiniteError, TransformError
from icd_tvm.models.decoder_reference import run_decoder
from icd_tvm.models.registry import build as build_model
from icd_tvm.relax_passes.attach_layout_tags import AttachLayoutTags, opaque_states
from icd_tvm.relax_passes.fuse_decode_attention import FuseDecodeAttention
from icd_tvm.relax_passes.quantize_kv_states import QuantizeKVStates
from icd_tvm.relax_passes.step_cache import StepCache
from icd_tvm.relax_passes.verify_layout import FP32_TOLERANCE, order_tolerance
from icd_tvm.runtime.build import build
from icd_tvm.tir_schedules.target import host_target

INT8 = KVSpec(0.0, dtype="int8")
NAMES = ("keys", "values")
HALVES = ("fp16", "bf16")
# Significant bits of a number.
DIGITS = {"fp16": 11, "bf16": 8}
# How far a decoder's logits may be from numpy over the stored rows: a tie may round the other way,
# which is one step of one number.
NEAR = {"int8": 5e-3, "fp16": 1e-3, "bf16": 5e-3}


def stored(rows: np.ndarray) -> np.ndarray:
    return stored_rows(rows, "int8")


# -- rows


@settings(max_examples=60, deadline=None)
@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 9)),
        elements=st.floats(-(2.0**99), 2.0**99, width=32),
    )
)
def test_a_number_is_off_by_at_most_half_a_scale(rows: np.ndarray) -> None:
    codes, scales = quantize_rows(rows)
    assert (codes.dtype, scales.dtype) == (np.int8, np.float32)
    assert scales.shape == (len(rows), 1)
    bound = np.abs(rows).max(axis=-1, keepdims=True) / 254 * (1 + 1e-5) + np.finfo(np.float32).tiny
    assert (np.abs(dequantize_rows(codes, scales) - rows.astype(np.float64)) <= bound).all()


def test_a_row_of_zeros_and_an_outlier_keep_to_themselves() -> None:
    rows = np.array([[0, 0], [1e9, 1], [1, 0.5]], np.float32)
    back = stored(rows)
    assert not back[0].any()
    np.testing.assert_allclose(back[2], rows[2], atol=1 / 254)
    assert back[1, 1] == 0  # what one row of an outlier costs


@pytest.mark.parametrize("dtype", HALVES)
@settings(max_examples=60, deadline=None)
@given(
    rows=arrays.arrays(np.float32, st.integers(1, 9), elements=st.floats(-65504, 65504, width=32))
)
def test_a_number_of_16_bits_is_off_by_half_a_step(dtype: Any, rows: np.ndarray) -> None:
    found = narrow_rows(rows, dtype)
    assert found.dtype == STATE_TYPES[dtype]
    gap = np.abs(found.astype(np.float64) - rows)
    # Below the least normal number the steps of float16 stay as they are.
    least = 2.0**-25 if dtype == "fp16" else 2.0**-134
    assert (gap <= np.maximum(np.abs(rows) * 2.0 ** -DIGITS[dtype], least)).all()
    np.testing.assert_array_equal(narrow_rows(found.astype(np.float32), dtype), found)


def test_ties_go_to_the_even_number() -> None:
    ties = np.array([1 + 2.0**-11, 1 + 3 * 2.0**-11], np.float32)
    np.testing.assert_array_equal(stored_rows(ties, "fp16"), [1, 1 + 2.0**-9])
    ties = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8], np.float32)
    np.testing.assert_array_equal(stored_rows(ties, "bf16"), [1, 1 + 2.0**-6])


def test_a_number_that_16_bits_do_not_hold_is_refused() -> None:
    rows = np.array([1, 7e4, np.inf], np.float32)
    with pytest.raises(NonFiniteError, match="70000 is outside the range of fp16"):
        narrow_rows(rows, "fp16")
    np.testing.assert_allclose(stored_rows(rows, "bf16"), rows, rtol=2.0**-8)
    assert narrow_rows(rows[2:], "fp16")[0] == np.inf


# -- one attention


@pytest.mark.parametrize(("dim", "fused"), [(8, True), (6, False)])
def test_attention_over_codes_is_that_of_numpy(dim: int, fused: bool) -> None:
    """The new row is quantised before it is read; with 6 channels no kernel fits: dequantised."""
    mod = QuantizeKVStates(NAMES, STATES)(appending_step(dim=dim))
    fuse = FuseDecodeAttention(host_target(1))
    assert ("decode_attention" in str(fuse(mod)["main"])) == fused
    given_ = feeds(dim=dim)
    coded = dict(given_)
    for name in NAMES:
        coded[name], coded[f"{name}_scale"] = quantize_rows(given_[name])
    built = build(mod, host_target(1))
    found, *states = built.run_all(coded)
    whole_ = {name: given_[name].copy() for name in NAMES}
    for name, row in (("keys", "k"), ("values", "v")):
        whole_[name][:, :, 5] = given_[row][:, :, 0]
    want = [quantize_rows(whole_[name]) for name in NAMES]
    keys, values = (dequantize_rows(*pair) for pair in want)
    np.testing.assert_allclose(found, attended(given_["q"], keys, values, 5), atol=1e-5)
    for got, (codes, scales) in zip(zip(states[:2], states[2:], strict=True), want, strict=True):
        np.testing.assert_array_equal(got[0], codes)
        np.testing.assert_allclose(got[1], scales, rtol=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("dim", "fused"), [(8, True), (6, False)])
def test_attention_over_floats_of_16_bits_is_that_of_numpy(
    dtype: Any, dim: int, fused: bool
) -> None:
    """The new row is rounded before it is read; nothing else is rounded."""
    mod = QuantizeKVStates(NAMES, STATES, dtype)(appending_step(dim=dim))
    fuse = FuseDecodeAttention(host_target(1))
    assert ("decode_attention" in str(fuse(mod)["main"])) == fused
    given_ = feeds(dim=dim)
    narrow = {name: narrow_rows(given_[name], dtype) for name in NAMES}
    found, *states = build(mod, host_target(1)).run_all({**given_, **narrow})
    whole_ = {name: given_[name].copy() for name in NAMES}
    for name, row in (("keys", "k"), ("values", "v")):
        whole_[name][:, :, 5] = given_[row][:, :, 0]
    want = [narrow_rows(whole_[name], dtype) for name in NAMES]
    keys, values = (rows.astype(np.float64) for rows in want)
    np.testing.assert_allclose(found, attended(given_["q"], keys, values, 5), atol=1e-5)
    for got, rows in zip(states, want, strict=True):
        assert got.dtype == STATE_TYPES[dtype]
        np.testing.assert_array_equal(got, rows)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_state_of_16_bits_is_narrowed_by_the_row_and_read_by_the_kernel(dtype: Any) -> None:
    before = appending_step()
    after = QuantizeKVStates(NAMES, STATES, dtype)(before)
    tvm.ir.assert_structural_equal(before, appending_step())
    name = str(STATE_TYPES[dtype])
    tvm.ir.assert_structural_equal(after["main"], appending_step(stored=name)["main"])
    assert opaque_states(after) == [("keys", "1"), ("values", "2")]
    assert [p.name for p in after["main"].params] == [p.name for p in before["main"].params]
    fused = FuseDecodeAttention(host_target(1))(after)
    kernels = {g.name_hint: f for g, f in fused.functions_items()}
    shape = kernels["decode_attention"].attrs["icd.decode_attention"]
    assert str(shape["dtype"]) == name
    # The rows are narrowed; no state is widened.
    text = str(fused["main"])
    assert (text.count("R.astype("), text.count('"float32") = R.astype')) == (2, 0)


def test_keys_and_values_of_different_types_are_widened() -> None:
    mixed = QuantizeKVStates(["keys"], STATES, "fp16")(appending_step())
    fused = FuseDecodeAttention(host_target(1))(mixed)
    kernels = {g.name_hint: f for g, f in fused.functions_items()}
    shape = kernels["decode_attention"].attrs["icd.decode_attention"]
    assert str(shape["dtype"]) == "float32"


def test_the_kernel_reads_int8() -> None:
    mod = QuantizeKVStates(NAMES, STATES)(appending_step())
    after = FuseDecodeAttention(host_target(1))(mod)
    kernels = {g.name_hint: f for g, f in after.functions_items()}
    shape = kernels["decode_attention"].attrs["icd.decode_attention"]
    assert str(shape["dtype"]) == "int8"
    assert "astype" not in str(after["main"]).split("new_values_scale")[1]


def test_what_is_no_state_stays_and_the_tag_has_the_scales() -> None:
    before = appending_step()
    after = QuantizeKVStates(NAMES, STATES)(before)
    tvm.ir.assert_structural_equal(before, appending_step())
    assert opaque_states(after) == [
        ("keys", "1"), ("values", "2"), ("keys_scale", "3"), ("values_scale", "4"),
    ]  # fmt: skip
    own = {
        p.name: (str(p.ty.dtype), [int(n) for n in p.ty.shape.values]) for p in after["main"].params
    }
    assert own["keys"] == ("int8", [1, 2, 12, 8])
    assert own["keys_scale"] == ("float32", [1, 2, 12, 1])
    assert own["q"] == ("float32", [1, 4, 1, 8])


@pytest.mark.parametrize(
    ("mod", "names", "text"),
    [
        (appending_step("read twice"), NAMES, "'keys' cannot be quantised: it is not read exactly"),
        (appending_step(dtype="float16"), NAMES, "'keys' is float16, not float32"),
        (appending_step(), ("q",), "'q' cannot be quantised: it is no opaque state"),
    ],
)
def test_states_that_cannot_be_quantised(mod: Any, names: Any, text: str) -> None:
    with pytest.raises(TransformError, match=text):
        QuantizeKVStates(names, STATES)(mod)


# -- a decoder


@pytest.mark.parametrize("dtype", ["int8", *HALVES])
def test_steps_equal_numpy_over_stored_rows(dtype: Any) -> None:
    """Several steps, the state fed back, against attention over what the cache gives back."""
    run = whole()
    after, passed = compress(step(), KVSpec(0.0, dtype=dtype), cache=filled(run), length=LENGTH)
    small = passed.compacted
    assert small is not None
    assert small.arrays["past_key_0"].dtype == STATE_TYPES[dtype]
    want = stored_run(dtype, (run.keys, run.values))
    got = coded_steps(after, small.arrays, LENGTH)
    # A tie may round the other way: one code of one number.
    np.testing.assert_allclose(got, want, atol=NEAR[dtype])
    exact = run_decoder(MINI, WEIGHTS, IDS).logits[LENGTH:]
    assert np.abs(got - want).max() < 0.2 * np.abs(got - exact).max()
    lost = 0.01 if dtype == "int8" else 2.0 ** -DIGITS[dtype]
    assert 0 < passed.meta["loss"]["quant"] < lost


def stored_run(dtype: Any, past: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Return the logits of the tokens behind the context, every row as the cache stores it."""
    rows = partial(stored_rows, dtype=dtype)
    kept = (rows(past[0]), rows(past[1]))
    return run_decoder(MINI, WEIGHTS, IDS[LENGTH:], past=kept, start=LENGTH, stored=rows).logits


def coded_steps(mod: Any, cache: dict[str, np.ndarray], slot: int) -> np.ndarray:
    built = build(mod, host_target(1))
    states = [past for past, _ in opaque_states(mod)]
    logits = []
    for offset in range(STEPS):
        position = LENGTH + offset
        scalars = {
            "input_ids": IDS[None, position : position + 1],
            "position_ids": np.array([[position]]),
            "cache_length": np.array([slot + offset]),
        }
        out, *new = built.run_all({**scalars, **cache})
        cache = dict(zip(states, new, strict=True))
        logits.append(out[0, 0])
    return np.stack(logits)


@pytest.mark.parametrize(
    ("dtype", "row", "held"),
    [("int8", 8 + 4, "8-bit codes"), ("fp16", 16, "float16"), ("bf16", 16, "bfloat16")],
)
def test_fewer_slots_and_fewer_bits_together(dtype: Any, row: int, held: str) -> None:
    run = whole()
    spec = KVSpec(0.5, block=8, keep_sinks=2, keep_recent=4, dtype=dtype)
    options = {"cache": filled(run), "length": LENGTH, "attention": run.attention}
    after, passed = compress(step(), spec, **options)
    small = passed.compacted
    assert small is not None
    want = stored_run(dtype, masked_past(run, small))
    got = coded_steps(after, small.arrays, small.length)
    np.testing.assert_allclose(got, want, atol=NEAR[dtype])
    assert passed.meta["slots"]["after"] == 32
    assert passed.meta["bytes_after"] == 4 * 2 * 32 * row
    assert "contiguous" in passed.meta["why"]
    assert passed.meta["why"].endswith(f"the cache holds {held}")


@pytest.mark.parametrize("dtype", ["int8", "bf16"])
def test_a_built_step_takes_the_whole_cache_or_its_codes(dtype: Any) -> None:
    after, passed = compress(step(), KVSpec(0.0, dtype=dtype))
    built = build(after, host_target(1))
    cache, token = (
        filled(whole()),
        {"input_ids": IDS[None, :1], "position_ids": np.array([[LENGTH]])},
    )
    token["cache_length"] = np.array([LENGTH])
    one = built.run_all({**token, **cache})
    other = built.run_all({**token, **passed.compact(cache, LENGTH).arrays})
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_array_equal(one[1][:, :, :LENGTH], other[1][:, :, :LENGTH])


@pytest.mark.parametrize(("dtype", "near"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_a_step_over_16_bits_is_near_that_of_onnx_runtime(dtype: Any, near: float) -> None:
    """Relative to the largest logit; ONNX Runtime reads the whole cache in float32."""
    token = {
        "input_ids": IDS[None, LENGTH : LENGTH + 1],
        "position_ids": np.array([[LENGTH]]),
        "cache_length": np.array([LENGTH]),
    }
    inputs = {**token, **filled(whole())}
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = build_model("decoder-mini-step-random", seq=SLOTS).SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    (want,) = session.run(["logits"], inputs)
    after, _ = compress(step(), KVSpec(0.0, dtype=dtype))
    got = build(after, host_target(1)).run_all(inputs)[0]
    gap = np.abs(got - want).max() / np.abs(want).max()
    assert near / 100 < gap < near
    assert got.argmax() == want.argmax()


def test_the_metadata_says_what_it_costs() -> None:
    after, passed = compress(AttachLayoutTags(MINI_STATES)(step()), INT8, opaque_states=())
    meta = json.loads(json.dumps(passed.meta))
    assert (meta["skipped"], meta["delta_layout"]) == (False, True)
    assert meta["bytes_before"] == 4 * 2 * SLOTS * 8 * 4
    assert meta["bytes_after"] == 4 * 2 * SLOTS * (8 + 4)
    ratio = 12 / 32
    assert meta["copy"]["break_even_steps"] == pytest.approx((1 + ratio) / (1 - ratio))
    assert meta["quant"]["error_bound"] == "max |row| / 254: half a scale"
    loaded = tvm.ir.load_json(tvm.ir.save_json(after))
    assert StepCache.read(loaded) == StepCache(passed.plan, "cache_length")


def test_two_orders_of_a_rounded_cache_may_differ_by_steps() -> None:
    for dtype, one in (("int8", 1 / 255), ("fp16", 2.0**-10), ("bf16", 1 / 255)):
        found = order_tolerance(compress(step(), KVSpec(0.0, dtype=dtype))[0])
        # Keys and values of two layers.
        assert found.value == pytest.approx(FP32_TOLERANCE + np.sqrt(4) * one)


def test_a_cache_that_float16_does_not_hold_is_refused_when_it_is_compacted() -> None:
    _, passed = compress(step(), KVSpec(0.0, dtype="fp16"))
    cache = {name: 1e5 * array for name, array in filled(whole()).items()}
    with pytest.raises(NonFiniteError, match="outside the range of fp16"):
        passed.compact(cache, LENGTH)


def test_a_step_that_does_more_than_append_keeps_its_cache_with_a_reason() -> None:
    mod = appending_step("other output")
    with pytest.warns(RuntimeWarning, match="dtype=int8 skipped: .*is not what is returned"):
        after, passed = compress(mod, INT8, opaque_states=STATES)
    tvm.ir.assert_structural_equal(after["main"], mod["main"])
    assert passed.meta["skipped"]


# -- the request


def test_requests_of_a_dtype() -> None:
    assert parse_kv("dtype=int8") == INT8
    assert parse_kv("dtype=BF16") == KVSpec(0.0, dtype="bf16")
    spec = KVSpec(0.3, block=16, dtype="int8")
    assert parse_kv(str(spec)) == spec
    spec = KVSpec(0.3, block=16, dtype="fp16")
    assert parse_kv(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dtype=fp8_e4m3", "unknown kv dtype 'fp8_e4m3' .*known: int8, fp16, bf16"),
        ("block=16", "has no drop and no dtype"),
    ],
)
def test_bad_requests(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_kv(text)
