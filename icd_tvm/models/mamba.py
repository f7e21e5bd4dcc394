"""Mamba language models as ONNX graphs in standard operators: one token with its states.

A whole chunk of tokens is `icd_tvm.models.mamba_prefill`.

Notes
-----
Gu & Dao, "Mamba: linear-time sequence modeling with selective state spaces", 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from icd_tvm.models.onnx_writer import GraphWriter, tensor_info
from icd_tvm.models.weights import (
    Float32,
    RandomWeights,
    Weights,
    check_proto_size,
    check_weights,
    normal,
    origin,
    require_sizes,
)

# Steps that a fresh model takes: the range of dt that its authors draw from.
DT_RANGE = (1e-3, 1e-1)


@dataclass(frozen=True)
class MambaConfig:
    """Sizes of a Mamba language model; the defaults are those of mamba-130m.

    Attributes
    ----------
    layers, hidden : int
        Blocks, and width of the residual stream (d_model).
    vocab : int
        Rows of the embedding table (padded to a multiple of 8; tied to the output).
    state, conv, expand : int
        d_state, length of the causal convolution, and d_inner over d_model.
    dt_rank : int
        Rank of the step projection; 0 means d_model / 16, rounded up.
    eps : float
        Epsilon of the RMS norms.
    """

    layers: int = 24
    hidden: int = 768
    vocab: int = 50280
    state: int = 16
    conv: int = 4
    expand: int = 2
    dt_rank: int = 0
    eps: float = 1e-5

    def __post_init__(self) -> None:
        sizes = ("layers", "hidden", "vocab", "state", "expand")
        require_sizes("a Mamba", {name: getattr(self, name) for name in sizes})
        require_sizes("a Mamba", {"conv": self.conv}, least=2)
        require_sizes("a Mamba", {"dt_rank": self.dt_rank}, least=0)

    @property
    def inner(self) -> int:
        """Channels inside a block (d_inner)."""
        return self.expand * self.hidden

    @property
    def rank(self) -> int:
        """Rank of the step projection."""
        return self.dt_rank or -(-self.hidden // 16)


MAMBA_130M = MambaConfig()
MAMBA_370M = MambaConfig(layers=48, hidden=1024)
MAMBA_790M = MambaConfig(layers=48, hidden=1536)
MAMBA_1_4B = MambaConfig(layers=48, hidden=2048)
MAMBA_2_8B = MambaConfig(layers=64, hidden=2560)
MAMBA_MINI = MambaConfig(layers=2, hidden=24, vocab=96, state=5, dt_rank=3)


def mamba_shapes(config: MambaConfig) -> dict[str, tuple[int, ...]]:
    """Return every weight's name and shape, dense weights as ``[out, in]``.

    Names are those of the state-spaces checkpoints.
    """
    hidden, inner, rank, state = config.hidden, config.inner, config.rank, config.state
    shapes: dict[str, tuple[int, ...]] = {"backbone.embedding.weight": (config.vocab, hidden)}
    for index in range(config.layers):
        layer = f"backbone.layers.{index}"
        parts = {
            "norm.weight": (hidden,),
            "mixer.in_proj.weight": (2 * inner, hidden),
            "mixer.conv1d.weight": (inner, 1, config.conv),
            "mixer.conv1d.bias": (inner,),
            "mixer.x_proj.weight": (rank + 2 * state, inner),
            "mixer.dt_proj.weight": (inner, rank),
            "mixer.dt_proj.bias": (inner,),
            "mixer.A_log": (inner, state),
            "mixer.D": (inner,),
            "mixer.out_proj.weight": (hidden, inner),
        }
        shapes.update({f"{layer}.{part}": shape for part, shape in parts.items()})
    shapes["backbone.norm_f.weight"] = (hidden,)
    return shapes


def random_mamba_weights(config: MambaConfig, seed: int = 0) -> RandomWeights:
    """Return weights as a fresh Mamba has them; projections are normal with 1/sqrt(in)."""
    return RandomWeights(mamba_shapes(config), _fresh, seed)


def _fresh(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Float32:
    if name.endswith("A_log"):
        ladder = np.log(np.arange(1, shape[1] + 1, dtype=np.float32))
        return np.broadcast_to(ladder, shape)
    if name.endswith("dt_proj.bias"):
        low, high = np.log(DT_RANGE)
        step = np.exp(rng.uniform(low, high, shape))
        return np.log(np.expm1(step)).astype(np.float32)  # the inverse of softplus
    if name.endswith(("norm.weight", "norm_f.weight", ".D")):
        return normal(rng, shape, 0.1, mean=1.0)
    return normal(rng, shape, shape[-1] ** -0.5)


def mamba_states(config: MambaConfig) -> tuple[tuple[str, str], ...]:
    """Return the (input, output) names of the step's states, two a layer."""
    return tuple(
        (f"{part}_{index}", f"{part}_{index}_new")
        for index in range(config.layers)
        for part in ("conv", "ssm")
    )


def build_mamba_step(
    config: MambaConfig,
    weights: Weights,
    *,
    data: str | Path | None = None,
    trained: bool = False,
    name: str = "mamba-step",
) -> onnx.ModelProto:
    """Build the graph that reads one token.

    Parameters
    ----------
    config : MambaConfig
    weights : mapping of str to ndarray of float32
        Names and shapes of `mamba_shapes`; further entries are ignored.
    data : str or Path, optional
        File that takes the weights, replaced if it exists; save the model into the same folder
        and read it from there. Needed above 2 GB.
    trained : bool
        Recorded as ``weights: trained`` or ``weights: random`` in the model's metadata.
    name : str
        Name of the graph.

    Returns
    -------
    onnx.ModelProto
        Opset 17. Inputs: ``input_ids``, int64 ``[1]``, and per layer the float32 states
        ``conv_i`` ``[1, d_inner, conv]`` (the last inputs, oldest first) and ``ssm_i``
        ``[1, d_inner, d_state]``, both zero at the beginning. Outputs: ``logits``
        ``[1, vocab]``, ``conv_i_new`` and ``ssm_i_new``.

    Raises
    ------
    ShapeError
        A weight is missing or has the wrong shape.
    ConfigError
        More than 2 GB of weights and no data file.
    OutputError
        The data file cannot be written.
    """
    return MambaGraph(config, weights, data).build(name, trained)


class MambaGraph:
    """Blocks over [tokens, d_model]; a subclass says how many tokens, and how they mix.

    Parameters
    ----------
    config, weights, data
        See `build_mamba_step`, which also names the errors.
    """

    tokens = 1

    def __init__(self, config: MambaConfig, weights: Weights, data: str | Path | None) -> None:
        shapes, target = mamba_shapes(config), None if data is None else Path(data)
        check_weights(shapes, weights)
        check_proto_size(shapes, target, "pass data=FILE for the weights, or build fewer layers")
        self.config = config
        self.graph = GraphWriter(weights, target)

    def build(self, name: str, trained: bool) -> onnx.ModelProto:
        """Return the model."""
        config, graph = self.config, self.graph
        table = graph.weight("backbone.embedding.weight")
        hidden = graph.node("Gather", "/embedding/Gather", table, "input_ids", axis=0)
        for index in range(config.layers):
            path, module = f"/layers.{index}", f"backbone.layers.{index}"
            inner = graph.rms_norm(f"{path}/norm", f"{module}.norm", hidden, config.eps)
            inner = self.mixer(index, f"{path}/mixer", f"{module}.mixer", inner)
            hidden = graph.node("Add", f"{path}/Add", hidden, inner)
        hidden = graph.rms_norm("/norm_f", "backbone.norm_f", hidden, config.eps)
        graph.rename(graph.tied_logits("backbone.embedding.weight", hidden), "logits")
        shapes = {"conv": (1, config.inner, config.conv), "ssm": (1, config.inner, config.state)}
        states = mamba_states(config)
        inputs = [tensor_info("input_ids", (self.tokens,), ids=True)]
        inputs += [tensor_info(old, shapes[old.split("_")[0]]) for old, _ in states]
        outputs = [tensor_info("logits", (self.tokens, config.vocab))]
        outputs += [tensor_info(new, shapes[new.split("_")[0]]) for _, new in states]
        return graph.finish(name, inputs, outputs, origin(graph.weights, trained))

    def mixer(self, index: int, path: str, module: str, hidden: str) -> str:
        """Convolution, selective scan and gate: [tokens, d_model] to [tokens, d_model]."""
        graph, inner = self.graph, self.config.inner
        both = graph.dense(f"{path}/in_proj", f"{module}.in_proj", hidden)
        value, gate = graph.split(f"{path}/Split", both, [inner, inner], 1)
        value = self.convolve(index, path, module, value)
        mixed = self.scan(index, path, module, value)
        direct = graph.node("Mul", f"{path}/Mul", value, graph.weight(f"{module}.D"))
        mixed = graph.node("Add", f"{path}/Add", mixed, direct)
        gate = graph.silu(f"{path}/gate", gate)
        mixed = graph.node("Mul", f"{path}/Mul_1", mixed, gate)
        return graph.dense(f"{path}/out_proj", f"{module}.out_proj", mixed)

    def selection(self, path: str, module: str, value: str) -> tuple[str, str, str, str]:
        """Return dt [tokens, d_inner], B and C [tokens, d_state], and A [d_inner, d_state]."""
        graph, config = self.graph, self.config
        mixed = graph.dense(f"{path}/x_proj", f"{module}.x_proj", value)
        sizes = [config.rank, config.state, config.state]
        step, key, query = graph.split(f"{path}/Split", mixed, sizes, 1)
        step = graph.dense(f"{path}/dt_proj", f"{module}.dt_proj", step, bias=True)
        step = graph.node("Softplus", f"{path}/Softplus", step)
        decay = graph.store(f"{module}.A", -np.exp(graph.weights[f"{module}.A_log"]))
        return step, key, query, decay

    def convolve(self, index: int, path: str, module: str, value: str) -> str:
        """Shift the window by one token and weigh it, channel by channel."""
        graph, length, path = self.graph, self.config.conv, f"{path}/conv1d"
        one = graph.constant("/conv/one", [1], np.int64)
        end = graph.constant("/conv/length", [length], np.int64)
        last = graph.constant("/conv/axis", [2], np.int64)
        tail = graph.node("Slice", f"{path}/Slice", f"conv_{index}", one, end, last)
        column = graph.node("Unsqueeze", f"{path}/Unsqueeze", value, last)
        window = graph.node("Concat", f"{path}/Concat", tail, column, axis=2)
        window = graph.rename(window, f"conv_{index}_new")
        kernel = self.graph.weights[f"{module}.conv1d.weight"].reshape(-1, length)
        weight = graph.store(f"{module}.conv1d.weight", kernel)
        product = graph.node("Mul", f"{path}/Mul", window, weight)
        total = graph.node("ReduceSum", f"{path}/ReduceSum", product, last, keepdims=0)
        total = graph.node("Add", f"{path}/Add", total, graph.weight(f"{module}.conv1d.bias"))
        return graph.silu(f"{path}/act", total)

    def scan(self, index: int, path: str, module: str, value: str) -> str:
        """``h = exp(dt A) h + dt B x``, ``y = C h``: [1, d_inner]."""
        graph, path = self.graph, f"{path}/ssm"
        one = graph.constant("/ssm/axis_1", [1], np.int64)
        two = graph.constant("/ssm/axis_2", [2], np.int64)
        step, key, query, decay = self.selection(path, module, value)
        drive = graph.node("Mul", f"{path}/Mul", step, value)
        step = graph.node("Unsqueeze", f"{path}/Unsqueeze", step, two)
        drive = graph.node("Unsqueeze", f"{path}/Unsqueeze_1", drive, two)
        key = graph.node("Unsqueeze", f"{path}/Unsqueeze_2", key, one)
        query = graph.node("Unsqueeze", f"{path}/Unsqueeze_3", query, two)
        decay = graph.node("Mul", f"{path}/Mul_1", step, decay)
        decay = graph.node("Exp", f"{path}/Exp", decay)
        state = graph.node("Mul", f"{path}/Mul_2", f"ssm_{index}", decay)
        drive = graph.node("Mul", f"{path}/Mul_3", drive, key)
        state = graph.node("Add", f"{path}/Add", state, drive)
        state = graph.rename(state, f"ssm_{index}_new")
        out = graph.node("MatMul", f"{path}/MatMul", state, query)
        return graph.node("Squeeze", f"{path}/Squeeze", out, two)
