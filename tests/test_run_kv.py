"""``transform.kv``: the arms run on a compacted cache, dense and the peer on the whole one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import tiny_onnx

import icd_tvm
from icd_tvm.cli import main
from icd_tvm.errors import ConfigError, ShapeError
from icd_tvm.measure.metrics import validate_metrics
from icd_tvm.relax_passes.kv_states import find_kv_states
from icd_tvm.runtime.compile_model import compile_model, summary
from icd_tvm.runtime.options import CompileOptions
from icd_tvm.runtime.progress import Progress
from icd_tvm.runtime.state_names import expand_states

KV = "drop=0.5,block=4,keep_sinks=1,keep_recent=2"
STATES = (("past_*", "present_*"),)


def compiled(**options: Any) -> Any:
    base: dict[str, Any] = {
        "model": "decoder-mini-step-random",
        "opaque_states": STATES,
        "kv": KV,
        "repeats": 30,
        "threads": 1,
    }
    return compile_model(CompileOptions(**(base | options)), Progress(quiet=True))


@pytest.fixture(scope="module")
def result() -> Any:
    return compiled(peer="onnxruntime")


def test_the_gain_of_compaction_has_a_ratio_of_its_own(result: Any) -> None:
    record = result.record
    validate_metrics(record)
    assert record["flags"] == []
    assert set(record["arms"]) == {
        "dense",
        "identity",
        "random",
        "linear",
        "iterative",
        "onnxruntime",
    }
    assert record["decision"]["reason"].startswith("no opportunity: ")
    assert record["ratios"]["identity/dense"]["median"] > 0
    assert "the transform alone: identity/dense " in summary(record)


def test_arms_of_one_cache_are_equal_and_dense_is_reported(result: Any) -> None:
    record = result.record
    assert record["equivalence"]["max_rel"] <= 1e-4
    assert {"random", "linear", "iterative"} == set(result.verified)
    # The peer runs the whole cache, as dense does.
    assert record["equivalence"]["dense_vs_peer"]["onnxruntime"] <= 1e-4
    kv = record["transform"]["kv"]
    assert kv["slots"] == {"before": 16, "after": 12, "room": 1}
    assert kv["against_dense"]["max_rel"] > 1e-3
    assert kv["against_dense"]["cache"] == "random values, 15 of 16 slots filled"


def test_every_arm_gets_a_filled_cache(result: Any) -> None:
    feeds = result.inputs(0)
    assert feeds["cache_length"] == 15
    assert feeds["past_key_0"].shape == (1, 2, 16, 8)
    own = result.built["random"].cache.inputs_to_own(feeds)
    assert own["cache_length"] == 8
    assert own["past_key_0"].shape == (1, 2, 12, 8)
    # What is beyond the filled slots must not be seen.
    other = {k: a.copy() for k, a in own.items()}
    other["past_value_0"][:, :, 9:] = 1e3
    logits = [result.built["identity"].run_all(f)[0] for f in (own, other)]
    np.testing.assert_array_equal(*logits)


def test_the_library_is_the_compacted_step(tmp_path: Path) -> None:
    library, out = tmp_path / "step.so", tmp_path / "run"
    arguments = ["decoder-mini-step-random", "--opaque-state", "past_*=present_*", "--kv", KV]
    arguments += ["--no-measure", "--quiet", "-o", str(library), "--out", str(out)]
    assert main(["compile", *arguments, "--threads", "1"]) == 0
    assert library.stat().st_size > 0
    record = json.loads((out / "metrics.json").read_text())
    assert record["transform"]["kv"]["bytes_after"] < record["transform"]["kv"]["bytes_before"]


@pytest.mark.parametrize(("dtype", "name", "row"), [("int8", "int8", 12), ("bf16", "bfloat16", 16)])
def test_a_run_of_fewer_bits_is_loaded_as_it_was_built(
    dtype: str, name: str, row: int, tmp_path: Path
) -> None:
    """The library takes the states of fewer slots as they are stored; its signature says so."""
    config = {
        "model": {
            "name": "decoder-mini-step-random",
            "seq": 24,
            "opaque_states": {"past_*": "present_*"},
        },
        "transform": {"kv": f"{KV},dtype={dtype}"},
        "measure": {"enabled": False},
        "threads": 1,
    }
    path, out = tmp_path / "kv.json", tmp_path / "run"
    path.write_text(json.dumps(config))
    assert main(["run", "-c", str(path), "--out", str(out), "--quiet"]) == 0
    record = json.loads((out / "metrics.json").read_text())
    validate_metrics(record)
    assert (record["flags"], record["failure"]) == ([], None)
    assert record["equivalence"]["max_rel"] <= 1e-4
    kv = record["transform"]["kv"]
    assert kv["slots"] == {"before": 24, "after": 16, "room": 1}
    assert kv["bytes_after"] * 24 * 32 == kv["bytes_before"] * 16 * row
    model = icd_tvm.load(out)
    kinds = {info.name: (info.shape, info.dtype) for info in model.inputs}
    assert kinds["past_key_0"] == ((1, 2, 16, 8), name)
    if dtype == "int8":
        assert kinds["past_key_0_scale"] == ((1, 2, 16, 1), "float32")
    else:
        assert "past_key_0_scale" not in kinds
    rng = np.random.default_rng(0)
    inputs = {name: rng.random(shape).astype(kind) for name, (shape, kind) in kinds.items()}
    found = model(inputs)
    assert [found[info.name].shape for info in model.outputs] == [i.shape for i in model.outputs]
    assert found["present_value_1"].any()
    # numpy's files do not name bfloat16; its bytes are taken for what they are.
    np.savez(tmp_path / "inputs.npz", **inputs)
    with np.load(tmp_path / "inputs.npz") as stored:
        again = model(dict(stored))
    for output, array in found.items():
        np.testing.assert_array_equal(again[output], array)
    with pytest.raises(ShapeError, match=r"'past_key_0' has dtype"):
        model({**inputs, "past_key_0": inputs["past_key_0"].astype(np.float32)})


def test_sparsity_and_a_smaller_cache_together() -> None:
    record = compiled(sparsity="unit:0.5; min-size=0", measure=False).record
    assert record["failure"] is None
    assert record["transform"]["sparsity"]["entries"]
    assert record["transform"]["kv"]["skipped"] is False
    assert record["equivalence"]["max_rel"] <= 1e-4


def test_a_model_without_a_cache_keeps_what_it_has(tmp_path: Path) -> None:
    path = tiny_onnx(tmp_path / "tiny.onnx")
    record = compiled(model=str(path), opaque_states=(), measure=False).record
    assert record["failure"] is None
    assert record["transform"]["kv"]["skipped"] is True
    assert ["no opaque state" in flag["reason"] for flag in record["flags"]] == [True]
    assert record["decision"]["reason"].startswith("no opportunity: ")


def test_the_length_is_found_by_the_graph(result: Any) -> None:
    pairs = expand_states(dict(STATES), [spec.name for spec in result.imported.inputs])
    assert find_kv_states(result.imported.mod["main"], pairs).length == "cache_length"


# States by pattern.


def test_patterns_name_states() -> None:
    inputs = ["ids", "past_key_0", "past_value_0", "past"]
    assert expand_states({"past_*": "now_*", "a": "b"}, inputs) == (
        ("past_key_0", "now_key_0"),
        ("past_value_0", "now_value_0"),
        ("a", "b"),
    )


@pytest.mark.parametrize(
    ("states", "words"),
    [
        ({"x_*": "y_*"}, "fits no input"),
        ({"past_*": "present"}, "not one"),
        ({"*_*": "*_*"}, "not one"),
    ],
)
def test_bad_patterns(states: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        expand_states(states, ["past_key_0"])
