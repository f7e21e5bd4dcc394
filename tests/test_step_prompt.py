"""``benchmarks/step_prompt.py``: steps of a real prompt, and the figures of their logits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from test_apply_kv_compress import MINI, STATES, WEIGHTS

from icd_tvm._tvm import apply_pass
from icd_tvm.adapters.kv_spec import KVSpec
from icd_tvm.errors import MeasurementError
from icd_tvm.measure.peers import Peer
from icd_tvm.models.decoder_reference import run_decoder
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.registry import build as build_model
from icd_tvm.relax_passes.apply_kv_compress import ApplyKVCompress
from icd_tvm.relax_passes.attach_layout_tags import AttachLayoutTags
from icd_tvm.runtime.build import build
from icd_tvm.tir_schedules.target import host_target

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import step_prompt
from decode_step import show_logits
from step_prompt import TOKENS, Prompt, arm_logits, compared, gaps, peer_logits, read_prompt

SLOTS = 24
IDS = np.random.default_rng(3).integers(0, MINI.vocab, SLOTS)


def prompt() -> tuple[Prompt, np.ndarray]:
    """Return a prompt and the logits of its last tokens."""
    run = run_decoder(MINI, WEIGHTS, IDS)
    return Prompt(IDS, run.keys, run.values), run.logits[-TOKENS:]


def test_steps_over_the_cache_of_a_prompt_are_those_of_the_whole_text(tmp_path: Path) -> None:
    text, want = prompt()
    model = build_model("decoder-mini-step-random", seq=SLOTS)
    mod = apply_pass(AttachLayoutTags(STATES), import_onnx(model).mod)
    np.testing.assert_allclose(arm_logits(build(mod, host_target(1)), text), want, atol=1e-4)
    narrow = apply_pass(ApplyKVCompress(KVSpec(0.0, dtype="bf16")), mod)
    rounded = gaps(arm_logits(build(narrow, host_target(1)), text), want)
    assert 1e-4 < rounded["max_rel"] < 2e-2
    onnx.save(model, tmp_path / "step.onnx")
    with Peer("onnxruntime", tmp_path / "step.onnx", text.feeds(), 1) as peer:
        first = peer.outputs["logits"][0, 0]
        np.testing.assert_allclose(peer_logits(peer, text), want, atol=1e-4)
    np.testing.assert_allclose(first, want[-1], atol=1e-4)


def test_a_shorter_prompt_is_the_beginning_of_a_longer_one() -> None:
    text, _ = prompt()
    short = run_decoder(MINI, WEIGHTS, IDS[:9])
    np.testing.assert_allclose(text.first(9).keys, short.keys, atol=1e-5)
    feeds = text.first(9).feeds()
    assert feeds["past_value_1"].shape == (1, MINI.kv_heads, 9, MINI.depth)
    assert (int(feeds["cache_length"][0]), int(feeds["input_ids"][0, 0])) == (8, IDS[8])
    assert len(text.first(9).last_tokens()) == 9
    assert text.own_cache_feeds()["prompt"] is IDS


def test_a_prompt_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def make(tokens: int) -> Prompt:
        made.append(tokens)
        return prompt()[0].first(tokens)

    monkeypatch.setattr(step_prompt, "make_prompt", make)
    file = tmp_path / "prompt.npz"
    for tokens in (12, 7, 20, 12):
        found = read_prompt(tokens, file)
        np.testing.assert_array_equal(found.ids, IDS[:tokens])
        assert found.keys.shape[2] == found.values.shape[2] == tokens
    assert made == [12, 20]


def test_figures_of_logits_and_what_cannot_be_compared() -> None:
    want = np.array([[1.0, -4.0], [0.5, 0.25]], np.float32)

    def failing() -> np.ndarray:
        raise MeasurementError("it died", "start it again")

    sources: dict[str, Any] = {"same": lambda: want, "swapped": lambda: want[:, ::-1]}
    found = compared({**sources, "dead": failing}, want, "")
    assert found["same"] == {"top1": 1.0, "max_abs": 0.0, "max_rel": 0.0}
    assert found["swapped"] == {"top1": 0.0, "max_abs": 5.0, "max_rel": 1.25}
    assert "it died" in found["dead"]["not_compared"]
    none = compared(sources, None, "no reference")
    assert none == {name: {"not_compared": "no reference"} for name in sources}
    logits = {"tokens": 2, "reference": "r", "arms": found}
    text = show_logits({"case": "c", "threads": 1, "logits": logits})
    assert text.startswith("| c: same top token of 2 as r, max difference | 1 | same 100%, 0 (0); ")
    assert "swapped 0%, 5 (1.2); dead not compared: it died" in text
    assert text.count("|") == 7
