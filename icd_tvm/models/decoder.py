"""Llama-style decoders as ONNX graphs: the whole prompt at once, or one token and its KV cache.

Both graphs use standard operators only. RMSNorm, rotary positions and SwiGLU are decomposed and
the KV heads are widened by Expand and Reshape, as framework exports do it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from icd_tvm.errors import ConfigError, ShapeError
from icd_tvm.models.onnx_writer import GraphWriter, tensor_info
from icd_tvm.models.weights import (
    Float32,
    RandomWeights,
    Weights,
    check_weights,
    normal,
    origin,
    require_sizes,
)

# Added to the score of a token that must not be seen.
LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a Llama-style decoder; the defaults are SmolLM2-135M's.

    Attributes
    ----------
    layers, hidden, heads, kv_heads, ffn : int
        Layers, model width, query heads, key/value heads, width of the feed-forward layer.
    vocab, max_position : int
        Rows of the embedding table (tied to the output) and of the rotary tables.
    theta : float
        Base of the rotary frequencies.
    eps : float
        Epsilon of the RMS norms.
    """

    layers: int = 30
    hidden: int = 576
    heads: int = 9
    kv_heads: int = 3
    ffn: int = 1536
    vocab: int = 49152
    max_position: int = 8192
    theta: float = 1e5
    eps: float = 1e-5

    def __post_init__(self) -> None:
        whole = {name: size for name, size in vars(self).items() if name not in ("theta", "eps")}
        require_sizes("a decoder", whole)
        if self.hidden % (2 * self.heads):
            raise ConfigError(
                f"hidden {self.hidden} is not a multiple of 2 * heads ({self.heads})",
                "a head is rotated by halves",
            )
        if self.heads % self.kv_heads:
            raise ConfigError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")

    @property
    def depth(self) -> int:
        """Channels of a head."""
        return self.hidden // self.heads


SMOLLM2 = DecoderConfig()
DECODER_MINI = DecoderConfig(
    layers=2, hidden=48, heads=6, kv_heads=2, ffn=80, vocab=100, max_position=64
)


def decoder_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return every weight's name and shape, dense weights as ``[out, in]``.

    Names are those of the Hugging Face checkpoint of the same architecture.
    """
    hidden, kv = config.hidden, config.kv_heads * config.depth
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab, hidden)}
    for index in range(config.layers):
        layer = f"model.layers.{index}"
        parts = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (config.ffn, hidden),
            "mlp.up_proj": (config.ffn, hidden),
            "mlp.down_proj": (hidden, config.ffn),
        }
        shapes.update({f"{layer}.{part}.weight": shape for part, shape in parts.items()})
    shapes["model.norm.weight"] = (hidden,)
    return shapes


def random_decoder_weights(config: DecoderConfig, seed: int = 0) -> RandomWeights:
    """Return fresh weights: normal with deviation 1/sqrt(in), norms near 1."""
    return RandomWeights(decoder_shapes(config), _fresh, seed)


def _fresh(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Float32:
    if len(shape) == 1:
        return normal(rng, shape, 0.1, mean=1.0)
    return normal(rng, shape, shape[1] ** -0.5)


def rotary_tables(config: DecoderConfig, positions: NDArray[np.integer]) -> tuple[Float32, Float32]:
    """Return cosines and sines, each [positions, depth]; both halves of a head are alike.

    Notes
    -----
    Su et al., "RoFormer", 2021.
    """
    exponent = np.arange(0, config.depth, 2) / config.depth
    angle = np.outer(positions, config.theta**-exponent)
    angle = np.concatenate([angle, angle], axis=1)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def build_decoder(
    config: DecoderConfig,
    weights: Weights,
    seq: int = 128,
    *,
    cache: bool = False,
    trained: bool = False,
    name: str = "decoder",
) -> onnx.ModelProto:
    """Build the graph that reads a whole prompt.

    Parameters
    ----------
    config : DecoderConfig
    weights : mapping of str to ndarray of float32
        Names and shapes of `decoder_shapes`; further entries are ignored.
    seq : int
        Tokens, at most ``max_position``.
    cache : bool
        Also return every layer's rotated keys and values.
    trained : bool
        Recorded as ``weights: trained`` or ``weights: random`` in the model's metadata.
    name : str
        Name of the graph.

    Returns
    -------
    onnx.ModelProto
        Opset 17. Input ``input_ids``, int64 ``[1, seq]``; output ``logits``, float32
        ``[1, seq, vocab]``, and with ``cache`` ``present_key_i`` and ``present_value_i``,
        ``[1, kv_heads, seq, depth]``.

    Raises
    ------
    ShapeError
        A weight is missing or has the wrong shape, or seq is outside 1..max_position.
    """
    _check_length(config, seq, "seq")
    check_weights(decoder_shapes(config), weights)
    graph = _Prefill(config, GraphWriter(weights), seq)
    return graph.build(name, origin(weights, trained), cache)


def build_decoder_step(
    config: DecoderConfig,
    weights: Weights,
    capacity: int = 128,
    *,
    trained: bool = False,
    name: str = "decoder-step",
) -> onnx.ModelProto:
    """Build the graph that reads one token and extends a KV cache of fixed capacity.

    Parameters
    ----------
    config, weights, trained, name
        See `build_decoder`.
    capacity : int
        Slots of the cache, at most ``max_position``.

    Returns
    -------
    onnx.ModelProto
        Opset 17. Inputs: ``input_ids`` and ``position_ids``, int64 ``[1, 1]``;
        ``cache_length``, int64 ``[1]``, the number of filled slots; and per layer
        ``past_key_i`` and ``past_value_i``, float32 ``[1, kv_heads, capacity, depth]``.
        Outputs: ``logits`` ``[1, 1, vocab]``, ``present_key_i`` and ``present_value_i`` of the
        same shape as the past, with the token in slot ``cache_length``. The position is apart
        from the slot, so that a compacted cache can be continued. A full cache
        (``cache_length == capacity``) drops the token: the caller must not ask for it.

    Raises
    ------
    ShapeError
        A weight is missing or has the wrong shape, or capacity is outside 1..max_position.
    """
    _check_length(config, capacity, "capacity")
    check_weights(decoder_shapes(config), weights)
    graph = _Step(config, GraphWriter(weights), capacity)
    return graph.build(name, origin(weights, trained))


def cache_states(config: DecoderConfig) -> tuple[tuple[str, str], ...]:
    """Return the (input, output) names of the step's states, keys and values of every layer."""
    return tuple(
        (f"past_{part}_{index}", f"present_{part}_{index}")
        for index in range(config.layers)
        for part in ("key", "value")
    )


def _check_length(config: DecoderConfig, length: int, what: str) -> None:
    if not isinstance(length, int) or not 1 <= length <= config.max_position:
        raise ShapeError(f"{what} {length!r} is outside 1..{config.max_position}")


class _Layers:
    """What both graphs share; a subclass says how a token attends."""

    def __init__(self, config: DecoderConfig, graph: GraphWriter, tokens: int) -> None:
        self.config = config
        self.graph = graph
        self.tokens = tokens
        self.cache: list[onnx.ValueInfoProto] = []

    def attend_to(self, index: int, key: str, value: str) -> tuple[str, str]:
        """Return the keys and values that layer ``index`` attends to."""
        raise NotImplementedError

    def run(self, cos: str, sin: str, mask: str) -> str:
        """Embed, run all layers, and return the name of the logits."""
        table = self.graph.weight("model.embed_tokens.weight")
        hidden = self.graph.node("Gather", "/embed_tokens/Gather", table, "input_ids", axis=0)
        for index in range(self.config.layers):
            hidden = self.layer(index, hidden, (cos, sin), mask)
        hidden = self.graph.rms_norm("/norm", "model.norm", hidden, self.config.eps)
        return self.graph.tied_logits("model.embed_tokens.weight", hidden)

    def layer(self, index: int, hidden: str, rotary: tuple[str, str], mask: str) -> str:
        """Attention and SwiGLU, each with a norm before and the residual after."""
        graph, eps = self.graph, self.config.eps
        path, module = f"/layers.{index}", f"model.layers.{index}"
        inner = graph.rms_norm(f"{path}/input_layernorm", f"{module}.input_layernorm", hidden, eps)
        inner = self.attention(index, inner, rotary, mask)
        hidden = graph.node("Add", f"{path}/Add", hidden, inner)
        norm = "post_attention_layernorm"
        inner = graph.rms_norm(f"{path}/{norm}", f"{module}.{norm}", hidden, eps)
        inner = self.swiglu(f"{path}/mlp", f"{module}.mlp", inner)
        return graph.node("Add", f"{path}/Add_1", hidden, inner)

    def swiglu(self, path: str, module: str, value: str) -> str:
        """``(silu(x G) * (x U)) D`` (Shazeer, "GLU variants improve transformer", 2020)."""
        gate = self.graph.dense(f"{path}/gate_proj", f"{module}.gate_proj", value)
        gate = self.graph.silu(f"{path}/act_fn", gate)
        up = self.graph.dense(f"{path}/up_proj", f"{module}.up_proj", value)
        product = self.graph.node("Mul", f"{path}/Mul", gate, up)
        return self.graph.dense(f"{path}/down_proj", f"{module}.down_proj", product)

    def attention(self, index: int, hidden: str, rotary: tuple[str, str], mask: str) -> str:
        """Grouped-query attention with its output projection."""
        graph, config = self.graph, self.config
        path, module = f"/layers.{index}/self_attn", f"model.layers.{index}.self_attn"
        query = self.heads(f"{path}/q_proj", f"{module}.q_proj", hidden, config.heads)
        key = self.heads(f"{path}/k_proj", f"{module}.k_proj", hidden, config.kv_heads)
        value = self.heads(f"{path}/v_proj", f"{module}.v_proj", hidden, config.kv_heads)
        query = self.rotate(f"{path}/q_rope", query, *rotary)
        key = self.rotate(f"{path}/k_rope", key, *rotary)
        key, value = self.attend_to(index, key, value)
        key = self.widen(f"{path}/k_wide", key)
        value = self.widen(f"{path}/v_wide", value)
        turned = graph.node("Transpose", f"{path}/Transpose", key, perm=[0, 1, 3, 2])
        scores = graph.node("MatMul", f"{path}/MatMul", query, turned)
        scale = graph.constant("/attention/scale", 1 / np.sqrt(config.depth))
        scores = graph.node("Mul", f"{path}/Mul", scores, scale)
        scores = graph.node("Add", f"{path}/Add", scores, mask)
        probs = graph.node("Softmax", f"{path}/Softmax", scores, axis=-1)
        mixed = graph.node("MatMul", f"{path}/MatMul_1", probs, value)
        mixed = graph.node("Transpose", f"{path}/Transpose_1", mixed, perm=[0, 2, 1, 3])
        flat = graph.constant("/attention/merge_shape", [0, 0, config.hidden], np.int64)
        mixed = graph.node("Reshape", f"{path}/Reshape", mixed, flat)
        return graph.dense(f"{path}/o_proj", f"{module}.o_proj", mixed)

    def heads(self, path: str, module: str, hidden: str, heads: int) -> str:
        """Project and split: [1, heads, tokens, depth]."""
        value = self.graph.dense(path, module, hidden)
        shape = self.graph.constant(
            f"/attention/split_{heads}", [0, 0, heads, self.config.depth], np.int64
        )
        value = self.graph.node("Reshape", f"{path}/Reshape", value, shape)
        return self.graph.node("Transpose", f"{path}/Transpose", value, perm=[0, 2, 1, 3])

    def rotate(self, path: str, value: str, cos: str, sin: str) -> str:
        """``x * cos + (-second half, first half) * sin``."""
        graph, half = self.graph, self.config.depth // 2
        zero = graph.constant("/rope/zero", [0], np.int64)
        middle = graph.constant("/rope/half", [half], np.int64)
        end = graph.constant("/rope/depth", [2 * half], np.int64)
        axis = graph.constant("/rope/axis", [3], np.int64)
        first = graph.node("Slice", f"{path}/Slice", value, zero, middle, axis)
        second = graph.node("Slice", f"{path}/Slice_1", value, middle, end, axis)
        second = graph.node("Neg", f"{path}/Neg", second)
        turned = graph.node("Concat", f"{path}/Concat", second, first, axis=3)
        straight = graph.node("Mul", f"{path}/Mul", value, cos)
        turned = graph.node("Mul", f"{path}/Mul_1", turned, sin)
        return graph.node("Add", f"{path}/Add", straight, turned)

    def widen(self, path: str, value: str) -> str:
        """Repeat every KV head for the query heads that share it."""
        config, graph = self.config, self.graph
        share = config.heads // config.kv_heads
        if share == 1:
            return value
        axis = graph.constant("/attention/share_axis", [2], np.int64)
        sizes = [1, config.kv_heads, share, self.tokens, config.depth]
        wide = graph.constant("/attention/wide_shape", sizes, np.int64)
        flat = graph.constant(
            "/attention/heads_shape", [1, config.heads, self.tokens, config.depth], np.int64
        )
        value = graph.node("Unsqueeze", f"{path}/Unsqueeze", value, axis)
        value = graph.node("Expand", f"{path}/Expand", value, wide)
        return graph.node("Reshape", f"{path}/Reshape", value, flat)

    def state(self, index: int, part: str, value: str) -> str:
        """Make a value the graph output ``present_part_index``."""
        shape = (1, self.config.kv_heads, self.tokens, self.config.depth)
        name = f"present_{part}_{index}"
        self.cache.append(tensor_info(name, shape))
        return self.graph.rename(value, name)


class _Prefill(_Layers):
    with_cache = False

    def attend_to(self, index: int, key: str, value: str) -> tuple[str, str]:
        if not self.with_cache:
            return key, value
        return self.state(index, "key", key), self.state(index, "value", value)

    def build(self, name: str, source: dict[str, str], cache: bool) -> onnx.ModelProto:
        self.with_cache = cache
        cos, sin = rotary_tables(self.config, np.arange(self.tokens))
        future = np.triu(np.full((self.tokens, self.tokens), LOWEST, np.float32), 1)
        logits = self.run(
            self.graph.store("/rope/cos", cos),
            self.graph.store("/rope/sin", sin),
            self.graph.store("/attention/future", future),
        )
        self.graph.rename(logits, "logits")
        inputs = [tensor_info("input_ids", (1, self.tokens), ids=True)]
        outputs = [tensor_info("logits", (1, self.tokens, self.config.vocab)), *self.cache]
        return self.graph.finish(name, inputs, outputs, source)


class _Step(_Layers):
    is_new = ""

    def attend_to(self, index: int, key: str, value: str) -> tuple[str, str]:
        path = f"/layers.{index}/cache"
        key = self.graph.node("Where", f"{path}/key", self.is_new, key, f"past_key_{index}")
        value = self.graph.node("Where", f"{path}/value", self.is_new, value, f"past_value_{index}")
        return self.state(index, "key", key), self.state(index, "value", value)

    def build(self, name: str, source: dict[str, str]) -> onnx.ModelProto:
        config, graph = self.config, self.graph
        tables = rotary_tables(config, np.arange(config.max_position))
        cos, sin = (
            graph.node(
                "Gather", f"/rope/{part}", graph.store(f"/rope/{part}_table", table),
                "position_ids", axis=0,
            )
            for part, table in zip(("cos", "sin"), tables, strict=True)
        )  # fmt: skip
        logits = self.run(cos, sin, self.masks())
        graph.rename(logits, "logits")
        shape = (1, config.kv_heads, self.tokens, config.depth)
        inputs = [
            tensor_info("input_ids", (1, 1), ids=True),
            tensor_info("position_ids", (1, 1), ids=True),
            tensor_info("cache_length", (1,), ids=True),
            *(tensor_info(past, shape) for past, _ in cache_states(config)),
        ]
        outputs = [tensor_info("logits", (1, 1, config.vocab)), *self.cache]
        return graph.finish(name, inputs, outputs, source)

    def masks(self) -> str:
        """Set the mark of the new token's slot, and return the mask of the empty slots."""
        graph = self.graph
        slots = graph.constant("/cache/slots", np.arange(self.tokens), np.int64)
        column = graph.constant("/cache/column", [self.tokens, 1], np.int64)
        new = graph.node("Equal", "/cache/Equal", slots, "cache_length")
        self.is_new = graph.node("Reshape", "/cache/Reshape", new, column)
        empty = graph.node("Greater", "/cache/Greater", slots, "cache_length")
        lowest, zero = graph.constant("/cache/lowest", LOWEST), graph.constant("/cache/zero", 0.0)
        return graph.node("Where", "/cache/Where", empty, lowest, zero)
