"""The transforms that a configuration asks for: one line each in :data:`KINDS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from icd_tvm.adapters.kv_spec import parse_kv
from icd_tvm.adapters.quant import parse_quant
from icd_tvm.adapters.sparsity import SparsitySpec, parse_sparsity
from icd_tvm.adapters.sparsity_spec import split_saliency
from icd_tvm.adapters.token_spec import PREFIX, parse_tokens
from icd_tvm.config import Config
from icd_tvm.errors import ConfigError
from icd_tvm.relax_passes.apply_kv_compress import ApplyKVCompress
from icd_tvm.relax_passes.apply_quant import ApplyQuant, quant_requests
from icd_tvm.relax_passes.apply_sparsity import ApplySparsity, calibration_requests
from icd_tvm.relax_passes.collect_activation_stats import Statistic
from icd_tvm.relax_passes.drop_tokens import DropTokens
from icd_tvm.relax_passes.layer_rules import LayerRules, parse_request
from icd_tvm.runtime.strengths import RATES


@dataclass(frozen=True)
class Transform:
    """One of S, Q and K.

    Attributes
    ----------
    name : str
        Key of the configuration and of the metadata.
    text : str
        The specification in full.
    requests : Callable
        Module -> statistics of matmul inputs that the pass wants.
    make : Callable
        (statistics, seed) -> pass; after it ran, its ``meta`` says what it did.
    rules : LayerRules, optional
        Of a sparsity whose rates are still to be searched under a quality budget.
    """

    name: str
    text: str
    requests: Callable[[Any], Mapping[str, Statistic]]
    make: Callable[[Mapping[str, Any], int], Any]
    rules: LayerRules[SparsitySpec] | None = None


def _sparsity(text: str, config: Config) -> Transform:
    budget = config.quality.budget
    rules = parse_request(text, parse_sparsity if budget is None else _strongest)
    within = "" if budget is None else f" within {budget:g} points"
    if budget is not None:
        within += f" and a cosine of {config.quality.agreement_floor:g}"
    return Transform(
        "sparsity",
        text.strip() + within,
        lambda mod: calibration_requests(mod, rules),
        lambda statistics, seed: ApplySparsity(rules, statistics, seed=seed),
        None if budget is None else rules,
    )


def _strongest(text: str) -> SparsitySpec:
    """Read a type with the strongest rate that is tried, or a type alone."""
    rest, saliency = split_saliency(text)
    if ":" in rest or rest == NONE:
        return parse_sparsity(text)
    return parse_sparsity(":".join(filter(None, (rest, str(max(RATES)), saliency))))


def _quant(text: str, config: Config) -> Transform:
    rules = parse_request(text, parse_quant)
    return Transform(
        "quant",
        text.strip(),
        lambda mod: quant_requests(mod, rules),
        lambda statistics, seed: ApplyQuant(rules, statistics, seed=seed),
    )


def _kv(text: str, config: Config) -> Transform:
    if text.strip().lower().startswith(PREFIX):
        tokens = parse_tokens(text)
        return Transform("kv", str(tokens), lambda mod: {}, lambda *_: DropTokens(tokens))
    spec = parse_kv(text)
    if spec.score == "attention_mass":
        raise ConfigError(
            f"transform.kv: {text!r} scores by attention, which random caches have not",
            "score=key_norm or score=recency",
        )
    if config.graph.source != "tir":
        raise ConfigError(
            f"transform.kv: {text!r} needs graph.source tir",
            f"a {config.graph.source} has orders of the whole cache",
        )
    return Transform(
        "kv", text.strip(), lambda mod: {}, lambda statistics, seed: ApplyKVCompress(spec)
    )


# In the order in which they are applied: key of ``transform`` -> (its text, all keys) -> Transform.
KINDS: dict[str, Callable[[str, Config], Transform]] = {
    "sparsity": _sparsity,
    "quant": _quant,
    "kv": _kv,
}
NONE = "none"


def find_transforms(config: Config) -> list[Transform]:
    """Return what is to be applied, in order.

    Raises
    ------
    ConfigError
        If a specification is malformed, or asks for what a run cannot give.
    """
    keys = config.transform.model_dump()
    asked = {name: text for name, text in keys.items() if text.strip() != NONE}
    return [KINDS[name](asked[name], config) for name in KINDS if name in asked]
