"""The Mamba decode step against a whole-sequence scan in numpy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from axis_models import compiled

from icd_tvm.errors import ConfigError, OutputError, ShapeError
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.mamba import (
    MAMBA_1_4B,
    MAMBA_2_8B,
    MAMBA_130M,
    MAMBA_370M,
    MAMBA_790M,
    MAMBA_MINI,
    MambaConfig,
    build_mamba_step,
    mamba_shapes,
    mamba_states,
    random_mamba_weights,
)
from icd_tvm.models.mamba_prefill import build_mamba_prefill
from icd_tvm.models.registry import build
from icd_tvm.models.weights import parameter_count
from icd_tvm.relax_passes.axis_groups import find_axis_groups
from icd_tvm.relax_passes.permute_constants import permute_groups

MINI = MAMBA_MINI
WEIGHTS = dict(random_mamba_weights(MINI))
STATE_SHAPES = {
    old: (1, MINI.inner, MINI.conv if old.startswith("conv") else MINI.state)
    for old, _ in mamba_states(MINI)
}
IDS = np.random.default_rng(0).integers(0, MINI.vocab, 9)


def norm(value: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return value / np.sqrt((value**2).mean(-1, keepdims=True) + eps) * weight


def silu(value: np.ndarray) -> np.ndarray:
    return value / (1 + np.exp(-value))


def sequence(config: MambaConfig, weights: Any, ids: np.ndarray) -> np.ndarray:
    """Logits [tokens, vocab]: a causal convolution over the whole text, then the scan."""
    hidden = weights["backbone.embedding.weight"][ids]
    for index in range(config.layers):
        layer = f"backbone.layers.{index}"
        w = {k[len(layer) + 1 :]: v for k, v in weights.items() if k.startswith(f"{layer}.")}
        both = norm(hidden, w["norm.weight"], config.eps) @ w["mixer.in_proj.weight"].T
        x, gate = both[:, : config.inner], both[:, config.inner :]
        kernel = w["mixer.conv1d.weight"][:, 0]
        x = np.stack(
            [np.convolve(x[:, c], kernel[c, ::-1])[: len(ids)] for c in range(config.inner)], 1
        )
        x = silu(x + w["mixer.conv1d.bias"])
        mixed = x @ w["mixer.x_proj.weight"].T
        step, key, query = np.split(mixed, [config.rank, config.rank + config.state], 1)
        step = np.log1p(np.exp(step @ w["mixer.dt_proj.weight"].T + w["mixer.dt_proj.bias"]))
        state, rows = np.zeros((config.inner, config.state)), []
        for t in range(len(ids)):
            decay = np.exp(-np.exp(w["mixer.A_log"]) * step[t, :, None])
            state = decay * state + (step[t] * x[t])[:, None] * key[t]
            rows.append(state @ query[t])
        y = (np.stack(rows) + w["mixer.D"] * x) * silu(gate)
        hidden = hidden + y @ w["mixer.out_proj.weight"].T
    hidden = norm(hidden, weights["backbone.norm_f.weight"], config.eps)
    return hidden @ weights["backbone.embedding.weight"].T


def chain(run: Any, config: MambaConfig, ids: np.ndarray) -> np.ndarray:
    shapes = {"conv": (1, config.inner, config.conv), "ssm": (1, config.inner, config.state)}
    names = [old for old, _ in mamba_states(config)]
    states = {old: np.zeros(shapes[old.split("_")[0]], np.float32) for old in names}
    logits = []
    for token in ids:
        out, *new = run(None, {"input_ids": np.array([token]), **states})
        states = dict(zip(names, new, strict=True))
        logits.append(out[0])
    return np.stack(logits)


def session(source: Any) -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    "config", [MINI, replace(MINI, conv=2, state=1, expand=1, dt_rank=0), replace(MINI, layers=1)]
)
def test_chained_steps_equal_the_whole_sequence(config: MambaConfig) -> None:
    weights = dict(random_mamba_weights(config, seed=5))
    model = build_mamba_step(config, weights)
    onnx.checker.check_model(model, full_check=True)
    got = chain(session(model.SerializeToString()).run, config, IDS)
    want = sequence(config, weights, IDS)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("permuted", [False, True])
def test_tvm_computes_chained_steps(permuted: bool) -> None:
    """Also with every free group permuted: states start at zero and only the step reads them."""
    imported = import_onnx(build("mamba-mini-random"))
    mod = imported.mod
    if permuted:
        groups = find_axis_groups(mod["main"], opaque_states=mamba_states(MINI))
        perms = {group.id: np.roll(np.arange(group.size), 1) for group in groups.free}
        mod = permute_groups(mod, groups, perms)
    execute = compiled(mod)
    names = [spec.name for spec in imported.inputs]

    def run(_: None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        return execute([feeds[name] for name in names])

    want = sequence(MINI, WEIGHTS, IDS)
    got = chain(run, MINI, IDS)
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def in_chunks(run: Any, lengths: Sequence[int]) -> np.ndarray:
    """Logits of IDS read in chunks of these lengths, the states handed on."""
    states = {old: np.zeros(shape, np.float32) for old, shape in STATE_SHAPES.items()}
    logits, start = [], 0
    for length in lengths:
        out, *new = run(length, {"input_ids": IDS[start : start + length], **states})
        states = dict(zip(states, new, strict=True))
        logits.append(out)
        start += length
    return np.concatenate(logits)


@pytest.mark.parametrize("lengths", [[9], [2, 1, 6], [1] * 9])
def test_chunks_equal_the_whole_sequence(lengths: list[int]) -> None:
    """Also chunks shorter than the convolution."""
    models = {n: build_mamba_prefill(MINI, WEIGHTS, n) for n in set(lengths)}
    for model in models.values():
        onnx.checker.check_model(model, full_check=True)
    sessions = {n: session(model.SerializeToString()) for n, model in models.items()}
    got = in_chunks(lambda n, feeds: sessions[n].run(None, feeds), lengths)
    want = sequence(MINI, WEIGHTS, IDS)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("permuted", [False, True])
def test_tvm_computes_chunks(permuted: bool) -> None:
    imported = import_onnx(build("mamba-mini-prefill-random", seq=3))
    mod = imported.mod
    if permuted:
        groups = find_axis_groups(mod["main"], opaque_states=mamba_states(MINI))
        # d_inner and d_state of each layer and the stream, as in a step.
        assert {48, 5, 24} <= {group.size for group in groups.free}
        perms = {group.id: np.roll(np.arange(group.size), 1) for group in groups.free}
        mod = permute_groups(mod, groups, perms)
    execute = compiled(mod)
    names = [spec.name for spec in imported.inputs]
    got = in_chunks(lambda _, feeds: execute([feeds[name] for name in names]), [3, 3, 3])
    want = sequence(MINI, WEIGHTS, IDS)
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_a_chunk_of_nothing() -> None:
    with pytest.raises(ShapeError, match="seq 0"):
        build("mamba-mini-prefill-random", seq=0)


def test_axis_groups_with_opaque_states() -> None:
    func = import_onnx(build("mamba-mini-random")).mod["main"]
    groups = find_axis_groups(func, opaque_states=mamba_states(MINI))
    sizes = Counter((group.size, group.constraint) for group in groups.free)
    # d_inner, d_state and dt_rank of each layer, and the stream of all layers.
    assert sizes == {(48, "free"): 2, (5, "free"): 2, (3, "free"): 2, (24, "free"): 1}
    inner = next(g for g in groups.free if g.size == 48 and "layers.0" in g.weights[0].name)
    sides = {(use.name.split(".mixer.")[1], use.side) for use in inner.weights}
    assert sides == {
        ("in_proj.weight", "N"), ("x_proj.weight", "K"),
        ("dt_proj.weight", "N"), ("out_proj.weight", "K"),
    }  # fmt: skip
    names = {use.name.split(".mixer.")[1] for use in inner.consts}
    assert {"conv1d.weight", "conv1d.bias", "dt_proj.bias", "A", "D"} < names
    pinned = Counter(g.size for g in find_axis_groups(func).free)
    assert pinned[48] == 0  # an exposed state keeps its order


def test_sizes_are_those_of_state_spaces() -> None:
    counts = {
        MAMBA_130M: 129_135_360,
        MAMBA_370M: 371_516_416,
        MAMBA_790M: 793_204_224,
        MAMBA_1_4B: 1_372_178_432,
        MAMBA_2_8B: 2_768_345_600,
    }
    assert {config: parameter_count(mamba_shapes(config)) for config in counts} == counts
    assert (MAMBA_130M.inner, MAMBA_130M.rank) == (1536, 48)
    assert (MAMBA_2_8B.inner, MAMBA_2_8B.rank) == (5120, 160)


def test_metadata_and_determinism() -> None:
    model = build("mamba-mini-random", seed=1)
    assert {p.key: p.value for p in model.metadata_props} == {"weights": "random"}
    assert model == build("mamba-mini-random", seed=1)
    assert model != build("mamba-mini-random", seed=2)
    assert len(build("mamba-mini-random", layers=3).graph.output) == 7


def test_weights_in_a_data_file(tmp_path: Path) -> None:
    config = replace(MINI, hidden=48)
    weights = random_mamba_weights(config)
    data = tmp_path / "m.onnx.data"
    data.write_bytes(b"left over")
    model = build_mamba_step(config, weights, data=data)
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    inside = build_mamba_step(config, weights)
    assert path.stat().st_size < len(inside.SerializeToString()) / 2
    np.testing.assert_array_equal(
        chain(session(str(path)).run, config, IDS),
        chain(session(inside.SerializeToString()).run, config, IDS),
    )
    stored = {t.name: t for t in onnx.load(path).graph.initializer}
    assert all(stored[t.name].raw_data == t.raw_data for t in inside.graph.initializer)
    assert len(import_onnx(path).inputs) == 5


def test_a_large_model_needs_a_data_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"11\.1 GB of weights") as caught:
        build("mamba-2.8b-step")
    assert "data=FILE" in caught.value.hint
    with pytest.raises(OutputError, match="cannot write"):
        build_mamba_step(MINI, WEIGHTS, data=tmp_path / "no" / "folder")
    build("mamba-mini-random", data=tmp_path / "unused")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "sizes", [{"layers": 0}, {"hidden": 0}, {"conv": 1}, {"dt_rank": -1}, {"state": 0}]
)
def test_bad_sizes(sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="at least"):
        replace(MINI, **sizes)


def test_bad_weights() -> None:
    name = "backbone.layers.1.mixer.A_log"
    with pytest.raises(ShapeError, match=f"{name}' is missing"):
        build_mamba_step(MINI, {k: v for k, v in WEIGHTS.items() if k != name})
    with pytest.raises(ShapeError, match=r"has shape \[5, 48\], not \[48, 5\]"):
        build_mamba_step(MINI, {**WEIGHTS, name: WEIGHTS[name].T})
