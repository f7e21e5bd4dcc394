"""Example models by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import onnx

from icd_tvm.errors import ConfigError
from icd_tvm.models.bert import BERT_BASE, BERT_MINI, BertConfig, Size, random_bert_weights
from icd_tvm.models.bert import build_bert as _build_bert
from icd_tvm.models.minilm import build_minilm


def _random_bert(config: BertConfig, name: str, default_seq: int) -> Callable[..., onnx.ModelProto]:
    def builder(seq: Size = default_seq, batch: Size = 1, seed: int = 0) -> onnx.ModelProto:
        return _build_bert(config, random_bert_weights(config, seed), seq, batch, name=name)

    return builder


MODELS: dict[str, tuple[Callable[..., onnx.ModelProto], str]] = {
    "minilm": (build_minilm, "MiniLM-L6: 6 layers x 384, trained weights"),
    "bert-base-random": (
        _random_bert(BERT_BASE, "bert-base-random", 128),
        "BERT-base: 12 layers x 768, random weights (speed and equivalence only)",
    ),
    "bert-mini-random": (
        _random_bert(BERT_MINI, "bert-mini-random", 16),
        "2 layers x 64, vocabulary 100, random weights (tests)",
    ),
}


def build(name: str, **options: Any) -> onnx.ModelProto:
    """Build an example model.

    Parameters
    ----------
    name : str
        A key of `MODELS`.
    **options
        Options of the builder: ``seq`` and ``batch``, and ``seed`` where weights are random.

    Returns
    -------
    onnx.ModelProto

    Raises
    ------
    ConfigError
        Unknown model or option.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"unknown model {name!r}", f"{hint}models: {', '.join(MODELS)}")
    builder = MODELS[name][0]
    known = inspect.signature(builder).parameters
    for option in options:
        if option not in known:
            raise ConfigError(
                f"model {name!r} has no option {option!r}", f"options: {', '.join(known)}"
            )
    return builder(**options)
