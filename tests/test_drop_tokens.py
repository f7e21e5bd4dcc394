"""DropTokens: later layers of an encoder run on the tokens with the most attention mass."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icd_tvm._tvm import named_const, relax, tvm
from icd_tvm.adapters.token_drop import drop_tokens
from icd_tvm.adapters.token_spec import TokenSpec, parse_tokens
from icd_tvm.errors import ConfigError
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.registry import build as build_model
from icd_tvm.relax_passes.drop_tokens import DropTokens
from icd_tvm.relax_passes.transform_meta import transform_meta
from icd_tvm.runtime.build import Built, build
from icd_tvm.runtime.compile_model import compile_model
from icd_tvm.runtime.options import CompileOptions
from icd_tvm.runtime.progress import Progress
from icd_tvm.tir_schedules.target import host_target

TOKENS, HEADS, DIM = 6, 2, 4
WIDTH = HEADS * DIM


def encoder(kind: str = "", batch: int = 1, kept: int | None = None) -> Any:
    """Return one attention over x, then a pooled output; ``kept`` writes the drop out by hand."""
    variables = [
        relax.Var("x", relax.TensorType((batch, TOKENS, WIDTH), "float32")),
        relax.Var("mask", relax.TensorType((batch, TOKENS), "float32")),
    ]
    builder = relax.BlockBuilder()
    emit = builder.emit
    x, mask = variables
    with builder.function("main", variables):
        with builder.dataflow():
            bias = emit(relax.op.subtract(mask, relax.const(np.float32(1))))
            bias = emit(relax.op.multiply(bias, relax.const(np.float32(3e38))))
            bias = emit(relax.op.expand_dims(bias, [1, 2]), "bias")
            split = emit(relax.op.reshape(x, (batch, TOKENS, HEADS, DIM)))
            heads = emit(relax.op.permute_dims(split, [0, 2, 1, 3]))
            turned = emit(relax.op.permute_dims(split, [0, 2, 3, 1]))
            scores = emit(relax.op.add(emit(relax.op.matmul(heads, turned)), bias))
            weights = emit(relax.op.nn.softmax(scores, axis=-1), "weights")
            mixed = emit(relax.op.matmul(weights, heads), "mixed")
            tokens, seen, skip = TOKENS, mask, x
            if kept is not None:
                mixed, skip, seen = _by_hand(emit, bias, weights, (mixed, x, mask), kept)
                tokens = kept
            flat = emit(relax.op.permute_dims(mixed, [0, 2, 1, 3]))
            flat = emit(relax.op.reshape(flat, (batch, tokens, WIDTH)), "flat")
            hidden = emit(relax.op.add(flat, skip), "hidden")
            out = builder.emit_output(_pooled(emit, kind, hidden, seen, weights))
        builder.emit_func_output(out)
    return builder.get()


def _by_hand(emit: Any, bias: Any, weights: Any, values: Any, kept: int) -> list[Any]:
    real = emit(
        relax.op.astype(emit(relax.op.greater(bias, relax.const(np.float32(-1)))), "float32")
    )
    mass = emit(relax.op.sum(emit(relax.op.matmul(real, weights)), [0, 1, 2]))
    mass = emit(relax.op.reshape(mass, (TOKENS,)))
    always = np.array([1e30] + [0] * (TOKENS - 1), np.float32)
    mass = emit(relax.op.add(mass, relax.const(always)))
    best = emit(relax.op.topk(mass, kept, axis=0, ret_type="indices", dtype="int64"))
    index = emit(relax.op.sort(best, axis=0))
    axes = (2, 1, 1)
    return [emit(relax.op.take(v, index, a, "clip")) for v, a in zip(values, axes, strict=True)]


def _pooled(emit: Any, kind: str, hidden: Any, mask: Any, weights: Any) -> Any:
    if kind == "tokens":
        return relax.op.negative(hidden)
    if kind == "mean":
        return relax.op.mean(hidden, [1])
    if kind == "table":
        table = named_const(np.ones((TOKENS, WIDTH), np.float32), "table")
        hidden = emit(relax.op.add(hidden, table))
    column = emit(relax.op.expand_dims(mask, -1))
    pooled = emit(relax.op.sum(emit(relax.op.multiply(hidden, column)), [1]))
    if kind == "weights":
        return relax.Tuple([pooled, emit(relax.op.sum(weights, [2, 3]))])
    return relax.op.divide(pooled, emit(relax.op.sum(column, [1])))


def dropped(mod: Any, spec: TokenSpec) -> tuple[Any, DropTokens]:
    passed = DropTokens(spec)
    return passed(mod), passed


# -- the module


def test_the_rest_is_gathered_once_and_shortened() -> None:
    before = encoder()
    after, passed = dropped(before, TokenSpec(0.5))
    tvm.ir.assert_structural_equal(after["main"], encoder(kept=3)["main"])
    tvm.ir.assert_structural_equal(before, encoder())
    meta = json.loads(json.dumps(passed.meta))
    assert transform_meta(after) == {"kv": meta}
    assert meta["tokens"] == {"before": 6, "after": 3, "dropped": 3}
    assert sorted(meta["gathered"]) == ["mask", "mixed", "x"]
    assert meta["bytes_after"] * 2 == meta["bytes_before"] == 4 * TOKENS * (2 * WIDTH + 1)
    assert (meta["skipped"], meta["behind"]) == (False, "weights")


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 99), st.integers(1, TOKENS), st.sampled_from([0.2, 0.5]), st.integers(0, 2))
def test_the_tokens_are_those_of_the_adapter(seed: int, real: int, drop: float, first: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((1, TOKENS, WIDTH)).astype(np.float32)
    mask = (np.arange(TOKENS) < real).astype(np.float32)[None]
    after, _ = dropped(encoder(), TokenSpec(drop, keep_first=first))
    got = build(after, host_target(1)).run_all({"x": x, "mask": mask})[0]
    heads = x.reshape(1, TOKENS, HEADS, DIM).transpose(0, 2, 1, 3).astype(np.float64)
    scores = heads @ heads.transpose(0, 1, 3, 2) + np.where(mask > 0, 0, -np.inf)[:, None, None]
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mass = (weights * mask[:, None, :, None]).sum((1, 2))
    hidden = x + (weights @ heads).transpose(0, 2, 1, 3).reshape(1, TOKENS, WIDTH)
    small, _ = drop_tokens(hidden, mask, mass, 1 - drop, keep_first=first)
    want = (small.hidden * small.mask[..., None]).sum(1) / small.mask.sum(1, keepdims=True)
    np.testing.assert_allclose(got, want, atol=1e-4)


# -- a whole encoder


def bert(tokens: int = 16) -> Any:
    return build_model("bert-mini-pooled-random", seq=tokens)


def inputs(real: int, tokens: int = 16, seed: int = 0) -> dict[str, np.ndarray]:
    mask = (np.arange(tokens) < real).astype(np.int64)[None]
    ids = np.random.default_rng(seed).integers(0, 90, (1, tokens))
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


@pytest.fixture(scope="module")
def short() -> Built:
    return build(
        DropTokens(parse_tokens("tokens=0.5,layer=0"))(import_onnx(bert()).mod), host_target(1)
    )


def test_dropping_padding_alone_is_exact(short: Built) -> None:
    session = onnxruntime.InferenceSession(bert().SerializeToString())
    for real in (1, 5, 8):
        want = session.run(None, inputs(real))[0]
        np.testing.assert_allclose(short.run_all(inputs(real))[0], want, atol=1e-4)


def test_real_tokens_change_the_embedding_and_stay_close(short: Built) -> None:
    session = onnxruntime.InferenceSession(bert().SerializeToString())
    want, got = session.run(None, inputs(16))[0], short.run_all(inputs(16))[0]
    assert np.abs(want - got).max() > 1e-3
    assert (want * got).sum() > 0.5 * np.linalg.norm(want) * np.linalg.norm(got)


def test_a_run_drops_tokens_on_request() -> None:
    options = CompileOptions(
        "bert-mini-pooled-random", kv="tokens=0.25,layer=1", measure=False, threads=1, repeats=30
    )
    record = compile_model(options, Progress(quiet=True)).record
    assert (record["failure"], record["flags"]) == (None, [])
    assert record["transform"]["kv"]["tokens"] == {"before": 16, "after": 12, "dropped": 4}
    assert record["equivalence"]["max_rel"] <= 1e-4


# -- what is refused


@pytest.mark.parametrize(
    ("mod", "spec", "reason"),
    [
        (encoder("tokens"), TokenSpec(0.5), "cannot lose indices: graph output .* axis 1"),
        (encoder("mean"), TokenSpec(0.5), "cannot lose indices: mean over the axis"),
        (encoder("table"), TokenSpec(0.5), "table holds a value for every token"),
        (encoder("weights"), TokenSpec(0.5), "the probabilities have no single user"),
        (encoder(batch=2), TokenSpec(0.5), "the batch is 2: its sequences would keep different"),
        (encoder(), TokenSpec(0.5, layer=1), "layer 1 is none of 1 attentions over tokens"),
        (encoder(), TokenSpec(0.1), "6 of 6 tokens would stay"),
        (encoder(), TokenSpec(0.5, keep_first=4), "3 of 6 tokens would stay, 4 of them always"),
    ],
)
def test_what_needs_all_tokens_keeps_them(mod: Any, spec: TokenSpec, reason: str) -> None:
    with pytest.warns(RuntimeWarning, match=reason):
        after, passed = dropped(mod, spec)
    tvm.ir.assert_structural_equal(after["main"], mod["main"])
    assert passed.meta["skipped"]
    assert transform_meta(after)["kv"] == passed.meta


def test_requests() -> None:
    assert parse_tokens("tokens=0.2,layer=1") == TokenSpec(0.2, 1)
    spec = TokenSpec(0.3, 2, 0)
    assert parse_tokens(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokens=1", r"tokens 1.0 is outside \(0, 1\)"),
        ("tokens=nan", "tokens nan is outside"),
        ("tokens=0.2,layer=-1", "layer -1 is negative"),
        ("tokens=0.2,layer=x", "layer 'x' is no number"),
        ("tokens=0.2,tokens=0.3", "unknown or repeated part 'tokens=0.3'"),
        ("tokens=0.2,block=4", "unknown or repeated part 'block=4'"),
        ("layer=1", "has no tokens"),
    ],
)
def test_bad_requests(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_tokens(text)
