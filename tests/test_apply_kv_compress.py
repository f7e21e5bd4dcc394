"""ApplyKVCompress: a decoder step for a compacted KV cache, and the cache that goes with it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from axis_models import MODELS
from hypothesis import given, settings
from hypothesis import strategies as st

from icd_tvm._tvm import named_const, relax, tvm
from icd_tvm.adapters.kv_slots import SlotCache, compact_slots, plan_slots
from icd_tvm.adapters.kv_spec import KVSpec, parse_kv
from icd_tvm.errors import ConfigError, NonFiniteError, ShapeError, TransformError
from icd_tvm.models.decoder import DECODER_MINI, cache_states, random_decoder_weights
from icd_tvm.models.decoder_reference import DecoderRun, run_decoder
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.registry import build
from icd_tvm.relax_passes.apply_kv_compress import ApplyKVCompress
from icd_tvm.relax_passes.attach_layout_tags import AttachLayoutTags
from icd_tvm.relax_passes.kv_states import find_kv_states
from icd_tvm.relax_passes.step_cache import StepCache
from icd_tvm.relax_passes.transform_meta import TRANSFORM_META
from icd_tvm.runtime.build import build as compile_module
from icd_tvm.tir_schedules.target import host_target

MINI = DECODER_MINI
WEIGHTS = dict(random_decoder_weights(MINI))
STATES = cache_states(MINI)
SLOTS, LENGTH, STEPS = 48, 40, 3
IDS = np.random.default_rng(1).integers(0, MINI.vocab, LENGTH + STEPS)
SPEC = KVSpec(0.5, block=8, keep_sinks=2, keep_recent=4)


def step(slots: int = SLOTS) -> Any:
    return import_onnx(build("decoder-mini-step-random", seq=slots)).mod


def whole() -> DecoderRun:
    return run_decoder(MINI, WEIGHTS, IDS[:LENGTH], with_attention=True)


def filled(run: DecoderRun, slots: int = SLOTS) -> dict[str, np.ndarray]:
    """Return the step's cache inputs; empty slots hold garbage that must not be seen."""
    cache = {}
    for index in range(MINI.layers):
        for part, rows in (("key", run.keys), ("value", run.values)):
            array = np.full((1, MINI.kv_heads, slots, MINI.depth), 9, np.float32)
            array[0, :, : rows.shape[2]] = rows[index]
            cache[f"past_{part}_{index}"] = array
    return cache


def run_steps(mod: Any, cache: dict[str, np.ndarray], slot: int, steps: int = STEPS) -> np.ndarray:
    """Feed ``steps`` tokens after the context, each with its original position."""
    built = compile_module(mod, host_target(1))
    logits = []
    for offset in range(steps):
        position = LENGTH + offset
        feeds = {
            "input_ids": IDS[None, position : position + 1],
            "position_ids": np.array([[position]]),
            "cache_length": np.array([slot + offset]),
            **cache,
        }
        out, *states = built.run_all(feeds)
        cache = dict(zip((past for past, _ in STATES), states, strict=True))
        logits.append(out[0, 0])
    return np.stack(logits)


def compress(mod: Any, spec: KVSpec = SPEC, **options: Any) -> tuple[Any, ApplyKVCompress]:
    options.setdefault("opaque_states", STATES)
    passed = ApplyKVCompress(spec, **options)
    return passed(mod), passed


# -- the module


@pytest.mark.parametrize(("length", "slots"), [(None, 32), (40, 32), (21, 40)])
def test_the_step_becomes_the_step_of_a_smaller_cache(length: int | None, slots: int) -> None:
    after, passed = compress(step(), length=length)
    assert passed.plan is not None
    assert passed.plan.slots == slots
    tvm.ir.assert_structural_equal(after["main"], step(slots)["main"])
    names = [b.var.name for b in step()["main"].body.blocks[0].bindings]
    assert [b.var.name for b in after["main"].body.blocks[0].bindings] == names


def test_a_built_step_takes_the_whole_cache_or_a_compacted_one() -> None:
    after, passed = compress(step(), length=LENGTH)
    built = compile_module(after, host_target(1))
    cache = filled(whole())
    small = passed.compact(cache, LENGTH)
    token = {"input_ids": IDS[None, LENGTH : LENGTH + 1], "position_ids": np.array([[LENGTH]])}
    found = built.run_all({**token, **cache, "cache_length": np.array([LENGTH])})
    length = np.array([small.length])
    expected = built.run_all({**token, **small.arrays, "cache_length": length})
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert found[1].shape[2] == passed.plan.slots < SLOTS


def test_what_a_step_expects_stands_in_the_module() -> None:
    after, passed = compress(step())
    found = StepCache.read(tvm.ir.load_json(tvm.ir.save_json(after)))
    assert found == StepCache(passed.plan, "cache_length")
    assert StepCache.read(step()) is None
    assert found.filled({"cache_length": np.array([1])})["cache_length"] == SLOTS - 1


def test_a_step_that_is_told_no_length_is_not_given_a_whole_cache() -> None:
    _, passed = compress(step())
    cache = filled(whole())
    with pytest.raises(TransformError, match="how many slots are filled"):
        StepCache(passed.plan, "").inputs_to_own(cache)
    assert StepCache(passed.plan, "").filled(cache) == cache


def test_the_states_of_a_tagged_module_need_not_be_named() -> None:
    after, _ = compress(AttachLayoutTags(STATES)(step()), opaque_states=())
    tvm.ir.assert_structural_equal(after["main"], compress(step())[0]["main"])


def test_the_module_given_is_left_untouched() -> None:
    mod = step()
    compress(mod)
    tvm.ir.assert_structural_equal(mod, step())


def test_keys_and_values_are_found_by_the_graph_not_by_name() -> None:
    states = find_kv_states(step()["main"], STATES[::-1])
    assert states.layers == tuple((f"past_key_{i}", f"past_value_{i}") for i in (0, 1))
    assert states.shape == (MINI.kv_heads, SLOTS, MINI.depth)


def test_meta_joins_that_of_other_transforms_and_survives_json() -> None:
    mod = step().with_attr(TRANSFORM_META, json.dumps({"sparsity": {"spec": "unit:0.5"}}))
    after, passed = compress(mod)
    loaded = tvm.ir.load_json(tvm.ir.save_json(after))
    meta = json.loads(str(loaded.attrs[TRANSFORM_META]))
    assert meta == {"sparsity": {"spec": "unit:0.5"}, "kv": passed.meta}
    kv = meta["kv"]
    assert parse_kv(kv["spec"]) == SPEC
    assert kv["bytes_before"] == 4 * 2 * SLOTS * 8 * 4
    assert kv["bytes_after"] == 4 * 2 * 32 * 8 * 4
    assert kv["slots"] == {"before": SLOTS, "after": 32, "room": 1}
    assert kv["copy"] == {"break_even_steps": pytest.approx(4.0), "source": "model"}
    assert (kv["loss"], kv["delta_layout"], kv["skipped"]) == (None, True, False)
    assert "no cache" in kv["loss_why"]


# -- the cache


def test_dropping_tokens_equals_attention_over_the_kept_ones() -> None:
    """Several steps of the compiled module against numpy, the state fed back."""
    run = whole()
    options = {"cache": filled(run), "length": LENGTH, "attention": run.attention}
    after, passed = compress(step(), **options)
    small = passed.compacted
    assert isinstance(small, SlotCache)
    past = masked_past(run, small)
    want = [
        run_decoder(MINI, WEIGHTS, IDS[LENGTH:], past=past, start=LENGTH).logits,
        run_decoder(MINI, WEIGHTS, IDS).logits[LENGTH:],
    ]
    got = run_steps(after, small.arrays, small.length)
    np.testing.assert_allclose(got, want[0], atol=1e-4)
    assert np.abs(got - want[1]).max() > 1e-2
    assert passed.meta["loss"]["output"] > 0
    assert passed.meta["length"] == small.length == 20


def masked_past(run: DecoderRun, small: SlotCache) -> tuple[np.ndarray, np.ndarray]:
    """Pick the kept tokens out of the whole cache by the index map."""
    index = small.positions[..., None]
    return np.take_along_axis(run.keys, index, 2), np.take_along_axis(run.values, index, 2)


def test_dropping_nothing_changes_no_output() -> None:
    """Only unused slots go: a rate below one token, and room for a few more."""
    run = run_decoder(MINI, WEIGHTS, IDS[:LENGTH])
    spec = KVSpec(0.01, block=4, room=STEPS)
    after, passed = compress(step(64), spec, length=LENGTH)
    assert passed.plan is not None
    assert passed.plan.slots == 44
    with pytest.warns(RuntimeWarning, match="less than one"):
        small = passed.compact(filled(run, 64), LENGTH)
    assert small.length == LENGTH
    np.testing.assert_array_equal(small.positions[1, 1], np.arange(LENGTH))
    want = run_steps(step(64), filled(run, 64), LENGTH)
    np.testing.assert_allclose(run_steps(after, small.arrays, LENGTH), want, atol=2e-6)


@pytest.mark.parametrize("scope", ["per_head", "shared"])
def test_the_cache_holds_the_rows_of_the_index_map(scope: Any) -> None:
    run = whole()
    spec = KVSpec(0.5, block=8, scope=scope, keep_sinks=1, keep_recent=1)
    plan = plan_slots(layers(), (2, SLOTS, 8), LENGTH, spec)
    cache = filled(run)
    copies = {name: array.copy() for name, array in cache.items()}
    small = compact_slots(plan, cache, LENGTH, run.attention)
    for name, array in cache.items():
        np.testing.assert_array_equal(array, copies[name])
    keys, values = masked_past(run, small)
    for index in range(MINI.layers):
        for name, rows in (("key", keys), ("value", values)):
            array = small.arrays[f"past_{name}_{index}"]
            assert array.shape == (1, 2, plan.slots, 8)
            np.testing.assert_array_equal(array[0, :, : small.length], rows[index])
            assert not array[0, :, small.length :].any()
    same = (small.positions[:, 0] == small.positions[:, 1]).all()
    assert same == (scope == "shared")


def test_the_index_map_of_a_second_compaction_is_composed() -> None:
    run, spec = whole(), KVSpec(0.5, block=8, keep_sinks=0, keep_recent=0)
    first = compact_slots(
        plan_slots(layers(), (2, SLOTS, 8), LENGTH, spec), filled(run), LENGTH, run.attention
    )
    slots = first.arrays["past_key_0"].shape[2]
    again = plan_slots(layers(), (2, slots, 8), first.length, spec)
    second = compact_slots(again, first.arrays, first.length, positions=first.positions)
    keys, _ = masked_past(run, second)
    np.testing.assert_array_equal(second.arrays["past_key_1"][0, :, : second.length], keys[1])


def layers() -> tuple[tuple[str, str], ...]:
    return tuple((f"past_key_{i}", f"past_value_{i}") for i in range(MINI.layers))


@given(
    capacity=st.integers(1, 3000),
    share=st.floats(0.01, 1),
    drop=st.floats(0.01, 0.99),
    block=st.integers(1, 256),
)
def test_freed_slots_equal_the_dropped_tokens_within_a_page(
    capacity: int, share: float, drop: float, block: int
) -> None:
    length = max(1, int(share * capacity))
    spec = KVSpec(drop, block=block, keep_sinks=0, keep_recent=0)
    try:
        plan = plan_slots((), (1, capacity, 4), length, spec)
    except TransformError:
        # Refused only if a whole page is not freed, or the page is larger than the cache.
        assert block > capacity or drop * length < block + 1
        return
    assert plan.slots % block == 0
    freed, dropped = capacity - plan.slots, drop * length
    assert dropped - block - 1 <= freed <= dropped + 1


# -- requests


@settings(max_examples=60)
@given(
    st.builds(
        KVSpec,
        drop=st.floats(0, 0.99),
        block=st.integers(1, 512),
        score=st.sampled_from([None, "attention_mass", "key_norm", "recency"]),
        scope=st.sampled_from(["per_head", "shared"]),
        keep_sinks=st.integers(0, 9),
        keep_recent=st.integers(0, 9),
        room=st.none() | st.integers(1, 99),
    )
)
def test_requests_survive_their_text(spec: KVSpec) -> None:
    assert parse_kv(str(spec)) == spec


def test_requests_are_read() -> None:
    assert parse_kv(" Drop=0.3, block=16,score=attention_mass") == KVSpec(
        0.3, block=16, score="attention_mass"
    )
    assert parse_kv("none") == KVSpec(0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("block=4", "has no drop"),
        ("drop=1", r"outside \[0, 1\)"),
        ("drop=-0.1", r"outside \[0, 1\)"),
        ("drop=nan", r"outside \[0, 1\)"),
        ("drop=x", "is not a number"),
        ("drop=0.1,block=0.5", "is not an integer"),
        ("drop=0.1,block=0", "block 0 is not an integer of at least 1"),
        ("drop=0.1,room=0", "room 0 is not an integer of at least 1"),
        ("drop=0.1,keep_sinks=-1", "keep_sinks -1"),
        ("drop=0.1,score=loudness", "unknown kv score 'loudness'"),
        ("drop=0.1,scope=none", "unknown kv scope 'none'"),
        ("drop=0.1,drop=0.2", "gives drop twice"),
        ("drop=0.1,blocks=4", "did you mean block="),
        ("0.3", "unknown part '0.3'"),
    ],
)
def test_bad_requests(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_kv(text)


# -- what is refused: the module stays, with a warning and the reason


def refused(mod: Any, message: str, spec: KVSpec = SPEC, **options: Any) -> ApplyKVCompress:
    with pytest.warns(RuntimeWarning, match=message):
        after, passed = compress(mod, spec, **options)
    tvm.ir.assert_structural_equal(after["main"], mod["main"])
    meta = json.loads(str(after.attrs[TRANSFORM_META]))["kv"]
    assert meta == passed.meta
    assert meta["skipped"] is True
    assert (passed.plan, passed.compacted) == (None, None)
    return passed


def test_nothing_asked_for_is_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after, passed = compress(step(), KVSpec(0.0))
    tvm.ir.assert_structural_equal(after["main"], step()["main"])
    assert "drop 0 removes nothing" in passed.meta["why"]
    with pytest.raises(TransformError, match=r"was not rewritten: .*drop 0"):
        passed.compact({}, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opaque_states": ()}, "no opaque state is given"),
        ({"opaque_states": (("pasts", "present_key_0"),)}, "'pasts'"),
        ({"opaque_states": (("position_ids", "logits"),)}, "changes its shape"),
        ({"opaque_states": STATES[:2]}, "the slots cannot move: .*past_key_1"),
        ({"spec": KVSpec(0.5, block=64)}, "page of 64 tokens is larger than the cache of 48"),
        ({"spec": KVSpec(0.1, block=8)}, "no whole page is freed"),
        ({"length": 49}, r"length 49 is outside 1\.\.48"),
        ({"length": 0}, r"length 0 is outside 1\.\.48"),
    ],
)
def test_bad_requests_for_a_module(options: dict[str, Any], message: str) -> None:
    refused(step(), message, **options)


def test_nan_in_the_cache_is_refused() -> None:
    cache = filled(whole())
    cache["past_value_1"][0, 1, 3, 2] = np.nan
    refused(step(), "past_value_1 holds 1 NaN", cache=cache, length=LENGTH)
    # Beyond the filled slots anything may lie.
    cache["past_value_1"][0, 1, 3, 2] = 0
    cache["past_value_1"][0, 1, LENGTH:] = np.nan
    assert compress(step(), cache=cache, length=LENGTH)[1].compacted is not None


def with_bad(name: str, change: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    cache: dict[str, Any] = filled(run_decoder(MINI, WEIGHTS, IDS[:LENGTH]))
    cache[name] = change(cache[name])
    return cache


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a[0], r"past_key_0 has shape \[2, 48, 8\]"),
        (lambda a: a[:, :, :9], r"past_key_0 has shape \[1, 2, 9, 8\]"),
        (lambda a: a.astype(str), "past_key_0 has dtype"),
        (lambda a: a[..., :4], "different numbers of channels"),
    ],
)
def test_bad_cache_arrays(change: Any, message: str) -> None:
    plan = plan_slots(layers(), (2, SLOTS, 8), LENGTH, SPEC)
    with pytest.raises(ShapeError, match=message):
        compact_slots(plan, with_bad("past_key_0", change), LENGTH)


def test_bad_calls_of_compact() -> None:
    cache = filled(run_decoder(MINI, WEIGHTS, IDS[:LENGTH]))
    plan = plan_slots(layers(), (2, SLOTS, 8), LENGTH, SPEC)
    with pytest.raises(ShapeError, match=r"length 49 is outside 1\.\.48"):
        compact_slots(plan, cache, 49)
    with pytest.raises(ShapeError, match="no array 'past_key_1'"):
        compact_slots(plan, {k: v for k, v in cache.items() if k != "past_key_1"}, LENGTH)
    by_mass = plan_slots(layers(), (2, SLOTS, 8), LENGTH, KVSpec(0.5, 8, "attention_mass"))
    with pytest.raises(ConfigError, match="needs attention"):
        compact_slots(by_mass, cache, LENGTH)
    short = plan_slots(layers(), (2, SLOTS, 8), 8, KVSpec(0.5, 8, room=1, keep_recent=0))
    assert short.slots == 8
    with pytest.raises(ShapeError, match="do not fit into 8 slots"):
        compact_slots(short, cache, LENGTH)
    cache["past_key_0"][0, 0, 0, 0] = np.inf
    with pytest.raises(NonFiniteError, match="past_key_0"):
        compact_slots(plan, cache, LENGTH)


# -- graphs that tie a slot to a position

WIDTH = 4


def attention(kind: str = "plain") -> Any:
    """Return one head's step over a state of 16 slots, with one part that must be refused."""
    lead = (2,) if kind == "rank" else (1, 2)
    shape = (*lead, WIDTH, 16) if kind == "turned" else (*lead, 16, WIDTH)
    swap = [*range(len(lead)), len(lead) + 1, len(lead)]
    variables = [
        relax.Var("q", relax.TensorType((*lead, 1, WIDTH), "float32")),
        relax.Var("length", relax.TensorType((1,), "int64")),
        *(relax.Var(name, relax.TensorType(shape, "float32")) for name in ("keys", "values")),
    ]
    builder = relax.BlockBuilder()
    slots = named_const(np.arange(16), "slots")
    with builder.function("main", variables):
        with builder.dataflow():
            emit = builder.emit
            q, length, keys, values = variables
            bound = length
            if kind == "computed":
                bound = emit(relax.op.add(length, named_const(np.array(1), "one")))
            if kind == "fixed":
                bound = named_const(np.array([9]), "nine")
            seen = emit(relax.op.less(slots, bound), "seen")
            low, zero = (relax.const(np.float32(n)) for n in (-1e9, 0))
            mask = emit(relax.op.where(seen, zero, low))
            both = emit(relax.op.add(keys, values)) if kind == "both" else keys
            turned = both if kind == "turned" else emit(relax.op.permute_dims(both, swap))
            scores = emit(relax.op.matmul(q, turned), "scores")
            scores = emit(relax.op.add(scores, mask))
            scores = tied(kind, emit, scores, length)
            weights = emit(relax.op.nn.softmax(scores, axis=-1), "weights")
            rows = emit(relax.op.permute_dims(values, swap)) if kind == "turned" else values
            mixed = emit(relax.op.matmul(weights, rows), "mixed")
            if kind == "spread":
                mixed = emit(relax.op.add(mixed, emit(relax.op.matmul(weights, rows))))
            if kind == "twice":
                again = emit(relax.op.nn.softmax(emit(relax.op.negative(scores)), axis=-1))
                mixed = emit(relax.op.add(mixed, emit(relax.op.matmul(again, rows))))
            outs = [mixed, keys, values]
            out = builder.emit_output(relax.Tuple(outs))
        builder.emit_func_output(out)
    return builder.get()


def tied(kind: str, emit: Any, scores: Any, length: Any) -> Any:
    if kind == "bias":
        bias = named_const(np.linspace(0, 1, 16, dtype=np.float32), "bias")
        return emit(relax.op.add(scores, bias), "biased")
    if kind == "even":
        return emit(relax.op.add(scores, named_const(np.ones(16, np.float32), "even")))
    if kind == "position":
        table = named_const(np.ones((16, 1), np.float32), "table")
        return emit(relax.op.add(scores, emit(relax.op.take(table, length, axis=0))))
    if kind == "mean":
        return emit(relax.op.subtract(scores, emit(relax.op.mean(scores, [-1], keepdims=True))))
    if kind == "order":
        return emit(relax.op.cumsum(scores, axis=-1), "running")
    return scores


ONE = (("keys", "1"), ("values", "2"))


@pytest.mark.parametrize("kind", ["plain", "even"])
def test_slot_numbers_and_even_tables_are_cut(kind: str) -> None:
    spec = KVSpec(0.5, block=4, keep_sinks=0, keep_recent=0)
    after, passed = compress(attention(kind), spec, opaque_states=ONE)
    assert passed.meta["skipped"] is False
    shape = after["main"].params[2].ty.shape.values
    assert [int(n) for n in shape] == [1, 2, 12, WIDTH]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("bias", "bias holds a value for every slot .*relax.add at 'biased'"),
        ("computed", "slots is compared with a computed slot .*relax.less at 'seen'"),
        ("fixed", "slots is compared with a constant .*relax.less at 'seen'"),
        ("position", "slots is compared with 'length', used elsewhere too"),
        ("mean", "the slots cannot be fewer: .*relax.mean"),
        ("order", "the slots cannot move: .*relax.cumsum at 'running'"),
        ("rank", r"state 'keys' has shape \[2, 16, 4\], not \[1, heads, slots, channels\]"),
        ("turned", r"state 'keys' has shape \[1, 2, 4, 16\]"),
        ("spread", "the softmax at 'weights' is not followed by one matmul"),
        ("twice", "state 'keys' is read by 2 attentions, not one"),
        ("both", "the keys at 'weights' come from keys, values, not one state"),
    ],
)
def test_graphs_that_cannot_be_compacted_are_refused(kind: str, message: str) -> None:
    spec = KVSpec(0.5, block=4, keep_sinks=0, keep_recent=0)
    refused(attention(kind), message, spec, opaque_states=ONE)


def test_a_state_without_attention_is_refused() -> None:
    mini = MODELS["recurrent_state"]()
    refused(mini.mod, "no softmax normalises an axis of a state", opaque_states=mini.opaque_states)
