"""Example models by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from icd_tvm.errors import ConfigError
from icd_tvm.models.bert import BERT_BASE, BERT_MINI, BertConfig, Size, random_bert_weights
from icd_tvm.models.bert import build_bert as _build_bert
from icd_tvm.models.decoder import (
    DECODER_MINI,
    build_decoder,
    build_decoder_step,
    random_decoder_weights,
)
from icd_tvm.models.mamba import (
    MAMBA_2_8B,
    MAMBA_130M,
    MAMBA_MINI,
    MambaConfig,
    build_mamba_step,
    random_mamba_weights,
)
from icd_tvm.models.minilm import build_minilm
from icd_tvm.models.smollm2 import build_smollm2, build_smollm2_step


def _random_bert(config: BertConfig, name: str, default_seq: int) -> Callable[..., onnx.ModelProto]:
    def builder(seq: Size = default_seq, batch: Size = 1, seed: int = 0) -> onnx.ModelProto:
        return _build_bert(config, random_bert_weights(config, seed), seq, batch, name=name)

    return builder


def _minilm_pooled(seq: Size = 128, batch: Size = 1) -> onnx.ModelProto:
    return build_minilm(seq, batch, pooled=True)


def _bert_mini_pooled(seq: Size = 16, batch: Size = 1, seed: int = 0) -> onnx.ModelProto:
    weights = random_bert_weights(BERT_MINI, seed)
    return _build_bert(BERT_MINI, weights, seq, batch, name="bert-mini-pooled", pooled=True)


def _decoder_mini(seq: int = 16, seed: int = 0, cache: bool = False) -> onnx.ModelProto:
    weights = random_decoder_weights(DECODER_MINI, seed)
    return build_decoder(DECODER_MINI, weights, seq, cache=cache, name="decoder-mini-random")


def _decoder_mini_step(seq: int = 16, seed: int = 0) -> onnx.ModelProto:
    weights = random_decoder_weights(DECODER_MINI, seed)
    return build_decoder_step(DECODER_MINI, weights, seq, name="decoder-mini-step-random")


def _random_mamba(config: MambaConfig, name: str) -> Callable[..., onnx.ModelProto]:
    def builder(
        seed: int = 0, layers: int | None = None, data: str | Path | None = None
    ) -> onnx.ModelProto:
        sized = config if layers is None else replace(config, layers=layers)
        return build_mamba_step(sized, random_mamba_weights(sized, seed), data=data, name=name)

    return builder


MODELS: dict[str, tuple[Callable[..., onnx.ModelProto], str]] = {
    "minilm": (build_minilm, "MiniLM-L6: 6 layers x 384, trained weights"),
    "minilm-pooled": (
        _minilm_pooled,
        "MiniLM-L6 with the mean over tokens in the graph: sentence embeddings, trained weights",
    ),
    "bert-base-random": (
        _random_bert(BERT_BASE, "bert-base-random", 128),
        "BERT-base: 12 layers x 768, random weights (speed and equivalence only)",
    ),
    "bert-mini-random": (
        _random_bert(BERT_MINI, "bert-mini-random", 16),
        "2 layers x 64, vocabulary 100, random weights (tests)",
    ),
    "bert-mini-pooled-random": (
        _bert_mini_pooled,
        "2 layers x 64 with the mean over tokens in the graph, random weights (tests)",
    ),
    "smollm2": (
        build_smollm2,
        "SmolLM2-135M-Instruct: 30 layers x 576, whole prompt, trained weights",
    ),
    "smollm2-step": (
        build_smollm2_step,
        "SmolLM2-135M-Instruct: one token with a KV cache of seq slots, trained weights",
    ),
    "decoder-mini-random": (
        _decoder_mini,
        "2 layers x 48, 6 heads on 2, whole prompt, random weights (tests)",
    ),
    "decoder-mini-step-random": (
        _decoder_mini_step,
        "2 layers x 48, one token with a KV cache of seq slots, random weights (tests)",
    ),
    "mamba-130m-step-random": (
        _random_mamba(MAMBA_130M, "mamba-130m-step-random"),
        "Mamba: 24 layers x 768, one token, random weights (speed and equivalence only)",
    ),
    "mamba-2.8b-step-random": (
        _random_mamba(MAMBA_2_8B, "mamba-2.8b-step-random"),
        "Mamba: 64 layers x 2560, one token, random weights in a data file of 11 GB",
    ),
    "mamba-mini-random": (
        _random_mamba(MAMBA_MINI, "mamba-mini-random"),
        "Mamba: 2 layers x 24, one token, random weights (tests)",
    ),
}


def build(name: str, **options: Any) -> onnx.ModelProto:
    """Build an example model.

    Parameters
    ----------
    name : str
        A key of `MODELS`.
    **options
        Options of the builder: ``seq`` and ``batch`` where the model has them, ``seed`` where
        weights are random, ``cache`` of a prompt decoder, ``layers`` and ``data`` (a file for
        the weights, needed above 2 GB) of a Mamba.

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
