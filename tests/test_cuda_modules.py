"""Whole models with every chosen kernel executed, against ONNX Runtime; and their launches."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from cuda_cases import needs_compiler
from cuda_modules import EmulatedModule, States, launches, selected

from icd_tvm._tvm import apply_pass
from icd_tvm.adapters.kv_spec import parse_kv
from icd_tvm.models.bert import BertConfig, build_bert, random_bert_weights
from icd_tvm.models.decoder import (
    DecoderConfig,
    build_decoder_step,
    cache_states,
    random_decoder_weights,
)
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.mamba import (
    MambaConfig,
    build_mamba_step,
    mamba_states,
    random_mamba_weights,
)
from icd_tvm.relax_passes.apply_kv_compress import ApplyKVCompress
from icd_tvm.relax_passes.attach_layout_tags import AttachLayoutTags
from icd_tvm.relax_passes.cuda_graph import captured, for_graph
from icd_tvm.relax_passes.lower_cuda import lower_cuda
from icd_tvm.relax_passes.select_cuda_kernels import read_cuda_kernels
from icd_tvm.tir_schedules.target import cuda_target

BATCH, SEQ, SLOTS = 2, 8, 32
TARGET = cuda_target("sm_90")


def bert(layers: int = 1) -> tuple[onnx.ModelProto, States]:
    config = BertConfig(layers, hidden=64, heads=2, ffn=128, vocab=40, max_position=16)
    return build_bert(config, random_bert_weights(config), SEQ, BATCH), ()


def mamba(layers: int = 1) -> tuple[onnx.ModelProto, States]:
    config = MambaConfig(layers, hidden=64, vocab=96, state=8, dt_rank=8)
    return build_mamba_step(config, random_mamba_weights(config)), mamba_states(config)


def decoder(layers: int = 1) -> tuple[onnx.ModelProto, States]:
    config = DecoderConfig(
        layers, hidden=256, heads=4, kv_heads=2, ffn=128, vocab=96, max_position=64
    )
    weights = random_decoder_weights(config)
    return build_decoder_step(config, weights, SLOTS), cache_states(config)


MODELS = {"bert": bert, "mamba": mamba, "decoder": decoder}


def feeds_of(session: onnxruntime.InferenceSession, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    found = {}
    for one in session.get_inputs():
        if one.type == "tensor(int64)":
            found[one.name] = rng.integers(0, 30, one.shape)
        else:
            found[one.name] = rng.standard_normal(one.shape).astype(np.float32)
    if "attention_mask" in found:
        found["attention_mask"] = (np.arange(SEQ) < np.array([[SEQ], [5]])).astype(np.int64)
        found["token_type_ids"] %= 2
    return found


def reference(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@needs_compiler
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_model_of_our_kernels_equals_onnx_runtime(name: str, dtype: str, tmp_path: Path) -> None:
    model, states = MODELS[name](1)
    file = tmp_path / "model.onnx"
    onnx.save(model, str(file))
    mod, chosen = selected(import_onnx(str(file)).mod, dtype, states)
    refused = {node: one.reason for node, one in chosen.choices.items() if one.kind == "tvm"}
    assert refused == {}
    emulated, session = EmulatedModule(mod, chosen, tmp_path), reference(model)
    feeds, outputs = feeds_of(session, 0), [one.name for one in session.get_outputs()]
    for step in range(3 if states else 1):
        if "cache_length" in feeds:
            # The last one is dropped: the cache is full.
            feeds["cache_length"][:] = (0, 7, SLOTS)[step]
        expected = session.run(None, feeds)
        for out, found, right in zip(outputs, emulated(feeds), expected, strict=True):
            scale = np.abs(right).max()
            allowed = {"float16": 0.01, "bfloat16": 0.06}[dtype] * scale
            assert np.abs(found - right).max() <= allowed, (step, out)
        assert len(emulated.calls) > 5
        feeds |= {old: expected[outputs.index(new)] for old, new in states}


@needs_compiler
def test_states_that_are_not_declared_are_not_overwritten(tmp_path: Path) -> None:
    model, _ = mamba()
    onnx.save(model, str(tmp_path / "model.onnx"))
    mod, chosen = selected(import_onnx(str(tmp_path / "model.onnx")).mod)
    assert "call_tir_inplace" not in str(mod["main"])
    session, emulated = reference(model), EmulatedModule(mod, chosen, tmp_path)
    feeds = feeds_of(session, 1)
    for found, right in zip(emulated(feeds), session.run(None, feeds), strict=True):
        assert np.abs(found - right).max() <= 0.01 * np.abs(right).max()
    onnx.save(decoder()[0], str(tmp_path / "decoder.onnx"))
    _, chosen = selected(import_onnx(str(tmp_path / "decoder.onnx")).mod)
    kinds = {choice.kind for choice in chosen.choices.values()}
    assert "append" not in kinds
    assert "decode_attention" in kinds
    [reason] = [one.reason for one in chosen.choices.values() if "its append" in one.reason]
    assert "no state that is written in place" in reason


@needs_compiler
def test_a_part_that_is_read_elsewhere_is_noticed(tmp_path: Path) -> None:
    model, states = mamba()
    onnx.save(model, str(tmp_path / "model.onnx"))
    mod, chosen = selected(import_onnx(str(tmp_path / "model.onnx")).mod, "float16", states)
    wrong = {
        name: replace(kernel, call=re.sub(r"\+ \d+\)", "+ 0)", kernel.call))
        for name, kernel in chosen.kernels.items()
    }
    assert wrong != chosen.kernels
    chosen.kernels = wrong
    session, emulated = reference(model), EmulatedModule(mod, chosen, tmp_path)
    feeds = feeds_of(session, 0)
    found, right = emulated(feeds)[0], session.run(None, feeds)[0]
    assert np.abs(found - right).max() > 0.01 * np.abs(right).max()


@pytest.fixture(scope="module", params=MODELS)
def lowered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the name of a model and its lowered modules of one and two layers."""
    found = []
    for layers in (1, 2):
        model, states = MODELS[request.param](layers)
        file = tmp_path_factory.mktemp("lowered") / "model.onnx"
        onnx.save(model, str(file))
        mod = apply_pass(AttachLayoutTags(opaque_states=states), import_onnx(str(file)).mod)
        found.append(lower_cuda(mod, TARGET, "float16"))
    return request.param, found


def test_launches_of_a_layer(lowered: Any) -> None:
    name, (one, two) = lowered
    first, second = launches(one), launches(two)
    assert len(second) - len(first) == {"bert": 7, "mamba": 7, "decoder": 10}[name], second
    assert not any("cast" in kernel and "fused" not in kernel for kernel in second), second


def test_a_step_is_one_graph(lowered: Any) -> None:
    name, modules = lowered
    counts = [captured(for_graph(mod), TARGET) for mod in modules]
    # What reads inputs comes before it, what writes the outputs after it.
    assert {count.graphs for count in counts} == {1}
    assert len({count.outside for count in counts}) == 1, counts
    assert counts[0].outside <= 6
    for mod, count in zip(modules, counts, strict=True):
        assert count.inside + count.outside == len(launches(mod))
    if name != "bert":
        assert captured(modules[1], TARGET).graphs > 1, "states that move cut the graph"


@pytest.mark.parametrize(
    ("spec", "appends", "cache"),
    [
        ("drop=0.5,block=4", "append", "float32"),
        ("dtype=int8", "append_row", "int8"),
        ("dtype=fp16", "append_row", "float16"),
    ],
)
def test_compressed_caches_are_read_as_they_lie(
    spec: str, appends: str, cache: str, tmp_path: Path
) -> None:
    model, states = decoder(1)
    onnx.save(model, str(tmp_path / "model.onnx"))
    mod = import_onnx(str(tmp_path / "model.onnx")).mod
    mod = apply_pass(AttachLayoutTags(opaque_states=states), mod)
    mod = apply_pass(ApplyKVCompress(parse_kv(spec)), mod)
    low = lower_cuda(mod, TARGET, "float16")
    kernels = launches(low)
    assert appends in kernels
    assert "decode_attention" in kernels
    assert not any("where" in name for name in kernels), kernels
    choices = read_cuda_kernels(low).values()
    (attention,) = (one for one in choices if one.kind == "decode_attention")
    assert f"share a {cache} cache" in attention.reason
