"""A BERT sentence classifier in jax: the same function as its ONNX graph, with gradients.

The feed-forward layers may differ in width, so a pruned encoder trains without its dead units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from icd_tvm.models.bert import BertConfig
from icd_tvm.models.recipes._jax import jax, jnp

Params = Mapping[str, Any]
Array = Any


def layer_outputs(
    config: BertConfig,
    params: Params,
    ids: Array,
    mask: Array,
    gates: Sequence[Array] | None = None,
) -> tuple[list[Array], list[Array]]:
    """Return what every layer gives, and what its feed-forward units give.

    Parameters
    ----------
    config : BertConfig
        Its ``ffn`` is not read: the weights tell each layer's width.
    params : mapping of str to array
        Names and shapes of `icd_tvm.models.bert.weight_shapes`.
    ids, mask : int [batch, seq]
    gates : sequence of float32 [batch, 1, width], optional
        Factor of every feed-forward unit, per layer.

    Returns
    -------
    list of float32 [batch, seq, hidden]
        Outputs of the layers.
    list of float32 [batch, seq, width]
        Units of each layer after the activation function.
    """
    hidden = _embeddings(config, params, ids)
    bias = jnp.where(mask[:, None, None, :] > 0, 0.0, jnp.finfo(jnp.float32).min)
    outputs, units = [], []
    for index in range(config.layers):
        at = f"encoder.layer.{index}"
        context = _attention(config, params, f"{at}.attention.self", hidden, bias)
        projected = _dense(params, f"{at}.attention.output.dense", context)
        hidden = _norm(config, params, f"{at}.attention.output.LayerNorm", projected + hidden)
        inner = _dense(params, f"{at}.intermediate.dense", hidden)
        inner = jax.nn.gelu(inner, approximate=False)
        inner = inner if gates is None else inner * gates[index]
        projected = _dense(params, f"{at}.output.dense", inner)
        hidden = _norm(config, params, f"{at}.output.LayerNorm", projected + hidden)
        outputs.append(hidden)
        units.append(inner)
    return outputs, units


def logits(params: Params, hidden: Array) -> Array:
    """Return float32 [batch, classes] from the last layer's output at the first token."""
    pooled = jnp.tanh(_dense(params, "pooler.dense", hidden[:, 0]))
    return _dense(params, "classifier", pooled)


def _dense(params: Params, module: str, value: Array) -> Array:
    return value @ params[f"{module}.weight"].T + params[f"{module}.bias"]


def _norm(config: BertConfig, params: Params, module: str, value: Array) -> Array:
    centred = value - value.mean(-1, keepdims=True)
    scaled = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + config.eps)
    return scaled * params[f"{module}.weight"] + params[f"{module}.bias"]


def _embeddings(config: BertConfig, params: Params, ids: Array) -> Array:
    tables = [params[f"embeddings.{kind}_embeddings.weight"] for kind in _TABLES]
    total = tables[0][ids] + tables[1][: ids.shape[1]] + tables[2][0]
    return _norm(config, params, "embeddings.LayerNorm", total)


_TABLES = ("word", "position", "token_type")


def _attention(config: BertConfig, params: Params, at: str, hidden: Array, bias: Array) -> Array:
    depth = config.hidden // config.heads
    query, key, value = (
        _dense(params, f"{at}.{part}", hidden).reshape(*hidden.shape[:2], config.heads, depth)
        for part in ("query", "key", "value")
    )
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / depth**0.5
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores + bias, axis=-1), value)
    return mixed.reshape(hidden.shape)
