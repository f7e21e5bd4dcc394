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
from icd_tvm.models.bert import (
    BERT_BASE,
    BERT_LARGE,
    BERT_MINI,
    BertConfig,
    Size,
    build_bert,
    random_bert_weights,
)
from icd_tvm.models.bert_statistics import matched_bert_weights
from icd_tvm.models.checkpoint import Checkpoint
from icd_tvm.models.checkpoint_names import bert_name, mamba_name
from icd_tvm.models.decoder import (
    DECODER_MINI,
    build_decoder,
    build_decoder_step,
    random_decoder_weights,
)
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
    random_mamba_weights,
)
from icd_tvm.models.mamba_prefill import build_mamba_prefill
from icd_tvm.models.minilm import build_minilm
from icd_tvm.models.smollm2 import build_smollm2, build_smollm2_step
from icd_tvm.models.typeseg import build_typeseg
from icd_tvm.models.weights import PROTO_LIMIT, Weights, parameter_count

Builder = Callable[..., onnx.ModelProto]
Source = str | Path | None


def _bert_mini(seq: Size = 16, batch: Size = 1, seed: int = 0) -> onnx.ModelProto:
    weights = random_bert_weights(BERT_MINI, seed)
    return build_bert(BERT_MINI, weights, seq, batch, name="bert-mini-random")


def _bert(config: BertConfig, name: str) -> Builder:
    def builder(
        seq: Size = 128, batch: Size = 1, seed: int = 0, checkpoint: Source = None
    ) -> onnx.ModelProto:
        if checkpoint is None:
            weights: Weights = matched_bert_weights(config, seed)
            return build_bert(config, weights, seq, batch, name=name)
        read = Checkpoint(checkpoint, bert_name)
        rows = read.shapes.get("embeddings.word_embeddings.weight", (config.vocab,))[0]
        sized = replace(config, vocab=rows)  # cased models have another vocabulary
        return build_bert(sized, read, seq, batch, trained=True, name=name)

    return builder


def _minilm_pooled(seq: Size = 128, batch: Size = 1) -> onnx.ModelProto:
    return build_minilm(seq, batch, pooled=True)


def _bert_mini_pooled(seq: Size = 16, batch: Size = 1, seed: int = 0) -> onnx.ModelProto:
    weights = random_bert_weights(BERT_MINI, seed)
    return build_bert(BERT_MINI, weights, seq, batch, name="bert-mini-pooled", pooled=True)


def _decoder_mini(seq: int = 16, seed: int = 0, cache: bool = False) -> onnx.ModelProto:
    weights = random_decoder_weights(DECODER_MINI, seed)
    return build_decoder(DECODER_MINI, weights, seq, cache=cache, name="decoder-mini-random")


def _decoder_mini_step(seq: int = 16, seed: int = 0) -> onnx.ModelProto:
    weights = random_decoder_weights(DECODER_MINI, seed)
    return build_decoder_step(DECODER_MINI, weights, seq, name="decoder-mini-step-random")


def _mamba(config: MambaConfig, name: str, chunk: bool = False) -> Builder:
    def write(
        seed: int, layers: int | None, checkpoint: Source, data: Source, **size: int
    ) -> onnx.ModelProto:
        sized = config if layers is None else replace(config, layers=layers)
        large = 4 * parameter_count(mamba_shapes(sized)) > PROTO_LIMIT
        weights = (
            random_mamba_weights(sized, seed)
            if checkpoint is None
            else Checkpoint(checkpoint, mamba_name)
        )
        return (build_mamba_prefill if chunk else build_mamba_step)(
            sized,
            weights,
            data=data if large else None,
            trained=checkpoint is not None,
            name=name,
            **size,
        )

    def step(
        seed: int = 0, layers: int | None = None, checkpoint: Source = None, data: Source = None
    ) -> onnx.ModelProto:
        return write(seed, layers, checkpoint, data)

    def prefill(
        seq: int = 64,
        seed: int = 0,
        layers: int | None = None,
        checkpoint: Source = None,
        data: Source = None,
    ) -> onnx.ModelProto:
        return write(seed, layers, checkpoint, data, seq=seq)

    return prefill if chunk else step


def _mamba_family() -> dict[str, tuple[Builder, str]]:
    sizes = {
        "130m": MAMBA_130M,
        "370m": MAMBA_370M,
        "790m": MAMBA_790M,
        "1.4b": MAMBA_1_4B,
        "2.8b": MAMBA_2_8B,
    }
    family: dict[str, tuple[Builder, str]] = {}
    for size, config in sizes.items():
        shape = f"Mamba: {config.layers} layers x {config.hidden}"
        step, prefill = f"mamba-{size}-step", f"mamba-{size}-prefill"
        family[step] = (_mamba(config, step), f"{shape}, one token; {OPEN}")
        family[prefill] = (
            _mamba(config, prefill, chunk=True),
            f"{shape}, seq tokens with states; {OPEN}",
        )
    return family


OPEN = "weights of --checkpoint, or random (speed and equivalence only)"
MODELS: dict[str, tuple[Builder, str]] = {
    "minilm": (build_minilm, "MiniLM-L6: 6 layers x 384, trained weights"),
    "minilm-pooled": (
        _minilm_pooled,
        "MiniLM-L6 with the mean over tokens in the graph: sentence embeddings, trained weights",
    ),
    "bert-mini-pooled-random": (
        _bert_mini_pooled,
        "2 layers x 64 with the mean over tokens in the graph, random weights (tests)",
    ),
    "bert-base": (_bert(BERT_BASE, "bert-base"), f"BERT-base: 12 layers x 768; {OPEN}"),
    "bert-large": (_bert(BERT_LARGE, "bert-large"), f"BERT-large: 24 layers x 1024; {OPEN}"),
    "bert-mini-random": (_bert_mini, "2 layers x 64, vocabulary 100, random weights (tests)"),
    "typeseg": (build_typeseg, "Mamba of typeseg: 6 layers x 256, classes of bytes, trained"),
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
    **_mamba_family(),
    "mamba-mini-random": (
        _mamba(MAMBA_MINI, "mamba-mini-random"),
        "Mamba: 2 layers x 24, one token, random weights (tests)",
    ),
    "mamba-mini-prefill-random": (
        _mamba(MAMBA_MINI, "mamba-mini-prefill-random", chunk=True),
        "Mamba: 2 layers x 24, seq tokens with states, random weights (tests)",
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
        weights are random, ``cache`` of a prompt decoder, ``checkpoint`` (a safetensors file or
        Hugging Face folder) of a BERT or Mamba, ``layers`` and ``data`` (a file for weights of
        more than 2 GB, in the folder where the model will be saved) of a Mamba.

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
