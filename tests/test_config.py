"""Configurations: typed, every refusal in one line, nothing in a file is executed or expanded."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icd_tvm.commands.schema import markdown
from icd_tvm.config import L2_HIT_RATE, Config
from icd_tvm.config_file import (
    MAX_BYTES,
    differences,
    load_config,
    make_config,
    read_mapping,
    to_yaml,
)
from icd_tvm.errors import ConfigError, IcdError
from icd_tvm.measure.schema import violations
from icd_tvm.runtime.options import CompileOptions
from icd_tvm.runtime.transforms import find_transforms

ROOT = Path(__file__).parents[1]
BASE = {"model": {"name": "bert-mini-random"}}


def test_specified_defaults() -> None:
    config = make_config(BASE)
    assert (config.pipeline.repeats, config.pipeline.warmup_iter) == (1000, 50)
    assert config.pipeline.post_transform_repermute == "auto"
    assert config.solver.time_budget_s == 300
    assert (config.solver.refine_steps, config.solver.k_blocks) == (2000, 4)
    assert config.measure.ncu_metrics == [L2_HIT_RATE]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.*")), ids=lambda path: path.name)
def test_examples_are_valid(path: Path) -> None:
    find_transforms(load_config(path))


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("pipeline.mode=linear", lambda c: c.pipeline.mode == "linear"),
        ("solver.time_budget_s=1e-3", lambda c: c.solver.time_budget_s == 0.001),
        ("solver.k_blocks=null", lambda c: c.solver.k_blocks is None),
        ("seed=010", lambda c: c.seed == 10),
        ("transform.sparsity=2:4", lambda c: c.transform.sparsity == "2:4"),
        ("transform.sparsity={type: unit, rate: 0.5}", lambda c: "0.5" in c.transform.sparsity),
        ("model.task=no", lambda c: c.model.task == "no"),
        ("model.shapes={x: [1, 8]}", lambda c: c.model.shapes == {"x": [1, 8]}),
        (
            "measure.ncu_metrics=[l2_tex__t_sector_hit_rate.pct]",
            lambda c: c.measure.ncu_metrics == [L2_HIT_RATE],
        ),
    ],
)
def test_overrides_are_typed(override: str, found: Any) -> None:
    assert found(make_config(BASE, [override]))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("pipeline.repeat=100", ["pipeline.repeat ", "pipeline.repeats?"]),
        ("pipline.mode=linear", ["pipline", "pipeline?"]),
        ("repeats=100", ["repeats", "pipeline.repeats?"]),
        ("pipeline.repeats=3", ["pipeline.repeats", "3", "30"]),
        ("pipeline.repeats=many", ["pipeline.repeats", "many", "integer"]),
        ("pipeline.repeats=100.0", ["pipeline.repeats", "integer"]),
        ("pipeline.mode=sideways", ["pipeline.mode", "sideways", "iterative"]),
        ("measure.enabled=1", ["measure.enabled", "boolean"]),
        ("model.name=true", ["model.name", "True", "string"]),
        ("model.path=x.onnx", ["exactly one"]),
        ('report.out_dir="a\\0b"', ["report.out_dir", "NUL"]),
        ("model.shapes={x: [0]}", ["positive"]),
        ("graph.source=trace", ["graph.trace"]),
        ("measure={cold_cache: true, peer: onnxruntime}", ["cold_cache", "peer"]),
        ("measure={stop_half_width: 0.01, peer: onnxruntime}", ["stop_half_width", "peer"]),
        ("measure.peer=openvin", ["measure.peer", "openvin", "openvino"]),
        ("measure.peer=llamacpp", ["unknown peer 'llamacpp'", "known: onnxruntime"]),
        ("measure.stop_half_width=0", ["stop_half_width"]),
        ("gates.quality_agreement=1.5", ["quality_agreement"]),
        ("gates.l2_gain_points=.inf", ["finite"]),
        ("gates.l2_gain_points=.nan", ["finite"]),
        ("quality.budget=0.1", ["quality.budget", "transform.sparsity"]),
        ("quality.budget=-1", ["quality.budget", "-1"]),
        ("quality.agreement_floor=1.5", ["quality.agreement_floor", "1.5"]),
        ("seed=-1", ["seed", "-1"]),
        ("seed=1" + "0" * 5000, ["seed"]),
        ("seed=&a 1", ["anchors"]),
        ("seed=*a", ["anchors"]),
        ("seed=!!python/object/apply:os.system [true]", ["tags"]),
        ("seed={a: 1, a: 2}", ["twice"]),
        ("seed=" + "[" * 40, ["nested"]),
        ("seed='", ["seed"]),
        ("seed", ["--override"]),
        ("=1", ["--override"]),
        (".=1", ["--override"]),
    ],
)
def test_refusals_name_the_key(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        make_config(BASE, [override])
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in error.value.line()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "no keys"),
        ("- 1", "no keys"),
        ("model: [", "line"),
        ("model: &m {name: x}\npipeline: *m", "anchors"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "anchors"),
        ("model: {name: x}\nmodel: {name: y}", "twice"),
        ("1: 2", "no text"),
        ("? [a]\n: b", "no text"),
        ("model: !!set {x}", "tags"),
        ("<<: {a: 1}", "unknown key <<"),
        ("\x00", "not"),
        ("#" * (MAX_BYTES + 1), "larger"),
        ("[" * 5000, "nested"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=word):
        load_config(path)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"a": 1, "a": 2}', '{"seed": NaN}', "[" * 100_000, '{"seed": 1e999}', "\xff"],
)
def test_bad_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError):
        load_config(path)


@pytest.mark.parametrize("name", ["absent.yaml", ".", "a\0b"])
def test_unreadable_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(f"{tmp_path}/{name}")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("transform.quant=something", "unknown quantisation 'something'"),
        ("transform.kv=something", "unknown part 'something'"),
        ("transform.kv=drop=0.5,score=attention_mass", "random caches have not"),
    ],
)
def test_a_transform_is_refused_with_a_reason(override: str, words: str) -> None:
    config = make_config(BASE, [override])
    with pytest.raises(ConfigError, match=words):
        find_transforms(config)


def test_a_planted_graph_and_a_compacted_cache_do_not_go_together() -> None:
    config = make_config(BASE, ["transform.kv=drop=0.5", "graph.source=mock"])
    with pytest.raises(ConfigError, match=r"needs graph\.source tir"):
        find_transforms(config)


def test_schema_accepts_what_is_accepted() -> None:
    schema = Config.model_json_schema()
    assert schema["additionalProperties"] is False
    plain = json.loads(json.dumps(schema["$defs"]["PipelineKeys"]))
    assert not list(violations({"mode": "linear", "repeats": 100}, plain, schema))
    assert list(violations({"mode": "sideways"}, plain, schema))
    assert list(violations({"repeats": 3}, plain, schema))


def test_documentation_lists_every_key() -> None:
    assert markdown() in (ROOT / "docs" / "Configuration.md").read_text()


def test_options_are_a_configuration() -> None:
    options = CompileOptions(model="bert-mini-random", sparsity="unit:0.5", repeats=100, peer=None)
    config = options.to_config()
    assert config.model.name == "bert-mini-random"
    assert (config.pipeline.repeats, config.pipeline.warmup_iter) == (100, 25)
    assert config.transform.sparsity == "unit:0.5"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("null", []),
        ("onnxruntime", ["onnxruntime"]),
        ("'openvino-int8, onnxruntime,openvino-int8'", ["openvino-int8", "onnxruntime"]),
        ("[torch, deepsparse]", ["torch", "deepsparse"]),
    ],
)
def test_peers_are_a_name_or_names(given: str, found: list[str]) -> None:
    assert make_config(BASE, [f"measure.peer={given}"]).measure.peer == found


def test_differences_name_key_old_and_new() -> None:
    old, new = make_config(BASE), make_config(BASE, ["seed=1", "report.out_dir=elsewhere"])
    assert differences(old, new) == ["seed: 0 -> 1"]
    assert differences(old, make_config(BASE, ["model.shapes.x=[2]"])) != []


TEXTS = st.one_of(
    st.sampled_from(
        ["no", "2:4", "1e-3", "0x10", "null", "~", "", "010", "- x", "a: b", "*a", "é"]
    ),
    st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=20),
)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(TEXTS, st.lists(st.integers(1, 99), max_size=3), max_size=3),
    TEXTS,
    st.floats(1e-300, 86400),
    st.one_of(st.none(), st.integers(0, 2**31)),
)
def test_resolved_configuration_round_trips(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: dict[str, list[int]],
    text: str,
    number: float,
    seed: int | None,
) -> None:
    config = make_config(
        {
            "model": {"path": text, "shapes": shapes, "opaque_states": {text: text}},
            "solver": {"time_budget_s": number, "rng_seed": seed},
        }
    )
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == config


def _mutated(text: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    for position, length, insert in edits:
        place = position % (len(text) + 1)
        text = text[:place] + insert + text[place + length :]
    return text


EDIT = st.tuples(
    st.integers(0, 10_000),
    st.integers(0, 12),
    st.one_of(
        st.binary(max_size=4),
        st.sampled_from([b"{", b"]", b": ", b"\n- ", b"*a", b"&a ", b"!!", b"'", b"1e999", b"\t"]),
    ),
)
SOURCES = ["mock.json", "minilm-unit.yaml", "mamba-mini.yaml"]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SOURCES), st.lists(EDIT, min_size=1, max_size=6))
def test_mutated_configurations(
    tmp_path_factory: pytest.TempPathFactory, name: str, edits: list[tuple[int, int, bytes]]
) -> None:
    path = tmp_path_factory.getbasetemp() / f"mutated-{name}"
    path.write_bytes(_mutated((ROOT / "configs" / name).read_bytes(), edits))
    config = None
    with contextlib.suppress(IcdError):
        config = load_config(path)
    assert config is None or make_config(config.model_dump()) == config


def test_mutations_change_the_file() -> None:
    original = (ROOT / "configs" / "mock.json").read_bytes()
    assert _mutated(original, [(5, 2, b"xyz")]) != original
    assert read_mapping(ROOT / "configs" / "mock.json")
