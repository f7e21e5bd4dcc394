"""BERT encoders of any size as ONNX graphs, shaped like a framework's export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto

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

Size = int | str


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT encoder; the defaults are MiniLM-L6's.

    Attributes
    ----------
    layers, hidden, heads, ffn : int
        Encoder layers, model width, attention heads, width of the feed-forward layer.
    vocab, max_position, type_vocab : int
        Rows of the three embedding tables.
    eps : float
        Epsilon of the layer norms.
    """

    layers: int = 6
    hidden: int = 384
    heads: int = 12
    ffn: int = 1536
    vocab: int = 30522
    max_position: int = 512
    type_vocab: int = 2
    eps: float = 1e-12

    def __post_init__(self) -> None:
        require_sizes("a BERT", {name: n for name, n in vars(self).items() if name != "eps"})
        if self.hidden % self.heads:
            raise ConfigError(f"hidden {self.hidden} is not a multiple of heads {self.heads}")


MINILM = BertConfig()
BERT_BASE = BertConfig(layers=12, hidden=768, heads=12, ffn=3072)
BERT_LARGE = BertConfig(layers=24, hidden=1024, heads=16, ffn=4096)
BERT_MINI = BertConfig(layers=2, hidden=64, heads=4, ffn=256, vocab=100, max_position=64)


def weight_shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """Return every weight's name and shape, dense weights as ``[out, in]``.

    Names are those of the Hugging Face checkpoint of the same architecture.
    """
    hidden, ffn = config.hidden, config.ffn
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config.vocab, hidden),
        "embeddings.position_embeddings.weight": (config.max_position, hidden),
        "embeddings.token_type_embeddings.weight": (config.type_vocab, hidden),
    }
    norms = ["embeddings.LayerNorm"]
    for index in range(config.layers):
        layer = f"encoder.layer.{index}"
        dense = {f"attention.self.{part}": (hidden, hidden) for part in ("query", "key", "value")}
        dense["attention.output.dense"] = (hidden, hidden)
        dense["intermediate.dense"] = (ffn, hidden)
        dense["output.dense"] = (hidden, ffn)
        for name, shape in dense.items():
            shapes[f"{layer}.{name}.weight"] = shape
            shapes[f"{layer}.{name}.bias"] = shape[:1]
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    for norm in norms:
        shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (hidden,)
    return shapes


def random_bert_weights(config: BertConfig, seed: int = 0) -> RandomWeights:
    """Return weights as a fresh BERT is initialised: normal with deviation 0.02, norms at 1."""
    return RandomWeights(weight_shapes(config), _fresh, seed)


def _fresh(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Float32:
    return normal(rng, shape, 0.02, mean=1.0 if name.endswith("LayerNorm.weight") else 0.0)


def build_bert(
    config: BertConfig,
    weights: Weights,
    seq: Size = 128,
    batch: Size = 1,
    *,
    trained: bool = False,
    name: str = "bert",
    pooled: bool = False,
) -> onnx.ModelProto:
    """Build a BERT encoder.

    Parameters
    ----------
    config : BertConfig
    weights : mapping of str to ndarray of float32
        Names and shapes of `weight_shapes`; further entries are ignored.
    seq, batch : int or str
        Sequence length and batch size; a string makes the dimension symbolic.
    trained : bool
        Recorded as ``weights: trained`` or ``weights: random`` in the model's metadata.
    name : str
        Name of the graph.
    pooled : bool
        Return the mean of the tokens that ``attention_mask`` marks: ``sentence_embedding``
        ``[batch, hidden]`` in place of the output below.

    Returns
    -------
    onnx.ModelProto
        Opset 17. Inputs ``input_ids``, ``attention_mask`` and ``token_type_ids``, int64
        ``[batch, seq]``; output ``last_hidden_state``, float32 ``[batch, seq, hidden]``.
        Dense weights are stored as ``[in, out]``.

    Raises
    ------
    ShapeError
        A weight is missing or has the wrong shape, or seq is outside 1..max_position.
    ConfigError
        The batch size is below 1.
    """
    graph, hidden = encode_graph(config, weights, seq, batch)
    source = origin(weights, trained)
    if pooled:
        last, shape = graph.pool(hidden), (batch, config.hidden)
        return graph.model((batch, seq), name, source, last, "sentence_embedding", shape)
    rows = (batch, seq, config.hidden)
    return graph.model((batch, seq), name, source, hidden, "last_hidden_state", rows)


def encode_graph(
    config: BertConfig, weights: Weights, seq: Size, batch: Size
) -> tuple[BertGraph, str]:
    """Return the graph of an encoder without its end, and the name of its last layer's output.

    Raises
    ------
    ShapeError, ConfigError
        See `build_bert`.
    """
    if isinstance(seq, int) and not 1 <= seq <= config.max_position:
        raise ShapeError(f"seq {seq} is outside 1..{config.max_position}")
    if isinstance(batch, int) and batch < 1:
        raise ConfigError(f"batch {batch} is below 1")
    check_weights(weight_shapes(config), weights)
    graph = BertGraph(config, weights)
    hidden = graph.embeddings(seq)
    mask = graph.attention_bias()
    for index in range(config.layers):
        hidden = graph.layer(index, hidden, mask)
    return graph, hidden


class BertGraph(GraphWriter):
    """Collects an encoder's nodes; the methods but `model` return the name of a value."""

    def __init__(self, config: BertConfig, weights: Weights) -> None:
        super().__init__(weights)
        self.config = config

    def model(
        self,
        shape: tuple[Size, Size],
        name: str,
        source: Mapping[str, str],
        last: str,
        output_name: str,
        output_shape: tuple[Size, ...],
    ) -> onnx.ModelProto:
        """Return the model that returns ``last``; ``shape`` is that of the inputs."""
        inputs = [
            tensor_info(label, shape, ids=True)
            for label in ("input_ids", "attention_mask", "token_type_ids")
        ]
        output = tensor_info(self.rename(last, output_name), output_shape)
        return self.finish(name, inputs, [output], source)

    def norm(self, path: str, module: str, value: str) -> str:
        """Layer norm over the hidden axis."""
        scale, bias = self.weight(f"{module}.weight"), self.weight(f"{module}.bias")
        path = f"{path}/LayerNormalization"
        return self.node(
            "LayerNormalization", path, value, scale, bias, axis=-1, epsilon=self.config.eps
        )

    def embeddings(self, seq: Size) -> str:
        """Sum of word, token type and position embeddings, normalised: [batch, seq, hidden]."""
        tables = {
            "word_embeddings": "input_ids",
            "token_type_embeddings": "token_type_ids",
            "position_embeddings": self.positions(seq),
        }
        parts = [
            self.node(
                "Gather", f"/embeddings/{table}/Gather",
                self.weight(f"embeddings.{table}.weight"), ids, axis=0,
            )
            for table, ids in tables.items()
        ]  # fmt: skip
        total = self.node("Add", "/embeddings/Add", parts[0], parts[1])
        total = self.node("Add", "/embeddings/Add_1", total, parts[2])
        return self.norm("/embeddings/LayerNorm", "embeddings.LayerNorm", total)

    def positions(self, seq: Size) -> str:
        """Position ids [1, seq]; cut from the full row at run time when seq is symbolic."""
        if isinstance(seq, int):
            return self.constant("embeddings.position_ids", [list(range(seq))], np.int64)
        row = [list(range(self.config.max_position))]
        row_name = self.constant("embeddings.position_ids", row, np.int64)
        zero = self.constant("/embeddings/starts", [0], np.int64)
        one = self.constant("/embeddings/axis", [1], np.int64)
        which = self.constant("/embeddings/which", 1, np.int64)
        shape = self.node("Shape", "/embeddings/Shape", "input_ids")
        length = self.node("Gather", "/embeddings/Gather", shape, which, axis=0)
        ends = self.node("Unsqueeze", "/embeddings/Unsqueeze", length, zero)
        return self.node("Slice", "/embeddings/Slice", row_name, zero, ends, one)

    def attention_bias(self) -> str:
        """``(1 - mask) * lowest``: [batch, 1, 1, seq]."""
        axes = self.constant("/mask/axes", [1, 2], np.int64)
        wide = self.node("Unsqueeze", "/Unsqueeze", "attention_mask", axes)
        kept = self.node("Cast", "/Cast", wide, to=TensorProto.FLOAT)
        dropped = self.node("Sub", "/Sub", self.constant("/mask/one", 1.0), kept)
        lowest = self.constant("/mask/lowest", np.finfo(np.float32).min)
        return self.node("Mul", "/Mul", dropped, lowest)

    def layer(self, index: int, hidden: str, mask: str) -> str:
        """One encoder layer."""
        path, module = f"/encoder/layer.{index}", f"encoder.layer.{index}"
        context = self.attention(f"{path}/attention/self", f"{module}.attention.self", hidden, mask)
        attended = self.residual(
            f"{path}/attention/output", f"{module}.attention.output", context, hidden
        )
        inner = self.dense(
            f"{path}/intermediate/dense", f"{module}.intermediate.dense", attended, bias=True
        )
        active = self.gelu(f"{path}/intermediate/intermediate_act_fn", inner)
        return self.residual(f"{path}/output", f"{module}.output", active, attended)

    def attention(self, path: str, module: str, hidden: str, mask: str) -> str:
        """Multi-head self-attention before its output projection."""
        depth = self.config.hidden // self.config.heads
        query = self.heads(f"{path}/query", f"{module}.query", hidden, [0, 2, 1, 3])
        key = self.heads(f"{path}/key", f"{module}.key", hidden, [0, 2, 3, 1])
        value = self.heads(f"{path}/value", f"{module}.value", hidden, [0, 2, 1, 3])
        scores = self.node("MatMul", f"{path}/MatMul", query, key)
        root = self.constant("/attention/root_depth", np.sqrt(depth))
        scores = self.node("Div", f"{path}/Div", scores, root)
        scores = self.node("Add", f"{path}/Add", scores, mask)
        probs = self.node("Softmax", f"{path}/Softmax", scores, axis=-1)
        context = self.node("MatMul", f"{path}/MatMul_1", probs, value)
        context = self.node("Transpose", f"{path}/Transpose", context, perm=[0, 2, 1, 3])
        flat = self.constant("/attention/merge_shape", [0, 0, self.config.hidden], np.int64)
        return self.node("Reshape", f"{path}/Reshape", context, flat)

    def heads(self, path: str, module: str, hidden: str, perm: list[int]) -> str:
        """Project, split into heads and transpose."""
        heads, depth = self.config.heads, self.config.hidden // self.config.heads
        split = self.constant("/attention/split_shape", [0, 0, heads, depth], np.int64)
        value = self.dense(path, module, hidden, bias=True)
        value = self.node("Reshape", f"{path}/Reshape", value, split)
        return self.node("Transpose", f"{path}/Transpose", value, perm=perm)

    def gelu(self, path: str, value: str) -> str:
        """``x * (1 + erf(x / sqrt 2)) / 2``."""
        scaled = self.node("Div", f"{path}/Div", value, self.constant("/gelu/root2", np.sqrt(2.0)))
        erf = self.node("Erf", f"{path}/Erf", scaled)
        shifted = self.node("Add", f"{path}/Add", erf, self.constant("/gelu/one", 1.0))
        product = self.node("Mul", f"{path}/Mul", value, shifted)
        return self.node("Mul", f"{path}/Mul_1", product, self.constant("/gelu/half", 0.5))

    def residual(self, path: str, module: str, value: str, skip: str) -> str:
        """Dense, add the skip path, normalise."""
        value = self.dense(f"{path}/dense", f"{module}.dense", value, bias=True)
        value = self.node("Add", f"{path}/Add", value, skip)
        return self.norm(f"{path}/LayerNorm", f"{module}.LayerNorm", value)

    def pool(self, hidden: str) -> str:
        """Mean over the tokens of the mask: [batch, hidden]."""
        mask = self.node("Cast", "/pool/Cast", "attention_mask", to=TensorProto.FLOAT)
        last = self.constant("/pool/last", [-1], np.int64)
        tokens = self.constant("/pool/tokens", [1], np.int64)
        weight = self.node("Unsqueeze", "/pool/Unsqueeze", mask, last)
        seen = self.node("Mul", "/pool/Mul", hidden, weight)
        total = self.node("ReduceSum", "/pool/ReduceSum", seen, tokens, keepdims=0)
        count = self.node("ReduceSum", "/pool/ReduceSum_1", weight, tokens, keepdims=0)
        # A sequence of padding alone must not divide by zero.
        count = self.node("Max", "/pool/Max", count, self.constant("/pool/least", 1e-9))
        return self.node("Div", "/pool/Div", total, count)
