"""Peers: right outputs, clear errors when a worker fails or dies, no worker left behind."""

import contextlib
import ctypes
import io
import json
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from icd_tvm.errors import MeasurementError, ModelFileError
from icd_tvm.measure import peer_worker
from icd_tvm.measure.peers import Peer, PeerError, compare_with_peer

X = np.arange(6, dtype=np.float32).reshape(2, 3)
W = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["out/y:0"])],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 3])],
        [helper.make_tensor_value_info("out/y:0", onnx.TensorProto.FLOAT, [2, 4])],
        [numpy_helper.from_array(W, "w")],
    )
    path = tmp_path / "model.onnx"
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_outputs_and_times(model: Path) -> None:
    with Peer("onnxruntime", model, {"x": X}, 1) as peer:
        np.testing.assert_allclose(peer.outputs["out/y:0"], X @ W)
        assert peer.info["runtime"] == "onnxruntime"
        times = peer.run(5)
        assert times.shape == (5,)
        assert (times > 0).all()
        pid = peer.pid
    assert not alive(pid)


def test_takes_turns_with_our_arms(model: Path) -> None:
    calls = {"a": 0, "b": 0}

    def arm(name: str):
        def call() -> None:
            calls[name] += 1

        return call

    with Peer("onnxruntime", model, {"x": X}, 1) as peer:
        samples = compare_with_peer(
            {"a": arm("a"), "b": arm("b")},
            {"onnxruntime": peer},
            blocks=3,
            block_repeats=4,
            block_warmup=2,
            warmup=1,
            settle_s=0.0,
        )
    assert {name: s.shape for name, s in samples.items()} == {
        "a": (12,),
        "b": (12,),
        "onnxruntime": (12,),
    }
    assert calls == {"a": 3 * 6 + 1, "b": 3 * 6 + 1}


def test_budget_stops_after_a_block(model: Path) -> None:
    with Peer("onnxruntime", model, {"x": X}, 1) as peer:
        samples = compare_with_peer(
            {"a": int}, {"p": peer}, blocks=9, block_repeats=2, settle_s=0.0, budget_s=0.0
        )
    assert samples["a"].shape == samples["p"].shape == (2,)


def test_turns_are_symmetric_and_start_with_thrown_away_calls(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    monkeypatch.setattr(Peer, "settle", lambda self, seconds=0: 0.0)

    def run(self: Peer, count: int) -> np.ndarray:
        order.append("p")
        return np.arange(count) + 1.0

    monkeypatch.setattr(Peer, "run", run)
    peer = Peer("onnxruntime", model, {"x": X}, 1)
    samples = compare_with_peer(
        {"a": lambda: order.append("a")},
        {"p": peer},
        blocks=4,
        block_repeats=1,
        block_warmup=1,
        warmup=0,
    )
    assert "".join(order) == "aappaaaappaa"
    np.testing.assert_array_equal(samples["p"], 2.0)


def test_missing_model() -> None:
    with pytest.raises(ModelFileError, match=r"no model file 'absent\.onnx'"):
        Peer("onnxruntime", "absent.onnx", {}, 1).__enter__()


def test_broken_model(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(MeasurementError, match="onnxruntime peer failed"):
        Peer("onnxruntime", path, {"x": X}, 1).__enter__()


def test_wrong_input_name(model: Path) -> None:
    with pytest.raises(MeasurementError, match="onnxruntime peer failed") as caught:
        Peer("onnxruntime", model, {"z": X}, 1).__enter__()
    assert "inputs z" in caught.value.hint


def test_killed_worker(model: Path) -> None:
    with Peer("onnxruntime", model, {"x": X}, 1) as peer:
        os.kill(peer.pid, signal.SIGKILL)
        with pytest.raises(MeasurementError, match="exit status -9"):
            peer.run(3, timeout_s=20)


def test_stuck_worker_is_stopped(model: Path) -> None:
    with Peer("onnxruntime", model, {"x": X}, 1) as peer:
        pid = peer.pid
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(MeasurementError, match="did not answer within 0 s"):
            peer.run(3, timeout_s=0.2)
        assert not alive(pid)
        with pytest.raises(MeasurementError, match="not running"):
            peer.run(1)


def test_unknown_backend(model: Path) -> None:
    with pytest.raises(PeerError, match=r"unknown peer 'nonesuch'.*onnxruntime, onnxruntime-int8"):
        Peer("nonesuch", model, {"x": X}, 1)


def test_missing_runtime_says_how_to_get_it(model: Path, tmp_path: Path) -> None:
    # A Python without site packages has numpy no more than the runtime.
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(PeerError, match="No module named 'numpy'"):
        Peer("torch", model, {"x": X}, 1, python=str(bare)).__enter__()


@pytest.mark.parametrize(
    ("backend", "tolerance"),
    [
        ("onnxruntime-int8", 0.02),
        ("onnxruntime-int8w", 0.02),
        ("openvino", 1e-5),
        ("openvino-bf16", 0.02),
        ("openvino-int8", 0.02),
        ("openvino-int8w", 0.02),
        ("torch", 1e-5),
        ("torch-bf16", 0.02),
        ("torch-int8", 0.02),
        ("deepsparse", 1e-5),
    ],
)
def test_every_runtime_agrees(model: Path, backend: str, tolerance: float) -> None:
    with contextlib.ExitStack() as stack:
        try:
            peer = stack.enter_context(Peer(backend, model, {"x": X}, 1))
        except PeerError as error:
            if "ModuleNotFoundError" not in str(error):
                raise
            pytest.skip(str(error))
        expected = X @ W
        error = np.abs(peer.outputs["out/y:0"] - expected).max() / np.abs(expected).max()
        assert error <= tolerance
        assert peer.run(2).shape == (2,)
        # The rows change places, so that ranges which were calibrated stay.
        swapped = X[::-1].copy()
        again = peer.evaluate({"x": swapped}, ["out/y:0"])["out/y:0"]
        assert np.abs(again - swapped @ W).max() / np.abs(expected).max() <= tolerance


def test_changed_inputs_are_evaluated_and_stay(model: Path) -> None:
    with Peer("onnxruntime", model, {"x": X}, 1) as peer:
        np.testing.assert_allclose(peer.evaluate({"x": 2 * X}, ["out/y:0"])["out/y:0"], 2 * X @ W)
        np.testing.assert_allclose(peer.evaluate({}, ["out/y:0"])["out/y:0"], 2 * X @ W)
        np.testing.assert_allclose(peer.outputs["out/y:0"], X @ W)
        assert peer.run(2).shape == (2,)
        for changed, outputs, text in (
            ({"z": X}, [], "input 'z' cannot become float32"),
            ({"x": X[:1]}, [], r"input 'x' cannot become float32\[1, 3\]"),
            ({"x": X.astype(np.float64)}, [], "input 'x' cannot become float64"),
            ({}, ["y"], "no output 'y'"),
        ):
            with pytest.raises(MeasurementError, match=text):
                peer.evaluate(changed, outputs)


def test_peer_needs_a_with_statement(model: Path) -> None:
    with pytest.raises(MeasurementError, match="with statement"):
        Peer("onnxruntime", model, {"x": X}, 1).run(1)


@pytest.mark.parametrize(
    ("arms", "peers", "options", "message"),
    [
        ({}, {"p": None}, {}, "needs an arm and a peer"),
        ({"a": int}, {}, {}, "needs an arm and a peer"),
        ({"a": int}, {"a": None}, {}, "'a' names an arm and a peer"),
        ({"a": int}, {"p": None}, {"blocks": 0}, "blocks = 0"),
        ({"a": int}, {"p": None}, {"block_repeats": 0}, "block_repeats = 0"),
    ],
)
def test_bad_comparison(arms: dict, peers: dict, options: dict, message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        compare_with_peer(arms, peers, **options)


def test_bad_thread_count(model: Path) -> None:
    with pytest.raises(MeasurementError, match="threads = 0"):
        Peer("onnxruntime", model, {"x": X}, 0)


def test_worker_protocol(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(path: Path, feeds: dict, threads: int):
        return (lambda: {"y": feeds["x"] * threads}), {"runtime": "fake"}

    monkeypatch.setitem(peer_worker.BACKENDS, "fake", backend)
    np.savez(tmp_path / "feeds.npz", x=X)
    answers = io.StringIO()
    arguments = ["fake", str(model), str(tmp_path / "feeds.npz"), str(tmp_path / "out.npz"), "2"]
    assert peer_worker.serve(arguments, io.StringIO("run 3\nquit\nrun 9\n"), answers) == 0
    ready, ran = (json.loads(line) for line in answers.getvalue().splitlines())
    assert ready["outputs"] == ["y"]
    assert len(ran["ns"]) == 3
    with np.load(tmp_path / "out.npz") as archive:
        np.testing.assert_array_equal(archive["0"], 2 * X)


class FakeLlama:
    """The part of llama_cpp.Llama that the worker uses; logits tell what was evaluated."""

    def __init__(self, path: str, n_ctx: int, **options: Any) -> None:
        self.n_ctx, self.n_tokens, self.ctx = n_ctx, 0, self
        self.seen: list[int] = []
        # What the real class has, and does not write either.
        self.scores = np.zeros((n_ctx, 3), np.float32)

    def eval(self, tokens: list[int]) -> None:
        self.seen = [*self.seen[: self.n_tokens], *tokens]
        assert len(self.seen) <= self.n_ctx
        self.n_tokens = len(self.seen)

    def n_vocab(self) -> int:
        return 3


def llama_logits(context: FakeLlama, row: int) -> Any:
    assert row == -1
    numbers = (ctypes.c_float * 3)(*context.seen[-3:])
    return ctypes.cast(numbers, ctypes.POINTER(ctypes.c_float))


def test_llamacpp_fills_its_cache_with_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("llama_cpp")
    fake.Llama, fake.llama_get_logits_ith, fake.__version__ = FakeLlama, llama_logits, "0"
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    feeds = {
        "input_ids": np.array([[9]]),
        "cache_length": np.array([4]),
        "prompt": np.array([5, 6, 7, 8, 9]),
    }
    step, info = peer_worker.llamacpp_backend(Path("x.gguf"), feeds, 1)
    assert info["runtime"] == "llama.cpp"
    for length, token, want in ((4, 9, [7, 8, 9]), (2, 7, [5, 6, 7]), (4, 9, [7, 8, 9])):
        feeds["cache_length"][0], feeds["input_ids"][0, 0] = length, token
        for _ in range(2):
            logits = step()["logits"]
            np.testing.assert_array_equal(logits, [[want]])
    del feeds["prompt"]
    step, _ = peer_worker.llamacpp_backend(Path("x.gguf"), feeds, 1)
    np.testing.assert_array_equal(step()["logits"], [[[3, 4, 9]]])
