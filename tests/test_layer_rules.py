"""Layer rules: names first, then role and size, and a reason for everything left out."""

import pytest

from icd_tvm.adapters.sparsity import parse_sparsity
from icd_tvm.errors import ConfigError
from icd_tvm.relax_passes.layer_rules import Layer, LayerRule, LayerRules, parse_layer_rules

QUERY = Layer("layer.0.query.weight", "/layer.0/query/MatMul", (64, 64))
HALF = parse_sparsity("unit:0.5")


def test_without_rules_the_default_applies() -> None:
    assert LayerRules("int8").choose(QUERY).spec == "int8"


def test_the_first_rule_that_fits_wins() -> None:
    rules = LayerRules("int8", (LayerRule("*query*", "int4"), LayerRule("layer.0.*", "fp8_e4m3")))
    assert rules.choose(QUERY).spec == "int4"
    assert rules.choose(Layer("layer.0.key.weight", "", (64, 64))).spec == "fp8_e4m3"
    assert rules.choose(Layer("layer.1.key.weight", "", (64, 64))).spec == "int8"


def test_a_rule_may_name_the_operation() -> None:
    assert LayerRules("int8", (LayerRule("/layer.0/*", "int4"),)).choose(QUERY).spec == "int4"


def test_a_pattern_is_case_sensitive_and_covers_the_whole_name() -> None:
    rules = LayerRules("int8", (LayerRule("*Query*", "int4"), LayerRule("query", "int4")))
    assert rules.choose(QUERY).spec == "int8"


def test_a_rule_without_settings_leaves_the_weight() -> None:
    choice = LayerRules("int8", (LayerRule("*query*", None),)).choose(QUERY)
    assert choice.spec is None
    assert choice.why == "rule '*query*' leaves it"


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Layer("w", "fc", (64, 64), "head"), "head"),
        (Layer("w", "fc", (64, 64), "embedding"), "embedding"),
        (Layer("model.lm_head.weight", "fc", (64, 64)), "head"),
        (Layer("bert.classifier.weight", "fc", (64, 64)), "head"),
        (Layer("/lm_head/Transpose_output_0", "fc", (64, 64)), "head"),
        (Layer("bert.embeddings.word_embeddings.weight", "", (64, 64)), "embedding"),
        (Layer("w", "fc", (63, 65)), "4095 elements are below the least size of 4096"),
    ],
)
def test_what_is_left_out_by_default_says_why(layer: Layer, reason: str) -> None:
    choice = LayerRules("int8").choose(layer)
    assert choice.spec is None
    assert choice.why.startswith(reason)
    assert LayerRules("int8", (LayerRule("*", "int4"),)).choose(layer).spec == "int4"


def test_the_least_size_counts_itself_in() -> None:
    layer = Layer("w", "fc", (8, 8))
    assert LayerRules("int8", min_size=64).choose(layer).spec == "int8"
    assert LayerRules("int8", min_size=65).choose(layer).spec is None


def test_patterns_that_fit_nothing_are_found() -> None:
    rules = LayerRules("int8", (LayerRule("*query*", None), LayerRule("*qeury*", None)))
    assert rules.unmatched([QUERY]) == ["*qeury*"]


def test_rules_are_read_with_the_parser_of_the_transform() -> None:
    rules = parse_layer_rules(
        ["*query* = none", " a=b =unit:0.25"], HALF, parse_sparsity, min_size=1
    )
    quarter = parse_sparsity("unit:0.25")
    assert rules == LayerRules(HALF, (LayerRule("*query*", None), LayerRule("a=b", quarter)), 1)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["*query*"], "not PATTERN=REQUEST"),
        (["=unit:0.5"], "not PATTERN=REQUEST"),
        (["*query*="], "not PATTERN=REQUEST"),
        (["*query*=unti:0.5"], "unknown sparsity 'unti:0.5'"),
        (["a=none", "a=unit:0.5"], "two layer rules for 'a'"),
    ],
)
def test_bad_rules_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("*", r"\*")):
        parse_layer_rules(texts, HALF, parse_sparsity)


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="least size -1"):
        parse_layer_rules([], HALF, parse_sparsity, min_size=-1)
